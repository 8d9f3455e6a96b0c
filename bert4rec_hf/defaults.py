"""Defaults derived from the log; docs/concepts/defaults.md has the rules side by side, and what they give."""

from collections.abc import Mapping
from typing import Any

# Input lengths that are chosen from.
LENGTH_CHOICES = (50, 100, 200)
# Share of repeated events below which seen items are filtered.
FILTER_SEEN_BELOW = 0.05
# Number of training events from which on a model is 128 wide.
WIDE_FROM_EVENTS = 500_000
# Items are rare below this number of events an item. The model is then 256 wide, with high dropout.
RARE_BELOW_EVENTS_PER_ITEM = 30
# Number of items above which a model keeps no transitions, and is not 256 wide.
LARGE_CATALOGUE = 100_000
# Width of an attention head.
HEAD_WIDTH = 32
# Weight of repeats where seen items are kept.
REPEAT_WEIGHT = 1.0


def default_max_length(history_length_p75: float) -> int:
    """The smallest of `LENGTH_CHOICES` that holds three quarters of the histories whole, else the largest."""
    return next((length for length in LENGTH_CHOICES if length >= history_length_p75), LENGTH_CHOICES[-1])


def default_filter_seen_items(share_repeated_events: float) -> bool:
    """Whether to leave out seen items: where people come back in fewer than `FILTER_SEEN_BELOW` of events."""
    return share_repeated_events < FILTER_SEEN_BELOW


def default_architecture(num_events: int, num_items: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of `Bert4RecConfig`, what a new model has unless it is told (benchmarks/results/ablations.md).

    64 wide, 128 from half a million training events on; 256 where items are rare, with fewer than 30 events each, of
    at most 100,000; dropout .1, or .5 where they are rare; heads of 32; gated SiLU feed-forward layers with as many
    weights as plain ones four times as wide have; 64 transitions an item, of at most 100,000; where seen items are
    kept, a `repeat_weight` of 1.

    Args:
        num_events, num_items: Of the training part and the catalogue.
        given: Fields that are told, from which the others follow.
    """
    are_rare = _are_rare(num_events, num_items)
    hidden_size = 64 if num_events < WIDE_FROM_EVENTS else 128
    if are_rare and num_items <= LARGE_CATALOGUE:
        hidden_size = 256
    hidden_size = given.get("hidden_size", hidden_size)
    chosen: dict[str, Any] = {
        "hidden_size": hidden_size,
        "hidden_dropout_prob": 0.5 if are_rare else 0.1,
        "num_transitions": default_num_transitions(num_items),
        "transition_weight": default_transition_weight(num_events, num_items),
        "repeat_weight": 0.0 if given.get("filter_seen_items", False) else REPEAT_WEIGHT,
    }
    if hidden_size % HEAD_WIDTH == 0:
        chosen["num_attention_heads"] = hidden_size // HEAD_WIDTH
    if given.get("gated_feed_forward", True):
        width = max(1, 8 * hidden_size // 3 // HEAD_WIDTH) * HEAD_WIDTH
        chosen |= {"gated_feed_forward": True, "hidden_act": "silu", "intermediate_size": width}
    else:
        chosen["intermediate_size"] = 4 * hidden_size
    return chosen | dict(given)


def default_start_with_mean(num_events: int, num_items: int) -> bool:
    """Whether a new model's first layer starts by handing the mean of a history on, see `start_from_cooccurrence`.

    It saves small logs two thirds of their epochs; large ones end no better, and rare items worse.
    """
    return num_events < WIDE_FROM_EVENTS and not _are_rare(num_events, num_items)


def default_num_transitions(num_items: int) -> int:
    """Of each item: 64, and none where items are too many."""
    return 64 if num_items <= LARGE_CATALOGUE else 0


def default_transition_weight(num_events: int, num_items: int) -> float:
    """Of transitions in the scores: 20 by the events an item, between .25 and 1.5.

    The rarer items are, the less of them has been learnt.
    """
    return min(1.5, max(0.25, 20 * num_items / max(1, num_events)))


def default_batch_size(num_rows: int) -> int:
    """Histories a step of all processes together: 32, doubled while an epoch has more than 500 steps, 1,024 at most.

    Small batches learn fastest a history; a large log has enough histories for larger ones.
    """
    batch_size = 32
    while batch_size < 1024 and num_rows > 500 * batch_size:
        batch_size *= 2
    return batch_size


def default_mask_ratio(mean_length: float) -> float:
    """.2, or .4 where rows have fewer than 20 items on average, of which a fifth is few."""
    return 0.4 if mean_length < 20 else 0.2


def default_learning_rate(hidden_size: int) -> float:
    """.002, or .001 for a model 256 wide or wider."""
    return 2e-3 if hidden_size < 256 else 1e-3


def _are_rare(num_events: int, num_items: int) -> bool:
    return num_events < RARE_BELOW_EVENTS_PER_ITEM * num_items
