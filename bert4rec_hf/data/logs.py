"""Reading a raw log from files or data frames into an Ibis table."""

import csv
import glob
import gzip
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .named_datasets import NAMED_DATASETS

logger = logging.getLogger(__name__)

SOURCE_ROW = "__source_row__"  # column that `read_log` adds: the number of the row in the source
DELIMITERS = (",", "\t", ";", "|")
# Accepted spellings of dates and times. `WITHOUT_ZONE` is for columns in which no value may have a time zone.
YEAR_FIRST = r"^\s*\d{4}[-/]"
WITHOUT_ZONE = YEAR_FIRST + r"\d{1,2}[-/]\d{1,2}([ T]\s*\d{1,2}:\d{2}(:\d{2}(\.\d*)?)?)?\s*$"


def read_log(source: Any, *, id_columns: Sequence[str] = ("user_id", "item_id")) -> ir.Table:
    """Read a log from CSV, TSV or Parquet files, or from memory, as an Ibis table on its own DuckDB connection.

    The table is lazy: DuckDB reads the rows when the table is used. The column `SOURCE_ROW` is added, so that events
    with the same time keep their order in the source.

    Args:
        source: A file, a glob pattern, a data frame of pandas or Polars, a `datasets.Dataset`, or an Arrow table. The
            files of a pattern are read in the order of their names. A CSV file must be UTF-8, start with a header and
            use one of `DELIMITERS`; it may be gzipped.
        id_columns: Columns of a CSV file to read as text, so that leading zeros and long numbers survive. The types of
            the other columns are guessed. All Parquet files of a pattern must have the same types in these columns.

    Returns:
        The columns of the log and `SOURCE_ROW`.

    Raises:
        TypeError: If the source is of another type.
        FileNotFoundError: If the file does not exist, or no file matches the pattern.
        ValueError: If a file is empty, or neither CSV nor Parquet, or if the files differ in kind, in header or in the
            types of the id columns.
    """
    if type(source).__module__ == "datasets.arrow_dataset":  # comparing the name avoids importing datasets
        source = source.with_format("arrow")[:]
    if hasattr(source, "__arrow_c_stream__"):
        rows = pa.table(source)
        connection = connect()
        # Registering the table through Ibis fails (ibis-project/ibis issue 12101).
        connection.con.register("log", rows.append_column(SOURCE_ROW, pa.array(np.arange(len(rows)))))
        return connection.table("log")
    if not isinstance(source, str | Path):
        raise TypeError(
            f"expected the path of a log, a pattern, or a data frame; got {type(source).__name__}: for several files, "
            "give a pattern, or a table from ibis.read_parquet"
        )
    paths = _log_files(source)
    connection = connect()
    kinds = {path: _is_parquet(path) for path in paths}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"{source} matches CSV and Parquet files; expected files of one kind")
    try:
        if kinds[paths[0]]:
            names = pq.read_schema(paths[0]).names
            _check_names(paths[0], names)
            _check_columns(paths, id_columns)
            # File names are escaped, since DuckDB would read them as patterns, and folders such as day=2026-01-01 are
            # not read as columns. A column with different types in different files gets a common type.
            files = [glob.escape(path) for path in paths]
            log = connection.read_parquet(files, hive_partitioning=False, union_by_name=True).select(names)
        else:
            delimiter, header = _csv_header(paths[0])
            for path in paths[1:]:
                if _csv_header(path) != (delimiter, header):
                    raise ValueError(
                        f"{path} has another header than {paths[0]}; expected the same columns in all files"
                    )
            as_text = {column: "VARCHAR" for column in id_columns if column in header}
            try:
                log = _read_csv(connection, paths, delimiter, types=as_text)
            except duckdb.Error:  # the error of type guessing has no line number; reading as text gives one with it
                text = dict.fromkeys(header, "VARCHAR")
                _read_csv(connection, paths, delimiter, columns=text, auto_detect=False).count().execute()
                raise
            times = [name for name, kind in log.schema().items() if kind.is_date() or kind.is_timestamp()]
            if times:
                written = _read_csv(connection, paths, delimiter, types=as_text | dict.fromkeys(times, "VARCHAR"))
                # DuckDB guesses which part of 01/02/03 is the year, and drops time zones that only some values have.
                # Such columns are read as text, which `prepare` refuses as a time column.
                patterns = {name: YEAR_FIRST if _has_zone(log[name].type()) else WITHOUT_ZONE for name in times}
                clear = {name: written[name].re_search(pattern).all() for name, pattern in patterns.items()}
                unclear = [name for name, all_are in written.aggregate(**clear).to_pyarrow().to_pylist()[0].items()
                           if all_are is False]  # fmt: skip
                if unclear:
                    types = as_text | dict.fromkeys(unclear, "VARCHAR")
                    log = _read_csv(connection, paths, delimiter, types=types)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {source} as CSV or Parquet: {first_lines(error)}") from error
    return log.mutate(ibis.row_number().name(SOURCE_ROW))


def connect() -> Any:
    """An in-memory DuckDB. Its temporary files go to the system's folder, not to the working directory."""
    folder = os.path.join(tempfile.gettempdir(), ibis.util.gen_name("bert4rec"))
    connection = ibis.duckdb.connect(temp_directory=folder)
    if sys.stdout.isatty():
        connection.raw_sql("SET enable_progress_bar = true")  # it appears for queries of more than two seconds
    return connection


