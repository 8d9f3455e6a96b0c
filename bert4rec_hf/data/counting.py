"""Pairs of items counted in the training part: item vectors from co-occurrence, and successors."""

import logging
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from ..model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from .histories import Histories

logger = logging.getLogger(__name__)

# Greatest distance between two items that count as neighbours.
NEIGHBOUR_WINDOW = 5
# Levy, Goldberg & Dagan 2015: of neighbours, numbers to this power make rare ones less surprising.
NEIGHBOUR_POWER = 0.75
# Root mean square of the vectors' elements.
VECTOR_RMS = 0.05
# Vectors are clipped to this multiple of the typical norm, so that ubiquitous items do not dominate.
MAX_NORM_RATIO = 10.0
# Greatest distance between an item and its successor.
SUCCESSOR_WINDOW = 3
# Number of events that are counted. Of a larger log, whole histories are drawn at random.
MAX_COUNTED_EVENTS = 2_500_000
# Number of items from which on the factorisation is one that takes less time, and rounds differently.
SPARSE_FACTORISATION_FROM_ITEMS = 300_000
POWER_ITERATIONS = 4


def cooccurrence_vectors(histories: Histories, num_items: int, hidden_size: int, *, seed: int = 0) -> torch.Tensor:
    """Vectors whose products tell how much more often than by chance two items stand near one another.

    The positive pointwise mutual information of items up to `NEIGHBOUR_WINDOW` apart in the training part, factorised
    by a truncated SVD, of which both sides have the square root of the singular values (Levy & Goldberg, NeurIPS 2014;
    Levy, Goldberg & Dagan, TACL 2015); turned at random, so that no dimension stands out.

    Args:
        histories: As `read_prepared` returns them.
        num_items: Of the catalogue.
        hidden_size: Length of a vector.
        seed: Equal seeds give equal vectors.

    Returns:
        (num_items, hidden_size); 0 for an item that has no neighbours.
    """
    first, second, count = _neighbours(histories, num_items, seed)
    if not len(count):
        return torch.zeros(num_items, hidden_size)
    information = _positive_information(first, second, count, num_items)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of the caller's devices
        rank = min(hidden_size, num_items)
        if num_items > SPARSE_FACTORISATION_FROM_ITEMS:
            logger.warning(
                "starting from which of %d items stand near one another takes a minute; --item_initialization random "
                "does without", num_items,
            )  # fmt: skip
            # The other way round the counts are the same, and stand in the same places.
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


