"""Which events of a log are used: conditions in SQL, queries of a database, users that look like no persons."""

import re
import sqlite3

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_runs import fail
from logs_on_disk import HEADER, items_of, rows_of, write_csv

from bert4rec_hf import cli
from bert4rec_hf.data.logs import query
from bert4rec_hf.data.preparation import prepare

SHOP = ("user_id", "item_id", "timestamp", "event_type", "Price")
EVENTS = [
    ("007", "0x10", 1, "view", 9.5),
    ("007", "16", 2, "purchase", 10.5),
    ("7", "16", 3, "purchase", 0.5),
    ("7", "-0", 4, "purchase", 100),
    ("7", "0", 5, "purchase", None),
]


def shop_file(tmp_path, kind):
    if kind == "csv":
        return write_csv(tmp_path / "shop.csv", EVENTS, SHOP)
    frame = pandas.DataFrame(EVENTS, columns=SHOP)
    if kind == "pandas":
        return frame
    path = tmp_path / f"shop.{kind}"
    frame.to_parquet(path) if kind == "parquet" else frame.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "pandas"])
def test_events_meet_the_condition_and_ids_stay_as_they_are_spelled(tmp_path, kind):
    log = shop_file(tmp_path, kind)
    assert items_of(log, where="event_type = 'purchase' AND price > 0.5") == {"007": ["16"], "7": ["-0"]}
    assert items_of(log, where="price IS NULL OR timestamp < 3") == {"007": ["0x10", "16"], "7": ["0"]}
    assert items_of(log, where="item_id IN ('16', '0x10')") == {"007": ["0x10", "16"], "7": ["16"]}


def test_event_columns_come_along_with_a_condition(tmp_path):
    rows = rows_of(shop_file(tmp_path, "csv"), where="Price > 1", event_columns=["Price", "event_type"])
    assert rows[0]["Price"] == [9.5, 10.5]
    assert rows[1]["event_type"] == ["purchase"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("cost > 1", "--where names the column 'cost'; the columns of the log are user_id, item_id"),
        ("price >", "--where must be a condition in SQL"),
        ("price > 1; DROP TABLE log", "--where must be a condition in SQL"),
        ("price > 1000", "no events that meet the condition"),
    ],
)
def test_a_condition_that_cannot_be_used_is_refused(tmp_path, where, message):
    with pytest.raises(ValueError, match=message):
        rows_of(shop_file(tmp_path, "csv"), where=where)


def test_users_with_more_events_than_the_maximum_are_left_out(tmp_path):
    rows = [("bot", f"i{time % 7}", time) for time in range(100)] + [(user, item, 1) for user in "ab" for item in "xyz"]
    log = write_csv(tmp_path / "log.csv", rows)
    assert items_of(log, max_user_events=99).keys() == {"a", "b"}
    assert items_of(log, max_user_events=100).keys() == {"a", "b", "bot"}
    with pytest.raises(ValueError, match="all users have more than 2 events; raise --max_user_events"):
        rows_of(log, max_user_events=2)
    with pytest.raises(ValueError, match=r"max_user_events must be at least min_user_events \(5\); got 3"):
        rows_of(log, max_user_events=3, min_user_events=5)


@pytest.mark.parametrize("unit", [1, 1000, 10**9])
def test_prepare_tells_which_users_look_like_no_persons(tmp_path, capsys, unit):
    start = 1_700_000_000
    rows = [("bot", f"i{n % 7}", (start + n // 2) * unit) for n in range(200)]
    rows += [("person", f"i{n % 7}", (start + 600 * n) * unit) for n in range(150)]
    log = write_csv(tmp_path / "log.csv", rows)
    cli.main(["prepare", str(log), "--output", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert "users that look like no persons: bot (200 events, 120 in one minute); --max_user_events" in output
    longest = prepare(log, tmp_path / "out")["statistics"]["longest_histories"]
    assert [user["most_in_a_minute"] for user in longest] == [120, 1]


def test_a_query_of_a_database_is_a_log(tmp_path):
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute(
            "CREATE TABLE events (user_id TEXT, item_id TEXT, timestamp INTEGER, event_type TEXT, price)"
        )
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", EVENTS)
    expected = {"007": ["0x10", "16"], "7": ["16", "-0", "0"]}
    assert items_of(query("SELECT user_id, item_id, timestamp FROM events", url)) == expected
    words = ["--database", url, "--output", str(tmp_path / "out")]
    cli.main(["prepare", "--sql", "SELECT * FROM events WHERE event_type = 'purchase'", "--split", "none", *words])
    assert pq.read_table(tmp_path / "out" / "histories.parquet")["item_id"].to_pylist() == [["16"], ["16", "-0", "0"]]
    for arguments, message in (
        (["--sql", "SELECT * FROM nothing", *words], "cannot read 'SELECT \\* FROM nothing' from sqlite"),
        (["--sql", "SELECT 1", "--output", "out"], "--sql and --database belong together"),
        (["log.csv", "--sql", "SELECT 1", *words], "expected a log, or --sql and --database; got both"),
        (["--output", "out"], "expected a log, or --sql and --database; got neither"),
    ):
        assert re.search(message, fail("prepare", *arguments))


def test_a_query_of_a_duckdb_file_is_a_log(tmp_path):
    import duckdb

    with duckdb.connect(str(tmp_path / "shop.duckdb")) as connection:
        events_of_shop = pa.table({name: [str(row[index]) for row in EVENTS] for index, name in enumerate(HEADER)})
        connection.register("events_of_shop", events_of_shop)
        connection.execute("CREATE TABLE events AS SELECT * FROM events_of_shop")
    found = query("SELECT * FROM events WHERE user_id = '7'", f"duckdb://{tmp_path / 'shop.duckdb'}")
    assert found.table(["item_id"]).to_pyarrow()["item_id"].to_pylist() == ["16", "-0", "0"]
