"""The order of training rows: batches of rows of similar length, in memory or streamed."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch.utils.data import Sampler

from ..data.rows import StreamedTrainingRows

# Number of lengths that are read at once. The lengths of streamed rows are in a file.
CHUNK_SIZE = 2**20


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


class StreamedRowSampler(Sampler[int]):
    """Yields streamed rows in random order, but so that each reader reads few parts of the histories at a time.

    The parts are shuffled, and their rows divided among the readers. A reader shuffles its rows in buffers, and forms
    batches of similar length. Readers are the processes and their data-loader workers: batch i of an epoch is for
    reader i modulo `num_readers`, as Accelerate and PyTorch distribute batches.

    Args:
        rows: The rows.
        batch_size: Number of rows in a batch of one process.
        num_readers: Number of processes times the number of data-loader workers of each.
        seed: Equal seeds give equal orders.
        by_length: Whether the rows of a batch have similar lengths.
    """

    def __init__(
        self, rows: StreamedTrainingRows, batch_size: int, num_readers: int, seed: int, by_length: bool = True
    ):
        self.rows, self.batch_size, self.num_readers, self.seed = rows, batch_size, num_readers, seed
        self.by_length, self.epoch = by_length, 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which the order depends on. Accelerate's data loader calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        parts = self._random().permutation(len(self.rows.sizes))
        num_batches = len(self) // self.batch_size
        edges = [reader * num_batches // self.num_readers * self.batch_size for reader in range(self.num_readers + 1)]
        readers = [self._batches(parts, reader, *ends) for reader, ends in enumerate(itertools.pairwise(edges))]
        for batches in itertools.zip_longest(*readers):  # some readers have one batch more than others
            for batch in batches:
                yield from () if batch is None else batch.tolist()
        yield from self._shuffled(parts, edges[-1], len(self)).tolist()

    def _batches(self, parts: np.ndarray, reader: int, start: int, end: int) -> Iterator[np.ndarray]:
        """The batches of a reader, which has the rows from `start` to `end` of the epoch."""
        size = max(1, self.rows.buffer_size // self.batch_size) * self.batch_size
        random = self._random(0, reader)
        for number, first in enumerate(range(start, end, size)):
            rows = self._shuffled(parts, first, min(first + size, end))
            order = random.uniform(0.9, 1.1, len(rows))
            if self.by_length:
                order *= self.rows.lengths[rows]
            batches = rows[order.argsort()].reshape(-1, self.batch_size)
            # The order is the same for all readers. So the processes, which wait for one another at every step, get
            # batches of similar length.
            yield from batches[self._random(1, number).permutation(len(batches))]

    def _shuffled(self, parts: np.ndarray, start: int, end: int) -> np.ndarray:
        """The rows from `start` to `end` of the epoch: the rows of all parts, shuffled within each part."""
        ends = self.rows.sizes[parts].cumsum()
        rows = [np.zeros(0, np.int64)]
        for place in range(np.searchsorted(ends, start, side="right"), len(parts)):
            part, size = parts[place], self.rows.sizes[parts[place]]
            first = ends[place] - size
            if first >= end:
                break
            shuffled = self.rows.ends[part] - size + self._random(2, part).permutation(size)
            rows.append(shuffled[max(0, start - first) : end - first])
        return np.concatenate(rows)

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, *numbers))


def has_lengths(rows: Any) -> bool:
    """Whether the lengths of the rows are known. Rows that a transform creates on reading have none yet."""
    return isinstance(rows, StreamedTrainingRows) or (isinstance(rows, Dataset) and "input_ids" in rows.column_names)


def row_lengths(rows: Dataset | StreamedTrainingRows) -> np.ndarray:
    """(rows,) the lengths of `input_ids`."""
    if isinstance(rows, StreamedTrainingRows):
        return rows.lengths
    return pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy(zero_copy_only=False)


def mean_number_of_targets(
    rows: Dataset | StreamedTrainingRows, max_length: int, target_event_type_ids: Sequence[int]
) -> float:
    """The mean number of events that may be predicted in rows that are cut to `max_length`.

    Args:
        rows: The training rows.
        max_length: Longest input of the model.
        target_event_type_ids: The types that are predicted. Only events of these types count, if rows have types.
    """
    lengths = row_lengths(rows)
    chunks = (lengths[start : start + CHUNK_SIZE] for start in range(0, len(lengths), CHUNK_SIZE))
    mean = sum(int(np.minimum(chunk, max_length).sum()) for chunk in chunks) / len(lengths)
    if isinstance(rows, StreamedTrainingRows):
        return mean * rows.share_of_targets
    if "event_type_ids" not in rows.column_names:
        return mean
    types = pc.list_flatten(rows.with_format("arrow")["event_type_ids"][:]).to_numpy()
    return mean * float(np.isin(types, target_event_type_ids).mean())


def by_length(rows: Dataset) -> np.ndarray:
    """(rows,) the indices of the rows in ascending order of length."""
    return row_lengths(rows).argsort(kind="stable")
