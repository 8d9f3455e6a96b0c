# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""What was counted in the log and is added to the network's scores: successors of the newest items, and repeats."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from .configuration_bert4rec import FIRST_ITEM_ID, Bert4RecConfig

# Number of newest items whose successors are scored. Each counts half as much as the one after it, so that the items
# before these would have less than half a percent.
NUM_NEWEST_ITEMS = 8


class HistoryScores(nn.Module):
    """Scores that a history adds to some items, beside the network's.

    With `config.num_transitions`, K: `successor_ids` (vocab size, K), the token ids of items that follow an item, each
    once and padded with 0, and `successor_scores`, what they add to their scores. They are buffers, which are never
    sharded, and may be read anywhere. With `config.repeat_weight`, w: an item that the history has n times scores
    w ln(1 + n) more.

    What a position needs to know of its history travels behind its hidden state, as float32 numbers (`encode`).
    """

    successor_ids: torch.Tensor | None
    successor_scores: torch.Tensor

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.repeat_weight = config.repeat_weight
        shape = config.vocab_size, config.num_transitions
        self.register_buffer("successor_ids", torch.zeros(shape, dtype=torch.int) if config.num_transitions else None)
        self.register_buffer("successor_scores", torch.zeros(shape) if config.num_transitions else None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is added to the network's scores."""
        return self.successor_ids is None and not self.repeat_weight

    def resize(self, vocab_size: int) -> None:
        """Make room for new items, which have no successors."""
        if self.successor_ids is not None:
            added = 0, 0, 0, vocab_size - len(self.successor_ids)
            self.successor_ids = nn.functional.pad(self.successor_ids, added)
            self.successor_scores = nn.functional.pad(self.successor_scores, added)

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, P, width): `newest_items` for successors, then `item_counts` for repeats.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 for items that do not count. None: all count.
            positions: (batch, P), each with the items before it as its history. None: all positions.
        """
        found = []
        if self.successor_ids is not None:
            found.append(newest_items(input_ids, attention_mask, positions))
        if self.repeat_weight:
            found.append(item_counts(input_ids, attention_mask, positions))
        return torch.cat(found, dim=2)

    def pairs(self, encoded: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids (batch, P, K), each once in a pair of tensors, and what is added to their scores."""
        if self.successor_ids is not None:
            newest, encoded = encoded[..., : 2 * NUM_NEWEST_ITEMS], encoded[..., 2 * NUM_NEWEST_ITEMS :]
            item_ids, weights = newest[..., :NUM_NEWEST_ITEMS].long(), newest[..., NUM_NEWEST_ITEMS:]
            for item in range(NUM_NEWEST_ITEMS):
                yield (
                    self.successor_ids[item_ids[..., item]].long(),
                    self.successor_scores[item_ids[..., item]] * weights[..., item].unsqueeze(-1),
                )
        if self.repeat_weight:
            item_ids, counts = encoded.unflatten(-1, (2, -1)).unbind(-2)  # an export would fix the length for chunk
            yield item_ids.long(), self.repeat_weight * counts.log1p()

    def item_ids(self, encoded: torch.Tensor) -> torch.Tensor:
        """(batch, P, K) token ids, some twice, whose scores a history adds to."""
        return torch.cat([item_ids for item_ids, _ in self.pairs(encoded)], dim=-1)

    def add_to(self, scores: torch.Tensor, encoded: torch.Tensor, start: int) -> torch.Tensor:
        """Add to scores (batch, P, C) of the token ids from `start` on, in place."""
        # One pair after the other: each has an item once, so that sums are the same on every device.
        for item_ids, values in self.pairs(encoded):
            columns = item_ids - start
            inside = (columns >= 0) & (columns < scores.shape[-1])
            scores.scatter_add_(-1, columns.where(inside, 0), values.to(scores.dtype).where(inside, 0))
        return scores


def newest_items(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    """The items before some positions or all, whose successors are scored there.

    Args:
        input_ids, attention_mask, positions: As in `HistoryScores.encode`.

    Returns:
        (batch, P, 2 `NUM_NEWEST_ITEMS`): token ids, then their weights, of sum 1; 0 where there are no more items. If
        there are none at all, [PAD] has the weight 1: its successors are what a history begins with.
    """
    is_item = _is_item(input_ids, attention_mask)
    # Padded in front, so that each position has enough places before it.
    input_ids = nn.functional.pad(input_ids, (NUM_NEWEST_ITEMS, 0))
    is_item = nn.functional.pad(is_item, (NUM_NEWEST_ITEMS, 0)).unsqueeze(1)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = places[NUM_NEWEST_ITEMS:].unsqueeze(0) if positions is None else positions + NUM_NEWEST_ITEMS
    distances = positions.unsqueeze(2) - places
    nearness = (-distances).float().masked_fill(~is_item | (distances <= 0), -torch.inf)
    nearness, found = nearness.topk(NUM_NEWEST_ITEMS, dim=2)
    weights = (math.log(2) * nearness).softmax(dim=2).nan_to_num(0)  # none where there is no item
    nothing = nn.functional.one_hot(torch.zeros_like(found[..., 0]), NUM_NEWEST_ITEMS).to(weights)
    weights = weights + nothing * (nearness[..., :1] == -torch.inf)
    item_ids = input_ids.unsqueeze(1).expand(-1, found.shape[1], -1).gather(2, found)
    return torch.cat((item_ids.where(nearness > -torch.inf, 0).float(), weights), dim=2)


def item_counts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    """How often each item of a history stands before some positions or all.

    Args:
        input_ids, attention_mask, positions: As in `HistoryScores.encode`.

    Returns:
        (batch, P, 2 length): the token ids, then their counts. An item that is there more than once has its count in
        its first place, and 0 in the others.
    """
    is_item = _is_item(input_ids, attention_mask)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    positions = places.unsqueeze(0) if positions is None else positions
    same = (input_ids.unsqueeze(2) == input_ids.unsqueeze(1)) & is_item.unsqueeze(2) & is_item.unsqueeze(1)
    is_first = is_item & ~(same & (places < places.unsqueeze(1))).any(dim=2)
    # Of each item, how often it stands before each place; not a product, which autocast would round.
    before = nn.functional.pad(same.cumsum(dim=2, dtype=torch.int), (1, 0))
    counts = before.gather(2, positions.unsqueeze(1).expand(*input_ids.shape, -1)).mT * is_first.unsqueeze(1)
    return torch.cat((input_ids.unsqueeze(1).expand_as(counts), counts), dim=2).float()


def _is_item(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, length), of what is attended to."""
    is_item = input_ids >= FIRST_ITEM_ID
    if attention_mask is not None and attention_mask.dim() == 2:
        is_item = is_item & (attention_mask != 0)
    return is_item
