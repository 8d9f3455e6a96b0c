"""The columns of CSV, JSON and Parquet files, as DuckDB reads them, or as Arrow does where DuckDB is not exact."""

import csv
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from .duckdb_tables import SOURCE_ROW, plain_type, stored, without_advice
from .log_files import LogFiles

DELIMITERS = (",", "\t", ";", "|")
# Column names of RecBole's atomic files name the type as well, as in item_id:token.
ATOMIC_NAME = re.compile(r"(.+):(token|token_seq|float|float_seq)")
MESSAGE_LENGTH = 500  # of a library's message, which may quote a row
ROWS_AT_ONCE = 100_000
FILE = "__file__"  # column of the file that a row is from, while partitions are read
# Reads columns of files, with `FILE` if that is wanted.
Scan = Callable[[list[str], bool], ir.Table]


def csv_columns(connection: Any, files: LogFiles, delimiter: str | None) -> tuple[list[str], Scan]:
    """The names of the columns of CSV files, and what reads them, as text."""
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


def json_columns(connection: Any, files: LogFiles) -> tuple[list[str], Scan]:
    """The names of the keys of JSON lines, and what reads them: as text, numbers, booleans or lists."""
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
        for column, pointer, of_column in zip(columns, pointers, row, strict=True):
            types = set(of_column or ()) - {"NULL", None}
            value = f"json_extract_string(json, {pointer})"
            if types == {"ARRAY"}:
                elements = f"SELECT unnest(json_extract(json, {pointer})::JSON[]) AS value FROM {rows}"
                found = connection.con.execute(f"SELECT DISTINCT json_type(value) FROM ({elements})").fetchall()
                of_elements = {name for (name,) in found} - {"NULL", None}
                if not of_elements & {"BOOLEAN", "OBJECT", "ARRAY"}:
                    value = f"json_extract(json, {pointer})::{_type_of_numbers(connection, elements, of_elements)}[]"
                    types = set()
            elif types == {"BOOLEAN"}:
                value, types = f"{value}::BOOLEAN", set()
            if types & {"BOOLEAN", "OBJECT", "ARRAY"}:
                raise JSONColumnError(column, files.source, types)
            if "DOUBLE" in types:
                values = f"SELECT json_extract(json, {pointer}) AS value FROM {rows}"
                if _type_of_numbers(connection, values, types) == "DOUBLE":
                    value += "::DOUBLE"
            chosen.append(f'{value} AS "{column.replace(chr(34), chr(34) * 2)}"')
        view = ibis.util.gen_name("json")
        chosen.append(f"row_number() OVER () - 1 AS {SOURCE_ROW}")
        connection.con.execute(f"CREATE TEMP VIEW {view} AS SELECT {', '.join(chosen)} FROM {rows}")
        return connection.table(view)

    return names, scan


class JSONColumnError(ValueError):
    """A column of JSON with objects, nested lists, or values of several types, which makes no column of one type."""

    def __init__(self, column: str, source: str, types: set[str]):
        self.column = column
        found = "lists of booleans, lists or objects" if types == {"ARRAY"} else " and ".join(sorted(types))
        super().__init__(
            f"column {column!r} of {source} has {found}; expected values of one type: text, numbers, true and false, "
            "or lists of text or numbers: write it so, or leave the column out"
        )


def _type_of_numbers(connection: Any, values: str, types: set[str]) -> str:
    """The type of DuckDB for JSON values, text or numbers. Whole numbers that are too long for it are text."""
    if not types or "VARCHAR" in types:
        return "VARCHAR"
    texts = f"SELECT value ->> '$' AS text FROM ({values}) WHERE json_type(value) <> 'NULL'"
    tests = "bool_and(regexp_full_match(text, '-?[0-9]+')), bool_and(TRY_CAST(text AS BIGINT) IS NOT NULL)"
    is_whole, fits = connection.con.execute(f"SELECT {tests} FROM ({texts})").fetchone()
    return "DOUBLE" if not is_whole else "BIGINT" if fits else "VARCHAR"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def parquet_columns(connection: Any, files: LogFiles) -> tuple[list[str], Scan]:
    """The names of the columns of Parquet files, and what reads them, with the types of the file."""
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

        return stored(schema, batches(), schema.names, files.source, connection)

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
