"""From histories to training rows and ranking rows (`datasets.Dataset`)."""

import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset, load_dataset

from ..defaults import STREAMED_EVAL_SAMPLES
from ..model.configuration_bert4rec import UNK_TOKEN_ID
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .histories import PARTS, AnyHistories, Histories, StreamedHistories, concatenated

# Number of streamed rows that are shuffled together.
SHUFFLE_BUFFER_SIZE = 2**16
NO_TARGET_TRAINS = "no history has an event of a target type in its training part; name other target_event_types"
NOTHING_TRAINS = "no history has a training part; prepare a log with more events per user"


def training_rows(
    histories: Histories, *, max_length: int | None = None, windows: str = "whole", window_step: float = 0.5
) -> Dataset:
    """Rows for training: the training part of each history. Histories without one are left out.

    Args:
        histories: Histories from `read_prepared`.
        max_length: Longest input of the model. Not needed with `windows="whole"`.
        windows: "whole": each history is one uncut row; the data collator cuts windows. "proportional": a history of n
            items is ceil(n / max_length) uncut rows, so that the number of windows in an epoch is proportional to its
            length. "sliding": one row for each window of `max_length` items, starting from the newest items.
        window_step: Distance between two sliding windows, as a share of `max_length`.

    Returns:
        Columns user_id (string) and input_ids (list<int32>); and, if the histories have them, event_type_ids
        (list<int32>) and loss_weights (list<float>). With event types, rows without an event of a target type are left
        out, since nothing is predicted in them.

    Raises:
        ValueError: If `windows` is unknown, if it needs a `max_length` and gets none, or if no history has a training
            part.
    """
    columns, offsets = _training_part(histories)
    users, starts, ends = _with_targets(histories, columns, *_cuts(offsets, max_length, windows, window_step))
    if not len(users):
        raise ValueError(NOTHING_TRAINS if histories.event_type_ids is None else NO_TARGET_TRAINS)
    lists = {
        name: pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
        for name, values in columns.items()
    }
    rows = Dataset(pa.table({"user_id": histories.user_id, **lists})).select(users)
    if windows != "sliding":
        return rows
    lists = _cut_lists(columns, starts, ends)
    return Dataset(pa.table({"user_id": rows.with_format("arrow")["user_id"][:], **lists}))


