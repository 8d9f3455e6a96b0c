"""Rankings without a trained model, reported beside every model's metrics."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data.counting import conversion_scores, item_counts, recent_item_counts, sampled_histories, transitions
from ..data.histories import AnyHistories, Histories
from ..data.rows import is_of_type_of_target, list_values, target_ids_of
from ..defaults import default_num_transitions
from ..model.configuration_bert4rec import FIRST_ITEM_ID, Bert4RecConfig
from ..model.history_scores import HistoryScores, Pairs, values_of
from ..model.losses import IGNORE_INDEX
from .neighbours import MAX_ITEMS_OF_A_MATRIX, Scores, ease, history_knn, item_knn, shared_users

# Number of rows that are ranked at once.
ROWS_PER_BATCH = 256
# Maximum number of scores over the catalogue that are in memory at once.
VALUES_PER_BATCH = 2**24
# Scaled so that popularity (< 1) only breaks ties.
SCALE_OVER_POPULARITY = 1e6


def baseline_ranks(rows: Dataset, histories: AnyHistories, num_items: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Rank the targets of `rows` with baselines, which need no trained model.

    Args:
        rows: Rows from `ranking_rows`. Their excluded items are excluded here too.
        histories: The histories of the rows. The baselines are counted in their training part. Of `StreamedHistories`,
            only "popularity" is counted in all of them, the others in `sampled_histories`.
        num_items: Number of items in the catalogue.
        seed: Seed of the sampled histories.

    With event types, popularity counts the events of the target types, and the successors of an item are such events;
    personal popularity counts the events of the target's type. The neighbours of kNN and EASE are those by all events.

    Returns:
        For each baseline, (users,) ranks of the targets: from 1, or 0 for a target that is never shown. Ties between
        items are broken by popularity. The baselines are:

        - "popularity": the number of training events of an item.
        - "recent popularity": the same, among the newest tenth of the training events.
        - "last-item co-occurrence": how often an item directly follows the history's last item in the training part.
        - "transitions": see `transition_ranks`. Left out for catalogues for which the defaults count no transitions.
        - "personal popularity": how often the user's whole history has an item. Left out if seen items are filtered.
        - "conversion": see `conversion_ranks`. Only with event types.
        - "session kNN": see `history_knn`.
        - "item kNN" and "EASE": see `item_knn` and `ease`. Left out for more than 15,000 items.
    """
    size = num_items + FIRST_ITEM_ID
    counted = histories if isinstance(histories, Histories) else sampled_histories(histories, seed)
    training = counted.is_trained()
    follows = training[1:] & training[:-1] & counted.is_of_target_type()[1:]
    ends = counted.offsets[1:-1]
    follows[ends[(ends > 0) & (ends < len(training))] - 1] = False  # the next event is another user's
    pairs, counts = np.unique(
        counted.item_ids[:-1][follows].astype(np.int64) * size + counted.item_ids[1:][follows], return_counts=True
    )
    starts = np.searchsorted(pairs, np.arange(size + 1) * size)
    next_items = torch.from_numpy(pairs % size)
    values = torch.from_numpy(counts)

    def following(history_ids: torch.Tensor) -> Pairs:
        last = history_ids[:, -1].tolist()
        after = [slice(starts[item], starts[item + 1]) for item in last]
        return _padded([next_items[part] for part in after]), _padded([values[part] for part in after])

    ranks = {
        "popularity": popularity_ranks(rows, histories, num_items),
        "recent popularity": _frequency_ranks(rows, recent_item_counts(histories, num_items, seed), num_items),
        "last-item co-occurrence": _history_ranks(rows, histories, num_items, following),
    }
    if default_num_transitions(num_items):
        ranks["transitions"] = transition_ranks(rows, histories, num_items, seed=seed)
    if not len(list_values(rows, "exclude_ids")[0]):  # seen items are kept
        ranks["personal popularity"] = personal_popularity_ranks(rows, histories, num_items)
    if "history_type_ids" in rows.column_names:
        ranks["conversion"] = conversion_ranks(rows, histories, num_items, seed=seed)
    sample = sampled_histories(histories, seed)
    ranks["session kNN"] = _history_ranks(rows, histories, num_items, history_knn(sample, num_items))
    if num_items <= MAX_ITEMS_OF_A_MATRIX:
        shared = shared_users(sample, num_items)
        ranks["item kNN"] = _catalogue_ranks(rows, histories, num_items, item_knn(shared))
        ranks["EASE"] = _catalogue_ranks(rows, histories, num_items, ease(shared))
    return ranks


