"""Item tables: files with one row per item, and the columns of them that say what an item is."""

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..model.item_features import KINDS, ItemFeatures
from .duckdb_tables import LIBRARY_ERRORS, SOURCE_ROW
from .file_formats import JSONColumnError
from .log_files import is_parquet
from .logs import Log, open_log
from .values import LOCAL_TIME, as_id, with_types

logger = logging.getLogger(__name__)

# The item table of a prepared folder and of a model folder.
ITEM_TABLE_FILE = "items.parquet"
# Text with more different values than this share of the items says nothing about other items.
MAX_SHARE_OF_VALUES = 0.5
# Separators of several values in one text, in the order in which they are looked for.
SEPARATORS = ("|", ";", ",")
# Names of columns that count what people did, and so know the future.
COUNTS_OF_PEOPLE = re.compile(
    r"(^|_)(rating|review|sale|view|purchase|order|click|like|vote|play|download|event|interaction)s?_?(count|number)s?$"
    r"|^(num|number|count|n|total)_?(of_)?(rating|review|sale|view|purchase|order|click|like|vote|play|download)s?$"
    r"|(^|_)(popularity|sales|units_sold|bestseller|rank|ranking)$",
    re.IGNORECASE,
)
# A column of numbers whose ranks agree with those of the training events to this degree is suspected of the same.
MAX_RANK_CORRELATION = 0.7
# Most rows, and characters and elements of lists, that a table may have for each byte of its file, and beyond that.
ROWS_PER_BYTE, MORE_ROWS = 8, 10_000_000
LENGTH_PER_BYTE, MORE_LENGTH = 100, 2**32


