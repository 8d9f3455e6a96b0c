# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Item losses: plain functions of hidden states, item table and labels."""

import torch
from torch import nn

IGNORE_INDEX = -100


def softmax_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy over all items (Sun et al. 2019, equation 8).

    Args:
        hidden_states: (N, hidden size), what stands at the masked positions.
        item_weight: (number of items, hidden size), without the special tokens.
        item_bias: (number of items,).
        labels: (N,) row of `item_weight` to predict; `IGNORE_INDEX` where there is nothing to predict.
        num_items_in_batch: What the sum is divided by: the labels of all batches that make one step. None: the
            labels of this batch.

    Returns:
        A scalar; 0 with zero gradients if no label counts.
    """
    logits = nn.functional.linear(hidden_states, item_weight, item_bias).float()
    loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        return loss / num_items_in_batch.to(loss.device).clamp(min=1)
    return loss / max(num_items_in_batch, 1)


ITEM_LOSSES = {"softmax": softmax_loss}
