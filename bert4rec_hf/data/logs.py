"""Reading a raw log from any source into an Ibis table: files, data frames, tables of a database, Spark."""

import itertools
import logging
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc

from .duckdb_tables import LIBRARY_ERRORS, SOURCE_ROW, connect, first_lines, registered, stored
from .file_formats import FILE, ROWS_AT_ONCE, csv_columns, damaged, json_columns, parquet_columns
from .log_files import LogFiles, find_files, is_json, is_parquet

logger = logging.getLogger(__name__)


@dataclass
class Log:
    """A raw log whose columns are known and whose rows have not been read yet.

    Attributes:
        source: How messages call the source.
        columns: Names of the columns, as the source spells them.
        read: Makes an Ibis table of some of the columns.
        is_text: Whether values have no types, as in CSV, or few, as in JSON: numbers and times may be text.
        explain: Turns the error of a library into one that names the file.
    """

    source: str
    columns: list[str]
    read: Callable[[list[str]], ir.Table]
    is_text: bool = False
    explain: Callable[[Exception], ValueError] | None = None

    def table(self, columns: Iterable[str]) -> ir.Table:
        """Read some columns; other columns are not looked at.

        Returns:
            The columns, and `SOURCE_ROW` if the source has an order, so that events of the same time keep it.

        Raises:
            ValueError: If a column is missing, is there twice, has a name that cannot be, or cannot be read.
        """
        wanted = list(dict.fromkeys(columns))
        for name in wanted:
            if name not in self.columns:
                raise ValueError(f"{self.source} has no column {name!r}; its columns are {', '.join(self.columns)}")
            if self.columns.count(name) > 1:
                raise ValueError(f"{self.source} has the column {name!r} twice; rename one of them")
            if not name or "\0" in name:
                raise ValueError(f"{self.source} has a column named {name!r}, which DuckDB does not allow; rename it")
            if name in (SOURCE_ROW, FILE):
                raise ValueError(f"{self.source} has a column {name}, a name that this package uses itself; rename it")
        for first, second in itertools.combinations(wanted, 2):
            if first.lower() == second.lower():
                raise ValueError(
                    f"the columns {first!r} and {second!r} of {self.source} differ in upper and lower case only; "
                    "rename one of them"
                )
        try:
            return self.read(wanted)
        except LIBRARY_ERRORS as error:
            raise self.error(error) from error

    def error(self, error: Exception) -> ValueError:
        """The error of a library, raised while the log was read, as one that names the source."""
        return self.explain(error) if self.explain else ValueError(f"cannot read {self.source}: {first_lines(error)}")


