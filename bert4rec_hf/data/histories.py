"""Reading a prepared folder: its histories as arrays of token ids."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..model.configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..reading import read_json

HISTORIES_FILE = "histories.parquet"
PREPARATION_FILE = "preparation.json"
PARTS = ("validation", "test")
TIME = int | float | str
# What preparation.json holds, of prepared folders and of model folders; see `read_json`.
PREPARATION_FORM = {
    "source": str,
    "columns": {"event_columns?": [str], "weight_column?": str, "item_features?": [str]},
    "filters": {"target_event_types?": [str]},
    "split": {"name": str, "validation?": bool, "validation_cut?": TIME, "test_cut?": TIME},
    "max_length": int,
    "filter_seen_items": bool,
    "statistics": {"num_training_events": int, "num_training_users": int, "events_per_type?": {"*": int}},
    "trained_period?": [TIME],
    "checksum?": str,
}
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
        event_type_ids: (events,) int32 types in the ids of the tokenizer, 0 for an unknown one, or None if the
            tokenizer has no event types.
        target_event_type_ids: Ids of the types that are predicted. Empty without event types.
        weights: (events,) float32 weights of the events as labels, or None if the log has no weights.
    """

    user_id: pa.Array | pa.ChunkedArray
    item_ids: np.ndarray
    offsets: np.ndarray
    train_end: np.ndarray
    target_positions: dict[str, np.ndarray]
    timestamps: np.ndarray | None
    event_type_ids: np.ndarray | None = None
    target_event_type_ids: tuple[int, ...] = ()
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def is_training(self) -> np.ndarray:
        """(events,) whether an event belongs to the training part."""
        return self.places() < np.repeat(self.train_end, np.diff(self.offsets))

    def is_trained(self) -> np.ndarray:
        """(events,) whether an event belongs to the training part and its item to the catalogue."""
        return self.is_training() & (self.item_ids >= FIRST_ITEM_ID)

    def is_of_target_type(self) -> np.ndarray:
        """(events,) whether an event is of a type that is predicted. Without event types, all events are."""
        if self.event_type_ids is None:
            return np.ones(len(self.item_ids), bool)
        return np.isin(self.event_type_ids, self.target_event_type_ids)

    def is_recent(self, first: Any = None) -> np.ndarray:
        """(events,) whether an event is in the newest tenth (`RECENT_SHARE`) of the trained events.

        With timestamps, the tenth is taken over the whole log. Without, it is taken from each history, at least one
        event.

        Args:
            first: The time from which on events are recent. None: `recent_from`.
        """
        trained = self.is_trained()
        first = self.recent_from() if first is None else first
        if self.timestamps is not None and first is not None:
            return trained & (self.timestamps >= first)
        first = np.minimum(self.train_end * (1 - RECENT_SHARE), self.train_end - 1)
        return trained & (self.places() >= np.repeat(first, np.diff(self.offsets)))

    def recent_from(self) -> Any:
        """The time of the first event of the newest tenth. None without timestamps or without trained events."""
        trained = self.is_trained()
        if self.timestamps is None or not trained.any():
            return None
        return np.quantile(self.timestamps[trained], 1 - RECENT_SHARE, method="inverted_cdf")

    def places(self) -> np.ndarray:
        """(events,) the position of each event in its history, from 0."""
        return np.arange(len(self.item_ids)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def num_training_events(self) -> int:
        """Number of events of the training part, those of unknown items included."""
        return int(self.is_training().sum())

    def num_targets(self, part: str) -> int:
        """Number of users with a target in `part`, "validation" or "test"."""
        return int((self.target_positions[part] >= 0).sum())

    def parts(self, *, timestamps: bool = False) -> Iterator["Histories"]:
        """These histories as the only part, for functions that also take `StreamedHistories`."""
        yield self

    def select(self, is_selected: np.ndarray) -> "Histories":
        """Some of the histories, in the same order.

        Args:
            is_selected: (users,) booleans.
        """
        if is_selected.all():
            return self
        lengths = np.diff(self.offsets)
        events = np.repeat(is_selected, lengths)
        return Histories(
            user_id=self.user_id.filter(pa.array(is_selected)),
            item_ids=self.item_ids[events],
            offsets=np.concatenate(([0], np.cumsum(lengths[is_selected]))).astype(np.int64),
            train_end=self.train_end[is_selected],
            target_positions={part: values[is_selected] for part, values in self.target_positions.items()},
            timestamps=None if self.timestamps is None else self.timestamps[events],
            event_type_ids=None if self.event_type_ids is None else self.event_type_ids[events],
            target_event_type_ids=self.target_event_type_ids,
            weights=None if self.weights is None else self.weights[events],
        )


class StreamedHistories:
    """The histories of a prepared folder, read part by part, for a log that does not fit into memory.

    A part is a row group of a Parquet file: 16,384 users in a folder that `prepare` wrote.

    Args:
        files: The Parquet files of histories.
        tokenizer: The catalogue.
        has_weights: See `tokenize_histories`.
    """

    def __init__(self, files: Sequence[str | Path], tokenizer: Bert4RecTokenizer, *, has_weights: bool = False):
        self.tokenizer, self.has_weights = tokenizer, has_weights
        self.row_groups = [
            (str(file), number) for file in files for number in range(pq.read_metadata(file).num_row_groups)
        ]
        names = set(pq.read_schema(files[0]).names) if files else set()
        has_types = tokenizer.event_types is not None and "event_type" in names
        self.further_columns = ["event_type"] * has_types + ["weight"] * has_weights
        # Results of functions that read the whole log; see `counting.once`.
        self.remembered: dict[tuple[Any, ...], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"remembered": {}}  # data-loader workers do not need the counts

    def read(self, part: int, *, timestamps: bool = False) -> Histories:
        """Read a part.

        Args:
            part: Number of the part.
            timestamps: Whether to read the times too, which takes as long as all other columns together.
        """
        names = ["user_id", "item_id", "train_end", *(f"{part}_position" for part in PARTS), *self.further_columns]
        return tokenize_histories(
            self._read(part, [*names, "timestamp"] if timestamps else names),
            self.tokenizer,
            has_weights=self.has_weights,
        )

    def parts(self, *, timestamps: bool = False) -> Iterator[Histories]:
        """Read all parts, one after another."""
        for part in range(len(self.row_groups)):
            yield self.read(part, timestamps=timestamps)

    def num_training_events(self) -> int:
        """Number of events of the training part, those of unknown items included."""
        return sum(pc.sum(column).as_py() or 0 for column in self._column("train_end"))

    def num_targets(self, part: str) -> int:
        """Number of users with a target in `part`, "validation" or "test"."""
        return sum(len(column) - column.null_count for column in self._column(f"{part}_position"))

    def _column(self, name: str) -> Iterator[pa.ChunkedArray]:
        for part in range(len(self.row_groups)):
            yield self._read(part, [name])[name]

    def _read(self, part: int, columns: list[str]) -> pa.Table:
        path, row_group = self.row_groups[part]
        with pq.ParquetFile(path) as file:
            return file.read_row_group(row_group, columns, use_threads=False)


# Functions that take these read one part after another.
AnyHistories = Histories | StreamedHistories


def concatenated(parts: Sequence[Histories]) -> Histories:
    """The histories of several parts, at least one, as one object."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    chunks = [
        chunk
        for part in parts
        for chunk in (part.user_id.chunks if isinstance(part.user_id, pa.ChunkedArray) else [part.user_id])
    ]
    has_times = all(part.timestamps is not None for part in parts)

    def joined(name: str) -> np.ndarray | None:
        values = [getattr(part, name) for part in parts]
        return None if any(value is None for value in values) else np.concatenate(values)

    return Histories(
        user_id=pa.chunked_array(chunks, parts[0].user_id.type),
        item_ids=np.concatenate([part.item_ids for part in parts]),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        train_end=np.concatenate([part.train_end for part in parts]),
        target_positions={name: np.concatenate([part.target_positions[name] for part in parts]) for name in PARTS},
        timestamps=np.concatenate([part.timestamps for part in parts]) if has_times else None,
        event_type_ids=joined("event_type_ids"),
        target_event_type_ids=parts[0].target_event_type_ids,
        weights=joined("weights"),
    )


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
    tokenizer, preparation = _catalogue_and_preparation(folder, tokenizer)
    table = pa.concat_tables([pq.read_table(path) for path in histories_files(Path(folder))])
    return tokenize_histories(table, tokenizer, has_weights=_has_weights(preparation)), tokenizer, preparation


def stream_prepared(
    folder: str | os.PathLike, tokenizer: Bert4RecTokenizer | None = None
) -> tuple[StreamedHistories, Bert4RecTokenizer, dict[str, Any]]:
    """Open a folder that `prepare` wrote, as `read_prepared` does, but leave the histories on disk."""
    tokenizer, preparation = _catalogue_and_preparation(folder, tokenizer)
    histories = StreamedHistories(histories_files(Path(folder)), tokenizer, has_weights=_has_weights(preparation))
    return histories, tokenizer, preparation


def _catalogue_and_preparation(
    folder: str | os.PathLike, tokenizer: Bert4RecTokenizer | None
) -> tuple[Bert4RecTokenizer, dict[str, Any]]:
    check_prepared(folder)
    if tokenizer is None:
        tokenizer = Bert4RecTokenizer.from_pretrained(folder)
    preparation = read_preparation(folder)
    targets = preparation.get("filters", {}).get("target_event_types") or []
    if tokenizer.event_types is not None and targets:
        unknown = [name for name in targets if name not in (tokenizer.target_event_types or ())]
        if unknown:
            raise ValueError(
                f"{folder} has targets of the event types {', '.join(targets)}; the model predicts "
                f"{', '.join(tokenizer.target_event_types or ())}: prepare the log with these --target_event_types"
            )
    return tokenizer, preparation


def read_preparation(folder: str | os.PathLike) -> dict[str, Any]:
    """Read preparation.json of a prepared folder or a model folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    return check_period(read_json(Path(folder) / PREPARATION_FILE, PREPARATION_FORM, hint="prepare the log again"))


def check_period(preparation: dict[str, Any]) -> dict[str, Any]:
    """The content of preparation.json. Raises ValueError if its period is not a first and a last time of one kind."""
    period = preparation.get("trained_period")
    if period is not None and (len(period) != 2 or len({isinstance(time, str) for time in period}) > 1):
        raise ValueError(f"trained_period of {PREPARATION_FILE} must be two times of one kind; got {period!r:.80}")
    return preparation


def _has_weights(preparation: dict[str, Any]) -> bool:
    return preparation.get("columns", {}).get("weight_column") is not None


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


def time_type(folder: str | os.PathLike) -> pa.DataType | None:
    """The type of the times in a prepared folder. None if the log has none."""
    schema = pq.read_schema(histories_files(Path(folder))[0])
    return schema.field("timestamp").type.value_type if "timestamp" in schema.names else None


def units_per_second(kind: pa.DataType | None, largest: float) -> int:
    """How many units of the times are a second.

    Args:
        kind: The type of the times.
        largest: The largest absolute time. Numbers are taken for seconds since 1970, which have ten digits today, or
            for milli-, micro- or nanoseconds, which have three, six or nine more.
    """
    units = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    if kind is not None and pa.types.is_timestamp(kind):
        return units[kind.unit]
    return next((unit for unit in units.values() if largest < 10**11 * unit), 10**9)


def tokenize_histories(table: pa.Table, tokenizer: Bert4RecTokenizer, *, has_weights: bool = False) -> Histories:
    """Convert histories to token ids.

    Args:
        table: The table that `histories` returns, as an Arrow table, or histories.parquet of a prepared folder.
        tokenizer: The catalogue.
        has_weights: Whether the column weight has weights of labels. It may also be a column that was only copied.

    Raises:
        ValueError: If the tokenizer has event types and the table has none.
    """
    items = table["item_id"]  # stays chunked, since one Arrow array of strings holds at most 2 GiB of text
    item_ids = [np.zeros(0, np.int32)]
    for chunk in pc.list_flatten(items).chunks:
        encoded = chunk.dictionary_encode()  # each different id is looked up once
        token_ids = [*tokenizer.item_ids_to_token_ids(encoded.dictionary.to_pylist()), UNK_TOKEN_ID]
        places = encoded.indices.fill_null(len(token_ids) - 1).to_numpy()
        item_ids.append(np.array(token_ids, np.int32)[places])
    event_type_ids, weights = None, None
    if tokenizer.event_types is not None:
        if "event_type" not in table.column_names:
            raise ValueError(
                "the model was trained with event types, and these histories have none: prepare the log with "
                "--event_type_column"
            )
        names = pa.array(tokenizer.event_types, pa.string())
        found = pc.index_in(pc.list_flatten(table["event_type"]).cast(pa.string()), names)
        event_type_ids = pc.add(pc.fill_null(found, -1), 1).to_numpy().astype(np.int32)
    if has_weights:
        weights = pc.list_flatten(table["weight"]).to_numpy().astype(np.float32)
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
        event_type_ids=event_type_ids,
        target_event_type_ids=tuple(tokenizer.target_event_type_ids),
        weights=weights,
    )
