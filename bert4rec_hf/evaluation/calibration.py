"""Calibration: choosing the weights of the counted scores for NDCG@10 on validation targets."""

import contextlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from ..data.data_collator import DataCollatorForMaskedItemPrediction
from ..model.history_scores import WEIGHT_FIELDS, values_of
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .metrics import user_metrics

CUTOFF = 10
NUM_FOLDS = 5
# Maximum number of users whose targets are compared. The comparisons of 20,000 users need some hundred MiB.
MAX_CALIBRATED_USERS = 20_000
# The number of standard errors by which other weights must be better, and by which they must be if the weights were
# chosen on earlier targets. Otherwise a model that is updated each week would soon take over what is better by chance.
CLEARLY_BETTER, CLEARLY_BETTER_AGAIN = 1.0, 2.0
# A weight is chosen only if its feature affects this number or this share of the users. Otherwise a few users without
# a past would decide what all future users without a past get.
ENOUGH_USERS, ENOUGH_SHARE = 100, 0.1
# The values that are tried for each weight.
WEIGHT_GRID = (0.0, *(2.0**power for power in range(-4, 7)))
# All weights of a second start of the search: at this size, the network orders only what the counts leave tied.
LARGE_WEIGHT = 8.0


@dataclass(frozen=True)
class Comparisons:
    """What decides whether a target is in the top ten, for any weights of the counted scores.

    Counted scores and their weights are at least 0. So the top ten are among the network's top ten and the items with
    counted scores, and only these are compared with the target.

    Attributes:
        user_ids: The users, of whom each has one target.
        users: (targets,) the index in `user_ids` of each target that some weights bring into the top ten.
        num_always_above: (targets,) the number of items that are ranked above the target under all weights.
        starts: (targets + 1,) the place of each target's first comparison, and the number of comparisons.
        network: (comparisons,) the network's score of the other item minus that of the target.
        features: (features, comparisons) the same difference of each feature, in the order of `WEIGHT_FIELDS`.
    """

    user_ids: Sequence[str]
    users: np.ndarray
    num_always_above: np.ndarray
    starts: np.ndarray
    network: np.ndarray
    features: np.ndarray

    def gains(self, weights: Mapping[str, float]) -> np.ndarray:
        """(users,) NDCG@10 of each user's target, by the weights of the features. A tie counts against the target."""
        differences = self.network + np.array([weights[name] for name in WEIGHT_FIELDS], np.float32) @ self.features
        above = np.concatenate(([0], np.cumsum(differences >= 0)))
        ranks = 1 + self.num_always_above + above[self.starts[1:]] - above[self.starts[:-1]]
        gains = np.zeros(len(self.user_ids))
        gains[self.users] = np.where(ranks <= CUTOFF, 1 / np.log2(ranks + 1), 0)
        return gains

    def used_features(self) -> list[str]:
        """The features that affect the targets of enough users; see `ENOUGH_USERS`."""
        enough = max(1, min(ENOUGH_USERS, ENOUGH_SHARE * len(self.user_ids)))
        targets = np.repeat(np.arange(len(self.users)), np.diff(self.starts))
        num_users = [np.unique(targets[values != 0]).size for values in self.features]
        return [name for name, number in zip(WEIGHT_FIELDS, num_users, strict=True) if number >= enough]


def weights_of(config: Any) -> dict[str, float]:
    """The weights of the features in a config, by the name of the feature."""
    return {name: float(getattr(config, field)) for name, field in WEIGHT_FIELDS.items()}


def set_weights(config: Any, weights: Mapping[str, float]) -> None:
    """Set weights of features in a config."""
    for name, weight in weights.items():
        setattr(config, WEIGHT_FIELDS[name], weight)


