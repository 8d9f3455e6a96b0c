"""Batches of histories of similar length."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler


class SimilarLengthSampler(Sampler[int]):
    """Rows in random order, another each epoch, with batches of similar length: little is padding.

    Transformers' own goes from long to short over and over, and cannot be resumed in the middle of an epoch.

    Args:
        lengths: (rows,), of what the model gets.
        batch_size: Rows a batch.
        seed: Equal seeds give equal orders.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's data loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = np.argsort(self.lengths * random.uniform(0.9, 1.1, len(self)))
        order = np.roll(order, random.integers(len(self)))  # the last batch, a short one, is not always of the longest
        whole = len(self) // self.batch_size * self.batch_size
        batches = random.permutation(order[:whole].reshape(-1, self.batch_size))
        return iter([*batches.ravel().tolist(), *order[whole:].tolist()])


def has_lengths(rows: Any) -> bool:
    """Whether the rows are stored; those that a transform makes as they are read have no lengths yet."""
    return isinstance(rows, Dataset) and "input_ids" in rows.column_names


def row_lengths(rows: Dataset) -> np.ndarray:
    """(rows,), of their `input_ids`."""
    return pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy(zero_copy_only=False)


def by_length(rows: Dataset) -> np.ndarray:
    """Numbers of the rows, the shortest first."""
    return row_lengths(rows).argsort(kind="stable")
