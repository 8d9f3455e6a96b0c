"""Every source by every spelling of times and ids: the right events in the right order, or a refusal that says why.

A cell of the table writes one log to one source. Three events of user "a" stand in the source in the order third,
first, second; the expected history is first, second, third.
"""

import bz2
import gzip
import json
import sqlite3
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from logs_on_disk import items_of, write_csv

from bert4rec_hf.data.logs import open_log

ROW_ORDER = (2, 0, 1)  # of the three events of user "a" in the source
ITEMS = ["first", "second", "third"]


# --- sources: functions of a folder and a table that return what `histories` takes


def _texts(table: pa.Table) -> list[list[Any]]:
    return [list(row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]


def _csv(folder: Path, table: pa.Table, separator: str = ",", name: str = "log.csv") -> Path:
    return write_csv(folder / name, _texts(table), table.column_names, delimiter=separator)


def _packed(pack: Callable[[bytes], bytes]) -> Callable[[Path, pa.Table], Path]:
    def write(folder: Path, table: pa.Table) -> Path:
        path = folder / "packed"  # the content says how, not the name
        path.write_bytes(pack(_csv(folder, table).read_bytes()))
        return path

    return write


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def _json_lines(folder: Path, table: pa.Table) -> Path:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()), "utf-8")
    return path


def _json_array(folder: Path, table: pa.Table) -> Path:
    path = folder / "log.json"
    path.write_text(json.dumps(table.to_pylist(), indent=1), "utf-8")
    return path


def _parquet(folder: Path, table: pa.Table, name: str = "log.parquet") -> Path:
    pq.write_table(table, folder / name)
    return folder / name


def _in_two(write: Callable[..., Path], ending: str) -> Callable[[Path, pa.Table], str]:
    def write_both(folder: Path, table: pa.Table) -> str:
        write(folder, table.slice(0, 2), name=f"part-1.{ending}")
        write(folder, table.slice(2), name=f"part-2.{ending}")
        return f"{folder}/part-*.{ending}"

    return write_both


def _partitioned(write: Callable[..., Path], ending: str) -> Callable[[Path, pa.Table], Path]:
    def write_folders(folder: Path, table: pa.Table) -> Path:
        for day, part in (("2024-01-01", table.slice(0, 2)), ("2024-01-02", table.slice(2))):
            (folder / "log" / f"day={day}").mkdir(parents=True)
            write(folder / "log" / f"day={day}", part, name=f"part-0.{ending}")
        (folder / "log" / "_SUCCESS").touch()
        return folder / "log"

    return write_folders


def _pandas(folder: Path, table: pa.Table) -> pandas.DataFrame:
    return table.to_pandas()


def _polars(folder: Path, table: pa.Table) -> Any:
    return pytest.importorskip("polars").from_arrow(table)


def _duckdb(folder: Path, table: pa.Table) -> Any:
    connection = ibis.duckdb.connect()
    connection.con.register("arrow", table)
    connection.raw_sql("CREATE TABLE events AS SELECT * FROM arrow")
    return connection.table("events")


def _sqlite(folder: Path, table: pa.Table) -> Any:
    kinds = [
        "INTEGER" if pa.types.is_integer(kind) else "REAL" if pa.types.is_floating(kind) else "TEXT"
        for kind in table.schema.types
    ]
    with sqlite3.connect(folder / "log.sqlite") as connection:
        columns = ", ".join(f'"{name}" {kind}' for name, kind in zip(table.column_names, kinds, strict=True))
        connection.execute(f"CREATE TABLE events ({columns})")
        connection.executemany(f"INSERT INTO events VALUES ({', '.join('?' * len(kinds))})", _texts(table))
    return ibis.sqlite.connect(folder / "log.sqlite").table("events")


