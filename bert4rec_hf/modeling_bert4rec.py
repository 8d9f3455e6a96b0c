# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""BERT4Rec (Sun et al., CIKM 2019): tensors in, tensors out; top-k and ranks over the catalogue."""

import contextlib
import filecmp
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID, Bert4RecConfig
from .losses import IGNORE_INDEX, ITEM_LOSSES

# Special tokens are no items: this logit takes them out of the softmax, and is finite in half precision.
SPECIAL_TOKEN_LOGIT = -1e4
# So many items are scored at once in `recommend` and `rank`; of candidates of each history's own, so many numbers of
# their vectors are there at once, a quarter of a GiB.
ITEMS_PER_CHUNK = 2**16
FLOATS_AT_ONCE = 2**26
# Of a history, whose transitions are added to the scores.
NEWEST_ITEMS = 8
# What stands beside config and weights in a model folder: the catalogue, and what is true of these weights only.
CATALOGUE_FILES = ("tokenizer.json", "tokenizer_config.json", "items.json")
RECORD_FILES = (
    "README.md", "evaluation.json", "training.json", "learning_curve.png", "recipe.yaml", "preparation.json",
)  # fmt: skip
# Where a card's snippet names the model.
SNIPPET_MODEL = re.compile(r'model="(.+?)"')


@dataclass
class MaskedItemPredictionOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, returned with `labels`):
            The item loss in training, the full softmax in evaluation.
        logits (`torch.FloatTensor` of shape `(batch_size, positions, vocab_size)`):
            Scores of the items, or of `item_ids` only; None while training with labels.
        prediction_states (`torch.FloatTensor` of shape `(batch_size, positions, width)`):
            What the item table is multiplied with, hidden size wide, and with `config.num_transitions` or
            `config.repeat_weight` what the items before the position add, see `Bert4RecDecoder.of_history`; None while
            training with labels.
        hidden_states, attentions (`tuple(torch.FloatTensor)`):
            With `output_hidden_states=True`, `output_attentions=True`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prediction_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Bert4RecDropout(nn.Dropout):
    """`nn.Dropout`, on a CPU with 16 random bits an element, which takes half the time."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        threshold = round(self.p * 2**16)
        if not self.training or not _is_eager_on_cpu(hidden_states) or not 0 < threshold < 2**16:
            return super().forward(hidden_states)
        bits = torch.empty(-(-hidden_states.numel() // 4), dtype=torch.long).random_(-(2**63), None)
        numbers = bits.view(torch.int16)[: hidden_states.numel()].view(hidden_states.shape)
        kept = (numbers >= threshold - 2**15).to(hidden_states.dtype)
        return hidden_states * kept.mul_(2**16 / (2**16 - threshold))


class Bert4RecEmbeddings(nn.Module):
    """Item embeddings, with learned positions if the config asks for them."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.config = config
        self.item_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=PAD_TOKEN_ID)
        if config.position_embedding_type != "rotary":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.normalization == "post"
            else nn.Identity()
        )
        self.dropout = Bert4RecDropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        hidden_states = self.item_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.position_embedding_type != "rotary":
            hidden_states = hidden_states + self.position_embeddings(position_ids)
        return self.dropout(self.norm(hidden_states))


class Bert4RecRotaryEmbedding(nn.Module):
    """Cosines and sines of positions times frequencies (Su et al. 2021).

    The frequencies, from 1 down to nearly 1 / rope_theta, are no buffer: a model in half precision would round them.
    """

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.width, self.rope_theta = config.hidden_size // config.num_attention_heads, config.rope_theta

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, length) -> twice (batch, 1, length, head width)."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float, device=position_ids.device) / self.width
        angles = position_ids[:, None, :, None].float() * self.rope_theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + width / 2) of the last dimension by its position's angle."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat((-second, first), dim=-1) * sines


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class Bert4RecAttention(nn.Module):
    """Bidirectional multi-head attention (equations 1 and 2)."""

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_states = hidden_states
        if query_positions is not None:
            query_states = _gather(hidden_states, query_positions)
            if attention_mask is not None:
                attention_mask = _gather(attention_mask, query_positions)
        query, key, value = (
            layer(states).view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for layer, states in ((self.query, query_states), (self.key, hidden_states), (self.value, hidden_states))
        )
        if rotary is not None:
            cosines, sines = rotary
            key = rotate(key, cosines, sines)
            if query_positions is not None:
                cosines, sines = _gather(cosines, query_positions), _gather(sines, query_positions)
            query = rotate(query, cosines, sines)
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Attention in half precision is slower than in float32 on a CPU, its backward by far.
            query, key, value = query.float(), key.float(), value.float()
            autocast = torch.autocast("cpu", enabled=False)
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
                **kwargs,
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


