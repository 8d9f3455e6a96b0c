"""Reading logs: formats, ids, columns, times, and errors."""

import bz2
import functools
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from datetime import datetime
from decimal import Decimal

import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hub_server import HubServer, Repository
from logs_on_disk import HEADER, TEMPORAL, items_of, rows_of, write_csv

import bert4rec_hf.data.preparation
import bert4rec_hf.data.splits
from bert4rec_hf.data.duckdb_tables import SOURCE_ROW
from bert4rec_hf.data.logs import read_log, read_titles
from bert4rec_hf.data.preparation import histories, prepare
from bert4rec_hf.model.tokenization_bert4rec import Bert4RecTokenizer


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
    log = bert4rec_hf.data.splits.stored_table(log)
    assert log.filter(log.item_id.cast("int64") == log[SOURCE_ROW]).count().execute() == number


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
    write("2.parquet", pa.array(["007", "08"]))
    with pytest.raises(ValueError, match=r"'item_id' .*int64 in .*1.parquet and string in .*2.parquet: write"):
        read_log(tmp_path / "*.parquet")
    write("2.parquet", pa.array(["007", "08"]), "Item_ID")
    with pytest.raises(ValueError, match=r"2.parquet lacks the column 'item_id', which .*1.parquet has"):
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
    pq.write_table(pa.table({"user_id": [1], "item_id": ["c"], "timestamp": [day]}), tmp_path / "3.parquet")
    with pytest.raises(ValueError, match=r"3.parquet lacks the column 'rating', which .*1.parquet has"):
        read_log(tmp_path / "*.parquet")


MANY_TIMES = {
    "whole numbers": ("1", "900000.4 900000.3", ["z1", "z0"]),
    "dates": ("2024-08-01", "2024-08-25T10:30 2024-08-25T10:00", ["z1", "z0"]),
    "another year first": ("2024-08-01 10:00:00", "22/04/24T10:00:00", "'22/04/24 10:00:00' in row"),
    "a time zone": ("2024-08-01 10:00:00", "2024-08-25T10:00:00+05:00", r"'2024-08-25 10:00:00\+05:00' in row"),
    "a word": ("1", "noon", "'noon' in row"),
}


@pytest.mark.parametrize(("time", "last", "expected"), MANY_TIMES.values(), ids=MANY_TIMES)
def test_values_behind_very_many_others_count_as_well(tmp_path, time, last, expected):
    path = tmp_path / "log.csv"
    rows = [f"z,z{number},{value.replace('T', ' ')}\n" for number, value in enumerate(last.split())]
    path.write_text("user_id,item_id,timestamp\n" + f"a,x,{time}\n" * 500_000 + "".join(rows))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            rows_of(path)
    else:
        assert items_of(path)["z"] == expected


def test_other_separators_byte_order_mark_and_gzip_are_read(tmp_path):
    rows = "user_id\titem_id\ttimestamp\n01\tx, y\t1\n2\tz\t1\n"
    path = tmp_path / "log.tsv"
    path.write_text(rows, "utf-8-sig")
    assert items_of(path) == {"01": ["x, y"], "2": ["z"]}
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(rows.replace(", ", " ").replace("\t", ";").encode()))
    assert items_of(packed) == {"01": ["x y"], "2": ["z"]}


def test_a_dataset_is_a_log():
    rows = {"user_id": ["a", "a", "b"], "item_id": ["01", "2", "3"], "timestamp": [2, 1, 1]}
    assert items_of(read_log(Dataset.from_dict(rows).select([0, 2, 1]))) == {"a": ["2", "01"], "b": ["3"]}
    assert items_of(DatasetDict(train=Dataset.from_dict(rows))) == {"a": ["2", "01"], "b": ["3"]}
    with pytest.raises(ValueError, match=r"has the splits train, test; give one of them, as in log\['train'\]"):
        read_log(DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows)))


def test_timestamps_and_dates_stay_timestamps(tmp_path):
    rows = [
        ("a", "x", "2024-01-02 10:00:00"),
        ("a", "y", "2024-01-01 10:00:00"),
        ("b", "x", "2024-01-01 00:00:00"),
    ]
    result = histories(write_csv(tmp_path / "log.csv", rows))
    assert result.schema()["timestamp"].value_type.is_timestamp()
    assert result.to_pyarrow()["item_id"][0].as_py() == ["y", "x"]
    dates = write_csv(tmp_path / "dates.csv", [(user, item, time[:10]) for user, item, time in rows])
    assert items_of(dates)["a"] == ["y", "x"]


