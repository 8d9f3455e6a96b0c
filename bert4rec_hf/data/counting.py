"""Counts of the training part: popularity, and pairs of items for item vectors and successors."""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ..model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from ..model.history_scores import NUM_NEWEST_EVENTS
from .histories import AnyHistories, Histories, concatenated

logger = logging.getLogger(__name__)

# Greatest distance between two items that count as neighbours.
NEIGHBOUR_WINDOW = 5
# Exponent that smooths the counts of neighbours, so that rare ones get less weight (Levy, Goldberg & Dagan 2015).
NEIGHBOUR_POWER = 0.75
# Root mean square of the vectors' elements.
VECTOR_RMS = 0.05
# Vectors are clipped to this multiple of the typical norm, so that ubiquitous items do not dominate.
MAX_NORM_RATIO = 10.0
# Greatest distance between an item and its successor.
SUCCESSOR_WINDOW = 3
# Multiple of the probability of a next item, before 1 is added and the logarithm is taken.
NEXT_ITEM_SCALE = 20
# Number of items without a conversion that are added to those counted, so that few cases do not make a high score.
UNCONVERTED_CASES = 10
# Maximum number of events that are counted. For a larger log, whole histories are sampled at random.
MAX_COUNTED_EVENTS = 2_500_000
# Catalogues above this size use a factorisation that is faster and rounds differently.
SPARSE_FACTORISATION_FROM_ITEMS = 300_000
POWER_ITERATIONS = 4

Count = TypeVar("Count", bound=Callable[..., Any])


def once(count: Count) -> Count:
    """Let a function of histories read `StreamedHistories` only once for the same arguments."""

    @functools.wraps(count)
    def remembering(histories: AnyHistories, *arguments: Any) -> Any:
        if isinstance(histories, Histories):
            return count(histories, *arguments)
        key = (count.__name__, *arguments)
        if key not in histories.remembered:
            histories.remembered[key] = count(histories, *arguments)
        return histories.remembered[key]

    return remembering  # type: ignore[return-value]


@once
def item_counts(histories: AnyHistories, num_items: int) -> np.ndarray:
    """(num_items + 3,) the number of training events of each token id. With event types, those of target types."""
    counts = np.zeros(num_items + FIRST_ITEM_ID, np.int64)
    for part in histories.parts():
        counts += np.bincount(part.item_ids[part.is_trained() & part.is_of_target_type()], minlength=len(counts))
    return counts


@once
def recent_item_counts(histories: AnyHistories, num_items: int, seed: int) -> np.ndarray:
    """(num_items + 3,) the number of recent events of each token id; see `Histories.is_recent`.

    Of `StreamedHistories`, the time from which on events are recent is that of `sampled_histories`.
    """
    first = None if isinstance(histories, Histories) else sampled_histories(histories, seed).recent_from()
    counts = np.zeros(num_items + FIRST_ITEM_ID, np.int64)
    for part in histories.parts(timestamps=first is not None):
        counts += np.bincount(part.item_ids[part.is_recent(first) & part.is_of_target_type()], minlength=len(counts))
    return counts


@once
def sampled_histories(histories: AnyHistories, seed: int) -> Histories:
    """The histories, or a random sample of them with about `MAX_COUNTED_EVENTS` training events.

    Equal seeds give equal samples, whether the histories are in memory or streamed.
    """
    random = np.random.default_rng(seed)
    kept: list[Histories] = []
    draws: list[np.ndarray] = []
    total = 0

    def drop() -> None:
        """Keep the histories whose draw is below the share of events to count. The share only falls with the total."""
        chosen = np.concatenate(draws) < MAX_COUNTED_EVENTS / max(1, total)
        kept[:], draws[:] = [concatenated(kept).select(chosen)], [np.concatenate(draws)[chosen]]

    for part in histories.parts(timestamps=True):
        total += int(part.is_trained().sum())
        draw = random.random(len(part))
        chosen = draw < MAX_COUNTED_EVENTS / max(1, total)
        kept.append(part.select(chosen))
        draws.append(draw[chosen])
        if sum(len(part.item_ids) for part in kept) > 2 * MAX_COUNTED_EVENTS:
            drop()
    drop()
    return kept[0]


