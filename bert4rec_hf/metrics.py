"""Ranks -> HR, NDCG, MRR; the protocol as data; the floors that stand beside every number."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import EvalPrediction

from .configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from .cooccurrence import transitions
from .defaults import default_num_transitions
from .losses import IGNORE_INDEX
from .modeling_bert4rec import NEWEST_ITEMS
from .splits import PARTS, Histories

CUTOFFS = (1, 5, 10, 20, 50, 100)
COVERAGE_CUTOFF = 10
# In tables; all of them are stored.
SHOWN_METRICS = ("HR@1", "HR@10", "NDCG@10", "HR@100", "MRR", "coverage@10")
SAMPLED_METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")


@dataclass(frozen=True)
class Protocol:
    """How a number came about; none is stored or printed without it.

    Attributes:
        split: "leave-one-out" or "temporal", with its cuts, and whether there was no validation.
        part: "validation" or "test".
        candidates: What each target was ranked among.
        filter_seen_items: Whether a user's past items were left out, and a target among them a miss.
        num_users: Users with a target, all of them counted.
        num_users_without_past: Of these, those ranked from an empty history.
        share_seen_targets: Targets that the user has had before, and that the catalogue has.
        share_unknown_targets: Targets that the catalogue lacks; misses.
    """

    split: str
    part: str
    candidates: str
    filter_seen_items: bool
    num_users: int
    num_users_without_past: int
    share_seen_targets: float
    share_unknown_targets: float

    @classmethod
    def of(
        cls,
        histories: Histories,
        preparation: Mapping[str, Any],
        part: str,
        num_items: int,
        filter_seen_items: bool,
    ) -> "Protocol":
        """The protocol of `ranking_rows` over the whole catalogue."""
        users = np.flatnonzero(histories.target_positions[part] >= 0)
        positions = histories.target_positions[part][users]
        targets = histories.item_ids[histories.offsets[users] + positions]
        target_of = np.zeros(len(histories), np.int32)
        target_of[users] = targets
        lengths = np.diff(histories.offsets)
        before = histories.places() < np.repeat(histories.target_positions[part], lengths)
        is_target = (
            before & (histories.item_ids == np.repeat(target_of, lengths)) & (histories.item_ids >= FIRST_ITEM_ID)
        )
        num_seen = np.unique(np.repeat(np.arange(len(histories)), lengths)[is_target]).size
        split = preparation["split"]
        notes = [f"{name} from {split[f'{name}_cut']}" for name in PARTS if f"{name}_cut" in split]
        if not split.get("validation", True):
            notes.append("no validation targets, which train")
        return cls(
            split=split["name"] + (f" ({', '.join(notes)})" if notes else ""),
            part=part,
            candidates=f"all {num_items} items",
            filter_seen_items=filter_seen_items,
            num_users=len(users),
            num_users_without_past=int((positions == 0).sum()),
            share_seen_targets=num_seen / max(1, len(users)),
            share_unknown_targets=float(np.mean(targets < FIRST_ITEM_ID)) if len(users) else 0.0,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """One line for people."""
        filtered = "seen items filtered" if self.filter_seen_items else "seen items kept"
        return f"{self.split}, {self.part}; {self.candidates} ranked, {filtered}; {self.num_users:,} users"

    def describe_misses(self) -> str:
        """One line on the targets that no model can hit."""
        without_past = (
            f" {self.num_users_without_past:,} users were ranked from an empty history."
            if self.num_users_without_past
            else ""
        )
        return (
            f"{self.share_seen_targets:.1%} of the targets the user has had before"
            f"{' (misses)' if self.filter_seen_items else ''}, {self.share_unknown_targets:.1%} the catalogue "
            f"lacks (misses).{without_past}"
        )


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR, NDCG and MRR of one target a user.

    Args:
        ranks: (users,) from 1; 0 for a target that is never shown, a miss everywhere.

    Returns:
        HR@k and NDCG@k for k in `CUTOFFS`, and MRR; 0 if there are no users.
    """
    ranks = np.asarray(ranks)
    places = np.where(ranks > 0, ranks, np.inf)
    count = max(len(ranks), 1)
    metrics = {}
    for k in CUTOFFS:
        hits = places <= k
        metrics[f"HR@{k}"] = float(hits.sum() / count)
        metrics[f"NDCG@{k}"] = float((hits / np.log2(places + 1)).sum() / count)
    metrics["MRR"] = float((1 / places).sum() / count)
    return metrics


