"""Defaults derived from the log. docs/concepts/defaults.md lists all rules, with the metrics that they lead to."""

from collections.abc import Mapping
from typing import Any

# The input lengths that `default_max_length` chooses from.
LENGTH_CHOICES = (50, 100, 200)
# Share of repeated events below which seen items are filtered.
FILTER_SEEN_BELOW = 0.05
# Models have width 128 from this number of training events on.
WIDE_FROM_EVENTS = 500_000
# Items are rare below this number of training events per item. The model then has width 256 and high dropout.
RARE_BELOW_EVENTS_PER_ITEM = 30
# With causal attention, an epoch predicts about this number of items, but at least this share of its items.
PREDICTED_ITEMS, MIN_CAUSAL_MASK_RATIO = 120_000, 0.25
# Above this number of items, a model has no transitions, and its width is not raised to 256.
LARGE_CATALOGUE = 100_000
# Share of causal attention that is a filter where seen items are filtered; see benchmarks/results/networks.md. A filter
# carries the newest item into the scores, which does not help where that item may be recommended again.
FILTER_SHARE = 0.3
# Width of an attention head.
HEAD_WIDTH = 32
# Weights of next items and of repeats where seen items are kept, and the part of the transition weight that is left.
NEXT_ITEM_WEIGHT, REPEAT_WEIGHT, TRANSITION_SHARE = 1.0, 1.0, 0.25
# Weight of recency with event types, where it is a conversion score.
CONVERSION_WEIGHT = 1.0
# An update of a model with new events: number of epochs over these and as many old ones, share of the learning rate of
# a new model, and share of the steps that warm up. Training was no better than new counts beside the same network; see
# benchmarks/results/updates.md.
UPDATE_EPOCHS, UPDATE_LEARNING_RATE, UPDATE_WARMUP = 0.0, 0.5, 0.1
# Maximum number of users that are ranked if the histories are streamed. The ranking rows are in memory.
STREAMED_EVAL_SAMPLES = 50_000


def default_max_length(history_length_p75: float) -> int:
    """The shortest of `LENGTH_CHOICES` that three quarters of the histories fit into, or else the longest.

    Args:
        history_length_p75: 75th percentile of the history lengths.
    """
    return next((length for length in LENGTH_CHOICES if length >= history_length_p75), LENGTH_CHOICES[-1])


def default_filter_seen_items(share_repeated_events: float) -> bool:
    """Whether serving leaves out seen items: True if the share of repeated events is below `FILTER_SEEN_BELOW`."""
    return share_repeated_events < FILTER_SEEN_BELOW