# The former name of the function.
floors = baseline_ranks


def transition_ranks(rows: Dataset, histories: AnyHistories, num_items: int, *, seed: int = 0) -> np.ndarray:
    """Rank the targets by the transitions that the defaults add to a model's scores, without a network.

    Args:
        rows: Rows from `ranking_rows`.
        histories: The histories of the rows. The transitions are counted in their training part.
        num_items: Number of items in the catalogue.
        seed: Seed of `transitions`.

    Returns:
        (users,) ranks; ties are broken by popularity.
    """
    config = Bert4RecConfig(
        vocab_size=num_items + FIRST_ITEM_ID, num_transitions=default_num_transitions(num_items), hidden_size=2,
        num_attention_heads=1,
    )  # fmt: skip
    scores = HistoryScores(config)
    scores.successor_ids, scores.successor_scores, scores.next_item_scores = transitions(
        histories, num_items, config.num_transitions, with_self_pairs=False, seed=seed
    )
    return _history_ranks(rows, histories, num_items, scores)


def personal_popularity_ranks(rows: Dataset, histories: AnyHistories, num_items: int) -> np.ndarray:
    """(users,) ranks of the baseline "personal popularity" only; see `baseline_ranks`."""
    scores = HistoryScores(Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, repeat_weight=1.0))
    history_ids, lengths = list_values(rows, "history_ids")
    of_target_type = torch.from_numpy(np.where(is_of_type_of_target(rows), history_ids, 0)).long()
    return _history_ranks(rows, histories, num_items, scores, list(of_target_type.split(lengths.tolist())))


def conversion_ranks(rows: Dataset, histories: AnyHistories, num_items: int, *, seed: int = 0) -> np.ndarray:
    """Rank the targets by how often what was last done with an item led to a target; see `counting.conversion_scores`.

    Args:
        rows: Rows from `ranking_rows`, with event types.
        histories: The histories of the rows. The scores are counted in their training part.
        num_items: Number of items in the catalogue.
        seed: Seed of `conversion_scores`.

    Returns:
        (users,) ranks; ties are broken by popularity.
    """
    sample, targets = sampled_histories(histories, seed), rows.with_format("numpy")["target_type_ids"][:]
    assert sample.event_type_ids is not None  # for the type checker
    used = np.concatenate((sample.event_type_ids, list_values(rows, "history_type_ids")[0], targets))
    num_types = int(used.max(initial=1))
    config = Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, num_event_types=num_types, recency_weight=1.0)
    scores = HistoryScores(config)
    scores.conversion_scores = conversion_scores(sample, num_types, seed=seed)

    def scored(history_ids: torch.Tensor, type_ids: torch.Tensor, target_type_ids: torch.Tensor) -> Pairs:
        return scores(history_ids, None, type_ids, target_type_ids[:, 0])

    of_rows = [_tensors(rows, name) for name in ("history_ids", "history_type_ids")]
    of_targets = list(torch.from_numpy(targets).long().unsqueeze(1))
    return _history_ranks(rows, histories, num_items, scored, *of_rows, of_targets)


def popularity_ranks(rows: Dataset, histories: AnyHistories, num_items: int) -> np.ndarray:
    """(users,) ranks of the baseline "popularity" only; see `baseline_ranks`. Takes seconds for a million users."""
    return _frequency_ranks(rows, item_counts(histories, num_items), num_items)


