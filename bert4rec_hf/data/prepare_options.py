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
        delimiter: Of CSV files. None: the comma, tab, semicolon or bar that the header has most of.
        where: A condition in SQL that events must meet, such as "event_type = 'purchase' AND price > 0". It may name
            any column of the log. The syntax is DuckDB's, or that of Spark if the log is on Spark. None: all events.
        user_column: Column of the user ids: text or integers, which are cast to text.
        item_column: Column of the item ids: text or integers, which are cast to text.
        time_column: Column of the times: numbers or timestamps. Decimals are converted to int64, or to float64 if they
            have decimal places. None: the log has only a sequence column.
        sequence_column: Column of numbers or timestamps that orders events of the same time, or all events of a log
            without times. With it, the order of the rows in the log does not matter. None: no sequence column, except
            that a log without the column "timestamp" is ordered by its column "position" if it has one.
        rating_column: Column of the ratings, which `min_rating` filters by.
        min_rating: Events rated lower, or not rated (null or NaN), are left out.
        min_user_events: Users with fewer events are left out. Users and items are filtered in turns until nothing
            changes (the k-core).
        max_user_events: Users with more events (bots, shared accounts) are left out, before anything else is counted.
            None: no limit.
        min_item_events: Items with fewer events are left out.
        duplicates: What happens to a user's repeated events of an item. "keep" keeps all of them. "drop" keeps the
            first. "drop_consecutive" drops an event if the user's previous event has the same item. "drop_identical"
            keeps one of the events with the same user, item, time and sequence number, for logs that contain events
            twice by mistake.
        event_columns: Columns of the log that are copied into the histories.
        event_type_column: Column of the types of the events, such as view, cart and purchase: text or integers, which
            are cast to text. The histories have the types, and the model reads them. None: all events are alike.
        target_event_types: The types that are predicted. Targets, labels, seen items and popularity are those of events
            of these types. The first is the default of serving. Empty: all types are predicted.
        weight_column: Column of the weights of the events, finite numbers of at least 0. The weight of an event scales
            its loss where it is a label in training. None: all weigh the same.
        split: How targets are held out. "leave-one-out": a user's last item is the test target, and the second last
            the validation target. Users with fewer than 3 events train only. The k-core is that of the whole log.
            "temporal": one cut in time for all users. A user's target is the first event at or after the cut. The
            k-core is that of the events before the validation cut. It decides which users train; all users and events
            stay. "none": there are no targets and all events train. This is for the model that serves, after its
            recipe has been evaluated with another split.
        validation: Whether validation targets are held out. False: these events train, and a temporal split has one
            cut.
        validation_cut: Cut of a temporal split: events before it train. It is a share of all events between 0 and 1, a
            value of the time column, or an ISO date in UTC. If times are numbers, a date is converted to seconds since
            1970, or to milli-, micro- or nanoseconds if the numbers are that large. None: 0.8.
        test_cut: Cut of the test part, in the same forms as `validation_cut`. None: 0.9.
        item_titles: Titles by raw item id, or a file of CSV, JSON lines or Parquet with `item_column`
            and a column `title`.
        items: The item table, CSV, JSON lines or Parquet with `item_column`, one row per item, and any columns. It
            goes into the prepared folder and the model folder. Its column `title` has the titles, unless `item_titles`
            has them. None: no item table, except that of a named dataset if there are item features.
        item_features: Columns of the item table from which vectors of new items are made, as `NAME`, `NAME:KIND` or
            `NAME:categories:SEPARATOR`; see `item_tables.feature_columns`.
        text_encoder: Name or folder of a sentence-transformers model that encodes the features of the kind text.
        max_length: Longest input of the model, the [MASK] included. None: `default_max_length`.
        filter_seen_items: Whether serving leaves out a user's past items. None: `default_filter_seen_items`.

    Raises:
        TypeError: If `event_columns`, `target_event_types` or `item_features` is a string.
        ValueError: If a value is out of range, or a cut is given where nothing is cut.
    """

    delimiter: str | None = field(
        default=None, metadata={"help": "Delimiter of CSV files; found in the header if left out."}
    )
    where: str | None = field(
        default=None,
        metadata={"help": "Condition in SQL that events must meet, such as \"event_type = 'purchase'\"."},
    )
    user_column: str = field(default="user_id", metadata={"help": "Column of the user ids."})
    item_column: str = field(default="item_id", metadata={"help": "Column of the item ids."})
    time_column: str | None = field(default="timestamp", metadata={"help": "Column of the times."})
    sequence_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that orders events of the same time, or all events of a log without times; by default "
            "position, if a log without times has that column."
        },
    )
    rating_column: str = field(default="rating", metadata={"help": "Column of the ratings, for --min_rating."})
    min_rating: float | None = field(default=None, metadata={"help": "Leave out events rated lower."})
    min_user_events: int = field(default=1, metadata={"help": "Leave out users with fewer events."})
    max_user_events: int | None = field(
        default=None, metadata={"help": "Leave out users with more events, as bots have."}
    )
    min_item_events: int = field(default=1, metadata={"help": "Leave out items with fewer events."})
    duplicates: str = field(
        default="keep",
        metadata={
            "choices": DUPLICATES,
            "help": "What happens to a user's repeated events of an item. keep: all stay; drop: the first stays; "
            "drop_consecutive: the first of each run stays; drop_identical: one of those with the same time stays.",
        },
    )
    event_columns: list[str] = field(
        default_factory=list, metadata={"action": "extend", "help": "Columns to copy into the histories."}
    )
    event_type_column: str | None = field(
        default=None, metadata={"help": "Column of the types of the events, which the model reads."}
    )
    target_event_types: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Types of --event_type_column that are predicted, such as purchase; all types if left out.",
        },
    )
    weight_column: str | None = field(
        default=None,
        metadata={"help": "Column of numbers, at least 0, that scale the loss of an event that is predicted."},
    )
    split: str = field(
        default="leave-one-out",
        metadata={
            "choices": SPLITS,
            "help": "How targets are held out. leave-one-out: the last two items of each user; temporal: the first "
            "event after a cut in time; none: no targets, all events train, for the model that serves.",
        },
    )
    validation: bool = field(default=True, metadata={"help": "Hold out validation targets as well as test targets."})
    # The command line parses the second type of a union, here text, which `resolve_cuts` converts.
    validation_cut: float | str | date | None = field(
        default=None,
        metadata={
            "help": "Temporal split: where the validation part begins, as a share of the events, a time or an ISO "
            "date; default 0.8."
        },
    )
    test_cut: float | str | date | None = field(
        default=None,
        metadata={
            "help": "Temporal split: where the test part begins, as a share of the events, a time or an ISO date; "
            "default 0.9."
        },
    )
    item_titles: Mapping[str, str] | str | Path | None = field(
        default=None, metadata={"help": "File of titles (CSV, JSON lines, Parquet), with the item column and title."}
    )
    items: str | Path | None = field(
        default=None, metadata={"help": "File of items (CSV, JSON lines, Parquet), one row each, with the item column."}
    )
    item_features: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Columns of --items from which vectors of new items are made: NAME, NAME:KIND (category, "
            "categories, number, boolean, vector, text), or NAME:categories:SEPARATOR.",
        },
    )
    text_encoder: str | None = field(
        default=None,
        metadata={"help": "Name or folder of a sentence-transformers model, for features of the kind text."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest input of the model; chosen from the log if left out."}
    )
    filter_seen_items: bool | None = field(
        default=None, metadata={"help": "Never recommend a user's past items; chosen from the log if left out."}
    )

    def __post_init__(self) -> None:
        for name in ("event_columns", "target_event_types", "item_features"):
            given = getattr(self, name)
            if isinstance(given, str):
                raise TypeError(f"{name} must be a list of columns; got {given!r}: did you mean [{given!r}]?")
        if self.target_event_types and self.event_type_column is None:
            raise ValueError(
                f"target_event_types need an event_type_column; got {', '.join(self.target_event_types)} without one: "
                "name the column of the types with --event_type_column"
            )
        if len(set(self.target_event_types)) < len(self.target_event_types):
            raise ValueError(
                f"target_event_types must differ from each other; got {', '.join(self.target_event_types)}"
            )
        for name, choices in (("duplicates", DUPLICATES), ("split", SPLITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("min_user_events", "min_item_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, which leaves nothing out; got {getattr(self, name)}")
        if self.max_user_events is not None and self.max_user_events < self.min_user_events:
            raise ValueError(
                f"max_user_events must be at least min_user_events ({self.min_user_events}); got {self.max_user_events}"
            )
        if self.delimiter is not None and not 1 <= len(self.delimiter.encode()) <= 4:
            raise ValueError(f"delimiter must have one to four bytes; got {self.delimiter!r}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, an item and the [MASK] after it; got {self.max_length}")
        for name in ("validation_cut", "test_cut"):
            cut = getattr(self, name)
            if cut is not None and self.split != "temporal":
                raise ValueError(
                    f"{name} is for --split temporal; got {cut} with the split {self.split}: leave it out, or choose "
                    "--split temporal"
                )
        if self.validation_cut is not None and not self.validation:
            raise ValueError(
                f"validation_cut needs validation targets; got {self.validation_cut} with --validation false: leave "
                "one of the two out"
            )

    @classmethod
    def of(cls, options: "PrepareOptions | None", changes: Mapping[str, Any]) -> "PrepareOptions":
        """Return the options, or the defaults, with some fields changed.

        Args:
            options: None: the defaults.
            changes: New values by field name.

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
