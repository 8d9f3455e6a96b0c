"""The smallest content of a file of a prepared folder or a model folder that its readers take."""

from typing import Any


def preparation_of(source: str = "log.csv", **changes: Any) -> dict[str, Any]:
    """The content of preparation.json."""
    return {
        "source": source,
        "columns": {},
        "filters": {},
        "split": {"name": "leave-one-out"},
        "max_length": 50,
        "filter_seen_items": False,
        "statistics": {"num_training_events": 5, "num_training_users": 2},
    } | changes
