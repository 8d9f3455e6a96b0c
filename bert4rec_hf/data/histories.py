"""The prepared folder as arrays: histories in token ids."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..model.configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID
from ..model.tokenization_bert4rec import Bert4RecTokenizer

HISTORIES_FILE = "histories.parquet"
PREPARATION_FILE = "preparation.json"
PARTS = ("validation", "test")
# Share of the training events, the newest, that "recent popularity" counts.
RECENT_SHARE = 0.1


@dataclass
class Histories:
    """Histories in token ids, as one flat array: row i is `item_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        user_id: (users,) strings, in any number of chunks.
        item_ids: (events,) token ids; 2, [UNK], for items that the catalogue lacks.
        offsets: (users + 1,).
        train_end: (users,) so many leading events train.
        target_positions: For each of `PARTS`, (users,): the place of the target in the history, -1 if none.
        timestamps: (events,) or None.
    """

    user_id: pa.Array | pa.ChunkedArray
    item_ids: np.ndarray
    offsets: np.ndarray
    train_end: np.ndarray
    target_positions: dict[str, np.ndarray]
    timestamps: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def is_training(self) -> np.ndarray:
        """(events,) whether an event belongs to the training part."""
        return self.places() < np.repeat(self.train_end, np.diff(self.offsets))

    def is_trained(self) -> np.ndarray:
        """(events,) whether an event trains: it belongs to the training part, and its item to the catalogue."""
        return self.is_training() & (self.item_ids >= FIRST_ITEM_ID)

    def is_recent(self) -> np.ndarray:
        """(events,) the newest tenth of the events that train: by time; without times of each history, one at least."""
        trained = self.is_trained()
        if self.timestamps is not None and trained.any():
            first = np.quantile(self.timestamps[trained], 1 - RECENT_SHARE, method="inverted_cdf")
            return trained & (self.timestamps >= first)
        first = np.minimum(self.train_end * (1 - RECENT_SHARE), self.train_end - 1)
        return trained & (self.places() >= np.repeat(first, np.diff(self.offsets)))

    def places(self) -> np.ndarray:
        """(events,) the place of each in its history, from 0 on."""
        return np.arange(len(self.item_ids)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))


def read_prepared(
    folder: str | os.PathLike, tokenizer: Bert4RecTokenizer | None = None
) -> tuple[Histories, Bert4RecTokenizer, dict[str, Any]]:
    """What `prepare` wrote.

    Args:
        folder: The prepared folder.
        tokenizer: Of a model that goes on training or is evaluated; None: the folder's own.

    Returns:
        The histories in the tokenizer's ids, the tokenizer, the content of preparation.json.

    Raises:
        ValueError: If the folder is no prepared one.
    """
    check_prepared(folder)
    folder = Path(folder)
    preparation = json.loads((folder / PREPARATION_FILE).read_text("utf-8"))
    if tokenizer is None:
        tokenizer = Bert4RecTokenizer.from_pretrained(folder)
    return tokenize_histories(pq.read_table(folder / HISTORIES_FILE), tokenizer), tokenizer, preparation


def check_prepared(folder: str | os.PathLike) -> None:
    """Raise ValueError if a folder is no prepared one."""
    missing = [name for name in (HISTORIES_FILE, PREPARATION_FILE) if not (Path(folder) / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not a prepared folder (it lacks {' and '.join(missing)}): make one with "
            f"bert4rec prepare LOG --output {folder}"
        )


def tokenize_histories(table: pa.Table, tokenizer: Bert4RecTokenizer) -> Histories:
    """Histories as `histories` makes them, in token ids."""
    items = table["item_id"]  # in chunks: one array of strings holds 2 GiB of text at most
    vocabulary = pa.array(tokenizer.items, items.type.value_type)
    indices = pc.index_in(pc.list_flatten(items), value_set=vocabulary)
    item_ids = pc.fill_null(pc.add(indices, FIRST_ITEM_ID), UNK_TOKEN_ID).to_numpy()
    lengths = pc.list_value_length(items).to_numpy()
    timestamps = None
    if "timestamp" in table.column_names:
        times = pc.list_flatten(table["timestamp"])
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.int64())
        timestamps = times.to_numpy()
    return Histories(
        user_id=table["user_id"],
        item_ids=item_ids.astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        train_end=table["train_end"].to_numpy(),
        target_positions={part: pc.fill_null(table[f"{part}_position"], -1).to_numpy() for part in PARTS},
        timestamps=timestamps,
    )