def read_item_table(path: str | os.PathLike, item_column: str = "item_id", *, texts: Collection[str] = ()) -> pa.Table:
    """Read a file with one row per item.

    Args:
        path: A file of Parquet, CSV or JSON lines with a column of item ids, of text or integers, and any others. The
            text of CSV and JSON becomes numbers, booleans or timestamps if all values of its column are.
        item_column: The column of the ids.
        texts: Columns of CSV and JSON that stay text.

    Returns:
        The columns of the file in the order of its rows, without those that have no name, hold bytes that are no text
        (pictures), or objects or values of several types (JSON). The ids are text, in a column item_id. NaN is null.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, has no column of ids, or has an item twice or a row without one.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"there is no file {path}; expected an item table, Parquet, CSV or JSON lines, with {item_column}"
        )
    log = open_log(path)
    if item_column not in log.columns:
        raise ValueError(f"{path} has the columns {', '.join(log.columns)}; expected {item_column} and others")
    if item_column != "item_id" and "item_id" in log.columns:
        raise ValueError(f"{path} has a column item_id beside {item_column}, which holds the ids: rename or drop it")
    try:
        no_texts = _columns_of_no_text(path) if is_parquet(path) else []
        if "" in log.columns:
            logger.warning("%s: a column has no name, such as the index that pandas writes, and is left out", path)
        names = [name for name in log.columns if name not in ("", item_column, *no_texts)]
        rows = _of_one_type(log, item_column, names)
        _check_size(rows, path)
        rows = _typed(rows, [name for name in names if name not in texts]) if log.is_text else rows
        rows = rows.mutate(item_id=as_id(rows, item_column, path)).order_by(SOURCE_ROW)
        table = rows.select("item_id", *names).to_pyarrow()
    except LIBRARY_ERRORS as error:
        raise log.error(error) from error
    row_of: dict[str, int] = {}
    for row, item in enumerate(table["item_id"].to_pylist()):
        if item is None:
            raise ValueError(f"{path}, row {row} (the first is 0): expected an {item_column}; got null")
        if row_of.setdefault(item, row) != row:
            raise ValueError(
                f"{path}, rows {row_of[item]} and {row} (the first is 0): expected one row per item; got {item!r} twice"
            )
    for number, column in enumerate(table.columns):
        if pa.types.is_floating(column.type):  # DuckDB takes NaN for the largest number
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
            table = table.set_column(number, table.column_names[number], column)
    return table


def _of_one_type(log: Log, item_column: str, names: list[str]) -> ir.Table:
    """The columns, without those of JSON that hold objects or several types; these are also taken from `names`."""
    while True:
        try:
            return log.table([item_column, *names])
        except JSONColumnError as error:
            if error.column == item_column:
                raise
            logger.warning("%s; it is left out", error)
            names.remove(error.column)


def _columns_of_no_text(path: str) -> list[str]:
    """The columns of a Parquet file whose bytes are no text, such as pictures. Each is warned of."""
    found = []
    for field in pq.read_schema(path):
        kind = field.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
            try:
                pq.read_table(path, columns=[field.name]).column(0).cast(pa.string())
            except pa.ArrowException:
                logger.warning("%s: the column %s has bytes that are no text, and is left out", path, field.name)
                found.append(field.name)
    return found


def read_stored_table(path: str | os.PathLike) -> pa.Table:
    """The item table of a prepared folder or a model folder, as it was written. It may be a stranger's.

    Raises:
        ValueError: If the file cannot be read, or its values are far larger than the file.
    """
    log = open_log(os.fspath(path))
    try:
        _check_size(log.table(log.columns), os.fspath(path))
        return pq.read_table(path)
    except LIBRARY_ERRORS as error:
        raise log.error(error) from error


def _check_size(rows: ir.Table, path: str) -> None:
    """Raise ValueError if a table has far more values, or longer ones, than its file has bytes.

    Repeated values take nearly no place in Parquet, so a small file may have a billion rows, while ids differ.
    """
    found = {"number": rows.count()}
    for place, name in enumerate(rows.columns):
        if rows[name].type().is_string() or rows[name].type().is_array():
            found[f"length_{place}"] = rows[name].length().cast("float64").sum()
    row = rows.aggregate(**found).to_pyarrow().to_pylist()[0]
    size, number = os.path.getsize(path), row.pop("number")
    length = sum(value or 0 for value in row.values())
    if number > ROWS_PER_BYTE * size + MORE_ROWS or length > LENGTH_PER_BYTE * size + MORE_LENGTH:
        raise ValueError(
            f"{path} has {number:,} rows, and {length:,.0f} characters and elements of lists, in {size:,} bytes, as no "
            "item table has: write it with one row per item"
        )


def feature_columns(table: pa.Table, wanted: Sequence[str], source: str) -> list[dict[str, Any]]:
    """What each item feature is: a name, a kind of `item_features.KINDS`, and for text with several values a separator.

    Args:
        table: The item table.
        wanted: `NAME`, `NAME:KIND` or, for several values in one text, `NAME:categories:SEPARATOR`. Without a kind, it
            follows from the values: text is a category, or several if half of the values contain one of `SEPARATORS`.
        source: The name of the file, for errors.

    Raises:
        ValueError: If there is no such column or kind, a column is named twice, or its values are of no kind.
    """
    found: list[dict[str, Any]] = []
    for text in wanted:
        name, _, rest = text.partition(":") if text not in table.column_names else (text, "", "")
        kind, _, separator = rest.partition(":")
        if name not in table.column_names or name == "item_id":
            others = [other for other in table.column_names if other != "item_id"]
            nearest = get_close_matches(name, others, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"it has {', '.join(others)}"
            raise ValueError(f"item feature {text!r}: {source} has no column {name!r}; {hint}")
        if kind and kind not in KINDS:
            raise ValueError(f"item feature {text!r}: expected a kind of {', '.join(KINDS)}; got {kind!r}")
        if any(column["name"] == name for column in found):
            raise ValueError(f"item feature {name!r} is named twice")
        column = {"name": name} | (_kind_of(table[name], text, source) if not kind else {"kind": kind})
        if column["kind"] == "categories" and kind:
            given = separator or _separator(table[name])
            column |= {"separator": given} if given else {}
        found.append(column)
    return found


def spelled_feature(column: Mapping[str, Any]) -> str:
    """A feature as `feature_columns` reads it."""
    parts = [column.get("source", column["name"]), column["kind"], column.get("separator")]
    return ":".join(part for part in parts if part)


def fit_features(
    table: pa.Table, columns: Sequence[Mapping[str, Any]], counts: Mapping[str, int], source: str
) -> ItemFeatures:
    """Fit the features on the items that train, and warn of columns that seem to know the future.

    Args:
        table: The item table.
        columns: What `feature_columns` returns.
        counts: Number of training events by item.
        source: The name of the file, for warnings and errors.

    Raises:
        ValueError: If no item of the table trains, or the values do not fit.
    """
    events = np.array([counts.get(item, 0) for item in table["item_id"].to_pylist()])
    if not events.any():
        known = ", ".join(map(repr, list(counts)[:3]))
        raise ValueError(
            f"{source} has none of the items of the log: its ids look like "
            f"{', '.join(map(repr, table['item_id'].to_pylist()[:3]))}, those of the log like {known}"
        )
    trained = table.filter(pa.array(events > 0))
    for column in columns:
        correlation = 0.0
        if column["kind"] == "number":
            correlation = _rank_correlation(trained[column["name"]], events[events > 0])
        if COUNTS_OF_PEOPLE.search(column["name"]) or abs(correlation) > MAX_RANK_CORRELATION:
            why = f"its ranks agree with those of the events to {correlation:.2f}" if correlation else "by its name"
            logger.warning(
                "item feature %s looks like a count of what people did (%s): if it was counted after the split, it "
                "knows the targets, and no new item has it; leave it out, or count it at the cut",
                column["name"], why,
            )  # fmt: skip
    try:
        return ItemFeatures.fit(columns, trained.select([column["name"] for column in columns]).to_pydict())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def describe(features: ItemFeatures, table: pa.Table) -> list[str]:
    """A line for each feature: its kind, what was fitted, and how many items have it."""
    lines = []
    for column in features.columns:
        there = len(table) - table[column["name"]].null_count if column["name"] in table.column_names else 0
        what = column["kind"]
        if "values" in column:
            what += f", {len(column['values']):,} values"
            what += f" separated by {column['separator']!r}" if column.get("separator") else ""
        elif "width" in column:
            what += f" of {column['width']} numbers"
        elif column.get("logarithm"):
            what += ", logarithm"
        lines.append(f"{column['name']}: {what}; {there:,} of {len(table):,} items have it")
    return lines


def _kind_of(values: pa.ChunkedArray, text: str, source: str) -> dict[str, Any]:
    kind = values.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return {"kind": "boolean"}
    if (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_temporal(kind)
    ):
        return {"kind": "number"}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return {"kind": "vector" if pa.types.is_floating(kind.value_type) else "categories"}
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        separator = _separator(values)
        if separator is not None:
            return {"kind": "categories", "separator": separator}
        num_known = len(values) - values.null_count
        if pc.count_distinct(values).as_py() > max(2, MAX_SHARE_OF_VALUES * num_known):
            raise ValueError(
                f"item feature {text!r}: most items of {source} have a value of their own; leave the column out, give "
                f"{text}:text with --text_encoder, or {text}:category if the values do come again"
            )
        return {"kind": "category"}
    raise ValueError(
        f"item feature {text!r}: column {text!r} of {source} is {kind}; expected text, numbers, booleans, times, or "
        "lists of text or numbers"
    )


def _separator(values: pa.ChunkedArray) -> str | None:
    """The separator that half of the texts have, if there is one."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return None
    known = values.drop_null()
    for separator in SEPARATORS:
        if len(known) and pc.mean(pc.match_substring(known, separator)).as_py() >= 0.5:
            return separator
    return None