def open_log(source: Any, *, delimiter: str | None = None) -> Log:
    """Find out what a source is, and its columns.

    Args:
        source: What `read_log` takes.
        delimiter: Of CSV files. None: the one of `DELIMITERS` that the header has most of.

    Raises:
        TypeError: If the source is of another type.
        FileNotFoundError: If there is no such file.
        ValueError: If files are empty, damaged or of an unknown kind, or do not belong together.
    """
    module, kind = type(source).__module__, type(source).__name__
    library = module.split(".")[0]
    name = f"{library}.{kind}"
    is_file = isinstance(source, str | Path | list | tuple)
    if delimiter is not None and not is_file:
        raise ValueError(f"a delimiter is for CSV files; got {delimiter!r} with {name}: leave it out")
    if isinstance(source, Log):
        return source
    if isinstance(source, ir.Table):
        return _of_ibis(source)
    if is_file:
        return _of_files(find_files(source), delimiter)
    if library == "datasets" and isinstance(source, Mapping):  # a DatasetDict
        if len(source) != 1:
            raise ValueError(
                f"the {kind} has the splits {', '.join(map(str, source))}; give one of them, as in log['train']"
            )
        (source,) = source.values()
        return open_log(source)
    if library == "datasets":
        return _of_dataset(source, name)
    if library == "pyspark":
        view = ibis.util.gen_name("bert4rec")
        source.createOrReplaceTempView(view)
        return _of_ibis(ibis.pyspark.connect(source.sparkSession).table(view))
    if library == "pandas":
        if kind != "DataFrame":
            raise TypeError(f"expected a data frame; got {name}")
        return Log(name, [str(column) for column in source.columns], lambda columns: _of_pandas(source, columns, name))
    if library == "polars":
        names = source.collect_schema().names()
        oldest = sys.modules["polars"].CompatLevel.oldest()  # pyarrow cannot convert categories of a newer level
        return Log(
            name,
            names,
            lambda columns: registered(source.lazy().select(columns).collect().to_arrow(compat_level=oldest), name),
        )
    if hasattr(source, "to_batches") and hasattr(source, "scanner"):  # a pyarrow.dataset
        return Log(
            name,
            source.schema.names,
            lambda columns: stored(source.schema, source.to_batches(columns=columns), columns, name),
        )
    if isinstance(source, pa.Table):
        return Log(name, source.schema.names, lambda columns: registered(source.select(columns), name))
    if hasattr(source, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(source)
        return Log(name, reader.schema.names, lambda columns: stored(reader.schema, reader, columns, name))
    raise TypeError(f"expected the path of a log, a list of paths, a data frame, or an Ibis table; got {name}")


def read_log(source: Any, *, delimiter: str | None = None) -> ir.Table:
    """Read a log into an Ibis table.

    Files and data frames are read with DuckDB; a table on Spark stays there. `SOURCE_ROW` is added if the source has
    an order, so that events with the same time keep it.

    Args:
        source: One of
            - a path, a glob pattern, a folder, or a list of these. The files are CSV (UTF-8, with a header), JSON
              lines or a JSON list of objects, or Parquet, and may be compressed with gzip, zstd or bzip2; what a file
              is, is read from its content. Folders named day=2026-01-31 are columns. A path with :// is fetched through
              fsspec.
            - a data frame of pandas, Polars (also lazy) or Spark, a `datasets.Dataset`, or anything else that has an
              Arrow stream.
            - an Ibis table of any backend.
        delimiter: Of CSV files. None: the comma, tab, semicolon or bar that the header has most of.

    Returns:
        The columns of the log that have a name, and `SOURCE_ROW`. All columns of CSV are text; those of JSON are text,
        numbers with a fraction, booleans or lists.

    Raises:
        TypeError: If the source is of another type.
        FileNotFoundError: If there is no such file.
        ValueError: If a file is empty, damaged, or of an unknown kind; if the files differ in kind, in columns or in
            the types of columns; or if a column is there twice.
    """
    log = open_log(source, delimiter=delimiter)
    return log.table(filter(None, log.columns))


def query(sql: str, database: str) -> Log:
    """The rows of a query as a log.

    Args:
        sql: A SELECT in the syntax of the database.
        database: URL that `ibis.connect` takes, such as sqlite:///shop.db or postgres://user:password@host/name.

    Raises:
        ValueError: If the database cannot be reached, its driver is not installed, or the query fails.
    """
    kind = database.partition(":")[0]
    try:
        connection = ibis.connect(database)
        if connection.name in ("duckdb", "postgres"):
            # As of Ibis 12.0, `sql` fails with DuckDB 2.0, and with PostgreSQL and sqlglot 30.
            view = ibis.util.gen_name("bert4rec")
            connection.raw_sql(f"CREATE TEMPORARY VIEW {view} AS {sql}")
            return open_log(connection.table(view))
        return open_log(connection.sql(sql))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"cannot read from {kind}: {error}; install its driver with pip install 'ibis-framework[{kind}]'"
        ) from error
    except Exception as error:  # each database has errors of its own
        raise ValueError(f"cannot read {sql!r} from {kind}: {type(error).__name__}: {first_lines(error)}") from error


