"""From a prepared folder to the rows that train and the rows that are ranked (`datasets.Dataset`)."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset

from .configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID
from .losses import IGNORE_INDEX
from .tokenization_bert4rec import Bert4RecTokenizer

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


def training_rows(
    histories: Histories, *, max_length: int | None = None, windows: str = "whole", window_step: float = 0.5
) -> Dataset:
    """The training part of each history that has one.

    Args:
        histories: As `read_prepared` returns them.
        max_length: Of the model; not needed for whole histories.
        windows: "whole": each history once, whole; the data collator cuts the windows. "proportional": the same, but a
            history of n items stands in the dataset ceil(n / max_length) times, so that an epoch draws windows in
            proportion to its length. "sliding": every window of max_length items, counted back from the newest.
        window_step: How far a sliding window moves, as a share of max_length.

    Returns:
        user_id (string), input_ids (list<int32>).

    Raises:
        ValueError: If `windows` is unknown or lacks a `max_length`, or if nobody has a training part.
    """
    if windows not in ("whole", "proportional", "sliding"):
        raise ValueError(f"windows must be whole, proportional or sliding; got {windows!r}")
    if windows != "whole" and max_length is None:
        raise ValueError(f"{windows} windows need a max_length, the model's max_position_embeddings")
    kept = histories.is_trained()
    offsets = np.concatenate(([0], np.cumsum(kept)))[histories.offsets]
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(histories.item_ids[kept]))
    lengths = np.diff(offsets)
    if not lengths.any():
        raise ValueError("no history has a training part; prepare a log with more events a user")
    rows = Dataset(pa.table({"user_id": histories.user_id, "input_ids": lists}))
    if windows == "whole":
        return rows.select(np.flatnonzero(lengths))
    assert max_length is not None  # for the type checker
    if windows == "proportional":
        return rows.select(np.repeat(np.arange(len(histories)), -(-lengths // max_length)))
    step = max(1, int(window_step * max_length))
    num_windows = np.where(lengths > 0, 1 + -(-np.maximum(lengths - max_length, 0) // step), 0)
    rows = rows.select(np.repeat(np.arange(len(histories)), num_windows))
    steps = np.concatenate([np.arange(number) for number in num_windows])
    ends = np.repeat(offsets[1:], num_windows) - steps * step
    starts = np.maximum(ends - max_length, np.repeat(offsets[:-1], num_windows))
    # The oldest window is as long as the others.
    ends = np.minimum(starts + max_length, np.repeat(offsets[1:], num_windows))
    token_ids = histories.item_ids[kept]
    cut = _lists([token_ids[start:end] for start, end in zip(starts, ends, strict=True)])
    return Dataset(pa.table({"user_id": rows.with_format("arrow")["user_id"][:], "input_ids": cut}))


def stream_training_rows(files: str | Path | Sequence[str], tokenizer: Bert4RecTokenizer) -> IterableDataset:
    """The rows of `training_rows`, read as they are needed: for histories that do not fit into memory.

    Args:
        files: Parquet files as `histories` or `prepare` writes them, paths or glob patterns. Processes and data-loader
            workers share them out; with as many files as there are of these, each reads its own only.
        tokenizer: The catalogue.

    Returns:
        input_ids (list<int32>); histories without a training part are left out.
    """
    files = str(files) if isinstance(files, Path) else files
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    # Functions of the module, which data-loader workers can be sent.
    rows = rows.map(_tokenize, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows.column_names)
    return rows.filter(_has_items)


def _tokenize(row: Mapping[str, Any], tokenizer: Bert4RecTokenizer) -> dict[str, list[int]]:
    token_ids = tokenizer.item_ids_to_token_ids(row["item_id"][: row["train_end"]])
    return {"input_ids": [token_id for token_id in token_ids if token_id != UNK_TOKEN_ID]}


def _has_items(row: Mapping[str, Any]) -> bool:
    return len(row["input_ids"]) > 0


def ranking_rows(
    histories: Histories,
    tokenizer: Bert4RecTokenizer,
    part: str,
    *,
    filter_seen_items: bool,
    max_length: int | None = None,
) -> Dataset:
    """One row for each user that has a target: what serving would get, and the target.

    Args:
        histories: As `read_prepared` returns them.
        tokenizer: Appends the [MASK].
        part: "validation" or "test".
        filter_seen_items: Whether a user's past items are excluded, those before the window as well.
        max_length: Of the model; None: the tokenizer's.

    Returns:
        user_id; input_ids ending with [MASK]; labels, -100 but for the target in the [MASK]'s place, and there
        too if the catalogue lacks the target; exclude_ids; history_length, the number of events before the target.

    Raises:
        ValueError: If `part` is neither.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}")
    users = np.flatnonzero(histories.target_positions[part] >= 0)
    positions = histories.target_positions[part][users]
    starts = histories.offsets[users]
    targets = histories.item_ids[starts + positions]
    rows, exclude_ids = [], []
    for start, position in zip(starts, positions, strict=True):
        past = histories.item_ids[start : start + position]
        past = past[past != UNK_TOKEN_ID]
        row = np.array(tokenizer.append_mask(past.tolist(), max_length), np.int32)
        rows.append(row)
        exclude_ids.append(np.unique(past) if filter_seen_items else np.zeros(0, np.int32))
    input_ids = _lists(rows)
    labels = np.full(len(input_ids.values), IGNORE_INDEX, np.int32)
    labels[input_ids.offsets.to_numpy()[1:] - 1] = np.where(targets == UNK_TOKEN_ID, IGNORE_INDEX, targets)
    table = {
        # Not take, which makes one array of the chunks.
        "user_id": histories.user_id.filter(pa.array(histories.target_positions[part] >= 0)),
        "input_ids": input_ids,
        "labels": pa.ListArray.from_arrays(input_ids.offsets, pa.array(labels)),
        "exclude_ids": _lists(exclude_ids),
        "history_length": pa.array(positions, pa.int32()),
    }
    return Dataset(pa.table(table))


