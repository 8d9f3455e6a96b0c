# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Item losses: functions of hidden states, item vectors, biases and labels, and (except softmax) sampled negatives."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

IGNORE_INDEX = -100
# Chunk size of the logits, in values: a quarter of a GiB in float32.
MAX_LOGITS_PER_CHUNK = 2**26


def softmax_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    excluded_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy over all items (Sun et al. 2019, equation 8), or over the items that are not excluded.

    Args:
        hidden_states: (N, hidden size) states at the masked positions.
        item_weight: (number of items, hidden size) item vectors, without the special tokens.
        item_bias: (number of items,).
        labels: (N,) row of `item_weight` to predict, or `IGNORE_INDEX` where there is nothing to predict.
        num_items_in_batch: Number of labels that the sum of the losses is divided by: those of all batches of one
            training step. None: those of this batch.
        excluded_ids: (N, E) rows of `item_weight` to exclude from the softmax of each label. The label itself is never
            excluded, and negative numbers have no effect. None: nothing is excluded.
        weights: (N,) numbers that the losses of the labels are multiplied by. None: all are 1.

    Returns:
        A scalar; 0 with zero gradients if there are no labels.
    """
    inputs = (hidden_states, item_weight, item_bias)
    if not torch.is_grad_enabled():  # even then, a view of a parameter has requires_grad
        inputs = (hidden_states.detach(), item_weight.detach(), item_bias.detach())
    needs_gradient = any(tensor.requires_grad for tensor in inputs)
    loss, *_ = _CrossEntropy.apply(*inputs, labels, excluded_ids, weights, needs_gradient)
    return _per_label(loss, labels, num_items_in_batch)


def mask_seen(logits: torch.Tensor, seen_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits without the items that a history shows, which serving never recommends.

    With `config.filter_seen_items`, the softmax loss is the cross-entropy of these logits.

    Args:
        logits: (batch, positions, vocab size).
        seen_ids: (batch, length) token ids; special tokens among them have no effect.
        labels: (batch, positions) token ids, `IGNORE_INDEX` where there is nothing to predict. A label keeps its
            logit, even if the history shows it.

    Returns:
        The logits, -inf for each seen item.
    """
    # [MASK] is never in the softmax, so ids that must not exclude anything are replaced by its id.
    seen_ids = seen_ids.where(seen_ids >= FIRST_ITEM_ID, MASK_TOKEN_ID).unsqueeze(1).expand(*labels.shape, -1)
    is_seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, seen_ids, True)
    return logits.masked_fill(is_seen.scatter(-1, labels.clamp(min=0).unsqueeze(-1), False), -torch.inf)


@torch.no_grad()
def _exclude(logits: torch.Tensor, labels: torch.Tensor, excluded_ids: torch.Tensor | None) -> None:
    """`mask_seen` in place, for a chunk of logits (N, items); the excluded items have no gradient."""
    if excluded_ids is not None:
        index = labels.clamp(min=0).unsqueeze(1)
        of_labels = logits.gather(1, index)
        logits.scatter_(1, torch.where(excluded_ids < 0, index, excluded_ids), -torch.inf)
        logits.scatter_(1, index, of_labels)


