"""Raw log to histories, on logs small enough to be worked out by hand."""

import csv
import json
import random
import subprocess
import sys
import time
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import ibis
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

import bert4rec_hf.preparation
from bert4rec_hf.defaults import default_filter_seen_items, default_max_length
from bert4rec_hf.logs import SOURCE_ROW, read_log, read_titles
from bert4rec_hf.preparation import histories, prepare

HEADER = ("user_id", "item_id", "timestamp")


@pytest.fixture
def saved_catalogues(monkeypatch):
    """What would go to the tokenizer, so that these tests are about the log alone."""
    saved = []
    monkeypatch.setattr(
        bert4rec_hf.preparation,
        "_save_catalogue",
        lambda folder, catalogue, titles, max_length: saved.append((catalogue, titles, max_length)),
    )
    return saved


def write_csv(path: Path, rows, header=HEADER) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def rows_of(log, **options) -> list[dict]:
    if isinstance(log, Path):
        log = read_log(log)
    return histories(log, **options).to_pyarrow().to_pylist()


def items_of(log, **options) -> dict[str, list[str]]:
    return {row["user_id"]: row["item_id"] for row in rows_of(log, **options)}


def test_leave_one_out_orders_by_time_and_holds_out_the_last_two(tmp_path):
    log = write_csv(
        tmp_path / "log.csv",
        [("b", "x", 3), ("a", "z", 9), ("a", "x", 1), ("b", "y", 1), ("a", "y", 5), ("a", "w", 7)],
    )
    assert rows_of(log) == [
        {
            "user_id": "a",
            "item_id": ["x", "y", "w", "z"],
            "timestamp": [1, 5, 7, 9],
            "train_end": 2,
            "validation_position": 2,
            "test_position": 3,
        },
        {
            "user_id": "b",
            "item_id": ["y", "x"],
            "timestamp": [1, 3],
            "train_end": 2,
            "validation_position": None,
            "test_position": None,
        },
    ]
    schema = histories(read_log(log)).schema()
    assert [str(schema[name]) for name in ("user_id", "item_id", "train_end", "test_position")] == [
        "string",
        "array<string>",
        "int32",
        "int32",
    ]


def test_events_of_the_same_time_keep_their_order_in_the_source(tmp_path):
    rows = [("a", item, 1) for item in ("9", "1", "5", "3")] + [("b", "2", 1)]
    assert items_of(write_csv(tmp_path / "log.csv", rows))["a"] == ["9", "1", "5", "3"]


def test_the_files_of_a_glob_follow_one_another_by_name(tmp_path):
    write_csv(tmp_path / "day-2.csv", [("a", "late", 1), ("b", "x", 1)])
    write_csv(tmp_path / "day-1.csv", [("a", "early", 1)])
    assert items_of(read_log(tmp_path / "day-*.csv"))["a"] == ["early", "late"]
    for day, item in ((1, "early"), (2, "late")):
        pq.write_table(
            pa.table({"user_id": ["a", "b"], "item_id": [item, "x"], "timestamp": [1, 1]}),
            tmp_path / f"day-{day}.parquet",
        )
    assert items_of(read_log(tmp_path / "day-*.parquet"))["a"] == ["early", "late"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_row_numbers_follow_the_source_where_several_threads_read_it(tmp_path, kind):
    number = 1_000_000
    duckdb.sql(f"SET threads = 4; COPY (SELECT i % 7 AS user_id, i AS item_id FROM range({number}) t(i)) "
               f"TO '{tmp_path}/log.{kind}'")  # fmt: skip
    log = read_log(f"{tmp_path}/log.{kind}")
    log.get_backend().raw_sql("SET threads = 4")
    log = bert4rec_hf.preparation._stored(log)
    assert log.filter(log.item_id.cast("int64") == log[SOURCE_ROW]).count().execute() == number


def test_a_sequence_column_orders_ties_and_can_stand_for_time(tmp_path):
    header = (*HEADER, "position")
    rows = [("a", "x", 1, 2), ("a", "y", 1, 1), ("a", "z", 0, 3), ("b", "x", 1, 1)]
    log = write_csv(tmp_path / "log.csv", rows, header)
    assert items_of(log, sequence_column="position")["a"] == ["z", "y", "x"]
    log = write_csv(tmp_path / "untimed.csv", [row[:2] + row[3:] for row in rows], (*HEADER[:2], "position"))
    untimed = rows_of(log, sequence_column="position")
    assert untimed[0]["item_id"] == ["y", "x", "z"]
    assert "timestamp" not in untimed[0]
    prepare(log, tmp_path / "data", sequence_column="position")
    statistics = json.loads((tmp_path / "data" / "preparation.json").read_text())["statistics"]
    assert (statistics["num_events"], statistics["share_tied_times"]) == (4, None)
    with pytest.raises(ValueError, match="temporal split needs a time column"):
        rows_of(log, sequence_column="position", split="temporal")


def test_a_log_without_a_timestamp_is_ordered_by_its_position(tmp_path):
    rows = [("a", "x", 2), ("a", "y", 1), ("a", "z", 3), ("b", "x", 1)]
    log = write_csv(tmp_path / "log.csv", rows, (*HEADER[:2], "position"))
    assert items_of(log)["a"] == ["y", "x", "z"]
    columns = prepare(log, tmp_path / "data")["columns"]
    assert (columns["time_column"], columns["sequence_column"]) == (None, "position")
    with pytest.raises(ValueError, match="no column 'when'"):
        rows_of(log, time_column="when")

    timed = write_csv(tmp_path / "timed.csv", [(*row[:2], time, row[2]) for time, row in enumerate(rows)],
                      (*HEADER[:2], "timestamp", "position"))  # fmt: skip
    assert items_of(timed)["a"] == ["x", "y", "z"]


def test_shuffling_a_log_with_a_sequence_column_changes_no_byte(tmp_path, saved_catalogues):
    header = (*HEADER, "position", "price")
    generator = random.Random(0)
    # Three positions for ten events: most are tied in time and position, and differ in item or price alone.
    rows = [
        (
            f"user {generator.randrange(3000)}",
            f"item {generator.randrange(40)}",
            1,
            generator.randrange(3),
            price,
        )
        for price in range(30_000)
    ]
    contents = []
    for attempt in range(3):
        log = write_csv(tmp_path / f"{attempt}.csv", rows, header)
        prepare(log, tmp_path / str(attempt), sequence_column="position", event_columns=["price"])
        contents.append((tmp_path / str(attempt) / "histories.parquet").read_bytes())
        generator.shuffle(rows)
    assert contents[0] == contents[1] == contents[2]
    first = pq.read_table(tmp_path / "0" / "histories.parquet")["item_id"].to_pylist()
    assert any(items != sorted(items) for items in first)


def test_without_source_rows_ties_are_ordered_by_a_hash_and_not_by_item():
    items = [f"{number:02}" for number in range(50)]
    table = pa.table({"user_id": ["a"] * 50 + ["b"], "item_id": [*items, "00"], "timestamp": [1] * 51})
    orders = []
    for shuffled in (table, table.take(list(reversed(range(51))))):
        connection = ibis.duckdb.connect()
        connection.con.register("log", shuffled)
        orders.append(items_of(connection.table("log"))["a"])
    assert orders[0] == orders[1]
    assert orders[0] != items
    assert sorted(orders[0]) == items


def test_ids_in_csv_are_kept_exactly(tmp_path, saved_catalogues):
    items = [
        "007",
        "9007199254740993",
        "12345678901234567890",
        " lead",
        "trail ",
        'say "hi"',
        "a,b",
        "née",
        "漢字",
    ]
    items += [
        "line\nbreak",
        "[MASK]",
        "[PAD]",
        "NULL",
        "NA",
        "1.0",
        "true",
        "2020-01-01",
        "O'Neil",
        "\t",
        "a;b|c",
    ]
    rows = [("01", item, time) for time, item in enumerate(items)] + [("1", "007", 0)]
    log = write_csv(tmp_path / "log.csv", rows)
    assert items_of(log) == {"01": items, "1": ["007"]}
    prepare(log, tmp_path / "out")
    assert list(saved_catalogues[0][0]) == sorted(items)


def test_int64_ids_in_parquet_become_exact_text(tmp_path):
    item = 2**53 + 1
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [1, 2**63 - 1], "item_id": [item, -1], "timestamp": [1, 1]}), path)
    assert items_of(path) == {"1": [str(item)], str(2**63 - 1): ["-1"]}


