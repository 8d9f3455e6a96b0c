"""The options of `prepare`: one dataclass for the function, the command line, the recipe and the model card."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

DUPLICATES = ("keep", "drop", "drop_consecutive", "drop_identical")
SPLITS = ("leave-one-out", "temporal", "none")


@dataclass(frozen=True)
class PrepareOptions:
    """How a raw log becomes histories.

    Attributes:
        user_column: Text or integers; cast to text.
        item_column: Text or integers; cast to text.
        time_column: Numbers or timestamps; None for a log that has only a sequence column. Decimals become int64 or,
            if they have decimal places, float64.
        sequence_column: Numbers or timestamps that order the events of the same time, or all events if there is no
            time. With it, the order of the log's rows does not matter. None: no sequence; but a log without the
            default column "timestamp" is ordered by its column "position", if it has one.
        rating_column: Column that `min_rating` filters by.
        min_rating: Events rated lower, or not rated (null or NaN), are left out.
        min_user_events: Users with fewer events are left out. Users and items are filtered in turns until nothing
            changes (the k-core).
        min_item_events: Items with fewer events are left out.
        duplicates: What happens to a user's repeated events of an item. "keep": all stay. "drop": the first stays.
            "drop_consecutive": an event is left out if the user's event just before it has the same item.
            "drop_identical": of events with the same user, item, time and sequence one stays. A log that was sent
            twice has such events.
        event_columns: Columns of the log to carry along.
        split: How targets are held out. "leave-one-out": a user's last item is the test target, and the second last
            the validation target. Users with fewer than 3 events train only. The k-core is that of the whole log.
            "temporal": one cut in time for all users. A user's target is the first event at or after the cut. The
            k-core is that of the events before the validation cut. It decides who trains; all users and events stay.
            "none": no targets, all events train. This is for a model that serves, after a split has told how good it
            is.
        validation: Whether validation targets are held out. False: these events train, and a temporal split has one
            cut.
        validation_cut: Cut of a temporal split; events before it train. A share of all events between 0 and 1, a
            value of the time column, or an ISO date in UTC. If times are numbers, a date means seconds since 1970, or
            milli-, micro- or nanoseconds if the numbers are that large. None: 0.8.
        test_cut: Cut of the test part, given like `validation_cut`. None: 0.9.
        item_titles: Titles by raw item id, or a CSV or Parquet file with `item_column` and a column `title`.
        max_length: Longest input of the model. None: `default_max_length`.
        filter_seen_items: Whether serving leaves out a user's past items. None: `default_filter_seen_items`.

    Raises:
        TypeError: If `event_columns` is a string.
        ValueError: If a value is out of range, or a cut is given where nothing is cut.
    """

    user_column: str = field(default="user_id", metadata={"help": "Column of the user ids."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item ids."})
    time_column: str | None = field(default="timestamp", metadata={"help": "Column of the times."})
    sequence_column: str | None = field(
        default=None,
        metadata={
            "help": "Orders events of the same time, or all where there is no time; default there: position, if the "
            "log has it."
        },
    )
    rating_column: str = field(default="rating", metadata={"help": "Column of the ratings, for --min_rating."})
    min_rating: float | None = field(default=None, metadata={"help": "Leave out events rated lower."})
    min_user_events: int = field(default=1, metadata={"help": "Leave out users with fewer events."})
    min_item_events: int = field(default=1, metadata={"help": "Leave out items with fewer events."})
    duplicates: str = field(
        default="keep",
        metadata={
            "choices": DUPLICATES,
            "help": "A user's repeated events of an item: keep all, the first, the first of each run, or of those of "
            "the same time one.",
        },
    )
    event_columns: list[str] = field(
        default_factory=list, metadata={"action": "extend", "help": "Columns to carry along."}
    )
    split: str = field(
        default="leave-one-out",
        metadata={
            "choices": SPLITS,
            "help": "How targets are held out; none: all events train, for a model that serves.",
        },
    )
    validation: bool = field(
        default=True, metadata={"help": "Hold out validation targets too; false: only those of the test."}
    )
    # The command line reads the second type of a union: text, which `resolve_cuts` understands.
    validation_cut: float | str | date | None = field(
        default=None, metadata={"help": "Temporal split: a share of the events, a time or an ISO date; default 0.8."}
    )
    test_cut: float | str | date | None = field(
        default=None, metadata={"help": "Likewise, of the test part; default 0.9."}
    )
    item_titles: Mapping[str, str] | str | Path | None = field(
        default=None, metadata={"help": "CSV or Parquet file with the item column and a column title."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Of the model's input; chosen from the log if left out."}
    )
    filter_seen_items: bool | None = field(
        default=None, metadata={"help": "Never recommend a user's past items; chosen from the log if left out."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.event_columns, str):
            raise TypeError(
                f"event_columns must be a list of columns; got {self.event_columns!r}: did you mean "
                f"[{self.event_columns!r}]?"
            )
        for name, choices in (("duplicates", DUPLICATES), ("split", SPLITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("min_user_events", "min_item_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, which leaves nothing out; got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, an item and the [MASK] after it; got {self.max_length}")
        for name in ("validation_cut", "test_cut"):
            cut = getattr(self, name)
            if cut is not None and self.split != "temporal":
                raise ValueError(
                    f"{name} is for --split temporal; got {cut} with the split {self.split}: leave it out, or choose "
                    "that split"
                )
        if self.validation_cut is not None and not self.validation:
            raise ValueError(
                f"without validation targets there is no validation_cut; got {self.validation_cut}: leave it out, or "
                "--validation false"
            )

    @classmethod
    def of(cls, options: "PrepareOptions | None", changes: Mapping[str, Any]) -> "PrepareOptions":
        """The options, or the defaults, with some of them changed.

        Raises:
            TypeError: If a name is no option.
        """
        known = [option.name for option in dataclasses.fields(cls)]
        for name in changes:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else f"; expected {', '.join(known)}"
                raise TypeError(f"prepare has no option {name!r}{hint}")
        return dataclasses.replace(options or cls(), **changes)