class _CrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of all labels.

    The gradient is computed together with the loss, a chunk of labels at a time, so that the logits of all labels are
    never held at once.
    """

    @staticmethod
    def forward(
        hidden_states: torch.Tensor,
        item_weight: torch.Tensor,
        item_bias: torch.Tensor,
        labels: torch.Tensor,
        excluded_ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        """The loss, then the gradients of states, weight and bias if they are needed."""
        inputs = (hidden_states, item_weight, item_bias)
        dtype, precise = item_weight.dtype, torch.promote_types(item_weight.dtype, torch.float32)
        kind = hidden_states.device.type
        # float16 is not used, since its range is too small for sums that are divided later.
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            dtype = torch.bfloat16
        gradients = [torch.zeros_like(tensor, dtype=precise) for tensor in inputs] if needs_gradient else []
        loss = hidden_states.new_zeros((), dtype=precise)
        num_labels = max(1, MAX_LOGITS_PER_CHUNK // len(item_weight))
        with torch.autocast(kind, enabled=False):
            states, weight, bias = (tensor.to(dtype) for tensor in inputs)
            # A constant tuple keeps torch.compile from recompiling for each number of labels, as a range would.
            for start in range(0, len(labels), num_labels) if len(labels) > num_labels else (0,):
                part = slice(start, start + num_labels)
                logits = torch.addmm(bias, states[part], weight.T).to(precise)
                _exclude(logits, labels[part], None if excluded_ids is None else excluded_ids[part])
                counts, index = (labels[part] != IGNORE_INDEX).unsqueeze(1), labels[part].clamp(min=0).unsqueeze(1)
                if weights is not None:
                    counts = counts * weights[part].to(precise).unsqueeze(1)
                largest, of_labels = logits.amax(dim=1, keepdim=True), logits.gather(1, index)
                sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
                # Not in place: the function that torch.compile of torch 2.11 makes of this one would return the loss a
                # second time, and all gradients would be 0.
                loss = loss + ((sums.log() + largest - of_labels) * counts).sum()
                if needs_gradient:
                    probabilities = logits.mul_(counts / sums)
                    probabilities.scatter_add_(1, index, -counts.to(precise))
                    gradients[2] += probabilities.sum(dim=0)
                    probabilities = probabilities.to(dtype)
                    gradients[0][part] = probabilities @ weight
                    gradients[1] += probabilities.T @ states[part]
        return loss, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Save the gradients. `torch.func` needs this as a separate method."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return *(gradient * of_loss for gradient in ctx.saved_tensors), None, None, None, None


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
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy over the label and its negatives (Bengio & Senecal 2008; Jean et al. 2015, section 3).

    The log probabilities correct the scores for the sampling. A negative's score o becomes o - log(K q), so that the
    exponentials of the negatives sum to an unbiased estimate of the full sum. The label counts once, however often it
    was drawn, so its score o becomes o - log p, where p is the probability that the label is among the K draws. (With
    K q instead of p, popular items would get too high scores once K q exceeds 1.) With all items as negatives and
    without log probabilities, this is `softmax_loss`.

    Args:
        hidden_states: (N, hidden size) states at the masked positions.
        item_weight: (number of items, hidden size) item vectors, without the special tokens.
        item_bias: (number of items,).
        labels: (N,) row of `item_weight` to predict, or `IGNORE_INDEX` where there is nothing to predict.
        num_items_in_batch: Number of labels that the sum of the losses is divided by. None: those of this batch.
        negative_ids: (K,) rows of `item_weight` that all positions share, or (N, K) rows for each position. A negative
            does not count where it is the label, or below 0.
        negative_log_probabilities: Log q, in the shape of `negative_ids`, where q is the probability of the negative in
            each of K draws with replacement. None: all items are equally probable, so that the correction cancels.
        positive_log_probabilities: (N,) log p of the labels, with p = 1 - (1 - q)^K. Must be finite also where there is
            nothing to predict.
        excluded_ids: (N, E) rows of `item_weight` that are not negatives of the label; negative numbers have no effect.
            None: all items may be negatives.
        weights: (N,) numbers that the losses of the labels are multiplied by. None: all are 1.

    Returns:
        A scalar. A position without a negative adds 0.

    Raises:
        ValueError: If `negative_ids` has another shape, or only one of the two log probabilities is given.
    """
    positive, negative, is_negative = _scores(hidden_states, item_weight, item_bias, labels, negative_ids, excluded_ids)
    if negative_log_probabilities is not None and positive_log_probabilities is not None:
        positive = positive - positive_log_probabilities
        negative = negative - negative_log_probabilities - math.log(max(negative_ids.shape[-1], 1))
    elif negative_log_probabilities is not None or positive_log_probabilities is not None:
        given = "negative" if negative_log_probabilities is not None else "positive"
        raise ValueError(
            "expected both negative_log_probabilities and positive_log_probabilities, or neither; got only "
            f"{given}_log_probabilities"
        )
    scores = torch.cat((positive.unsqueeze(1), negative.masked_fill(~is_negative, -torch.inf)), dim=1)
    losses = scores.logsumexp(dim=1) - positive
    return _total(losses, labels, is_negative, num_items_in_batch, weights)


