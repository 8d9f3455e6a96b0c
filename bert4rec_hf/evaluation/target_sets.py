"""Several targets per user: all events of a time span, or all items of a basket."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset

from ..data.histories import Histories, units_per_second
from ..data.rows import list_values, ranking_rows
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer

SET_CUTOFFS = (5, 10)
# The prefix of the metrics' names, which tells them from the metrics of one target per user.
PREFIX = "all_targets_"
# Times that are numbers below this are no seconds since 1970: it is in the year 1973.
FIRST_SECONDS = 10**8


@dataclass(frozen=True)
class TargetSets:
    """The targets of some users, several for each.

    Attributes:
        rows: One row per user, of `ranking_rows`. The history ends before the user's first target.
        users: (targets,) the row of each target, in ascending order. Every row has at least one target.
        token_ids: (targets,) the targets, each once per user; -100 for an event whose item is not in the catalogue.
        description: What the targets are, for the protocol.
    """

    rows: Dataset
    users: np.ndarray
    token_ids: np.ndarray
    description: str

    def ranks_in(self, recommended: np.ndarray) -> np.ndarray:
        """(targets,) the place of each target, from 1, in recommendations (users, k). 0 where it is not among them."""
        found = recommended[self.users] == self.token_ids[:, None]
        return np.where(found.any(axis=1), found.argmax(axis=1) + 1, 0)

    def expanded_rows(self) -> Dataset:
        """One row per target, for `baseline_ranks`."""
        labels = pa.array(self.token_ids.astype(np.int32)[:, None].tolist(), pa.list_(pa.int32()))
        names = ["user_id", "history_ids", "exclude_ids", "history_type_ids", "target_type_ids"]
        columns = self.rows.select_columns([name for name in names if name in self.rows.column_names])
        columns = columns.with_format("arrow")
        return Dataset(columns[self.users].append_column("labels", labels))

    def share_seen(self) -> float:
        """The share of the targets that the user's history has."""
        history_ids, lengths = list_values(self.rows, "history_ids")
        size = max(int(history_ids.max(initial=0)), int(self.token_ids.max(initial=0))) + 1
        had = np.repeat(np.arange(len(self.rows)), lengths) * size + history_ids
        is_known = self.token_ids >= FIRST_ITEM_ID
        return float((is_known & np.isin(self.users * size + self.token_ids, had)).mean())


def target_sets(
    histories: Histories,
    tokenizer: Bert4RecTokenizer,
    preparation: Mapping[str, Any],
    part: str,
    *,
    filter_seen_items: bool,
    max_length: int,
    horizon: str | None = None,
    time_type: pa.DataType | None = None,
) -> TargetSets:
    """Collect all targets of each user.

    - With a temporal split, the targets are all events from the cut of the part to the cut of the next part or the end
      of the log, or within `horizon` after the cut.
    - With leave-one-out, they are the held-out events at the time of the one target: the part of a basket that did not
      train. Which of these comes first in a log is arbitrary.

    Args:
        histories: Histories from `read_prepared`, with timestamps.
        tokenizer: Appends the [MASK].
        preparation: The content of preparation.json.
        part: "validation" or "test".
        filter_seen_items: Whether the user's past items are excluded.
        max_length: Longest input of the model.
        horizon: A span of time such as "7d" or "12h", or a number in the unit of the log's times. Only for a temporal
            split. None: no limit.
        time_type: The type of the times in the prepared folder. Needed with `horizon`.

    Raises:
        ValueError: If the log has no times, if the horizon cannot be read or does not fit the split, or if no user has
            a target.
    """
    if histories.timestamps is None:
        raise ValueError("several targets per user need times, which this log lacks: leave out --targets all")
    split = preparation["split"]
    lengths = np.diff(histories.offsets)
    positions = histories.target_positions[part]
    users, places = np.repeat(np.arange(len(histories)), lengths), histories.places()
    is_target = np.repeat(positions >= 0, lengths)
    if split["name"] == "temporal":
        ends = histories.target_positions["test"] if part == "validation" else np.full(len(histories), -1)
        ends = np.where(ends >= 0, ends, lengths)
        is_target &= (places >= np.repeat(positions, lengths)) & (places < np.repeat(ends, lengths))
        description = "all events of the part"
        if horizon is not None:
            cut, length = _in_unit(split[f"{part}_cut"], horizon, histories.timestamps, time_type)
            is_target &= histories.timestamps < cut + length
            description = f"all events within {horizon} after {split[f'{part}_cut']}"
    else:
        if horizon is not None:
            raise ValueError(
                f"a horizon begins at a cut in time; got --horizon {horizon} with the split {split['name']}: leave it "
                "out, or prepare with --split temporal"
            )
        times = histories.timestamps[histories.offsets[:-1] + positions.clip(min=0)]
        is_target &= (places >= np.repeat(histories.train_end, lengths)) & (
            histories.timestamps == np.repeat(times, lengths)
        )
        description = "all held-out items of a basket"
    events = np.flatnonzero(is_target & histories.is_of_target_type())
    if not len(events):
        raise ValueError(f"no user has a {part} target within {horizon}: give a longer --horizon")
    with_targets, first = np.unique(users[events], return_index=True)
    moved = np.full(len(histories), -1, positions.dtype)
    moved[with_targets] = places[events[first]]
    rows = ranking_rows(
        replace(histories, target_positions=histories.target_positions | {part: moved}),
        tokenizer,
        part,
        filter_seen_items=filter_seen_items,
        max_length=max_length,
    )
    row_of = np.searchsorted(with_targets, users[events])
    token_ids = histories.item_ids[events].astype(np.int64)
    is_known = token_ids >= FIRST_ITEM_ID
    known = np.unique(np.stack((row_of[is_known], token_ids[is_known])), axis=1)
    unknown = np.stack((row_of[~is_known], np.full((~is_known).sum(), IGNORE_INDEX)))
    found = np.concatenate((known, unknown), axis=1)
    found = found[:, np.argsort(found[0], kind="stable")]
    return TargetSets(rows, found[0], found[1], f"{len(found[0]):,} targets, {description}")


