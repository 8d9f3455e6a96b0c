# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Counted scores that are added to the network's: successors of the newest items, repeats, and popularity."""

import torch
from torch import nn

from .configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID, Bert4RecConfig

# Number of newest items whose successors are scored. Each counts half as much as the one after it, so all older items
# together would have a share of less than half a percent.
NUM_NEWEST_ITEMS = 8
# Number of newest events of each type whose items have a conversion score.
NUM_NEWEST_EVENTS = 16
# Upper limit of the number of pairs of a history, before pairs of the same item are summed.
MAX_PAIRS = 2**20

# The features of `HistoryScores`, and the field of the config that has the weight of each.
WEIGHT_FIELDS = {
    "transitions": "transition_weight",
    "next_items": "next_item_weight",
    "repeats": "repeat_weight",
    "recency": "recency_weight",
    "popularity": "popularity_weight",
}

# Token ids (batch, K) int64 and values (batch, K) float32. The ids of a row are unique and in ascending order; the
# padding, (0, 0), comes first.
Pairs = tuple[torch.Tensor, torch.Tensor]


class HistoryScores(nn.Module):
    """Scores that a history adds to some items, in addition to the network's scores.

    The module sums the features that `features` returns, each multiplied by its weight in the config, which is at least
    0. The weights are read at every call. Every feature is at least 0.

    - `transitions` (`config.transition_weight`): the successor scores of the newest `NUM_NEWEST_ITEMS` items. They are
      averaged, and each item counts half as much as the next newer one.
    - `next_items` (`config.next_item_weight`): the next-item scores of the newest item.
    - `repeats` (`config.repeat_weight`): ln(1 + n) for an item that the history has n times.
    - `recency` (`config.recency_weight`): 1 / 2 ** n for an item that the history last had n items before its newest.
    - `popularity` (`config.popularity_weight`): the popularity of an item, for a history without items.

    With event types, transitions start from the events of all types. Repeats count only the events of the type that is
    recommended for. Recency is the conversion score of what was last done with the item: of the type of its newest
    event, the number of newer events of this type, and whether the history has the item with the type that is
    recommended for. So an item in the cart that has not been bought scores as high as such items were bought next, and
    an item that was just bought as high as such items were bought again.

    The counts are buffers, which FSDP never shards. `successor_ids` (vocab size, K) int32 has the token ids of each
    item's successors, each once and padded with 0. `successor_scores` and `next_item_scores` (vocab size, K) float32
    have their scores; see `counting.transitions`. K is `config.num_transitions`. The row of [PAD] holds the popular
    items. All three are None if K is 0. `conversion_scores` (T + 1, 2, T + 1, `NUM_NEWEST_EVENTS`) float32, for T event
    types, has those of `counting.conversion_scores`; None without event types.
    """

    successor_ids: torch.Tensor | None
    successor_scores: torch.Tensor
    next_item_scores: torch.Tensor
    conversion_scores: torch.Tensor | None

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.config = config
        shape = config.vocab_size, config.num_transitions
        # The dtype is explicit, since half precision would give many items equal scores.
        for name, dtype in (
            ("successor_ids", torch.int32),
            ("successor_scores", torch.float32),
            ("next_item_scores", torch.float32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype) if config.num_transitions else None)
        num_types = config.num_event_types + 1
        shape_of_types = num_types, 2, num_types, NUM_NEWEST_EVENTS
        scores = torch.zeros(shape_of_types, dtype=torch.float32) if config.num_event_types else None
        self.register_buffer("conversion_scores", scores)

    @property
    def is_empty(self) -> bool:
        """Whether the module adds nothing to the network's scores."""
        return self.successor_ids is None and not self.config.repeat_weight and not self.config.recency_weight

    def resize(self, vocab_size: int) -> None:
        """Add rows for new items, which have no successors."""
        if self.successor_ids is not None:
            added = 0, 0, 0, vocab_size - len(self.successor_ids)
            for name in ("successor_ids", "successor_scores", "next_item_scores"):
                setattr(self, name, nn.functional.pad(getattr(self, name), added))

    def forward(
        self,
        history_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
        target_type_ids: torch.Tensor | None = None,
    ) -> Pairs:
        """The pairs of items and values to add to the network's scores.

        Args:
            history_ids: (batch, length) token ids, oldest first. Special tokens are left out.
            attention_mask: (batch, length), 0 for positions that do not count. None: all count.
            history_type_ids: (batch, length) the types of the events. None: all are of the type that is recommended
                for, or the model has no event types.
            target_type_ids: (batch,) the type that is recommended for. None: the first target type.

        Returns:
            item_ids (batch, K) int64, unique and ascending in each row, and values (batch, K) float32. Padding,
            (0, 0), comes first. Values of the same item are summed in a fixed order.
        """
        config = self.config
        item_ids = _items(history_ids, attention_mask)
        found, most = [], 0
        if self.successor_ids is not None:
            newest_ids, shares, is_start = newest_items(item_ids)
            weights = shares * config.transition_weight + is_start * config.popularity_weight
            values = self.successor_scores[newest_ids].float() * weights.unsqueeze(2)
            next_items = self.next_item_scores[newest_ids[:, :1]].float() * config.next_item_weight
            values = torch.cat((values[:, :1] + next_items, values[:, 1:]), dim=1)
            found.append((self.successor_ids[newest_ids].flatten(1).long(), values.flatten(1)))
            most += NUM_NEWEST_ITEMS
        if config.repeat_weight or config.recency_weight:
            found.append(self._weighted_repeats(item_ids, history_type_ids, target_type_ids))
            most += 1
        if not found:
            return item_ids[:, :0], torch.zeros(item_ids.shape[0], 0, device=item_ids.device)
        paired_ids, values = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return _sum_pairs(paired_ids, values, most)

    def features(
        self,
        history_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        history_type_ids: torch.Tensor | None = None,
        target_type_ids: torch.Tensor | None = None,
    ) -> dict[str, Pairs]:
        """The unweighted pairs of each feature by name. Arguments and shapes are those of `forward`."""
        item_ids = _items(history_ids, attention_mask)
        paired_ids, repeats, recency = self._repeats(item_ids, history_type_ids, target_type_ids)
        features = {"recency": _sum_pairs(paired_ids, recency, 1), "repeats": _sum_pairs(paired_ids, repeats, 1)}
        if self.successor_ids is not None:
            newest_ids, shares, is_start = newest_items(item_ids)
            ids = self.successor_ids[newest_ids].long()
            scores = self.successor_scores[newest_ids].float()
            next_item_scores = self.next_item_scores[newest_ids[:, 0]].float()
            weighted = (scores * shares.unsqueeze(2)).flatten(1)
            features["transitions"] = _sum_pairs(ids.flatten(1), weighted, NUM_NEWEST_ITEMS)
            features["next_items"] = _sum_pairs(ids[:, 0], next_item_scores, 1)
            features["popularity"] = _sum_pairs(ids[:, 0], scores[:, 0] * is_start[:, :1], 1)
        return features

    def contributions(
        self,
        history_ids: torch.Tensor,
        item_ids: torch.Tensor,
        source_ids: torch.Tensor,
        history_type_ids: torch.Tensor | None = None,
        target_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The part of each item of a history in the values that `forward` has for some items.

        A transition belongs to the item that it starts from, and next items belong to the newest item. Repeats and
        recency belong to the item itself. The parts are those of the whole history: places and shares do not move up,
        as they would without an item. Popularity is for histories without items, so no item has a part in it.

        Args:
            history_ids: (batch, length) token ids, oldest first. Special tokens are left out.
            item_ids: (batch, k) token ids whose values are divided.
            source_ids: (batch, M) distinct token ids of each history, padded with 0.
            history_type_ids: See `forward`.
            target_type_ids: See `forward`.

        Returns:
            (batch, k, M) float32. If `source_ids` has all items of a history, the parts of an item sum to its value.
        """
        history_ids, config = _items(history_ids, None), self.config
        paired_ids, values = self._weighted_repeats(history_ids, history_type_ids, target_type_ids)
        values = values_of(_sum_pairs(paired_ids, values, 1), item_ids)
        is_itself = (source_ids.unsqueeze(1) == item_ids.unsqueeze(2)) & (source_ids > 0).unsqueeze(1)
        parts = values.unsqueeze(2) * is_itself
        if self.successor_ids is not None:
            newest_ids, shares, _ = newest_items(history_ids)
            for place, newest in enumerate(newest_ids.unbind(dim=1)):
                values = self.successor_scores[newest].float() * shares[:, place, None] * config.transition_weight
                if place == 0:
                    values = values + self.next_item_scores[newest].float() * config.next_item_weight
                values = values_of(_sum_pairs(self.successor_ids[newest].long(), values, 1), item_ids)
                is_source = (source_ids == newest.unsqueeze(1)) & (source_ids > 0)
                parts = parts + values.unsqueeze(2) * is_source.unsqueeze(1)
        return parts

    def _weighted_repeats(
        self, item_ids: torch.Tensor, type_ids: torch.Tensor | None, target_type_ids: torch.Tensor | None
    ) -> Pairs:
        """The token ids of `_repeats`, and the sums of the two features times their weights."""
        item_ids, repeats, recency = self._repeats(item_ids, type_ids, target_type_ids)
        return item_ids, repeats * self.config.repeat_weight + recency * self.config.recency_weight

    def _repeats(
        self, item_ids: torch.Tensor, type_ids: torch.Tensor | None, target_type_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (batch, length) in ascending order, and their repeats and recency at the first place of an item."""
        ids, counts, ages = item_occurrences(item_ids)
        is_newest = counts > 0
        if self.conversion_scores is None:
            return ids, counts.log1p(), torch.pow(0.5, ages.float()) * is_newest
        if target_type_ids is None:
            target_type_ids = item_ids.new_full((item_ids.shape[0],), (self.config.target_event_type_ids or [1])[0])
        target_type_ids = target_type_ids.unsqueeze(1)
        type_ids = target_type_ids.expand_as(item_ids) if type_ids is None else type_ids
        is_item = item_ids > 0
        num_newer = torch.zeros_like(item_ids)  # events of the same type
        for kind in range(self.config.num_event_types + 1):
            is_kind = is_item & (type_ids == kind)
            num_newer = num_newer.where(~is_kind, is_kind.flip(1).cumsum(1).flip(1) - 1)
        # Values of the events are put into the order of `ids`, through the number of items that are newer.
        columns = (is_item.flip(1).cumsum(1).flip(1) - 1).where(is_item, item_ids.shape[1])

        def in_order(values: torch.Tensor) -> torch.Tensor:
            by_age = values.new_zeros(values.shape[0], values.shape[1] + 1).scatter(1, columns, values)
            return by_age.gather(1, ages) * (ids > 0)

        _, number = _runs(ids)
        counts = in_order((type_ids == target_type_ids).to(counts.dtype))
        counts = torch.zeros_like(counts).scatter_add(1, number, counts).gather(1, number) * is_newest
        age, kind_ids = in_order(num_newer), in_order(type_ids)
        scores = self.conversion_scores[
            target_type_ids, (counts > 0).long(), kind_ids, age.clamp(max=NUM_NEWEST_EVENTS - 1)
        ].float()
        return ids, counts.log1p(), scores * (is_newest & (age < NUM_NEWEST_EVENTS))

    def successors(self, item_ids: torch.Tensor) -> Pairs:
        """The successors of items (batch,), with their successor scores as shares of the highest of the catalogue."""
        if self.successor_ids is None:
            return item_ids.new_zeros(len(item_ids), 0), torch.zeros(len(item_ids), 0, device=item_ids.device)
        highest = self.successor_scores[FIRST_ITEM_ID:].amax().float().clamp(min=1e-12)
        values = self.successor_scores[item_ids].float() / highest
        return _sum_pairs(self.successor_ids[item_ids].long(), values, 1)


def newest_items(item_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The newest items of each history, whose successors are scored.

    Args:
        item_ids: (batch, length) token ids, oldest first, 0 where there is no item.

    Returns:
        newest_ids: (batch, `NUM_NEWEST_ITEMS`) token ids, newest first, padded with [PAD].
        shares: (batch, `NUM_NEWEST_ITEMS`), which halve from item to item and sum to 1; 0 for [PAD].
        is_start: (batch, `NUM_NEWEST_ITEMS`), 1 in the first place of a history without items, else 0. Such a history
            gets the successors of [PAD].
    """
    is_item = item_ids > 0
    age = is_item.flip(1).cumsum(1).flip(1) - 1  # the number of newer items
    places = age.where(is_item & (age < NUM_NEWEST_ITEMS), NUM_NEWEST_ITEMS)
    # Older items all go into an extra column, which is dropped.
    newest_ids = item_ids.new_zeros(item_ids.shape[0], NUM_NEWEST_ITEMS + 1).scatter(1, places, item_ids)[:, :-1]
    exponents = torch.arange(NUM_NEWEST_ITEMS, device=item_ids.device)
    shares = torch.pow(0.5, exponents.float()) * (newest_ids > 0)
    is_start = (exponents == 0) & (newest_ids == PAD_TOKEN_ID)
    return newest_ids, shares / shares.sum(1, keepdim=True).clamp(min=1), is_start.float()


def item_occurrences(item_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count how often, and how few items ago, a history has each item.

    Args:
        item_ids: (batch, length) token ids, oldest first, 0 where there is no item.

    Returns:
        The token ids (batch, length) in ascending order; their counts (batch, length) float32; and the numbers of items
        (batch, length) int64 that are newer than the newest occurrence of the item. The values of an item are at its
        first place. The counts are 0 at its other places.
    """
    is_item = item_ids > 0
    ages = is_item.flip(1).cumsum(1).flip(1) - 1
    # Within an item, the newest occurrence comes first. ONNX has no stable sort, so both are sorted as one key.
    keys = (item_ids * MAX_PAIRS + ages.clamp(min=0)).sort(dim=1).values
    item_ids = keys // MAX_PAIRS
    is_first, number = _runs(item_ids)
    counts = torch.zeros(item_ids.shape, device=item_ids.device)
    counts = counts.scatter_add(1, number, torch.ones_like(counts)).gather(1, number)
    return item_ids, counts * (is_first & (item_ids > 0)), keys - item_ids * MAX_PAIRS


def add_to_scores(scores: torch.Tensor, pairs: Pairs, start: int = 0) -> torch.Tensor:
    """Add the values of pairs in place to scores (batch, C) of the token ids `start` to `start + C - 1`.

    The ids of a row are unique, so the sums are the same on every device.
    """
    item_ids, values = pairs
    if not item_ids.shape[1]:
        return scores
    columns = item_ids - start
    is_inside = (columns >= 0) & (columns < scores.shape[1])
    return scores.scatter_add_(1, columns.where(is_inside, 0), values.to(scores.dtype).where(is_inside, 0))


def values_of(pairs: Pairs, item_ids: torch.Tensor) -> torch.Tensor:
    """(batch, C) the values that pairs have for token ids (batch, C), or 0 for an item that is in no pair."""
    paired_ids, values = pairs
    if not paired_ids.shape[1]:
        return torch.zeros(item_ids.shape, device=item_ids.device)
    places = torch.searchsorted(paired_ids, item_ids.contiguous()).clamp(max=paired_ids.shape[1] - 1)
    return values.gather(1, places).where(paired_ids.gather(1, places) == item_ids, 0)


def _items(history_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, length) token ids with 0 in place of special tokens and of positions that are not attended to."""
    is_item = history_ids >= FIRST_ITEM_ID
    if attention_mask is not None and attention_mask.dim() == 2:
        is_item = is_item & (attention_mask != 0)
    return history_ids.where(is_item, 0).long()


def _runs(in_order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows in ascending order: whether a run of equal numbers starts at a place, and the run's number, from 0."""
    is_first = in_order != nn.functional.pad(in_order[:, :-1], (1, 0), value=-1)
    return is_first, is_first.cumsum(1) - 1


def _sum_pairs(item_ids: torch.Tensor, values: torch.Tensor, most: int) -> Pairs:
    """`Pairs` from pairs in any order, in which an item of a row may occur up to `most` times."""
    # The keys are unique, so the values of an item are always summed in the same order. ONNX has no stable sort.
    places = torch.arange(item_ids.shape[1], device=item_ids.device)
    keys = (item_ids.where(values != 0, 0) * MAX_PAIRS + places).sort(dim=1).values
    item_ids = keys // MAX_PAIRS
    values = values.gather(1, keys - item_ids * MAX_PAIRS)
    distance = 1
    while distance < most:  # after each step, a value is the sum of the next 2 * distance values of its run
        is_same = item_ids[:, :-distance] == item_ids[:, distance:]
        values = values + nn.functional.pad(values[:, distance:] * is_same, (0, distance))
        distance *= 2
    is_first, number = _runs(item_ids)
    # The last run goes into the last column, so that the padding comes first.
    columns = number + (item_ids.shape[1] - 1 - number[:, -1:])
    summed = torch.zeros_like(values).scatter_add(1, columns, values * (is_first & (item_ids > 0)))
    return torch.zeros_like(item_ids).scatter(1, columns, item_ids), summed