def test_no_line_of_a_csv_file_is_a_comment(tmp_path):
    users = ["1", "2", "#3", "#4"]
    log = write_csv(tmp_path / "log.csv", [(user, f"i{time}", time) for user in users for time in range(5)])
    assert items_of(log) == {user: [f"i{time}" for time in range(5)] for user in users}
    titles = write_csv(tmp_path / "titles.csv", [(item, "T" + item) for item in users], ("item_id", "title"))
    assert read_titles(titles, "item_id", users) == {item: "T" + item for item in users}


def test_parquet_files_whose_ids_differ_in_type_are_refused(tmp_path):
    def write(name, items, column="item_id"):
        pq.write_table(pa.table({"user_id": ["a", "b"], column: items, "timestamp": [1, 1]}), tmp_path / name)

    write("1.parquet", pa.array([7, 8]))
    for column in ("item_id", "Item_ID"):  # one column, to DuckDB
        write("2.parquet", pa.array(["007", "08"]), column)
        with pytest.raises(ValueError, match=r"'item_id' .*int64 in .*1.parquet and string in .*2.parquet: write"):
            read_log(tmp_path / "*.parquet")
    write("2.parquet", pa.array([9, 9], pa.uint16()).dictionary_encode())
    assert items_of(read_log(tmp_path / "*.parquet")) == {"a": ["7", "9"], "b": ["8", "9"]}
    write("1.parquet", pa.array(["07", "8"], pa.large_string()))
    write("2.parquet", pa.array(["9", "9"]).dictionary_encode())
    assert items_of(read_log(tmp_path / "*.parquet")) == {"a": ["07", "9"], "b": ["8", "9"]}
    (tmp_path / "2.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot read"):
        read_log(tmp_path / "*.parquet")


def test_values_of_other_types_in_later_parquet_files_are_not_rounded_to_that_of_the_first(tmp_path):
    def read(first, second):
        for name, times in (("1", first), ("2", second)):
            columns = {"user_id": [1, 2], "item_id": [f"{name}a", f"{name}b"], "timestamp": times, "rating": times}
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        return read_log(tmp_path / "*.parquet")

    log = read(pa.array([11, 9]), pa.array([10.6, 8.4]))
    assert items_of(log) == {"1": ["2a", "1a"], "2": ["2b", "1b"]}
    assert items_of(log, min_rating=9) == {"1": ["2a", "1a"], "2": ["1b"]}
    assert items_of(log, min_rating=10.7) == {"1": ["1a"]}
    day, later = datetime(2024, 1, 1), datetime(2024, 1, 1, 10)
    log = read(pa.array([later, day], pa.timestamp("us")), pa.array([day.date(), later.date()]))
    assert items_of(log)["1"] == ["2a", "1a"]
    log = read(pa.array([day.date()] * 2), pa.array([later, day], pa.timestamp("us")))
    assert [time for row in rows_of(log) for time in row["timestamp"] if row["user_id"] == "1"] == [day, later]
    pq.write_table(pa.table({"user_id": [1], "item_id": ["c"], "timestamp": [1]}), tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"3.parquet lacks the column 'rating', which .*1.parquet has"):
        read_log(tmp_path / "*.parquet")