def default_architecture(num_events: int, num_items: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Bert4RecConfig` for a new model.

    docs/concepts/defaults.md says what these choices rest on.

    - Width: 64, and 128 from 500,000 training events on. If items are rare (fewer than 30 events per item) and there
      are at most 100,000 of them, 256. Attention heads have width 32.
    - Dropout: .1, and .5 if items are rare.
    - Attention: causal, unless the positions are learned from the end. Where it is causal and seen items are filtered,
      .3 of it is a filter.
    - Feed-forward layers: gated SiLU, with as many weights as ungated layers of four times the width.
    - Transitions: 64 per item for at most 100,000 items, otherwise none.
    - Weights of counted scores: `next_item_weight` and `repeat_weight` are 1 if seen items are kept, otherwise 0; with
      event types, `next_item_weight` and `recency_weight` are 1 in any case. See `default_transition_weight`.

    Args:
        num_events: Number of events in the training part.
        num_items: Number of items in the catalogue.
        given: Fields that are fixed by the user. The other fields are derived from them.

    Returns:
        The derived fields and the given ones.
    """
    are_rare = _are_rare(num_events, num_items)
    hidden_size = 64 if num_events < WIDE_FROM_EVENTS else 128
    if are_rare and num_items <= LARGE_CATALOGUE:
        hidden_size = 256
    hidden_size = given.get("hidden_size", hidden_size)
    filter_seen_items = given.get("filter_seen_items", False)
    causal_attention = given.get("causal_attention", given.get("position_embedding_type") != "learned_from_end")
    chosen: dict[str, Any] = {
        "hidden_size": hidden_size,
        "hidden_dropout_prob": 0.5 if are_rare else 0.1,
        "causal_attention": causal_attention,
        "filter_share": FILTER_SHARE if causal_attention and filter_seen_items else 0.0,
        "num_transitions": default_num_transitions(num_items),
        "transition_weight": default_transition_weight(num_events, num_items, filter_seen_items),
        "next_item_weight": 0.0 if filter_seen_items and not given.get("num_event_types") else NEXT_ITEM_WEIGHT,
        "repeat_weight": 0.0 if filter_seen_items else REPEAT_WEIGHT,
    }
    if given.get("num_event_types"):
        chosen["recency_weight"] = CONVERSION_WEIGHT
    if hidden_size % HEAD_WIDTH == 0:
        chosen["num_attention_heads"] = hidden_size // HEAD_WIDTH
    if given.get("gated_feed_forward", True):
        width = max(1, 8 * hidden_size // 3 // HEAD_WIDTH) * HEAD_WIDTH
        chosen |= {"gated_feed_forward": True, "hidden_act": "silu", "intermediate_size": width}
    else:
        chosen["intermediate_size"] = 4 * hidden_size
    return chosen | dict(given)


def default_start_with_mean(num_events: int, num_items: int) -> bool:
    """Whether the first layer of a new model starts by averaging the history; see `start_from_cooccurrence`.

    In exploratory runs, this start saved epochs on small logs. It made the result worse on a large log and on a log
    with rare items.
    """
    return num_events < WIDE_FROM_EVENTS and not _are_rare(num_events, num_items)


def default_num_transitions(num_items: int) -> int:
    """Number of transitions per item: 64, or 0 for more than `LARGE_CATALOGUE` items."""
    return 64 if num_items <= LARGE_CATALOGUE else 0


def default_transition_weight(num_events: int, num_items: int, filter_seen_items: bool = True) -> float:
    """Weight of the transitions in the scores: 20 / (events per item), between .25 and 1.5.

    The fewer events an item has, the less the network has learnt about it, and the more the counts help. If seen items
    are kept, the weight is a quarter of this: transitions leave out that an item follows itself, so they would
    push down what users come back to.
    """
    weight = min(1.5, max(0.25, 20 * num_items / max(1, num_events)))
    return weight if filter_seen_items else TRANSITION_SHARE * weight


def default_train_item_features(num_events: int, num_items: int) -> bool:
    """Whether item features train together with the item vectors: if items are rare.

    Where items have many events, their own vectors say more than their features, and validation is worse with both.
    """
    return _are_rare(num_events, num_items)


def default_batch_size(num_rows: int) -> int:
    """Number of rows per training step, over all processes: 32, doubled while an epoch has more than 500 steps.

    The maximum is 1,024. Small batches learn most from each row. A large log has enough rows for larger batches.
    """
    batch_size = 32
    while batch_size < 1024 and num_rows > 500 * batch_size:
        batch_size *= 2
    return batch_size


def default_mask_ratio(mean_length: float, num_rows: int, causal_attention: bool) -> float:
    """Probability that an item is predicted.

    - Causal attention: so many that an epoch predicts about 120,000 items, but at least a quarter of its items.
      Predicting an item hides it from no other, so a small log has all items predicted. In a large log, this would take
      more time than it gains.
    - Bidirectional attention: .2, or .4 if rows have fewer than 20 items on average, as .2 of these would be too few.

    Args:
        mean_length: Mean number of items in the training rows, each cut to the length of the model.
        num_rows: Number of training rows in an epoch.
        causal_attention: Whether the model has causal attention.
    """
    if causal_attention:
        return float(min(1.0, max(MIN_CAUSAL_MASK_RATIO, PREDICTED_ITEMS / max(1.0, mean_length * num_rows))))
    return 0.4 if mean_length < 20 else 0.2


def default_num_train_epochs(num_events: int, num_items: int) -> float:
    """20, or 10 if items are rare: the network then learns them by heart before it has seen them 20 times."""
    return 10.0 if _are_rare(num_events, num_items) else 20.0


def default_learning_rate(hidden_size: int) -> float:
    """.002, or .001 for models of width 256 or more."""
    return 2e-3 if hidden_size < 256 else 1e-3


def _are_rare(num_events: int, num_items: int) -> bool:
    return num_events < RARE_BELOW_EVENTS_PER_ITEM * num_items