@pytest.mark.parametrize(("scale", "expected"), [(0, (6, 8)), (1, (0.6, 0.8))])
def test_decimal_times_become_numbers(tmp_path, saved_catalogues, scale, expected):
    users, items, times = zip(*TEMPORAL, strict=True)
    times = pa.array([Decimal(time).scaleb(-scale) for time in times], pa.decimal128(18, scale))
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), tmp_path / "log.parquet")
    cuts = {"split": "temporal", "validation_cut": 0.6, "test_cut": 0.8}  # 6 and 8 of 11 events are before the cuts
    split = prepare(tmp_path / "log.parquet", tmp_path / "out", **cuts)["split"]
    assert (split["validation_cut"], split["test_cut"]) == expected
    kind = pq.read_schema(tmp_path / "out" / "histories.parquet").field("timestamp").type.value_type
    assert kind == (pa.float64() if scale else pa.int64())


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
    refused(
        ["a", "b"],
        [1.0, 2.0],
        [1, 2],
        r"ids must be text or whole numbers; column 'item_id' \(--item_column\) is float64",
    )
    refused(["a", "b"], ["x", "y"], [1.0, float("nan")], "column 'timestamp' is null or not finite in 1 of 2 rows")
    refused(["a", "b"], ["x", "y"], [float("inf"), 1.0], "column 'timestamp' is null or not finite in 1 of 2 rows")


def test_a_time_column_of_text_is_refused(tmp_path):
    log = write_csv(tmp_path / "log.csv", [("a", "x", "3 March"), ("b", "x", "4 March")])
    with pytest.raises(
        ValueError, match=r"'timestamp' .* has '3 March' in row 1; expected numbers such as .*, or dates"
    ):
        rows_of(log)