def set_metrics(ranks: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Metrics with several targets per user: means over users of recall, NDCG, average precision and hit rate.

    The definitions are those of trec_eval. At k, recall is the share of a user's targets among the first k items. NDCG
    divides by the gain of an ideal ranking, which begins with min(k, number of targets) targets. The average precision
    is the sum of the precisions at the places of the found targets, divided by the number of targets. HR is 1 if at
    least one target is found.

    Args:
        ranks: (targets,) the rank of each target from 1, or 0 for a target that is not found.
        users: (targets,) the user of each target, in ascending order. All users from 0 to the last have a target.

    Returns:
        The metrics at each of `SET_CUTOFFS`. Their names start with "all_targets_".
    """
    order = np.lexsort((np.where(ranks > 0, ranks, np.inf), users))
    ranks, users = np.where(ranks > 0, ranks, np.inf)[order], users[order]
    sizes = np.bincount(users)
    number = 1 + np.arange(len(users)) - (sizes.cumsum() - sizes)[users]  # of the target among those of its user
    metrics: dict[str, float] = {}
    for k in SET_CUTOFFS:
        is_found = ranks <= k
        ideal = np.cumsum(1 / np.log2(np.arange(k) + 2))[np.minimum(sizes, k) - 1]
        of_users = {
            "recall": np.bincount(users, is_found) / sizes,
            "NDCG": np.bincount(users, is_found / np.log2(ranks + 1)) / ideal,
            "MAP": np.bincount(users, is_found * number / ranks) / sizes,
            "HR": (np.bincount(users, is_found) > 0).astype(float),
        }
        metrics |= {f"{PREFIX}{name}@{k}": float(values.mean()) for name, values in of_users.items()}
    return metrics


def _in_unit(cut: Any, horizon: str, times: np.ndarray, time_type: pa.DataType | None) -> tuple[float, float]:
    """The cut and the horizon as numbers in the unit of the times."""
    try:
        number: float | None = float(horizon)
        length = 0
    except ValueError:
        number = None
        try:
            length = pd.Timedelta(horizon).value  # nanoseconds
        except (ValueError, OverflowError):
            raise ValueError(
                f"expected a horizon such as 7d or 12h, or a number in the unit of the times; got {horizon!r}"
            ) from None
    if not (length if number is None else number) > 0 or (number is not None and math.isinf(number)):
        raise ValueError(f"a horizon must be above 0; got {horizon!r}")
    if time_type is not None and pa.types.is_timestamp(time_type):
        if number is not None:
            raise ValueError(f"the time column is {time_type}: give the horizon a unit, as in 7d; got {horizon!r}")
        start = pa.scalar(datetime.fromisoformat(cut), time_type).cast(pa.int64()).as_py()
        return start, length / 10**9 * units_per_second(time_type, 0)
    if number is not None:
        return cut, number
    last = times.max()
    if last < FIRST_SECONDS:
        raise ValueError(
            f"the times of the log are numbers up to {last}, which are no seconds since 1970: give the horizon as a "
            f"number in their unit; got {horizon!r}"
        )
    return cut, length / 10**9 * units_per_second(time_type, last)
