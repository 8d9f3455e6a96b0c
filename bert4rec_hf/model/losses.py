# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Item losses: plain functions of hidden states, item table, labels and, for all but the softmax, sampled negatives."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
# Logits are computed in chunks of this many values, a quarter of a GiB.
MAX_LOGITS_PER_CHUNK = 2**26


def softmax_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    excluded_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy over all items (Sun et al. 2019, equation 8), or all that may be recommended.

    Args:
        hidden_states: (N, hidden size), what stands at the masked positions.
        item_weight: (number of items, hidden size), without the special tokens.
        item_bias: (number of items,).
        labels: (N,) row of `item_weight` to predict; `IGNORE_INDEX` where there is nothing to predict.
        num_items_in_batch: What the sum is divided by: the labels of all batches that make one step. None: the
            labels of this batch.
        excluded_ids: (N, E) rows of `item_weight` that are left out of a label's sum, unless they are the label; below
            0 none. None: all items count.

    Returns:
        A scalar; 0 with zero gradients if no label counts.
    """
    inputs = (hidden_states, item_weight, item_bias)
    if not torch.is_grad_enabled():  # a view of a parameter asks for its gradient all the same
        inputs = (hidden_states.detach(), item_weight.detach(), item_bias.detach())
    loss = _CrossEntropy.apply(*inputs, labels, excluded_ids)
    return _per_label(loss, labels, num_items_in_batch)


@torch.no_grad()
def _exclude(logits: torch.Tensor, labels: torch.Tensor, excluded_ids: torch.Tensor | None) -> None:
    """Take items out of the softmax, in place; they have no gradient then, of which nothing needs to be recorded."""
    if excluded_ids is not None:
        index = labels.clamp(min=0).unsqueeze(1)
        of_labels = logits.gather(1, index)
        logits.scatter_(1, torch.where(excluded_ids < 0, index, excluded_ids), -torch.inf)
        logits.scatter_(1, index, of_labels)


class _CrossEntropy(torch.autograd.Function):
    """The sum over labels, of some at a time: their gradient is made along with their loss, the logits forgotten."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        item_weight: torch.Tensor,
        item_bias: torch.Tensor,
        labels: torch.Tensor,
        excluded_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs = (hidden_states, item_weight, item_bias)
        dtype, precise = item_weight.dtype, torch.promote_types(item_weight.dtype, torch.float32)
        kind = hidden_states.device.type
        # float16 has no range for sums that are divided later.
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            dtype = torch.bfloat16
        needs_gradient = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(tensor, dtype=precise) for tensor in inputs] if needs_gradient else []
        loss = hidden_states.new_zeros((), dtype=precise)
        num_labels = max(1, MAX_LOGITS_PER_CHUNK // len(item_weight))
        with torch.autocast(kind, enabled=False):
            states, weight, bias = (tensor.to(dtype) for tensor in inputs)
            # With a range alone torch.compile would compile anew for each number of labels.
            for start in range(0, len(labels), num_labels) if len(labels) > num_labels else (0,):
                part = slice(start, start + num_labels)
                logits = torch.addmm(bias, states[part], weight.T).to(precise)
                _exclude(logits, labels[part], None if excluded_ids is None else excluded_ids[part])
                counts, index = (labels[part] != IGNORE_INDEX).unsqueeze(1), labels[part].clamp(min=0).unsqueeze(1)
                largest, of_labels = logits.amax(dim=1, keepdim=True), logits.gather(1, index)
                sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
                loss += ((sums.log() + largest - of_labels) * counts).sum()
                if needs_gradient:
                    probabilities = logits.mul_(counts / sums)
                    probabilities.scatter_add_(1, index, -counts.to(precise))
                    gradients[2] += probabilities.sum(dim=0)
                    probabilities = probabilities.to(dtype)
                    gradients[0][part] = probabilities @ weight
                    gradients[1] += probabilities.T @ states[part]
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(gradient * of_loss for gradient in ctx.saved_tensors), None, None


def sampled_softmax_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    negative_ids: torch.Tensor,
    negative_log_probabilities: torch.Tensor | None = None,
    positive_log_probabilities: torch.Tensor | None = None,
    excluded_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy over the label and its negatives (Bengio & Senecal 2008; Jean et al. 2015, section 3).

    With the log probabilities, a negative's score o is o - log(K q), whose exponentials sum to an unbiased estimate of
    the full sum; and a label's, which is there once however often it was drawn, o - log p, where p is the
    probability to be among the K draws. (With K q for labels too, popular items get too high scores once K q is
    above 1.) With all items as negatives, and no log probabilities, this is `softmax_loss`.

    Args:
        hidden_states, item_weight, item_bias, labels, num_items_in_batch: As in `softmax_loss`.
        negative_ids: (K,) rows of `item_weight` that all positions share, or (N, K), each position its own. Not
            counted where it is the position's label, or below 0.
        negative_log_probabilities: Shaped like `negative_ids`: log q, where q is the probability of the negative in
            each of K draws with replacement. None: all items are drawn alike, which cancels.
        positive_log_probabilities: (N,), log p of the labels, 1 - (1 - q)^K; finite also where nothing is to predict.
        excluded_ids: (N, E) rows of `item_weight` that are no negatives of a label's; below 0 none. None: all may be.

    Returns:
        A scalar; a position without a negative adds 0.

    Raises:
        ValueError: If `negative_ids` has another shape, or one of the log probabilities comes without the other.
    """
    positive, negative, is_negative = _scores(hidden_states, item_weight, item_bias, labels, negative_ids, excluded_ids)
    if negative_log_probabilities is not None and positive_log_probabilities is not None:
        positive = positive - positive_log_probabilities
        negative = negative - negative_log_probabilities - math.log(max(negative_ids.shape[-1], 1))
    elif negative_log_probabilities is not None or positive_log_probabilities is not None:
        raise ValueError("expected both negative_log_probabilities and positive_log_probabilities, or neither")
    scores = torch.cat((positive.unsqueeze(1), negative.masked_fill(~is_negative, -torch.inf)), dim=1)
    return _total(scores.logsumexp(dim=1) - positive, labels, is_negative, num_items_in_batch)


def bpr_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    negative_ids: torch.Tensor,
    excluded_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bayesian personalized ranking (Rendle et al. 2009): -log sigmoid(s+ - s-), the mean over the negatives.

    Args, Returns, Raises: As in `sampled_softmax_loss`.
    """
    positive, negative, is_negative = _scores(hidden_states, item_weight, item_bias, labels, negative_ids, excluded_ids)
    losses = -nn.functional.logsigmoid(positive.unsqueeze(1) - negative).masked_fill(~is_negative, 0)
    losses = losses.sum(dim=1) / is_negative.sum(dim=1).clamp(min=1)
    return _total(losses, labels, is_negative, num_items_in_batch)


def gbce_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    negative_ids: torch.Tensor,
    calibration: float = 0.75,
    excluded_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generalised binary cross-entropy (Petrov & Macdonald, RecSys 2023), against overconfidence.

    -(beta log sigmoid(s+) + sum of log(1 - sigmoid(s-))) / (K + 1), with beta = alpha (t (1 - 1 / alpha) + 1 / alpha)
    = 1 - t (1 - alpha) and alpha = K / (number of items - 1), where K is the number of the position's negatives.

    Args:
        calibration: t, from 0, binary cross-entropy, to 1, where scores tend to those of all items as negatives.

    Other Args, Returns, Raises: As in `sampled_softmax_loss`.
    """
    positive, negative, is_negative = _scores(hidden_states, item_weight, item_bias, labels, negative_ids, excluded_ids)
    num_negatives = is_negative.sum(dim=1).to(positive.dtype)
    alpha = (num_negatives / max(len(item_weight) - 1, 1)).clamp(max=1)  # above 1 where an item was drawn twice
    of_positive = (1 - calibration * (1 - alpha)) * nn.functional.logsigmoid(positive)
    of_negatives = nn.functional.logsigmoid(-negative).masked_fill(~is_negative, 0).sum(dim=1)
    losses = -(of_positive + of_negatives) / (num_negatives + 1)
    return _total(losses, labels, is_negative, num_items_in_batch)


def _scores(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    negative_ids: torch.Tensor,
    excluded_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of the labels (N,) and of the negatives (N, K), and which of these count (N, K)."""
    if negative_ids.dim() == 0 or negative_ids.shape[:-1] not in ((), labels.shape):
        raise ValueError(
            f"negative_ids must have shape (K,) or ({len(labels)}, K), a row for each label; got "
            f"{tuple(negative_ids.shape)}"
        )
    # Looked up at once: each look-up has a gradient as large as the table.
    ids = torch.cat((labels, negative_ids.flatten())).clamp(min=0)
    weight, bias = nn.functional.embedding(ids, item_weight), item_bias[ids]
    positive_weight, negative_weight = weight[: len(labels)], weight[len(labels) :]
    positive_bias, negative_bias = bias[: len(labels)], bias[len(labels) :]
    products = _in_single_precision(hidden_states) * _in_single_precision(positive_weight)
    positive = products.sum(dim=1) + positive_bias
    if negative_ids.dim() == 1:
        negative = nn.functional.linear(hidden_states, negative_weight, negative_bias)
    else:
        negative_weight = negative_weight.view(*negative_ids.shape, item_weight.shape[1])
        negative = torch.einsum("nh,nkh->nk", hidden_states, negative_weight) + negative_bias.view_as(negative_ids)
    is_negative = (negative_ids >= 0) & (negative_ids != labels.unsqueeze(1))
    if excluded_ids is not None and excluded_ids.shape[1] and negative_ids.shape[-1]:
        is_negative &= ~_are_among(negative_ids, excluded_ids)
    return positive, _in_single_precision(negative), is_negative


def _are_among(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Whether ids (K,) or (N, K) are among their row's others (N, E): (N, K), without an (N, K, E) on the way."""
    num_ids = ids.shape[-1]
    in_order = ids.sort(dim=-1).values
    # An id that is there twice is where it stands first.
    places = torch.searchsorted(in_order, ids.contiguous()).expand(len(others), -1)
    places_of_others = torch.searchsorted(in_order, others.contiguous()).clamp(max=num_ids - 1)
    found = in_order.expand(len(others), -1).gather(1, places_of_others) == others
    is_found = torch.zeros(len(others), num_ids + 1, dtype=torch.bool, device=ids.device)
    is_found.scatter_(1, torch.where(found, places_of_others, num_ids), True)
    return is_found.gather(1, places)


def _in_single_precision(scores: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; the others as they are."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _total(
    losses: torch.Tensor,
    labels: torch.Tensor,
    is_negative: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """The sum of the losses (N,) of positions that have a label and a negative, divided."""
    counts = (labels != IGNORE_INDEX) & is_negative.any(dim=1)
    return _per_label(losses.masked_fill(~counts, 0).sum(), labels, num_items_in_batch)


def _per_label(loss: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """A sum of losses, divided by the number of labels."""
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        return loss / num_items_in_batch.to(loss.device).clamp(min=1)
    return loss / max(num_items_in_batch, 1)


ITEM_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": softmax_loss,
    "sampled_softmax": sampled_softmax_loss,
    "bpr": bpr_loss,
    "gbce": gbce_loss,
}
