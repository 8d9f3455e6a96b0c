"""Order of events, filters, duplicates and splits."""

import json
import random

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs_on_disk import HEADER, TEMPORAL, items_of, rows_of, write_csv

from bert4rec_hf.data.logs import read_log
from bert4rec_hf.data.preparation import histories, prepare


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
    # A user has about ten events at three positions. Most events tie in time and position, and differ in item or price.
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


def test_min_rating_leaves_out_lower_and_missing_ratings(tmp_path):
    header = (*HEADER, "rating")
    rows = [("a", "x", 1, 3), ("a", "y", 2, 4), ("a", "z", 3, None), ("b", "x", 1, 5)]
    log = write_csv(tmp_path / "log.csv", rows, header)
    assert items_of(log, min_rating=4) == {"a": ["y"], "b": ["x"]}
    write_csv(log, [*rows[:2], ("a", "z", 3, "nan"), rows[3]], header)
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
    # d has one event and is dropped. Then w, c and z are dropped in turn, since each has one event left. b keeps two.
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("b", "z"), ("c", "z"), ("c", "w"), ("d", "w")]
    log = write_csv(tmp_path / "log.csv", [(user, item, time) for time, (user, item) in enumerate(rows)])
    kept = items_of(log, min_user_events=2, min_item_events=2)
    assert kept == {"a": ["x", "y"], "b": ["x", "y"]}
    assert items_of(log, min_user_events=2) == {"a": ["x", "y"], "b": ["x", "y", "z"], "c": ["z", "w"]}


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
    assert [row["train_end"] for row in rows] == [2, 3, 0, 0]  # c has one event before the cut, too few
    assert rows[1]["item_id"] == ["y", "x", "rare"]  # the catalogue lacks one, but the history has all
    assert saved_catalogues[0][0] == {"x": 2, "y": 2}
    assert preparation["split"] == {"name": "temporal", "validation": True, "validation_cut": 6, "test_cut": 8}
    statistics = preparation["statistics"]
    assert (statistics["num_validation_targets"], statistics["num_test_targets"]) == (2, 2)
    assert statistics["share_cold_targets"] == 0.5  # the catalogue has a's target but not c's
    assert statistics["num_test_users_without_past"] == 0


@pytest.mark.parametrize(
    ("split", "expected", "catalogue"),
    [
        # a has five events, b three, c two and d one.
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


def test_a_cut_is_a_share_a_value_or_a_date(tmp_path, saved_catalogues):
    log = write_csv(tmp_path / "log.csv", [(user, item, time * 86400) for user, item, time in TEMPORAL])

    def cuts_of(**cuts):
        split = prepare(log, tmp_path / "out", split="temporal", **cuts)["split"]
        return split["validation_cut"] / 86400, split["test_cut"] / 86400

    assert cuts_of(validation_cut=0.5, test_cut=0.8) == (5, 8)  # 5 and 8 of 11 events are before the cuts
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
    # As a float, .29 times 100 is less than 29.
    log = write_csv(tmp_path / "hundred.csv", [(time % 2, time % 5, time) for time in range(100)])
    assert prepare(log, tmp_path / "out", split="temporal", validation=False, test_cut=0.29)["split"]["test_cut"] == 29


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
            "validation_cut needs validation targets; got 6 with --validation false",
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
