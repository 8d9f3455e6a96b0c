"""`ItemTable`: what is known about the items of a catalogue, beside their ids, for conditions and quotas."""

import json
import logging
import os
import threading
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.duckdb_tables import without_advice
from ..data.item_tables import read_item_table
from ..model.configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .conditions import condition_sql

logger = logging.getLogger(__name__)

# Time and memory that DuckDB may use for a condition. The table itself is not counted.
TIME_LIMIT_SECONDS = 5.0
MEMORY_LIMIT = "1GB"
# Number of conditions whose results are kept, one byte an item.
MASKS_KEPT = 64
# DuckDB reads no file, loads no extension, writes nothing to the disk and sees no variable of Python.
LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
    "memory_limit": MEMORY_LIMIT,
    "threads": 1,
}


class ItemTable:
    """A row of values for each item of a catalogue.

        items = ItemTable.read("items.parquet", tokenizer)
        items.mask("category = 'shoes' AND price < 50")

    Attributes:
        table: (items,) rows in the order of the token ids; row i belongs to token id i + 3. An item that the file lacks
            has nulls.
        source: The name of the file.
    """

    def __init__(self, table: pa.Table, source: str):
        self.table, self.source = table, source
        self._kept_masks = lru_cache(maxsize=MASKS_KEPT)(self._evaluate)

    def __reduce__(self) -> tuple[type, tuple[pa.Table, str]]:
        return ItemTable, (self.table, self.source)

    def __len__(self) -> int:
        return len(self.table)

    @classmethod
    def read(cls, path: str | os.PathLike, tokenizer: Bert4RecTokenizer) -> "ItemTable":
        """Read a file with one row per item.

        Args:
            path: A file of Parquet, CSV or JSON lines with the column item_id and any others. The text of CSV and JSON
                becomes numbers, booleans or timestamps if all values of its column are.
            tokenizer: The catalogue. Rows of items that it lacks are left out, with a warning.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file cannot be read, has no column item_id, or has an item twice or a row without one; or
                if the catalogue has none of its items.
        """
        table, path = read_item_table(path), os.fspath(path)
        item_ids = table["item_id"].to_pylist()
        token_ids = np.array(tokenizer.item_ids_to_token_ids(item_ids), np.int64)
        is_known = token_ids != UNK_TOKEN_ID
        if not is_known.any():
            raise ValueError(
                f"the catalogue has none of the {len(item_ids):,} items of {path} "
                f"({', '.join(map(repr, item_ids[:3]))}); its ids look like {tokenizer.items[0]!r}"
            )
        if not is_known.all():
            lacking = item_ids[int(np.argmin(is_known))]
            logger.warning("%s: left out %d rows of items that the catalogue lacks, such as %r",
                           path, int((~is_known).sum()), lacking)  # fmt: skip
        places = np.full(tokenizer.num_items, -1)
        places[token_ids[is_known] - FIRST_ITEM_ID] = np.flatnonzero(is_known)
        # The ids come from the catalogue, so that items without a row have one too.
        table = table.take(pa.array(places, mask=places < 0)).drop_columns(["item_id"])
        return cls(table.add_column(0, "item_id", pa.array(tokenizer.items, pa.string())), path)

    def row(self, token_id: int) -> dict[str, Any]:
        """The values of an item by column, as JSON has them: times and other types as text, NaN as null.

        Args:
            token_id: The token id of the item.
        """
        (values,) = self.table.slice(token_id - FIRST_ITEM_ID, 1).drop_columns(["item_id"]).to_pylist()
        return json.loads(json.dumps(values, default=str), parse_constant=lambda name: None)

    def mask(self, condition: str) -> np.ndarray:
        """(items,) whether each item meets a condition. Null, such as a comparison with a missing value, is false.

        Args:
            condition: See `conditions.OPERATORS` and `conditions.FUNCTIONS` for what it may have.

        Raises:
            ValueError: If the condition has anything else, does not fit the types of the columns, is not true or false,
                or takes longer than `TIME_LIMIT_SECONDS`.
        """
        # What is no text, and may not be hashable, is refused in `condition_sql`.
        return self._kept_masks(condition) if isinstance(condition, str) else self._evaluate(condition)

    def _evaluate(self, condition: str) -> np.ndarray:
        sql = condition_sql(condition, self.table.column_names)
        # A connection of its own, so that threads can compute conditions at once.
        connection = duckdb.connect(config=LOCKED)
        timer = threading.Timer(TIME_LIMIT_SECONDS, connection.interrupt)
        try:
            connection.register("items", self.table)
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute("SET lock_configuration = true")
            timer.start()
            result = connection.execute(f"SELECT {sql} AS passes FROM items")
            kind = str(result.description[0][1])
            passes = result.fetchnumpy()["passes"]
        except duckdb.InterruptException as error:
            raise ValueError(
                f"condition {condition!r:.100}: it takes longer than {TIME_LIMIT_SECONDS:g} seconds on {len(self):,} "
                "items; simplify it, or add a column to the item table"
            ) from error
        except duckdb.Error as error:
            raise ValueError(
                f"condition {condition!r:.100} does not fit the columns of {self.source}: {without_advice(error)}"
            ) from error
        finally:
            timer.cancel()
            connection.close()
        if not kind.upper().startswith("BOOL"):
            raise ValueError(f"condition {condition!r:.100}: expected a value that is true or false; got {kind}")
        passes = np.ma.filled(passes, False)
        passes.flags.writeable = False  # it is kept
        return passes

    def values_of(self, column: str) -> np.ndarray:
        """The values of a column as numbers, for quotas.

        Returns:
            (items, W) int64 a number from 1 for each value of the item, padded with 0. W is 1, or the length of the
            longest list of a column of lists; a value that a list has twice counts once. A null has no number.

        Raises:
            ValueError: If there is no such column, or its values are neither single values nor lists of them.
        """
        if column not in self.table.column_names:
            nearest = get_close_matches(column, self.table.column_names, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(self.table.column_names)}"
            raise ValueError(f"{self.source} has no column {column!r}; {hint}")
        values = self.table[column].combine_chunks()
        rows = pa.array(np.arange(len(values)))
        kind = values.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            rows, values = pc.list_parent_indices(values), pc.list_flatten(values)
        try:
            codes = values.dictionary_encode().indices
        except pa.ArrowException as error:
            raise ValueError(
                f"column {column!r} of {self.source} is {kind}; expected text, numbers, booleans, times, or lists"
            ) from error
        is_there = codes.is_valid()
        pairs = np.stack((rows.filter(is_there).to_numpy(), codes.drop_null().to_numpy()))
        owners, numbers = np.unique(pairs, axis=1)
        counts = np.bincount(owners, minlength=len(self))
        found = np.zeros((len(self), max(int(counts.max()), 1)), np.int64)
        found[owners, np.arange(len(owners)) - (counts.cumsum() - counts)[owners]] = numbers + 1
        return found