def sampled_candidates(rows: Dataset, histories: Histories, *, num_candidates: int = 100, seed: int = 42) -> Dataset:
    """Evaluation rows with `candidate_ids`: items to rank the target among, as in Sun et al. 2019, section 4.2.

    They are drawn by popularity, each once, among the items that the user never had. A metric of them is no metric of
    the catalogue and may order models differently (Krichene & Rendle, KDD 2020).

    Args:
        rows: Of `ranking_rows`.
        histories: Those of the rows; popularity is the number of events in their training part.
        num_candidates: Fewer, where a user has had all but so many of the items that occur.
        seed: Equal seeds give equal candidates.
    """
    counts = np.bincount(histories.item_ids[histories.is_trained()])
    cumulative, occurring = counts.cumsum(), np.flatnonzero(counts)
    users = {user_id: number for number, user_id in enumerate(histories.user_id.to_pylist())}
    candidates = []
    for user_id in rows["user_id"]:
        start, end = histories.offsets[users[user_id] : users[user_id] + 2]
        had = np.unique(histories.item_ids[start:end])
        random = np.random.default_rng((seed, users[user_id]))
        others = np.setdiff1d(occurring, had, assume_unique=True)
        wanted, drawn = min(num_candidates, len(others)), np.zeros(0, np.int64)
        if len(others) < 10 * num_candidates:  # the last of few would be long in coming: the same by a race of all
            drawn = others[(random.standard_exponential(len(others)) / counts[others]).argsort()]
        while len(drawn) < wanted:
            # Drawn one after the other, with what has come before and what the user has had passed over.
            draws = random.integers(cumulative[-1], size=4 * num_candidates)
            more = cumulative.searchsorted(draws, side="right")
            items, first = np.unique(np.concatenate((drawn, more[~np.isin(more, had)])), return_index=True)
            drawn = items[first.argsort()]
        candidates.append(drawn[:wanted])
    return rows.add_column("candidate_ids", _lists(candidates))


def _lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of int32 lists; pa.array would make a Python object of every number."""
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.zeros(0, np.int32), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))
