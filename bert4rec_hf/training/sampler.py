"""Batches of histories of similar length."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler


class SimilarLengthSampler(Sampler[int]):
    """Yields rows in random order, in batches of rows of similar length, which need little padding.

    The order differs from epoch to epoch. Transformers' own sampler goes from long to short rows again and again, and
    cannot resume in the middle of an epoch.

    Args:
        lengths: (rows,) length of each row as the model gets it.
        batch_size: Number of rows in a batch.
        seed: Equal seeds give equal orders.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which the order depends on. Accelerate's data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = np.argsort(self.lengths * random.uniform(0.9, 1.1, len(self)))
        # Without the roll, the longest rows would always form the last, incomplete batch.
        order = np.roll(order, random.integers(len(self)))
        whole = len(self) // self.batch_size * self.batch_size
        batches = random.permutation(order[:whole].reshape(-1, self.batch_size))
        return iter([*batches.ravel().tolist(), *order[whole:].tolist()])


def has_lengths(rows: Any) -> bool:
    """Whether the lengths of the rows are known. Rows that a transform creates on reading have none yet."""
    return isinstance(rows, Dataset) and "input_ids" in rows.column_names


def row_lengths(rows: Dataset) -> np.ndarray:
    """(rows,) the lengths of `input_ids`."""
    return pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy(zero_copy_only=False)


def by_length(rows: Dataset) -> np.ndarray:
    """(rows,) the indices of the rows in ascending order of length."""
    return row_lengths(rows).argsort(kind="stable")
