# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""`Bert4RecConfig`: the architecture, the item loss, the weights of counted scores, and the serving policy."""

from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# Special tokens come first, then the items.
PAD_TOKEN_ID, MASK_TOKEN_ID, UNK_TOKEN_ID, FIRST_ITEM_ID = range(4)
# Fields that are fixed or follow from the catalogue, so that users do not set them.
DERIVED_FIELDS = (
    "vocab_size",
    "pad_token_id",
    "mask_token_id",
    "unk_token_id",
    "tie_word_embeddings",
    "num_item_features",
    "withdrawn_item_ids",
    "num_event_types",
    "target_event_type_ids",
)
# Largest values. Token ids are stored in 32 bits. The others are far above any useful value, and so small that a
# config.json from a stranger costs no more than its weights; see folder_checks.py.
LARGEST = {
    "vocab_size": 2**31 - 1,
    "hidden_size": 2**16,
    "num_hidden_layers": 256,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**20,
    "num_transitions": 2**16,
    "num_item_features": 2**31 - 1,
    "num_event_types": 2**16,
}
# Keys that Transformers never writes into config.json. There, they would name code that Transformers fetches and runs.
CODE_KEYS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal",
)  # fmt: skip


@strict
class Bert4RecConfig(PreTrainedConfig):
    r"""
    Configuration of a BERT4Rec model (Sun et al., CIKM 2019, https://arxiv.org/abs/1904.06690).

    The default is a small model with rotary positions and pre-normalisation, which needs a fraction of the training
    steps of the paper's model. The paper's architecture is `position_embedding_type="learned_from_start"`,
    `normalization="post"`, `prediction_head=True`.

    Args:
        vocab_size (`int`, defaults to 1003):
            Number of token ids: the three special tokens and the items.
        hidden_size (`int`, defaults to 64):
            Width of the item embeddings and of the encoder.
        num_hidden_layers (`int`, defaults to 2):
            Number of Transformer layers.
        num_attention_heads (`int`, defaults to 2):
            Number of attention heads, a divisor of `hidden_size`.
        intermediate_size (`int`, defaults to 256):
            Width of the feed-forward layers.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the feed-forward layers: any name in `transformers.ACT2FN`.
        gated_feed_forward (`bool`, defaults to `False`):
            Whether the feed-forward layers are gated: their inner states are multiplied by the activation of another
            projection (Shazeer 2020, https://arxiv.org/abs/2002.05202). A gated layer has three weight matrices
            instead of two, so `intermediate_size` is usually reduced to two thirds.
        hidden_dropout_prob (`float`, defaults to 0.1):
            Dropout probability of the embeddings and of the output of every sublayer.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout probability of the attention weights. A value above 0 disables the fast attention kernels on CPU.
        max_position_embeddings (`int`, defaults to 200):
            Longest input, including the [MASK] at its end.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial weights.
        layer_norm_eps (`float`, defaults to 1e-12):
            Epsilon of the layer normalisations.
        position_embedding_type (`str`, defaults to `"rotary"`):
            How positions are encoded: `"rotary"` (RoPE, https://arxiv.org/abs/2104.09864), `"learned_from_start"`
            (a learned vector per position, counted from the oldest item) or `"learned_from_end"` (the same, counted
            back from the newest item).
        rope_theta (`float`, defaults to 10000.0):
            Base of the rotary frequencies.
        normalization (`str`, defaults to `"pre"`):
            Place of the LayerNorms: `"pre"` (before each sublayer, and one after the last layer) or `"post"` (after the
            embeddings and after each residual connection, as in BERT).
        causal_attention (`bool`, defaults to `False`):
            Whether an item attends only to the items before it, and a [MASK] only to the items before it. In training,
            a [MASK] is then added for every item of a history, so that one pass predicts all items, each from those
            before it. `False` is the bidirectional attention of the paper.
        filter_share (`float`, defaults to 0.0):
            Share of every attention, from 0 to 1, that is a filter of the items before a token instead (after BSARec,
            Shin et al., AAAI 2024, https://arxiv.org/abs/2312.10325; see `Bert4RecFilter`). The filter tells apart what
            a user did last and what the user did for long. It needs `causal_attention`. 0 is the attention of the
            paper.
        prediction_head (`bool`, defaults to `False`):
            Whether a dense layer, GELU and LayerNorm follow the encoder, as in the paper (equation 7).
        item_loss (`str`, defaults to `"softmax"`):
            Loss of `forward(labels=...)` in training: `"softmax"` is the cross-entropy over all items;
            `"sampled_softmax"`, `"bpr"` and `"gbce"` compare the label with sampled items (see losses.py).
        gbce_calibration (`float`, defaults to 0.75):
            The parameter t of `"gbce"`, from 0 (binary cross-entropy) to 1 (the least overconfident scores).
        num_transitions (`int`, defaults to 0):
            Number of successors to keep for each item; 0, as in the paper, for none. Transitions are counted in the log
            by `keep_transitions`, and added to the scores wherever items are ranked.
        transition_weight (`float`, defaults to 1.0):
            Weight of the transitions in the scores.
        next_item_weight (`float`, defaults to 0.0):
            Weight of the next items in the scores, with `num_transitions`: an item that directly followed the history's
            newest item with probability p scores `next_item_weight` * ln(1 + 20 p) more.
        popularity_weight (`float`, defaults to 20.0):
            Weight of log-popularity in the scores of an empty history, with `num_transitions`. The default outweighs
            the network, which has hardly seen empty histories in training.
        repeat_weight (`float`, defaults to 0.0):
            Weight of repeats in the scores: an item that the history has n times scores `repeat_weight` * ln(1 + n)
            more. 0, as in the paper, adds nothing.
        recency_weight (`float`, defaults to 0.0):
            Weight of the recency of repeats in the scores: an item that the history last had n items before its newest
            item scores `recency_weight` / 2 ** n more. 0, as in the paper, adds nothing. With event types, repeats
            count events of the type that is recommended for, and an item scores `recency_weight` * ln(1 + 20 p) more
            if items with which the same was last done were the next target with probability p.
        num_item_features (`int`, defaults to 0):
            Number of numbers that the tokenizer's `item_features` makes of an item; 0 for a catalogue without features.
            From them, the model makes vectors of items that it has not been trained on; see `add_items`.
        new_item_offset (`float`, defaults to 0.0):
            Value that is added to the biases of items whose vectors were made from features. It was chosen on
            validation, so that new items are recommended as often as it pays.
        withdrawn_item_ids (`list[int]`, *optional*):
            Token ids of items that are never recommended any more. They still count as items of a history.
        num_event_types (`int`, defaults to 0):
            Number of types of events, such as view and purchase. An embedding of the type is added to the item vector
            at the input. 0: events have no types.
        target_event_type_ids (`list[int]`, *optional*):
            Ids of the types that are predicted, from 1 to `num_event_types`; the first is the default of serving.
        pad_in_softmax (`bool`, defaults to `False`):
            Whether [PAD] has a score and takes part in the full softmax, as in RecBole. This is for converted models.
            [PAD] itself is never recommended.
        filter_seen_items (`bool`, defaults to `False`):
            Whether serving never recommends the items of a user's history. The item loss then excludes these items too,
            so that the model learns nothing about repeats. With event types, these are only the items that the history
            has with the type that is predicted: what was viewed or put into the cart can still be bought.
    """

    model_type = "bert4rec"
    keys_to_ignore_at_inference = ["prediction_states"]

    vocab_size: int = 1003
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 256
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.0
    max_position_embeddings: int = 200
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    position_embedding_type: Literal["rotary", "learned_from_start", "learned_from_end"] = "rotary"
    rope_theta: float | int = 10000.0
    normalization: Literal["pre", "post"] = "pre"
    causal_attention: bool = False
    filter_share: float | int = 0.0
    prediction_head: bool = False
    item_loss: Literal["softmax", "sampled_softmax", "bpr", "gbce"] = "softmax"
    gbce_calibration: float | int = 0.75
    num_transitions: int = 0
    transition_weight: float | int = 1.0
    next_item_weight: float | int = 0.0
    popularity_weight: float | int = 20.0
    repeat_weight: float | int = 0.0
    recency_weight: float | int = 0.0
    num_item_features: int = 0
    new_item_offset: float | int = 0.0
    withdrawn_item_ids: list[int] | None = None
    num_event_types: int = 0
    target_event_type_ids: list[int] | None = None
    pad_in_softmax: bool = False
    filter_seen_items: bool = False
    pad_token_id: int | None = PAD_TOKEN_ID
    mask_token_id: int | None = MASK_TOKEN_ID
    unk_token_id: int | None = UNK_TOKEN_ID
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(sorted(ACT2FN))}; got {self.hidden_act!r}")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name, largest in LARGEST.items():
            if getattr(self, name) > largest:
                raise ValueError(f"{name} must be at most {largest:,}; got {getattr(self, name)}")
        for name, fixed in (("pad", PAD_TOKEN_ID), ("mask", MASK_TOKEN_ID), ("unk", UNK_TOKEN_ID)):
            given = getattr(self, f"{name}_token_id")
            if given not in (fixed, None):
                raise ValueError(f"{name}_token_id is {fixed} in every catalogue; got {given}: leave it out")
        for type_id in self.target_event_type_ids or ():
            if not 1 <= type_id <= self.num_event_types:
                raise ValueError(
                    f"target_event_type_ids must lie between 1 and num_event_types, {self.num_event_types}; got "
                    f"{type_id}"
                )
        for name in ("num_transitions", "num_item_features", "num_event_types"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        for token_id in self.withdrawn_item_ids or ():
            if not FIRST_ITEM_ID <= token_id < self.vocab_size:
                raise ValueError(f"withdrawn_item_ids must be token ids of items; got {token_id}")
        for name in ("transition_weight", "next_item_weight", "popularity_weight", "repeat_weight", "recency_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}")
        if not self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be True, since input and output share the item vectors; got False"
            )
        if self.causal_attention and self.position_embedding_type == "learned_from_end":
            raise ValueError(
                "causal_attention needs positions that do not depend on later items; got position_embedding_type "
                "learned_from_end: choose rotary or learned_from_start"
            )
        if not 0 <= self.filter_share <= 1:
            raise ValueError(f"filter_share must lie between 0 and 1; got {self.filter_share}")
        if self.filter_share and not self.causal_attention:
            raise ValueError(
                f"filter_share {self.filter_share} needs causal_attention, since the filter reads the items before a "
                "token: set causal_attention to true, or filter_share to 0"
            )
        if not 0 <= self.gbce_calibration <= 1:
            raise ValueError(f"gbce_calibration must lie between 0 and 1; got {self.gbce_calibration}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads; got {self.hidden_size} and "
                f"{self.num_attention_heads}: choose for example hidden_size="
                f"{(self.hidden_size // self.num_attention_heads + 1) * self.num_attention_heads}"
            )
        if self.position_embedding_type == "rotary" and self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                "rotary positions need heads of an even width; got hidden_size / num_attention_heads = "
                f"{self.hidden_size} / {self.num_attention_heads}: choose other sizes or learned positions"
            )
        if self._auto_class is None:
            # auto_map and custom_pipelines name code in the folder that was read (hub/publish_code.py), which a copy of
            # the folder may lack. Only classes that were loaded from this code, by `trust_remote_code`, need them.
            kwargs = {name: value for name, value in kwargs.items() if name not in ("auto_map", "custom_pipelines")}
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """A config from the content of config.json. Keys that name code to run are left out; see `CODE_KEYS`.

        Args:
            config_dict: The content.
            kwargs: As in Transformers.

        Raises:
            ValueError: If a value has another type, or does not fit the others.
        """
        given = {name: value for name, value in config_dict.items() if name not in CODE_KEYS}
        if not isinstance(given.get("quantization_config", {}), Mapping):
            raise ValueError(f"quantization_config must be a mapping; got {given['quantization_config']!r:.80}")
        try:
            return super().from_dict(given, **kwargs)
        except (StrictDataclassError, AttributeError, LookupError, TypeError) as error:
            problem = " ".join(str(error).split())
            raise ValueError(f"expected the content of a config.json of this package; {problem}") from error