TEXT_FILES = {
    "CSV": _csv,
    "TSV": lambda folder, table: _csv(folder, table, "\t"),
    "CSV gz": _packed(gzip.compress),
    "CSV bz2": _packed(bz2.compress),
    "CSV zst": _packed(_zstd),
    "two CSV": _in_two(_csv, "csv"),
    "CSV in partitions": _partitioned(_csv, "csv"),
    "JSON lines": _json_lines,
    "JSON array": _json_array,
}
ARROW = {
    "Parquet": _parquet,
    "two Parquet": _in_two(_parquet, "parquet"),
    "Parquet in partitions": _partitioned(_parquet, "parquet"),
    "Arrow": lambda folder, table: table,
    "Arrow stream": lambda folder, table: pa.RecordBatchReader.from_batches(table.schema, table.to_batches()),
    "pandas": _pandas,
    "Polars": _polars,
    "Polars lazy": lambda folder, table: _polars(folder, table).lazy(),
    "Dataset": lambda folder, table: Dataset(table),
    "DatasetDict": lambda folder, table: DatasetDict(train=Dataset(table)),
    "Ibis DuckDB": _duckdb,
}
SOURCES: dict[str, Callable[[Path, pa.Table], Any]] = TEXT_FILES | ARROW | {"Ibis SQLite": _sqlite}
# One source for each reader: the others differ from these in how files are found.
READERS = ("CSV", "JSON lines", "Parquet", "Arrow", "pandas", "Polars", "Dataset", "Ibis DuckDB", "Ibis SQLite")
TYPED_READERS = [name for name in READERS if name in ARROW]


def log_of(times: pa.Array, users: pa.Array | None = None, items: pa.Array | None = None, **others: Any) -> pa.Table:
    """Events of "a" in `ROW_ORDER`, and one of "b" with the first time."""
    chosen = pa.array([*ROW_ORDER, 0])
    columns = {
        "user_id": pa.array(["a", "a", "a", "b"]) if users is None else users,
        "item_id": pa.array(ITEMS).take(chosen) if items is None else items,
        "timestamp": times.take(chosen),
    }
    return pa.table(columns | others)


# --- times: the values of first, second, third

TEXT_TIMES = {
    "seconds": ["9", "1706702400", "1706702401"],
    "negative seconds": ["-3", "-2", "1"],
    "decimal seconds": ["1706702400.000000001", "1706702400.000000002", "1706702400.1"],
    "nanoseconds .0": ["1706702400000000001.0", "1706702400000000002.0", "1706702400000000003.0"],
    "38 digits": [f"{10**37 + number}" for number in range(3)],
    "exponents": ["1.706702400000000001e18", "1.706702400000000002e18", "1.706702400000000003E+18"],
    "blank and T": ["2024-01-31 12:00", "2024-01-31T12:00:00.5", "2024-01-31 12:00:01"],
    "9 decimals": [f"2024-01-31T12:00:00.{number:09}" for number in (1, 2, 3)],
    "7 decimals, Z": [f"2024-01-31T12:00:00.{number:07}Z" for number in (1, 2, 3)],
    "8 decimals, zones": ["2024-01-31T13:00:00.00000001+01:00", "2024-01-31T12:00:00.00000002Z",
                          "2024-01-31T04:00:00.00000003-0800"],
    "UTC": [f"2024-01-31 12:00:0{number} UTC" for number in range(3)],
    "GMT": [f"2024-01-31 12:00:0{number} GMT" for number in range(3)],
    "+02:00": ["2024-01-31T13:00:00+02:00", "2024-01-31T12:00:00Z", "2024-01-31T14:30:00+02"],
    "-0800": ["2024-01-31 03:59:59 -0800", "2024-01-31 12:00:00 Z", "2024-01-31 04:00:01 -08:00"],
    "+05:45": ["2024-01-31 05:44+05:45", "2024-01-31 00:00Z", "2024-01-31 05:46+0545"],
    "dates": ["2023-12-31", "2024-01-01", "2024-01-02"],
    "slashes": ["2023/12/31", "2024/1/1", "2024/01/02 00:00:01"],
    "before 1970": ["1969-12-31 23:59:58.7", "1969-12-31 23:59:58.8", "1969-12-31 23:59:59"],
}  # fmt: skip
# Everything that a reader gets as text is treated alike, so a few spellings suffice for the other sources.
FEW = ("nanoseconds .0", "9 decimals", "-0800")

