# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""BERT4Rec (Sun et al., CIKM 2019): the network, from token ids to item scores."""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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

from .configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID, Bert4RecConfig
from .history_scores import HistoryScores
from .losses import IGNORE_INDEX, ITEM_LOSSES
from .recommendation import RecommendationMixin

# Special tokens are no items: this logit takes them out of the softmax, and is finite in half precision.
SPECIAL_TOKEN_LOGIT = -1e4


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
            `config.repeat_weight` what the items before the position add, see `HistoryScores.encode`; None while
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
        if isinstance(module, HistoryScores) and module.successor_ids is not None:
            initialization.zeros_(module.successor_ids)
            initialization.zeros_(module.successor_scores)
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

    Beside it are the `HistoryScores`, which are added to the network's.
    """

    def __init__(self, config: Bert4RecConfig):
        super().__init__(config.hidden_size, config.vocab_size)
        self.pad_in_softmax = config.pad_in_softmax
        self.history_scores = HistoryScores(config)

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
            return self.history_scores.add_to(scores, history, rows.start or 0)
        added = self.history_scores.add_to(scores.new_zeros(*scores.shape[:-1], self.out_features), history, 0)
        return scores + (added[..., rows] if rows.dim() == 1 else added.gather(2, rows.unsqueeze(1).expand_as(scores)))


class Bert4RecForMaskedItemPrediction(RecommendationMixin, Bert4RecPreTrainedModel):
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
        self.decoder.history_scores.resize(value.out_features)
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
            if not (self.decoder.history_scores.is_empty or self.training):
                if input_ids is None:
                    raise ValueError(
                        "with num_transitions or repeat_weight, expected input_ids, whose items add to the scores"
                    )
                history = self.decoder.history_scores.encode(input_ids, attention_mask, prediction_positions)
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


def _gather(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(batch, …, length, d) at (batch, P) -> (batch, …, P, d)."""
    if states.dim() == 4:
        positions = positions.unsqueeze(1).expand(-1, states.shape[1], -1)
    return states.gather(-2, positions.unsqueeze(-1).expand(*positions.shape, states.shape[-1]))


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