@torch.no_grad()
def compare_targets(
    model: Any, rows: Dataset, tokenizer: Bert4RecTokenizer, *, batch_size: int = 64, seed: int = 0
) -> Comparisons:
    """Compare each target with the items that may be above it.

    Args:
        model: A `Bert4RecForMaskedItemPrediction` in evaluation mode. Its weights in the config have no effect.
        rows: Rows from `ranking_rows`. More than `MAX_CALIBRATED_USERS` rows are sampled.
        tokenizer: The tokenizer of the model.
        batch_size: Number of histories that are encoded at once.
        seed: Seed of the sample.

    Raises:
        ValueError: If a score is NaN.
    """
    if len(rows) > MAX_CALIBRATED_USERS:
        rows = rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:MAX_CALIBRATED_USERS]))
    rows = rows.select(np.argsort(rows["history_length"], kind="stable"))  # rows of similar length need little padding
    collate = DataCollatorForMaskedItemPrediction(tokenizer)
    names = ["input_ids", "labels", "history_ids", "exclude_ids", "event_type_ids"]
    names += ["history_type_ids", "target_type_ids"]
    columns = rows.select_columns([name for name in names if name in rows.column_names])
    found: list[tuple[np.ndarray, ...]] = []
    with _weights(model.config, dict.fromkeys(WEIGHT_FIELDS, 0.0)):
        for number, batch in enumerate(DataLoader(columns, batch_size, collate_fn=collate)):
            batch = {name: values.to(model.device) for name, values in batch.items()}
            users, *compared = _compare(model, batch)
            found.append((users + number * batch_size, *compared))
    users, num_always_above, sizes = (np.concatenate(parts) for parts in list(zip(*found, strict=True))[:3])
    network, features = (np.concatenate(parts, axis=-1) for parts in list(zip(*found, strict=True))[3:])
    return Comparisons(rows["user_id"][:], users, num_always_above, np.append(0, sizes.cumsum()), network, features)


def choose_weights(
    comparisons: Comparisons, weights: Mapping[str, float], *, were_chosen: bool = False
) -> dict[str, Any]:
    """Choose the weights of the features for NDCG@10, if this pays.

    The weights are cross-fitted: they are chosen on four fifths of the users and measured on the last fifth, five
    times. They are adopted only if the mean of these measurements exceeds that of the given weights by more than the
    standard error of the difference, user by user, or by more than two if the given weights were chosen before. The
    adopted weights are chosen on all users.

    Args:
        comparisons: The comparisons from `compare_targets`.
        weights: The weights to start from, by feature.
        were_chosen: Whether these weights were chosen on earlier targets.

    Returns:
        A record with the keys num_users; start_weights; weights, the chosen ones, or the given ones if they are not
        adopted; adopted; were_chosen, whether the weights of the record were chosen, now or before; NDCG@10, a mapping
        with start, cross_fitted and chosen; and standard_error, that of the difference between cross_fitted and start,
        or None for a single user.
    """
    start = dict(weights)
    folds = np.array([zlib.crc32(user_id.encode()) % NUM_FOLDS for user_id in comparisons.user_ids])
    search = _Search(comparisons, start)
    cross_fitted = np.zeros(len(folds))
    for fold in range(NUM_FOLDS):
        held_out = folds == fold
        cross_fitted[held_out] = search.gains(search.best(~held_out))[held_out]
    before = comparisons.gains(start)
    difference = cross_fitted - before
    error = _standard_error(difference)
    clearly = CLEARLY_BETTER_AGAIN if were_chosen else CLEARLY_BETTER
    adopted = error is not None and bool(difference.mean() > clearly * error)
    chosen = search.named(search.best(np.ones(len(folds), bool))) if adopted else start
    return {
        "num_users": len(folds),
        "start_weights": start,
        "weights": chosen,
        "adopted": adopted,
        "were_chosen": adopted or were_chosen,
        "NDCG@10": {
            "start": float(before.mean()),
            "cross_fitted": float(cross_fitted.mean()),
            "chosen": float(comparisons.gains(chosen).mean()),
        },
        "standard_error": error,
    }