NANOSECOND = datetime(2024, 1, 31, 12, tzinfo=UTC).timestamp() * 10**9
NANOSECONDS = [int(NANOSECOND) + number for number in range(1, 4)]
TYPED_TIMES = {
    "int32 seconds": pa.array([1706702400, 1706702401, 1706702402], pa.int32()),
    "int64 milliseconds": pa.array([1706702400000, 1706702400001, 1706702400002]),
    "int64 nanoseconds": pa.array(NANOSECONDS),
    "uint64": pa.array([2**63, 2**63 + 1, 2**64 - 1], pa.uint64()),
    "float64": pa.array([1706702400.25, 1706702400.5, 1706702401.0]),
    "decimal(38, 9)": pa.array([Decimal(f"1706702400.{number:09}") for number in (1, 2, 3)], pa.decimal128(38, 9)),
    "decimal(38, 0)": pa.array([Decimal(10**36 + number) for number in (1, 2, 3)], pa.decimal128(38, 0)),
    "timestamp[s]": pa.array([0, 1, 2], pa.timestamp("s")),
    "timestamp[ns]": pa.array(NANOSECONDS, pa.timestamp("ns")),
    "timestamp[us, UTC]": pa.array([-1, 1, 2], pa.timestamp("us", "UTC")),
    "timestamp[ns, UTC]": pa.array(NANOSECONDS, pa.timestamp("ns", "UTC")),
    "timestamp[ns, Paris]": pa.array(NANOSECONDS, pa.timestamp("ns", "Europe/Paris")),
    "date32": pa.array([date(2023, 12, 31), date(2024, 1, 1), date(2024, 1, 2)]),
    "text in a dictionary": pa.array(TEXT_TIMES["9 decimals"]).dictionary_encode(),
    "large text": pa.array(TEXT_TIMES["-0800"], pa.large_string()),
}

ALL_TIMES = ("CSV", "Arrow", "Ibis SQLite")
TIME_CELLS = [(source, name) for source in ALL_TIMES for name in TEXT_TIMES]
TIME_CELLS += [(source, name) for source in SOURCES if source not in ALL_TIMES for name in FEW]
TYPED_CELLS = [(source, name) for source in TYPED_READERS for name in TYPED_TIMES]
TYPED_CELLS += [(source, "int64 nanoseconds") for source in SOURCES if source not in TYPED_READERS]
TYPED_CELLS += [(source, name) for source in ARROW if source not in READERS for name in ("timestamp[ns, UTC]",)]
# DuckDB's type of text in a dictionary or large text is text.
TYPED_CELLS = [cell for cell in TYPED_CELLS if not (cell[0] == "Ibis DuckDB" and "text" in cell[1])]


@pytest.mark.parametrize(("source", "spelling"), TIME_CELLS)
def test_times_that_are_text_order_the_events(tmp_path, source, spelling):
    log = SOURCES[source](tmp_path, log_of(pa.array(TEXT_TIMES[spelling])))
    assert items_of(log) == {"a": ITEMS, "b": ["first"]}


@pytest.mark.parametrize(("source", "spelling"), TYPED_CELLS)
def test_times_that_have_a_type_order_the_events(tmp_path, source, spelling):
    times = TYPED_TIMES[spelling]
    if source == "Ibis DuckDB" and spelling.startswith("timestamp[ns, "):
        pytest.skip("DuckDB's own tables have no nanoseconds with a zone")
    if source.startswith("Polars") and spelling == "decimal(38, 0)":
        times = times.cast(pa.decimal128(38, 0))
    log = SOURCES[source](tmp_path, log_of(times))
    assert items_of(log) == {"a": ITEMS, "b": ["first"]}


def test_int96_times_keep_their_nanoseconds(tmp_path):
    for name in ("1", "2"):
        pq.write_table(
            log_of(TYPED_TIMES["timestamp[ns]"]), tmp_path / f"{name}.parquet", use_deprecated_int96_timestamps=True
        )
    assert items_of(tmp_path / "1.parquet") == {"a": ITEMS, "b": ["first"]}
    assert items_of(tmp_path)["a"] == [item for item in ITEMS for _ in range(2)]


def test_files_whose_times_differ_in_unit_keep_their_nanoseconds(tmp_path):
    pq.write_table(log_of(pa.array([-3, -2, -1], pa.timestamp("ms"))), tmp_path / "1.parquet")
    pq.write_table(log_of(TYPED_TIMES["timestamp[ns]"]), tmp_path / "2.parquet")
    assert items_of(tmp_path)["a"] == ITEMS * 2


