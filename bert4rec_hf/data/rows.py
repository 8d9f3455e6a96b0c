"""From histories to the rows that train and the rows that are ranked (`datasets.Dataset`)."""

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
        too if the catalogue lacks the target; history_ids, the known items before the target, uncut; exclude_ids;
        history_length, the number of events before the target.

    Raises:
        ValueError: If `part` is neither.
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
        # Not take, which makes one array of the chunks.
        "user_id": histories.user_id.filter(pa.array(histories.target_positions[part] >= 0)),
        "input_ids": input_ids,
        "labels": pa.ListArray.from_arrays(input_ids.offsets, pa.array(labels)),
        "history_ids": _lists(history_ids),
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


def target_ids_of(rows: Dataset) -> np.ndarray:
    """(users,) the targets of `ranking_rows` as token ids; -100 for one that the catalogue lacks."""
    labels, lengths = list_values(rows, "labels")
    return labels[lengths.cumsum() - 1]


def list_values(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column, and the length of each row's."""
    lists = rows.with_format("arrow")[name][:]
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()
