"""From histories to training rows and ranking rows (`datasets.Dataset`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, load_dataset

from ..model.configuration_bert4rec import UNK_TOKEN_ID
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .histories import PARTS, Histories


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
        Columns user_id (string) and input_ids (list<int32>).

    Raises:
        ValueError: If `windows` is unknown, if it needs a `max_length` and gets none, or if no history has a training
            part.
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
        raise ValueError("no history has a training part; prepare a log with more events per user")
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
    # The oldest window is extended to the length of the others.
    ends = np.minimum(starts + max_length, np.repeat(offsets[1:], num_windows))
    token_ids = histories.item_ids[kept]
    cut = _lists([token_ids[start:end] for start, end in zip(starts, ends, strict=True)])
    return Dataset(pa.table({"user_id": rows.with_format("arrow")["user_id"][:], "input_ids": cut}))


def stream_training_rows(files: str | Path | Sequence[str], tokenizer: Bert4RecTokenizer) -> IterableDataset:
    """Training rows that are read from disk as they are needed, for histories that do not fit into memory.

    Args:
        files: Parquet files of histories, as `prepare` writes them: paths or glob patterns. Processes and data-loader
            workers share the files. With at least as many files as workers, each worker reads only its own files.
        tokenizer: The catalogue.

    Returns:
        Column input_ids (list<int32>). Histories without a training part are left out.
    """
    files = str(files) if isinstance(files, Path) else files
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    # Data-loader workers can pickle functions of a module, but no lambdas.
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

    Raises:
        ValueError: If `part` is neither "validation" nor "test".
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}")
    users = np.flatnonzero(histories.target_positions[part] >= 0)
    positions = histories.target_positions[part][users]
    starts = histories.offsets[users]
    targets = histories.item_ids[starts + positions]
    rows, history_ids, exclude_ids = [], [], []
    for start, position in zip(starts, positions, strict=True):
        past = histories.item_ids[start : start + position]
        past = past[past != UNK_TOKEN_ID]
        row = np.array(tokenizer.append_mask(past.tolist(), max_length), np.int32)
        rows.append(row)
        history_ids.append(past)
        exclude_ids.append(np.unique(past) if filter_seen_items else np.zeros(0, np.int32))
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
    return Dataset(pa.table(table))


def sampled_candidates(rows: Dataset, histories: Histories, *, num_candidates: int = 100, seed: int = 42) -> Dataset:
    """Add `candidate_ids` to evaluation rows: sampled items to rank the target among (Sun et al. 2019, section 4.2).

    The candidates of a user are drawn by popularity, without replacement, among the items that the user never had. A
    metric over sampled candidates differs from the metric over the catalogue and may order models differently
    (Krichene & Rendle, KDD 2020).

    Args:
        rows: Rows from `ranking_rows`.
        histories: The histories of the rows. The popularity of an item is its number of events in the training part.
        num_candidates: Number of candidates per user. A user for whom fewer items are left gets fewer.
        seed: Equal seeds give equal candidates.

    Returns:
        The rows with the column candidate_ids (list<int32>).
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
    """A column of int32 lists, built from flat arrays: pa.array would make a Python object of every number."""
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.zeros(0, np.int32), *rows])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


def target_ids_of(rows: Dataset) -> np.ndarray:
    """(users,) the targets of `ranking_rows` as token ids; -100 for a target outside the catalogue."""
    labels, lengths = list_values(rows, "labels")
    return labels[lengths.cumsum() - 1]


def list_values(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column as one flat array, and (rows,) the length of each list."""
    lists = rows.with_format("arrow")[name][:]
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()
