"""Nearest neighbours and EASE: baselines that score the whole catalogue from counts of the training part."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ..data.counting import places_in_groups
from ..data.histories import Histories
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.history_scores import Pairs, item_occurrences

# Catalogues above this size have no item kNN and no EASE, which need a square matrix over the items.
MAX_ITEMS_OF_A_MATRIX = 15_000
# Number of neighbours of an item, and of a history.
ITEM_NEIGHBOURS, HISTORY_NEIGHBOURS = 200, 100
# Number of newest histories with an item that may become neighbours through it.
NEWEST_HISTORIES_OF_AN_ITEM = 1000
# Number of newest items of a history that neighbours are found by.
MATCHED_ITEMS = 20
# L2 regularisation of EASE.
EASE_REGULARISATION = 100.0
# Number of newest items of a neighbour that are scored, so that a few histories of bots do not fill the memory.
NEWEST_ITEMS_OF_A_NEIGHBOUR = 1000
# Number of counts of `shared_users` that are computed at once.
COUNTS_AT_ONCE = 2**24

# Maps histories (batch, length) of token ids, padded with 0 on the left, to scores (batch, vocab size), at least 0 or
# of any sign. The scores of special tokens have no meaning.
Scores = Callable[[torch.Tensor], torch.Tensor]


def shared_users(histories: Histories, num_items: int) -> torch.Tensor:
    """(vocab size, vocab size) float32 the number of users who have both items in the training part."""
    size = num_items + FIRST_ITEM_ID
    user_of = np.repeat(np.arange(len(histories), dtype=np.int64), np.diff(histories.offsets))
    trained = histories.is_trained()
    keys = np.unique(histories.item_ids[trained].astype(np.int64) * len(histories) + user_of[trained])
    items, users = (torch.from_numpy(found) for found in np.divmod(keys, len(histories)))
    items_of_users = _ones(items, users, (size, len(histories))).t().coalesce()
    counts = torch.empty(size, size)
    at_once = max(1, COUNTS_AT_ONCE // size)
    for first in range(0, size, at_once):  # the product of sparse matrices is sparse, and larger than a dense one
        last = min(first + at_once, size)
        start, end = torch.searchsorted(items, torch.tensor([first, last])).tolist()
        part = _ones(items[start:end] - first, users[start:end], (last - first, len(histories)))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            counts[first:last] = torch.sparse.mm(part, items_of_users).to_dense()
    return counts


def item_knn(shared: torch.Tensor) -> Scores:
    """Item kNN (Sarwar et al., WWW 2001): the sum of the cosines to the items of the history.

    Args:
        shared: The counts from `shared_users`. An item has `ITEM_NEIGHBOURS` neighbours.
    """
    lengths = shared.diagonal().clamp(min=1).sqrt()
    cosines = shared / lengths / lengths.unsqueeze(1)
    cosines.fill_diagonal_(0)
    least = cosines.topk(min(ITEM_NEIGHBOURS, len(cosines)), dim=1).values[:, -1:]
    cosines[cosines < least] = 0
    return lambda history_ids: _sum_of_rows(cosines, history_ids)


def ease(shared: torch.Tensor) -> Scores:
    """EASE (Steck, WWW 2019, equation 8): a linear model from the items of a history to all items.

    Args:
        shared: The counts from `shared_users`, which are overwritten.
    """
    shared.diagonal().add_(EASE_REGULARISATION)
    # The inverse is symmetric and stored by columns. Its transpose is the same matrix, stored by rows.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shared)).mT
    weights = inverse.div_(-inverse.diagonal().clone())
    weights.fill_diagonal_(0)
    return lambda history_ids: _sum_of_rows(weights, history_ids)


def history_knn(histories: Histories, num_items: int) -> Callable[[torch.Tensor], Pairs]:
    """Vector multiplication session kNN, V-SKNN (Ludewig & Jannach, UMUAI 2018), with users as sessions.

    Histories are similar if they share items, of which newer ones count more, in proportion to their position among the
    newest `MATCHED_ITEMS`. An item of the `HISTORY_NEIGHBOURS` most similar histories scores the similarity, divided by
    the number of items since the newest shared one. Of a neighbour, the newest `NEWEST_ITEMS_OF_A_NEIGHBOUR` items
    count.

    Args:
        histories: The histories, of which the training part counts.
        num_items: Number of items in the catalogue.

    Returns:
        A function of histories (batch, length) that returns the pairs of items and scores.
    """
    size = num_items + FIRST_ITEM_ID
    trained = histories.is_trained()
    user_of = np.repeat(np.arange(len(histories), dtype=np.int64), np.diff(histories.offsets))
    # The last place of each item in each history.
    keys, places = np.unique((user_of[trained] * size + histories.item_ids[trained])[::-1], return_index=True)
    users, items = keys // size, keys % size
    ends = np.zeros(len(histories))
    if histories.timestamps is not None:
        np.maximum.at(ends, user_of[trained], histories.timestamps[trained].astype(float))
    newest_first = np.argsort(-ends, kind="stable")
    age_of = np.empty_like(newest_first)
    age_of[newest_first] = np.arange(len(newest_first))
    # For each item, its histories, the newest first.
    order = np.lexsort((age_of[users], items))
    of_item = torch.from_numpy(users[order])
    starts = torch.from_numpy(np.searchsorted(items[order], np.arange(size + 1)))
    num_of_item = starts.diff().clamp(max=NEWEST_HISTORIES_OF_AN_ITEM)
    # For each history, its items, the newest first.
    own_items = torch.from_numpy(items[np.lexsort((places, users))])
    own_starts = torch.from_numpy(np.searchsorted(users, np.arange(len(histories) + 1)))
    num_own = own_starts.diff()
    norms = num_own.clamp(min=1).float().sqrt()
    num_own = num_own.clamp(max=NEWEST_ITEMS_OF_A_NEIGHBOUR)
    del keys, places

    def scores(history_ids: torch.Tensor) -> Pairs:
        ids, counts, ages = item_occurrences(history_ids[:, -MATCHED_ITEMS:])
        rows, columns = ((counts > 0) & (ages < MATCHED_ITEMS)).nonzero(as_tuple=True)
        matched, matched_ages = ids[rows, columns], ages[rows, columns]
        pair, places = _expand(starts[matched], num_of_item[matched])
        # A row and a history are encoded as one number.
        keys, found = torch.unique(rows[pair] * len(norms) + of_item[places], return_inverse=True)
        weights = 1 - matched_ages.float() / MATCHED_ITEMS
        similar = torch.zeros(len(keys)).index_add_(0, found, weights[pair])
        # Number of items since the newest shared one.
        nearest = torch.full((len(keys),), float(MATCHED_ITEMS))
        nearest = nearest.scatter_reduce_(0, found, matched_ages[pair].float(), "amin")
        rows, neighbours = keys // len(norms), keys % len(norms)
        similar = similar / norms[neighbours]
        is_neighbour = places_in_groups(rows, similar) < HISTORY_NEIGHBOURS
        rows, neighbours = rows[is_neighbour], neighbours[is_neighbour]
        values = (similar / (1 + nearest))[is_neighbour]
        pair, places = _expand(own_starts[neighbours], num_own[neighbours])
        keys, found = torch.unique(rows[pair] * size + own_items[places], return_inverse=True)
        summed = torch.zeros(len(keys)).index_add_(0, found, values[pair])
        rows = keys // size
        lengths = torch.bincount(rows, minlength=len(history_ids))
        width = int(lengths.max()) if len(lengths) else 0
        # The padding comes first.
        columns = torch.arange(len(keys)) - (lengths.cumsum(0) - lengths)[rows] + (width - lengths)[rows]
        item_ids = torch.zeros(len(history_ids), width, dtype=torch.long)
        item_ids[rows, columns] = keys % size
        of_items = torch.zeros(len(history_ids), width)
        of_items[rows, columns] = summed
        return item_ids, of_items

    return scores


def _expand(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges of places as single places, with the number of the range that each belongs to."""
    numbers = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    return numbers, starts[numbers] + torch.arange(len(numbers)) - (lengths.cumsum(0) - lengths)[numbers]


def _sum_of_rows(table: torch.Tensor, history_ids: torch.Tensor) -> torch.Tensor:
    """(batch, columns) the sum of a table's rows (vocab size, columns) of the items of each history, each once."""
    item_ids, counts, _ = item_occurrences(history_ids)
    is_item = counts > 0
    # The padding is left out, since beside one long history it would be most of the work.
    lengths = is_item.sum(1)
    return nn.functional.embedding_bag(item_ids[is_item], table, lengths.cumsum(0) - lengths, mode="sum")


def _ones(rows: torch.Tensor, columns: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A sparse matrix of ones at sorted places."""
    indices = torch.stack((rows, columns))
    ones = torch.ones(len(rows))
    return torch.sparse_coo_tensor(indices, ones, size, check_invariants=False, is_coalesced=True)