class Bert4RecLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual connection, dropout and a LayerNorm (equations 4 to 6)."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.pre_normalization = config.normalization == "pre"
        self.attention = Bert4RecAttention(config)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.attention_norm(hidden_states) if self.pre_normalization else hidden_states
        attended, _ = self.attention(normed, attention_mask, rotary, query_positions, **kwargs)
        if query_positions is not None:
            hidden_states = _gather(hidden_states, query_positions)
        hidden_states = hidden_states + self.dropout(attended)
        if self.pre_normalization:
            return hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        hidden_states = self.attention_norm(hidden_states)
        return self.feed_forward_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))


class Bert4RecPreTrainedModel(PreTrainedModel):
    config: Bert4RecConfig
    config_class = Bert4RecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Bert4RecEmbeddings", "Bert4RecLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Bert4RecLayer, "attentions": Bert4RecAttention}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        config = Path(save_directory) / "config.json"
        for path in Path(save_directory).glob("*.safetensors") if config.is_file() else ():
            shutil.copymode(config, path)  # safetensors 0.8 lets nobody but the owner read what it writes

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Bert4RecDecoder) and module.next_ids is not None:
            initialization.zeros_(module.next_ids)
            initialization.zeros_(module.next_scores)
        if isinstance(module, Bert4RecDecoder) and self.config.item_loss == "gbce":
            # Each item is as likely as any other then, and not as likely as not, as it would be with 0: what unlearns
            # that first, with all items as negatives, unlearns most of where the item table started.
            initialization.constant_(module.bias, -math.log(module.out_features - FIRST_ITEM_ID))


class Bert4RecModel(Bert4RecPreTrainedModel):
    """The encoder: one hidden state a position."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__(config)
        self.embeddings = Bert4RecEmbeddings(config)
        self.rotary_embedding = Bert4RecRotaryEmbedding(config) if config.position_embedding_type == "rotary" else None
        self.layers = nn.ModuleList([Bert4RecLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.normalization == "pre"
            else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.item_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.item_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prediction_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: (batch, length) token ids, padded on either side.
            attention_mask: (batch, length), 0 for padding. None: everything but [PAD] is attended to.
            position_ids: (batch, length). None: counted over the attention mask, so that padding changes nothing.
            inputs_embeds: (batch, length, hidden size), in place of `input_ids`.
            prediction_positions: (batch, P) positions that are wanted of the last layer, which computes no others:
                the last hidden state is (batch, P, hidden size) then. None: all.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, or if the input is longer
                than `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        inputs = inputs_embeds if input_ids is None else input_ids
        assert inputs is not None  # for the type checker
        if inputs.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"the input has length {inputs.shape[1]}, the model takes at most "
                f"{self.config.max_position_embeddings}: shorten histories with tokenizer.append_mask"
            )
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids.ne(PAD_TOKEN_ID).long()
        if position_ids is None:
            position_ids = self.positions(inputs, attention_mask)
        else:  # of one row, if they are the same for all
            position_ids = position_ids.expand(inputs.shape[0], -1)

        hidden_states = self.embeddings(input_ids, inputs_embeds, position_ids)
        # Skipping the mask where nothing is padded would read it back from the device.
        attention_mask = create_bidirectional_mask(
            self.config, hidden_states, attention_mask, allow_is_bidirectional_skip=attention_mask is None
        )
        rotary = (
            None if self.rotary_embedding is None else self.rotary_embedding(position_ids, dtype=hidden_states.dtype)
        )
        # Other kernels take no part of the queries, and none takes no queries.
        in_last_layer = (
            prediction_positions is not None
            and prediction_positions.shape[1] > 0
            and self.config._attn_implementation in ("sdpa", "eager")
        )
        for layer in self.layers:
            positions = prediction_positions if in_last_layer and layer is self.layers[-1] else None
            hidden_states = layer(hidden_states, attention_mask, rotary, positions, **kwargs)
        if prediction_positions is not None and not in_last_layer:
            hidden_states = _gather(hidden_states, prediction_positions)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def positions(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, length): how many items stand before, or behind if positions are counted from the end."""
        if attention_mask is None or attention_mask.dim() != 2:
            attention_mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        count = attention_mask.long().cumsum(dim=1)
        if self.config.position_embedding_type == "learned_from_end":
            return count[:, -1:] - count
        return (count - 1).clamp(min=0)


