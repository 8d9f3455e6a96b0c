"""Preparation on a Spark cluster gives the rows that DuckDB gives, to the byte. `make test-spark` runs it."""

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec_hf.data.preparation import histories, prepare

NUM_EVENTS, NUM_USERS, NUM_ITEMS = 4_000, 150, 60


@pytest.fixture(scope="module")
def log_file(tmp_path_factory):
    """Events with ties in time, repeats, unicode ids, ratings with gaps, and times in several forms."""
    random = np.random.default_rng(0)
    seconds = 1_700_000_000 + random.integers(0, 5_000, NUM_EVENTS) * 60
    names = np.array(["007", "7", "é", "漢字", 'say "hi"', "a,b", "[MASK]", *(f"item {n}" for n in range(NUM_ITEMS))])
    table = pa.table(
        {
            "user_id": random.integers(0, NUM_USERS, NUM_EVENTS),
            "item_id": names[(random.pareto(1.0, NUM_EVENTS) * 3).astype(int) % len(names)],
            "timestamp": seconds,
            "moment": pa.array(seconds * 1_000_000, pa.timestamp("us")),
            "spelled": [str(np.datetime64(int(second), "s")).replace("T", " ") + ".25 UTC" for second in seconds],
            "position": random.permutation(NUM_EVENTS),
            "rating": pa.array(random.integers(1, 6, NUM_EVENTS), mask=random.random(NUM_EVENTS) < 0.1),
            "event_type": random.choice(["view", "purchase"], NUM_EVENTS),
            "weight": random.integers(1, 9, NUM_EVENTS) / 4,
        }
    )
    path = tmp_path_factory.mktemp("spark") / "log.parquet"
    pq.write_table(table, path)
    return path


CASES = {
    "leave-one-out": {},
    "the k-core": {"min_user_events": 5, "min_item_events": 5},
    "an upper limit": {"max_user_events": 28},
    "without validation": {"validation": False},
    "no targets": {"split": "none"},
    "temporal, shares": {"split": "temporal"},
    "temporal, a k-core": {"split": "temporal", "min_user_events": 3, "min_item_events": 3},
    "temporal, dates": {
        "split": "temporal",
        "time_column": "moment",
        "validation_cut": "2023-11-16",
        "test_cut": "2023-11-17",
    },
    "times as text": {"time_column": "spelled"},
    "a sequence": {"sequence_column": "position"},
    "a sequence alone": {"time_column": None, "sequence_column": "position"},
    "first of repeats": {"duplicates": "drop"},
    "first of runs": {"duplicates": "drop_consecutive"},
    "identical events once": {"duplicates": "drop_identical"},
    "ratings": {"min_rating": 4},
    "columns of events": {"event_columns": ["event_type", "rating"]},
    "event types": {"event_type_column": "event_type", "target_event_types": ["purchase"]},
    "event types, temporal": {
        "event_type_column": "event_type",
        "target_event_types": ["purchase"],
        "split": "temporal",
        "weight_column": "weight",
    },
    "a condition": {"where": "event_type = 'purchase' AND rating > 1"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_spark_gives_the_rows_that_duckdb_gives(session, log_file, options):
    local = histories(ibis.duckdb.connect().read_parquet(log_file), **options).to_pyarrow()
    assert len(local) > 50
    for log in (session.read.parquet(str(log_file)), ibis.pyspark.connect(session).read_parquet(str(log_file))):
        found = histories(log, **options).to_pyarrow().cast(local.schema)
        assert found.to_pylist() == local.to_pylist()


def test_a_prepared_folder_is_the_same(session, log_file, tmp_path):
    options = {"split": "temporal", "min_item_events": 2}
    prepare(ibis.duckdb.connect().read_parquet(log_file), tmp_path / "duckdb", **options)
    prepare(session.read.parquet(str(log_file)), tmp_path / "spark", **options)
    local, found = (pq.read_table(tmp_path / name / "histories.parquet") for name in ("duckdb", "spark"))
    assert found.to_pylist() == local.to_pylist()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "spark" / name).read_bytes() == (tmp_path / "duckdb" / name).read_bytes()


def test_times_finer_than_sparks_are_refused(session):
    log = session.createDataFrame(
        [("a", "x", "2024-01-01 10:00:00.000000001"), ("b", "y", "2024-01-01 10:00:00.000000002")],
        ["user_id", "item_id", "timestamp"],
    )
    with pytest.raises(ValueError, match=r"times with 9 decimal places; the timestamps of pyspark have 6"):
        histories(log)
