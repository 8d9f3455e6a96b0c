"""Histories from Parquet files, JSON lines or data frames, in batches, and item ids from files. All are checked."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..data.duckdb_tables import LIBRARY_ERRORS
from ..data.histories import PREPARATION_FILE, read_preparation
from ..data.histories import histories_files as prepared_files
from ..data.logs import open_log
from ..model.pipeline_inputs import IGNORED_KEYS, check_keys, described, events_of, is_event

# Number of histories that are read at once.
ROWS_PER_BATCH = 8192
# Number of histories of a Parquet file in one part.
ROWS_PER_PART = 16 * ROWS_PER_BATCH
# Longest line of JSON lines, in characters.
MAX_LINE_LENGTH = 2**27
EXAMPLE = '{"user_id": "7", "item_id": ["50", "172"]}'

Request = dict[str, list[str | int]]


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a file of histories. One process answers them, and a folder has an output file for them.

    Attributes:
        path: The file.
        start: The first row.
        stop: The row after the last. None: the part is the whole file.
    """

    path: str
    start: int = 0
    stop: int | None = None


@dataclass
class Batch:
    """Rows that were read at once.

    Attributes:
        source: The file.
        users: (rows,) the user ids.
        requests: A mapping for each row, with `history` and, if the row has them, `exclude`, `candidates` and
            `event_type`, the types of the history's events.
    """

    source: str
    users: pa.Array
    requests: list[Request]


def history_files(histories: str | os.PathLike) -> list[str]:
    """The files of histories that a path names.

    Args:
        histories: A file; a pattern of files; a folder; or a prepared folder, for its histories. Files and
            folders with names that start with "." or "_" are left out. Spark writes such files beside its parts.

    Returns:
        The paths, in the order of their names.

    Raises:
        FileNotFoundError: If there is no file.
    """
    name = os.path.expanduser(histories)
    if os.path.isfile(os.path.join(name, PREPARATION_FILE)):
        return [str(path) for path in prepared_files(Path(name))]
    if os.path.isfile(name):
        return [name]
    paths = Path(name).rglob("*") if os.path.isdir(name) else map(Path, glob.glob(name, recursive=True))
    given = Path(name).parts
    found = [path for path in paths if not any(word[0] in "._" for word in path.parts if word not in given)]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"there is no file {histories}; expected histories: Parquet, JSON lines, or a folder or pattern of such "
            "files"
        )
    return [str(path) for path in sorted(found)]


def divide(paths: Sequence[str]) -> tuple[list[Part], pa.DataType]:
    """Divide files into parts, after a check of their columns.

    Returns:
        The parts, in the order of files and rows, and the type of the user ids. A Parquet file has a part for every
        `ROWS_PER_PART` rows. A file of JSON lines is one part.

    Raises:
        ValueError: If a file is neither Parquet nor JSON lines, lacks a column or has an unknown one; or if the files
            have different types of user ids.
    """
    parts: list[Part] = []
    kinds: dict[pa.DataType, str] = {}
    for path in paths:
        if _is_parquet(path):
            with _open(path) as file:
                schema, num_rows = file.schema_arrow, file.metadata.num_rows
            _columns(schema.names, path, _event_columns(path))
            kinds.setdefault(_user_type(schema.field("user_id").type), path)
            starts = range(0, max(num_rows, 1), ROWS_PER_PART)
            parts += [Part(path, start, min(start + ROWS_PER_PART, num_rows)) for start in starts]
        else:
            first = next(_json_batches(path, None), None)
            if first is None:
                raise ValueError(f"{path} is empty; expected histories, Parquet or JSON lines as in {EXAMPLE}")
            kinds.setdefault(first.users.type, path)
            parts.append(Part(path))
    if len(kinds) > 1:
        one, other = list(kinds.items())[:2]
        raise ValueError(
            f"expected one type of user_id in all files; got {one[0]} in {one[1]} and {other[0]} in {other[1]}: write "
            "it with the same type in all of them"
        )
    return parts, next(iter(kinds))


def read_part(part: Part, user_type: pa.DataType) -> Iterator[Batch]:
    """Read the rows of a part.

    Raises:
        ValueError: If a row has no user id, or a value that is not a list of item ids. The message names the file, the
            column and the row.
    """
    return _json_batches(part.path, user_type) if part.stop is None else _parquet_batches(part, part.stop)