def cooccurrence_vectors(histories: AnyHistories, num_items: int, hidden_size: int, *, seed: int = 0) -> torch.Tensor:
    """Item vectors from co-occurrence: items that occur together more often than by chance have a high product.

    The function counts pairs of items up to `NEIGHBOUR_WINDOW` positions apart in the training part, computes their
    positive pointwise mutual information and factorises it by a truncated SVD. Each side of the SVD is scaled by the
    square root of the singular values (Levy & Goldberg, NeurIPS 2014; Levy, Goldberg & Dagan, TACL 2015). A random
    rotation then spreads the variance over all dimensions.

    Args:
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        num_items: Number of items in the catalogue.
        hidden_size: Length of a vector.
        seed: Seed of the sampled histories, the factorisation and the rotation. Equal seeds give equal vectors.

    Returns:
        (num_items, hidden_size) float32. The vector of an item without neighbours is 0.
    """
    first, second, count = _neighbours(histories, num_items, seed)
    if not len(count):
        return torch.zeros(num_items, hidden_size)
    information = _positive_information(first, second, count, num_items)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the caller's devices
        rank = min(hidden_size, num_items)
        if num_items > SPARSE_FACTORISATION_FROM_ITEMS:
            logger.warning(
                "computing item vectors from the co-occurrence of %d items takes about a minute; "
                "--item_initialization random skips it", num_items,
            )  # fmt: skip
            # The counts are symmetric, so the transposed matrix has its values in the same places.
            transposed = _positive_information(second, first, count, num_items)
            matrix = _compressed(first, second, information, num_items)
            transposed = torch.sparse_csr_tensor(
                matrix.crow_indices(), matrix.col_indices(), transposed, matrix.shape, check_invariants=False
            )
            del first, second, count, information
            left, singular = _leading(matrix, transposed, rank + 10)
            del matrix, transposed
        else:
            size = (num_items, num_items)
            indices = torch.stack((first, second))
            matrix = torch.sparse_coo_tensor(indices, information, size, check_invariants=False, is_coalesced=True)
            left, singular, _ = torch.svd_lowrank(matrix, q=min(rank + 10, num_items), niter=POWER_ITERATIONS)
        turn = torch.linalg.qr(torch.randn(hidden_size, hidden_size)).Q
    vectors = torch.zeros(num_items, hidden_size)
    torch.mul(left[:, :rank], singular[:rank].sqrt(), out=vectors[:, :rank])
    del left
    scale = VECTOR_RMS / vectors.square().mean().sqrt().clamp(min=1e-12)
    vectors = (vectors @ turn).mul_(scale)
    lengths = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return vectors.mul_((MAX_NORM_RATIO * VECTOR_RMS * hidden_size**0.5 / lengths).clamp(max=1))