def _read_csv(connection: Any, paths: Sequence[str], delimiter: str, **options: Any) -> ir.Table:
    return connection.read_csv(
        [glob.escape(path) for path in paths],
        hive_partitioning=False,
        header=True,
        delim=delimiter,
        quote='"',
        escape='"',
        comment="",  # otherwise DuckDB may take lines that start with # for comments and drop them
        sample_size=-1,  # guess types from all rows, since a later value that does not fit may be rounded
        **options,
    )


def read_titles(
    item_titles: Mapping[str, str] | str | Path | None, item_column: str, catalogue: Iterable[str]
) -> dict[str, str] | None:
    """Read the titles of the catalogue's items.

    Args:
        item_titles: Titles by raw item id; or a CSV or Parquet file with `item_column` and a column title. None: no
            titles.
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
        table = read_log(item_titles, id_columns=(item_column, "title"))
        for column in (item_column, "title"):
            if column not in table.columns:
                raise ValueError(
                    f"{item_titles} has no column {column!r}; expected {item_column} and title, "
                    f"got {', '.join(name for name in table.columns if name != SOURCE_ROW)}"
                )
        table = table.select(item_id=table[item_column].cast("string"), title=table.title.cast("string")).to_pyarrow()
        pairs = set(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))
        titles = dict(sorted(pairs, key=lambda pair: pair[1] or ""))
        if len(pairs) > len(titles):
            logger.warning("%s has several titles for some items, %d more than it needs: the last in alphabetical "
                           "order is used", item_titles, len(pairs) - len(titles))  # fmt: skip
    # Data frames represent a missing title as NaN.
    found = {item: titles[item] for item in catalogue if isinstance(titles.get(item), str) and titles[item]}
    if not found:
        raise ValueError(
            f"none of the {len(titles)} titles belongs to an item of the catalogue: the ids of the catalogue look like "
            f"{', '.join(map(repr, catalogue[:3]))}, those of the titles like {', '.join(map(repr, list(titles)[:3]))}"
        )
    if len(found) < len(catalogue):
        logger.warning("%d of %d items have no title", len(catalogue) - len(found), len(catalogue))
    return found


def _log_files(source: str | Path) -> list[str]:
    source = str(Path(source).expanduser()) if isinstance(source, Path) else os.path.expanduser(source)
    if os.path.isfile(source):
        paths = [source]
    elif os.path.isdir(source):
        raise ValueError(f"{source} is a folder; name its files, as in {os.path.join(source, '*.parquet')}")
    elif glob.has_magic(source):
        paths = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        if not paths:
            raise FileNotFoundError(f"no file matches {source}")
    else:
        is_a_name = os.path.basename(source) == source and not os.path.splitext(source)[1]
        known = f", or the name of a data set that prepare fetches: {', '.join(NAMED_DATASETS)}" if is_a_name else ""
        raise FileNotFoundError(f"no such file: {source}; expected a CSV or Parquet file or a glob pattern{known}")
    for path in paths:
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty; expected a CSV file with a header, or Parquet")
    return paths


def _is_parquet(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _has_zone(kind: Any) -> bool:
    return kind.is_timestamp() and kind.timezone is not None


def _check_columns(paths: Sequence[str], id_columns: Sequence[str]) -> None:
    """Raise unless all files have the columns of the first, and the same types of ids.

    With different types, the ids 7 and '007' of the same item would become two items.
    """
    seen: dict[str, tuple[str, pa.DataType]] = {}
    first_names = [name.lower() for name in pq.read_schema(paths[0]).names]
    for path in paths if len(paths) > 1 else ():
        kinds = {field.name.lower(): field.type for field in pq.read_schema(path)}  # DuckDB's names ignore case
        missing = [name for name in first_names if name not in kinds]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]!r}, which {paths[0]} has")
        for column in id_columns:
            kind = kinds.get(column.lower())
            if kind is None:
                continue
            first_path, first_kind = seen.setdefault(column, (path, kind))
            if _id_type(kind) != _id_type(first_kind):
                raise ValueError(
                    f"expected one type of column {column!r} in all files; got {first_kind} in {first_path} and {kind} "
                    f"in {path}: write it as text in all of them"
                )


def _id_type(kind: pa.DataType) -> pa.DataType:
    """The type that stands for all types whose ids have the same text, such as int64 for every integer type."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(kind):
        return pa.int64()
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.string() if is_text else kind


def _csv_header(path: str) -> tuple[str, list[str]]:
    """The delimiter and the column names of a CSV file. Raises if the file is not text or has no header."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        line = file.readline(1 << 20)
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is neither UTF-8 CSV nor Parquet; convert it first")
    if not text.strip():
        raise ValueError(f"the first line of {path} is blank; expected a CSV header such as user_id,item_id,timestamp")
    try:
        headers = {delimiter: next(csv.reader([text], delimiter=delimiter)) for delimiter in DELIMITERS}
    except csv.Error as error:
        raise ValueError(
            f"the first line of {path} is no CSV header ({error}); expected lines that end with \\n or \\r\\n: "
            "convert the file first, for example with tr '\\r' '\\n' if its lines end with \\r"
        ) from error
    delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))
    _check_names(path, headers[delimiter])
    return delimiter, headers[delimiter]


def _check_names(path: str, names: Sequence[str]) -> None:
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"{path} has the column {twice[0]!r} twice; rename one of them")


def first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