def test_files_that_are_no_log_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file.*expected a file, a folder or a pattern"):
        read_log(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_log(f"{tmp_path}/*.csv")
    with pytest.raises(FileNotFoundError, match=r"the folder .* has no files"):
        read_log(tmp_path)
    path = tmp_path / "log.csv"
    for content, message in (
        (b"", "is empty"),
        (b"\n\n", "first line of .* is blank"),
        (b"\x89PNG\r\n\x1a\n\0\0", "neither UTF-8 CSV, nor JSON lines, nor Parquet"),
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


def test_the_tokenizer_is_written_with_titles_counts_and_length(tmp_path):
    log = write_csv(
        tmp_path / "log.csv",
        [("a", item, time) for time, item in enumerate(("[MASK]", "b", "c"))] + [("d", "b", 1)],
    )
    preparation = prepare(log, tmp_path / "out", item_titles={"b": "Bee"}, max_length=7)
    assert "tokenizer.json" in preparation["files"]
    tokenizer = Bert4RecTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 7
    assert len(tokenizer) == 3 + 3


def test_a_data_frame_or_an_arrow_table_is_prepared_as_its_file_is(tmp_path):
    rows = [
        ("b", "007", 3),
        ("a", "z", 1),
        ("a", "x", 1),
        ("a", "y", 1),
        ("b", "é", 1),
        ("c", "x", 2),
    ]  # with ties
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
        (lambda: prepare(["a.csv", 7], "out"), "expected paths in a list of files; got int: 7"),
        (lambda: prepare(object(), "out"), "expected the path of a log, .*; got builtins.object"),
        (lambda: histories(pandas.Series([1])), "expected a data frame; got pandas.Series"),
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
    close = pandas.Series(pandas.to_datetime([1_700_000_000_000_000_002, 1_700_000_000_000_000_001, 3], utc=True))
    frame = pandas.DataFrame({"user_id": list("aab"), "item_id": list("xyz"), "timestamp": close})
    log = read_log(frame)
    assert log.timestamp.type().is_timestamp()
    assert items_of(log) == {"a": ["y", "x"], "b": ["z"]}


def test_a_date_whose_year_comes_first_is_a_date_in_any_column_and_others_stay_text(tmp_path):
    rows = [("a", "x", "2024/04/22", "24/04/22"), ("b", "y", "2024/04/21", "21/04/22")]
    log = write_csv(tmp_path / "log.csv", rows, header=(*HEADER, "born"))
    assert items_of(log, event_columns=["born"]) == {"a": ["x"], "b": ["y"]}
    assert histories(log).timestamp.type().value_type.is_timestamp()
    assert histories(log, event_columns=["born"]).born.type().value_type.is_string()
    with pytest.raises(ValueError, match="'24/04/22' in row 1"):
        histories(log, time_column="born")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_files_name_is_no_pattern_and_its_folders_are_no_columns(tmp_path, kind):
    folder = tmp_path / "user_id=acme" / "timestamp=2026-01-31"
    folder.mkdir(parents=True)
    for name, user in (("log[1]", "right"), ("log1", "wrong")):
        path = write_csv(folder / f"{name}.csv", [(user, "a", 2), (user, "b", 1)])
        if kind == "parquet":
            pandas.read_csv(path).to_parquet(path.with_suffix(".parquet"))
    one, both = (read_log(source).to_pyarrow() for source in (folder / f"log[1].{kind}", f"{folder}/log*.{kind}"))
    assert (one["user_id"].to_pylist(), one["timestamp"].to_pylist()) == (
        ["right"] * 2,
        [2, 1] if kind == "parquet" else ["2", "1"],
    )
    assert both["user_id"].to_pylist() == ["wrong"] * 2 + ["right"] * 2


def test_the_output_folder_may_be_named_like_a_partition_of_a_table(tmp_path):
    log = write_csv(tmp_path / "log.csv", [(user, item, time) for user in "ab" for time, item in enumerate("xyz")])
    assert prepare(log, tmp_path / "item_id=[x]" / "data")["statistics"]["num_users"] == 2


def test_of_several_titles_of_an_item_one_is_taken_whatever_the_order_and_it_is_said(tmp_path, caplog):
    for number, rows in enumerate(([("x", "A"), ("x", "B"), ("y", "C")], [("y", "C"), ("x", "B"), ("x", "A")])):
        file = write_csv(tmp_path / f"items{number}.csv", rows, header=("item_id", "title"))
        assert read_titles(file, "item_id", ["x", "y"]) == {"x": "B", "y": "C"}
        assert "has several titles for some items, 1 more than it needs" in caplog.text
        caplog.clear()
    same = write_csv(tmp_path / "same.csv", [("x", "A"), ("x", "A")], header=("item_id", "title"))
    assert read_titles(same, "item_id", ["x"]) == {"x": "A"}
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "item"])
def test_titles_come_from_every_format_and_their_header_may_have_blanks(tmp_path, kind):
    path = tmp_path / f"titles.{kind}"
    rows = [{"item_id": "0x10", "title": 'Ten, "A"'}, {"item_id": "16", "title": None}, {"item_id": "-0", "title": "é"}]
    if kind == "csv":
        path.write_text('item_id , title\n0x10,"Ten, ""A"""\n16,\n-0,é\n', "utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "item":
        path.write_text('item_id:token\ttitle:token_seq\n0x10\t"Ten, ""A"""\n16\t\n-0\té\n', "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_titles(path, "item_id", ["0x10", "16", "-0", "0"]) == {"0x10": 'Ten, "A"', "-0": "é"}


def test_titles_that_are_all_empty_are_said_to_be_empty(tmp_path):
    titles = write_csv(tmp_path / "titles.csv", [("1", None), ("2", "")], ("item_id", "title"))
    for given in (titles, {"1": None, "2": float("nan")}):
        with pytest.raises(ValueError, match="all 2 titles are empty"):
            read_titles(given, "item_id", ["1", "2"])


def test_ids_of_titles_that_are_fractions_are_refused(tmp_path):
    pq.write_table(pa.table({"item_id": [1.0, None], "title": ["a", "b"]}), tmp_path / "titles.parquet")
    with pytest.raises(ValueError, match=r"column 'item_id' of .*titles.parquet is float64"):
        read_titles(tmp_path / "titles.parquet", "item_id", ["1"])


HEADERS = ["user_id, item_id, timestamp", "user_id ,item_id , timestamp ", "user_id,\u00a0item_id,timestamp\u00a0",
           'user_id, "item_id","timestamp"', "\ufeffuser_id\t,item_id,timestamp"]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_ids_below_a_header_with_blanks_are_spelled_exactly(tmp_path, header):
    path = tmp_path / "log.csv"
    path.write_text(
        header + "\n" + "".join(f"u{i % 2},{item},{i}\n" for i, item in enumerate(["0x10", "16", "-0", "0"]))
    )
    assert items_of(path) == {"u0": ["0x10", "-0"], "u1": ["16", "0"]}


@pytest.mark.parametrize("line", ["# exported on 2024-01-31", "sep=,", "Events of January", "2024,,"])
def test_a_line_before_the_header_is_shown(tmp_path, line):
    path = tmp_path / "log.csv"
    path.write_text(f"{line}\nuser_id,item_id,timestamp\na,0x10,1\nb,16,2\n")
    with pytest.raises(ValueError, match=f"no column 'user_id'.*first line.* are {line[:4]}"):
        items_of(path)


ROWS = b"user_id,item_id,timestamp\n" + b"".join(b"u%d,item-%d,%d\n" % (i % 5, i, i) for i in range(500))


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("gzip", _flipped(gzip.compress(ROWS), len(gzip.compress(ROWS)) // 2)),
        ("gzip", _flipped(gzip.compress(ROWS), -8)),  # the CRC
        ("gzip", _flipped(gzip.compress(ROWS), -1)),  # the length
        ("gzip", gzip.compress(ROWS)[:-9]),
        ("gzip", gzip.compress(ROWS)[:-4]),
        ("gzip", _flipped(gzip.compress(ROWS) * 2, len(gzip.compress(ROWS)))),
        ("gzip", gzip.compress(ROWS) + b"user_id"),
        ("bz2", _flipped(bz2.compress(ROWS), len(bz2.compress(ROWS)) // 2)),
        ("bz2", _flipped(bz2.compress(ROWS) * 2, len(bz2.compress(ROWS)))),
        ("bz2", bz2.compress(ROWS)[:-5]),
        ("zstd", _zstd(ROWS)[:-5]),
        ("zstd", _flipped(_zstd(ROWS) * 2, len(_zstd(ROWS)))),
    ],
)
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, kind, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"log.csv is damaged: it cannot be unpacked with {kind} to its end"):
        read_log(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id,item_id,timestamp\na,x,1\r\nb,y,2\n", "log as CSV: its line ends are mixed"),
        ("user_id,timestamp,item_id\r\na,1,x\nb,2,y\r\n", "log as CSV: its line ends are mixed"),
        ('{"user_id": "a", "item_id": "x"', "log as JSON: .*Malformed JSON"),
        ('{"user_id": "a", "item_id": "x", "timestamp": 1}\n[1]\n', r"log has the value \[1\]; expected objects"),
        (
            '{"user_id": "a", "user_id": "b"}',
            "log has the value .*; expected objects, in which each name is there once",
        ),
        (
            '{"user_id": {"a": 1}, "item_id": "x", "timestamp": 1}',
            "column 'user_id' of .*log has OBJECT; expected values of one type",
        ),
        (
            '{"user_id": [true], "item_id": "x", "timestamp": 1}',
            "column 'user_id' of .*log has lists of booleans, lists or",
        ),
        ('{"user_id": true, "item_id": "x", "timestamp": 1}', r"column 'user_id' \(--user_column\) is boolean"),
    ],
)
def test_the_error_of_a_library_names_the_file(tmp_path, content, message):
    (tmp_path / "log").write_bytes(content.encode())
    with pytest.raises(ValueError, match=message):
        items_of(tmp_path / "log")


def test_whole_numbers_in_json_are_ids_of_any_length(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(f'{{"user_id": {10**40 + i % 2}, "item_id": "0{i}", "timestamp": {i}.5}}\n' for i in range(4))
    )
    assert items_of(path) == {str(10**40): ["00", "02"], str(10**40 + 1): ["01", "03"]}


def test_booleans_of_json_select_events_and_are_copied(tmp_path):
    events = [
        {"user_id": user, "item_id": str(time), "timestamp": time, "bot": time == 1}
        for user in "ab"
        for time in range(3)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert items_of(tmp_path / "log.jsonl", where="NOT bot") == {"a": ["0", "2"], "b": ["0", "2"]}
    assert rows_of(tmp_path / "log.jsonl", event_columns=["bot"])[0]["bot"] == [False, True, False]


def test_event_columns_and_conditions_keep_leading_zeros_and_long_numbers(tmp_path):
    rows = [("a", "007", 1, "007", "9" * 25, 1.5), ("b", "7", 2, "7", "1", 2), ("c", "8", 3, "8", "2", 3)]
    log = write_csv(tmp_path / "log.csv", rows, (*HEADER, "zip", "long", "price"))
    found = rows_of(log, event_columns=["zip", "long", "price"])[0]
    assert (found["zip"], found["long"], found["price"]) == (["007"], ["9" * 25], [1.5])
    assert set(items_of(log, where="item_id <> '007'")) == {"b", "c"}
    assert set(items_of(log, where="price > 1.7")) == {"b", "c"}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("price +", r"--where must be a condition in SQL, .*got 'price \+'"),
        ("price > 0 LIMIT 1", "a condition has no further clauses"),
        ("1 = 1; DROP TABLE log", "--where must be a condition"),
        ("cost > 0", "--where names the column 'cost'; the columns of the log are user_id, "),
        ("nothing(price) > 0", r"--where 'nothing\(price\) > 0' cannot be computed: "),
    ],
)
def test_a_condition_that_is_none_is_refused(tmp_path, where, message):
    log = write_csv(tmp_path / "log.csv", [("a", "x", 1, 2), ("b", "x", 1, 2)], (*HEADER, "price"))
    with pytest.raises(ValueError, match=message):
        items_of(log, where=where)


@pytest.mark.parametrize("delimiter", ['"', "\n", "\r"])
def test_a_delimiter_that_no_csv_can_have_is_refused(tmp_path, delimiter):
    log = write_csv(tmp_path / "log.csv", [("a", "x", 1)])
    with pytest.raises(ValueError, match="a delimiter has no quotes and no line ends; got"):
        items_of(log, delimiter=delimiter)


def test_files_of_a_web_server_are_read(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with aiohttp, which is not installed")
    write_csv(tmp_path / "log 1.csv", [("a", "007", 2), ("a", "x", 1), ("b", "y", 1)])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert items_of(f"{address}/log%201.csv?version=1") == {"a": ["x", "007"], "b": ["y"]}
        with pytest.raises(FileNotFoundError, match=f"no such file: {address}/none.csv"):
            items_of(f"{address}/none.csv")
        server.shutdown()


def test_remote_files_are_found_by_patterns_and_in_folders(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for day in (1, 2):
        path = write_csv(tmp_path / "log.csv", [("a", f"i{day}", 1), ("b", f"i{day}", 1)])
        files.pipe(f"/shop/day={day}/log.csv", path.read_bytes())
    files.pipe("/shop/_SUCCESS", b"")
    try:
        for source in (
            "memory://shop",
            "memory://shop/*/log.csv",
            ["memory://shop/day=1/log.csv", "memory://shop/day=2"],
        ):
            assert items_of(source) == {"a": ["i1", "i2"], "b": ["i1", "i2"]}
        assert items_of("memory://shop", time_column="day")["a"] == ["i1", "i2"]
        with pytest.raises(FileNotFoundError, match="no file matches memory://shop/none-"):
            read_log("memory://shop/none-*.csv")
        with pytest.raises(ValueError, match="cannot read nothing://shop: "):
            read_log("nothing://shop")
    finally:
        files.rm("/shop", recursive=True)


def test_files_of_the_hub_are_read(monkeypatch, tmp_path):
    rows = write_csv(tmp_path / "log.csv", [("a", "007", 2), ("a", "x", 1), ("b", "y", 1)]).read_bytes()
    with HubServer() as hub:
        hub.repositories["datasets/somebody/log"] = repository = Repository()
        repository.commit("main", "the log", {"events/log.csv": rows})
        code = (
            "from logs_on_disk import items_of\n"
            "for path in ('events/log.csv', 'events/*.csv', 'events'):\n"
            "    assert items_of('hf://datasets/somebody/log/' + path) == {'a': ['x', '007'], 'b': ['y']}, path\n"
        )
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                                    "HF_HOME": str(tmp_path / "home")}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
        )
    assert done.returncode == 0, done.stderr
