# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""BERT4Rec (Sun et al., CIKM 2019): the network, from token ids to item scores."""

import contextlib
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .catalogue import CatalogueMixin
from .configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID, Bert4RecConfig
from .explanation import ExplanationMixin
from .folder_checks import check_links, check_weight_files
from .history_scores import HistoryScores
from .item_features import ItemProjection
from .layers import (
    Bert4RecAttention,
    Bert4RecDropout,
    Bert4RecFilter,
    Bert4RecLayer,
    Bert4RecRotaryEmbedding,
    gather_positions,
    is_eager_on_cpu,
)
from .losses import IGNORE_INDEX, item_loss

# Logit of special tokens. It removes them from the softmax, and is finite in half precision.
SPECIAL_TOKEN_LOGIT = -1e4
# Value added to attention scores of padding. It is finite in half precision, so that a row of padding stays finite.
MASKED_SCORE = -6e4


@dataclass
class MaskedItemPredictionOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, returned with `labels`):
            The item loss in training, the full softmax in evaluation.
        logits (`torch.FloatTensor` of shape `(batch_size, positions, vocab_size)`):
            The network's scores in float32, without `HistoryScores`. None with `skip_logits`.
        prediction_states (`torch.FloatTensor` of shape `(batch_size, positions, hidden_size)`):
            The states that the item vectors are multiplied with. None in training with labels.
        hidden_states (`tuple(torch.FloatTensor)`, returned with `output_hidden_states=True`):
            The hidden states of all layers.
        attentions (`tuple(torch.FloatTensor)`, returned with `output_attentions=True`):
            The attention weights of all layers.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    prediction_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ItemEmbeddings(nn.Embedding):
    """The item vectors, for input and output. Only this `forward` reads them.

    So a wrapper of the module (LoRA, quantised weights, offloading, FSDP2) applies to the scores as well.
    """

    def forward(self, item_ids: torch.Tensor | range) -> torch.Tensor:
        """Vectors (..., hidden size) of token ids (...), or of a range of token ids, as a view without a copy."""
        if isinstance(item_ids, range):
            return self.weight[item_ids.start : item_ids.stop]
        return super().forward(item_ids)

    @staticmethod
    def takes_ranges(module: nn.Module) -> bool:
        """Whether a module accepts a range. A wrapped module accepts only token ids."""
        is_wrapped = type(module) is not ItemEmbeddings or "forward" in vars(module)
        return not is_wrapped and type(module.weight) is nn.Parameter


class ItemBias(nn.Module):
    """The item biases. They are a separate module so that offloading and FSDP2 load them."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, item_ids: torch.Tensor | range) -> torch.Tensor:
        """Biases (...) of token ids (...), or of a range of token ids."""
        if isinstance(item_ids, range):
            return self.weight[item_ids.start : item_ids.stop]
        return self.weight[item_ids]

    def resize(self, vocab_size: int) -> None:
        """Append biases of 0, or remove the last ones."""
        grown = nn.functional.pad(self.weight.detach(), (0, vocab_size - len(self.weight)))
        self.weight = nn.Parameter(grown, requires_grad=self.weight.requires_grad)


class Bert4RecEmbeddings(nn.Module):
    """Item vectors, plus vectors of the event types and learned positions if the config asks for them."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.config = config
        self.item_embeddings = ItemEmbeddings(config.vocab_size, config.hidden_size)
        if config.num_event_types:
            # Row 0 stands for no type, and stays 0.
            self.event_type_embeddings = nn.Embedding(config.num_event_types + 1, config.hidden_size, padding_idx=0)
        if config.position_embedding_type != "rotary":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            if config.normalization == "post"
            else nn.Identity()
        )
        self.dropout = Bert4RecDropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor,
        event_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.item_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if event_type_ids is not None:
            hidden_states = hidden_states + self.event_type_embeddings(event_type_ids)
        if self.config.position_embedding_type != "rotary":
            hidden_states = hidden_states + self.position_embeddings(position_ids)
        return self.dropout(self.norm(hidden_states))


