"""Rankings without a trained model, reported beside every model's metrics."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..data.counting import transitions
from ..data.histories import Histories
from ..data.rows import list_values, target_ids_of
from ..defaults import default_num_transitions
from ..model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from ..model.history_scores import NUM_NEWEST_ITEMS
from ..model.losses import IGNORE_INDEX


def baseline_ranks(rows: Dataset, histories: Histories, num_items: int) -> dict[str, np.ndarray]:
    """Ranks of rankings without a model, under the protocol of `rows`.

    Args:
        rows: Of `ranking_rows`.
        histories: That the rows are of. Their training part is what is counted.
        num_items: Of the catalogue.

    Returns:
        (users,) ranks of: "popularity", the number of training events; "recent popularity", of the newest tenth
        of them; "last-item co-occurrence", how often an item follows the history's last item in the training
        part; "transitions", see `transition_ranks`, unless items are too many; and, unless seen items are filtered,
        "personal popularity", how often an item stands in the user's own history, also before what a row holds. Ties
        are broken by popularity.
    """
    size = num_items + FIRST_ITEM_ID
    training = histories.is_trained()
    recent = histories.item_ids[histories.is_recent()]
    follows = training[1:] & training[:-1]
    ends = histories.offsets[1:-1]
    follows[ends[(ends > 0) & (ends < len(training))] - 1] = False  # the next event is another user's
    pairs, counts = np.unique(
        histories.item_ids[:-1][follows].astype(np.int64) * size + histories.item_ids[1:][follows], return_counts=True
    )
    starts = np.searchsorted(pairs, np.arange(size + 1) * size)
    next_items = pairs % size

    def following(past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = past[-1] if len(past) else PAD_TOKEN_ID
        after = slice(starts[last], starts[last + 1])
        return next_items[after], counts[after]

    ranks = {
        "popularity": _frequency_ranks(rows, histories.item_ids[training], num_items),
        "recent popularity": _frequency_ranks(rows, recent, num_items),
        "last-item co-occurrence": _boosted_ranks(rows, histories, size, following),
    }
    if default_num_transitions(num_items):
        ranks["transitions"] = transition_ranks(rows, histories, num_items)
    if not len(list_values(rows, "exclude_ids")[0]):  # seen items are kept
        ranks["personal popularity"] = personal_popularity_ranks(rows, histories, num_items)
    return ranks


# The name that the function had.
floors = baseline_ranks


def transition_ranks(rows: Dataset, histories: Histories, num_items: int) -> np.ndarray:
    """(users,) ranks by what the defaults add to a model's scores: what followed the newest items in the training part.

    Ties are broken by popularity.
    """
    successor_ids, successor_scores = (
        table.numpy() for table in transitions(histories, num_items, default_num_transitions(num_items))
    )

    def following(past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        newest = past[: -NUM_NEWEST_ITEMS - 1 : -1]
        if not len(newest):
            newest = np.array([PAD_TOKEN_ID])
        weights = 0.5 ** np.arange(len(newest))
        found, places = np.unique(successor_ids[newest], return_inverse=True)
        # Scaled so that popularity (< 1) only breaks ties.
        return found, 1e6 * np.bincount(places.ravel(), (successor_scores[newest] * weights[:, None]).ravel())

    return _boosted_ranks(rows, histories, num_items + FIRST_ITEM_ID, following)


def personal_popularity_ranks(rows: Dataset, histories: Histories, num_items: int) -> np.ndarray:
    """(users,) ranks of the baseline "personal popularity" alone, see `baseline_ranks`."""

    def own(past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(past, return_counts=True)

    return _boosted_ranks(rows, histories, num_items + FIRST_ITEM_ID, own)


def popularity_ranks(rows: Dataset, histories: Histories, num_items: int) -> np.ndarray:
    """(users,) ranks of the baseline "popularity" alone, see `baseline_ranks`; some seconds for a million users."""
    return _frequency_ranks(rows, histories.item_ids[histories.is_trained()], num_items)


def _boosted_ranks(
    rows: Dataset, histories: Histories, size: int, boosts: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """(users,) ranks of the targets by popularity and what `boosts` makes of a history, see `_Scores.rank`."""
    popularity = _Scores.of(histories.item_ids[histories.is_trained()], size)
    values, lengths = list_values(rows, "exclude_ids")
    excluded = np.split(values, lengths.cumsum()[:-1]) if len(rows) else []
    columns = rows.with_format("arrow")
    starts = histories.offsets[pc.index_in(columns["user_id"][:], histories.user_id).to_numpy()]
    ends = starts + columns["history_length"][:].to_numpy()
    ranks = np.zeros(len(rows), np.int64)
    for row, (start, end, target, had) in enumerate(zip(starts, ends, target_ids_of(rows), excluded, strict=True)):
        if target != IGNORE_INDEX and not (had == target).any():
            past = histories.item_ids[start:end]  # of which a row holds the newest part
            ranks[row] = popularity.rank(target, had, *boosts(past[past >= FIRST_ITEM_ID]))
    return ranks


def _frequency_ranks(rows: Dataset, item_ids: np.ndarray, num_items: int) -> np.ndarray:
    """(users,) ranks of the targets by how often each item stands in `item_ids`."""
    counts = np.bincount(item_ids, minlength=num_items + FIRST_ITEM_ID)
    targets = target_ids_of(rows)
    excluded, lengths = list_values(rows, "exclude_ids")
    users = np.repeat(np.arange(len(rows)), lengths)
    least = counts[np.maximum(targets, 0)]
    ranks = num_items - np.searchsorted(np.sort(counts[FIRST_ITEM_ID:]), least)
    ranks -= np.bincount(users[counts[excluded] >= least[users]], minlength=len(rows))
    ranks[targets == IGNORE_INDEX] = 0
    ranks[users[excluded == targets[users]]] = 0
    return ranks


@dataclass
class _Scores:
    """Scores of all items below 1, to which a few items add more; ranks without looking at every item."""

    scores: np.ndarray
    ascending: np.ndarray

    @classmethod
    def of(cls, item_ids: np.ndarray, size: int) -> "_Scores":
        counts = np.bincount(item_ids, minlength=size)
        scores = counts / (counts.max() + 1)
        return cls(scores, np.sort(scores[FIRST_ITEM_ID:]))

    def rank(self, target: int, excluded: np.ndarray, boosted: np.ndarray, boosts: np.ndarray) -> int:
        """Items that score at least as high as the target, itself included, without the excluded ones.

        Args:
            target: Token id.
            excluded: Token ids, each once.
            boosted: Token ids in ascending order, whose scores are higher
            boosts: by this much.
        """

        def score(item_ids: np.ndarray) -> np.ndarray:
            if not len(boosted):
                return self.scores[item_ids]
            nearest = np.searchsorted(boosted, item_ids).clip(max=len(boosted) - 1)
            return self.scores[item_ids] + np.where(boosted[nearest] == item_ids, boosts[nearest], 0)

        least = score(np.array([target]))[0]
        unboosted = len(self.ascending) - np.searchsorted(self.ascending, least)
        moved = (score(boosted) >= least).sum() - (self.scores[boosted] >= least).sum()
        return int(unboosted + moved - (score(excluded) >= least).sum())
