"""What `prepare` counts and reports: statistics of a log and of its histories, the catalogue, and a checksum."""

from collections.abc import Mapping
from typing import Any

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

from .histories import PARTS, units_per_second
from .splits import plain_time

NUM_LONGEST_HISTORIES = 5  # that the statistics name


def source_statistics(events: ir.Table, named: Mapping[str, str]) -> dict[str, int]:
    """Count users, items, events and duplicate rows. Raises for nulls, empty ids, and a log with a single user.

    Args:
        events: The normalized log.
        named: The columns that must not be empty: their name here, and their name in the log.
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
                "fill the values or remove these rows first"
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


def catalogue_counts(table: ir.Table, split: str, min_item_events: int) -> dict[str, int]:
    """The catalogue, sorted by item id: the number of training events of each item.

    After a temporal split, the catalogue has the items of the k-core. These are the items with at least
    `min_item_events` training events, since an item outside the k-core has fewer events with the users inside it.
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


def history_statistics(
    table: ir.Table, catalogue: Mapping[str, int], split: str, target_event_types: list[str] | None
) -> dict[str, Any]:
    """The statistics for preparation.json. A cold target is a target whose item has no event in the training part."""
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
    targets = tested.select(item_id=tested.item_id[tested.test_position])
    counted = targets.group_by("item_id").aggregate(number=targets.count()).to_pyarrow()
    pairs = zip(counted["item_id"].to_pylist(), counted["number"].to_pylist(), strict=True)
    num_cold = sum(number for item, number in pairs if not catalogue.get(item))
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
        "share_cold_targets": num_cold / row["test"] if row["test"] else 0.0,
        "num_validation_targets": row["validation"],
        "num_test_targets": row["test"],
    }
    if target_event_types is not None:
        statistics |= _type_statistics(table, target_event_types)
    if split == "temporal":
        statistics["num_test_users_without_past"] = row["without_past"]
    statistics["longest_histories"] = _longest_histories(table)
    return statistics


def _type_statistics(table: ir.Table, target_event_types: list[str]) -> dict[str, Any]:
    """The number of events of each type, and the share of the target events whose user had the item before by one."""
    events = table.select("user_id", item=table.item_id.zip(table.event_type).unnest())
    events = events.select("user_id", item_id=events.item["f1"], event_type=events.item["f2"])
    counted = events.group_by("event_type").aggregate(number=events.count()).order_by("event_type").to_pyarrow()
    counts = dict(zip(counted["event_type"].to_pylist(), counted["number"].to_pylist(), strict=True))
    targets = events.filter(events.event_type.isin(target_event_types))
    num_targets = sum(counts.get(name, 0) for name in target_event_types)
    num_distinct = int(targets.distinct().count().execute())
    return {
        "events_per_type": dict(sorted(counts.items())),
        "share_repeated_target_events": (num_targets - num_distinct) / max(1, num_targets),
    }


def _longest_histories(table: ir.Table) -> list[dict[str, Any]]:
    """The users with most events, and the most events that each has in a minute (None without times)."""
    longest = table.order_by([table.item_id.length().desc(), "user_id"]).limit(NUM_LONGEST_HISTORIES)
    names = [name for name in ("user_id", "item_id", "timestamp") if name in table.columns]
    found = []
    for row in longest.select(*names).to_pyarrow().to_batches():
        for index, user in enumerate(row["user_id"].to_pylist()):
            busiest = _most_in_a_minute(row["timestamp"][index].values) if "timestamp" in names else None
            found.append({"user_id": user, "num_events": len(row["item_id"][index]), "most_in_a_minute": busiest})
    return found


def _most_in_a_minute(times: pa.Array) -> int:
    moments = (times.cast(pa.int64()) if pa.types.is_timestamp(times.type) else times).to_numpy()
    minute = 60 * units_per_second(times.type, np.abs(moments).max())
    moments = np.sort(moments)
    return int((np.searchsorted(moments, moments + minute) - np.arange(len(moments))).max())


def trained_period(table: ir.Table) -> list[Any] | None:
    """The times of the first and the last training event. None without times or training events."""
    if "timestamp" not in table.columns:
        return None
    trained = table.filter(table.train_end > 0)
    ends = trained.aggregate(first=trained.timestamp[0].min(), last=trained.timestamp[trained.train_end - 1].max())
    row = ends.to_pyarrow().to_pylist()[0]
    return None if row["first"] is None else [plain_time(row["first"]), plain_time(row["last"])]


def checksum(connection: Any, files: list[str], has_types: bool) -> str:
    """A checksum of the histories with their split. It does not depend on the order of the users or on a library."""
    columns = ["user_id", "array_to_string(item_id, chr(30))", "train_end"]
    if has_types:
        columns.append("array_to_string(event_type, chr(30))")
    row = ", ".join([*columns, *(f"coalesce({part}_position, -1)" for part in PARTS)])
    query = (
        f"SELECT sum(md5_number_lower(concat_ws(chr(31), {row})))::VARCHAR "
        "FROM read_parquet(?, hive_partitioning = false)"
    )
    return f"{int(connection.con.execute(query, [files]).fetchone()[0]) % 2**64:016x}"
