import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bert4rec_hf import Bert4RecTrainingArguments, evaluate_prepared, prepare, read_prepared, train_prepared
from bert4rec_hf.cli import main
from bert4rec_hf.data.histories import time_type
from bert4rec_hf.evaluation.target_sets import set_metrics, target_sets

DAY = 86_400
# Monday 2024-01-01, in seconds since 1970.
START = 1_704_067_200


def write_visits(path, times="seconds"):
    """Three users: a basket of three items on day 10, then single items on days 12 and 30; one user stops before."""
    visits = [
        ("a", 0, "w"),
        ("a", 1, "x"),
        ("a", 10, "x"),
        ("a", 10, "y"),
        ("a", 10, "z"),
        ("a", 12, "y"),
        ("a", 30, "v"),
    ]
    visits += [("b", 0, "v"), ("b", 2, "w"), ("b", 11, "w"), ("b", 40, "new")]
    visits += [("c", 0, "x"), ("c", 3, "y"), ("c", 4, "z"), ("c", 5, "v")]
    seconds = [START + day * DAY for _, day, _ in visits]
    columns = {
        "seconds": pa.array(seconds),
        "milliseconds": pa.array([second * 1000 for second in seconds]),
        "timestamps": pa.array([second * 10**6 for second in seconds], pa.timestamp("us")),
        "zoned": pa.array([second * 10**9 for second in seconds], pa.timestamp("ns", tz="UTC")),
        "days": pa.array([day for _, day, _ in visits]),
    }
    table = {"user_id": [user for user, _, _ in visits], "item_id": [item for *_, item in visits]}
    pq.write_table(pa.table(table | {"timestamp": columns[times]}), path)
    return path


def found_sets(data, part, filter_seen_items=False, **kwargs):
    histories, tokenizer, preparation = read_prepared(data)
    sets = target_sets(
        histories, tokenizer, preparation, part, filter_seen_items=filter_seen_items, max_length=10,
        time_type=time_type(data), **kwargs,
    )  # fmt: skip
    names = {-100: None} | {number + 3: item for number, item in enumerate(tokenizer.items)}
    targets = {user_id: [] for user_id in sets.rows["user_id"]}
    for row, token_id in zip(sets.users, sets.token_ids, strict=True):
        targets[sets.rows["user_id"][row]].append(names[token_id])
    history = {row["user_id"]: [names[token_id] for token_id in row["history_ids"]] for row in sets.rows}
    return sets, {user_id: sorted(items, key=str) for user_id, items in targets.items()}, history


@pytest.mark.parametrize("times", ["seconds", "milliseconds", "timestamps", "zoned"])
def test_with_a_temporal_split_all_events_of_the_horizon_are_targets(tmp_path, times):
    cuts = {"split": "temporal", "validation_cut": "2024-01-09", "test_cut": "2024-01-13"}  # days 8 and 12
    prepare(write_visits(tmp_path / "visits.parquet", times), tmp_path / "data", **cuts)
    sets, targets, history = found_sets(tmp_path / "data", "validation")
    assert targets == {"a": ["x", "y", "z"], "b": ["w"]}  # up to the cut of the test
    assert history == {"a": ["w", "x"], "b": ["v", "w"]}
    assert sets.description == "4 targets, all events of the part"
    assert sets.share_seen() == 0.5  # x of a, w of b
    _, targets, history = found_sets(tmp_path / "data", "test")
    assert targets == {"a": ["v", "y"], "b": [None]}  # the catalogue lacks the item "new"
    assert history["a"] == ["w", "x", "x", "y", "z"]
    _, targets, _ = found_sets(tmp_path / "data", "test", horizon="18d")
    assert targets == {"a": ["y"]}  # day 30 is 18 days after the cut, which is excluded
    _, targets, _ = found_sets(tmp_path / "data", "test", horizon="433h")
    assert targets == {"a": ["v", "y"]}