def update_rows(histories: Histories, after: Any, *, max_length: int, seed: int = 0) -> Dataset:
    """Rows for training a model further on new events, mixed with as many old rows so that it does not forget.

    - A history with new events is one row: its newest `max_length` items, or its newest 2 n if more than half of these
      would be its n new items.
    - For each of these rows, an old row is a part of a history that is drawn at random: a user with a probability that
      is proportional to the number of windows in the history, and then `max_length` of the items.

    Args:
        histories: Histories from `read_prepared`, with times.
        after: Events are new if their time is above this one, a number in the unit of the log.
        max_length: Longest input of the model.
        seed: Equal seeds give equal rows.

    Returns:
        The columns of `training_rows`. Without new events, there are no rows.
    """
    assert histories.timestamps is not None  # for the type checker
    columns, offsets = _training_part(histories)
    is_new = np.concatenate(([0], np.cumsum(histories.timestamps[histories.is_trained()] > after)))
    num_new = is_new[offsets[1:]] - is_new[offsets[:-1]]
    users = np.flatnonzero(num_new)
    ends = offsets[1:][users]
    starts = np.maximum(ends - np.maximum(max_length, 2 * num_new[users]), offsets[:-1][users])

    random = np.random.default_rng(seed)
    num_windows = np.cumsum(-(-np.diff(offsets) // max_length))
    old_users = np.searchsorted(num_windows, random.integers(max(1, num_windows[-1]), size=len(users)), side="right")
    spare = np.maximum(np.diff(offsets)[old_users] - max_length, 0)
    old_starts = offsets[:-1][old_users] + random.integers(spare + 1)
    old_ends = np.minimum(old_starts + max_length, offsets[1:][old_users])

    users = np.concatenate((users, old_users))
    starts, ends = np.concatenate((starts, old_starts)), np.concatenate((ends, old_ends))
    users, starts, ends = _with_targets(histories, columns, users, starts, ends)
    lists = _cut_lists(columns, starts, ends)
    return Dataset(pa.table({"user_id": histories.user_id.take(pa.array(users)), **lists}))


def _training_part(histories: Histories) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The known events of the training part, and (users + 1,) where each history starts and ends in them.

    The events are columns of rows by name: input_ids and, if the histories have them, event_type_ids and loss_weights.
    """
    kept = histories.is_trained()
    columns = {"input_ids": histories.item_ids[kept]}
    if histories.event_type_ids is not None:
        columns["event_type_ids"] = histories.event_type_ids[kept]
    if histories.weights is not None:
        columns["loss_weights"] = histories.weights[kept]
    return columns, np.concatenate(([0], np.cumsum(kept)))[histories.offsets]


def _with_targets(
    histories: Histories, columns: Mapping[str, np.ndarray], users: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows with an event of a target type. Without event types, all rows."""
    if "event_type_ids" not in columns:
        return users, starts, ends
    is_target = np.isin(columns["event_type_ids"], histories.target_event_type_ids)
    before = np.concatenate(([0], np.cumsum(is_target)))
    kept = before[ends] > before[starts]
    return users[kept], starts[kept], ends[kept]


def _cut_lists(columns: Mapping[str, np.ndarray], starts: np.ndarray, ends: np.ndarray) -> dict[str, pa.ListArray]:
    """Columns of lists, the events from `starts` to `ends`."""
    bounds = list(zip(starts, ends, strict=True))
    return {name: _lists([values[start:end] for start, end in bounds]) for name, values in columns.items()}


def _cuts(
    offsets: np.ndarray, max_length: int | None, windows: str, window_step: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of the `training_rows`: the number of its history, and where it starts and ends in the training part."""
    if windows not in ("whole", "proportional", "sliding"):
        raise ValueError(f"windows must be whole, proportional or sliding; got {windows!r}")
    if windows != "whole" and max_length is None:
        raise ValueError(f"{windows} windows need a max_length, the model's max_position_embeddings")
    lengths = np.diff(offsets)
    if windows == "whole":
        users = np.flatnonzero(lengths)
        return users, offsets[:-1][users], offsets[1:][users]
    assert max_length is not None  # for the type checker
    if windows == "proportional":
        users = np.repeat(np.arange(len(lengths)), -(-lengths // max_length))
        return users, offsets[:-1][users], offsets[1:][users]
    step = max(1, int(window_step * max_length))
    num_windows = np.where(lengths > 0, 1 + -(-np.maximum(lengths - max_length, 0) // step), 0)
    users = np.repeat(np.arange(len(lengths)), num_windows)
    steps = np.concatenate([np.arange(number) for number in num_windows])
    ends = offsets[1:][users] - steps * step
    starts = np.maximum(ends - max_length, offsets[:-1][users])
    # The oldest window is extended to the length of the others.
    return users, starts, np.minimum(starts + max_length, offsets[1:][users])


class StreamedTrainingRows(torch.utils.data.Dataset):
    """The rows of `training_rows`, read from disk as they are needed, for a log that does not fit into memory.

    Each row can be read by its index. Reading is fast if the indices are those of `StreamedRowSampler`, since the rows
    of a part of the histories are read together. The rows have the columns of `training_rows` but user_id.

    Args:
        histories: The histories on disk. They are read once to count the rows.
        max_length: Longest input of the model.
        windows: See `training_rows`.
        window_step: See `training_rows`.

    Attributes:
        sizes: (parts,) the number of rows of each part of the histories. Rows are numbered in the order of the parts.
        lengths: (rows,) the length of each row, at most `max_length`. They are in a temporary file.
        share_of_targets: The share of the events of the rows that are of a type that is predicted.

    Raises:
        ValueError: As `training_rows`.
    """

    def __init__(
        self, histories: StreamedHistories, *, max_length: int, windows: str = "whole", window_step: float = 0.5
    ):
        self.histories = histories
        self.options = (max_length, windows, window_step)
        sizes, num_events, num_targets = [], 0, 0
        with tempfile.TemporaryFile() as file:
            for part in histories.parts():
                columns, offsets = _training_part(part)
                _, starts, ends = _with_targets(part, columns, *_cuts(offsets, *self.options))
                sizes.append(len(starts))
                is_target = np.ones(len(columns["input_ids"]), bool)
                if "event_type_ids" in columns:
                    is_target = np.isin(columns["event_type_ids"], part.target_event_type_ids)
                before = np.append(0, is_target.cumsum())
                num_events += int((ends - starts).sum())
                num_targets += int((before[ends] - before[starts]).sum())
                np.minimum(ends - starts, max_length).astype(np.int32).tofile(file)
            if not any(sizes):
                raise ValueError(NO_TARGET_TRAINS if histories.tokenizer.event_types else NOTHING_TRAINS)
            file.flush()
            self.lengths: np.ndarray = np.memmap(file, np.int32, "r")
        self.sizes, self.share_of_targets = np.array(sizes), num_targets / num_events
        self.ends = self.sizes.cumsum()
        self.buffer_size = SHUFFLE_BUFFER_SIZE
        # The rows of a buffer lie in at most so many parts: all of the smallest ones, and the ends of two others.
        self.max_parts = 2 + int(np.searchsorted(np.sort(self.sizes).cumsum(), self.buffer_size, side="right"))
        # Columns, starts and ends of the rows of the parts that were read last.
        self.read: OrderedDict[int, tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Data-loader workers read parts of their own. Only the sampler needs the lengths.
        return self.__dict__ | {"read": OrderedDict(), "lengths": np.zeros(0, np.int32)}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """The rows of a batch. A data loader calls this method."""
        rows: list[dict[str, np.ndarray]] = [{}] * len(indices)
        parts = np.searchsorted(self.ends, indices, side="right")
        for part in np.unique(parts).tolist():
            columns, starts, ends = self._rows_of(part)
            first = self.ends[part] - self.sizes[part]
            for place in np.flatnonzero(parts == part).tolist():
                row = indices[place] - first
                rows[place] = {name: values[starts[row] : ends[row]] for name, values in columns.items()}
        return rows

    def _rows_of(self, part: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        if part not in self.read:
            while len(self.read) >= self.max_parts:
                self.read.popitem(last=False)  # the part that was not used for the longest time
            histories = self.histories.read(part)
            columns, offsets = _training_part(histories)
            _, starts, ends = _with_targets(histories, columns, *_cuts(offsets, *self.options))
            self.read[part] = columns, starts, ends
        self.read.move_to_end(part)
        return self.read[part]


def stream_training_rows(
    files: str | Path | Sequence[str], tokenizer: Bert4RecTokenizer, *, has_weights: bool = False
) -> IterableDataset:
    """Training rows that are read from disk as they are needed, for histories that do not fit into memory.

    Args:
        files: Parquet files of histories, as `prepare` writes them: paths or glob patterns. Processes and data-loader
            workers share the files. With at least as many files as workers, each worker reads only its own files.
        tokenizer: The catalogue.
        has_weights: Whether the column weight has weights of labels, as after `prepare --weight_column`.

    Returns:
        Columns input_ids (list<int32>), event_type_ids and loss_weights as in `training_rows`. Histories without a
        training part, or without a target in it, are left out.
    """
    files = str(files) if isinstance(files, Path) else files
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    # Data-loader workers can pickle functions of a module, but no lambdas.
    given = {"tokenizer": tokenizer, "has_weights": has_weights}
    rows = rows.map(_tokenize, fn_kwargs=given, remove_columns=rows.column_names)
    return rows.filter(_has_targets, fn_kwargs={"target_event_type_ids": tokenizer.target_event_type_ids})


def _tokenize(row: Mapping[str, Any], tokenizer: Bert4RecTokenizer, has_weights: bool) -> dict[str, list[Any]]:
    token_ids = tokenizer.item_ids_to_token_ids(row["item_id"][: row["train_end"]])
    columns: dict[str, list[Any]] = {"input_ids": token_ids}
    if tokenizer.event_types is not None:
        known = {name: number for number, name in enumerate(tokenizer.event_types, start=1)}
        columns["event_type_ids"] = [known.get(name, 0) for name in row["event_type"][: row["train_end"]]]
    if has_weights:
        columns["loss_weights"] = row["weight"][: row["train_end"]]
    is_known = [token_id != UNK_TOKEN_ID for token_id in token_ids]
    return {name: list(compress(values, is_known)) for name, values in columns.items()}


def _has_targets(row: Mapping[str, Any], target_event_type_ids: Sequence[int]) -> bool:
    if "event_type_ids" in row:
        return not set(target_event_type_ids).isdisjoint(row["event_type_ids"])
    return len(row["input_ids"]) > 0


def ranking_rows(
    histories: Histories,
    tokenizer: Bert4RecTokenizer,
    part: str,
    *,
    filter_seen_items: bool,
    max_length: int | None = None,
) -> Dataset:
    """Rows for evaluation: for each user with a target, the input that serving would get, and the target.

    Args:
        histories: Histories from `read_prepared`.
        tokenizer: Appends the [MASK].
        part: "validation" or "test".
        filter_seen_items: Whether the user's past items are excluded, including those before the window.
        max_length: Longest input of the model. None: the tokenizer's `model_max_length`.

    Returns:
        Columns user_id (string); input_ids (list<int32>), which end with [MASK]; labels (list<int32>), the target at
        the position of the [MASK] and -100 elsewhere, also for a target outside the catalogue; history_ids
        (list<int32>), all known items before the target; exclude_ids (list<int32>); history_length (int32), the number
        of events before the target.

        With event types, also event_type_ids (list<int32>), the types beside input_ids, where the type of the [MASK] is
        that of the target; history_type_ids (list<int32>), the types beside history_ids; and target_type_ids (int32),
        the type of the target. The excluded items are then those that the history has with the target's type.

    Raises:
        ValueError: If `part` is neither "validation" nor "test".
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}")
    users = np.flatnonzero(histories.target_positions[part] >= 0)
    positions = histories.target_positions[part][users]
    starts = histories.offsets[users]
    targets = histories.item_ids[starts + positions]
    types = histories.event_type_ids
    rows, history_ids, exclude_ids, event_type_ids, history_type_ids = [], [], [], [], []
    for start, position in zip(starts, positions, strict=True):
        past = histories.item_ids[start : start + position]
        is_known = past != UNK_TOKEN_ID
        past = past[is_known]
        row = np.array(tokenizer.append_mask(past.tolist(), max_length), np.int32)
        rows.append(row)
        history_ids.append(past)
        seen = past
        if types is not None:
            past_types, target_type = types[start : start + position][is_known], types[start + position]
            event_type_ids.append(
                np.array(tokenizer.append_mask_type(past_types.tolist(), target_type, max_length), np.int32)
            )
            history_type_ids.append(past_types)
            seen = past[past_types == target_type]
        exclude_ids.append(np.unique(seen) if filter_seen_items else np.zeros(0, np.int32))
    input_ids = _lists(rows)
    labels = np.full(len(input_ids.values), IGNORE_INDEX, np.int32)
    labels[input_ids.offsets.to_numpy()[1:] - 1] = np.where(targets == UNK_TOKEN_ID, IGNORE_INDEX, targets)
    table = {
        # `filter` keeps the chunks; `take` would concatenate them into one array, which may be too large.
        "user_id": histories.user_id.filter(pa.array(histories.target_positions[part] >= 0)),
        "input_ids": input_ids,
        "labels": pa.ListArray.from_arrays(input_ids.offsets, pa.array(labels)),
        "history_ids": _lists(history_ids),
        "exclude_ids": _lists(exclude_ids),
        "history_length": pa.array(positions, pa.int32()),
    }
    if types is not None:
        table |= {
            "event_type_ids": _lists(event_type_ids),
            "history_type_ids": _lists(history_type_ids),
            "target_type_ids": pa.array(types[starts + positions], pa.int32()),
        }
    return Dataset(pa.table(table))


def users_with_targets(
    histories: AnyHistories,
    part: str,
    max_users: int | None = None,
    *,
    seed: int = 42,
    timestamps: bool = False,
) -> Histories:
    """The histories of the users with a target, in memory, for `ranking_rows`.

    Args:
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        part: "validation" or "test".
        max_users: Largest number of users, which are drawn at random. None: all; of `StreamedHistories`,
            `STREAMED_EVAL_SAMPLES`.
        seed: Equal seeds give equal users.
        timestamps: Whether the times of `StreamedHistories` are read too.

    Returns:
        If histories in memory are all wanted, these histories, with the users that have no target.
    """
    if max_users is None and isinstance(histories, StreamedHistories):
        max_users = STREAMED_EVAL_SAMPLES
    num_users = histories.num_targets(part)
    number = num_users if max_users is None else min(max_users, num_users)
    if isinstance(histories, Histories) and number == num_users:
        return histories
    chosen = np.sort(np.random.default_rng(seed).choice(num_users, number, replace=False, shuffle=False))
    kept, first = [], 0
    for here in histories.parts(timestamps=timestamps):
        users = np.flatnonzero(here.target_positions[part] >= 0)
        is_chosen = np.zeros(len(here), bool)
        from_first, to_last = np.searchsorted(chosen, [first, first + len(users)])
        is_chosen[users[chosen[from_first:to_last] - first]] = True
        kept.append(here.select(is_chosen))
        first += len(users)
    return concatenated(kept)


def sampled_candidates(
    rows: Dataset,
    histories: Histories,
    *,
    counts: np.ndarray | None = None,
    num_candidates: int = 100,
    seed: int = 42,
) -> Dataset:
    """Add `candidate_ids` to evaluation rows: sampled items to rank the target among (Sun et al. 2019, section 4.2).

    The candidates of a user are drawn by popularity, without replacement, among the items that the user never had. A
    metric over sampled candidates differs from the metric over the catalogue and may order models differently
    (Krichene & Rendle, KDD 2020).

    Args:
        rows: Rows from `ranking_rows`.
        histories: The histories of the rows.
        counts: (ids,) the popularity of each token id, its number of events in the training part. None: that in these
            histories.
        num_candidates: Number of candidates per user. A user for whom fewer items are left gets fewer.
        seed: Equal seeds give equal candidates.

    Returns:
        The rows with the column candidate_ids (list<int32>).
    """
    if counts is None:
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
        if len(others) < 10 * num_candidates:  # rejection is slow for few items; exponential races sample the same way
            drawn = others[(random.standard_exponential(len(others)) / counts[others]).argsort()]
        while len(drawn) < wanted:
            # Items are drawn in sequence. Items that were drawn before, or that the user has had, are rejected.
            draws = random.integers(cumulative[-1], size=4 * num_candidates)
            more = cumulative.searchsorted(draws, side="right")
            items, first = np.unique(np.concatenate((drawn, more[~np.isin(more, had)])), return_index=True)
            drawn = items[first.argsort()]
        candidates.append(drawn[:wanted])
    return rows.add_column("candidate_ids", _lists(candidates))


def _lists(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of lists of int32, or of float32 if the rows are floats.

    It is built from flat arrays, since pa.array would make a Python object of every number.
    """
    offsets = np.cumsum([0, *map(len, rows)])
    kind = np.float32 if rows and rows[0].dtype.kind == "f" else np.int32
    values = np.concatenate([np.zeros(0, kind), *rows]).astype(kind, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def has_earlier_event(rows: Dataset) -> np.ndarray:
    """(users,) whether the history has the target's item with another type, as an item in the cart that is bought."""
    history_ids, lengths = list_values(rows, "history_ids")
    users = np.repeat(np.arange(len(rows)), lengths)
    is_earlier = (history_ids == target_ids_of(rows)[users]) & ~is_of_type_of_target(rows)
    return np.bincount(users[is_earlier], minlength=len(rows)) > 0


def is_of_type_of_target(rows: Dataset) -> np.ndarray:
    """(events,) whether each event of history_ids has the type of its row's target. Without event types, all have."""
    if "history_type_ids" not in rows.column_names:
        return np.ones(len(list_values(rows, "history_ids")[0]), bool)
    types, lengths = list_values(rows, "history_type_ids")
    return types == np.repeat(rows.with_format("numpy")["target_type_ids"][:], lengths)


def target_ids_of(rows: Dataset) -> np.ndarray:
    """(users,) the targets of `ranking_rows` as token ids; -100 for a target outside the catalogue."""
    labels, lengths = list_values(rows, "labels")
    return labels[lengths.cumsum() - 1]


def list_values(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column as one flat array, and (rows,) the length of each list."""
    lists = rows.with_format("arrow")[name][:]
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()