def _of_ibis(table: ir.Table) -> Log:
    names = [name for name in table.columns if name != SOURCE_ROW]
    # A table of `ibis.memtable` has no backend until it is used; Ibis then takes DuckDB.
    backends = table._find_backends()[0]
    backend = backends[0].name if backends else "duckdb"
    name = f"the {backend} table"

    def read(columns: list[str]) -> ir.Table:
        kinds = {column: table[column].type() for column in columns}
        if backend == "duckdb" and any(kind.is_binary() for kind in kinds.values()):
            # DuckDB's own conversion to text spells é as \\xC3\\xA9.
            return registered(table.select(columns).to_pyarrow(), name).drop(SOURCE_ROW)
        if backend in ("duckdb", "pyspark"):
            return table.select([*columns, SOURCE_ROW] if SOURCE_ROW in table.columns else columns)
        # Whole numbers come as text: with some backends Ibis makes them float64 where a value is null.
        whole = {column: kind for column, kind in kinds.items() if kind.is_integer()}
        try:
            as_text = [column for column, kind in kinds.items() if kind.is_integer() or kind.is_uuid()]
            chosen = table.select(columns).mutate(**{column: table[column].cast("string") for column in as_text})
            batches = chosen.to_pyarrow_batches()
            # The rows of a database have no order.
            found = stored(batches.schema, batches, columns, name).drop(SOURCE_ROW)
        except Exception as error:  # each database has errors of its own
            raise ValueError(f"cannot read {name}: {type(error).__name__}: {first_lines(error)}") from error
        for column, kind in whole.items():
            odd = found.filter(~found[column].re_search("^-?[0-9]+$")).limit(1).to_pyarrow()
            if len(odd):
                raise ValueError(f"column {column!r} of {name} is {kind}, and has {odd[column][0].as_py()!r}")
        return found.mutate(**{column: found[column].cast(kind) for column, kind in whole.items()})

    return Log(name, names, read)


def _of_dataset(dataset: Any, name: str) -> Log:
    """A `datasets.Dataset`, or one that is iterated. The values of a ClassLabel are read as its names."""
    features = dataset.features
    if features is None:
        raise ValueError(f"the columns of this {name} are unknown; call its _resolve_features() first")

    def read(columns: list[str]) -> ir.Table:
        labels = {
            column: pa.array([*features[column].names])
            for column in columns
            if type(features[column]).__name__ == "ClassLabel"
        }

        def named(batch: pa.RecordBatch) -> pa.RecordBatch:
            for column, names in labels.items():
                # Rows without a label have -1.
                numbers = pc.if_else(pc.less(batch[column], 0), None, batch[column])
                batch = batch.set_column(batch.schema.get_field_index(column), column, names.take(numbers))
            return batch

        chosen = dataset.select_columns(columns).with_format("arrow")
        tables = chosen.iter(batch_size=ROWS_AT_ONCE)
        batches = (named(batch) for table in tables for batch in table.select(columns).to_batches())
        first = next(batches, None)
        if first is None:
            return registered(pa.table({column: pa.array([], pa.string()) for column in columns}), name)
        return stored(first.schema, itertools.chain([first], batches), columns, name)

    return Log(name, list(features), read)


def _of_pandas(frame: Any, columns: list[str], name: str) -> ir.Table:
    named = {str(column): column for column in frame.columns}
    arrays = {}
    for column in columns:
        values = frame[named[column]]
        try:
            arrays[column] = pa.array(values, from_pandas=True)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            if set(values.dropna().map(type)) == {UUID}:  # PyArrow before version 24 does not convert them
                arrays[column] = pa.array(values.map(str, na_action="ignore"), from_pandas=True)
                continue
            kinds = sorted({type(value).__name__ for value in values if value is not None and value is not math.nan})
            raise ValueError(
                f"column {column!r} of the data frame {'mixes' if len(kinds) > 1 else 'has'} {' and '.join(kinds)}, "
                f"which make no column of one type ({first_lines(error)}): convert it first, as in "
                f"frame[{column!r}].astype(str)"
            ) from error
    return registered(pa.table(arrays), name)


