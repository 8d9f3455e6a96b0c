"""From a raw interaction log to one history per user, split for training, validation and test (Ibis).

There are two tables. The *log* has one row per event: user, item, and a time or a sequence number. The *histories*
have one row per user: the item ids in order of time, and three integers. The integers give the number of leading
events that train, and the positions of the validation and test targets. With every split, the history of a target is
everything before its position.
"""

import glob
import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot

from ..defaults import default_filter_seen_items, default_max_length
from ..files import finished, folder_beside
from ..model.item_features import ItemFeatures
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..reading import read_json
from .duckdb_tables import LIBRARY_ERRORS, SOURCE_ROW, connect, first_lines
from .histories import PREPARATION_FILE, histories_file, histories_files
from .item_tables import ITEM_TABLE_FILE, feature_columns, fit_features, read_item_table, spelled_feature
from .logs import Log, open_log, read_titles
from .named_datasets import NAMED_DATASETS, fetch
from .prepare_options import PrepareOptions
from .splits import (
    DEFAULT_TEST_CUT,
    DEFAULT_VALIDATION_CUT,
    collect_histories,
    event_order,
    k_core,
    parts_by_user,
    plain_time,
    resolve_cuts,
    stored_table,
)
from .statistics import catalogue_counts, checksum, history_statistics, source_statistics, trained_period
from .text_encoder import with_text_vectors
from .values import as_id, as_number, as_time, select_where, with_types

logger = logging.getLogger(__name__)

RESERVED_COLUMNS = {"user_id", "item_id", "timestamp", "train_end", "validation_position", "test_position"}
WORKING_COLUMNS = {"_sequence", "_tie", "_rating", "_earlier", "_previous"}
SELECT_WHERE = {"expressions", "from", "from_", "where"}  # sqlglot's parts of a SELECT with a condition alone
ROW_GROUP_SIZE = 16_384
MAX_TYPES_NAMED = 20  # in an error about event types
# About the number of events in a file of histories. The histories of a larger log are several files.
EVENTS_PER_FILE = 2**24
# A history that exceeds both limits, in events and as a share of all events, triggers a warning: it may be a bot's.
SUSPICIOUS_HISTORY_LENGTH, SUSPICIOUS_SHARE_OF_EVENTS = 10_000, 0.01


def histories(log: Any, options: PrepareOptions | None = None, **changes: Any) -> ir.Table:
    """Turn an Ibis table of events, on DuckDB or Spark, into one history per user.

    Events of a user are ordered by time, then by the sequence column. Without a sequence column, ties are broken by
    the row in the source, which `read_log` records, or else by a hash of the event. Item ids never break ties: half
    the events of MovieLens 100K have the same second as the event before, and a model would learn the sort order.

    Args:
        log: One row per event: an Ibis table, or what `read_log` takes.
        options: How to read and split the log. None: the defaults.
        changes: Fields of `PrepareOptions` that differ from `options`. `item_titles`, `max_length` and
            `filter_seen_items` have no effect here.

    Returns:
        One row per user, sorted by user_id: user_id (string), item_id (array<string>), timestamp (array, if the log
        has times), an array for each event column, train_end (int32, number of leading events that train),
        validation_position and test_position (int32 or null, index of the target in item_id).

    Raises:
        TypeError: If the log is of a type that `read_log` does not take, or a name is no option.
        ValueError: If a column is missing, is used twice, has the wrong type, or has nulls or empty ids; if the log has
            only one user, or the filters leave none; if there are no events before or after a cut; or if a cut is given
            for a split that is not temporal.
    """
    options = PrepareOptions.of(options, changes)
    events, collect, _ = _events(open_log(log, delimiter=options.delimiter), options)
    return collect(events)