class Bert4RecPredictionHead(nn.Module):
    """Dense layer, GELU and LayerNorm before the item table (equation 7)."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.activation(self.dense(hidden_states)))


class Bert4RecDecoder(nn.Linear):
    """The item table: all that reads its weights goes through `forward`, where FSDP and offloading bring them in.

    Beside it, if the config asks for them, transitions: `next_ids` (vocabulary, K), the token ids of items that follow
    an item, each once and padded with 0, and `next_scores`, what they add to their scores. They are buffers, which are
    never sharded, and may be read anywhere.
    """

    next_ids: torch.Tensor | None
    next_scores: torch.Tensor

    def __init__(self, config: Bert4RecConfig):
        super().__init__(config.hidden_size, config.vocab_size)
        self.pad_in_softmax, self.repeat_weight = config.pad_in_softmax, config.repeat_weight
        shape = config.vocab_size, config.num_transitions
        self.register_buffer("next_ids", torch.zeros(shape, dtype=torch.int) if config.num_transitions else None)
        self.register_buffer("next_scores", torch.zeros(shape) if config.num_transitions else None)

    def forward(
        self,
        states: torch.Tensor,
        item_ids: torch.Tensor | range | None = None,
        labels: torch.Tensor | None = None,
        item_loss: str = "softmax",
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_options: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """The item loss with labels, else scores: (batch, P, width of the states) -> (batch, P, vocab size or C)."""
        if labels is not None:
            weight, bias = self.weight[FIRST_ITEM_ID:], self.bias[FIRST_ITEM_ID:]
            if self.pad_in_softmax and item_loss == "softmax":  # last, so that items keep their rows
                weight, bias = torch.cat((weight, self.weight[:1])), torch.cat((bias, self.bias[:1]))
            return ITEM_LOSSES[item_loss](
                states[..., : self.in_features].flatten(0, -2),
                weight,
                bias,
                torch.where(labels < FIRST_ITEM_ID, IGNORE_INDEX, labels - FIRST_ITEM_ID).flatten(),
                num_items_in_batch,
                **(loss_options or {}),
            )
        precision: contextlib.AbstractContextManager = contextlib.nullcontext()
        if not self.training:
            # Half precision would tie neighbours in the ranking, and ties count as misses.
            states, precision = states.float(), torch.autocast(states.device.type, enabled=False)
        with precision:
            if item_ids is None:
                scores = self._scores(states, slice(FIRST_ITEM_ID, None))
                if not self.pad_in_softmax:
                    return nn.functional.pad(scores, (FIRST_ITEM_ID, 0), value=SPECIAL_TOKEN_LOGIT)
                scores = nn.functional.pad(scores, (FIRST_ITEM_ID - 1, 0), value=SPECIAL_TOKEN_LOGIT)
                return torch.cat((self._scores(states, slice(1)), scores), dim=-1)
            if isinstance(item_ids, range):
                scores = self._scores(states, slice(item_ids.start, item_ids.stop))
                scores[..., : max(0, FIRST_ITEM_ID - item_ids.start)] = SPECIAL_TOKEN_LOGIT
                return scores
            scores = self._scores(states, item_ids)
            return scores.masked_fill((item_ids < FIRST_ITEM_ID).unsqueeze(-2), SPECIAL_TOKEN_LOGIT)

    def _scores(self, states: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """(batch, P, width of the states) with rows of the table, (C,) or each of the batch with its own (batch, C)."""
        learnt, history = states[..., : self.in_features], states[..., self.in_features :]
        weight, bias = self.weight[rows].to(states.dtype), self.bias[rows].to(states.dtype)
        if bias.dim() == 1:
            scores = nn.functional.linear(learnt, weight, bias)
        else:
            scores = learnt @ weight.mT + bias.unsqueeze(1)
        if not history.shape[-1] or not scores.shape[-1]:
            return scores
        if isinstance(rows, slice):
            return self._add_history(scores, history, rows.start or 0)
        added = self._add_history(scores.new_zeros(*scores.shape[:-1], self.out_features), history, 0)
        return scores + (added[..., rows] if rows.dim() == 1 else added.gather(2, rows.unsqueeze(1).expand_as(scores)))

    def _add_history(self, scores: torch.Tensor, history: torch.Tensor, start: int) -> torch.Tensor:
        """Scores (batch, P, C) of token ids from `start` on, and what `of_history` adds to them."""
        # One at a time: each has an item once, so that sums are the same on every device.
        for item_ids, values in self._added_by(history):
            columns = item_ids - start
            inside = (columns >= 0) & (columns < scores.shape[-1])
            scores.scatter_add_(-1, columns.where(inside, 0), values.to(scores.dtype).where(inside, 0))
        return scores

    def _added_by(self, history: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Token ids (batch, P, K), and what is added to their scores."""
        if self.next_ids is not None:
            newest, history = history[..., : 2 * NEWEST_ITEMS], history[..., 2 * NEWEST_ITEMS :]
            item_ids, weights = newest[..., :NEWEST_ITEMS].long(), newest[..., NEWEST_ITEMS:]
            for item in range(NEWEST_ITEMS):
                yield (
                    self.next_ids[item_ids[..., item]].long(),
                    self.next_scores[item_ids[..., item]] * weights[..., item].unsqueeze(-1),
                )
        if self.repeat_weight:
            item_ids, counts = history.unflatten(-1, (2, -1)).unbind(-2)  # an export would fix the length for chunk
            yield item_ids.long(), self.repeat_weight * counts.log1p()

    def added_ids(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, K) token ids, some twice, whose scores a history adds to, of states that `mask_states` has made."""
        return torch.cat([item_ids for item_ids, _ in self._added_by(states[:, 0, self.in_features :])], dim=1)

    def of_history(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """What `forward` takes behind the states: `newest_items` for transitions, `counts` for repeats.

        Args:
            input_ids, attention_mask, positions: As in `newest_items`.
        """
        found = []
        if self.next_ids is not None:
            found.append(self.newest_items(input_ids, attention_mask, positions))
        if self.repeat_weight:
            found.append(self.counts(input_ids, attention_mask, positions))
        return torch.cat(found, dim=2)

    def counts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """(batch, P, 2 length): the token ids of a history, then how often each stands before a position.

        An item that is there more than once counts where it is for the first time, and is 0 elsewhere.

        Args:
            input_ids, attention_mask, positions: As in `newest_items`.
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

    def newest_items(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """The items before some positions or all, whose transitions are added to the scores there.

        An item counts half as much as the one after it; of more than `NEWEST_ITEMS` the others would have less than
        half a percent.

        Args:
            input_ids: (batch, length) token ids.
            attention_mask: (batch, length), 0 for items that do not count.
            positions: (batch, P); None: all.

        Returns:
            (batch, P, 2 `NEWEST_ITEMS`): token ids, then their weights, of sum 1; 0 where there are no more items. If
            there are none at all, [PAD] has the weight 1: its transitions are what a history begins with.
        """
        is_item = _is_item(input_ids, attention_mask)
        # So many places before the first that each position has enough of them.
        input_ids = nn.functional.pad(input_ids, (NEWEST_ITEMS, 0))
        is_item = nn.functional.pad(is_item, (NEWEST_ITEMS, 0)).unsqueeze(1)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = places[NEWEST_ITEMS:].unsqueeze(0) if positions is None else positions + NEWEST_ITEMS
        distances = positions.unsqueeze(2) - places
        nearness = (-distances).float().masked_fill(~is_item | (distances <= 0), -torch.inf)
        nearness, found = nearness.topk(NEWEST_ITEMS, dim=2)
        weights = (math.log(2) * nearness).softmax(dim=2).nan_to_num(0)  # none where there is no item
        nothing = nn.functional.one_hot(torch.zeros_like(found[..., 0]), NEWEST_ITEMS).to(weights)
        weights = weights + nothing * (nearness[..., :1] == -torch.inf)
        item_ids = input_ids.unsqueeze(1).expand(-1, found.shape[1], -1).gather(2, found)
        return torch.cat((item_ids.where(nearness > -torch.inf, 0).float(), weights), dim=2)


class Bert4RecForMaskedItemPrediction(Bert4RecPreTrainedModel):
    """The encoder and the item table: scores of all items at any position."""

    _tied_weights_keys = {"decoder.weight": "model.embeddings.item_embeddings.weight"}

    def __init__(self, config: Bert4RecConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # of `loss_function`, for who calls it on logits; `forward` has the item losses
        self.model = Bert4RecModel(config)
        self.head = Bert4RecPredictionHead(config) if config.prediction_head else nn.Identity()
        self.decoder = Bert4RecDecoder(config)
        if config.tie_word_embeddings:
            # Tied, so in no file; without this the Trainer warns that a checkpoint lacks it.
            self._keys_to_ignore_on_save = ["decoder.weight"]
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        # A resize hands over a plain nn.Linear.
        self.decoder.weight, self.decoder.bias = value.weight, value.bias
        if self.decoder.next_ids is not None:
            added = 0, 0, 0, value.out_features - len(self.decoder.next_ids)
            self.decoder.next_ids = nn.functional.pad(self.decoder.next_ids, added)
            self.decoder.next_scores = nn.functional.pad(self.decoder.next_scores, added)
        self.decoder.out_features = value.out_features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        prediction_positions: torch.Tensor | None = None,
        prediction_states: torch.Tensor | None = None,
        item_ids: torch.Tensor | range | None = None,
        exclude_ids: torch.Tensor | None = None,
        candidate_ids: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        negative_ids: torch.Tensor | None = None,
        negative_log_probabilities: torch.Tensor | None = None,
        positive_log_probabilities: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedItemPredictionOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: As in `Bert4RecModel`.
            labels: (batch, length) token ids to predict, -100 elsewhere; no special token is predicted. Where
                `config.filter_seen_items` is true, the item loss leaves out the items that the label's own row shows.
            label_positions: (batch, P) where `labels` has something to predict, padded with -1. With labels, head
                and loss are computed there only, and nothing waits for the device to count them.
            prediction_positions: (batch, P) where to compute the head. None: everywhere.
            prediction_states: (batch, P, width) of an earlier call, in place of the input: the same
                positions, scored for other `item_ids`.
            item_ids: (C,) or (batch, C) token ids to score; or a range of them, whose rows of the item table are read
                where they are and not looked up. None: all.
            exclude_ids, candidate_ids: Not used here; evaluation rows carry them along, for `search`.
            num_items_in_batch: Labels in all batches of one optimizer step, handed over by the Trainer.
            negative_ids: (K,) or (batch, P, K) token ids that the labels are compared with in training, unless
                `config.item_loss` is "softmax"; special tokens among them are not counted. P is the width of
                `label_positions`, without those that of `labels`.
            negative_log_probabilities: As `negative_ids`, for "sampled_softmax": of each to be drawn.
            positive_log_probabilities: (batch, P), likewise: of each label to be among the draws.

        Raises:
            ValueError: As `Bert4RecModel`; if the item loss lacks its negatives, or they have another shape.
        """
        attentions = hidden_states = seen = None
        sampled = [negative_ids, negative_log_probabilities, positive_log_probabilities]
        if labels is not None and label_positions is not None:
            prediction_positions = label_positions.clamp(min=0)
            labels = labels.gather(1, prediction_positions).masked_fill(label_positions < 0, IGNORE_INDEX)
        if prediction_states is None:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                prediction_positions=prediction_positions,
                return_dict=True,
                **kwargs,
            )
            hidden_states, attentions = outputs.hidden_states, outputs.attentions
            states = outputs.last_hidden_state
            if labels is not None and input_ids is not None and self.config.filter_seen_items:
                seen = input_ids.unsqueeze(1).expand(*labels.shape, -1)
            if labels is not None and self.training and (label_positions is None or _is_eager_on_cpu(states)):
                # Without those positions that only rows with more labels have.
                is_label = labels != IGNORE_INDEX
                states, labels = states[is_label], labels[is_label]
                seen = None if seen is None else seen[is_label]
                sampled = [_at_labels(values, is_label) for values in sampled]
            prediction_states = self.head(states)
            if (self.config.num_transitions or self.config.repeat_weight) and not self.training:
                if input_ids is None:
                    raise ValueError(
                        "with num_transitions or repeat_weight, expected input_ids, whose items add to the scores"
                    )
                history = self.decoder.of_history(input_ids, attention_mask, prediction_positions)
                # Not in half precision, which has no room for token ids.
                prediction_states = torch.cat((prediction_states.float(), history), dim=-1)
        loss = None
        if labels is not None:
            item_loss = self.config.item_loss if self.training else "softmax"
            loss = self.decoder(
                prediction_states,
                labels=labels,
                item_loss=item_loss,
                num_items_in_batch=num_items_in_batch,
                loss_options=self._loss_options(item_loss, seen, *sampled),
            )
            if self.training:
                return MaskedItemPredictionOutput(loss=loss, hidden_states=hidden_states, attentions=attentions)
        return MaskedItemPredictionOutput(
            loss=loss,
            logits=self.decoder(prediction_states, item_ids),
            prediction_states=prediction_states,
            hidden_states=hidden_states,
            attentions=attentions,
        )

    @torch.no_grad()
    def recommend(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        top_k: int = 10,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best items at the [MASK] of each history.

        Args:
            input_ids: (batch, length) token ids with one [MASK], the position that is read.
            attention_mask: (batch, length).
            top_k: Number of items; at most as many as there are token ids (or candidates).
            candidate_ids: (C,) or (batch, C) token ids to choose from, each once, padded with 0. None: the catalogue.
            exclude_ids: (batch, E) or, for all alike, (1, E) token ids never to recommend, padded with 0.

        Returns:
            scores: (batch, k), logits in descending order; -inf where no item is left.
            item_ids: (batch, k) token ids; 0 where no item is left.

        Raises:
            ValueError: If `top_k` is below 1, a history has no [MASK], an id is beyond the vocabulary, or a score
                is NaN.
        """
        states = self.mask_states(input_ids, attention_mask)
        _, scores, item_ids = self.search(states, top_k=top_k, candidate_ids=candidate_ids, exclude_ids=exclude_ids)
        return scores, item_ids

    @torch.no_grad()
    def rank(
        self,
        input_ids: torch.Tensor,
        target_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The place of each target in the list that `recommend` would give, from 1; a tie counts against it.

        Args:
            input_ids, attention_mask, candidate_ids, exclude_ids: As in `recommend`. A target is ranked among the
                candidates whether it is one of them or not.
            target_ids: (batch,) token ids; -100 for a target that the catalogue lacks.

        Returns:
            (batch,) ranks; 0 where the target would never be shown, excluded or not in the catalogue.

        Raises:
            ValueError: As `recommend`; if `target_ids` has another shape.
        """
        states = self.mask_states(input_ids, attention_mask)
        ranks, _, _ = self.search(states, target_ids=target_ids, candidate_ids=candidate_ids, exclude_ids=exclude_ids)
        return ranks

    @torch.no_grad()
    def search(
        self,
        prediction_states: torch.Tensor,
        *,
        target_ids: torch.Tensor | None = None,
        top_k: int | None = None,
        candidate_ids: torch.Tensor | None = None,
        exclude_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`rank` and `recommend` behind the encoder, in one pass over the catalogue.

        Args:
            prediction_states: (batch, 1, width), from `forward`.
            target_ids: As in `rank`; None: no ranks.
            top_k: As in `recommend`; None: no items.
            candidate_ids, exclude_ids: As in `recommend`.

        Returns:
            ranks (batch,), all 0 without targets; scores and item_ids (batch, k), with k = 0 without `top_k`.

        Raises:
            ValueError: If `top_k` is below 1, an id is not the model's, the targets are not one a history, or a score
                is NaN.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {top_k}")
        self._check_ids(exclude_ids)
        self._check_ids(candidate_ids)
        device, batch_size = prediction_states.device, len(prediction_states)
        if exclude_ids is not None:
            exclude_ids = exclude_ids.expand(batch_size, -1)
        ranks = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        target_scores = torch.full((batch_size, 1), -torch.inf, device=device)
        scores = torch.empty(batch_size, 0, device=device)
        item_ids = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        if target_ids is not None:
            if target_ids.shape != (batch_size,):
                raise ValueError(
                    f"target_ids must have shape ({batch_size},), one for each history; got {tuple(target_ids.shape)}"
                )
            self._check_ids(target_ids.masked_fill(target_ids == IGNORE_INDEX, 0))
            target_ids = target_ids.unsqueeze(1)
            if candidate_ids is not None:
                # The first candidate is the target, once.
                others = candidate_ids.expand(batch_size, -1)
                others = others.masked_fill(others == target_ids, 0)
                candidate_ids = torch.cat((target_ids.clamp(min=0), others), dim=1)
            elif self.config.vocab_size > ITEMS_PER_CHUNK:
                # From the same multiplication as the others' scores, so that it is equal to the bit.
                for chunk_scores, chunk_ids in self._chunks(prediction_states, None, exclude_ids):
                    target_scores = _target_scores(target_scores, target_ids, chunk_scores, chunk_ids)
        chunks = self._chunks(prediction_states, candidate_ids, exclude_ids)
        for number, (chunk_scores, chunk_ids) in enumerate(chunks):
            if target_ids is not None:
                if candidate_ids is None or number == 0:
                    target_scores = _target_scores(target_scores, target_ids, chunk_scores, chunk_ids)
                # As floats: a sum of booleans makes a copy of them in 64 bits first.
                reached = torch.ge(chunk_scores, target_scores, out=torch.empty_like(chunk_scores))
                ranks += reached.sum(dim=1, keepdim=True).long()
            if top_k is not None:
                best, columns = chunk_scores.topk(min(top_k, chunk_scores.shape[1]))
                best_ids = chunk_ids.expand_as(chunk_scores).gather(1, columns)
                scores, item_ids = torch.cat((scores, best), dim=1), torch.cat((item_ids, best_ids), dim=1)
                scores, columns = scores.topk(min(top_k, scores.shape[1]))
                item_ids = item_ids.gather(1, columns)
        ranks = ranks.masked_fill(target_scores.isneginf(), 0).squeeze(1)
        return ranks, scores, item_ids.masked_fill(scores.isneginf(), 0)

    @torch.no_grad()
    def add_items(self, tokenizer: Any, items: Iterable[str | int], titles: Mapping[Any, str] | None = None) -> int:
        """Grow the catalogue: tokenizer, item table and bias together.

        A new item starts as the mean of the old ones, so that it is recommended no more than an average item before
        it is trained; transitions to it or from it, if the model has those, it has none. Token ids, weights and counts
        of the old items stay as they are; titles given for them replace theirs.

        Args:
            tokenizer: The model's `Bert4RecTokenizer`.
            items: Raw ids; those that the catalogue has are skipped.
            titles: By raw id.

        Returns:
            How many items were new.

        Raises:
            ValueError: If the tokenizer is not the model's.
        """
        old_size = self.config.vocab_size
        if len(tokenizer) != old_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} token ids, the model {old_size}: not its own")
        num_new = tokenizer.add_items(items, titles)
        if num_new:
            self.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tables = {id(table): table for table in (self.get_input_embeddings().weight, self.decoder.weight)}
            for table in [*tables.values(), self.decoder.bias]:
                table[old_size:] = table[FIRST_ITEM_ID:old_size].mean(dim=0)
        return num_new

    @torch.no_grad()
    def user_vectors(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, hidden size + 1): their dot products with `item_vectors` are the scores, but for `of_history`."""
        return self.vectors_of(self.mask_states(input_ids, attention_mask))

    def vectors_of(self, prediction_states: torch.Tensor) -> torch.Tensor:
        """`user_vectors` of the states that `mask_states` has made."""
        states = prediction_states.squeeze(1).float()[:, : self.config.hidden_size]
        return torch.cat((states, states.new_ones(len(states), 1)), dim=1)

    @torch.no_grad()
    def item_vectors(self) -> torch.Tensor:
        """(number of items, hidden size + 1), the bias last; row i is the item of token id i + 3."""
        vectors = torch.cat((self.decoder.weight, self.decoder.bias.unsqueeze(1)), dim=1)
        return vectors[FIRST_ITEM_ID:].float()

    @torch.no_grad()
    def mask_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, 1, width of the states) at the last [MASK] of each history, for `search`."""
        if self.training:
            raise ValueError("the model is in training mode, where dropout is active: call model.eval() first")
        self._check_ids(input_ids)
        is_mask = input_ids.eq(MASK_TOKEN_ID)
        if not is_mask.any(dim=1).all():
            raise ValueError("every history needs a [MASK], the position to predict: see tokenizer.append_mask")
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = (is_mask * numbers).argmax(dim=1, keepdim=True)
        no_items = torch.empty(0, dtype=torch.long, device=input_ids.device)
        return self(
            input_ids=input_ids,
            attention_mask=attention_mask,
            prediction_positions=positions,
            item_ids=no_items,
            return_dict=True,
        ).prediction_states

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """`push_to_hub` calls this between saving and uploading: the rest of the model's folder comes along.

        A model that was loaded from a folder or the Hub brings the catalogue; and while its weights are those of
        that folder, card, evaluation and recipe as well.
        """
        self._bring_along(Path(working_dir), repo_id, kwargs.get("token"))
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)

    def _bring_along(self, folder: Path, repo_id: str, token: bool | str | None) -> None:
        source = Path(self.name_or_path or os.devnull)
        if not source.exists():
            patterns = [*CATALOGUE_FILES, *RECORD_FILES, "config.json", "*.safetensors"]
            with contextlib.suppress(OSError, ValueError):  # neither a folder nor on the Hub any more
                source = Path(snapshot_download(self.name_or_path, allow_patterns=patterns, token=token))
        if not (source / "config.json").is_file() or source.resolve() == folder.resolve():
            return
        weights = sorted(path.name for path in folder.glob("*.safetensors"))
        unchanged = bool(weights) and filecmp.cmpfiles(source, folder, weights, shallow=False)[0] == weights
        if unchanged or Bert4RecConfig.from_pretrained(source).vocab_size == self.config.vocab_size:
            for name in CATALOGUE_FILES + (RECORD_FILES if unchanged else ()):
                if (source / name).is_file() and name != "README.md":
                    shutil.copyfile(source / name, folder / name)
        if unchanged and (source / "README.md").is_file():
            text = (source / "README.md").read_text("utf-8")
            card = ModelCard(SNIPPET_MODEL.sub(f'model="{repo_id}"', text), ignore_metadata_errors=True)
            pushed = ModelCard.load(folder / "README.md").data.get("tags") or []
            card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *pushed]))
            card.save(folder / "README.md")

    def _loss_options(
        self,
        item_loss: str,
        seen: torch.Tensor | None,
        negative_ids: torch.Tensor | None,
        negative_log_probabilities: torch.Tensor | None,
        positive_log_probabilities: torch.Tensor | None,
    ) -> dict[str, Any]:
        """What the item loss needs besides; `seen` are the visible token ids of each label's row, (…, length)."""
        # What serving never recommends is no alternative to the label.
        options: dict[str, Any] = {} if seen is None else {"excluded_ids": _rows(seen) - FIRST_ITEM_ID}
        if item_loss == "softmax":
            return options
        if negative_ids is None:
            raise ValueError(
                f"item_loss {item_loss!r} needs negative_ids: give num_negatives to DataCollatorForMaskedItemPrediction"
            )
        options["negative_ids"] = _rows(negative_ids) - FIRST_ITEM_ID
        if item_loss == "gbce":
            options["calibration"] = self.config.gbce_calibration
        if item_loss == "sampled_softmax" and negative_log_probabilities is not None:
            options["negative_log_probabilities"] = _rows(negative_log_probabilities)
        if item_loss == "sampled_softmax" and positive_log_probabilities is not None:
            options["positive_log_probabilities"] = positive_log_probabilities.flatten()
        return options

    def _check_ids(self, ids: torch.Tensor | None) -> None:
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"token ids must lie between 0 and vocab_size - 1 = {self.config.vocab_size - 1}; got "
                f"{int(ids.min())} to {int(ids.max())}: the tokenizer must be the one of the model's folder"
            )

    def _chunks(
        self, states: torch.Tensor, candidate_ids: torch.Tensor | None, exclude_ids: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scores (batch, C) and their token ids (1 or batch, C), -inf where an item may not be shown."""
        if candidate_ids is not None:
            if exclude_ids is not None:
                exclude_ids = exclude_ids.sort(dim=1).values
            # Those of each row its own are looked up, a vector each.
            at_once = ITEMS_PER_CHUNK
            if candidate_ids.dim() == 2:
                at_once = max(1, FLOATS_AT_ONCE // (len(states) * states.shape[-1]))
            for item_ids in candidate_ids.split(at_once, dim=-1):
                scores = self(prediction_states=states, item_ids=item_ids, return_dict=True).logits.squeeze(1)
                item_ids = item_ids.expand(len(states), -1)
                forbidden = item_ids < FIRST_ITEM_ID
                if exclude_ids is not None and exclude_ids.shape[1]:
                    nearest = torch.searchsorted(exclude_ids, item_ids.contiguous()).clamp(max=exclude_ids.shape[1] - 1)
                    forbidden = forbidden | (exclude_ids.gather(1, nearest) == item_ids)
                yield _finite(scores).masked_fill(forbidden, -torch.inf), item_ids
            return
        for start in range(0, self.config.vocab_size, ITEMS_PER_CHUNK):
            end = min(start + ITEMS_PER_CHUNK, self.config.vocab_size)
            chunk_ids = torch.arange(start, end, device=states.device)
            output = self(prediction_states=states, item_ids=range(start, end), return_dict=True)
            scores = _finite(output.logits.squeeze(1))
            if start < FIRST_ITEM_ID:
                scores[:, : FIRST_ITEM_ID - start] = -torch.inf
            if exclude_ids is not None:
                columns = exclude_ids - start
                inside = (columns >= 0) & (columns < end - start)
                ceiling = scores.new_full((), torch.inf).where(~inside, -torch.inf)
                scores.scatter_reduce_(1, columns.where(inside, 0), ceiling, "amin")
            yield scores, chunk_ids.unsqueeze(0)


def _gather(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(batch, …, length, d) at (batch, P) -> (batch, …, P, d)."""
    if states.dim() == 4:
        positions = positions.unsqueeze(1).expand(-1, states.shape[1], -1)
    return states.gather(-2, positions.unsqueeze(-1).expand(*positions.shape, states.shape[-1]))


def _is_item(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, length), of what is attended to."""
    is_item = input_ids >= FIRST_ITEM_ID
    if attention_mask is not None and attention_mask.dim() == 2:
        is_item = is_item & (attention_mask != 0)
    return is_item


def _is_eager_on_cpu(states: torch.Tensor) -> bool:
    """Not on a device, where shapes that follow from values wait for it, nor in a compiled graph, which they break."""
    return states.device.type == "cpu" and not torch.compiler.is_compiling()


def _rows(values: torch.Tensor) -> torch.Tensor:
    """(batch, P, K) -> (batch P, K); (K,) as it is."""
    return values if values.dim() == 1 else values.flatten(0, -2)


def _at_labels(values: torch.Tensor | None, is_label: torch.Tensor) -> torch.Tensor | None:
    """Of values with a row for each position, the rows of the labels (batch, length)."""
    if values is None or values.dim() == 1:
        return values
    if values.shape[:2] != is_label.shape:
        raise ValueError(
            f"without label_positions, expected values for all {tuple(is_label.shape)} positions of labels; got shape "
            f"{tuple(values.shape)}: hand the collator's label_positions over as well"
        )
    return values[is_label]


def _target_scores(
    target_scores: torch.Tensor, target_ids: torch.Tensor, scores: torch.Tensor, item_ids: torch.Tensor
) -> torch.Tensor:
    """Target scores (batch, 1), filled in where these have the target: one of a range, or the first candidate."""
    columns = target_ids - item_ids[:, :1]
    inside = (columns >= 0) & (columns < scores.shape[1])
    found = scores.gather(1, columns.where(inside, 0)).masked_fill(~inside, -torch.inf)
    return torch.maximum(target_scores, found)


def _finite(scores: torch.Tensor) -> torch.Tensor:
    if scores.numel() and scores.amax().isnan():  # the maximum of what has a NaN is NaN
        raise ValueError("a score is NaN: the weights are not finite, training has diverged")
    return scores