MANY_TIMES = {
    "whole numbers": ("1", "900000.4 900000.3", ["z1", "z0"]),
    "dates": ("2024-08-01", "2024-08-25T10:30 2024-08-25T10:00", ["z1", "z0"]),
    "another year first": ("2024-08-01 10:00:00", "22/04/24T10:00:00", "string"),
    "a time zone": ("2024-08-01 10:00:00", "2024-08-25T10:00:00+05:00", "string"),
    "a word": ("1", "noon", "string"),
}


@pytest.mark.parametrize(("time", "last", "expected"), MANY_TIMES.values(), ids=MANY_TIMES)
def test_values_behind_very_many_others_count_as_well(tmp_path, time, last, expected):
    path = tmp_path / "log.csv"
    rows = [f"z,z{number},{value.replace('T', ' ')}\n" for number, value in enumerate(last.split())]
    path.write_text("user_id,item_id,timestamp\n" + f"a,x,{time}\n" * 500_000 + "".join(rows))
    if expected == "string":
        with pytest.raises(ValueError, match="string"):
            rows_of(path)
    else:
        assert items_of(path)["z"] == expected


def test_other_separators_byte_order_mark_and_gzip_are_read(tmp_path):
    rows = "user_id\titem_id\ttimestamp\n01\tx, y\t1\n2\tz\t1\n"
    path = tmp_path / "log.tsv"
    path.write_text(rows, "utf-8-sig")
    assert items_of(path) == {"01": ["x, y"], "2": ["z"]}
    import gzip

    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(rows.replace(", ", " ").replace("\t", ";").encode()))
    assert items_of(packed) == {"01": ["x y"], "2": ["z"]}


def test_a_dataset_is_a_log():
    rows = {"user_id": ["a", "a", "b"], "item_id": ["01", "2", "3"], "timestamp": [2, 1, 1]}
    assert items_of(read_log(Dataset.from_dict(rows).select([0, 2, 1]))) == {"a": ["2", "01"], "b": ["3"]}
    with pytest.raises(TypeError, match="got DatasetDict"):
        read_log(DatasetDict(train=Dataset.from_dict(rows)))


def test_timestamps_and_dates_stay_timestamps(tmp_path):
    rows = [
        ("a", "x", "2024-01-02 10:00:00"),
        ("a", "y", "2024-01-01 10:00:00"),
        ("b", "x", "2024-01-01 00:00:00"),
    ]
    result = histories(read_log(write_csv(tmp_path / "log.csv", rows)))
    assert result.schema()["timestamp"].value_type.is_timestamp()
    assert result.to_pyarrow()["item_id"][0].as_py() == ["y", "x"]
    dates = write_csv(tmp_path / "dates.csv", [(user, item, time[:10]) for user, item, time in rows])
    assert items_of(dates)["a"] == ["y", "x"]


def test_event_columns_follow_the_items_and_keep_their_gaps(tmp_path):
    header = (*HEADER, "price", "rating")
    rows = [("a", "x", 2, 1.5, 5), ("a", "y", 1, None, 4), ("b", "x", 1, 3.0, 1)]
    row = rows_of(write_csv(tmp_path / "log.csv", rows, header), event_columns=["price", "rating"])[0]
    assert (row["item_id"], row["price"], row["rating"]) == (["y", "x"], [None, 1.5], [4, 5])
    with pytest.raises(ValueError, match="event columns must differ"):
        rows_of(tmp_path / "log.csv", event_columns=["timestamp"])


def test_min_rating_leaves_out_lower_and_missing_ratings(tmp_path):
    header = (*HEADER, "rating")
    rows = [("a", "x", 1, 3), ("a", "y", 2, 4), ("a", "z", 3, None), ("b", "x", 1, 5)]
    log = write_csv(tmp_path / "log.csv", rows, header)
    assert items_of(log, min_rating=4) == {"a": ["y"], "b": ["x"]}
    write_csv(log, [*rows[:2], ("a", "z", 3, "nan"), rows[3]], header)
    assert read_log(log).rating.type().is_floating()
    assert items_of(log, min_rating=4) == {"a": ["y"], "b": ["x"]}
    with pytest.raises(ValueError, match=r"no column 'stars'.*rating.*--rating_column"):
        rows_of(log, min_rating=4, rating_column="stars")


@pytest.mark.parametrize(
    ("duplicates", "expected"),
    [
        ("keep", ["x", "x", "x", "y", "x", "y"]),
        ("drop", ["x", "y"]),
        ("drop_consecutive", ["x", "y", "x", "y"]),
        ("drop_identical", ["x", "x", "x", "y", "x", "y"]),
    ],
)
def test_duplicates_are_kept_dropped_or_collapsed(tmp_path, saved_catalogues, duplicates, expected):
    rows = [("a", item, time) for time, item in enumerate("xxxyxy")] + [("b", item, 0) for item in "xyzz"]
    log = write_csv(tmp_path / "log.csv", rows)
    assert items_of(log, duplicates=duplicates)["a"] == expected
    assert items_of(log, duplicates=duplicates)["b"] == list("xyzz" if duplicates == "keep" else "xyz")
    if duplicates == "drop":
        with pytest.raises(ValueError, match="duplicates must be one of keep, drop, drop_consecutive"):
            rows_of(log, duplicates="none")
    statistics = prepare(log, tmp_path / "out", duplicates=duplicates)["statistics"]
    assert statistics["num_duplicate_rows"] == 1  # user b's second z, at the same time