def prepare(
    source: Any,
    output: str | Path,
    options: PrepareOptions | None = None,
    *,
    memory_limit: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Write the prepared folder: histories.parquet, the tokenizer (the catalogue) and preparation.json.

    The histories of a log of more than 16 million events are several files, such as histories-00000-of-00003.parquet,
    which together are sorted by user_id.

    Everything is written beside `output` and moved there when complete. A folder from an earlier call is replaced, but
    files that `prepare` did not write stay.

    Args:
        source: A log that `read_log` accepts (a path, a pattern, a data frame), an Ibis table of events, or the name of
            one of `NAMED_DATASETS`.
        output: The folder to write.
        options: How to read and split the log. None: the defaults.
        memory_limit: Memory that DuckDB may use, for example "4GB". What does not fit is in temporary files in the
            folder for temporary files of the system, which the environment variable TMPDIR changes. None: DuckDB's own
            limit, 80 % of the memory of the machine.
        changes: Fields of `PrepareOptions` that differ from `options`, as in
            `prepare("events.csv", "data", split="temporal")`.

    Returns:
        The content of preparation.json.

    Raises:
        TypeError: If a name is no option.
        ValueError: If `read_log` or `histories` raises it, if no user has a target, if `output` holds other files, if
            no title belongs to an item, or if there is a memory limit for an Ibis table, which has its own connection,
            or one that DuckDB cannot read.
    """
    options = PrepareOptions.of(options, changes)
    output = Path(output)
    _check_output(output)
    if memory_limit is not None and isinstance(source, ir.Table):
        raise ValueError(
            f"memory_limit is for logs that prepare reads; got {memory_limit} and an Ibis table: set the limit of its "
            "connection"
        )
    item_titles, items = options.item_titles, options.items
    if isinstance(source, str) and source in NAMED_DATASETS and not os.path.exists(source):
        dataset = fetch(source)
        if options.item_features and items is None:
            items = dataset.items
        item_titles = dataset.items if item_titles is None else item_titles
        log, name = open_log(dataset.log), source
    else:
        log = open_log(source, delimiter=options.delimiter)
        name = log.source
    table, columns = _item_table(items, options)
    if table is not None and item_titles is None and "title" in table.column_names:
        kind = table["title"].type
        if pa.types.is_nested(kind) or pa.types.is_boolean(kind):
            raise ValueError(f"titles must be text; column 'title' of {items} is {kind}: convert or rename it")
        item_titles = dict(zip(table["item_id"].to_pylist(), table["title"].cast("string").to_pylist(), strict=True))
    events, collect, origin = _events(log, options, memory_limit)
    with folder_beside(output, last_file=PREPARATION_FILE, own_files=_files_to_replace) as folder:
        parts = parts_by_user(events, EVENTS_PER_FILE)
        for number, part in enumerate(parts):
            _write_parquet(collect(part), folder / histories_file(number, len(parts)))
        del events, collect, parts, part, log  # frees the memory of the events before the statistics are computed

        connection = connect()
        _limit_memory(connection, memory_limit)
        files = [glob.escape(str(path)) for path in histories_files(folder)]
        written = connection.read_parquet(files, hive_partitioning=False)
        catalogue = catalogue_counts(written, options.split, options.min_item_events)
        types = origin["target_event_types"]
        statistics = history_statistics(written, catalogue, options.split, types) | origin["statistics"]
        longest = statistics["history_length"]["max"]
        if longest > SUSPICIOUS_HISTORY_LENGTH and longest > SUSPICIOUS_SHARE_OF_EVENTS * statistics["num_events"]:
            user = written.filter(written.item_id.length() == longest).user_id.max().to_pyarrow().as_py()
            logger.warning(
                "user %s has %s of %s events: if this is not a person (a bot, or an id for unknown users), remove the "
                "user from the log", user, f"{longest:,}", f"{statistics['num_events']:,}",
            )  # fmt: skip
        if options.split != "none" and statistics["num_validation_targets"] + statistics["num_test_targets"] == 0:
            if types is not None:
                raise ValueError(
                    f"none of the {statistics['num_users']} users has a target: expected a user with an event of the "
                    f"target types {', '.join(types)} after {1 + options.validation} others; name other "
                    "--target_event_types"
                )
            raise ValueError(
                f"none of the {statistics['num_users']} users has a target: leave-one-out needs "
                f"{2 + options.validation} events of a user, the longest history has {longest}; loosen --min_rating, "
                "--min_item_events or --duplicates, or use --split temporal"
            )
        max_length = options.max_length
        if max_length is None:
            max_length = default_max_length(statistics["history_length"]["p75"])
        filter_seen_items = options.filter_seen_items
        if filter_seen_items is None:
            share = "share_repeated_events" if types is None else "share_repeated_target_events"
            filter_seen_items = default_filter_seen_items(statistics[share])
        preparation = {
            "source": name,
            "columns": {
                "user_column": options.user_column,
                "item_column": options.item_column,
                "time_column": origin["time_column"],
                "sequence_column": origin["sequence_column"],
                "rating_column": None if options.min_rating is None else options.rating_column,
                "event_columns": list(options.event_columns),
                "event_type_column": options.event_type_column,
                "weight_column": options.weight_column,
                "item_features": [spelled_feature(column) for column in columns],
                "text_encoder": next((column["encoder"] for column in columns if "encoder" in column), None),
            },
            "filters": {
                "where": options.where,
                "min_rating": options.min_rating,
                "max_user_events": options.max_user_events,
                "min_user_events": options.min_user_events,
                "min_item_events": options.min_item_events,
                "duplicates": options.duplicates,
                "target_event_types": types,
            },
            "split": origin["split"],
            "max_length": max_length,
            "filter_seen_items": filter_seen_items,
            "statistics": statistics,
            "trained_period": trained_period(written),
            "checksum": checksum(connection, files, types is not None),
        }
        features = None
        if table is not None:
            assert items is not None  # for the type checker
            features = fit_features(table, columns, catalogue, os.fspath(items)) if columns else None
            pq.write_table(table, folder / ITEM_TABLE_FILE, compression="zstd")
        titles = read_titles(item_titles, options.item_column, catalogue)
        named_types: dict[str, Any] = {}
        if types is not None:
            known = sorted({*statistics["events_per_type"], *types})
            named_types = {"event_types": known, "target_event_types": types}
        _save_catalogue(folder, catalogue, titles, max_length, features, **named_types)
        # A later call replaces these files and no others.
        preparation["files"] = sorted([*(path.name for path in folder.iterdir()), PREPARATION_FILE])
        (folder / PREPARATION_FILE).write_text(json.dumps(preparation, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return preparation


def _item_table(items: str | Path | None, options: PrepareOptions) -> tuple[pa.Table | None, list[dict[str, Any]]]:
    """The item table, with vectors of the texts, and what its features are."""
    if items is None:
        if options.item_features:
            raise ValueError(
                f"item_features need an item table; got {', '.join(options.item_features)} without one: name it with "
                "--items"
            )
        return None, []
    table = read_item_table(items, options.item_column)
    columns = feature_columns(table, options.item_features, os.fspath(items))
    return with_text_vectors(table, columns, options.text_encoder)


def _limit_memory(connection: Any, memory_limit: str | None) -> None:
    if memory_limit is None:
        return
    text = memory_limit.replace("'", "''")
    try:
        connection.raw_sql(f"SET memory_limit = '{text}'")
    except duckdb.Error as error:
        raise ValueError(
            f"memory_limit must be a size such as 4GB; got {memory_limit!r}: {first_lines(error)}"
        ) from error


def _events(
    log: Log, options: PrepareOptions, memory_limit: str | None = None
) -> tuple[ir.Table, Callable[[ir.Table], ir.Table], dict[str, Any]]:
    """The events of the histories, the function that collects them into histories, and facts that only the log has.

    The facts are statistics of the source, the cuts, and the columns of the order.
    """
    time_column, sequence_column, min_rating = options.time_column, options.sequence_column, options.min_rating
    split = options.split
    if time_column == "timestamp" and time_column not in log.columns:  # the default column, in a log without times
        if sequence_column is None and "position" in log.columns:
            sequence_column = "position"
        if sequence_column is not None:
            time_column = None
    if split == "temporal" and time_column is None:
        raise ValueError(
            "a temporal split needs a time column (--time_column); the sequence numbers of different users have no "
            "common clock"
        )

    try:  # DuckDB parses a CSV file only here
        events = _normalize(log, options, time_column, sequence_column)
        _limit_memory(events.get_backend(), memory_limit)
        events = stored_table(events)
        if events.limit(1).count().execute() == 0:
            kept = " that meet the condition --where" if options.where else ""
            raise ValueError(f"the log has columns but no events{kept}; expected at least one row")
    except LIBRARY_ERRORS as error:
        raise log.error(error) from error
    named = {
        "user_id": options.user_column,
        "item_id": options.item_column,
        "timestamp": time_column,
        "_sequence": sequence_column,
        "event_type": options.event_type_column,
        "weight": options.weight_column,
    }
    statistics = source_statistics(events, {name: column for name, column in named.items() if column})

    nobody_left = (
        f"no user is left of {statistics['num_source_users']} ({statistics['num_source_events']} events) "
        f"after the filter (min_rating={min_rating}, min_user_events={options.min_user_events}, "
        f"min_item_events={options.min_item_events}); loosen --min_user_events, --min_item_events or --min_rating"
    )
    types = _target_types(events, options)
    if options.weight_column is not None:
        _check_weights(events, options.weight_column)
    if options.max_user_events is not None:
        numbers = events.group_by("user_id").aggregate(number=events.count())
        busy = stored_table(numbers.filter(numbers.number > options.max_user_events).select("user_id"))
        events = stored_table(events.anti_join(busy, "user_id"))
        if events.limit(1).count().execute() == 0:
            raise ValueError(f"all users have more than {options.max_user_events} events; raise --max_user_events")
    if min_rating is not None:
        rated = events._rating >= min_rating
        if events._rating.type().is_floating():
            rated &= ~events._rating.isnan()  # DuckDB and Spark sort NaN above all numbers
        events = events.filter(rated).drop("_rating")
        if events.count().execute() == 0:
            raise ValueError(nobody_left)
    events = _drop_duplicates(events, options.duplicates)
    cuts = None
    if split == "temporal":
        given = [(options.validation_cut, DEFAULT_VALIDATION_CUT)] if options.validation else []
        given.append((options.test_cut, DEFAULT_TEST_CUT))
        cuts = resolve_cuts(events, *(default if cut is None else cut for cut, default in given))
    training = events if cuts is None else events.filter(events.timestamp < cuts[0])
    users, items = k_core(training, options.min_user_events, options.min_item_events)
    if users is not None and users.count().execute() == 0:
        raise ValueError(nobody_left)

    event_columns = [name for name in ("event_type", "weight") if name in events.columns] + options.event_columns
    description: dict[str, Any] = {"name": split}
    if split != "none":
        description["validation"] = options.validation
    if cuts is not None:
        collect = partial(
            collect_histories,
            event_columns=event_columns,
            num_targets=len(cuts),
            cuts=cuts,
            users=users,
            target_event_types=types,
        )
        names = ("validation_cut", "test_cut")[-len(cuts) :]
        description |= {name: plain_time(cut) for name, cut in zip(names, cuts, strict=True)}
    else:
        if users is not None:
            events = events.semi_join(users, "user_id").semi_join(items, "item_id")
        num_targets = 0 if split == "none" else 1 + options.validation
        collect = partial(
            collect_histories, event_columns=event_columns, num_targets=num_targets, target_event_types=types
        )
    return (
        events,
        collect,
        {
            "statistics": statistics,
            "split": description,
            "time_column": time_column,
            "sequence_column": sequence_column,
            "target_event_types": types,
        },
    )


def _target_types(events: ir.Table, options: PrepareOptions) -> list[str] | None:
    """The types of events that are predicted. None: the log has no types. Raises if the log lacks one of them."""
    if options.event_type_column is None:
        return None
    known = sorted(events.select("event_type").distinct().to_pyarrow()["event_type"].to_pylist())
    for name in options.target_event_types:
        if name not in known:
            raise ValueError(
                f"no event has the target_event_type {name!r}; the types in column {options.event_type_column!r} are "
                f"{', '.join(known[:MAX_TYPES_NAMED])}{', …' if len(known) > MAX_TYPES_NAMED else ''}"
            )
    return list(options.target_event_types) or known


def _check_weights(events: ir.Table, column: str) -> None:
    """Raise if a weight is negative. `source_statistics` has found weights that are null or not finite."""
    wrong = events.filter(events.weight < 0)
    has_rows = events._tie.type().is_integer()  # `_normalize` has taken the rows of the source
    names = ["user_id", "item_id", "weight", *["_tie"] * has_rows]
    found = wrong.order_by("_tie").select(names).limit(1).to_pyarrow().to_pylist()
    if found:
        row = f" in row {found[0]['_tie'] + 1}" if has_rows else ""
        raise ValueError(
            f"column {column!r} (--weight_column) has {found[0]['weight']}{row}, for item {found[0]['item_id']!r} of "
            f"user {found[0]['user_id']!r}; expected finite numbers of at least 0: leave such events out with --where"
        )


def _normalize(log: Log, options: PrepareOptions, time_column: str | None, sequence_column: str | None) -> ir.Table:
    """The events with uniform names: user_id, item_id, timestamp, _sequence, _tie, _rating, the event columns.

    Only the columns that are asked for are read.
    """
    user_column, item_column, event_columns = options.user_column, options.item_column, options.event_columns
    rating_column = None if options.min_rating is None else options.rating_column
    type_column, weight_column = options.event_type_column, options.weight_column
    wanted = [
        ("--user_column", user_column),
        ("--item_column", item_column),
        ("--time_column", time_column),
        ("--sequence_column", sequence_column),
        ("--rating_column", rating_column),
        ("--event_type_column", type_column),
        ("--weight_column", weight_column),
        *(("--event_columns", column) for column in event_columns),
    ]
    known = log.columns
    for option, column in wanted:
        if column is not None and column not in known:
            unordered = option == "--time_column" and sequence_column is None
            raise ValueError(
                f"the log has no column {column!r}; its columns (a CSV file's first line) are "
                f"{', '.join(known)}; name the right one with {option}"
                f"{', or a column that orders the events with --sequence_column' if unordered else ''}"
            )
    for first, second in combinations(wanted[:4], 2):
        # The same column may be both time and sequence, which has no effect.
        if first[1] == second[1] and first[0] in ("--user_column", "--item_column"):
            raise ValueError(f"{first[0]} and {second[0]} must be different columns; got {first[1]!r} for both")
    # The columns of types and weights have these names in the histories, and only if there are such columns.
    named = {"event_type": type_column, "weight": weight_column}
    reserved = RESERVED_COLUMNS | WORKING_COLUMNS | {name for name, column in named.items() if column is not None}
    if reserved.intersection(event_columns) or len(set(event_columns)) < len(event_columns):
        raise ValueError(
            f"event columns must differ from each other and from {', '.join(sorted(reserved))}; "
            f"got {', '.join(event_columns)}"
        )
    if time_column is None and sequence_column is None:
        raise ValueError("the order of events is unknown; name a --time_column or a --sequence_column")

    columns = dict.fromkeys(column for _, column in wanted if column is not None)
    table = log.table(columns) if options.where is None else _filtered(log, list(columns), options.where)
    if log.is_text:
        table = with_types(table, [column for column in event_columns if column not in dict(wanted[:7]).values()])
    events: dict[str, ir.Column] = {
        "user_id": as_id(table, user_column, "--user_column"),
        "item_id": as_id(table, item_column, "--item_column"),
    }
    if time_column is not None:
        events["timestamp"] = as_time(table, time_column, "--time_column")
    if sequence_column is not None:
        events["_sequence"] = as_time(table, sequence_column, "--sequence_column")
    if type_column is not None:
        events["event_type"] = as_id(table, type_column, "--event_type_column")
    if weight_column is not None:
        events["weight"] = as_number(table, weight_column, "--weight_column").cast("float64")
    events |= {column: table[column] for column in event_columns}
    if sequence_column is None and SOURCE_ROW in table.columns:
        events["_tie"] = table[SOURCE_ROW]
    else:
        # md5 gives the same order on every backend and in every version; a backend's own hash does not. 12 characters
        # suffice, since only events of one user and one time are compared, and DuckDB stores them inline.
        texts = [column.cast("string").fill_null("\x1e") for column in events.values()]
        events["_tie"] = ibis.literal("\x1f").join(texts).hexdigest("md5").left(12)
    if rating_column is not None:
        events["_rating"] = as_number(table, rating_column, "--rating_column")
    return table.select(**events)


def _filtered(log: Log, columns: list[str], where: str) -> ir.Table:
    """The rows that meet a condition in SQL, which may name further columns of the log."""
    names = {name.lower(): name for name in log.columns}
    expected = f'--where must be a condition in SQL, such as "price > 0"; got {where!r}'
    try:
        statements = sqlglot.parse(f"SELECT * FROM log WHERE {where}", dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        raise ValueError(f"{expected}: {error}") from error
    if len(statements) != 1 or statements[0] is None:
        raise ValueError(expected)
    clauses = statements[0].args
    if not clauses.get("where") or any(value for key, value in clauses.items() if key not in SELECT_WHERE):
        raise ValueError(f"{expected}: a condition has no further clauses")
    named = [column.name for column in statements[0].find_all(sqlglot.exp.Column)]
    for name in named:
        if name.lower() not in names:
            raise ValueError(f"--where names the column {name!r}; the columns of the log are {', '.join(log.columns)}")
    used = [name if name in log.columns else names[name.lower()] for name in named]
    table = log.table([*columns, *used])
    # The condition sees numbers as numbers, also in a CSV file; what is read stays as it is spelled.
    kept = {f"kept {number}": table[name] for number, name in enumerate(table.columns)}
    typed = table.mutate(**kept)
    if log.is_text:
        typed = with_types(typed, list(dict.fromkeys(used)))
    try:
        found = select_where(typed, list(kept), where)
    except LIBRARY_ERRORS as error:
        raise ValueError(f"--where {where!r} cannot be computed: {first_lines(error)}") from error
    return found.select(**{name: found[new] for new, name in zip(kept, table.columns, strict=True)})


def _drop_duplicates(events: ir.Table, duplicates: str) -> ir.Table:
    order = list(event_order(events).values())
    if duplicates in ("drop", "drop_identical"):
        # Events of another type are other events.
        same = [events.user_id, events.item_id, *([events.event_type] if "event_type" in events.columns else [])]
        if duplicates == "drop_identical":
            same += [events[name] for name in ("timestamp", "_sequence") if name in events.columns]
        earlier = ibis.row_number().over(group_by=same, order_by=order)
        kept = events.mutate(_earlier=earlier).filter(ibis._._earlier == 0)
        return stored_table(kept.drop("_earlier"))
    if duplicates == "drop_consecutive":
        previous = {
            f"_previous{number}": events[name].lag().over(group_by=events.user_id, order_by=order)
            for number, name in enumerate(("item_id", "event_type"))
            if name in events.columns
        }
        kept = events.mutate(**previous)
        differs = kept._previous0.isnull() | (kept._previous0 != kept.item_id)
        if "_previous1" in previous:
            differs |= kept._previous1 != kept.event_type
        return stored_table(kept.filter(differs).drop(*previous))
    return events


def _write_parquet(table: ir.Table, path: Path) -> None:
    if table.get_backend().name == "duckdb":
        try:
            table.to_parquet(path, compression="zstd", row_group_size=ROW_GROUP_SIZE)
        except duckdb.Error as error:
            raise OSError(f"cannot write {path}: {first_lines(error)}") from error
        return
    schema = table.schema().to_pyarrow()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in table.to_pyarrow_batches(chunk_size=ROW_GROUP_SIZE):
            writer.write_batch(batch.cast(schema))


def _save_catalogue(
    folder: Path,
    catalogue: Mapping[str, int],
    titles: Mapping[str, str] | None,
    max_length: int,
    features: ItemFeatures | None,
    event_types: list[str] | None = None,
    target_event_types: list[str] | None = None,
) -> None:
    tokenizer = Bert4RecTokenizer.from_items(
        list(catalogue),
        titles=titles,
        counts=dict(catalogue),
        model_max_length=max_length,
        event_types=event_types,
        target_event_types=target_event_types,
    )
    tokenizer.item_features = features
    tokenizer.save_pretrained(folder)


def _check_output(output: Path) -> None:
    """Raise unless the folder is missing, empty, or from an earlier call."""
    if output.is_dir():
        names = [path.name for path in finished(output)]
        # A model folder has a copy of preparation.json and a tokenizer, so it could be taken for a prepared folder.
        if any(name == "config.json" or name.endswith(".safetensors") for name in names):
            raise ValueError(f"{output} is a model folder; choose another --output")
        if names and (os.path.ismount(output) or not os.access(output.resolve().parent, os.W_OK)):
            raise ValueError(
                f"{output} is not empty and cannot be replaced, because it is a volume or its parent folder is not "
                f"writable: choose a folder inside it, --output {output / 'data'}"
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
    """The files that an earlier call wrote into a folder; None if the folder is not a prepared folder."""
    if not histories_files(folder):
        return None
    try:
        return set(read_json(folder / PREPARATION_FILE, {"files": [str]})["files"])
    except (OSError, ValueError):
        return None


def _files_to_replace(folder: Path) -> set[str]:
    """The files of an earlier call. Checks the folder again, since it may have changed in the meantime."""
    _check_output(folder)
    return _own_files(folder) or set()
