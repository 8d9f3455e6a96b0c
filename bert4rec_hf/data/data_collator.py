# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Masking and sampled negatives for training, padding for ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer


@dataclass
class DataCollatorForMaskedItemPrediction:
    """Masks items of training rows, and pads evaluation rows without masking them.

    A row is a mapping with `input_ids`: a list, numpy array or torch tensor of token ids of any length. A row with
    `labels` is an evaluation row (see `ranking_rows`): it is not masked, and its `history_ids`, `exclude_ids` and
    `candidate_ids` are padded with 0. Other columns are dropped.

    With a column `event_type_ids`, only events of the tokenizer's target types are predicted, and a [MASK] has the type
    of what it predicts. A row that `last_item_ratio` selects ends with its last target. Where an item is masked, its
    later occurrences in the row become [MASK]s without a type, since a later event would give it away; with `causal`,
    later events are not read in any case. A column `loss_weights` has the weights of the labels.

    Random numbers come from torch's global generator. The Trainer seeds it, and each data-loader worker gets a new
    seed every epoch. So equal seeds give equal masks, while epochs and workers differ.

    Args:
        tokenizer: The catalogue.
        mask_ratio: Probability that an item is predicted: that it is replaced by [MASK] (Sun et al. 2019, section 3.6),
            or with `causal`, that it gets a [MASK] of its own. Unlike BERT, the collator never inserts a random item.
            Every row with items gets at least one mask.
        last_item_ratio: Share of rows in which only the last item is masked, as in serving.
        max_predictions: Maximum number of masks in a row; surplus masks are removed at random. None: no limit.
        max_length: Longest row. None: the tokenizer's `model_max_length`.
        random_windows: Whether a history longer than `max_length` is cut to a random window. False: it is cut to its
            newest items.
        causal: Whether the rows are for a model with `config.causal_attention`: the items stay, and a [MASK] for each
            item that is predicted follows them, with the position of that item.
        num_negatives: Number K of negative items drawn for each training batch. All labels of the batch share them.
            The full softmax does not use them. 0: none.
        negative_sampling: "uniform" draws each item at most once, and all items if `num_negatives` is larger than the
            catalogue. "popularity" draws in proportion to the tokenizer's training counts, with replacement.

    Returns:
        The collator returns a batch when it is called. `input_ids` and `attention_mask` are (batch, length).
        `masked_positions` is (batch, P), padded with -1, where P is the largest number of masks in a row. `labels` is
        (batch, P), the items at these positions, padded with -100. With `causal`, training batches have `position_ids`
        (batch, length), and the labels are the items whose positions the [MASK]s have. Evaluation rows keep
        `history_ids`, `exclude_ids` and `candidate_ids`, each (batch, longest). With `num_negatives`, training batches
        have `negative_ids` (K,). With "popularity" they also have `negative_log_probabilities` (K,), the log
        probability that one draw gives the negative, and `positive_log_probabilities` (batch, P), the log probability
        that a label is among the K draws, or 0 without a label. A label whose training count is 0 is treated as if it
        had been counted once.

    Raises:
        TypeError: If a row has raw item ids, or numbers that are not integers.
        ValueError: If a ratio is out of range, a token id is not in the tokenizer, or the training counts are missing.
    """

    tokenizer: Bert4RecTokenizer
    mask_ratio: float = 0.2
    last_item_ratio: float = 0.0
    max_predictions: int | None = None
    max_length: int | None = None
    random_windows: bool = True
    causal: bool = False
    num_negatives: int = 0
    negative_sampling: str = "uniform"

    def __post_init__(self) -> None:
        if not (0 < self.mask_ratio < 1 or (self.causal and self.mask_ratio == 1)):
            limits = "above 0 and at most 1" if self.causal else "between 0 and 1, both excluded"
            raise ValueError(f"mask_ratio must lie {limits}; got {self.mask_ratio}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {self.max_length}")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"max_predictions must be at least 1; got {self.max_predictions}")
        if not 0 <= self.last_item_ratio <= 1:
            raise ValueError(f"last_item_ratio must lie between 0 and 1; got {self.last_item_ratio}")
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives must be at least 0; got {self.num_negatives}")
        if self.negative_sampling not in ("uniform", "popularity"):
            raise ValueError(f"negative_sampling must be uniform or popularity; got {self.negative_sampling!r}")
        if self.num_negatives and self.negative_sampling == "popularity":
            counts = np.asarray(self.tokenizer.counts or [], np.int64)
            if not counts.sum():
                raise ValueError(
                    "negative_sampling popularity needs the items' training counts, which this tokenizer lacks: call "
                    "tokenizer.set_counts, or choose uniform"
                )
            self._cumulative_counts = counts.cumsum()
            probabilities = counts.clip(min=1) / counts.sum()
            self._log_of_draw = np.log(probabilities).astype(np.float32)
            self._log_among_draws = np.log(1 - (1 - probabilities) ** self.num_negatives).astype(np.float32)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [_token_ids(feature["input_ids"]) for feature in features]
        if "labels" in features[0]:
            return self._evaluation_batch(features, rows)
        random = np.random.default_rng(int(torch.randint(2**62, (1,))))
        windows = [
            self._window(row, random, feature.get("event_type_ids"))
            for row, feature in zip(rows, features, strict=True)
        ]
        input_ids = _pad([row[window] for row, window in zip(rows, windows, strict=True)], PAD_TOKEN_ID)
        self._check_ids(input_ids)
        further = {
            name: _pad(
                [np.asarray(feature[name], kind)[window] for feature, window in zip(features, windows, strict=True)], 0
            )
            for name, kind in (("event_type_ids", np.int64), ("loss_weights", np.float32))
            if name in features[0]
        }
        types, weights = further.get("event_type_ids"), further.get("loss_weights")
        is_item = input_ids >= FIRST_ITEM_ID
        if types is not None:
            is_item &= np.isin(types, self.tokenizer.target_event_type_ids)
        masked = is_item & (random.random(input_ids.shape) < self.mask_ratio)
        if self.max_predictions is not None:
            places = np.where(masked, random.random(input_ids.shape), 2.0).argsort(axis=1).argsort(axis=1)
            masked &= places < self.max_predictions
        last = np.where(is_item, np.arange(input_ids.shape[1]), -1).max(axis=1)
        order = random.random(input_ids.shape)
        only_last = random.random(len(rows)) < self.last_item_ratio
        masked[only_last] = False
        # Rows without a mask get one: at the last item if `last_item_ratio` selected the row, else at a random item.
        needed = np.flatnonzero(~masked.any(axis=1) & (last >= 0))
        anywhere = np.where(is_item[needed], order[needed], -1.0).argmax(axis=1)
        masked[needed, np.where(only_last[needed], last[needed], anywhere)] = True
        masked_positions = _pad([row.nonzero()[0] for row in masked], -1)
        labels = _at(input_ids, masked_positions)
        if types is not None:
            # As in serving, nothing follows the event that is predicted.
            is_after = only_last[:, None] & (np.arange(input_ids.shape[1]) > last[:, None]) & (last >= 0)[:, None]
            input_ids, types = np.where(is_after, PAD_TOKEN_ID, input_ids), np.where(is_after, 0, types)
        if self.causal:
            batch = self._causal_batch(input_ids, masked_positions, labels, types)
        else:
            is_hidden = masked
            if types is not None:
                is_later = _later_occurrences(input_ids, masked)
                is_hidden, types = masked | is_later, np.where(is_later, 0, types)
            batch = self._batch(
                input_ids=np.where(is_hidden, MASK_TOKEN_ID, input_ids),
                attention_mask=input_ids != PAD_TOKEN_ID,
                labels=labels,
                masked_positions=masked_positions,
                **({} if types is None else {"event_type_ids": types}),
            )
        if weights is not None:
            at_labels = np.take_along_axis(weights, masked_positions.clip(min=0), axis=1)
            batch["loss_weights"] = torch.from_numpy(np.where(masked_positions < 0, 0, at_labels).astype(np.float32))
        return batch | self._negatives(labels, random) if self.num_negatives else batch

    def _causal_batch(
        self, input_ids: np.ndarray, predicted: np.ndarray, labels: np.ndarray, types: np.ndarray | None
    ) -> dict[str, torch.Tensor]:
        """Items (batch, length), followed by a [MASK] for each of the positions (batch, P) that are predicted."""
        is_mask, length = predicted >= 0, input_ids.shape[1]
        tokens = np.concatenate((input_ids, np.where(is_mask, MASK_TOKEN_ID, PAD_TOKEN_ID)), axis=1)
        places = np.broadcast_to(np.arange(length), input_ids.shape)
        further = {}
        if types is not None:
            of_masks = np.where(is_mask, np.take_along_axis(types, predicted.clip(min=0), axis=1), 0)
            further["event_type_ids"] = np.concatenate((types, of_masks), axis=1)
        return self._batch(
            input_ids=tokens,
            attention_mask=tokens != PAD_TOKEN_ID,
            position_ids=np.concatenate((places, predicted.clip(min=0)), axis=1),
            labels=labels,
            masked_positions=np.where(is_mask, length + np.arange(predicted.shape[1]), -1),
            **further,
        )

    def _negatives(self, labels: np.ndarray, random: np.random.Generator) -> dict[str, torch.Tensor]:
        """The negatives of a batch, with their log probabilities, for labels (batch, P)."""
        num_items = self.tokenizer.num_items
        if self.negative_sampling == "uniform":
            items = random.choice(num_items, min(self.num_negatives, num_items), replace=False, shuffle=False)
            return self._batch(negative_ids=items + FIRST_ITEM_ID)
        draws = random.integers(self._cumulative_counts[-1], size=self.num_negatives)
        items = self._cumulative_counts.searchsorted(draws, side="right")
        positive = self._log_among_draws[labels.clip(FIRST_ITEM_ID) - FIRST_ITEM_ID]
        return self._batch(negative_ids=items + FIRST_ITEM_ID) | {
            "negative_log_probabilities": torch.from_numpy(self._log_of_draw[items]),
            "positive_log_probabilities": torch.from_numpy(np.where(labels == IGNORE_INDEX, 0, positive)),
        }

    def _window(self, row: np.ndarray, random: np.random.Generator, types: Any) -> slice:
        max_length = self.tokenizer.model_max_length if self.max_length is None else self.max_length
        spare = len(row) - max_length
        if spare <= 0:
            return slice(None)
        low, high = 0, spare
        if types is not None:
            # A window without an event of a target type would train nothing.
            targets = np.flatnonzero(np.isin(types, self.tokenizer.target_event_type_ids))
            if len(targets):
                target = random.choice(targets) if self.random_windows else targets[-1]
                low, high = max(0, target - max_length + 1), min(spare, target)
                if not self.random_windows:
                    high = low  # what comes after the last target trains nothing
        start = random.integers(low, high + 1) if self.random_windows else high
        return slice(start, start + max_length)

    def _evaluation_batch(
        self, features: Sequence[Mapping[str, Any]], rows: list[np.ndarray]
    ) -> dict[str, torch.Tensor]:
        labels = [np.asarray(feature["labels"], dtype=np.int64) for feature in features]
        # The [MASK] is located in input_ids, not in labels: the label of a target outside the catalogue is -100, and
        # such rows are ranked as well.
        masked_positions = _pad([(row == MASK_TOKEN_ID).nonzero()[0] for row in rows], -1)
        input_ids = _pad(rows, PAD_TOKEN_ID)
        batch = {
            "input_ids": input_ids,
            "attention_mask": input_ids != PAD_TOKEN_ID,
            "labels": _at(_pad(labels, IGNORE_INDEX), masked_positions),
            "masked_positions": masked_positions,
        }
        self._check_ids(batch["input_ids"])
        self._check_ids(np.where(batch["labels"] == IGNORE_INDEX, 0, batch["labels"]))
        if "event_type_ids" in features[0]:
            batch["event_type_ids"] = _pad([np.asarray(row["event_type_ids"], np.int64) for row in features], 0)
        if "history_type_ids" in features[0]:
            batch["history_type_ids"] = _pad([np.asarray(row["history_type_ids"], np.int64) for row in features], 0)
            batch["target_type_ids"] = np.array([row["target_type_ids"] for row in features])
        for name in ("history_ids", "exclude_ids", "candidate_ids"):
            if name not in features[0]:
                continue
            batch[name] = _pad([np.asarray(feature[name], dtype=np.int64) for feature in features], 0)
            self._check_ids(batch[name])
        return self._batch(**batch)

    def _check_ids(self, ids: np.ndarray) -> None:
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.tokenizer):
            raise ValueError(
                f"token ids must lie between 0 and {len(self.tokenizer) - 1}, the largest id of the tokenizer; got "
                f"{ids.min()} to {ids.max()}: make the rows with this tokenizer"
            )

    @staticmethod
    def _batch(**arrays: np.ndarray) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(array, np.int64)) for name, array in arrays.items()}


