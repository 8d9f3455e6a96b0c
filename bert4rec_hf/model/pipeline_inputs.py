# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""What a request to the pipeline may be: histories and lists of items, checked and taken apart."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from .tokenization_bert4rec import is_history

# Keys of a request, and columns of histories.parquet that a request may have and that are ignored.
REQUEST_KEYS = ("history", "item_id", "exclude", "candidates", "event_type")
IGNORED_KEYS = ("user_id", "timestamp", "train_end", "validation_position", "test_position")
# Arguments of a call.
CALL_OPTIONS = (
    "top_k", "filter_seen_items", "exclude", "candidates", "index", "rules", "explain", "event_type", "batch_size",
    "num_workers",
)  # fmt: skip
# Types whose elements are no item ids, although they can be iterated over.
NO_LISTS = (bytes, bytearray, memoryview)


def check_keys(keys: Iterable[Any], ignored: Sequence[str] = IGNORED_KEYS) -> None:
    """Raise ValueError for a key of a request that would change nothing, such as a misspelled one.

    Args:
        keys: The keys of a request, or the columns of a table of requests.
        ignored: Keys that may stand beside those of a request.
    """
    for key in keys:
        if key in REQUEST_KEYS or key in ignored:
            continue
        if key in CALL_OPTIONS:
            raise ValueError(f"{key} is for all histories of a call: give it as an argument of the call")
        nearest = get_close_matches(str(key), REQUEST_KEYS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"a history may have {', '.join(REQUEST_KEYS)}"
        raise ValueError(f"unknown key {key!r} beside a history: {hint}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError if a value is neither None nor a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


def is_one_history(inputs: Any) -> bool:
    if isinstance(inputs, str):
        raise ValueError(f"expected a list of item ids; got the string {inputs!r}: did you mean [{inputs!r}]?")
    if hasattr(inputs, "columns"):
        raise ValueError("expected histories, got a table: give its column of item ids, as in frame['item_id']")
    is_stream = hasattr(inputs, "__getitem__") and not hasattr(inputs, "ndim")  # a torch Dataset has no __iter__
    if isinstance(inputs, (*NO_LISTS, set, frozenset)) or not (is_history(inputs) or is_stream):
        raise ValueError(
            f"expected a history, a list of item ids, oldest first, or many histories; got {described(inputs)}"
        )
    if not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__"):
        return False
    if len(inputs) == 0:
        # An empty list or array is one history; an empty dataset has no history.
        return isinstance(inputs, list | tuple) or hasattr(inputs, "dtype")
    first = next(iter(inputs))  # inputs[0] would look up a label in a pandas Series
    return not is_history(first) or is_event(first)


def is_event(value: Any) -> bool:
    """Whether a value is an item as a dictionary with item_id and event_type, and no mapping of a history."""
    return isinstance(value, Mapping) and "item_id" in value and not is_history(value["item_id"])


def events_of(history: Any, types: Any = None) -> tuple[list[Any], list[Any]]:
    """The items of a history, and the names of their types.

    Args:
        history: A list of item ids and of dictionaries with item_id and event_type.
        types: The types beside the items, in place of dictionaries. None: they are in the dictionaries.

    Returns:
        The item ids, and the names of the types, None for an item without one.

    Raises:
        ValueError: If a dictionary has other keys, or there are types for another number of items.
    """
    items: list[Any] = list(item_list("the history", history))
    names: list[Any] = [None] * len(items)
    if types is not None:
        if isinstance(types, str) or not is_history(types):
            raise ValueError(f"event_type beside a history must be a list, one type for each item; got {types!r:.80}")
        names = list(types)
        if len(names) != len(items):
            raise ValueError(f"event_type has {len(names)} types for {len(items)} items; expected one for each item")
    for place, item in enumerate(items):
        if not is_event(item):
            continue  # an id, or what is none and raises where ids are looked up
        other = [name for name in item if name not in ("item_id", "event_type")]
        if other:
            raise ValueError(
                f"item {place} of the history (the first is 0) must have item_id and, if you like, event_type; got "
                f"{', '.join(map(str, item)) or 'no keys'}"
            )
        if types is not None and item.get("event_type") is not None:
            raise ValueError(f"item {place} of the history (the first is 0) has a type twice: leave one of them out")
        items[place] = item["item_id"]
        names[place] = names[place] if types is not None else item.get("event_type")
    return items, names


def length_of(history: Any) -> int:
    """The length of a history, or 0 if it is unknown before the history is read."""
    if isinstance(history, Mapping):
        history = history.get("history", history.get("item_id", ()))
    return len(history) if is_history(history) and hasattr(history, "__len__") else 0


def item_list(name: str, items: Any) -> list[str | int]:
    """The items as a list, because a generator would be exhausted after the first history."""
    if isinstance(items, str):
        raise ValueError(f"{name} must be a list of item ids; got the string {items!r}: did you mean [{items!r}]?")
    if isinstance(items, (*NO_LISTS, Mapping)) or hasattr(items, "columns") or not is_history(items):
        raise ValueError(f"{name} must be a list of item ids; got {described(items)}")
    if name in ("the history", "items") and isinstance(items, set | frozenset):
        order = ", oldest item first" if name == "the history" else ""
        raise ValueError(f"{name} must be a list{order}; got {described(items)}, which has no order")
    return list(items)


def described(value: Any) -> str:
    """A value and its type in an error message."""
    return "None" if value is None else f"{' '.join(repr(value).split()):.80} of type {type(value).__name__}"