def _history_ranks(
    rows: Dataset,
    histories: AnyHistories,
    num_items: int,
    scores: Callable[..., Pairs],
    *read: list[torch.Tensor],
) -> np.ndarray:
    """(users,) ranks of the targets by scores that a history gives to some items; ties are broken by popularity.

    Only the items of these pairs and the excluded items are scored. `search` scores the whole catalogue, which would
    take hours for a million users and items.

    Args:
        scores: Maps tensors (batch, length), padded with 0 on the left, to `Pairs`.
        read: What is given to `scores` for each row. Nothing: the histories of the rows.
    """
    counts = item_counts(histories, num_items)
    popularity = torch.from_numpy(counts / (counts.max() + 1))  # below 1, and less than the value of any pair
    ascending = popularity[FIRST_ITEM_ID:].sort().values
    read = read or (_tensors(rows, "history_ids"),)
    excluded = _tensors(rows, "exclude_ids")
    targets, ranks = torch.from_numpy(target_ids_of(rows)).long(), []
    for start in range(0, len(rows), ROWS_PER_BATCH):
        part = slice(start, start + ROWS_PER_BATCH)
        exclude_ids, target_ids = _padded(excluded[part]), targets[part].clamp(min=0).unsqueeze(1)
        paired_ids, values = scores(*(_padded(column[part]) for column in read))
        pairs = paired_ids, SCALE_OVER_POPULARITY * values.double()

        def score(item_ids: torch.Tensor, pairs: Pairs = pairs) -> torch.Tensor:
            return popularity[item_ids] + values_of(pairs, item_ids)

        least = score(target_ids)
        found = len(ascending) - torch.searchsorted(ascending, least.squeeze(1))
        found += ((popularity[paired_ids] + pairs[1] >= least) & (paired_ids > 0)).sum(1)
        found -= ((popularity[paired_ids] >= least) & (paired_ids > 0)).sum(1)
        found -= ((score(exclude_ids) >= least) & (exclude_ids > 0)).sum(1)
        is_shown = (targets[part] != IGNORE_INDEX) & ~(exclude_ids == target_ids).any(1)
        ranks.append(found * is_shown)
    return torch.cat([torch.zeros(0, dtype=torch.long), *ranks]).numpy()


def _catalogue_ranks(rows: Dataset, histories: AnyHistories, num_items: int, scores: Scores) -> np.ndarray:
    """(users,) ranks of the targets by scores of the whole catalogue; ties are broken by popularity."""
    counts = item_counts(histories, num_items)
    popularity = torch.from_numpy(counts / (counts.max() + 1))
    columns = [_tensors(rows, name) for name in ("history_ids", "exclude_ids")]
    targets, ranks = torch.from_numpy(target_ids_of(rows)).long(), []
    at_once = max(1, min(ROWS_PER_BATCH, VALUES_PER_BATCH // (num_items + FIRST_ITEM_ID)))
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        history_ids, exclude_ids = (_padded(column[part]) for column in columns)
        target_ids = targets[part].clamp(min=0).unsqueeze(1)
        values = SCALE_OVER_POPULARITY * scores(history_ids).double() + popularity
        values[:, :FIRST_ITEM_ID] = -torch.inf
        values.scatter_(1, exclude_ids, -torch.inf)
        least = values.gather(1, target_ids)
        ranks.append(((values >= least).sum(1)) * ~least.isneginf().squeeze(1))
    return torch.cat([torch.zeros(0, dtype=torch.long), *ranks]).numpy()


def _tensors(rows: Dataset, name: str) -> list[torch.Tensor]:
    """The lists of a list column, as tensors."""
    values, lengths = list_values(rows, name)
    return list(torch.from_numpy(values.copy()).long().split(lengths.tolist()))


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(rows, longest), padded with 0 on the left. There is at least one column."""
    return nn.utils.rnn.pad_sequence([torch.zeros(1, dtype=torch.long), *parts], True, 0, padding_side="left")[1:]


def _frequency_ranks(rows: Dataset, counts: np.ndarray, num_items: int) -> np.ndarray:
    """(users,) ranks of the targets by the counts of the token ids."""
    targets = target_ids_of(rows)
    excluded, lengths = list_values(rows, "exclude_ids")
    users = np.repeat(np.arange(len(rows)), lengths)
    least = counts[np.maximum(targets, 0)]
    ranks = num_items - np.searchsorted(np.sort(counts[FIRST_ITEM_ID:]), least)
    ranks -= np.bincount(users[counts[excluded] >= least[users]], minlength=len(rows))
    ranks[targets == IGNORE_INDEX] = 0
    ranks[users[excluded == targets[users]]] = 0
    return ranks