# --- times that are refused; the message quotes the first value that is not understood

REFUSED_TIMES = {
    "zoned and local": (["2024-01-31 12:00:00Z", "2024-01-31 12:00:01Z", "2024-01-31 12:00:02"], "12:00:02'"),
    "local and zoned": (["2024-01-31 12:00:00", "2024-01-31 12:00:01+01:00", "2024-01-31 12:00:02"], r"01\+01:00'"),
    "numbers and dates": (["1706702400", "2024-01-31", "1706702401"], "'2024-01-31'"),
    "day first": (["31/01/2024", "30/01/2024", "29/01/2024"], "'29/01/2024'"),
    "a zone's name": ([f"2024-01-31 12:00:0{number} Europe/Berlin" for number in range(3)], "'.* Europe/Berlin'"),
    "a date with a zone": (["2024-01-31+02:00", "2024-02-01+02:00", "2024-02-02+02:00"], "'2024-0.-..[+]02:00'"),
    "fraction of a date": (["2024-01-31.5", "2024-01-31.25", "2024-01-31.75"], r"'2024-01-31\.75'"),
    "fraction of a minute": (["2024-01-31 12:00.5", "2024-01-31 12:00.25", "2024-01-31 12:00.75"], r"'.* 12:00\.75'"),
    "10 decimals": ([f"2024-01-31 12:00:00.123456789{number}" for number in (1, 2, 3)], "'.*[.]1234567893'"),
    "no such day": (["2024-02-28", "2024-02-29", "2024-02-30"], "'2024-02-30'"),
    "no such hour": (["2024-02-28 22:00", "2024-02-28 23:00", "2024-02-28 25:00"], "'2024-02-28 25:00'"),
    "no such zone": ([f"2024-02-28 22:00{zone}" for zone in ("+01", "+02", "+99:99")], r"22:00\+99:99'"),
    "40 digits": ([f"{10**39 + number}" for number in range(3)], "'1000000000000000000000000000000000000002'"),
    "not a number": (["1.5", "2.5", "nan"], "'nan'"),
    "infinity": (["1", "2", "inf"], "'inf'"),
    "no-break space": (["1", "2", "3\u00a0"], r"'3\\xa0'"),
    "a word": (["1", "2", "noon"], "'noon'"),
    "year beyond nanoseconds": (["2024-01-31 12:00:00.000000001", "2024-01-31", "9999-12-31 00:00:00"],
                                "'9999-12-31 00:00:00'"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", REFUSED_TIMES)
@pytest.mark.parametrize("source", ["CSV", "Parquet"])
def test_times_that_are_not_understood_are_quoted(tmp_path, source, spelling):
    times, quoted = REFUSED_TIMES[spelling]
    with pytest.raises(ValueError, match=rf"column 'timestamp' \(--time_column\) has .*{quoted} in row"):
        items_of(SOURCES[source](tmp_path, log_of(pa.array(times))))


@pytest.mark.parametrize("source", [*READERS, "Polars lazy", "DatasetDict", "CSV in partitions"])
def test_zoned_and_local_times_are_refused_from_every_source(tmp_path, source):
    with pytest.raises(ValueError, match=r"column 'timestamp' \(--time_column\) has '2024-01-31 12:00:02'"):
        items_of(SOURCES[source](tmp_path, log_of(pa.array(REFUSED_TIMES["zoned and local"][0]))))


@pytest.mark.parametrize(
    ("source", "column"), [*((source, "item_id") for source in READERS), ("CSV", "user_id"), ("CSV", "timestamp")]
)
def test_nulls_are_refused_and_the_column_is_named(tmp_path, source, column):
    table = log_of(pa.array(["1", "2", "3"]))
    values = pa.array([None, *table[column].to_pylist()[1:]], pa.string())
    table = table.set_column(table.column_names.index(column), column, values)
    with pytest.raises(ValueError, match=f"column '{column}' is null or empty in 1 of 4 rows"):
        items_of(SOURCES[source](tmp_path, table))


@pytest.mark.parametrize("source", READERS)
def test_empty_ids_are_refused(tmp_path, source):
    table = log_of(pa.array(["1", "2", "3"]), items=pa.array(["x", "", "y", "z"]))
    with pytest.raises(ValueError, match="column 'item_id' is null or empty in 1 of 4 rows"):
        items_of(SOURCES[source](tmp_path, table))


# --- ids: the items in the order of the rows; None where they are refused

SPELLED = ["0x10", "16", "-0", "0", "007", "7", "1e3", "1.0", " a", "a ", "A", "NULL", "nan", "true", "é\u00a0", "q\"'"]
TYPED_IDS = {
    "int32": pa.array([16, -1, 0, 7], pa.int32()),
    "int64 beyond float64": pa.array([2**53 + 1, 2**53, -(2**63), 2**63 - 1]),
    "uint64": pa.array([2**64 - 1, 2**64 - 2, 0, 1], pa.uint64()),
    "decimal(38, 0)": pa.array([Decimal(10**37 + 1), Decimal(10**37), Decimal(0), Decimal(-1)], pa.decimal128(38, 0)),
    "decimal(10, 0)": pa.array([Decimal(12), Decimal(1), Decimal(0), Decimal(-1)], pa.decimal128(10, 0)),
    "binary": pa.array(["007", "é", "\\x", "7"]).cast(pa.binary()),
    "large binary": pa.array(["007", "é", "\\x", "7"]).cast(pa.large_binary()),
    "dictionary": pa.array(["07", "7", "07", "é"]).dictionary_encode(),
    "large text": pa.array(["07", "7", " 7", "é"], pa.large_string()),
}
ID_CELLS = [(source, name) for source in TYPED_READERS for name in TYPED_IDS]


def ids_of(items: Any) -> pa.Table:
    number = len(items)
    users = [f"0{row % 2}" for row in range(number)]
    return pa.table({"user_id": users, "item_id": items, "timestamp": list(range(number))})


def _expected(items: pa.Array) -> list[str]:
    values = items.cast(items.type.value_type) if pa.types.is_dictionary(items.type) else items
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.to_pylist()]


@pytest.mark.parametrize(("source", "kind"), ID_CELLS)
def test_ids_of_every_type_are_spelled_exactly(tmp_path, source, kind):
    items = TYPED_IDS[kind]
    log = SOURCES[source](tmp_path, ids_of(items))
    expected = _expected(items)
    assert items_of(log) == {"00": expected[::2], "01": expected[1::2]}


@pytest.mark.parametrize("source", SOURCES)
def test_ids_that_are_text_are_spelled_exactly(tmp_path, source):
    assert items_of(SOURCES[source](tmp_path, ids_of(SPELLED))) == {"00": SPELLED[::2], "01": SPELLED[1::2]}


def test_large_numbers_of_a_database_are_spelled_exactly(tmp_path):
    table = pa.table({"user_id": [2**53 + 1, 2**53], "item_id": [2**63 - 1, None], "timestamp": [1, 2]})
    folder = tmp_path / "numbers"
    folder.mkdir()
    with pytest.raises(ValueError, match="column 'item_id' is null or empty in 1 of 2 rows"):
        items_of(_sqlite(folder, table))
    table = pa.table({"user_id": [2**53 + 1, 2**53], "item_id": [2**63 - 1, -(2**63)], "timestamp": [1, 2]})
    folder = tmp_path / "others"
    folder.mkdir()
    expected = {str(2**53 + 1): [str(2**63 - 1)], str(2**53): [str(-(2**63))]}
    assert items_of(_sqlite(folder, table)) == expected


def test_uuids_are_spelled_as_usual(tmp_path):
    names = [str(uuid.UUID(int=number)) for number in (1, 2**127, 3, 4)]
    items = pa.array([uuid.UUID(name).bytes for name in names], pa.uuid())
    table = ids_of(items)
    expected = {"00": names[::2], "01": names[1::2]}
    for source in (table, _parquet(tmp_path, table), _duckdb(tmp_path, table)):
        assert items_of(source) == expected
    # The UUIDs of a Parquet file are marked by Parquet, as DuckDB writes them, or by PyArrow's metadata only, as its
    # versions before 21 wrote them.
    marked, unmarked = tmp_path / "marked.parquet", tmp_path / "unmarked.parquet"
    _duckdb(tmp_path, table).to_parquet(marked)
    metadata = {"ARROW:extension:name": "arrow.uuid", "ARROW:extension:metadata": ""}
    schema = table.schema.set(1, pa.field("item_id", pa.binary(16), metadata=metadata))
    columns = [items.storage if name == "item_id" else table[name] for name in table.column_names]
    pq.write_table(pa.table(columns, schema=schema), unmarked)
    for path, kind in ((marked, "UUID"), (unmarked, "NONE")):
        assert pq.ParquetFile(path).schema.column(1).logical_type.type == kind
        assert items_of(path) == expected
    frame = table.to_pandas().assign(item_id=[uuid.UUID(name) for name in names])
    assert items_of(frame) == expected
    with pytest.raises(ValueError, match="column 'item_id' is null or empty in 1 of 4 rows"):
        items_of(frame.assign(item_id=[None, *frame["item_id"][1:]]))


def test_the_names_of_class_labels_are_ids():
    names = ["07", "7", "é"]
    features = Features({"user_id": Value("string"), "item_id": ClassLabel(names=names), "timestamp": Value("int64")})
    rows = {"user_id": list("aab"), "item_id": [2, 0, 1], "timestamp": [1, 2, 3]}
    dataset = Dataset.from_dict(rows, features)
    assert items_of(dataset) == {"a": ["é", "07"], "b": ["7"]}
    assert items_of(dataset.to_iterable_dataset()) == {"a": ["é", "07"], "b": ["7"]}
    unlabelled = Dataset.from_dict(rows | {"item_id": [2, -1, 1]}, features)
    with pytest.raises(ValueError, match="column 'item_id' is null or empty in 1 of 3 rows"):
        items_of(unlabelled)


def test_categories_of_pandas_are_ids():
    frame = pandas.DataFrame({"user_id": list("aab"), "item_id": [7, 5, 7], "timestamp": [2, 1, 3]})
    assert items_of(frame.astype({"item_id": "category", "user_id": "category"})) == {"a": ["5", "7"], "b": ["7"]}


REFUSED_IDS = {
    "float64": pa.array([1.0, 2.0, 3.0, 4.0]),
    "decimal(10, 2)": pa.array([Decimal(1), Decimal(2), Decimal(3), Decimal(4)], pa.decimal128(10, 2)),
    "bool": pa.array([True, False, True, True]),
    "date32": pa.array([date(2024, 1, 1)] * 4),
    "list": pa.array([["a"], ["b"], ["c"], ["d"]]),
    "binary that is no text": pa.array([b"\xff\x00", b"\xfe", b"a", b"b"]),
}


@pytest.mark.parametrize("kind", REFUSED_IDS)
@pytest.mark.parametrize("source", ["Parquet", "Arrow", "pandas", "Ibis DuckDB"])
def test_ids_of_other_types_are_refused_and_the_column_is_named(tmp_path, source, kind):
    with pytest.raises(ValueError, match="column 'item_id'"):
        items_of(SOURCES[source](tmp_path, ids_of(REFUSED_IDS[kind])))


# --- columns: twice, in other case, or of a type that no reader knows, beside those that are asked for


@pytest.mark.parametrize("source", ["CSV", "Parquet", "Arrow", "Arrow stream", "pandas"])
def test_a_column_that_is_asked_for_and_there_twice_is_refused(tmp_path, source):
    table = log_of(pa.array([1, 2, 3]), again=pa.array(list("wxyz")))
    table = table.rename_columns(["user_id", "item_id", "timestamp", "item_id"])
    if source == "pandas":
        first, last = table.select([0, 1, 2]).to_pandas(), table.select([3]).to_pandas()
        log = pandas.concat([first, last], axis=1)
    elif source == "CSV":
        path = tmp_path / "log.csv"
        path.write_text("user_id,item_id,timestamp,item_id\na,x,1,y\nb,x,1,y\n")
        log = path
    else:
        log = SOURCES[source](tmp_path, table)
    with pytest.raises(ValueError, match=r"has the column 'item_id' twice; rename one of them"):
        items_of(log)


@pytest.mark.parametrize(
    "source", ["CSV", "JSON lines", "Parquet", "Arrow", "Arrow stream", "pandas", "Polars", "Dataset"]
)
def test_an_unused_column_in_another_case_does_not_matter(tmp_path, source):
    table = log_of(pa.array([1, 2, 3]), Item_ID=pa.array([9, 9, 9, 9]))
    log = SOURCES[source](tmp_path, table)
    assert items_of(log) == {"a": ITEMS, "b": ["first"]}


@pytest.mark.parametrize("source", ["JSON lines", "Parquet", "Arrow"])
def test_a_condition_names_the_column_that_is_spelled_so(tmp_path, source):
    table = log_of(pa.array([1, 2, 3]), Rating=pa.array([9, 9, 9, 9]), rating=pa.array([1, 5, 5, 5]))
    assert items_of(SOURCES[source](tmp_path, table), where="rating > 3") == {"a": ITEMS[:2], "b": ["first"]}


ODD = {
    "float16": pa.array(np.zeros(4, np.float16)),
    "47 digits": pa.array([Decimal(10**46)] * 4, pa.decimal256(47, 0)),
    "nested": pa.array([[{"a": [1]}], None, [], [{"a": None}]]),
    "map": pa.array([[("k", 1)], [], None, []], pa.map_(pa.string(), pa.int32())),
    "duration": pa.array([1, 2, 3, 4], pa.duration("ns")),
    "time of day": pa.array([1, 2, 3, 4], pa.time64("ns")),
    "null": pa.nulls(4),
    "binary": pa.array([b"\xff"] * 4),
    "date64": pa.array([datetime(2024, 1, 1)] * 4, pa.date64()),
    "ns with a zone": pa.array([1, 2, 3, 4], pa.timestamp("ns", "UTC")),
    "fixed binary": pa.array([b"\xff\xfe"] * 4, pa.binary(2)),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("source", ["Parquet", "Arrow", "pandas", "Polars lazy", "Dataset"])
def test_unused_columns_of_odd_types_do_not_matter(tmp_path, source, kind):
    table = log_of(pa.array([1, 2, 3]), odd=ODD[kind])
    if kind == "47 digits" and source == "Polars lazy":
        pytest.skip("Polars has no such decimals")
    try:
        log = SOURCES[source](tmp_path, table)
    except (pa.ArrowException, NotImplementedError, ValueError, TypeError) as error:
        pytest.skip(f"{source} has no such column: {error}")
    assert items_of(log) == {"a": ITEMS, "b": ["first"]}


def test_unused_columns_of_pandas_may_mix_types():
    frame = pandas.DataFrame({"user_id": list("aab"), "item_id": list("xyz"), "timestamp": [2, 1, 3]})
    frame["odd"] = [1, "a", object()]
    frame[7] = [10**40, "\ud800", None]
    assert items_of(frame) == {"a": ["y", "x"], "b": ["z"]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([7, "7", "8"], "column 'item_id' of the data frame mixes int and str"),
        ([10**40, 1, 2], "column 'item_id' of the data frame .*astype"),
        (pandas.Series(["\ud800", "x", "y"], dtype=object), r"column 'item_id' of the data frame .*'\\ud800'"),
        ([{1}, {2}, {3}], "column 'item_id' .* is array"),
        (pandas.period_range("2024-01", periods=3, freq="M"), r"column 'item_id' .*period"),
    ],
)
def test_ids_of_pandas_that_are_no_text_are_refused(values, message):
    frame = pandas.DataFrame({"user_id": list("aab"), "item_id": values, "timestamp": [2, 1, 3]})
    with pytest.raises(ValueError, match=message):
        items_of(frame)


def test_partitions_are_columns_that_are_read_where_they_are_asked_for(tmp_path):
    table = log_of(pa.array([1, 2, 3]))
    for source in ("CSV in partitions", "Parquet in partitions"):
        folder = tmp_path / source
        folder.mkdir()
        log = SOURCES[source](folder, table)
        assert open_log(log).columns == ["user_id", "item_id", "timestamp", "day"]
        assert items_of(log, time_column="day", where="day >= '2024-01-02'") == {"a": ["second"], "b": ["first"]}


def test_a_dataset_of_several_splits_names_them():
    rows = Dataset.from_dict({"user_id": ["a"], "item_id": ["x"], "timestamp": [1]})
    with pytest.raises(ValueError, match=r"has the splits train, test; give one of them, as in log\['train'\]"):
        items_of(DatasetDict(train=rows, test=rows))