def _token_ids(row: Any) -> np.ndarray:
    row = np.asarray(row)
    if len(row) and row.dtype.kind not in "iu":
        raise TypeError(
            f"input_ids must be token ids, integers; got {row[0]!r}: convert raw item ids with "
            "tokenizer.item_ids_to_token_ids"
        )
    return row.astype(np.int64, copy=False)


def _later_occurrences(input_ids: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """(batch, length) whether an item that is not masked itself comes after a masked occurrence of it in its row."""
    is_item = input_ids >= FIRST_ITEM_ID
    rows, places = np.nonzero(is_item)
    keys = rows * (int(input_ids.max(initial=0)) + 1) + input_ids[rows, places]
    _, number = np.unique(keys, return_inverse=True)
    first_masked = np.full(len(keys) + 1, input_ids.shape[1])
    is_masked = masked[rows, places]
    np.minimum.at(first_masked, number[is_masked], places[is_masked])
    is_later = np.zeros(input_ids.shape, bool)
    is_later[rows, places] = (places > first_masked[number]) & ~is_masked
    return is_later


def _at(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Values (batch, length) at positions (batch, P), `IGNORE_INDEX` where the position is -1."""
    return np.where(positions < 0, IGNORE_INDEX, np.take_along_axis(values, positions.clip(min=0), axis=1))


def _pad(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """(rows, longest row), padded on the right. There is at least one column, because models need one."""
    kind = np.float32 if len(rows) and rows[0].dtype.kind == "f" else np.int64
    padded = np.full((len(rows), max(1, *map(len, rows))), value, dtype=kind)
    for filled, row in zip(padded, rows, strict=True):
        filled[: len(row)] = row
    return padded
