"""Splits: the k-core, the cuts in time, and one history per user with the positions of its targets (Ibis)."""

import weakref
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any

import ibis
import ibis.expr.types as ir

# Shares of the events that lie before the cuts.
DEFAULT_VALIDATION_CUT, DEFAULT_TEST_CUT = 0.8, 0.9


def stored_table(table: ir.Table) -> ir.Table:
    """Compute the table once and store it. It is dropped when nothing refers to it any more."""
    connection = table.get_backend()
    if connection.name != "duckdb":
        return table.cache()
    # Ibis 12 cannot drop a cached table with sqlglot 30.18 or later (ibis-project/ibis issue 12101).
    name = ibis.util.gen_name("bert4rec")
    stored = connection.create_table(name, table, temp=True)
    weakref.finalize(stored.op(), connection.raw_sql, f'DROP TABLE IF EXISTS "{name}"').atexit = False
    return stored


def event_order(events: ir.Table) -> dict[str, ir.Column]:
    """The columns that order a user's events, in descending priority."""
    return {name: events[name] for name in ("timestamp", "_sequence", "_tie") if name in events.columns}


def k_core(
    events: ir.Table, min_user_events: int, min_item_events: int
) -> tuple[ir.Table, ir.Table] | tuple[None, None]:
    """The k-core: the users and the items that have enough events with each other.

    Only the two small tables are stored from round to round, so that a large log is not copied.

    Returns:
        Tables with the columns user_id and item_id; (None, None) if both minimums are 1, which filters nothing.
    """
    if min_user_events <= 1 and min_item_events <= 1:
        return None, None
    users = stored_table(events.select("user_id").distinct())
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
    return stored_table(counted.filter(counted.number >= minimum).select(column))


def resolve_cuts(events: ir.Table, *cuts: float | str | date) -> list[Any]:
    """Convert the cuts, (validation, test) or (test,), to values of the time column.

    Raises:
        ValueError: If a cut cannot be read, if the cuts are not in order, or if a part of the split has no events.
    """
    num_events = int(events.count().execute())
    values = [_cut_value(events, num_events, cut) for cut in cuts]
    if len(values) == 2 and not values[0] < values[1]:
        raise ValueError(
            f"validation_cut must lie before test_cut; got {cuts[0]} and {cuts[1]}, which mean the times "
            f"{plain_time(values[0])} and {plain_time(values[1])}"
        )
    time = events.timestamp
    before = {f"before_{number}": (time < value).sum() for number, value in enumerate(values)}
    row = events.aggregate(**before, first=time.min(), last=time.max()).to_pyarrow().to_pylist()[0]
    edges = [0, *(row[name] for name in before), num_events]
    parts = [after - before for before, after in pairwise(edges)]
    if not all(parts):
        between = f", {parts[1]} between" if len(values) == 2 else ""
        first, last = plain_time(row["first"]), plain_time(row["last"])
        raise ValueError(
            f"cuts at {' and '.join(str(plain_time(value)) for value in values)} leave {parts[0]} events "
            f"before{between} and {parts[-1]} after them; expected some in each part. The log goes from {first} to "
            f"{last} (if times are numbers, a date is converted to seconds since 1970, or to a finer unit); choose "
            "another --validation_cut and --test_cut"
        )
    return values


def _cut_value(events: ir.Table, num_events: int, cut: Any) -> Any:
    """Convert a cut, which is a share of the events, a value or a date, to a value of the time column."""
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
            # The unit is the finest of seconds, milli-, micro- and nanoseconds in which the date is not after the
            # log's last event.
            return seconds * max((unit for unit in (1, 10**3, 10**6, 10**9) if seconds * unit <= last), default=1)
        return moment if kind.timezone else moment.replace(tzinfo=None)
    if 0 < cut < 1:
        # The time of an event is exact; a quantile would interpolate between two times.
        times = events.select("timestamp").order_by("timestamp").limit(1, offset=int(cut * num_events + 1e-9))
        return times.timestamp.max().to_pyarrow().as_py()
    if kind.is_timestamp():
        raise ValueError(f"the time column is {kind}: a cut is a share between 0 and 1 or an ISO date; got {cut!r}")
    return cut


