"""Tables of DuckDB: from Arrow without loss, in memory or on the disk, and the errors of the libraries that read."""

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa

SOURCE_ROW = "__source_row__"  # column that `Log.table` adds: the number of the row in the source
LIBRARY_ERRORS = (duckdb.Error, pa.ArrowException, OSError, UnicodeDecodeError)
# Where DuckDB begins to advise on its own options and functions, or to quote a query.
ADVICE = re.compile(
    r"(?<=\S)\s*(?:Possible [Ff]ix|Possible [Ss]olution|Candidate |Did you mean|Use TRY|Try increasing|You might need"
    r"|LINE \d+:)"
)


def connect() -> Any:
    """An in-memory DuckDB. Its temporary files go to the system's folder, not to the working directory."""
    folder = os.path.join(tempfile.gettempdir(), ibis.util.gen_name("bert4rec"))
    connection = ibis.duckdb.connect(temp_directory=folder)
    if sys.stdout.isatty():
        connection.raw_sql("SET enable_progress_bar = true")  # it appears for queries of more than two seconds
    return connection


def registered(table: pa.Table, name: str) -> ir.Table:
    """An Arrow table in memory, as a table of DuckDB that is not a copy."""
    table = _plain(table, name)
    connection = connect()
    # Registering the table through Ibis fails (ibis-project/ibis issue 12101).
    connection.con.register("log", table.append_column(SOURCE_ROW, pa.array(np.arange(len(table)))))
    return connection.table("log")


def stored(
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


def without_advice(error: BaseException) -> str:
    """The first lines of an error of DuckDB, without its advice on its own options and functions."""
    return first_lines(ValueError(ADVICE.split(str(error))[0]))


def first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])