def test_a_target_counts_once_per_user(tmp_path):
    rows = [("a", 0, "x"), ("a", 1, "y"), ("b", 0, "y"), ("a", 5, "x"), ("a", 6, "x"), ("a", 7, "y")]
    table = {
        "user_id": [row[0] for row in rows],
        "timestamp": [row[1] for row in rows],
        "item_id": [row[2] for row in rows],
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    prepare(tmp_path / "log.parquet", tmp_path / "data", split="temporal", validation=False, test_cut=5)
    _, targets, _ = found_sets(tmp_path / "data", "test")
    assert targets == {"a": ["x", "y"]}
    _, targets, _ = found_sets(tmp_path / "data", "test", horizon="2")
    assert targets == {"a": ["x"]}


def test_with_leave_one_out_the_held_out_part_of_a_basket_is_one_set(tmp_path):
    rows = [("a", 0, "w"), ("a", 0, "x"), ("a", 1, "y"), ("a", 1, "z"), ("a", 1, "x")]  # a basket of three at the end
    rows += [("b", 0, "w"), ("b", 1, "x"), ("b", 2, "y"), ("b", 3, "z")]
    table = {
        "user_id": [row[0] for row in rows],
        "timestamp": [row[1] for row in rows],
        "item_id": [row[2] for row in rows],
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    prepare(tmp_path / "log.parquet", tmp_path / "data")
    histories, tokenizer, _ = read_prepared(tmp_path / "data")
    names = {number + 3: item for number, item in enumerate(tokenizer.items)}
    trained = [names[token_id] for token_id in histories.item_ids[:3]]  # one item of the basket trains
    held_out = sorted({"x", "y", "z"} - {trained[2]}) if trained[2] != "x" else ["y", "z"]
    for part in ("validation", "test"):
        _, targets, history = found_sets(tmp_path / "data", part)
        assert targets["a"] == held_out
        assert history["a"] == trained
    assert found_sets(tmp_path / "data", "validation")[1]["b"] == ["y"]
    assert found_sets(tmp_path / "data", "test")[1]["b"] == ["z"]


def test_metrics_of_sets_are_the_known_ones():
    # User 0 has three targets, at ranks 1, 3 and none; user 1 has one, at rank 7; user 2 has one, not found.
    ranks, users = np.array([3, 0, 1, 7, 0]), np.array([0, 0, 0, 1, 2])
    metrics = set_metrics(ranks, users)
    gain = 1 / np.log2(np.array([1, 2, 3, 7]) + 1)
    assert metrics["all_targets_recall@5"] == pytest.approx((2 / 3) / 3)
    assert metrics["all_targets_recall@10"] == pytest.approx((2 / 3 + 1) / 3)
    assert metrics["all_targets_HR@5"] == pytest.approx(1 / 3)
    assert metrics["all_targets_HR@10"] == pytest.approx(2 / 3)
    assert metrics["all_targets_MAP@10"] == pytest.approx(((1 + 2 / 3) / 3 + 1 / 7) / 3)
    assert metrics["all_targets_NDCG@10"] == pytest.approx(((gain[0] + gain[2]) / gain[:3].sum() + gain[3]) / 3)


def test_an_ideal_ranking_has_an_ndcg_of_1_even_with_more_targets_than_places():
    metrics = set_metrics(np.concatenate((np.arange(10) + 1, [0, 0])), np.zeros(12, int))
    assert metrics["all_targets_NDCG@10"] == metrics["all_targets_NDCG@5"] == pytest.approx(1)
    assert metrics["all_targets_recall@10"] == pytest.approx(10 / 12)


def test_evaluate_prints_and_stores_both_kinds_of_metrics(tmp_path, capsys):
    cuts = {"split": "temporal", "validation_cut": "2024-01-09", "test_cut": "2024-01-13"}
    prepare(write_visits(tmp_path / "visits.parquet"), tmp_path / "data", **cuts)
    model = tmp_path / "model"
    train_prepared(tmp_path / "data", Bert4RecTrainingArguments(str(model), num_train_epochs=1, use_cpu=True))
    (model / "evaluation.json").unlink()
    capsys.readouterr()
    command = ["evaluate", str(model), "--data", str(tmp_path / "data"), "--targets", "all"]
    assert main([*command, "--horizon", "7d"]) == 0
    printed = capsys.readouterr().out
    assert "1 users with 1 targets, all events within 7d after 1705104000" in printed
    assert "all_targets_recall@10" in printed
    assert "HR@100" in printed
    assert main(command) == 0
    records = json.loads((model / "evaluation.json").read_text())
    assert [record["protocol"]["targets"].split(", ")[-1] for record in records] == [
        "all events within 7d after 1705104000", "the next event of each user", "all events of the part",
    ]  # fmt: skip
    of_sets = records[-1]
    assert set(of_sets["baselines"]) == set(records[1]["baselines"])
    # The whole catalogue is shown. The only target of the second user is not in it.
    assert of_sets["metrics"]["all_targets_recall@10"] == 0.5
    assert all(found["all_targets_recall@10"] == 0.5 for found in of_sets["baselines"].values())
    assert of_sets["protocol"]["share_unknown_targets"] == pytest.approx(1 / 3)
    assert "all_targets_MAP@10" in (model / "README.md").read_text()
    # Streaming reads the times too.
    streamed = evaluate_prepared(model, tmp_path / "data", targets="all", streaming=True, use_cpu=True)
    assert streamed["all_targets"]["metrics"] == of_sets["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--horizon", "7d"], "--horizon is for --targets all; got 7d"),
        (["--targets", "all", "--protocol", "paper"], "--targets all needs the full ranking"),
        (["--targets", "all", "--horizon", "soon"], "expected a horizon such as 7d or 12h"),
        (["--targets", "all", "--horizon", "0d"], "a horizon must be above 0; got '0d'"),
        (["--targets", "all", "--horizon", "-3"], "a horizon must be above 0; got '-3'"),
        (["--targets", "all", "--horizon", "inf"], "a horizon must be above 0; got 'inf'"),
        (["--targets", "all", "--horizon", "1h"], "give a longer --horizon"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path_factory, capsys, options, message):
    folder = tmp_path_factory.getbasetemp() / "sets"
    if not folder.exists():
        folder.mkdir()
        prepare(
            write_visits(folder / "visits.parquet"), folder / "data", split="temporal", validation_cut="2024-01-09",
            test_cut="2024-01-12T01:00",
        )  # fmt: skip
        train_prepared(folder / "data", Bert4RecTrainingArguments(str(folder / "model"), max_steps=1, use_cpu=True))
    capsys.readouterr()
    assert main(["evaluate", str(folder / "model"), "--data", str(folder / "data"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_unit_fits_the_times(tmp_path):
    prepare(
        write_visits(tmp_path / "days.parquet", "days"),
        tmp_path / "days",
        split="temporal",
        validation_cut=8,
        test_cut=12,
    )
    with pytest.raises(ValueError, match="numbers up to 40, which are no seconds since 1970"):
        found_sets(tmp_path / "days", "test", horizon="7d")
    assert found_sets(tmp_path / "days", "test", horizon="7")[1] == {"a": ["y"]}
    cuts = {"split": "temporal", "validation_cut": "2024-01-09", "test_cut": "2024-01-13"}
    prepare(write_visits(tmp_path / "times.parquet", "timestamps"), tmp_path / "times", **cuts)
    with pytest.raises(ValueError, match="give the horizon a unit, as in 7d; got '7'"):
        found_sets(tmp_path / "times", "test", horizon="7")


def test_a_log_without_times_or_cuts_is_an_error(tmp_path):
    write_visits(tmp_path / "visits.parquet")
    prepare(tmp_path / "visits.parquet", tmp_path / "one-out")
    with pytest.raises(ValueError, match="a horizon begins at a cut in time; got --horizon 7d"):
        found_sets(tmp_path / "one-out", "test", horizon="7d")
    table = pq.read_table(tmp_path / "visits.parquet").drop_columns("timestamp")
    pq.write_table(table.append_column("position", pa.array(range(len(table)))), tmp_path / "timeless.parquet")
    prepare(tmp_path / "timeless.parquet", tmp_path / "timeless", sequence_column="position")
    with pytest.raises(ValueError, match="several targets per user need times"):
        found_sets(tmp_path / "timeless", "test")