def test_the_filter_is_repeated_until_nothing_changes(tmp_path):
    # d has one event; without d, w has one; without w, c; without c, z; and b keeps two.
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("b", "z"), ("c", "z"), ("c", "w"), ("d", "w")]
    log = write_csv(tmp_path / "log.csv", [(user, item, time) for time, (user, item) in enumerate(rows)])
    kept = items_of(log, min_user_events=2, min_item_events=2)
    assert kept == {"a": ["x", "y"], "b": ["x", "y"]}
    assert items_of(log, min_user_events=2) == {"a": ["x", "y"], "b": ["x", "y", "z"], "c": ["z", "w"]}


TEMPORAL = [
    ("a", "x", 0), ("a", "y", 1), ("a", "z", 6), ("a", "x", 8), ("a", "w", 9),
    ("b", "y", 2), ("b", "x", 3), ("b", "rare", 4),
    ("c", "x", 5), ("c", "new", 9),
    ("d", "y", 7),
]  # fmt: skip


def test_temporal_cuts_freeze_every_history_at_the_cut(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    cuts = {"split": "temporal", "validation_cut": 6, "test_cut": 8}
    positions = {
        row["user_id"]: (row["train_end"], row["validation_position"], row["test_position"])
        for row in rows_of(log, **cuts)
    }
    assert positions == {"a": (2, 2, 3), "b": (3, None, None), "c": (1, None, 1), "d": (0, 0, None)}

    preparation = prepare(log, tmp_path / "out", min_user_events=2, min_item_events=2, **cuts)
    rows = pq.read_table(tmp_path / "out" / "histories.parquet").to_pylist()
    assert [row["train_end"] for row in rows] == [2, 3, 0, 0]  # c has one event before the cut
    assert rows[1]["item_id"] == ["y", "x", "rare"]  # whole, though the catalogue lacks one
    assert saved_catalogues[0][0] == {"x": 2, "y": 2}
    assert preparation["split"] == {"name": "temporal", "validation": True, "validation_cut": 6, "test_cut": 8}
    statistics = preparation["statistics"]
    assert (statistics["num_validation_targets"], statistics["num_test_targets"]) == (2, 2)
    assert statistics["share_cold_targets"] == 0.5  # a's x is known, c's new is not
    assert statistics["num_test_users_without_past"] == 0


@pytest.mark.parametrize(
    ("split", "expected", "catalogue"),
    [
        # Of a's five events, b's three, c's two and d's one.
        (
            {"name": "leave-one-out", "validation": False},
            {"a": (4, None, 4), "b": (2, None, 2), "c": (1, None, 1), "d": (1, None, None)},
            {"new": 0, "rare": 0, "w": 0, "x": 4, "y": 3, "z": 1},
        ),
        (
            {"name": "temporal", "validation": False, "test_cut": 8},
            {"a": (3, None, 3), "b": (3, None, None), "c": (1, None, 1), "d": (1, None, None)},
            {"rare": 1, "x": 3, "y": 3, "z": 1},
        ),
        (
            {"name": "none"},
            {"a": (5, None, None), "b": (3, None, None), "c": (2, None, None), "d": (1, None, None)},
            {"new": 1, "rare": 1, "w": 1, "x": 4, "y": 3, "z": 1},
        ),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_what_is_not_held_out_trains(tmp_path, saved_catalogues, split, expected, catalogue):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    options = {"split" if name == "name" else name: value for name, value in split.items()}
    preparation = prepare(log, tmp_path / "out", **options)
    rows = pq.read_table(tmp_path / "out" / "histories.parquet").to_pylist()
    positions = {row["user_id"]: (row["train_end"], row["validation_position"], row["test_position"]) for row in rows}
    assert positions == expected
    assert preparation["split"] == split
    assert saved_catalogues[0][0] == catalogue
    targets = sum(test is not None for _, _, test in expected.values())
    statistics = preparation["statistics"]
    assert (statistics["num_validation_targets"], statistics["num_test_targets"]) == (0, targets)


@pytest.mark.parametrize(("scale", "expected"), [(0, (6, 8)), (1, (0.6, 0.8))])
def test_decimal_times_become_numbers(tmp_path, saved_catalogues, scale, expected):
    users, items, times = zip(*TEMPORAL, strict=True)
    times = pa.array([Decimal(time).scaleb(-scale) for time in times], pa.decimal128(18, scale))
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), tmp_path / "log.parquet")
    cuts = {"split": "temporal", "validation_cut": 0.6, "test_cut": 0.8}  # 6 and 8 of 11 events before
    split = prepare(tmp_path / "log.parquet", tmp_path / "out", **cuts)["split"]
    assert (split["validation_cut"], split["test_cut"]) == expected
    kind = pq.read_schema(tmp_path / "out" / "histories.parquet").field("timestamp").type.value_type
    assert kind == (pa.float64() if scale else pa.int64())


def test_a_cut_is_a_share_a_value_or_a_date(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", [(user, item, time * 86400) for user, item, time in TEMPORAL])

    def cuts_of(**cuts):
        split = prepare(log, tmp_path / "out", split="temporal", **cuts)["split"]
        return split["validation_cut"] / 86400, split["test_cut"] / 86400

    assert cuts_of(validation_cut=0.5, test_cut=0.8) == (5, 8)  # 5 of 11 events before, 8 of 11
    assert cuts_of(validation_cut="0.5", test_cut="1970-01-09") == (5, 8)
    assert cuts_of(validation_cut=6 * 86400, test_cut=str(8 * 86400)) == (6, 8)
    assert cuts_of(validation_cut="1970-01-07T00:00:00+00:00", test_cut="1970-01-09T02:00:00+02:00") == (6, 8)
    timed = [(user, item, f"2024-01-{time + 1:02} 00:00:00") for user, item, time in TEMPORAL]
    log = write_csv(tmp_path / "timed.csv", timed)
    split = prepare(log, tmp_path / "out", split="temporal", validation_cut=0.5, test_cut="2024-01-09")["split"]
    assert split["validation_cut"] == "2024-01-06T00:00:00"
    assert split["test_cut"] == "2024-01-09T00:00:00"
    with pytest.raises(ValueError, match="a cut is a share between 0 and 1 or an ISO date; got 7"):
        rows_of(log, split="temporal", validation_cut=0.5, test_cut=7)
    # .29 times 100 is a little less than 29.
    log = write_csv(tmp_path / "hundred.csv", [(time % 2, time % 5, time) for time in range(100)])
    assert prepare(log, tmp_path / "out", split="temporal", validation=False, test_cut=0.29)["split"]["test_cut"] == 29


def test_a_user_who_is_no_person_is_told(tmp_path, caplog, monkeypatch):
    rows = [("bot", item, time) for time, item in enumerate("xyz" * 4)] + [("a", item, 1) for item in "xyzxyzxyzxy"]
    log = write_csv(tmp_path / "log.csv", rows)
    prepare(log, tmp_path / "out")
    assert caplog.text == ""
    monkeypatch.setattr("bert4rec_hf.preparation.LONGEST_OF_A_PERSON", 11)
    prepare(log, tmp_path / "out")
    assert "user bot has 12 of 23 events: if that is no person" in caplog.text
    caplog.clear()
    monkeypatch.setattr("bert4rec_hf.preparation.SHARE_OF_A_PERSON", 0.6)
    prepare(log, tmp_path / "out")
    assert caplog.text == ""


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_a_date_meets_numbers_in_their_unit(tmp_path, unit):
    day = 86400 * unit
    timed = [(user, item, 19_700 * day + time * day) for user, item, time in TEMPORAL]  # from 2023-12-09 on
    log = write_csv(tmp_path / "log.csv", timed)
    rows = rows_of(log, split="temporal", validation_cut="2023-12-15", test_cut="2023-12-17")
    assert [row["train_end"] for row in rows] == [2, 3, 1, 0]
    with pytest.raises(ValueError, match="leave 0 events before"):
        rows_of(log, split="temporal", validation_cut="2023-11-15", test_cut="2023-12-17")


def test_dates_meet_timestamps_with_a_time_zone(tmp_path):
    timed = [(user, item, f"2024-01-{time + 1:02}T00:00:00Z") for user, item, time in TEMPORAL]
    log = write_csv(tmp_path / "log.csv", timed)
    rows = rows_of(log, split="temporal", validation_cut="2024-01-07", test_cut="2024-01-09")
    assert [row["train_end"] for row in rows] == [2, 3, 1, 0]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ((8, 6), "validation_cut must lie before test_cut"),
        ((0, 6), "leave 0 events before, 6 between and 5 after"),
        ((6, 60), "leave 6 events before, 5 between and 0 after them"),
        ((None, 60), "cuts at 60 leave 11 events before and 0 after them"),
        (
            ("soon", 6),
            "a share of the events between 0 and 1, a value of the time column or an ISO date; got 'soon'",
        ),
    ],
)
def test_cuts_that_leave_a_part_empty_are_refused(tmp_path, cuts, message):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    with pytest.raises(ValueError, match=message):
        rows_of(log, split="temporal", validation=cuts[0] is not None, validation_cut=cuts[0], test_cut=cuts[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_cut": 0.7}, "validation_cut is for --split temporal; got 0.7 with the split leave-one-out"),
        ({"split": "none", "test_cut": "0.7"}, "test_cut is for --split temporal; got 0.7 with the split none"),
        (
            {"split": "temporal", "validation": False, "validation_cut": 6},
            "without validation targets there is no validation_cut; got 6",
        ),
        ({"min_user_events": -3}, "min_user_events must be at least 1.*got -3"),
        ({"min_item_events": 0}, "min_item_events must be at least 1.*got 0"),
        ({"user_column": "item_id"}, "--user_column and --item_column must be different columns; got 'item_id' for"),
        ({"item_column": "timestamp"}, "--item_column and --time_column must be different columns; got 'timestamp'"),
        ({"sequence_column": "user_id"}, "--user_column and --sequence_column must be different columns"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(tmp_path, options, message):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    with pytest.raises(ValueError, match=message):
        prepare(log, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        rows_of(log, **options)


def test_cuts_that_are_left_out_are_eight_and_nine_tenths_of_the_events(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", [("ab"[time % 2], "xyz"[time % 3], time) for time in range(100)])
    for validation, cuts in ((True, {"validation_cut": 80, "test_cut": 90}), (False, {"test_cut": 90})):
        split = prepare(log, tmp_path / "out", split="temporal", validation=validation)["split"]
        assert split == {"name": "temporal", "validation": validation} | cuts


def test_statistics_and_defaults_have_known_answers(tmp_path, saved_catalogues):
    rows = [("a", item, time) for item, time in (("x", 1), ("y", 1), ("x", 2), ("z", 2))]
    rows += [("b", "x", 1), ("b", "y", 2), ("b", "w", 3), ("c", "v", 1)]
    preparation = prepare(write_csv(tmp_path / "log.csv", rows), tmp_path / "out", min_user_events=2)
    statistics = preparation["statistics"]
    assert statistics == {
        "num_users": 2,
        "num_items": 4,
        "num_events": 7,
        "num_training_users": 2,
        "num_training_events": 3,
        "history_length": {"min": 3, "median": 3.5, "mean": 3.5, "p75": 3.75, "p90": 3.9, "max": 4},
        "share_repeated_events": pytest.approx(1 / 7),
        "share_tied_times": pytest.approx(2 / 7),
        "share_cold_targets": 1.0,
        "num_validation_targets": 2,
        "num_test_targets": 2,
        "num_source_users": 3,
        "num_source_items": 5,
        "num_source_events": 8,
        "num_duplicate_rows": 0,
    }
    assert saved_catalogues == [({"w": 0, "x": 2, "y": 1, "z": 0}, None, 50)]
    assert preparation["filter_seen_items"] is False
    assert json.loads((tmp_path / "out" / "preparation.json").read_text("utf-8")) == json.loads(json.dumps(preparation))
    assert [default_max_length(length) for length in (3, 50, 51, 148, 999)] == [50, 50, 100, 200, 200]
    assert default_filter_seen_items(0.049)
    assert not default_filter_seen_items(0.05)


def test_titles_come_from_a_mapping_or_a_file(tmp_path, saved_catalogues):
    log = write_csv(
        tmp_path / "log.csv",
        [("a", item, time) for time, item in enumerate(("01", "2", "3"))] + [("b", "2", 1)],
    )
    prepare(log, tmp_path / "out", item_titles={"01": "One", "4": "Four"})
    titles = write_csv(tmp_path / "titles.csv", [("01", "One, the first"), ("2", "Zwölf")], ("item_id", "title"))
    prepare(log, tmp_path / "out", item_titles=titles)
    assert [saved[1] for saved in saved_catalogues] == [{"01": "One"}, {"01": "One, the first", "2": "Zwölf"}]
    with pytest.raises(ValueError, match="none of the 1 titles belongs to an item of the catalogue"):
        prepare(log, tmp_path / "out", item_titles={"1": "One"})
    with pytest.raises(ValueError, match="has no column 'title'"):
        prepare(log, tmp_path / "out", item_titles=log)


def test_a_missing_column_is_named_with_the_columns_there_are_and_the_option(tmp_path):
    log = write_csv(tmp_path / "log.csv", [("a", "x", 1)], ("user", "item_id", "timestamp"))
    with pytest.raises(ValueError, match=r"no column 'user_id'.*user, item_id, timestamp.*--user_column"):
        rows_of(log)
    log = write_csv(tmp_path / "log.csv", [("a", "x", 1)], ("user_id", "item_id", "when"))
    with pytest.raises(ValueError, match=r"no column 'timestamp'.*--time_column, or .* --sequence_column"):
        rows_of(log)
    with pytest.raises(ValueError, match="order of events is unknown"):
        rows_of(log, time_column=None)


@pytest.mark.parametrize(("column", "position"), [("user_id", 0), ("item_id", 1), ("timestamp", 2)])
def test_nulls_are_counted_and_refused(tmp_path, column, position):
    rows = [["a", "x", 1], ["b", "y", 2], ["b", "z", 3]]
    rows[1][position] = rows[2][position] = None
    with pytest.raises(ValueError, match=f"column '{column}' is null or empty in 2 of 3 rows"):
        rows_of(write_csv(tmp_path / "log.csv", rows))


def test_empty_ids_float_ids_and_not_a_number_times_are_refused(tmp_path):
    path = tmp_path / "log.parquet"

    def refused(user, item, time, message):
        pq.write_table(pa.table({"user_id": user, "item_id": item, "timestamp": time}), path)
        with pytest.raises(ValueError, match=message):
            rows_of(path)

    refused(["a", "b"], ["x", ""], [1, 2], "column 'item_id' is null or empty in 1 of 2 rows")
    refused(["a", "b"], [1.0, 2.0], [1, 2], "ids must be text or integers; column 'item_id' is float64")
    refused(["a", "b"], ["x", "y"], [1.0, float("nan")], "column 'timestamp' is null or not finite in 1 of 2 rows")
    refused(["a", "b"], ["x", "y"], [float("inf"), 1.0], "column 'timestamp' is null or not finite in 1 of 2 rows")


def test_a_time_column_of_text_is_refused(tmp_path):
    log = write_csv(tmp_path / "log.csv", [("a", "x", "3 March"), ("b", "x", "4 March")])
    with pytest.raises(ValueError, match=r"'timestamp' orders the events.*it is string: convert it to a number"):
        rows_of(log)


def test_one_user_no_user_left_and_no_target_are_refused(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", [("a", "x", 1), ("a", "y", 2), ("a", "z", 3)])
    with pytest.raises(ValueError, match=r"one user only \(3 events\)"):
        rows_of(log)
    log = write_csv(tmp_path / "log.csv", [("a", "x", 1), ("a", "y", 2), ("b", "z", 3)])
    with pytest.raises(ValueError, match=r"no user is left of 2 .*min_user_events=3.*loosen --min_user_events"):
        rows_of(log, min_user_events=3)
    with pytest.raises(ValueError, match=r"none of the 2 users has a target.*the longest history has 2"):
        prepare(log, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]
    with pytest.raises(ValueError, match="no user is left"):
        rows_of(
            write_csv(tmp_path / "rated.csv", [("a", "x", 1, 1), ("b", "x", 1, 1)], (*HEADER, "rating")),
            min_rating=5,
        )


def test_files_that_are_no_log_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*or a glob pattern$"):
        read_log(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_log(f"{tmp_path}/*.csv")
    with pytest.raises(ValueError, match="is a folder; name its files"):
        read_log(tmp_path)
    path = tmp_path / "log.csv"
    for content, message in (
        (b"", "is empty"),
        (b"\n\n", "first line of .* is blank"),
        (b"\x89PNG\r\n\x1a\n\0\0", "neither UTF-8 CSV nor Parquet"),
        (b"user_id,item_id,timestamp\ra,x,1\rb,y,1\r", r"no CSV header .*expected lines that end with .*convert"),
        (b"PAR1 and no more", "cannot read"),
        (b"user_id,item_id,timestamp\n", "columns but no events"),
        (b"user_id,item_id,timestamp\na,x,1\na,x\nb,y,1,2\n", "cannot read"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            rows_of(path)
    write_csv(path, [("a", "x", 1)])
    write_csv(tmp_path / "other.csv", [("a", "x", 1)], ("user_id", "timestamp", "item_id"))
    with pytest.raises(ValueError, match="has another header"):
        read_log(tmp_path / "*.csv")


def test_only_a_folder_of_ours_is_replaced_and_what_is_not_ours_stays(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"foreign exists and holds something else \(thesis.tex\).*another --output"):
        prepare(log, foreign)
    with pytest.raises(ValueError, match="holds something else"):
        prepare(log, log)
    assert (foreign / "thesis.tex").read_text() == "years of work"

    output = tmp_path / "out"
    output.mkdir()
    prepare(log, output)
    (output / "notes.txt").write_text("mine")
    own = json.loads((output / "preparation.json").read_text())
    stale = output / "stale.json"  # as if an earlier call had written a file that this one does not write
    stale.write_text("{}")
    own["files"].append(stale.name)
    (output / "preparation.json").write_text(json.dumps(own))
    prepare(log, output, duplicates="drop")
    assert sorted(path.name for path in output.iterdir()) == [
        "histories.parquet",
        "notes.txt",
        "preparation.json",
    ]
    assert json.loads((output / "preparation.json").read_text())["filters"]["duplicates"] == "drop"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "log.csv", "out"]


def test_an_empty_folder_is_filled_and_a_volume_not_replaced(tmp_path, saved_catalogues, monkeypatch):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    volume = tmp_path / "volume"
    volume.mkdir()
    before = volume.stat().st_ino
    monkeypatch.chdir(volume)
    prepare(log, ".")
    assert volume.stat().st_ino == before  # a renamed one would be another, and the shell in a folder that is gone
    assert sorted(path.name for path in volume.iterdir()) == ["histories.parquet", "preparation.json"]
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).resolve() == volume)
    with pytest.raises(ValueError, match=r"is not empty and cannot be replaced, being a volume .* --output .*data$"):
        prepare(log, volume)
    prepare(log, volume / "data")
    assert (volume / "data" / "preparation.json").is_file()


def test_a_preparation_that_is_told_to_end_leaves_nothing_behind(tmp_path):
    events = 300_000
    numbers = np.random.default_rng(0).integers(0, 10**5, (2, events))
    columns = {"user_id": numbers[0] // 10, "item_id": numbers[1] // 100, "timestamp": np.arange(events)}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    command = [sys.executable, "-m", "bert4rec_hf", "prepare", tmp_path / "log.parquet", "--output", tmp_path / "data"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob(".data-*")):
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "bert4rec prepare: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_a_model_folder_is_not_replaced_though_it_has_a_preparation(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    model = tmp_path / "model"
    prepare(log, model)
    (model / "histories.parquet").unlink()
    before = (model / "preparation.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds something else \(preparation\.json\)"):
        prepare(log, model)
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (model / name).write_text("{}")
        with pytest.raises(ValueError, match=r"model is a model folder; choose another --output"):
            prepare(log, model)
        (model / name).unlink()
    assert [path.name for path in model.iterdir()] == ["preparation.json"]
    assert (model / "preparation.json").read_bytes() == before


def test_a_failed_preparation_leaves_the_earlier_one_alone(tmp_path, saved_catalogues, monkeypatch):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    prepare(log, tmp_path / "out")
    before = (tmp_path / "out" / "preparation.json").read_bytes()

    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(bert4rec_hf.preparation, "_save_catalogue", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare(log, tmp_path / "out", duplicates="drop")
    assert (tmp_path / "out" / "preparation.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


def test_an_ibis_table_of_the_users_own_is_prepared_and_left_as_it_was(tmp_path, saved_catalogues):
    connection = ibis.duckdb.connect()
    connection.con.register(
        "log",
        pa.table({name: list(column) for name, column in zip(HEADER, zip(*TEMPORAL, strict=True), strict=True)}),
    )
    preparation = prepare(connection.table("log"), tmp_path / "out", min_user_events=2, duplicates="drop")
    assert preparation["source"] == "ibis.Table"
    names = connection.raw_sql("SELECT table_name FROM information_schema.tables").fetchall()
    assert names == [("log",)]


def test_spark_gives_the_rows_that_duckdb_gives(tmp_path):
    pyspark_sql = pytest.importorskip("pyspark.sql")
    path = tmp_path / "log.parquet"
    columns = dict(zip(HEADER, zip(*TEMPORAL, strict=True), strict=True))
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), path)
    session = pyspark_sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", False).getOrCreate()
    try:
        log = ibis.pyspark.connect(session).read_parquet(str(path))
        local = ibis.duckdb.connect().read_parquet(path)
        for options in (
            {"min_user_events": 2},
            {"split": "temporal", "validation_cut": 0.5, "duplicates": "drop"},
        ):
            assert rows_of(log, **options) == rows_of(local, **options)
    finally:
        session.stop()


def test_the_tokenizer_is_written_with_titles_counts_and_length(tmp_path):
    tokenization = pytest.importorskip("bert4rec_hf.tokenization_bert4rec")
    log = write_csv(
        tmp_path / "log.csv",
        [("a", item, time) for time, item in enumerate(("[MASK]", "b", "c"))] + [("d", "b", 1)],
    )
    preparation = prepare(log, tmp_path / "out", item_titles={"b": "Bee"}, max_length=7)
    assert "tokenizer.json" in preparation["files"]
    tokenizer = tokenization.Bert4RecTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 7
    assert len(tokenizer) == 3 + 3


def test_nothing_is_printed_when_the_interpreter_ends(tmp_path):
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    code = (
        "from bert4rec_hf import histories, read_log\n"
        f"table = histories(read_log({str(log)!r}), min_user_events=2)\n"
        "table.to_pyarrow()\n"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    assert outcome.stdout + outcome.stderr == ""


def test_a_data_frame_or_an_arrow_table_is_prepared_as_its_file_is(tmp_path):
    rows = [("b", "007", 3), ("a", "z", 1), ("a", "x", 1), ("a", "y", 1), ("b", "é", 1), ("c", "x", 2)]  # ties
    frame = pandas.DataFrame(rows, columns=HEADER).sample(frac=1, random_state=0)
    write_csv(tmp_path / "log.csv", frame.itertuples(index=False))
    expected = rows_of(tmp_path / "log.csv")
    for source in (frame, pa.Table.from_pandas(frame)):
        assert rows_of(read_log(source)) == expected
    preparation = prepare(frame, tmp_path / "frame")
    assert preparation["source"] == "pandas.DataFrame"
    assert pq.read_table(tmp_path / "frame" / "histories.parquet").to_pylist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepare(["a.csv", "b.csv"], "out"), "got list: for several files give a pattern"),
        (lambda: histories(pandas.DataFrame()), "expected an Ibis table of events, got DataFrame: read_log makes one"),
        (
            lambda: histories(read_log(pandas.DataFrame({"a": [1]})), event_columns="rating"),
            r"got 'rating': did you mean \['rating'\]",
        ),
    ],
)
def test_what_is_no_log_is_a_type_error_that_says_what_is(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_titles_that_a_data_frame_lacks_are_no_titles(tmp_path, saved_catalogues, caplog):
    log = write_csv(tmp_path / "log.csv", [(user, item, time) for user in "ab" for time, item in enumerate("xyz")])
    prepare(log, tmp_path / "out", item_titles={"x": "An x", "y": float("nan"), "z": None})
    assert saved_catalogues[0][1] == {"x": "An x"}
    assert "2 of 3 items have no title" in caplog.text


def test_pandas_own_times_with_a_zone_are_times(tmp_path):
    times = pandas.to_datetime(["2024-01-02", "2024-01-01", "2024-01-03"], utc=True).as_unit("ns")
    frame = pandas.DataFrame({"user_id": list("aab"), "item_id": list("xyz"), "timestamp": times})
    frame.to_parquet(tmp_path / "log.parquet")
    for log in (read_log(frame), read_log(tmp_path / "log.parquet")):
        assert items_of(log) == {"a": ["y", "x"], "b": ["z"]}


def test_a_date_whose_year_comes_first_is_a_date_in_any_column_and_others_stay_text(tmp_path):
    rows = [("a", "x", "2024/04/22", "24/04/22"), ("b", "y", "2024/04/21", "21/04/22")]
    log = read_log(write_csv(tmp_path / "log.csv", rows, header=(*HEADER, "born")))
    assert log.timestamp.type().is_date()
    assert log.born.type().is_string()
    assert items_of(log) == {"a": ["x"], "b": ["y"]}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_files_name_is_no_pattern_and_its_folders_are_no_columns(tmp_path, kind):
    folder = tmp_path / "user_id=acme" / "timestamp=2026-01-31"
    folder.mkdir(parents=True)
    for name, user in (("log[1]", "right"), ("log1", "wrong")):
        path = write_csv(folder / f"{name}.csv", [(user, "a", 2), (user, "b", 1)])
        if kind == "parquet":
            pandas.read_csv(path).to_parquet(path.with_suffix(".parquet"))
    one, both = (read_log(source).to_pyarrow() for source in (folder / f"log[1].{kind}", f"{folder}/log*.{kind}"))
    assert (one["user_id"].to_pylist(), one["timestamp"].to_pylist()) == (["right"] * 2, [2, 1])
    assert both["user_id"].to_pylist() == ["wrong"] * 2 + ["right"] * 2


def test_the_output_folder_may_be_named_like_a_partition_of_a_table(tmp_path):
    log = write_csv(tmp_path / "log.csv", [(user, item, time) for user in "ab" for time, item in enumerate("xyz")])
    assert prepare(log, tmp_path / "item_id=[x]" / "data")["statistics"]["num_users"] == 2


def test_of_several_titles_of_an_item_one_is_taken_whatever_the_order_and_it_is_said(tmp_path, caplog):
    for number, rows in enumerate(([("x", "A"), ("x", "B"), ("y", "C")], [("y", "C"), ("x", "B"), ("x", "A")])):
        file = write_csv(tmp_path / f"items{number}.csv", rows, header=("item_id", "title"))
        assert read_titles(file, "item_id", ["x", "y"]) == {"x": "B", "y": "C"}
        assert "has 1 titles too many" in caplog.text
        caplog.clear()
    same = write_csv(tmp_path / "same.csv", [("x", "A"), ("x", "A")], header=("item_id", "title"))
    assert read_titles(same, "item_id", ["x"]) == {"x": "A"}
    assert caplog.text == ""