class Bert4RecPreTrainedModel(PreTrainedModel):
    config: Bert4RecConfig
    config_class = Bert4RecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Bert4RecLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Bert4RecLayer, "attentions": Bert4RecAttention}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, use_safetensors: bool | None = True, **kwargs: Any
    ) -> Any:
        """Load a model, as in Transformers. A folder is data: nothing in it runs, and nothing leads out of it.

        Args:
            pretrained_model_name_or_path: A folder or Hub id.
            model_args: As in Transformers.
            use_safetensors: Whether only safetensors are read. None: also pickles, by PyTorch's `weights_only` loader.
            kwargs: As in Transformers.

        Raises:
            OSError: If there are no weights.
            ValueError: If a file is damaged, if files do not belong together, or if a path leads out of the folder.
        """
        name = pretrained_model_name_or_path
        if name is not None and os.path.isdir(name):
            check_links(name)
        try:
            return super().from_pretrained(name, *model_args, use_safetensors=use_safetensors, **kwargs)
        except (SafetensorError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"the weights of {name} cannot be read: {type(error).__name__}: {error}") from error

    # This private method is overridden, since Transformers calls it when the files are known and no memory is taken.
    @staticmethod
    def _load_pretrained_model(
        model: "Bert4RecPreTrainedModel", state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The files of an adapter, which PEFT loads into a model that has its weights, are the user's own.
        if checkpoint_files and any(weight.is_meta for weight in model.parameters()):
            check_weight_files(model, checkpoint_files, model.config.name_or_path)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Older releases of Transformers do not know of a part of a parameter that it has been loaded.
        if isinstance(module, ItemEmbeddings) and not getattr(module.weight, "_is_hf_initialized", False):
            initialization.zeros_(module.weight[PAD_TOKEN_ID])
        if isinstance(module, HistoryScores) and module.successor_ids is not None:
            initialization.zeros_(module.successor_ids)
            initialization.zeros_(module.successor_scores)
            initialization.zeros_(module.next_item_scores)
        if isinstance(module, HistoryScores) and module.conversion_scores is not None:
            initialization.zeros_(module.conversion_scores)
        if isinstance(module, ItemProjection) and module.weight is not None:
            initialization.zeros_(module.weight)
        if isinstance(module, Bert4RecFilter):
            initialization.normal_(module.weight)
        if isinstance(module, ItemBias):
            # With gBCE, a bias of 0 means that every item is predicted with probability 1/2. The biases start at
            # probability 1 / num_items instead. Otherwise, correcting all probabilities, with all items as negatives,
            # would destroy most of the information in the initial item vectors.
            num_items = len(module.weight) - FIRST_ITEM_ID
            initialization.constant_(module.weight, -math.log(num_items) if self.config.item_loss == "gbce" else 0.0)


class Bert4RecModel(Bert4RecPreTrainedModel):
    """The encoder: computes one hidden state per position."""

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

    def get_input_embeddings(self) -> ItemEmbeddings:
        return self.embeddings.item_embeddings

    def set_input_embeddings(self, value: ItemEmbeddings) -> None:
        self.embeddings.item_embeddings = value

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        event_type_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: (batch, length) token ids, padded on either side.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
            position_ids: (batch, length). None: counted over the attention mask, so that padding has no effect.
            inputs_embeds: (batch, length, hidden size) embeddings in place of `input_ids`.
            masked_positions: (batch, P) positions that the last layer computes, padded with -1. The last hidden state
                is then (batch, P, hidden size). None: all positions.
            event_type_ids: (batch, length) types of the events, from 1; 0 for none. None: no event has a type.
            output_attentions: Whether to return the attention weights of all layers. None: as the config says.
            output_hidden_states: Whether to return the hidden states of all layers. None: as the config says.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, if the input is longer than
                `max_position_embeddings`, or if `event_type_ids` have another shape or the model has no event types.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"expected exactly one of input_ids and inputs_embeds; got {given}")
        inputs = inputs_embeds if input_ids is None else input_ids
        assert inputs is not None  # for the type checker
        longest = self.config.max_position_embeddings
        if self.config.causal_attention and position_ids is not None:
            longest *= 2  # a training row has a [MASK] for each item
        if inputs.shape[1] > longest:
            raise ValueError(
                f"the input has length {inputs.shape[1]}, the model takes at most {longest}: shorten histories with "
                "tokenizer.append_mask"
            )
        if event_type_ids is not None:
            if not self.config.num_event_types:
                raise ValueError("the model has no event types; got event_type_ids: leave them out")
            if event_type_ids.shape != inputs.shape[:2]:
                raise ValueError(
                    f"event_type_ids must have the shape of the input, {tuple(inputs.shape[:2])}; got "
                    f"{tuple(event_type_ids.shape)}"
                )
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids.ne(PAD_TOKEN_ID).long()
        num_places = inputs.shape[1] if position_ids is None else self.config.max_position_embeddings
        if position_ids is None:
            position_ids = self.positions(inputs, attention_mask)
        else:  # one row of positions may stand for all rows
            position_ids = position_ids.expand(inputs.shape[0], -1)

        hidden_states = self.embeddings(input_ids, inputs_embeds, position_ids, event_type_ids)
        places = None
        if self.config.filter_share:
            places = self._index_of_place(input_ids, attention_mask, position_ids, num_places), position_ids
        if self.config.causal_attention and (attention_mask is None or attention_mask.dim() == 2):
            attention_mask = self._causal_mask(input_ids, attention_mask, position_ids)
        elif attention_mask is not None and attention_mask.dim() == 2 and self._computes_part_of_the_queries:
            # One row of mask serves all queries. Building Transformers' square mask takes longer than attention.
            attention_mask = (attention_mask == 0)[:, None, None] * MASKED_SCORE
        else:
            # The mask is not skipped for batches without padding, since the check would wait for the device.
            attention_mask = create_bidirectional_mask(
                self.config, hidden_states, attention_mask, allow_is_bidirectional_skip=attention_mask is None
            )
        rotary = (
            None if self.rotary_embedding is None else self.rotary_embedding(position_ids, dtype=hidden_states.dtype)
        )
        wanted = None if masked_positions is None else masked_positions.clamp(min=0)
        # Attention kernels need at least one query.
        in_last_layer = wanted is not None and wanted.shape[1] > 0 and self._computes_part_of_the_queries
        for layer in self.layers:
            positions = wanted if in_last_layer and layer is self.layers[-1] else None
            hidden_states = layer(hidden_states, attention_mask, rotary, positions, places)
        if wanted is not None and not in_last_layer:
            hidden_states = gather_positions(hidden_states, wanted)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _causal_mask(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """(batch, 1, length, length): every token attends to itself and to the items at positions before its own.

        No token attends to the [MASK] of another place, so the tokens of a row may be in any order.
        """
        if not self._computes_part_of_the_queries:
            raise ValueError(
                f"causal_attention needs attn_implementation sdpa or eager; got {self.config._attn_implementation}"
            )
        is_key = self._is_item(input_ids, attention_mask, position_ids)
        allowed = (position_ids[:, None, :] < position_ids[:, :, None]) & is_key[:, None, :]
        itself = torch.eye(position_ids.shape[1], dtype=torch.bool, device=position_ids.device)
        return torch.where(allowed | itself, 0.0, MASKED_SCORE).unsqueeze(1)

    @staticmethod
    def _is_item(
        input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """(batch, length) which tokens other tokens attend to with causal attention: all but padding and [MASK]s."""
        is_item = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
        return is_item if input_ids is None else is_item & (input_ids != MASK_TOKEN_ID)

    def _index_of_place(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        num_places: int,
    ) -> torch.Tensor:
        """(batch, num_places) where in the input the item of each position is; -1 for no item."""
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"filter_share needs an attention_mask of shape (batch, length); got {tuple(attention_mask.shape)}"
            )
        batch_size, length = position_ids.shape
        is_item = self._is_item(input_ids, attention_mask, position_ids) & (position_ids < num_places)
        # What is no item goes to an additional place, which is left out.
        place = position_ids.where(is_item, num_places)
        index = torch.arange(length, device=position_ids.device).expand(batch_size, -1)
        return place.new_full((batch_size, num_places + 1), -1).scatter(1, place, index)[:, :-1]

    @property
    def _computes_part_of_the_queries(self) -> bool:
        """Whether the attention implementation accepts fewer queries than keys, with a mask for them."""
        return self.config._attn_implementation in ("sdpa", "eager")

    def positions(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, length) the number of items before each position, or after it if the config counts from the end."""
        if attention_mask is None or attention_mask.dim() != 2:
            attention_mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        count = attention_mask.long().cumsum(dim=1)
        if self.config.position_embedding_type == "learned_from_end":
            return count[:, -1:] - count
        return (count - 1).clamp(min=0)


class Bert4RecPredictionHead(nn.Module):
    """Dense layer, GELU and LayerNorm before the product with the item vectors (equation 7)."""

    def __init__(self, config: Bert4RecConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.activation(self.dense(hidden_states)))


class Bert4RecForMaskedItemPrediction(ExplanationMixin, CatalogueMixin, Bert4RecPreTrainedModel):
    """The encoder with scores of all items at any position: h · w(item) + b(item).

    `HistoryScores` are counted, not learnt. Only the ranking functions of `RecommendationMixin` add them; `forward`
    does not.
    """

    # Tells the Trainer to pass `num_items_in_batch`, which the loss is divided by.
    accepts_loss_kwargs = True
    # Models of earlier releases have no next-item scores. Loading sets them to 0, and needs no warning.
    _keys_to_ignore_on_load_missing = [r"history_scores\.next_item_scores"]

    def __init__(self, config: Bert4RecConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # for callers of `loss_function`; `forward` computes the item losses itself
        self.model = Bert4RecModel(config)
        self.head = Bert4RecPredictionHead(config) if config.prediction_head else nn.Identity()
        self.item_bias = ItemBias(config.vocab_size)
        self.history_scores = HistoryScores(config)
        self.item_projection = ItemProjection(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        masked_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        negative_ids: torch.Tensor | None = None,
        negative_log_probabilities: torch.Tensor | None = None,
        positive_log_probabilities: torch.Tensor | None = None,
        event_type_ids: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        skip_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> MaskedItemPredictionOutput:
        """
        Args:
            input_ids: (batch, length) token ids, padded on either side.
            attention_mask: (batch, length), 0 for padding. None: all tokens but [PAD] are attended to.
            position_ids: (batch, length). None: counted over the attention mask, so that padding has no effect.
            inputs_embeds: (batch, length, hidden size) embeddings in place of `input_ids`.
            labels: (batch, length) token ids to predict, or (batch, P) beside `masked_positions`; -100 where there is
                nothing to predict. Special tokens are never predicted. In training, the loss is
                `config.item_loss`; in evaluation, it is the cross-entropy of the logits. With
                `config.filter_seen_items`, both exclude the items of the input row (`mask_seen`).
            masked_positions: (batch, P) positions whose logits are computed, padded with -1. None: all positions.
                Training is fastest with them, since the last layer computes only these positions.
            num_items_in_batch: The number of labels in all batches of one optimizer step, which the loss is divided
                by. None: the number of labels of this batch.
            negative_ids: (K,) or (batch, P, K) token ids that labels are compared with in training, unless
                `config.item_loss` is "softmax". Special tokens among them do not count. Without `masked_positions`, P
                is the length.
            negative_log_probabilities: Shaped like `negative_ids`, for "sampled_softmax": the log probability of each
                negative to be drawn.
            positive_log_probabilities: Shaped like `labels`, for "sampled_softmax": the log probability of each label
                to be among the draws.
            event_type_ids: (batch, length) types of the events, from 1; 0 for none. The type of a [MASK] is that of the
                event that is predicted. With `config.filter_seen_items`, the loss then excludes only the items of the
                row whose events have the type of the label. None: no event has a type.
            loss_weights: Shaped like `labels`: numbers of at least 0 that the losses of the labels are multiplied by.
                The sum is still divided by the number of labels. None: all are 1.
            skip_logits: Whether not to compute the logits. None: True in training with labels, otherwise False.
            output_attentions: Whether to return the attention weights of all layers. None: as the config says.
            output_hidden_states: Whether to return the hidden states of all layers. None: as the config says.

        Raises:
            ValueError: If both or none of `input_ids` and `inputs_embeds` are given, if the input is longer than
                `max_position_embeddings`, or if labels or negatives have another shape or the item loss gets no
                negatives.
        """
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        sampled = [negative_ids, negative_log_probabilities, positive_log_probabilities, loss_weights]
        if labels is not None:
            inputs = masked_positions if masked_positions is not None else input_ids
            inputs = inputs_embeds if inputs is None else inputs
            if inputs is not None and labels.shape != inputs.shape[:2]:
                of_what = "input" if masked_positions is None else "masked_positions"
                raise ValueError(
                    f"labels must have the shape of the {of_what}, {tuple(inputs.shape[:2])}; got {tuple(labels.shape)}"
                )
            if masked_positions is not None:
                labels = labels.masked_fill(masked_positions < 0, IGNORE_INDEX)
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            masked_positions=masked_positions,
            event_type_ids=event_type_ids,
            return_dict=True,
            **{name: value for name, value in recorded.items() if value is not None},  # None leaves it to the config
        )
        states, loss = outputs.last_hidden_state, None
        if labels is not None:
            seen_ids = None
            if input_ids is not None and self.config.filter_seen_items:
                seen_ids = input_ids.unsqueeze(1).expand(*labels.shape, -1)
                if event_type_ids is not None:
                    at_labels = event_type_ids
                    if masked_positions is not None:
                        at_labels = event_type_ids.gather(1, masked_positions.clamp(min=0))
                    is_of_type = event_type_ids.unsqueeze(1) == at_labels.unsqueeze(2)
                    seen_ids = seen_ids.where(is_of_type, PAD_TOKEN_ID)
            # Only the states of labels are needed. Selecting them on a device would wait for their number.
            if self.training and skip_logits and (masked_positions is None or is_eager_on_cpu(states)):
                is_label = labels != IGNORE_INDEX
                states, labels = states[is_label], labels[is_label]
                seen_ids = None if seen_ids is None else seen_ids[is_label]
                sampled = [_at_labels(values, is_label) for values in sampled]
        states = self.head(states)
        if labels is not None:
            loss = self._loss(states, labels, num_items_in_batch, seen_ids, *sampled)
        return MaskedItemPredictionOutput(
            loss=loss,
            logits=None if skip_logits else self._logits(states),
            prediction_states=states if labels is None or not self.training else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        seen_ids: torch.Tensor | None,
        negative_ids: torch.Tensor | None,
        negative_log_probabilities: torch.Tensor | None,
        positive_log_probabilities: torch.Tensor | None,
        loss_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """The item loss in training, the softmax loss in evaluation, of states (..., hidden size) and labels (...)."""
        name = self.config.item_loss if self.training else "softmax"
        with contextlib.nullcontext() if self.training else _in_float32(states):
            vectors, biases = self._item_rows(range(FIRST_ITEM_ID, self.config.vocab_size))
            if self.config.pad_in_softmax and name == "softmax":  # [PAD] comes last, so that items keep their rows
                pad_vector, pad_bias = self._item_rows(range(1))
                vectors, biases = torch.cat((vectors, pad_vector)), torch.cat((biases, pad_bias))
            if not self.training:
                states, vectors, biases = states.float(), vectors.float(), biases.float()
            return item_loss(
                name,
                states,
                vectors,
                biases,
                labels,
                num_items_in_batch,
                seen_ids=seen_ids,
                negative_ids=negative_ids,
                negative_log_probabilities=negative_log_probabilities,
                positive_log_probabilities=positive_log_probabilities,
                calibration=self.config.gbce_calibration,
                weights=loss_weights,
            )

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (batch, P, vocab size) of states (batch, P, hidden size). Special tokens get `SPECIAL_TOKEN_LOGIT`."""
        logits = self._scores(states, range(FIRST_ITEM_ID, self.config.vocab_size))
        if self.config.pad_in_softmax:
            logits = nn.functional.pad(logits, (FIRST_ITEM_ID - 1, 0), value=SPECIAL_TOKEN_LOGIT)
            logits = torch.cat((self._scores(states, range(1)), logits), dim=-1)
        else:
            logits = nn.functional.pad(logits, (FIRST_ITEM_ID, 0), value=SPECIAL_TOKEN_LOGIT)
        if logits.requires_grad and not torch.compiler.is_compiling():
            logits.register_hook(_check_special_tokens)
        return logits

    def _scores(self, states: torch.Tensor, item_ids: torch.Tensor | range) -> torch.Tensor:
        """The network's scores of some items.

        Args:
            states: (batch, P, hidden size).
            item_ids: A range or (C,) token ids, or (batch, C) token ids for each row.

        Returns:
            (batch, P, C) float32. In half precision, neighbours in the ranking would tie, and ties count as misses.
        """
        with _in_float32(states):
            vectors, biases = self._item_rows(item_ids)
            vectors, biases = vectors.float(), biases.float()
            if biases.dim() == 1:
                return nn.functional.linear(states.float(), vectors, biases)
            return states.float() @ vectors.mT + biases.unsqueeze(1)

    def _item_rows(self, item_ids: torch.Tensor | range) -> tuple[torch.Tensor, torch.Tensor]:
        """Item vectors (..., hidden size) and biases (...) of token ids."""
        embeddings = self.get_input_embeddings()
        if isinstance(item_ids, range) and not ItemEmbeddings.takes_ranges(embeddings):
            # The device of weights that Accelerate has offloaded is "meta". Accelerate moves the ids to the weights.
            device = None if self.device.type == "meta" else self.device
            item_ids = torch.arange(item_ids.start, item_ids.stop, device=device)
        return embeddings(item_ids), self.item_bias(item_ids)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> ItemEmbeddings:
        """Resize item vectors, biases and counts. New items have bias 0 and no counts. See `add_items` for new items.

        Args:
            new_num_tokens: New vocabulary size.
            pad_to_multiple_of: As in Transformers.
            mean_resizing: As in Transformers.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.item_bias.resize(self.config.vocab_size)
        self.history_scores.resize(self.config.vocab_size)
        return embeddings


def _in_float32(states: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast on the device of the states."""
    return torch.autocast(states.device.type, enabled=False)


def _check_special_tokens(gradient: torch.Tensor) -> None:
    """Raise if a loss has a gradient at the logits of [MASK] or [UNK], which are not part of the softmax."""
    if gradient[..., PAD_TOKEN_ID + 1 : FIRST_ITEM_ID].any():
        raise ValueError(
            "a loss reads the logits of special tokens, which are no items: with label_smoothing_factor use "
            "Bert4RecTrainer, which smooths over items only; in your own loss, read logits[..., 3:]"
        )


def _at_labels(values: torch.Tensor | None, is_label: torch.Tensor) -> torch.Tensor | None:
    """Select the rows of the labels from values with a row for each position. Shared values (K,) stay."""
    if values is None or values.dim() == 1:
        return values
    if values.shape[:2] != is_label.shape:
        raise ValueError(
            f"without masked_positions, expected values for all {tuple(is_label.shape)} positions of labels; got shape "
            f"{tuple(values.shape)}: pass the collator's masked_positions as well"
        )
    return values[is_label]
