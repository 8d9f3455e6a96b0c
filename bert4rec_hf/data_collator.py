# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Masking for training, padding for ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from .losses import IGNORE_INDEX
from .tokenization_bert4rec import Bert4RecTokenizer


@dataclass
class DataCollatorForMaskedItemPrediction:
    """Mask items of histories for training; pad evaluation rows as they are.

    A row is a mapping with `input_ids`: a list, numpy array or torch tensor of token ids of any length. Rows that
    have `labels` too are evaluation rows (`ranking_rows` makes them) and are not masked; their `exclude_ids` are
    padded with 0.

    Random numbers come from torch's global generator, which the Trainer seeds and data-loader workers get anew
    every epoch: equal seeds give equal masks, epochs and workers differ.

    Args:
        tokenizer: The catalogue.
        mask_ratio: Probability of each item to become [MASK] (Sun et al. 2019, section 3.6), always [MASK], never
            a random item. Every row that has items gets at least one.
        last_item_ratio: Share of rows whose only mask is their last item, as in serving.
        max_length: Longest row; None: the tokenizer's `model_max_length`.
        random_windows: Of a longer history, take a random window instead of the newest items.

    Returns:
        When called: `input_ids`, `attention_mask`, `labels` (batch, length), `label_positions` (batch, most
        labels of a row) padded with -1; for evaluation rows `exclude_ids` as well.

    Raises:
        ValueError: If a ratio is out of range, or a token id is not of the tokenizer's.
    """

    tokenizer: Bert4RecTokenizer
    mask_ratio: float = 0.2
    last_item_ratio: float = 0.0
    max_length: int | None = None
    random_windows: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, both excluded; got {self.mask_ratio}")
        if not 0 <= self.last_item_ratio <= 1:
            raise ValueError(f"last_item_ratio must lie between 0 and 1; got {self.last_item_ratio}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [np.asarray(feature["input_ids"], dtype=np.int64) for feature in features]
        if "labels" in features[0]:
            return self._evaluation_batch(features, rows)
        random = np.random.default_rng(int(torch.randint(2**62, (1,))))
        input_ids = _pad([self._window(row, random) for row in rows], PAD_TOKEN_ID)
        self._check_ids(input_ids)
        is_item = input_ids >= FIRST_ITEM_ID
        masked = is_item & (random.random(input_ids.shape) < self.mask_ratio)
        last = np.where(is_item, np.arange(input_ids.shape[1]), -1).max(axis=1, initial=-1)
        # A row that chance has left without a mask gets one; a row may be chosen to have its last item only.
        order = np.where(is_item, random.random(input_ids.shape), -1.0)
        anywhere = order.argmax(axis=1) if input_ids.shape[1] else last
        only_last = random.random(len(rows)) < self.last_item_ratio
        masked[only_last] = False
        needed = np.flatnonzero(~masked.any(axis=1) & (last >= 0))
        masked[needed, np.where(only_last, last, anywhere)[needed]] = True
        return self._batch(
            input_ids=np.where(masked, MASK_TOKEN_ID, input_ids),
            attention_mask=input_ids != PAD_TOKEN_ID,
            labels=np.where(masked, input_ids, IGNORE_INDEX),
            label_positions=_pad([np.flatnonzero(row) for row in masked], -1),
        )

    def _window(self, row: np.ndarray, random: np.random.Generator) -> np.ndarray:
        max_length = self.max_length or self.tokenizer.model_max_length
        spare = len(row) - max_length
        if spare <= 0:
            return row
        start = random.integers(spare + 1) if self.random_windows else spare
        return row[start : start + max_length]

    def _evaluation_batch(
        self, features: Sequence[Mapping[str, Any]], rows: list[np.ndarray]
    ) -> dict[str, torch.Tensor]:
        labels = [np.asarray(feature["labels"], dtype=np.int64) for feature in features]
        # Also where the label is -100, for a target that the catalogue lacks: what would be recommended counts.
        is_mask = [row == MASK_TOKEN_ID for row in rows]
        input_ids = _pad(rows, PAD_TOKEN_ID)
        batch = {
            "input_ids": input_ids,
            "attention_mask": input_ids != PAD_TOKEN_ID,
            "labels": _pad(labels, IGNORE_INDEX),
            "label_positions": _pad([np.flatnonzero(row) for row in is_mask], -1),
        }
        self._check_ids(batch["input_ids"])
        self._check_ids(np.where(batch["labels"] == IGNORE_INDEX, 0, batch["labels"]))
        if "exclude_ids" in features[0]:
            excluded = [np.asarray(feature["exclude_ids"], dtype=np.int64) for feature in features]
            batch["exclude_ids"] = _pad(excluded, 0)
            self._check_ids(batch["exclude_ids"])
        return self._batch(**batch)

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.tokenizer):
            raise ValueError(
                f"token ids must lie between 0 and {len(self.tokenizer) - 1}, the tokenizer's last; got "
                f"{ids.min()} to {ids.max()}: make them with this tokenizer"
            )

    @staticmethod
    def _batch(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(array, np.int64)) for name, array in arrays.items()}


def _pad(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """(rows, longest row), filled up on the right; at least one column, without which no model or Trainer can do."""
    padded = np.full((len(rows), max(1, *map(len, rows))), value, dtype=np.int64)
    for filled, row in zip(padded, rows, strict=True):
        filled[: len(row)] = row
    return padded
