"""Reading a prepared folder: its histories as arrays of token ids."""

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
# Share of the training events, counted from the newest, that the baseline "recent popularity" uses.
RECENT_SHARE = 0.1


@dataclass
class Histories:
    """Histories in token ids, as one flat array: row i is `item_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        user_id: (users,) strings, in any number of chunks.
        item_ids: (events,) int32 token ids; 2, that of [UNK], for an item that is not in the catalogue.
        offsets: (users + 1,) int64, where each history starts and ends in `item_ids`.
        train_end: (users,) number of leading events that train.
        target_positions: For each of `PARTS`, (users,): the position of the target in the history, or -1 without one.
        timestamps: (events,) numbers in the unit of the log, or None if the log has no times.
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
        """(events,) whether an event belongs to the training part and its item to the catalogue."""
        return self.is_training() & (self.item_ids >= FIRST_ITEM_ID)

    def is_recent(self) -> np.ndarray:
        """(events,) whether an event is in the newest tenth (`RECENT_SHARE`) of the trained events.

        With timestamps, the tenth is taken over the whole log. Without, it is taken from each history, at least one
        event.
        """
        trained = self.is_trained()
        if self.timestamps is not None and trained.any():
            first = np.quantile(self.timestamps[trained], 1 - RECENT_SHARE, method="inverted_cdf")
            return trained & (self.timestamps >= first)
        first = np.minimum(self.train_end * (1 - RECENT_SHARE), self.train_end - 1)
        return trained & (self.places() >= np.repeat(first, np.diff(self.offsets)))

    def places(self) -> np.ndarray:
        """(events,) the position of each event in its history, from 0."""
        return np.arange(len(self.item_ids)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))


def read_prepared(
    folder: str | os.PathLike, tokenizer: Bert4RecTokenizer | None = None
) -> tuple[Histories, Bert4RecTokenizer, dict[str, Any]]:
    """Read a folder that `prepare` wrote.

    Args:
        folder: The prepared folder.
        tokenizer: The tokenizer of a trained model that is trained further or evaluated. None: the folder's own.

    Returns:
        The histories in the tokenizer's token ids, the tokenizer, and the content of preparation.json.

    Raises:
        ValueError: If the folder is not a prepared folder.
    """
    check_prepared(folder)
    folder = Path(folder)
    preparation = json.loads((folder / PREPARATION_FILE).read_text("utf-8"))
    if tokenizer is None:
        tokenizer = Bert4RecTokenizer.from_pretrained(folder)
    table = pa.concat_tables([pq.read_table(path) for path in histories_files(folder)])
    return tokenize_histories(table, tokenizer), tokenizer, preparation


def check_prepared(folder: str | os.PathLike) -> None:
    """Raise ValueError if a folder is not a prepared folder."""
    missing = [] if histories_files(Path(folder)) else [HISTORIES_FILE]
    if not (Path(folder) / PREPARATION_FILE).is_file():
        missing.append(PREPARATION_FILE)
    if missing:
        raise ValueError(
            f"{folder} is not a prepared folder (it lacks {' and '.join(missing)}): make one with "
            f"bert4rec prepare LOG --output {folder}"
        )


def histories_file(number: int, number_of_files: int) -> str:
    """The name of a file of histories. The files of a large log are named as in `datasets`."""
    return HISTORIES_FILE if number_of_files == 1 else f"histories-{number:05d}-of-{number_of_files:05d}.parquet"


def histories_files(folder: Path) -> list[Path]:
    """The files of histories of a prepared folder, in order. An empty list: there are none.

    Raises:
        ValueError: If some of the files are missing.
    """
    if (folder / HISTORIES_FILE).is_file():
        return [folder / HISTORIES_FILE]
    found = sorted(folder.glob("histories-*-of-*.parquet"))
    expected = [folder / histories_file(number, len(found)) for number in range(len(found))]
    if found != expected:
        raise ValueError(
            f"{folder} has {', '.join(path.name for path in found)}, which are not all files of one log: prepare the "
            "log again"
        )
    return found


def tokenize_histories(table: pa.Table, tokenizer: Bert4RecTokenizer) -> Histories:
    """Convert histories to token ids.

    Args:
        table: The table that `histories` returns, as an Arrow table, or histories.parquet of a prepared folder.
        tokenizer: The catalogue.
    """
    items = table["item_id"]  # stays chunked, since one Arrow array of strings holds at most 2 GiB of text
    item_ids = [np.zeros(0, np.int32)]
    for chunk in pc.list_flatten(items).chunks:
        encoded = chunk.dictionary_encode()  # each different id is looked up once
        token_ids = [*tokenizer.item_ids_to_token_ids(encoded.dictionary.to_pylist()), UNK_TOKEN_ID]
        places = encoded.indices.fill_null(len(token_ids) - 1).to_numpy()
        item_ids.append(np.array(token_ids, np.int32)[places])
    lengths = pc.list_value_length(items).to_numpy()
    timestamps = None
    if "timestamp" in table.column_names:
        times = pc.list_flatten(table["timestamp"])
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.int64())
        timestamps = times.to_numpy()
    return Histories(
        user_id=table["user_id"],
        item_ids=np.concatenate(item_ids),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        train_end=table["train_end"].to_numpy(),
        target_positions={part: pc.fill_null(table[f"{part}_position"], -1).to_numpy() for part in PARTS},
        timestamps=timestamps,
    )
