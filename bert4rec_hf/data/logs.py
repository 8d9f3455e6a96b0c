"""Reading a raw log from any source into an Ibis table: files, data frames, tables of a database, Spark."""

import csv
import glob
import itertools
import logging
import math
import os
import re
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb
import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .log_files import LogFiles, find_files, is_json, is_parquet

logger = logging.getLogger(__name__)

SOURCE_ROW = "__source_row__"  # column that `Log.table` adds: the number of the row in the source
DELIMITERS = (",", "\t", ";", "|")
# Column names of RecBole's atomic files name the type as well, as in item_id:token.
ATOMIC_NAME = re.compile(r"(.+):(token|token_seq|float|float_seq)")
MESSAGE_LENGTH = 500  # of a library's message, which may quote a row
# Where DuckDB begins to advise on its own options and functions, or to quote a query.
ADVICE = re.compile(
    r"(?<=\S)\s*(?:Possible [Ff]ix|Possible [Ss]olution|Candidate |Did you mean|Use TRY|You might need to|LINE \d+:)"
)
ROWS_AT_ONCE = 100_000
FILE = "__file__"  # column of the file that a row is from, while partitions are read
LIBRARY_ERRORS = (duckdb.Error, pa.ArrowException, OSError, UnicodeDecodeError)
# Reads columns of files, with `FILE` if that is wanted.
Scan = Callable[[list[str], bool], ir.Table]


@dataclass
class Log:
    """A raw log whose columns are known and whose rows have not been read yet.

    Attributes:
        source: How messages call the source.
        columns: Names of the columns, as the source spells them.
        read: Makes an Ibis table of some of the columns.
        is_text: Whether the values have no types, as in CSV: every column that is read is text.
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
            ValueError: If a column is missing, or is there twice, or cannot be read.
        """
        wanted = list(dict.fromkeys(columns))
        for name in wanted:
            if name not in self.columns:
                raise ValueError(f"{self.source} has no column {name!r}; its columns are {', '.join(self.columns)}")
            if self.columns.count(name) > 1:
                raise ValueError(f"{self.source} has the column {name!r} twice; rename one of them")
            if not name or "\0" in name:
                raise ValueError(
                    f"{self.source} has a column with the name {name!r}, which DuckDB cannot have; rename it"
                )
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
            lambda columns: _registered(source.lazy().select(columns).collect().to_arrow(compat_level=oldest), name),
        )
    if hasattr(source, "to_batches") and hasattr(source, "scanner"):  # a pyarrow.dataset
        return Log(
            name,
            source.schema.names,
            lambda columns: _stored(source.schema, source.to_batches(columns=columns), columns, name),
        )
    if isinstance(source, pa.Table):
        return Log(name, source.schema.names, lambda columns: _registered(source.select(columns), name))
    if hasattr(source, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(source)
        return Log(name, reader.schema.names, lambda columns: _stored(reader.schema, reader, columns, name))
    raise TypeError(f"expected the path of a log, a list of paths, a data frame, or an Ibis table; got {name}")


def read_log(source: Any, *, delimiter: str | None = None) -> ir.Table:
    """Read a log into an Ibis table.

    Files and data frames are read with DuckDB; a table on Spark stays there. `SOURCE_ROW` is added if the source has
    an order, so that events with the same time keep it.

    Args:
        source: One of
            - a path, a glob pattern, a folder, or a list of these. The files are CSV (UTF-8, with a header), JSON
              lines, or Parquet, and may be compressed with gzip, zstd or bzip2; what a file is, is read from its
              content. Folders named day=2026-01-31 are columns. A path with :// is fetched through fsspec.
            - a data frame of pandas, Polars (also lazy) or Spark, a `datasets.Dataset`, or anything else that has an
              Arrow stream.
            - an Ibis table of any backend.
        delimiter: Of CSV files. None: the comma, tab, semicolon or bar that the header has most of.

    Returns:
        The columns of the log and `SOURCE_ROW`. All columns of CSV and JSON files are text.

    Raises:
        TypeError: If the source is of another type.
        FileNotFoundError: If there is no such file.
        ValueError: If a file is empty, damaged, or of an unknown kind; if the files differ in kind, in columns or in
            the types of columns; or if a column is there twice.
    """
    log = open_log(source, delimiter=delimiter)
    return log.table(log.columns)


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


def connect() -> Any:
    """An in-memory DuckDB. Its temporary files go to the system's folder, not to the working directory."""
    folder = os.path.join(tempfile.gettempdir(), ibis.util.gen_name("bert4rec"))
    connection = ibis.duckdb.connect(temp_directory=folder)
    if sys.stdout.isatty():
        connection.raw_sql("SET enable_progress_bar = true")  # it appears for queries of more than two seconds
    return connection


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
            return _registered(table.select(columns).to_pyarrow(), name).drop(SOURCE_ROW)
        if backend in ("duckdb", "pyspark"):
            return table.select([*columns, SOURCE_ROW] if SOURCE_ROW in table.columns else columns)
        # Whole numbers come as text: with some backends Ibis makes them float64 where a value is null.
        whole = {column: kind for column, kind in kinds.items() if kind.is_integer()}
        try:
            as_text = [column for column, kind in kinds.items() if kind.is_integer() or kind.is_uuid()]
            chosen = table.select(columns).mutate(**{column: table[column].cast("string") for column in as_text})
            batches = chosen.to_pyarrow_batches()
            # The rows of a database have no order.
            found = _stored(batches.schema, batches, columns, name).drop(SOURCE_ROW)
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
            return _registered(pa.table({column: pa.array([], pa.string()) for column in columns}), name)
        return _stored(first.schema, itertools.chain([first], batches), columns, name)

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
    return _registered(pa.table(arrays), name)


def _registered(table: pa.Table, name: str) -> ir.Table:
    """An Arrow table in memory, as a table of DuckDB that is not a copy."""
    table = _plain(table, name)
    connection = connect()
    # Registering the table through Ibis fails (ibis-project/ibis issue 12101).
    connection.con.register("log", table.append_column(SOURCE_ROW, pa.array(np.arange(len(table)))))
    return connection.table("log")


def _stored(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], columns: Sequence[str], name: str, connection: Any = None
) -> ir.Table:
    """Rows that can be read only once, as a table of DuckDB, which moves to the disk what memory has no room for."""
    schema = _plain(pa.Table.from_batches([], schema).select(columns), name).schema

    def rows() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in batches:
            plain = _plain(pa.Table.from_batches([batch]).select(columns), name).cast(schema)
            numbers = pa.array(np.arange(start, start + len(plain)))
            start += len(plain)
            yield from plain.append_column(SOURCE_ROW, numbers).to_batches()

    connection = connect() if connection is None else connection
    reader = pa.RecordBatchReader.from_batches(schema.append(pa.field(SOURCE_ROW, pa.int64())), rows())
    connection.con.register("incoming", reader)
    name = ibis.util.gen_name("log")
    connection.con.execute(f'CREATE TEMP TABLE "{name}" AS SELECT * FROM incoming')
    connection.con.unregister("incoming")
    return connection.table(name)