def result_metrics(logged: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Of what the Trainer logs, the results without their prefix, and no timing."""
    names = {name.removeprefix(f"{prefix}_"): value for name, value in logged.items()}
    return {name: value for name, value in names.items() if "@" in name or name in ("MRR", "loss")}


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The names for a table."""
    return [name for name in (*SHOWN_METRICS, *(f"sampled_{name}" for name in SAMPLED_METRICS)) if name in metrics]


def sampled_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Those of Sun et al. 2019, of ranks among sampled items, which their names say."""
    metrics = ranking_metrics(ranks)
    return {f"sampled_{name}": metrics[name] for name in SAMPLED_METRICS}


def preprocess_logits_for_metrics(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """For a plain `transformers.Trainer`: the rank of each target, so that no scores are gathered.

    Needs `TrainingArguments(label_names=["labels", "exclude_ids"])` and the rows of `ranking_rows`.

    Args:
        logits: (batch, P, vocab_size) at the `label_positions`.
        labels: labels (batch, length) and exclude_ids (batch, E).

    Returns:
        (batch,) ranks as `Bert4RecForMaskedItemPrediction.rank` has them.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    targets, exclude_ids = labels
    places = targets.argmax(dim=1, keepdim=True)
    if len(places) > 1 and exclude_ids.shape == places.shape and exclude_ids.any() and (exclude_ids == places).all():
        raise ValueError('set TrainingArguments(label_names=["labels", "exclude_ids"]): got label_positions')
    scores = scores[:, -1] if scores.shape[1] == 1 else scores[torch.arange(len(scores)), places[:, 0]]
    targets = targets.amax(dim=1, keepdim=True)
    scores = scores.scatter(1, exclude_ids.clamp(min=0), -torch.inf)  # padded with -100 across processes
    scores[:, :FIRST_ITEM_ID] = -torch.inf
    target_scores = scores.gather(1, targets.clamp(min=0))
    ranks = (scores >= target_scores).sum(dim=1)
    return ranks.masked_fill(target_scores.isneginf().squeeze(1), 0)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For a plain `transformers.Trainer`, after `preprocess_logits_for_metrics`.

    Raises:
        ValueError: If the predictions are no ranks.
    """
    if np.ndim(prediction.predictions) != 1:
        raise ValueError(
            "expected ranks, one for each row: hand preprocess_logits_for_metrics to the plain Trainer as well; "
            "Bert4RecTrainer has metrics of its own"
        )
    return ranking_metrics(prediction.predictions)


def floors(rows: Dataset, histories: Histories, num_items: int) -> dict[str, np.ndarray]:
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


def transition_ranks(rows: Dataset, histories: Histories, num_items: int) -> np.ndarray:
    """(users,) ranks by what the defaults add to a model's scores: what followed the newest items in the training part.

    Ties are broken by popularity.
    """
    next_ids, next_scores = (
        table.numpy() for table in transitions(histories, num_items, default_num_transitions(num_items))
    )

    def following(past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        newest = past[: -NEWEST_ITEMS - 1 : -1]
        if not len(newest):
            newest = np.array([PAD_TOKEN_ID])
        weights = 0.5 ** np.arange(len(newest))
        found, places = np.unique(next_ids[newest], return_inverse=True)
        # So much that popularity, below 1, orders equals alone.
        return found, 1e6 * np.bincount(places.ravel(), (next_scores[newest] * weights[:, None]).ravel())

    return _boosted_ranks(rows, histories, num_items + FIRST_ITEM_ID, following)


def personal_popularity_ranks(rows: Dataset, histories: Histories, num_items: int) -> np.ndarray:
    """(users,) ranks of the floor "personal popularity" alone, see `floors`."""

    def own(past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(past, return_counts=True)

    return _boosted_ranks(rows, histories, num_items + FIRST_ITEM_ID, own)


def popularity_ranks(rows: Dataset, histories: Histories, num_items: int) -> np.ndarray:
    """(users,) ranks of the floor "popularity" alone, see `floors`; some seconds for a million users."""
    return _frequency_ranks(rows, histories.item_ids[histories.is_trained()], num_items)


def last_labels(rows: Dataset) -> np.ndarray:
    """(users,) the targets of `ranking_rows` as token ids; -100 for one that the catalogue lacks."""
    labels, lengths = list_values(rows, "labels")
    return labels[lengths.cumsum() - 1]


def list_values(rows: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column, and the length of each row's."""
    lists = rows.with_format("arrow")[name][:]
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy()


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
    for row, (start, end, target, had) in enumerate(zip(starts, ends, last_labels(rows), excluded, strict=True)):
        if target != IGNORE_INDEX and not (had == target).any():
            past = histories.item_ids[start:end]  # of which a row holds the newest part
            ranks[row] = popularity.rank(target, had, *boosts(past[past >= FIRST_ITEM_ID]))
    return ranks


def _frequency_ranks(rows: Dataset, item_ids: np.ndarray, num_items: int) -> np.ndarray:
    """(users,) ranks of the targets by how often each item stands in `item_ids`."""
    counts = np.bincount(item_ids, minlength=num_items + FIRST_ITEM_ID)
    targets = last_labels(rows)
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
