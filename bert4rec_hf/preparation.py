"""From a raw interaction log to one history a user, split for training, validation and test (Ibis).

Two tables matter. The *log* has one row an event: user, item, and a time or a sequence number. The
*histories* have one row a user: the item ids in order of time, and three integers that say which part of
them trains and which positions are the targets of validation and test. Whatever the protocol, the history
of a target is all that lies before its position.
"""

import glob
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow.parquet as pq

from .defaults import default_filter_seen_items, default_max_length
from .logs import SOURCE_ROW, connect, first_lines, read_log, read_titles
from .named_datasets import NAMED_DATASETS, fetch
from .splits import HISTORIES_FILE, PREPARATION_FILE
from .tokenization_bert4rec import Bert4RecTokenizer

logger = logging.getLogger(__name__)

RESERVED_COLUMNS = {"user_id", "item_id", "timestamp", "train_end", "validation_position", "test_position"}
WORKING_COLUMNS = {"_sequence", "_tie", "_rating", "_earlier", "_previous"}

ROW_GROUP_SIZE = 16_384

# A history with more events and a larger share of all is told.
LONGEST_OF_A_PERSON, SHARE_OF_A_PERSON = 10_000, 0.01

DEFAULT_VALIDATION_CUT, DEFAULT_TEST_CUT = 0.8, 0.9  # shares of the events


def histories(
    log: ir.Table,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = "timestamp",
    sequence_column: str | None = None,
    rating_column: str = "rating",
    min_rating: float | None = None,
    min_user_events: int = 1,
    min_item_events: int = 1,
    duplicates: str = "keep",
    event_columns: Sequence[str] = (),
    split: str = "leave-one-out",
    validation: bool = True,
    validation_cut: float | str | date | None = None,
    test_cut: float | str | date | None = None,
) -> ir.Table:
    """One history a user, from an Ibis table of events on DuckDB or Spark.

    Events are ordered by time, then by the sequence column if one is named, else by their row in the source
    where `read_log` noted it, else by a hash of the event. Never by item id: half the events of MovieLens
    100K share their predecessor's second, and a model would learn the sort.

    Args:
        log: One row an event.
        user_column: Text or integers; cast to text.
        item_column: Text or integers; cast to text.
        time_column: Numbers or timestamps; None for a log that has only a sequence column. Decimals become int64 or,
            if they have decimal places, float64.
        sequence_column: Numbers or timestamps that order the events of the same time (or all events, if there
            is no time). Then shuffling the rows of the log changes nothing. None, where the log has no column
            "timestamp", nor another named: "position", if it has that.
        rating_column: Needed for `min_rating` only.
        min_rating: Events rated lower, or not rated (null or NaN), are left out.
        min_user_events: Users with fewer events are left out,
        min_item_events: and items with fewer, in turns until nothing changes (the k-core).
        duplicates: "keep"; "drop": a user's later events of the same item are left out; "drop_consecutive":
            an event is left out if the user's event just before it has the same item; "drop_identical": of events of
            the same user, item, time and sequence all but one are left out, as a log may have that was sent twice.
        event_columns: Columns of the log to carry along.
        split: "leave-one-out": a user's last item is the test target, the second last that of validation,
            unless the user has fewer than 3 events. The k-core is that of the whole log. "temporal": one cut
            in time for all users; the targets are each user's first event at or after the cut. The k-core is
            that of the events before the validation cut; it decides who trains, all users and events stay.
            "none": no targets, all events train: for a model that serves, once a split has told how good it is.
        validation: False: no validation targets; what they are taken from trains, a temporal split has one cut.
        validation_cut: Of a temporal split: a share of all events between 0 and 1, or a value of the time column, or
            an ISO date (in UTC; a column of numbers is taken as seconds since 1970, or as milli-, micro- or
            nanoseconds if the numbers are that large). Events before it train. None: 0.8.
        test_cut: Likewise; None: 0.9.

    Returns:
        Sorted by user_id: user_id (string), item_id (array<string>), timestamp (array, if there is a time),
        an array for each of the event columns, train_end (int32: so many leading events train),
        validation_position and test_position (int32 or null: index of the target in item_id).

    Raises:
        ValueError: If a column is missing, serves twice or has the wrong type, nulls or empty ids; if there is only
            one user, or none left after the filter; if a cut leaves no event on one of its sides, or is given where
            nothing is cut.
    """
    table, _ = _histories(
        log,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        sequence_column=sequence_column,
        rating_column=rating_column,
        min_rating=min_rating,
        min_user_events=min_user_events,
        min_item_events=min_item_events,
        duplicates=duplicates,
        event_columns=event_columns,
        split=split,
        validation=validation,
        validation_cut=validation_cut,
        test_cut=test_cut,
    )
    return table