def _plain(table: pa.Table, name: str) -> pa.Table:
    """The table with types that DuckDB reads without loss."""
    for index, field in enumerate(table.schema):
        plain = plain_type(field.type)
        if isinstance(plain, pa.BaseExtensionType) and not isinstance(plain, pa.UuidType):
            raise ValueError(
                f"column {field.name!r} of {name} is {plain.extension_name}; expected text, numbers or times: convert "
                "it first"
            )
        if plain != field.type:
            try:
                column = table.column(index)
                if pa.types.is_dictionary(field.type):
                    column = column.cast(field.type.value_type)
                table = table.set_column(index, field.name, column.cast(plain))
            except pa.ArrowException as error:
                raise ValueError(
                    f"column {field.name!r} of {name} is {field.type} and cannot be read as {plain}: "
                    f"{first_lines(error)}"
                ) from error
    return table


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type as which DuckDB reads a column without loss."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.string()  # Impala and others write text so
    if pa.types.is_fixed_size_binary(kind):
        return pa.string()
    if pa.types.is_timestamp(kind) and kind.tz is not None and kind.unit == "ns":
        return pa.timestamp("ns")  # in UTC; DuckDB's own type with a zone has microseconds
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_decimal256(kind):
        return pa.string()
    if isinstance(kind, pa.UuidType):
        return kind
    if isinstance(kind, pa.BaseExtensionType) and pa.types.is_string(plain_type(kind.storage_type)):
        return pa.string()  # such as arrow.json; the numbers of pandas.period mean something else than its text
    return kind


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
            names, scan = _csv(connection, files, delimiter)
        else:
            names, scan = {"Parquet": _parquet, "JSON": _json}[kind](connection, files)
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


def _csv(connection: Any, files: LogFiles, delimiter: str | None) -> tuple[list[str], Scan]:
    headers = {path: _csv_header(path, files.spelled[path], delimiter) for path in files.paths}
    first = headers[files.paths[0]]
    for path, header in headers.items():
        if header != first:
            raise ValueError(
                f"{files.spelled[path]} has another header than {files.spelled[files.paths[0]]}; expected the same "
                "columns in all files"
            )
    # DuckDB is given names of our own, so that it does not rename columns whose names are equal but for case.
    placeholders = [f"column{number}" for number in range(len(first[1]))]

    def scan(columns: list[str], with_file: bool) -> ir.Table:
        table = connection.read_csv(
            [glob.escape(path) for path in files.paths],
            columns=dict.fromkeys(placeholders, "VARCHAR"),
            auto_detect=False,  # nothing is guessed
            header=True,
            delim=first[0],
            quote='"',
            escape='"',
            comment="",
            hive_partitioning=False,
            **({"filename": FILE} if with_file else {}),
        )
        chosen = {name: table[placeholders[first[1].index(name)]] for name in columns}
        return table.select(*([FILE] if with_file else []), ibis.row_number().name(SOURCE_ROW), **chosen)

    return first[1], scan