def _rank_correlation(values: pa.ChunkedArray, events: np.ndarray) -> float:
    """Spearman's correlation of a column with the number of events; 0 if it cannot be said."""
    if pa.types.is_temporal(values.type) or pa.types.is_string(values.type):
        return 0.0
    is_there = values.is_valid().to_numpy()
    if is_there.sum() < 10:
        return 0.0
    given = values.drop_null().cast(pa.float64(), safe=False).to_numpy()
    if any(array.min() == array.max() for array in (given, events[is_there])):
        return 0.0
    ranks = [pc.rank(pa.array(array)).to_numpy().astype(float) for array in (given, events[is_there])]
    return float(np.corrcoef(*ranks)[0, 1])


def _typed(rows: ir.Table, names: list[str]) -> ir.Table:
    """Columns of text whose values are all numbers, all true or false, or all times, as columns of that type."""
    rows = with_types(rows, names)
    texts = {name: rows[name].strip().nullif("") for name in names if rows[name].type().is_string()}
    if not texts:
        return rows
    times = {name: text.replace("/", "-").try_cast("timestamp") for name, text in texts.items()}
    # The names of the results hold numbers, since a name of a column may not be fit for a part of another.
    numbered = list(enumerate(texts.items()))
    found = {f"is_boolean_{place}": text.lower().isin(["true", "false"]).all() for place, (_, text) in numbered}
    found |= {
        f"is_time_{place}": (text.isnull() | (text.re_search(LOCAL_TIME) & times[name].notnull())).all()
        & text.notnull().any()
        for place, (name, text) in numbered
    }
    is_all = rows.aggregate(**found).to_pyarrow().to_pylist()[0]
    typed: dict[str, Any] = {name: times[name] for place, (name, _) in numbered if is_all[f"is_time_{place}"]}
    typed |= {name: text.lower().cast("boolean") for place, (name, text) in numbered if is_all[f"is_boolean_{place}"]}
    return rows.mutate(**typed)
