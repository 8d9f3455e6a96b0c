# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""The Transformer layers: rotary positions, attention and feed-forward networks."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_bert4rec import Bert4RecConfig


class Bert4RecDropout(nn.Dropout):
    """`nn.Dropout` that uses 16 random bits per element on a CPU, which takes half the time."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        threshold = round(self.p * 2**16)
        if not self.training or not is_eager_on_cpu(hidden_states) or not 0 < threshold < 2**16:
            return super().forward(hidden_states)
        bits = torch.empty(-(-hidden_states.numel() // 4), dtype=torch.long).random_(-(2**63), None)
        numbers = bits.view(torch.int16)[: hidden_states.numel()].view(hidden_states.shape)
        kept = (numbers >= threshold - 2**15).to(hidden_states.dtype)
        return hidden_states * kept.mul_(2**16 / (2**16 - threshold))


class Bert4RecRotaryEmbedding(nn.Module):
    """Cosines and sines of positions times frequencies (Su et al. 2021).

    The frequencies, from 1 down to nearly 1 / rope_theta, are not a buffer, since half precision would round them.
    """

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.width, self.rope_theta = config.hidden_size // config.num_attention_heads, config.rope_theta

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (batch, length) to cosines and sines for `rotate`, each (batch, 1, length, head width)."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float, device=position_ids.device) / self.width
        angles = position_ids[:, None, :, None].float() * self.rope_theta**-exponents
        cosines, sines = angles.cos(), angles.sin()
        return torch.cat((cosines, cosines), dim=-1).to(dtype), torch.cat((-sines, sines), dim=-1).to(dtype)


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + width / 2) of the last dimension by the angle of its position.

    The sines of the first half are expected to be negated.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(states * cosines, torch.cat((second, first), dim=-1), sines)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class Bert4RecAttention(nn.Module):
    """Multi-head attention (equations 1 and 2)."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_states = hidden_states
        if query_positions is not None:
            query_states = gather_positions(hidden_states, query_positions)
            if attention_mask is not None and attention_mask.shape[2] > 1:
                attention_mask = gather_positions(attention_mask, query_positions)
        query, key, value = (
            layer(states).view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for layer, states in ((self.query, query_states), (self.key, hidden_states), (self.value, hidden_states))
        )
        if rotary is not None:
            cosines, sines = rotary
            key = rotate(key, cosines, sines)
            if query_positions is not None:
                cosines, sines = gather_positions(cosines, query_positions), gather_positions(sines, query_positions)
            query = rotate(query, cosines, sines)
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # On a CPU, attention is slower in half precision than in float32, and its backward pass is much slower.
            query, key, value = query.float(), key.float(), value.float()
            autocast = torch.autocast("cpu", enabled=False)
        else:
            # With autocast, the rotary positions are float32, while flex attention takes inputs of one dtype only.
            query, key = query.to(value.dtype), key.to(value.dtype)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dtype.is_floating_point:  # flex has a BlockMask
            attention_mask = attention_mask.to(query.dtype)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        with autocast:
            context, weights = attention(
                self,
                query,
                key,
                value,
                attention_mask,
                scaling=self.head_dim**-0.5,
                dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            )
        return self.output(context.flatten(-2)), weights


class Bert4RecFeedForward(nn.Module):
    """Position-wise feed-forward network (equation 3), or its gated variant (Shazeer 2020)."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.inner = nn.Linear(config.hidden_size, config.intermediate_size)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size) if config.gated_feed_forward else None
        self.activation = ACT2FN[config.hidden_act]
        self.outer = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate is not None:
            return self.outer(self.activation(self.gate(hidden_states)) * self.inner(hidden_states))
        return self.outer(self.activation(self.inner(hidden_states)))


class Bert4RecFilter(nn.Module):
    """A causal form of the filter of BSARec (Shin et al., AAAI 2024, equations 5 to 8).

    Of the states of the items before a token, n is the newest, and a is an average in which the newest weighs 1/2, and
    each other one half as much as the next. The filter is a + w² (n - a), with a learned w for each dimension. So a
    dimension follows either what a user did for a while (w near 0) or what changed last (a large w). BSARec takes a
    Fourier transform in place of the average, which sees later items.
    """

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, index_of_place: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """The filter at some positions.

        Args:
            hidden_states: (batch, length, hidden size).
            index_of_place: (batch, places) where in `hidden_states` the first, second, … item is; -1 for no item.
            position_ids: (batch, P) numbers of the items before each position.

        Returns:
            (batch, P, hidden size), 0 where no item comes before.
        """
        newest = gather_positions(hidden_states, index_of_place.clamp(min=0)) * (index_of_place >= 0).unsqueeze(-1)
        places = torch.arange(newest.shape[1], device=newest.device)
        distances = places[:, None] - places
        shares = torch.where(distances >= 0, 0.5 ** (distances + 1), 0.0)
        average = torch.matmul(shares.to(newest.dtype), newest)
        filtered = torch.lerp(average, newest.to(average.dtype), (self.weight**2).to(average.dtype))
        has_items = (position_ids > 0).unsqueeze(-1)
        return gather_positions(filtered, (position_ids - 1).clamp(min=0)) * has_items


class Bert4RecLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual connection, dropout and a LayerNorm (equations 4 to 6).

    With `config.filter_share`, that share of the attention is `Bert4RecFilter`.
    """

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.pre_normalization = config.normalization == "pre"
        self.filter_share = config.filter_share
        self.attention = Bert4RecAttention(config)
        if config.filter_share:
            self.filter = Bert4RecFilter(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = Bert4RecFeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Bert4RecDropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        query_positions: torch.Tensor | None = None,
        places: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        normed = self.attention_norm(hidden_states) if self.pre_normalization else hidden_states
        attended, _ = self.attention(normed, attention_mask, rotary, query_positions)
        if places is not None:
            index_of_place, position_ids = places
            if query_positions is not None:
                position_ids = position_ids.gather(1, query_positions)
            filtered = self.filter(normed, index_of_place, position_ids)
            attended = (1 - self.filter_share) * attended + self.filter_share * filtered
        if query_positions is not None:
            hidden_states = gather_positions(hidden_states, query_positions)
        hidden_states = hidden_states + self.dropout(attended)
        if self.pre_normalization:
            return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states)
        return self.feed_forward_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))


def gather_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Select positions (batch, P) of states (batch, …, length, d): (batch, …, P, d)."""
    if states.dim() == 4:
        positions = positions.unsqueeze(1).expand(-1, states.shape[1], -1)
    return states.gather(-2, positions.unsqueeze(-1).expand(*positions.shape, states.shape[-1]))


def is_eager_on_cpu(states: torch.Tensor) -> bool:
    """Whether shapes may depend on values. On a device they would wait for it, and they break compiled graphs."""
    return states.device.type == "cpu" and not torch.compiler.is_compiling()