def compare_with_baselines(
    comparisons: Comparisons, weights: Mapping[str, float], ranks: Mapping[str, np.ndarray], user_ids: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Compare a model with baselines, user by user.

    Args:
        comparisons: The comparisons from `compare_targets`, of all users or of a sample.
        weights: The weights of the model's features.
        ranks: (users,) ranks of each baseline, by name.
        user_ids: The users of the ranks.

    Returns:
        For each baseline, the mean difference of NDCG@10 between the model and the baseline, and its standard error.
        Empty if there is only one user, whose difference has no standard error.
    """
    place_of = {user_id: place for place, user_id in enumerate(user_ids)}
    places = np.array([place_of[user_id] for user_id in comparisons.user_ids])
    of_model = comparisons.gains(weights)
    compared = {}
    for name, of_all in ranks.items():
        difference = of_model - user_metrics(of_all[places])["NDCG@10"]
        error = _standard_error(difference)
        if error is not None:
            compared[name] = {"difference": float(difference.mean()), "standard_error": error}
    return compared


class _Search:
    """Coordinate ascent over `WEIGHT_GRID`. The gains of all users under some weights are computed only once."""

    def __init__(self, comparisons: Comparisons, start: Mapping[str, float]):
        self.comparisons, self.start = comparisons, dict(start)
        self.searched = comparisons.used_features()
        self.known: dict[tuple[float, ...], np.ndarray] = {}

    def named(self, weights: tuple[float, ...]) -> dict[str, float]:
        """All weights by feature: the searched ones, and the given ones of the other features."""
        return self.start | dict(zip(self.searched, weights, strict=True))

    def gains(self, weights: tuple[float, ...]) -> np.ndarray:
        if weights not in self.known:
            self.known[weights] = self.comparisons.gains(self.named(weights))
        return self.known[weights]

    def best(self, users: np.ndarray) -> tuple[float, ...]:
        """The best weights that are found for some users, from the given weights and from `LARGE_WEIGHT`."""
        starts = tuple(self.start[name] for name in self.searched), (LARGE_WEIGHT,) * len(self.searched)
        return max((self._ascend(start, users) for start in starts), key=lambda weights: self._value(weights, users))

    def _value(self, weights: tuple[float, ...], users: np.ndarray) -> float:
        # Without users, as for a single user who is held out, all weights are equally good.
        return float(self.gains(weights)[users].mean()) if users.any() else 0.0

    def _ascend(self, weights: tuple[float, ...], users: np.ndarray) -> tuple[float, ...]:
        value, improves = self._value(weights, users), True
        while improves:
            improves = False
            for tried in self._neighbours(weights):
                found = self._value(tried, users)
                if found > value + 1e-9:
                    weights, value, improves = tried, found, True
                    break
        return weights

    def _neighbours(self, weights: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
        """Weights that differ in one weight, and all weights halved or doubled."""
        for place in range(len(weights)):
            for value in WEIGHT_GRID:
                yield (*weights[:place], value, *weights[place + 1 :])
        for factor in (0.5, 2.0):
            yield tuple(weight * factor for weight in weights)


def _compare(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, ...]:
    """The comparisons of a batch: users, num_always_above, number of comparisons, network and features."""
    history_ids, exclude_ids = batch["history_ids"], batch["exclude_ids"].sort(dim=1).values
    target_ids = batch["labels"].amax(dim=1, keepdim=True)
    target_ids = target_ids.masked_fill(target_ids == IGNORE_INDEX, 0)
    states = model.mask_states(batch["input_ids"], batch["attention_mask"], batch.get("event_type_ids"))
    # The weights are 0, so these are the top ten of the network.
    _, _, nearest = model.search(states, history_ids, top_k=CUTOFF, exclude_ids=exclude_ids)
    types = batch.get("history_type_ids"), batch.get("target_type_ids")
    features = model.history_scores.features(history_ids, None, *types)
    others = torch.cat((nearest, *(item_ids for item_ids, _ in features.values())), dim=1).sort(dim=1).values
    is_first = others.diff(dim=1, prepend=others.new_zeros(len(others), 1)) > 0
    excluded = exclude_ids, torch.ones(exclude_ids.shape, device=exclude_ids.device)
    is_rival = is_first & (others != target_ids) & (values_of(excluded, others) == 0)
    compared = torch.cat((target_ids, others * is_rival), dim=1)
    network = model._scores(states, compared).squeeze(1).float()
    counted = torch.stack([
        values_of(features[name], compared) if name in features else torch.zeros_like(network) for name in WEIGHT_FIELDS
    ])  # fmt: skip
    is_reachable = (nearest == target_ids).any(1) | (counted[:, :, 0] > 0).any(0)
    is_reachable &= (target_ids > 0).squeeze(1) & (values_of(excluded, target_ids) == 0).squeeze(1)
    network = network[:, 1:] - network[:, :1]
    counted = counted[:, :, 1:] - counted[:, :, :1]
    never = (network < 0) & (counted <= 0).all(0)
    always = (network >= 0) & (counted >= 0).all(0)
    num_always = (always & is_rival).sum(1)
    is_reachable &= num_always < CUTOFF
    is_open = is_rival & ~never & ~always & is_reachable.unsqueeze(1)
    kept = is_reachable.nonzero().squeeze(1)
    results = kept, num_always[kept], is_open.sum(1)[kept], network[is_open], counted[:, is_open]
    return tuple(values.cpu().numpy() for values in results)


def _standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean of some values. None for fewer than two values."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


@contextlib.contextmanager
def _weights(config: Any, weights: Mapping[str, float]) -> Iterator[None]:
    """Set weights in a config for a time."""
    before = weights_of(config)
    set_weights(config, weights)
    try:
        yield
    finally:
        set_weights(config, before)