def parts_by_user(events: ir.Table, num_events: int) -> list[ir.Table]:
    """Split the events of a large log by user, so that the histories of one part fit into memory.

    The sort of the events can use temporary files. The lists of `collect_histories` are in memory.

    Args:
        events: The events.
        num_events: About the number of events of a part. The events of a user are never split.

    Returns:
        The parts in ascending order of user_id. A log of at most `num_events` events is one part, and so is a log that
        is not on DuckDB, since a cluster divides its memory itself.
    """
    if events.get_backend().name != "duckdb" or events.count().execute() <= num_events:
        return [events]
    # In sorted events, the users of a part are in few blocks, and only these blocks are read.
    events = stored_table(events.order_by("user_id"))
    users = events.group_by("user_id").aggregate(number=events.count())
    earlier = users.number.cumsum(order_by=users.user_id) - users.number
    parts = users.mutate(part=earlier // num_events).group_by("part").aggregate(first=ibis._.user_id.min())
    firsts = parts.order_by("first").to_pyarrow()["first"].to_pylist()
    rest = [events.filter(events.user_id >= firsts[-1])]
    return [events.filter((events.user_id >= first) & (events.user_id < end)) for first, end in pairwise(firsts)] + rest


def collect_histories(
    events: ir.Table,
    event_columns: Sequence[str],
    num_targets: int,
    cuts: Sequence[Any] | None = None,
    users: ir.Table | None = None,
    target_event_types: Sequence[str] | None = None,
) -> ir.Table:
    """Collect the events of each user into one row, with the positions of the split.

    With event types, the targets are the last events of the target types, or the first ones at or after each cut.

    Args:
        events: The events of the histories.
        event_columns: Columns to collect beside item_id and timestamp.
        num_targets: Number of targets per user: 2 for validation and test, 1 for test, 0 for none.
        cuts: `num_targets` values of the time column for a temporal split. None: the last events are the targets.
        users: The users that train in a temporal split. None: all.
        target_event_types: The values of the column event_type that targets may have. None: all events may be targets.

    Returns:
        The columns that `histories` documents.
    """
    # Sorting an array of structs gives the same rows on DuckDB and Spark; collect(order_by=...) fails on Spark.
    fields = event_order(events) | {"item_id": events.item_id} | {column: events[column] for column in event_columns}
    before = {f"_before_{number}": (events.timestamp < cut).sum() for number, cut in enumerate(cuts or ())}
    if target_event_types is not None:
        is_target = events.event_type.isin(target_event_types)
        before["_number_targets"] = is_target.sum().cast("int32")
        for number, cut in enumerate(cuts or ()):
            before[f"_targets_before_{number}"] = (is_target & (events.timestamp < cut)).sum().cast("int32")
    table = events.group_by("user_id").aggregate(
        _events=ibis.struct(fields).collect(), _number=events.count(), **before
    )
    table = table.mutate(_events=table._events.sort())

    nothing = ibis.null("int32")
    places: Any = None  # of the events that may be targets
    if target_event_types is not None:
        places = table._events.map(lambda event, place: event["event_type"].isin(target_event_types).ifelse(place, -1))
        places = places.filter(lambda place: place >= 0)
        table = table.mutate(_places=places)
        places = table._places
    if cuts is None and places is not None:
        ends = [table._number_targets - number for number in range(num_targets, 0, -1)]
        train_end, positions = table._number, []
        if num_targets:
            # There is an event before the first target.
            has_targets = (ends[0] >= 0).ifelse(places[ends[0]] > 0, False)
            train_end = has_targets.ifelse(places[ends[0]], table._number)
            positions = [has_targets.ifelse(places[end].cast("int32"), nothing) for end in ends]
    elif cuts is None:
        has_targets = table._number > num_targets
        # The end of the training part, and the end of each target.
        ends = [table._number - number for number in range(num_targets, -1, -1)]
        train_end = has_targets.ifelse(ends[0], table._number)
        positions = [has_targets.ifelse(end.cast("int32"), nothing) for end in ends[:-1]]
    else:
        if users is not None:
            table = table.left_join(users.select(_trains="user_id"), [("user_id", "_trains")])
        ends = [*(table[f"_before_{number}"] for number in range(len(cuts))), table._number]
        train_end = ends[0] if users is None else table._trains.notnull().ifelse(ends[0], 0)
        if places is None:
            positions = [(after > end).ifelse(end.cast("int32"), nothing) for end, after in pairwise(ends)]
        else:
            ends = [*(table[f"_targets_before_{number}"] for number in range(len(cuts))), table._number_targets]
            positions = [(after > end).ifelse(places[end].cast("int32"), nothing) for end, after in pairwise(ends)]
    validation_position, test_position = ([nothing] * 2 + positions)[-2:]
    names = [name for name in ("item_id", "timestamp", *event_columns) if name in fields]
    kinds = {name: fields[name].type() for name in names}
    if kinds.get("timestamp", ibis.dtype("int64")).is_decimal():
        kinds["timestamp"] = ibis.dtype("float64")  # decimals are for the order; numpy has none
    arrays = {name: table._events.map(lambda event, name=name: event[name].cast(kinds[name])) for name in names}
    return table.select(
        "user_id",
        **arrays,
        train_end=train_end.cast("int32"),
        validation_position=validation_position,
        test_position=test_position,
    ).order_by("user_id")


def plain_time(value: Any) -> Any:
    """A time as a value that JSON can hold."""
    if isinstance(value, Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, date) else value