def prepare(
    source: Any,
    output: str | Path,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    time_column: str | None = "timestamp",
    sequence_column: str | None = None,
    rating_column: str = "rating",
    min_rating: float | None = None,
    min_user_events: int = 1,
    min_item_events: int = 1,
    duplicates: str = "keep",
    event_columns: Sequence[str] = (),
    split: str = "leave-one-out",
    validation: bool = True,
    validation_cut: float | str | date | None = None,
    test_cut: float | str | date | None = None,
    item_titles: Mapping[str, str] | str | Path | None = None,
    max_length: int | None = None,
    filter_seen_items: bool | None = None,
) -> dict[str, Any]:
    """Write the prepared folder: histories.parquet, the tokenizer (the catalogue) and preparation.json.

    Everything is written beside `output` and moved there when complete. A folder that an earlier call has
    written is replaced; files in it that are not ours stay.

    Args:
        source: A log as `read_log` takes it (a path, a pattern, a data frame), an Ibis table of events, or the name of
            one of `NAMED_DATASETS`.
        output: The folder to write.
        user_column, item_column, time_column, sequence_column, rating_column, min_rating, min_user_events,
            min_item_events, duplicates, event_columns, split, validation, validation_cut, test_cut: As in `histories`.
        item_titles: Titles by raw item id, or a CSV or Parquet file with `item_column` and a column `title`.
        max_length: Of the model's input; None: `default_max_length`.
        filter_seen_items: Whether serving leaves out a user's past items; None: `default_filter_seen_items`.

    Returns:
        The content of preparation.json.

    Raises:
        ValueError: As `read_log` and `histories`; also if no user has a target, if `output` holds something
            else, or if the titles fit no item.
    """
    output = Path(output)
    _check_output(output)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, an item and the [MASK] after it; got {max_length}")
    if isinstance(source, ir.Table):
        log, source = source, "ibis.Table"
    elif isinstance(source, str) and source in NAMED_DATASETS and not os.path.exists(source):
        dataset = fetch(source)
        item_titles = dataset.items if item_titles is None else item_titles
        log = read_log(dataset.log)
    else:
        log = read_log(source, id_columns=(user_column, item_column))
    if not isinstance(source, str | Path):
        source = f"{type(source).__module__.split('.')[0]}.{type(source).__name__}"
    table, origin = _histories(
        log,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        sequence_column=sequence_column,
        rating_column=rating_column,
        min_rating=min_rating,
        min_user_events=min_user_events,
        min_item_events=min_item_events,
        duplicates=duplicates,
        event_columns=event_columns,
        split=split,
        validation=validation,
        validation_cut=validation_cut,
        test_cut=test_cut,
    )
    destination = output.resolve()
    destination.parent.mkdir(parents=True, exist_ok=True)
    is_empty = destination.is_dir() and not any(destination.iterdir())  # and may be a volume, or somebody's directory
    beside = destination if is_empty else destination.parent
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{destination.name}-") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        _write_parquet(table, folder / HISTORIES_FILE)
        del table, log  # gives back the memory of the events before the statistics are counted

        written = connect().read_parquet(glob.escape(str(folder / HISTORIES_FILE)), hive_partitioning=False)
        catalogue = _item_counts(written, split, min_item_events)
        statistics = _statistics(written, catalogue, split) | origin["statistics"]
        longest = statistics["history_length"]["max"]
        if longest > LONGEST_OF_A_PERSON and longest > SHARE_OF_A_PERSON * statistics["num_events"]:
            of_whom = written.filter(written.item_id.length() == longest).user_id.max().to_pyarrow().as_py()
            logger.warning(
                "user %s has %s of %s events: if that is no person (a bot, a user id that stands for nobody known), "
                "leave it out of the log", of_whom, f"{longest:,}", f"{statistics['num_events']:,}",
            )  # fmt: skip
        if split != "none" and statistics["num_validation_targets"] + statistics["num_test_targets"] == 0:
            raise ValueError(
                f"none of the {statistics['num_users']} users has a target: leave-one-out needs {2 + validation} "
                f"events of a user, the longest history has {statistics['history_length']['max']}; loosen "
                "--min_rating, --min_item_events or --duplicates, or use --split temporal"
            )
        if max_length is None:
            max_length = default_max_length(statistics["history_length"]["p75"])
        if filter_seen_items is None:
            filter_seen_items = default_filter_seen_items(statistics["share_repeated_events"])
        preparation = {
            "source": str(source),
            "columns": {
                "user_column": user_column,
                "item_column": item_column,
                "time_column": origin["time_column"],
                "sequence_column": origin["sequence_column"],
                "rating_column": None if min_rating is None else rating_column,
                "event_columns": list(event_columns),
            },
            "filters": {
                "min_rating": min_rating,
                "min_user_events": min_user_events,
                "min_item_events": min_item_events,
                "duplicates": duplicates,
            },
            "split": origin["split"],
            "max_length": max_length,
            "filter_seen_items": filter_seen_items,
            "statistics": statistics,
        }
        _save_catalogue(folder, catalogue, read_titles(item_titles, item_column, catalogue), max_length)
        # Names what is ours, so that a later call replaces that and nothing else.
        preparation["files"] = sorted([*(path.name for path in folder.iterdir()), PREPARATION_FILE])
        (folder / PREPARATION_FILE).write_text(json.dumps(preparation, indent=2, ensure_ascii=False) + "\n", "utf-8")
        _move(folder, destination, Path(temporary) / "old")
    return preparation