def read_frame(frame: Any) -> Batch:
    """Read a pandas data frame, as Spark gives it to a function of `mapInPandas`.

    Raises:
        ValueError: If a column is missing, unknown or of another type.
    """
    source = "the data frame"
    names = _columns(list(frame.columns), source)
    columns = [
        [
            None if is_missing else value.tolist() if hasattr(value, "tolist") else value
            for value, is_missing in zip(frame[name], frame[name].isna(), strict=True)
        ]
        for name in names
    ]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    try:
        users = pa.array(frame["user_id"], from_pandas=True)
    except pa.ArrowException as error:
        raise ValueError(f"{source}: expected one type in the column user_id; got several: {error}") from error
    return _batch(source, "row", range(len(rows)), users, rows)


def read_item_ids(path: str | os.PathLike) -> list[str]:
    """Read item ids from a file.

    Args:
        path: A Parquet file, or a CSV file with a name in .csv, .tsv, .csv.gz or .tsv.gz, with the column item_id; or
            else a text file with one id per line. Blank lines of text are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has no column item_id, the column has other values than ids, or the text is not UTF-8.
    """
    expected = "expected item ids: text with one id per line, or CSV or Parquet with the column item_id"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}; {expected}")
    if not _is_parquet(path) and not os.fspath(path).removesuffix(".gz").endswith((".csv", ".tsv")):
        try:
            lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error}); {expected}") from error
        return [line.removesuffix("\r") for line in lines if line.strip()]
    log = open_log(os.fspath(path))
    if "item_id" not in log.columns:
        raise ValueError(f"{path} has the columns {', '.join(log.columns)}; {expected}")
    table = log.table(["item_id"])
    kind = table.item_id.type()
    if not (kind.is_string() or kind.is_integer()):
        raise ValueError(f"item_id of {path} must be text or integers, one id per row; got {kind}")
    try:
        items = table.select(item_id=table.item_id.cast("string")).to_pyarrow()["item_id"].to_pylist()
    except LIBRARY_ERRORS as error:
        raise log.error(error) from error
    if None in items:
        raise ValueError(f"{path}, row {items.index(None)} (the first is 0): item_id is empty; {expected}")
    return items


def _is_parquet(path: str | os.PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except LIBRARY_ERRORS as error:
        raise ValueError(f"cannot read the Parquet file {path}: {error}") from error


def _user_type(kind: pa.DataType) -> pa.DataType:
    """The type of user ids in the output. All types of text become string."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    return pa.string() if is_text else kind


def _event_columns(path: str) -> list[str]:
    """The event columns that `prepare` wrote into a file of histories, beside a preparation.json that names them."""
    preparation = Path(path).with_name(PREPARATION_FILE)
    if not preparation.is_file() or Path(path) not in prepared_files(Path(path).parent):
        return []
    columns = read_preparation(preparation.parent)["columns"]
    weights = ["weight"] if columns.get("weight_column") is not None else []
    return (columns.get("event_columns") or []) + weights


def _columns(names: Sequence[str], source: str, event_columns: Collection[str] = ()) -> list[str]:
    """The columns to read beside user_id. Raises ValueError if a column is missing, unknown or there twice."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{source} has the column {twice[0]!r} twice; rename one of them")
    history = [name for name in ("item_id", "history") if name in names]
    for name, is_there in (("user_id", "user_id" in names), ("item_id", bool(history))):
        if not is_there:
            raise ValueError(f"{source} has no column {name}; expected user_id and item_id, got {list(names)}")
    if len(history) > 1:
        raise ValueError(f"{source} has the columns item_id and history, which mean the same; leave one of them out")
    try:
        check_keys(names, ignored=(*IGNORED_KEYS, *event_columns))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    further = ("exclude", "candidates", "event_type")
    return history + [name for name in further if name in names and name not in event_columns]


def _parquet_batches(part: Part, stop: int) -> Iterator[Batch]:
    with _open(part.path) as file:
        names = _columns(file.schema_arrow.names, part.path, _event_columns(part.path))
        groups: list[int] = []
        row = end = 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if start < stop and part.start < end:
                row = row if groups else start
                groups.append(group)
        batches = file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=["user_id", *names])
        while True:
            try:
                read = next(batches, None)
            except LIBRARY_ERRORS as error:
                raise ValueError(f"cannot read the Parquet file {part.path}: {error}") from error
            if read is None:
                return
            first, last = max(part.start - row, 0), min(stop - row, len(read))
            if first < last:
                rows = read.slice(first, last - first)
                numbers = range(row + first, row + last)
                yield _batch(part.path, "row", numbers, rows["user_id"], rows.select(names).to_pylist())
            row += len(read)