def _csv_header(path: str, spelled: str, delimiter: str | None) -> tuple[str, list[str]]:
    """The delimiter and the column names of a CSV file, without blanks around them.

    The names of RecBole's atomic files lose their types: item_id:token is item_id.
    """
    with open(path, "rb") as file:
        line = re.split(rb"[\r\n]", file.read(1 << 20), maxsplit=1)[0]
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{spelled} is neither UTF-8 CSV, nor JSON lines, nor Parquet; convert it first")
    if not text.strip():
        raise ValueError(
            f"the first line of {spelled} is blank; expected a CSV header such as user_id,item_id,timestamp"
        )
    try:
        headers = {mark: next(csv.reader([text], delimiter=mark, skipinitialspace=True)) for mark in DELIMITERS}
    except csv.Error as error:
        raise ValueError(f"the first line of {spelled} is no CSV header: {error}") from error
    if delimiter is not None:
        if set(delimiter) & set('"\r\n'):
            raise ValueError(f"a delimiter has no quotes and no line ends; got {delimiter!r}")
        names = next(csv.reader([text.replace(delimiter, "\x1f")], delimiter="\x1f"))
    else:
        delimiter = max(headers, key=lambda mark: len(headers[mark]))
        names = headers[delimiter]
    names = [name.strip() for name in names]
    typed = [ATOMIC_NAME.fullmatch(name) for name in names]
    return delimiter, [match[1] for match in typed if match] if all(typed) else names


def _json(connection: Any, files: LogFiles) -> tuple[list[str], Scan]:
    # DuckDB's reader of columns takes names that differ in case for one, so the values are taken from the objects.
    paths = ", ".join(_quoted(glob.escape(path)) for path in files.paths)
    rows = f"read_json_objects([{paths}], filename = '{FILE}')"
    odd = connection.con.execute(
        f"SELECT {FILE}, json FROM {rows} WHERE json_type(json) <> 'OBJECT' "
        "OR len(json_keys(json)) <> len(list_distinct(json_keys(json))) LIMIT 1"
    ).fetchone()
    if odd:
        raise ValueError(
            f"{files.spelled[odd[0]]} has the value {odd[1][:100]}; expected objects, in which each name is there once"
        )
    found = connection.con.execute(
        "SELECT name FROM (SELECT unnest(names) AS name, generate_subscripts(names, 1) AS position, number FROM "
        f"(SELECT json_keys(json) AS names, row_number() OVER () AS number FROM {rows})) "
        "GROUP BY name ORDER BY min((number, position))"
    )
    names = [name for (name,) in found.fetchall()]

    def scan(columns: list[str], with_file: bool) -> ir.Table:
        pointers = [_quoted("/" + name.replace("~", "~0").replace("/", "~1")) for name in columns]
        kinds = [f"list(DISTINCT json_type(json, {pointer}))" for pointer in pointers]
        row = connection.con.execute(f"SELECT {', '.join(['0', *kinds])} FROM {rows}").fetchone()[1:]
        chosen = [FILE] if with_file else []
        for column, pointer, kinds in zip(columns, pointers, row, strict=True):
            kind = set(kinds or ()) - {"NULL", None}
            value = f"json_extract_string(json, {pointer})"
            if kind == {"ARRAY"}:
                elements = f"SELECT unnest(json_extract(json, {pointer})::JSON[]) AS element FROM {rows}"
                found = connection.con.execute(f"SELECT DISTINCT json_type(element) FROM ({elements})").fetchall()
                of_elements = {name for (name,) in found} - {"NULL", None}
                odd = {f"ARRAY of {name}" for name in of_elements & {"BOOLEAN", "OBJECT", "ARRAY"}}
                is_whole = of_elements <= {"BIGINT", "UBIGINT"}
                is_text = not of_elements or "VARCHAR" in of_elements
                element = "VARCHAR" if is_text else "BIGINT" if is_whole else "DOUBLE"
                value = f"json_extract(json, {pointer})::{element}[]"
            elif kind == {"BOOLEAN"}:
                odd, value = set(), f"{value}::BOOLEAN"
            else:
                odd = kind & {"BOOLEAN", "OBJECT", "ARRAY"}
            if odd:
                raise ValueError(
                    f"column {column!r} of {files.source} has values of the type {', '.join(sorted(odd))}; expected "
                    "text, numbers, or only true and false, or only lists of text or numbers"
                )
            if "DOUBLE" in kind and "VARCHAR" not in kind:  # DuckDB calls whole numbers of many digits so, too
                is_float = f"bool_or(regexp_matches({value}, '[^0-9-]'))"
                if connection.con.execute(f"SELECT {is_float} FROM {rows}").fetchone()[0]:
                    value += "::DOUBLE"
            chosen.append(f'{value} AS "{column.replace(chr(34), chr(34) * 2)}"')
        view = ibis.util.gen_name("json")
        chosen.append(f"row_number() OVER () - 1 AS {SOURCE_ROW}")
        connection.con.execute(f"CREATE TEMP VIEW {view} AS SELECT {', '.join(chosen)} FROM {rows}")
        return connection.table(view)

    return names, scan


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _parquet(connection: Any, files: LogFiles) -> tuple[list[str], Scan]:
    schemas = {path: pq.read_schema(path) for path in files.paths}
    first = files.paths[0]
    names = schemas[first].names

    def scan(columns: list[str], with_file: bool) -> ir.Table:
        for path in files.paths:
            for name in columns:
                if name not in schemas[path].names:
                    raise ValueError(
                        f"{files.spelled[path]} lacks the column {name!r}, which {files.spelled[first]} has"
                    )
                kind, expected = schemas[path].field(name).type, schemas[first].field(name).type
                if _group(kind) != _group(expected):
                    raise ValueError(
                        f"expected one type of column {name!r} in all files; got {expected} in {files.spelled[first]} "
                        f"and {kind} in {files.spelled[path]}: write it with one type in all of them"
                    )
        if all(_is_native(path, schemas[path], columns) for path in files.paths):
            table = connection.read_parquet(
                [glob.escape(path) for path in files.paths],
                hive_partitioning=False,
                union_by_name=True,
                **({"filename": FILE} if with_file else {}),
            )
            return table.select(*columns, *([FILE] if with_file else []))
        schema = pa.schema([schemas[first].field(name) for name in columns])
        if with_file:
            schema = schema.append(pa.field(FILE, pa.string()))

        def batches() -> Iterator[pa.RecordBatch]:
            for path in files.paths:
                for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=columns):
                    batch = batch.select(columns)
                    yield batch.append_column(FILE, pa.array([path] * len(batch))) if with_file else batch

        return _stored(schema, batches(), schema.names, files.source, connection)

    return names, scan