def bpr_loss(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    negative_ids: torch.Tensor,
    excluded_ids: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bayesian personalized ranking (Rendle et al. 2009): the mean of -log sigmoid(s+ - s-) over the negatives.

    Args:
        hidden_states: (N, hidden size) states at the masked positions.
        item_weight: (number of items, hidden size) item vectors, without the special tokens.
        item_bias: (number of items,).
        labels: (N,) row of `item_weight` to predict, or `IGNORE_INDEX` where there is nothing to predict.
        num_items_in_batch: Number of labels that the sum of the losses is divided by. None: those of this batch.
        negative_ids: (K,) rows of `item_weight` that all positions share, or (N, K) rows for each position. A negative
            does not count where it is the label, or below 0.
        excluded_ids: (N, E) rows of `item_weight` that are not negatives of the label; negative numbers have no effect.
            None: all items may be negatives.
        weights: (N,) numbers that the losses of the labels are multiplied by. None: all are 1.

    Returns:
        A scalar. A position without a negative adds 0.

    Raises:
        ValueError: If `negative_ids` has another shape.
    """
    positive, negative, is_negative = _scores(hidden_states, item_weight, item_bias, labels, negative_ids, excluded_ids)
    losses = -nn.functional.logsigmoid(positive.unsqueeze(1) - negative).masked_fill(~is_negative, 0)
    losses = losses.sum(dim=1) / is_negative.sum(dim=1).clamp(min=1)
    return _total(losses, labels, is_negative, num_items_in_batch, weights)


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
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generalised binary cross-entropy (Petrov & Macdonald, RecSys 2023), which reduces overconfidence.

    The loss is -(beta log sigmoid(s+) + sum of log(1 - sigmoid(s-))) / (K + 1). Here K is the number of the position's
    negatives, alpha = K / (number of items - 1), and beta = alpha (t (1 - 1 / alpha) + 1 / alpha) = 1 - t (1 - alpha).

    Args:
        hidden_states: (N, hidden size) states at the masked positions.
        item_weight: (number of items, hidden size) item vectors, without the special tokens.
        item_bias: (number of items,).
        labels: (N,) row of `item_weight` to predict, or `IGNORE_INDEX` where there is nothing to predict.
        num_items_in_batch: Number of labels that the sum of the losses is divided by. None: those of this batch.
        negative_ids: (K,) rows of `item_weight` that all positions share, or (N, K) rows for each position. A negative
            does not count where it is the label, or below 0.
        calibration: The parameter t, from 0 to 1. At 0 the loss is the binary cross-entropy. At 1 the scores tend to
            those of training with all items as negatives.
        excluded_ids: (N, E) rows of `item_weight` that are not negatives of the label; negative numbers have no effect.
            None: all items may be negatives.
        weights: (N,) numbers that the losses of the labels are multiplied by. None: all are 1.

    Returns:
        A scalar. A position without a negative adds 0.

    Raises:
        ValueError: If `negative_ids` has another shape.
    """
    positive, negative, is_negative = _scores(hidden_states, item_weight, item_bias, labels, negative_ids, excluded_ids)
    num_negatives = is_negative.sum(dim=1).to(positive.dtype)
    alpha = (num_negatives / max(len(item_weight) - 1, 1)).clamp(max=1)  # above 1 where an item was drawn twice
    of_positive = (1 - calibration * (1 - alpha)) * nn.functional.logsigmoid(positive)
    of_negatives = nn.functional.logsigmoid(-negative).masked_fill(~is_negative, 0).sum(dim=1)
    losses = -(of_positive + of_negatives) / (num_negatives + 1)
    return _total(losses, labels, is_negative, num_items_in_batch, weights)


def _scores(
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    negative_ids: torch.Tensor,
    excluded_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scores of the labels (N,), the scores of the negatives (N, K), and whether each negative counts (N, K)."""
    if negative_ids.dim() == 0 or negative_ids.shape[:-1] not in ((), labels.shape):
        raise ValueError(
            f"negative_ids must have shape (K,) or ({len(labels)}, K), a row for each label; got "
            f"{tuple(negative_ids.shape)}"
        )
    # Labels and negatives are looked up together, since the gradient of each look-up is as large as the table.
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
    """(N, K) whether each of the ids (K,) or (N, K) is among the others (N, E) of its row.

    The result is computed by binary search, without an intermediate tensor (N, K, E).
    """
    num_ids = ids.shape[-1]
    in_order = ids.sort(dim=-1).values
    # searchsorted gives a repeated id the place of its first occurrence.
    places = torch.searchsorted(in_order, ids.contiguous()).expand(len(others), -1)
    places_of_others = torch.searchsorted(in_order, others.contiguous()).clamp(max=num_ids - 1)
    found = in_order.expand(len(others), -1).gather(1, places_of_others) == others
    is_found = torch.zeros(len(others), num_ids + 1, dtype=torch.bool, device=ids.device)
    is_found.scatter_(1, torch.where(found, places_of_others, num_ids), True)
    return is_found.gather(1, places)


def _in_single_precision(scores: torch.Tensor) -> torch.Tensor:
    """The scores in float32 if they are in half precision, else unchanged."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _total(
    losses: torch.Tensor,
    labels: torch.Tensor,
    is_negative: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The sum of the losses (N,) of positions with a label and a negative, divided by the number of labels."""
    counts = (labels != IGNORE_INDEX) & is_negative.any(dim=1)
    if weights is not None:
        losses = losses * weights
    return _per_label(losses.masked_fill(~counts, 0).sum(), labels, num_items_in_batch)


def _per_label(loss: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """A sum of losses divided by the number of labels, which `num_items_in_batch` gives or `labels` have."""
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        return loss / num_items_in_batch.to(loss.device).clamp(min=1)
    return loss / max(num_items_in_batch, 1)


def item_loss(
    name: str,
    hidden_states: torch.Tensor,
    item_weight: torch.Tensor,
    item_bias: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    seen_ids: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    negative_log_probabilities: torch.Tensor | None = None,
    positive_log_probabilities: torch.Tensor | None = None,
    calibration: float = 0.75,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the item loss with a given name. Unlike the losses themselves, it takes token ids instead of rows.

    Args:
        name: "softmax", "sampled_softmax", "bpr" or "gbce".
        hidden_states: (..., hidden size) states at the labels.
        item_weight: (number of items, hidden size) item vectors. Row i belongs to token id i + 3.
        item_bias: (number of items,).
        labels: (...) token ids. At special tokens and `IGNORE_INDEX` there is nothing to predict.
        num_items_in_batch: Number of labels that the sum of the losses is divided by. None: those of this batch.
        seen_ids: (..., length) token ids that are excluded from a label's softmax or negatives. None: none.
        negative_ids: (K,) or (..., K) token ids of the negatives; special tokens do not count.
        negative_log_probabilities: For "sampled_softmax": log probabilities in the shape of `negative_ids`.
        positive_log_probabilities: For "sampled_softmax": log probabilities in the shape of `labels`.
        calibration: For "gbce": the parameter t of `gbce_loss`.
        weights: (...) numbers that the losses of the labels are multiplied by. The sum of the losses is still divided
            by the number of labels. None: all are 1.

    Returns:
        A scalar.

    Raises:
        ValueError: If a loss other than "softmax" gets no `negative_ids`, or they have another shape.
    """
    options: dict[str, Any] = {}
    if seen_ids is not None:
        options["excluded_ids"] = _rows(seen_ids) - FIRST_ITEM_ID
    if name != "softmax":
        if negative_ids is None:
            raise ValueError(
                f"item_loss {name!r} needs negative_ids: give num_negatives to DataCollatorForMaskedItemPrediction"
            )
        options["negative_ids"] = _rows(negative_ids) - FIRST_ITEM_ID
    if weights is not None:
        options["weights"] = weights.flatten()
    if name == "gbce":
        options["calibration"] = calibration
    if name == "sampled_softmax" and negative_log_probabilities is not None:
        options["negative_log_probabilities"] = _rows(negative_log_probabilities)
    if name == "sampled_softmax" and positive_log_probabilities is not None:
        options["positive_log_probabilities"] = positive_log_probabilities.flatten()
    labels = torch.where(labels < FIRST_ITEM_ID, IGNORE_INDEX, labels - FIRST_ITEM_ID).flatten()
    return ITEM_LOSSES[name](
        hidden_states.flatten(0, -2), item_weight, item_bias, labels, num_items_in_batch, **options
    )


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Flatten all dimensions but the last, (batch, P, K) to (batch * P, K). A single dimension (K,) stays."""
    return values if values.dim() == 1 else values.flatten(0, -2)


ITEM_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "softmax": softmax_loss,
    "sampled_softmax": sampled_softmax_loss,
    "bpr": bpr_loss,
    "gbce": gbce_loss,
}
