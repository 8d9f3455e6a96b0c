"""The prepared folder: statistics, defaults, and replaced files."""

import json
import subprocess
import sys
import time
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from logs_on_disk import HEADER, TEMPORAL, rows_of, write_csv

import bert4rec_hf.data.preparation
import bert4rec_hf.data.splits
from bert4rec_hf.data.histories import histories_files, read_prepared
from bert4rec_hf.data.preparation import prepare
from bert4rec_hf.defaults import default_filter_seen_items, default_max_length


def test_event_columns_follow_the_items_and_keep_their_gaps(tmp_path):
    header = (*HEADER, "price", "rating")
    rows = [("a", "x", 2, 1.5, 5), ("a", "y", 1, None, 4), ("b", "x", 1, 3.0, 1)]
    row = rows_of(write_csv(tmp_path / "log.csv", rows, header), event_columns=["price", "rating"])[0]
    assert (row["item_id"], row["price"], row["rating"]) == (["y", "x"], [None, 1.5], [4, 5])
    with pytest.raises(ValueError, match="event columns must differ"):
        rows_of(tmp_path / "log.csv", event_columns=["timestamp"])


def test_a_user_who_is_no_person_is_told(tmp_path, caplog, monkeypatch):
    rows = [("bot", item, time) for time, item in enumerate("xyz" * 4)] + [("a", item, 1) for item in "xyzxyzxyzxy"]
    log = write_csv(tmp_path / "log.csv", rows)
    prepare(log, tmp_path / "out")
    assert caplog.text == ""
    monkeypatch.setattr("bert4rec_hf.data.preparation.SUSPICIOUS_HISTORY_LENGTH", 11)
    prepare(log, tmp_path / "out")
    assert "user bot has 12 of 23 events: if this is not a person" in caplog.text
    caplog.clear()
    monkeypatch.setattr("bert4rec_hf.data.preparation.SUSPICIOUS_SHARE_OF_EVENTS", 0.6)
    prepare(log, tmp_path / "out")
    assert caplog.text == ""


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
        "longest_histories": [
            {"user_id": "a", "num_events": 4, "most_in_a_minute": 4},
            {"user_id": "b", "num_events": 3, "most_in_a_minute": 3},
        ],
    }
    assert saved_catalogues == [({"w": 0, "x": 2, "y": 1, "z": 0}, None, 50)]
    assert preparation["filter_seen_items"] is False
    assert json.loads((tmp_path / "out" / "preparation.json").read_text("utf-8")) == json.loads(json.dumps(preparation))
    assert [default_max_length(length) for length in (3, 50, 51, 148, 999)] == [50, 50, 100, 200, 200]
    assert default_filter_seen_items(0.049)
    assert not default_filter_seen_items(0.05)


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
    stale = output / "stale.json"  # simulates a file that only the earlier call wrote
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
    assert volume.stat().st_ino == before  # a replaced folder would have another inode
    assert sorted(path.name for path in volume.iterdir()) == ["histories.parquet", "preparation.json"]
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).resolve() == volume)
    with pytest.raises(
        ValueError, match=r"is not empty and cannot be replaced, because it is a volume .* --output .*data$"
    ):
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
        while process.poll() is None and not list(tmp_path.glob(".data.*.new")):
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

    monkeypatch.setattr(bert4rec_hf.data.preparation, "_save_catalogue", fail)
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
    assert preparation["source"] == "the duckdb table"
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
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert outcome.stdout + outcome.stderr == ""


@pytest.mark.parametrize(
    "options",
    [{}, {"min_user_events": 5, "min_item_events": 5}, {"split": "temporal", "min_user_events": 3}, {"split": "none"}],
    ids=str,
)
def test_a_large_log_becomes_several_files_with_the_same_histories(tmp_path, monkeypatch, options):
    chance = np.random.default_rng(0)
    # Ids with bytes above 127 are in another order as signed bytes, and user 0 has more events than a file.
    users = np.array([f"{'éa0'[number % 3]}{number}" for number in range(200)])
    rows = {
        "user_id": [*chance.choice(users, 3000), *[users[0]] * 400],
        "item_id": [f"i{number}" for number in chance.integers(50, size=3400)],
        "timestamp": chance.integers(1000, size=3400),
    }
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    one = prepare(tmp_path / "log.parquet", tmp_path / "one", **options)
    monkeypatch.setattr("bert4rec_hf.data.preparation.EVENTS_PER_FILE", 300)
    several = prepare(tmp_path / "log.parquet", tmp_path / "several", **options)
    files = histories_files(tmp_path / "several")
    assert 5 < len(files) < 13
    assert [path.name for path in files[:2]] == [
        f"histories-00000-of-{len(files):05}.parquet", f"histories-00001-of-{len(files):05}.parquet",
    ]  # fmt: skip
    tables = [pq.read_table(path) for path in files]
    assert pa.concat_tables(tables).equals(pq.read_table(tmp_path / "one" / "histories.parquet"))
    assert max(len(table["item_id"].combine_chunks().values) for table in tables) < 1000
    assert {name: value for name, value in one.items() if name != "files"} == {
        name: value for name, value in several.items() if name != "files"
    }
    in_memory = [read_prepared(tmp_path / name)[0] for name in ("one", "several")]
    assert in_memory[0].item_ids.tolist() == in_memory[1].item_ids.tolist()

    files[1].rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="which are not all files of one log: prepare the log again"):
        read_prepared(tmp_path / "several")
    (tmp_path / "lost").rename(files[1])
    monkeypatch.undo()
    prepare(tmp_path / "log.parquet", tmp_path / "several", **options)
    assert histories_files(tmp_path / "several") == [tmp_path / "several" / "histories.parquet"]
    assert not list((tmp_path / "several").glob("histories-*"))


def test_a_memory_limit_is_that_of_duckdb(tmp_path, monkeypatch, saved_catalogues):
    limits = []

    def observe(name):
        function = getattr(bert4rec_hf.data.preparation, name)

        def observed(table, *arguments):
            limits.append(table.get_backend().con.sql("SELECT current_setting('memory_limit')").fetchall()[0][0])
            return function(table, *arguments)

        monkeypatch.setattr(bert4rec_hf.data.preparation, name, observed)

    observe("source_statistics")
    observe("history_statistics")
    log = write_csv(tmp_path / "log.csv", TEMPORAL)
    prepare(log, tmp_path / "out", memory_limit="2GiB")
    assert limits == ["2.0 GiB", "2.0 GiB"]
    with pytest.raises(ValueError, match='memory_limit must be a size such as 4GB; got "a \'few": '):
        prepare(log, tmp_path / "out", memory_limit="a 'few")
    with pytest.raises(ValueError, match="memory_limit is for logs that prepare reads; got 1GB and an Ibis table"):
        prepare(ibis.duckdb.connect().read_csv(log), tmp_path / "out", memory_limit="1GB")