def _is_native(path: str, schema: pa.Schema, columns: Sequence[str]) -> bool:
    """Whether DuckDB itself reads these columns of a Parquet file exactly."""
    lower = [name.lower() for name in schema.names]
    parquet = pq.ParquetFile(path).schema
    physical = {column.path: column for column in map(parquet.column, range(len(parquet)))}

    def is_exact(name: str) -> bool:
        kind, column = schema.field(name).type, physical.get(name)  # None: a nested column
        if column is not None and column.logical_type.type == "UUID":  # plain bytes for PyArrow before version 21
            return True
        # PyArrow before version 21 marked UUIDs in its own metadata only. DuckDB reads these as bytes.
        if isinstance(kind, pa.UuidType) or (column is not None and column.physical_type == "INT96"):
            return False
        return pa.types.is_dictionary(kind) or plain_type(kind) == kind

    return all(lower.count(name.lower()) == 1 and is_exact(name) for name in columns)


def _group(kind: pa.DataType) -> str:
    """What the types have in common that one column may have in different files, since DuckDB finds a type for all."""
    kind = plain_type(kind)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.tz is None):
        return "time"
    if pa.types.is_timestamp(kind):
        return "time with a zone"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return "text" if is_text else str(kind)


def damaged(files: LogFiles, kind: str, error: Exception) -> ValueError:
    """The error of a library as one that names the file."""
    text = without_advice(error)
    for path, spelled in files.spelled.items():
        text = text.replace(path, spelled)
    if "state machine reached an invalid state" in text:
        text = "its line ends are mixed or a quote is not closed; expected one kind of line end, and quotes doubled"
    if len(text) > MESSAGE_LENGTH:
        text = f"{text[: MESSAGE_LENGTH // 2]} … {text[-MESSAGE_LENGTH // 2 :]}"
    named = [spelled for spelled in files.spelled.values() if spelled in text]
    where = named[0] if named else files.source
    return ValueError(f"cannot read {where} as {kind}: {text}")


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
        if table[item_column].type().is_floating():
            raise ValueError(
                f"ids must be text or whole numbers; column {item_column!r} of {item_titles} is "
                f"{table[item_column].type()}: convert it first"
            )
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


def without_advice(error: BaseException) -> str:
    """The first lines of an error of DuckDB, without its advice on its own options and functions."""
    return first_lines(ValueError(ADVICE.split(str(error))[0]))


def first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])