def _of_files(files: LogFiles, delimiter: str | None) -> Log:
    kinds = {path: "Parquet" if is_parquet(path) else "JSON" if is_json(path) else "CSV" for path in files.paths}
    first = files.paths[0]
    kind = kinds[first]
    for path in files.paths:
        if kinds[path] != kind:
            raise ValueError(
                f"{files.spelled[first]} is {kind}, {files.spelled[path]} is {kinds[path]}; expected files of one kind"
            )
    if delimiter is not None and kind != "CSV":
        raise ValueError(f"a delimiter is for CSV files; {files.spelled[first]} is {kind}: leave it out")
    connection = connect()
    weakref.finalize(connection, lambda files: None, files)  # copies of files stay as long as the connection
    explain = partial(damaged, files, kind)
    try:
        if kind == "CSV":
            names, scan = csv_columns(connection, files, delimiter)
        else:
            names, scan = {"Parquet": parquet_columns, "JSON": json_columns}[kind](connection, files)
    except LIBRARY_ERRORS as error:
        raise explain(error) from error
    keys = [key for key in files.partitions[first] if key not in names]
    for path in files.paths:
        lacking = [key for key in keys if key not in files.partitions[path]]
        if lacking:
            raise ValueError(f"{files.spelled[path]} is in no folder {lacking[0]}=…, as {files.spelled[first]} is")

    def read(columns: list[str]) -> ir.Table:
        wanted = [key for key in keys if key in columns]
        found = scan([column for column in columns if column not in keys], bool(wanted))
        found = found.mutate(ibis.row_number().name(SOURCE_ROW)) if SOURCE_ROW not in found.columns else found
        if wanted:
            values = {
                key: pa.array([files.partitions[path][key] for path in files.paths], pa.string()) for key in wanted
            }
            name = ibis.util.gen_name("partitions")
            connection.con.register(name, pa.table({FILE: pa.array(files.paths)} | values))
            found = found.inner_join(connection.table(name), FILE)
        return found.select(*columns, SOURCE_ROW)

    return Log(files.source, names + keys, read, kind != "Parquet", explain)


def read_titles(
    item_titles: Mapping[str, str] | str | Path | None, item_column: str, catalogue: Iterable[str]
) -> dict[str, str] | None:
    """Read the titles of the catalogue's items.

    Args:
        item_titles: Titles by raw item id; or a file that `read_log` takes, with `item_column` and a column title (CSV,
            JSON lines, Parquet, or RecBole's .item). None: no titles.
        item_column: Column of the item ids.
        catalogue: Raw item ids.

    Returns:
        Titles by raw item id, for the items of the catalogue that have one; None without titles.

    Raises:
        ValueError: If a column is missing, or no title belongs to an item of the catalogue.
    """
    if item_titles is None:
        return None
    catalogue = list(catalogue)
    if isinstance(item_titles, Mapping):
        titles = {str(item): title for item, title in item_titles.items()}
    else:
        log = open_log(item_titles)
        for column in (item_column, "title"):
            if column not in log.columns:
                raise ValueError(
                    f"{item_titles} has no column {column!r}; expected {item_column} and title, "
                    f"got {', '.join(log.columns)}"
                )
        table = log.table((item_column, "title"))
        for column, expected in ((item_column, "ids must be text or whole numbers"), ("title", "titles must be text")):
            kind = table[column].type()
            if kind.is_nested() or kind.is_boolean() or (kind.is_floating() and column == item_column):
                raise ValueError(f"{expected}; column {column!r} of {item_titles} is {kind}: convert it first")
        try:
            table = table.select(item_id=table[item_column].cast("string"), title=table.title.cast("string"))
            table = table.to_pyarrow()
        except LIBRARY_ERRORS as error:
            raise log.error(error) from error
        pairs = set(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))
        titles = dict(sorted(pairs, key=lambda pair: pair[1] or ""))
        if len(pairs) > len(titles):
            logger.warning("%s has several titles for some items, %d more than it needs: the last in alphabetical "
                           "order is used", item_titles, len(pairs) - len(titles))  # fmt: skip
    # Data frames represent a missing title as NaN.
    given = {item: title for item, title in titles.items() if isinstance(title, str) and title}
    if not given:
        raise ValueError(f"all {len(titles)} titles are empty; expected text in the column title")
    found = {item: given[item] for item in catalogue if item in given}
    if not found:
        raise ValueError(
            f"none of the {len(given)} titles belongs to an item of the catalogue: the ids of the catalogue look like "
            f"{', '.join(map(repr, catalogue[:3]))}, those of the titles like {', '.join(map(repr, list(given)[:3]))}"
        )
    if len(found) < len(catalogue):
        logger.warning("%d of %d items have no title", len(catalogue) - len(found), len(catalogue))
    return found