def neighbours(
    histories: AnyHistories, num_items: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of items that are up to `NEIGHBOUR_WINDOW` positions apart in the training part, with a weight.

    Args:
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        num_items: Number of items in the catalogue.
        seed: Seed of the sampled histories.

    Returns:
        For each pair, in both directions: the two items, int64, numbered from 0; and the weight, the positive pointwise
        mutual information times ln(1 + count).
    """
    first, second, count = _neighbours(histories, num_items, seed)
    return first, second, _positive_information(first, second, count, num_items) * count.log1p()


def transitions(
    histories: AnyHistories, num_items: int, number: int, *, with_self_pairs: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The strongest successors of each item, with two scores.

    A successor follows an item within `SUCCESSOR_WINDOW` positions in the training part. With event types, it is an
    event of a target type, while the item before may have any type.

    - The successor score of a pair is its positive pointwise mutual information times ln(1 + count). A pair at distance
      d counts 1 / 2 ** (d - 1). The mutual information alone would be highest for pairs that occur once by chance. An
      item is no successor of itself here.
    - The next-item score of a pair is ln(1 + `NEXT_ITEM_SCALE` p), where p is the share of the item's events that the
      successor directly follows.

    A quarter of the K places of an item are for its most frequent next items. The other places are for the highest
    successor scores. The row of [PAD] is for an empty history, and holds the most popular items. Their popularity is
    the number of recent events, plus the number of all training events, scaled to the same sum.

    Args:
        histories: Histories from `read_prepared`, or `StreamedHistories`.
        num_items: Number of items in the catalogue.
        number: Number K of successors to keep for each item.
        with_self_pairs: Whether an item may be the next item of itself. This is useful only if seen items are kept.
        seed: Seed of the sampled histories. Equal seeds give equal transitions.

    Returns:
        successor_ids (num_items + 3, K) int32 token ids, successor_scores (num_items + 3, K) float32 and
        next_item_scores (num_items + 3, K) float32, all indexed by token id and padded with 0. The successor scores of
        [PAD] are ln(1 + popularity), its next-item scores are 0.
    """
    keys, counts, is_next = [], [], []
    pairs = _pairs(histories, SUCCESSOR_WINDOW, seed, with_self_pairs, into_targets=True)
    for distance, (first, second) in enumerate(pairs):
        if distance:
            first, second = first[first != second], second[first != second]
        keys.append(first * num_items + second)
        counts.append(torch.full((len(first),), 0.5**distance))
        is_next.append(torch.full((len(first),), float(distance == 0)))
    unique, places = torch.unique(torch.cat(keys), return_inverse=True)
    count, next_count = (
        torch.zeros(len(unique)).index_add_(0, places, torch.cat(parts)) for parts in (counts, is_next)
    )
    first, second = unique // num_items, unique % num_items
    count = count.where(first != second, 0)
    scores = (_positive_information(first, second, count, num_items) * count.log1p()).where(count > 0, 0)
    totals = torch.zeros(num_items).index_add_(0, first, next_count)
    next_scores = (NEXT_ITEM_SCALE * next_count / totals[first].clamp(min=1)).log1p()
    is_frequent = (places_in_groups(first, next_scores) < max(1, number // 4)) & (next_scores > 0)
    columns = places_in_groups(first, scores.where(~is_frequent, torch.inf))
    kept = (columns < number) & (is_frequent | (scores > 0))
    successor_ids = torch.zeros(num_items + FIRST_ITEM_ID, number, dtype=torch.int)
    successor_scores = torch.zeros(num_items + FIRST_ITEM_ID, number)
    next_item_scores = torch.zeros(num_items + FIRST_ITEM_ID, number)
    places = first[kept] + FIRST_ITEM_ID, columns[kept]
    successor_ids[places] = (second[kept] + FIRST_ITEM_ID).int()
    successor_scores[places] = scores[kept]
    next_item_scores[places] = next_scores[kept]
    popularity = torch.from_numpy(popularity_of_items(histories, num_items, seed)).float()
    popularity = nn.functional.pad(popularity, (0, max(0, number - len(popularity))))
    popularity, popular = (found[:number] for found in popularity.sort(descending=True, stable=True))
    successor_ids[PAD_TOKEN_ID] = popular.where(popularity > 0, 0).int()
    successor_scores[PAD_TOKEN_ID] = popularity.log1p()
    return successor_ids, successor_scores, next_item_scores


def conversion_scores(histories: AnyHistories, num_event_types: int, *, seed: int = 0) -> torch.Tensor:
    """How often an item is the next target, by what was last done with it.

    Before each event of a target type in the training part, the items of the history are divided by three things:
    whether the history has the item with this target type, the type of the newest event of the item, and the number of
    newer events of that type, up to `NUM_NEWEST_EVENTS`. The score is ln(1 + `NEXT_ITEM_SCALE` p), where p is the
    share of these items that are the target, with `UNCONVERTED_CASES` more items that are not.

    Args:
        histories: Histories from `read_prepared`, or `StreamedHistories`, with event types.
        num_event_types: Number T of event types.
        seed: Seed of the sampled histories.

    Returns:
        (T + 1, 2, T + 1, `NUM_NEWEST_EVENTS`) float32, indexed by the target type, whether the history has the item
        with it, the type of the newest event, and the number of newer events of that type. 0 where nothing was counted.
    """
    sample = sampled_histories(histories, seed)
    assert sample.event_type_ids is not None  # for the type checker
    kept = sample.is_trained()
    items, types = sample.item_ids[kept], sample.event_type_ids[kept]
    users = np.repeat(np.arange(len(sample)), np.diff(sample.offsets))[kept]
    starts = np.searchsorted(users, users)  # where the history of an event starts
    order = np.lexsort((items, users))  # stable, so the events of an item stay in their order
    is_again = (np.diff(users[order], prepend=-1) == 0) & (np.diff(items[order], prepend=-1) == 0)
    following = np.full(len(items), len(items))  # the next event of the same item
    following[order[:-1][is_again[1:]]] = order[1:][is_again[1:]]
    first_of_item = np.maximum.accumulate(np.where(is_again, 0, np.arange(len(items))))
    scores = np.zeros((num_event_types + 1, 2, num_event_types + 1, NUM_NEWEST_EVENTS), np.float32)
    for target in sample.target_event_type_ids:
        is_target = types == target
        places = np.flatnonzero(is_target)
        before = np.append(0, is_target[order].cumsum())
        was_target = np.zeros(len(items), np.int64)  # whether the history has the item with the type, up to the event
        was_target[order] = before[1:] > before[first_of_item]
        for kind in range(num_event_types + 1):
            events = np.flatnonzero(types == kind)
            newest = np.searchsorted(events, places) - 1
            for age in range(NUM_NEWEST_EVENTS if len(events) else 0):
                event = events[np.maximum(newest - age, 0)]
                is_case = (newest >= age) & (event >= starts[places]) & (following[event] >= places)
                cases = np.bincount(was_target[event[is_case]], minlength=2)
                hits = np.bincount(was_target[event[is_case & (following[event] == places)]], minlength=2)
                scores[target, :, kind, age] = np.log1p(NEXT_ITEM_SCALE * hits / (cases + UNCONVERTED_CASES))
    return torch.from_numpy(scores)


def popularity_of_items(histories: AnyHistories, num_items: int, seed: int) -> np.ndarray:
    """(num_items + 3,) float64 the popularity of each token id, half by all training events and half by recent ones.

    On some logs, all events order the items better than the recent ones; on other logs, they order them worse. The sum
    is about as good as the better of the two.
    """
    counts, recent = item_counts(histories, num_items), recent_item_counts(histories, num_items, seed)
    return recent + counts * (recent.sum() / max(1, counts.sum()))


def places_in_groups(groups: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The place of each value within its group, from 0, in descending order. The groups are sorted."""
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    numbers = torch.arange(len(groups))
    places = torch.empty_like(numbers)
    places[order] = numbers - torch.searchsorted(groups, groups)
    return places


def _pairs(
    histories: AnyHistories,
    window: int,
    seed: int,
    with_self_pairs: bool = False,
    into_targets: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield, for each distance from 1 to the window, the earlier and the later item of each pair at that distance.

    Only the training part counts. Items are numbered from 0. With `into_targets`, the later event is of a target type.
    """
    sample = sampled_histories(histories, seed)
    counted = sample.is_trained()
    row_of = torch.from_numpy(np.repeat(np.arange(len(sample)), np.diff(sample.offsets))[counted])
    items = torch.from_numpy(sample.item_ids[counted]).long() - FIRST_ITEM_ID
    is_target = torch.from_numpy(sample.is_of_target_type()[counted])
    for distance in range(1, window + 1):
        first, second = items[:-distance], items[distance:]
        near = row_of[:-distance] == row_of[distance:]
        if not with_self_pairs:
            near &= first != second
        if into_targets:
            near &= is_target[distance:]
        yield first[near], second[near]


def _neighbours(histories: AnyHistories, num_items: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs of neighbouring items in both directions, in ascending order, and how often each occurs."""
    pairs = []  # a pair is encoded as one number
    for first, second in _pairs(histories, NEIGHBOUR_WINDOW, seed):
        pairs += [first * num_items + second, second * num_items + first]
    unique, counts = torch.unique(torch.cat(pairs), return_counts=True)
    return unique // num_items, unique % num_items, counts.float()


def _positive_information(
    first: torch.Tensor, second: torch.Tensor, count: torch.Tensor, num_items: int
) -> torch.Tensor:
    """(pairs,) positive pointwise mutual information of the items `first` and `second`, from their counts."""
    of_item = torch.zeros(num_items).index_add_(0, first, count)
    of_neighbour = torch.zeros(num_items).index_add_(0, second, count) ** NEIGHBOUR_POWER
    return (count / (of_item[first] * (of_neighbour / of_neighbour.sum())[second])).log().clamp(min=0)


def _leading(matrix: torch.Tensor, transposed: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading left singular vectors (rows, number) and singular values of a sparse matrix, in descending order.

    The algorithm is that of `torch.svd_lowrank` (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1), with
    different rounding. For a million items it needs far less time and memory, partly because it does not compute the
    right singular vectors.
    """
    basis = _orthonormal(matrix @ torch.randn(matrix.shape[1], number))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(transposed @ basis)
        basis = _orthonormal(matrix @ basis)
    projected = transposed @ basis
    squares, turn = torch.linalg.eigh(projected.T @ projected)
    return basis @ turn.flip(1), squares.flip(0).clamp(min=0).sqrt()


def _orthonormal(basis: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis (rows, columns) of the same column space, in place: QR would need three times the memory."""
    parts = basis.split(2**16)
    products = sum(part.double().T @ part.double() for part in parts)
    squares, turn = torch.linalg.eigh(products)
    # Smaller eigenvalues are rounding errors.
    turn = torch.where(squares > 1e-12 * squares[-1], turn / squares.abs().sqrt(), 0).float()
    for part in parts:
        part.copy_(part @ turn)
    return basis


def _compressed(first: torch.Tensor, second: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """A sparse CSR matrix (size, size) from sorted coordinates, with int32 indices, which MKL needs to multiply."""
    starts = torch.zeros(size + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(first, minlength=size).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts, second.int(), values, (size, size), check_invariants=False)
