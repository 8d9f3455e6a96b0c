"""`evaluate --report`: slices of users, and the popularity of recommended items."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from chain_runs import SMALL, arguments
from datasets import Dataset

from bert4rec_hf import Protocol, evaluate_prepared, prepare, ranking_metrics, train_prepared
from bert4rec_hf.cli import main
from bert4rec_hf.data.histories import Histories
from bert4rec_hf.evaluation.report import REPORT_FILES, evaluation_report, item_groups, popular_items, write_report

PROTOCOL = Protocol("leave-one-out", "test", "all 5 items", True, 4, 1, 0.0, 0.25)


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ([5, 3, 1, 1, 0], [0, 1, 2, 2, 3]),  # more frequent items have 0, .5, .8 and .8 of the events
        ([1, 0, 1, 3, 5], [2, 3, 2, 1, 0]),
        ([4, 4, 2], [0, 0, 2]),  # equally frequent items are in one group
        ([1, 1, 1], [0, 0, 0]),
        ([0, 0], [3, 3]),
    ],
)
def test_head_torso_and_tail_are_told_by_the_share_of_events_of_more_frequent_items(counts, groups):
    assert item_groups(np.array(counts)).tolist() == groups


@pytest.fixture
def known() -> dict:
    """Token ids 3 to 7 have 5, 3, 1, 1 and no training events; the targets are 3, 4, 7 and an unknown item."""
    events = np.array([3, 3, 3, 3, 3, 4, 4, 4, 5, 6, 7])
    histories = Histories(pa.array(["u"]), events, np.array([0, 11]), np.array([10]), {}, None)
    rows = Dataset.from_dict(
        {
            "user_id": ["a", "b", "c", "d"],
            "labels": [[3], [-100, 4], [-100, 7], [-100, -100]],
            "exclude_ids": [[], [3], [5, 6], [3, 4, 5, 6, 7]],
            "history_length": [0, 4, 5, 300],
        }
    )
    return {
        "rows": rows,
        "histories": histories,
        "rankings": {"model": np.array([1, 3, 0, 0]), "popularity": np.array([1, 1, 0, 0])},
        "recommended": np.array([[3, 4], [3, 5], [3, 0], [3, 4]]),
        "protocol": PROTOCOL,
        "num_items": 5,
    }


def test_slices_have_the_metrics_of_their_users(known):
    report = evaluation_report(**known)
    found = {
        title: [(part["name"], part["num_users"], part["systems"]["model"]["NDCG@10"]) for part in slices]
        for title, slices in report["slices"].items()
    }
    assert found == {
        "history length": [("0", 1, 1.0), ("1-4", 1, 0.5), ("5-9", 1, 0.0), ("200+", 1, 0.0)],
        "popularity of the target": [
            ("head", 1, 1.0),
            ("torso", 1, 0.5),
            ("no training event", 1, 0.0),
            ("not in the catalogue", 1, 0.0),
        ],
    }
    model = report["overall"]["systems"]["model"]
    # The NDCG of the users is 1, .5, 0 and 0, with a variance of .229.
    assert model == pytest.approx(
        {"HR@10": 0.5, "NDCG@10": 0.375, "MRR": 1 / 3, "NDCG@10_standard_error": (0.6875 / 3 / 4) ** 0.5}
    )
    assert report["slices"]["history length"][1]["systems"]["popularity"]["NDCG@10"] == 1.0
    assert report["slices"]["history length"][0]["systems"]["model"]["NDCG@10_standard_error"] is None
    assert report["protocol"] == PROTOCOL.as_dict()


def test_what_is_recommended_is_counted_by_training_events(known):
    report = evaluation_report(**known)
    shown = report["recommendations"]
    assert shown["model"]["average_popularity"] == pytest.approx((4 * 5 + 2 * 3 + 1) / 7)
    assert shown["model"]["coverage@10"] == 3 / 5
    # The items are shown 0, 0, 1, 2 and 4 times. Gini is the mean difference of all pairs divided by twice the mean.
    assert shown["model"]["gini"] == pytest.approx(2 * (1 + 2 + 4 + 1 + 2 + 4 + 1 + 3 + 2) / (25 * 2 * 7 / 5))
    assert shown["model"]["shares"] == pytest.approx(
        {"head": 4 / 7, "torso": 2 / 7, "tail": 1 / 7, "no training event": 0.0}
    )
    assert shown["targets"]["shares"]["no training event"] == pytest.approx(1 / 3)
    assert shown["targets"]["average_popularity"] == pytest.approx(8 / 3)
    assert report["items"]["tail"] == {"num_items": 2, "share_of_training_events": pytest.approx(0.2)}


def test_popularity_recommends_the_most_frequent_items_that_are_not_excluded(known):
    shown = popular_items(known["rows"], np.array([1, 3, 0, 5, 1]))
    assert [[item for item in row if item] for row in shown.tolist()] == [
        [6, 4, 3, 7, 5], [6, 4, 7, 5], [4, 3, 7], [],
    ]  # fmt: skip


def test_a_report_of_no_recommendation_at_all_is_written(known, tmp_path):
    known["recommended"] = np.zeros((4, 10), int)
    ranks = known["rankings"]["model"]
    write_report(tmp_path / "new" / "report", evaluation_report(**known), known["rows"], ranks)
    report = json.loads((tmp_path / "new" / "report" / "report.json").read_text("utf-8"))
    assert report["recommendations"]["model"]["average_popularity"] == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Model and data of a log with a temporal split. A third of the users have no past at the validation cut."""
    folder = tmp_path_factory.mktemp("report")
    chance = random.Random(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(90):
        start = 0 if user % 3 else 60
        lines += [f"{user},{min(chance.randrange(30), chance.randrange(30))},{start + time}" for time in range(20)]
        lines += [f"{user},{chance.randrange(30)},{90 + time}" for time in range(5)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    prepare(folder / "log.csv", folder / "data", split="temporal", validation_cut=50, test_cut=85)
    train_prepared(folder / "data", arguments(folder / "model", num_train_epochs=1), **SMALL)
    return folder


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_report_says_in_parts_what_the_evaluation_says_as_a_whole(trained, tmp_path, part):
    folder = tmp_path / "report"
    record = evaluate_prepared(
        trained / "model", trained / "data", part, use_cpu=True, disable_tqdm=True, report=folder
    )
    assert {path.name for path in folder.iterdir()} == set(REPORT_FILES)
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["protocol"] == record["protocol"]
    whole = {"model": record["metrics"], **record["baselines"]}
    for name, metrics in report["overall"]["systems"].items():
        for metric in ("HR@10", "NDCG@10", "MRR"):
            assert metrics[metric] == whole[name][metric]
            for slices in report["slices"].values():
                parts = [entry["num_users"] * entry["systems"][name][metric] for entry in slices]
                assert sum(parts) / record["protocol"]["num_users"] == pytest.approx(metrics[metric])
    assert report["recommendations"]["model"]["coverage@10"] == record["metrics"]["coverage@10"]
    first = report["slices"]["history length"][0]
    assert (first["name"] == "0") == (part == "validation")
    if part == "validation":
        without_past = next(group for title, group in record["groups"].items() if "without" in title)
        assert first["systems"]["model"]["NDCG@10"] == without_past["model"]["NDCG@10"]
    text = (folder / "report.md").read_text("utf-8")
    assert str(Protocol(**record["protocol"])) in text
    assert f"| all users | {record['protocol']['num_users']} | {record['metrics']['NDCG@10']:.4f} ± " in text
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG\r\n")
    ranks = pq.read_table(folder / "ranks.parquet")
    assert ranking_metrics(ranks["rank"].to_numpy()).items() <= record["metrics"].items()
    histories = pq.read_table(trained / "data" / "histories.parquet")
    assert ranks["user_id"] == histories.filter(pc.is_valid(histories[f"{part}_position"]))["user_id"]


def evaluate(capsys, trained, *words) -> tuple[int, str, str]:
    status = main(["evaluate", str(trained / "model"), "--data", str(trained / "data"), "--use_cpu", "true", *words])
    out, error = capsys.readouterr()
    return status, out, "\n".join(line for line in error.splitlines() if line.startswith("bert4rec"))


def test_the_command_writes_a_report_and_writes_it_anew(trained, tmp_path, capsys):
    for _ in range(2):
        status, out, _ = evaluate(capsys, trained, "--report", str(tmp_path))
        assert status == 0
        written = f"wrote {tmp_path / 'report.md'} and, beside it, report.json, report.png and ranks.parquet"
        assert written in out.splitlines()
        assert {path.name for path in tmp_path.iterdir()} == set(REPORT_FILES)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"notes.txt": "mine"}, "notes.txt"),
        ({"report.md": "mine"}, "no report.json of bert4rec"),
        ({"report.json": '{"mine": 1}'}, "no report.json of bert4rec"),
        ({"report.json": "[", "thesis.tex": ""}, "thesis.tex"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_is(trained, tmp_path, capsys, files, found):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    status, out, error = evaluate(capsys, trained, "--report", str(tmp_path))
    assert (status, out) == (2, "")
    assert error == (
        f"bert4rec evaluate: {tmp_path} holds something else than a report ({found}); choose another folder for "
        "--report"
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_what_a_killed_run_left_half_written_is_no_obstacle(trained, tmp_path, capsys):
    assert evaluate(capsys, trained, "--report", str(tmp_path))[0] == 0
    (tmp_path / f".report.md.{'0f' * 16}.new").write_text("hal")
    assert evaluate(capsys, trained, "--report", str(tmp_path))[0] == 0


def test_a_file_and_the_papers_protocol_are_refused_before_anything_is_ranked(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert evaluate(capsys, trained, "--report", str(tmp_path / "file")) == (
        2, "", f"bert4rec evaluate: {tmp_path / 'file'} is a file; choose a folder for --report",
    )  # fmt: skip
    assert evaluate(capsys, trained, "--report", str(tmp_path / "new"), "--protocol", "paper") == (
        2, "", "bert4rec evaluate: a report needs the full ranking; got --protocol paper: leave out one of "
        "the two",
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