def _json_batches(path: str, user_type: pa.DataType | None) -> Iterator[Batch]:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    names: dict[tuple[str, ...], list[str]] = {}
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: expected a JSON object, as in {EXAMPLE}; {error}") from error
        keys = tuple(row)
        if keys not in names:
            names[keys] = _columns(keys, place)
        user = row["user_id"]
        kind = {str: pa.string(), int: pa.int64()}.get(type(user))
        if kind is None or (kind == pa.int64() and not -(2**63) <= user < 2**63):
            raise ValueError(f"{place}: user_id must be text or an integer of 64 bits; got {described(user)}")
        user_type = user_type or kind
        if kind != user_type:
            raise ValueError(f"{place}: expected a user_id of type {user_type}, as before; got {described(user)}")
        rows.append({name: row[name] for name in ("user_id", *names[keys])})
        numbers.append(number)
        if len(rows) == ROWS_PER_BATCH:
            yield _batch(path, "line", numbers, pa.array([row.pop("user_id") for row in rows], user_type), rows)
            rows, numbers = [], []
    if rows:
        yield _batch(path, "line", numbers, pa.array([row.pop("user_id") for row in rows], user_type), rows)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of JSON, with their numbers from 1. The file may be gzipped."""
    with open(path, "rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_gzipped else open)(path, "rt", encoding="utf-8-sig") as text:
        try:
            # A line may be endless in a compressed file of a few bytes.
            for number, line in enumerate(iter(lambda: text.readline(MAX_LINE_LENGTH), ""), start=1):
                if len(line) == MAX_LINE_LENGTH:
                    raise ValueError(f"{path}, line {number}: a line may have {MAX_LINE_LENGTH:,} characters")
                if line.strip() and not line.lstrip().startswith("{"):
                    raise ValueError(
                        f"{path} is neither a Parquet file nor JSON lines, as in {EXAMPLE}: line {number} is "
                        f"{line.strip()[:60]!r}; bert4rec prepare makes histories from a log"
                    )
                if line.strip():
                    yield number, line
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is neither a Parquet file nor JSON lines, as in {EXAMPLE}: {error}") from error


def _batch(source: str, unit: str, numbers: Sequence[int], users: pa.Array, rows: list[dict[str, Any]]) -> Batch:
    """Check rows, and make requests of them.

    Args:
        source: The file.
        unit: What the numbers count, "row" (from 0) or "line" (from 1).
        numbers: (rows,) the number of each row in the file.
        users: (rows,) the user ids.
        rows: For each row, the values of the history, `exclude` and `candidates`.
    """

    def error(place: int, name: str, expected: str, got: str) -> ValueError:
        counted = " (the first is 0)" if unit == "row" else ""
        return ValueError(f"{source}, column {name}, {unit} {numbers[place]}{counted}: expected {expected}; got {got}")

    if users.null_count:
        raise error(users.is_null().to_pylist().index(True), "user_id", "a user id", "null")
    requests = []
    for place, row in enumerate(rows):
        request: Request = {}
        for name, value in row.items():
            if value is None and name in ("exclude", "candidates", "event_type"):
                continue
            if value is None:
                raise error(place, name, "a list of item ids, which is empty for a user without a history", "null")
            if name in ("item_id", "history") and isinstance(value, list | tuple) and any(map(is_event, value)):
                try:
                    value, types = events_of(value, row.get("event_type"))
                except ValueError as problem:
                    raise error(place, name, "a list of item ids or events", str(problem)) from problem
                request["event_type"] = types
            if name == "event_type":
                history = row.get("item_id", row.get("history"))
                if not isinstance(value, list | tuple) or not isinstance(history, list | tuple):
                    raise error(place, name, "a list of event types", described(value))
                if len(value) != len(history):
                    raise error(place, name, f"{len(history)} types, one for each item", f"{len(value)} types")
                request.setdefault("event_type", list(value))
                continue
            if not isinstance(value, list | tuple):
                hint = ": bert4rec prepare makes histories from a log" if name in ("item_id", "history") else ""
                raise error(place, name, "a list of item ids", f"{described(value)}{hint}")
            wrong = next((item for item in value if type(item) is not str and not _is_integer(item)), value)
            if wrong is not value:
                got = "a list with a null" if wrong is None else f"a list with {described(wrong)}"
                raise error(place, name, "a list of item ids, text or integers", got)
            request["history" if name == "item_id" else name] = list(value)
        requests.append(request)
    return Batch(source, users.cast(_user_type(users.type)), requests)


def _is_integer(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)