def _histories(
    log: ir.Table,
    *,
    user_column: str,
    item_column: str,
    time_column: str | None,
    sequence_column: str | None,
    rating_column: str,
    min_rating: float | None,
    min_user_events: int,
    min_item_events: int,
    duplicates: str,
    event_columns: Sequence[str],
    split: str,
    validation: bool,
    validation_cut: float | str | date | None,
    test_cut: float | str | date | None,
) -> tuple[ir.Table, dict[str, Any]]:
    """The histories, and what only the log can tell: statistics of the source, the split with its cuts."""
    if not isinstance(log, ir.Table):
        raise TypeError(
            f"expected an Ibis table of events, got {type(log).__name__}: read_log makes one of files and data frames"
        )
    if isinstance(event_columns, str):
        raise TypeError(
            f"event_columns must be a list of columns; got {event_columns!r}: did you mean [{event_columns!r}]?"
        )
    for name, value, choices in (
        ("duplicates", duplicates, ("keep", "drop", "drop_consecutive", "drop_identical")),
        ("split", split, ("leave-one-out", "temporal", "none")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    for name, number in (("min_user_events", min_user_events), ("min_item_events", min_item_events)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, which leaves nothing out; got {number}")
    for name, cut in (("validation_cut", validation_cut), ("test_cut", test_cut)):
        if cut is not None and split != "temporal":
            raise ValueError(
                f"{name} is for --split temporal; got {cut} with the split {split}: leave it out, or choose that split"
            )
    if validation_cut is not None and not validation:
        raise ValueError(
            f"without validation targets there is no validation_cut; got {validation_cut}: leave it out, or "
            "--validation false"
        )
    if time_column == "timestamp" and time_column not in log.columns:  # the default, and a log that has no time
        if sequence_column is None and "position" in log.columns:
            sequence_column = "position"
        if sequence_column is not None:
            time_column = None
    if split == "temporal" and time_column is None:
        raise ValueError("a temporal split needs a time column (--time_column); a sequence has no common clock")

    try:  # a CSV file is parsed only now
        if log.limit(1).count().execute() == 0:
            raise ValueError("the log has columns but no events")
        events = _normalize(
            log,
            user_column=user_column,
            item_column=item_column,
            time_column=time_column,
            sequence_column=sequence_column,
            rating_column=None if min_rating is None else rating_column,
            event_columns=event_columns,
        )
        events = _stored(events)
    except duckdb.Error as error:
        raise ValueError(f"cannot read the log: {first_lines(error)}") from error
    named = {
        "user_id": user_column,
        "item_id": item_column,
        "timestamp": time_column,
        "_sequence": sequence_column,
    }
    statistics = _source_statistics(events, {name: column for name, column in named.items() if column})

    nobody_left = (
        f"no user is left of {statistics['num_source_users']} ({statistics['num_source_events']} events) "
        f"after the filter (min_rating={min_rating}, min_user_events={min_user_events}, "
        f"min_item_events={min_item_events}); loosen --min_user_events, --min_item_events or --min_rating"
    )
    if min_rating is not None:
        rated = events._rating >= min_rating
        if events._rating.type().is_floating():
            rated &= ~events._rating.isnan()  # which is greater than any number, to DuckDB and Spark
        events = events.filter(rated).drop("_rating")
        if events.count().execute() == 0:
            raise ValueError(nobody_left)
    events = _drop_duplicates(events, duplicates)
    cuts = None
    if split == "temporal":
        given = [(validation_cut, DEFAULT_VALIDATION_CUT)] if validation else []
        given.append((test_cut, DEFAULT_TEST_CUT))
        cuts = _resolve_cuts(events, *(default if cut is None else cut for cut, default in given))
    training = events if cuts is None else events.filter(events.timestamp < cuts[0])
    users, items = _core(training, min_user_events, min_item_events)
    if users is not None and users.count().execute() == 0:
        raise ValueError(nobody_left)

    description: dict[str, Any] = {"name": split}
    if split != "none":
        description["validation"] = validation
    if cuts is not None:
        table = _collect(events, event_columns, len(cuts), cuts, users)
        names = ("validation_cut", "test_cut")[-len(cuts) :]
        description |= {name: _plain(cut) for name, cut in zip(names, cuts, strict=True)}
    else:
        if users is not None:
            events = events.semi_join(users, "user_id").semi_join(items, "item_id")
        num_targets = 0 if split == "none" else 1 + validation
        table = _collect(events, event_columns, num_targets)
    return table, {
        "statistics": statistics,
        "split": description,
        "time_column": time_column,
        "sequence_column": sequence_column,
    }


def _normalize(
    log: ir.Table,
    *,
    user_column: str,
    item_column: str,
    time_column: str | None,
    sequence_column: str | None,
    rating_column: str | None,
    event_columns: Sequence[str],
) -> ir.Table:
    """The log under our names: user_id, item_id, timestamp, _sequence, _tie, _rating, the event columns."""
    wanted = [
        ("--user_column", user_column),
        ("--item_column", item_column),
        ("--time_column", time_column),
        ("--sequence_column", sequence_column),
        ("--rating_column", rating_column),
        *(("--event_columns", column) for column in event_columns),
    ]
    known = [column for column in log.columns if column != SOURCE_ROW]
    for option, column in wanted:
        if column is not None and column not in known:
            unordered = option == "--time_column" and sequence_column is None
            raise ValueError(
                f"the log has no column {column!r}; its columns (a CSV file's first line) are "
                f"{', '.join(known)}; name the right one with {option}"
                f"{', or a column that orders the events with --sequence_column' if unordered else ''}"
            )
    for first, second in combinations(wanted[:4], 2):
        # A time may be its own sequence, which changes nothing.
        if first[1] == second[1] and first[0] in ("--user_column", "--item_column"):
            raise ValueError(f"{first[0]} and {second[0]} must be different columns; got {first[1]!r} for both")
    reserved = RESERVED_COLUMNS | WORKING_COLUMNS
    if reserved.intersection(event_columns) or len(set(event_columns)) < len(event_columns):
        raise ValueError(
            f"event columns must differ from each other and from {', '.join(sorted(reserved))}; "
            f"got {', '.join(event_columns)}"
        )
    if time_column is None and sequence_column is None:
        raise ValueError("the order of events is unknown; name a --time_column or a --sequence_column")

    columns: dict[str, ir.Column] = {}
    for name, column in (("user_id", user_column), ("item_id", item_column)):
        kind = log[column].type()
        if not (kind.is_string() or kind.is_integer() or kind.is_uuid()):
            raise ValueError(f"ids must be text or integers; column {column!r} is {kind}: convert it first")
        columns[name] = log[column].cast("string")
    for name, column in (("timestamp", time_column), ("_sequence", sequence_column)):
        if column is None:
            continue
        if "TIMESTAMPTZ_NS" in str(log[column].type()):  # pandas' own, which Ibis does not know
            log = log.mutate(log[column].cast("timestamp('UTC')").name(column))
        kind = log[column].type()
        if not (kind.is_numeric() or kind.is_timestamp() or kind.is_date()) or kind.is_boolean():
            raise ValueError(
                f"column {column!r} orders the events and must hold numbers or timestamps; it is "
                f"{kind}: convert it to a number (seconds since 1970, say) or to ISO timestamps such as "
                "2024-01-31T12:00:00"
            )
        columns[name] = log[column].cast("timestamp") if kind.is_date() else log[column]
        if kind.is_decimal() and name == "timestamp":  # which neither JSON nor numpy has
            columns[name] = log[column].cast("int64" if kind.scale == 0 else "float64")
    columns |= {column: log[column] for column in event_columns}
    if sequence_column is None and SOURCE_ROW in log.columns:
        columns["_tie"] = log[SOURCE_ROW]
    else:
        # md5, not the backend's own hash: the same order on every backend and in every version of it. Only
        # events of one user and one time are compared, and DuckDB keeps 12 characters without a heap.
        texts = [column.cast("string").fill_null("\x1e") for column in columns.values()]
        columns["_tie"] = ibis.literal("\x1f").join(texts).hexdigest("md5").left(12)
    if rating_column is not None:
        if not log[rating_column].type().is_numeric():
            raise ValueError(f"min_rating needs numbers; column {rating_column!r} is {log[rating_column].type()}")
        columns["_rating"] = log[rating_column]
    return log.select(**columns)


def _stored(table: ir.Table) -> ir.Table:
    """The table, computed once and dropped when nothing refers to it any more."""
    connection = table.get_backend()
    if connection.name != "duckdb":
        return table.cache()
    # Ibis 12 cannot drop what `cache` made if sqlglot is 30.18 or later (ibis-project/ibis issue 12101).
    name = ibis.util.gen_name("bert4rec")
    stored = connection.create_table(name, table, temp=True)
    weakref.finalize(stored.op(), connection.raw_sql, f'DROP TABLE IF EXISTS "{name}"').atexit = False
    return stored


def _source_statistics(events: ir.Table, named: Mapping[str, str]) -> dict[str, int]:
    """Numbers of users, items, events and duplicate rows; raises for nulls, empty ids and a lone user.

    Args:
        events: The normalized log.
        named: The columns that must be filled, by our name, with their name in the log.
    """
    missing = {}
    for name in named:
        column = events[name]
        gap = column.isnull()
        if column.type().is_string():
            gap = gap | (column == "")
        elif column.type().is_floating():
            gap = gap | column.isnan() | column.isinf()
        missing[name] = gap.sum()
    row = events.aggregate(
        num_events=events.count(),
        num_users=events.user_id.nunique(),
        num_items=events.item_id.nunique(),
        **missing,
    )
    row = row.to_pyarrow().to_pylist()[0]
    for name, column in named.items():
        if row[name]:
            what = "not finite" if events[name].type().is_floating() else "empty"
            raise ValueError(
                f"column {column!r} is null or {what} in {row[name]} of {row['num_events']} rows; "
                "fill or remove these rows first"
            )
    if row["num_users"] == 1:
        raise ValueError(
            f"the log has one user only ({row['num_events']} events); expected the events of many users: "
            "is --user_column the right one?"
        )
    num_distinct = events.select(*named).distinct().count().execute()
    return {
        "num_source_users": row["num_users"],
        "num_source_items": row["num_items"],
        "num_source_events": row["num_events"],
        "num_duplicate_rows": row["num_events"] - int(num_distinct),
    }


def _order(events: ir.Table) -> dict[str, ir.Column]:
    """The columns that order a user's events, first things first."""
    return {name: events[name] for name in ("timestamp", "_sequence", "_tie") if name in events.columns}


def _drop_duplicates(events: ir.Table, duplicates: str) -> ir.Table:
    order = list(_order(events).values())
    if duplicates in ("drop", "drop_identical"):
        same = [events.user_id, events.item_id]
        if duplicates == "drop_identical":
            same += [events[name] for name in ("timestamp", "_sequence") if name in events.columns]
        earlier = ibis.row_number().over(group_by=same, order_by=order)
        kept = events.mutate(_earlier=earlier).filter(ibis._._earlier == 0)
        return _stored(kept.drop("_earlier"))
    if duplicates == "drop_consecutive":
        previous = events.item_id.lag().over(group_by=events.user_id, order_by=order)
        kept = events.mutate(_previous=previous).filter(
            ibis._._previous.isnull() | (ibis._._previous != ibis._.item_id)
        )
        return _stored(kept.drop("_previous"))
    return events


def _core(
    events: ir.Table, min_user_events: int, min_item_events: int
) -> tuple[ir.Table, ir.Table] | tuple[None, None]:
    """The k-core: tables of the users and items that have enough events with each other (None: no filter).

    Only the two small tables are kept from round to round, so that a large log is not copied.
    """
    if min_user_events <= 1 and min_item_events <= 1:
        return None, None
    users = _stored(events.select("user_id").distinct())
    num_users, num_items = int(users.count().execute()), -1
    while True:
        items = _frequent(events.semi_join(users, "user_id"), "item_id", min_item_events)
        users = _frequent(events.semi_join(items, "item_id"), "user_id", min_user_events)
        sizes = int(users.count().execute()), int(items.count().execute())
        if sizes == (num_users, num_items):
            return users, items
        num_users, num_items = sizes


def _frequent(events: ir.Table, column: str, minimum: int) -> ir.Table:
    counted = events.group_by(column).aggregate(number=events.count())
    return _stored(counted.filter(counted.number >= minimum).select(column))


def _resolve_cuts(events: ir.Table, *cuts: float | str | date) -> list[Any]:
    """The cuts, of validation and test or of test alone, as values of the time column.

    Raises if a part of the split would have no events.
    """
    num_events = int(events.count().execute())
    values = [_cut_value(events, num_events, cut) for cut in cuts]
    if len(values) == 2 and not values[0] < values[1]:
        raise ValueError(
            f"validation_cut must lie before test_cut; {cuts[0]} and {cuts[1]} mean the times "
            f"{_plain(values[0])} and {_plain(values[1])}"
        )
    time = events.timestamp
    before = {f"before_{number}": (time < value).sum() for number, value in enumerate(values)}
    row = events.aggregate(**before, first=time.min(), last=time.max()).to_pyarrow().to_pylist()[0]
    edges = [0, *(row[name] for name in before), num_events]
    parts = [after - before for before, after in pairwise(edges)]
    if not all(parts):
        between = f", {parts[1]} between" if len(values) == 2 else ""
        raise ValueError(
            f"cuts at {' and '.join(str(_plain(value)) for value in values)} leave {parts[0]} events before{between} "
            f"and {parts[-1]} after them; expected some in each. The log goes from {_plain(row['first'])} to "
            f"{_plain(row['last'])} (where times are numbers, a date is seconds since 1970, or a finer unit); choose "
            "other --validation_cut and --test_cut"
        )
    return values


def _cut_value(events: ir.Table, num_events: int, cut: Any) -> Any:
    """A share, a value, or a date as a value of the time column."""
    kind = events.timestamp.type()
    if isinstance(cut, str):
        try:
            cut = float(cut) if any(mark in cut for mark in ".eE") else int(cut)
        except ValueError:
            try:
                cut = datetime.fromisoformat(cut)
            except ValueError:
                raise ValueError(
                    "a cut is a share of the events between 0 and 1, a value of the time column or an "
                    f"ISO date; got {cut!r}"
                ) from None
    if isinstance(cut, date):
        moment = cut if isinstance(cut, datetime) else datetime(cut.year, cut.month, cut.day)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        if not kind.is_timestamp():
            seconds, last = int(moment.timestamp()), events.timestamp.max().to_pyarrow().as_py()
            # Of seconds, milli-, micro- and nanoseconds, the finest in which the date is not behind the log's end.
            return seconds * max((unit for unit in (1, 10**3, 10**6, 10**9) if seconds * unit <= last), default=1)
        return moment if kind.timezone else moment.replace(tzinfo=None)
    if 0 < cut < 1:
        # Exact, where a quantile would interpolate between two times.
        times = events.select("timestamp").order_by("timestamp").limit(1, offset=int(cut * num_events + 1e-9))
        return times.timestamp.max().to_pyarrow().as_py()
    if kind.is_timestamp():
        raise ValueError(f"the time column is {kind}: a cut is a share between 0 and 1 or an ISO date; got {cut!r}")
    return cut


def _collect(
    events: ir.Table,
    event_columns: Sequence[str],
    num_targets: int,
    cuts: Sequence[Any] | None = None,
    users: ir.Table | None = None,
) -> ir.Table:
    """One row a user, with the positions of the split: the last events, or temporal if cuts are given.

    Args:
        events: What is to be in the histories.
        event_columns: As in `histories`.
        num_targets: Of a user: 2 for validation and test, 1 for test, or 0.
        cuts: As many, in this order.
        users: With cuts: the users that train (None: all).
    """
    # A sorted array of structs gives the same rows on DuckDB and Spark; collect(order_by=...) fails on Spark.
    fields = _order(events) | {"item_id": events.item_id} | {column: events[column] for column in event_columns}
    before = {f"_before_{number}": (events.timestamp < cut).sum() for number, cut in enumerate(cuts or ())}
    table = events.group_by("user_id").aggregate(
        _events=ibis.struct(fields).collect(), _number=events.count(), **before
    )
    table = table.mutate(_events=table._events.sort())

    nothing = ibis.null("int32")
    if cuts is None:
        has_targets = table._number > num_targets
        ends = [table._number - number for number in range(num_targets, -1, -1)]  # of training part and targets
        train_end = has_targets.ifelse(ends[0], table._number)
        positions = [has_targets.ifelse(end.cast("int32"), nothing) for end in ends[:-1]]
    else:
        if users is not None:
            table = table.left_join(users.select(_trains="user_id"), [("user_id", "_trains")])
        ends = [*(table[name] for name in before), table._number]
        train_end = ends[0] if users is None else table._trains.notnull().ifelse(ends[0], 0)
        positions = [(after > end).ifelse(end.cast("int32"), nothing) for end, after in pairwise(ends)]
    validation_position, test_position = ([nothing] * 2 + positions)[-2:]
    names = [name for name in ("item_id", "timestamp", *event_columns) if name in fields]
    arrays = {name: table._events.map(lambda event, name=name: event[name]) for name in names}
    return table.select(
        "user_id",
        **arrays,
        train_end=train_end.cast("int32"),
        validation_position=validation_position,
        test_position=test_position,
    ).order_by("user_id")


def _item_counts(table: ir.Table, split: str, min_item_events: int) -> dict[str, int]:
    """The catalogue, sorted by item id: how often each item occurs in the training part.

    After a temporal split it has the items of the training part that the filter keeps. These are the frequent
    ones, since an item outside a k-core has too few events with the users inside it.
    """
    training = table.select(item_id=table.item_id[: table.train_end].unnest())
    counted = training.group_by("item_id").aggregate(number=training.count())
    if split == "temporal":
        counted = counted.filter(counted.number >= min_item_events)
    counted = counted.to_pyarrow()
    counts = dict(zip(counted["item_id"].to_pylist(), counted["number"].to_pylist(), strict=True))
    if split == "leave-one-out":
        every = table.select(item_id=table.item_id.unnest()).distinct().to_pyarrow()["item_id"].to_pylist()
        counts = dict.fromkeys(every, 0) | counts
    return dict(sorted(counts.items()))


def _statistics(table: ir.Table, catalogue: Mapping[str, int], split: str) -> dict[str, Any]:
    """What preparation.json says of the histories; a cold target has no event in the training part."""
    length = table.item_id.length()
    repeated = length - table.item_id.unique().length()
    tied = length - (table.timestamp.unique().length() if "timestamp" in table.columns else length)
    row = table.aggregate(
        num_users=table.count(),
        num_events=length.sum(),
        minimum=length.min(),
        median=length.quantile(0.5),
        mean=length.mean(),
        p75=length.quantile(0.75),
        p90=length.quantile(0.9),
        maximum=length.max(),
        repeated=repeated.sum(),
        tied=tied.sum(),
        train_users=(table.train_end > 0).sum(),
        validation=table.validation_position.count(),
        test=table.test_position.count(),
        without_past=(table.test_position == 0).sum(),
    )
    row = row.to_pyarrow().to_pylist()[0]
    tested = table.filter(table.test_position.notnull())
    targets = tested.select(item_id=tested.item_id[tested.test_position]).to_pyarrow()["item_id"].to_pylist()
    num_cold = sum(not catalogue.get(item) for item in targets)
    statistics = {
        "num_users": row["num_users"],
        "num_items": len(catalogue),
        "num_events": row["num_events"],
        "num_training_users": row["train_users"],
        "num_training_events": sum(catalogue.values()),
        "history_length": {
            "min": row["minimum"],
            "median": row["median"],
            "mean": row["mean"],
            "p75": row["p75"],
            "p90": row["p90"],
            "max": row["maximum"],
        },
        "share_repeated_events": row["repeated"] / row["num_events"],
        "share_tied_times": row["tied"] / row["num_events"] if "timestamp" in table.columns else None,
        "share_cold_targets": num_cold / len(targets) if targets else 0.0,
        "num_validation_targets": row["validation"],
        "num_test_targets": row["test"],
    }
    if split == "temporal":
        statistics["num_test_users_without_past"] = row["without_past"]
    return statistics


def _write_parquet(table: ir.Table, path: Path) -> None:
    if table.get_backend().name == "duckdb":
        table.to_parquet(path, compression="zstd", row_group_size=ROW_GROUP_SIZE)
        return
    schema = table.schema().to_pyarrow()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in table.to_pyarrow_batches(chunk_size=ROW_GROUP_SIZE):
            writer.write_batch(batch.cast(schema))


def _save_catalogue(
    folder: Path, catalogue: Mapping[str, int], titles: Mapping[str, str] | None, max_length: int
) -> None:
    tokenizer = Bert4RecTokenizer.from_items(
        list(catalogue), titles=titles, counts=dict(catalogue), model_max_length=max_length
    )
    tokenizer.save_pretrained(folder)


def _check_output(output: Path) -> None:
    """Raise unless the folder is missing, empty, or an earlier one of ours."""
    if output.is_dir():
        names = sorted(path.name for path in output.iterdir())
        # It has a copy of preparation.json, and the catalogue of its weights under the names of ours.
        if any(name == "config.json" or name.endswith(".safetensors") for name in names):
            raise ValueError(f"{output} is a model folder; choose another --output")
        if names and (os.path.ismount(output) or not os.access(output.resolve().parent, os.W_OK)):
            raise ValueError(
                f"{output} is not empty and cannot be replaced, being a volume or in a folder that you may not write: "
                f"choose a folder in it, --output {output / 'data'}"
            )
        if not names or _own_files(output) is not None:
            return
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    elif output.exists():
        shown = "a file"
    else:
        return
    raise ValueError(f"{output} exists and holds something else ({shown}); choose another --output")


def _own_files(folder: Path) -> set[str] | None:
    """The files that an earlier call wrote into a folder; None if the folder is not one of ours."""
    if not (folder / HISTORIES_FILE).is_file():
        return None
    try:
        return set(json.loads((folder / PREPARATION_FILE).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _move(folder: Path, destination: Path, old: Path) -> None:
    """Put the folder in the place of an earlier one, from which files that are not ours move over.

    An empty one, which the folder is in, is filled.
    """
    if not destination.exists():
        os.rename(folder, destination)
        return
    if destination in folder.parents:
        others = [path.name for path in destination.iterdir() if path not in folder.parents]
        if others:
            raise ValueError(f"{destination} was empty and now holds {others[0]}; choose another --output")
        for path in sorted(folder.iterdir(), key=lambda path: path.name == PREPARATION_FILE):  # what makes it whole
            os.rename(path, destination / path.name)
        return
    _check_output(destination)  # it may have changed in the meantime
    own = _own_files(destination) or set()
    os.rename(destination, old)
    try:
        os.rename(folder, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    for path in old.iterdir():
        if path.name not in own and not (destination / path.name).exists():
            os.rename(path, destination / path.name)


def _plain(value: Any) -> Any:
    """A time as JSON has it."""
    return value.isoformat() if isinstance(value, date) else value