def transitions(
    histories: Histories, num_items: int, number: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each item those that most call for being shown after it, and how strongly.

    Items up to `SUCCESSOR_WINDOW` after an item in the training part are counted, each half as much as one that is one
    nearer. How strongly an item calls for one that follows it is their positive pointwise mutual information times the
    logarithm of 1 plus their count: the information alone is largest where a chance is seen once. A history without
    items, of which training has hardly any, gets what is most popular of late.

    Args:
        histories, num_items, seed: As in `cooccurrence_vectors`.
        number: K, of each item.

    Returns:
        (num_items + 3, K) token ids, int32, and (num_items + 3, K) scores, float32, by token id, the strongest first; 0
        where there are no more. Those of [PAD] are for a history without items: ln(1 + popularity).
    """
    keys, counts = [], []
    for distance, (first, second) in enumerate(_pairs(histories, SUCCESSOR_WINDOW, seed)):
        keys.append(first * num_items + second)
        counts.append(torch.full((len(first),), 0.5**distance))
    unique, places = torch.unique(torch.cat(keys), return_inverse=True)
    count = torch.zeros(len(unique)).index_add_(0, places, torch.cat(counts))
    first, second = unique // num_items, unique % num_items
    scores = _positive_information(first, second, count, num_items) * count.log1p()
    # The strongest of an item first; how many are before one of the same item is its column.
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(first[order], stable=True)]
    first, second, scores = first[order], second[order], scores[order]
    starts = torch.searchsorted(first, torch.arange(num_items))
    columns = torch.arange(len(first)) - starts[first]
    kept = (columns < number) & (scores > 0)
    recent = torch.from_numpy(histories.item_ids[histories.is_recent()]).long()
    popularity, popular = torch.bincount(recent, minlength=number).sort(descending=True, stable=True)
    popularity, popular = popularity[:number], popular[:number]
    successor_ids = torch.zeros(num_items + FIRST_ITEM_ID, number, dtype=torch.int)
    successor_scores = torch.zeros(num_items + FIRST_ITEM_ID, number)
    places = first[kept] + FIRST_ITEM_ID, columns[kept]
    successor_ids[places] = (second[kept] + FIRST_ITEM_ID).int()
    successor_scores[places] = scores[kept]
    successor_ids[PAD_TOKEN_ID] = popular.where(popularity > 0, 0).int()
    successor_scores[PAD_TOKEN_ID] = popularity.log1p()
    return successor_ids, successor_scores


def _pairs(histories: Histories, window: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each distance up to the window the items (from 0) that are so far apart in the training part, in order."""
    rows = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    counted = histories.is_trained()
    share = MAX_COUNTED_EVENTS / max(1, counted.sum())
    if share < 1:
        counted &= (np.random.default_rng(seed).random(len(histories)) < share)[rows]
    row_of = torch.from_numpy(rows[counted])
    items = torch.from_numpy(histories.item_ids[counted]).long() - FIRST_ITEM_ID
    for distance in range(1, window + 1):
        first, second = items[:-distance], items[distance:]
        near = (row_of[:-distance] == row_of[distance:]) & (first != second)
        yield first[near], second[near]


def _neighbours(histories: Histories, num_items: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items that stand near one another, in order, each pair either way round; how often they do."""
    pairs = []  # one number each
    for first, second in _pairs(histories, NEIGHBOUR_WINDOW, seed):
        pairs += [first * num_items + second, second * num_items + first]
    unique, counts = torch.unique(torch.cat(pairs), return_counts=True)
    return unique // num_items, unique % num_items, counts.float()


def _positive_information(
    first: torch.Tensor, second: torch.Tensor, count: torch.Tensor, num_items: int
) -> torch.Tensor:
    """How much more often than by chance, as a logarithm and at least 0, the second stand by the first."""
    of_item = torch.zeros(num_items).index_add_(0, first, count)
    of_neighbour = torch.zeros(num_items).index_add_(0, second, count) ** NEIGHBOUR_POWER
    return (count / (of_item[first] * (of_neighbour / of_neighbour.sum())[second])).log().clamp(min=0)


def _leading(matrix: torch.Tensor, transposed: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (rows, number) and values of a sparse matrix, the largest first, without the right ones.

    As `torch.svd_lowrank` (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1), but for rounding; of a million
    items in far less time and memory.
    """
    basis = _orthonormal(matrix @ torch.randn(matrix.shape[1], number))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(transposed @ basis)
        basis = _orthonormal(matrix @ basis)
    projected = transposed @ basis
    squares, turn = torch.linalg.eigh(projected.T @ projected)
    return basis @ turn.flip(1), squares.flip(0).clamp(min=0).sqrt()


def _orthonormal(basis: torch.Tensor) -> torch.Tensor:
    """A basis (rows, few) of the same columns, written over it: QR would hold it three times."""
    parts = basis.split(2**16)
    products = sum(part.double().T @ part.double() for part in parts)
    squares, turn = torch.linalg.eigh(products)
    # What is smaller is rounding.
    turn = torch.where(squares > 1e-12 * squares[-1], turn / squares.abs().sqrt(), 0).float()
    for part in parts:
        part.copy_(part @ turn)
    return basis


def _compressed(first: torch.Tensor, second: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """(size, size), sparse, of places in order; with indices of 32 bits, which the library that multiplies takes."""
    starts = torch.zeros(size + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(first, minlength=size).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts, second.int(), values, (size, size), check_invariants=False)
