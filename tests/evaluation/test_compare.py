"""`bert4rec compare`: differences of two models user by user, their intervals, and what is required of them."""

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chain_runs import SMALL, arguments, write_chain
from command_runs import fail, run, succeed

from bert4rec_hf import compare_prepared, prepare, train_prepared
from bert4rec_hf.evaluation.compare import (
    compare_ranks,
    format_comparison,
    meets,
    paired_bootstrap,
    plot_comparison,
    value_groups,
)

EVERYONE = {"all": (["all"], np.zeros(50, int))}


def test_a_model_does_not_differ_from_itself():
    assert paired_bootstrap(np.zeros(50)) == (0, 0, 0, 1)
    record = compare_ranks({"new": np.arange(50), "old": np.arange(50)}, {}, margin=0.01)
    assert record["comparisons"]["old"]["verdict"] == "not worse"
    assert meets(record, "not-worse")
    assert meets(compare_ranks({"new": np.arange(50), "old": np.arange(50)}, {}, margin=0.0), "not-worse")
    assert not meets(record, "better")


def test_the_interval_is_that_of_a_mean_of_independent_users():
    # 3/5 of the users are hits of the one only, and 1/5 of the other only. The standard error is that of 50 draws.
    differences = np.array([1, 1, 1, 0, -1] * 10)
    mean, low, high, share = paired_bootstrap(differences)
    assert mean == pytest.approx(0.4)
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt((0.6 + 0.2 - 0.4**2) / 50), rel=0.05)
    assert low < mean < high
    assert share < 0.05
    assert paired_bootstrap(-differences)[2] < 0


def test_equal_differences_are_drawn_together_as_if_users_were_drawn_one_by_one():
    differences = np.random.default_rng(1).normal(0.1, 1, 200).round(1)
    random = np.random.default_rng(2)
    means = differences[random.integers(200, size=(20_000, 200))].mean(axis=1)
    _, low, high, _ = paired_bootstrap(differences)
    assert [low, high] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.01)


@pytest.mark.parametrize(
    ("new", "old", "margin", "verdict"),
    [
        ([1] * 50, [2] * 50, 0.01, "better"),
        ([2] * 50, [1] * 50, 0.01, "worse"),
        ([2] * 50, [1] * 50, 0.5, "not worse"),  # worse, but by less than the margin
        ([1, 0] * 25, [0, 1] * 25, 0.01, "unclear"),
        ([1, 0] * 25, [0, 1] * 25, 0.9, "not worse"),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_margin(new, old, margin, verdict):
    record = compare_ranks({"new": np.array(new), "old": np.array(old)}, EVERYONE, margin)
    comparison = record["comparisons"]["old"]
    assert comparison["verdict"] == verdict
    assert comparison["groups"]["all"][0]["metrics"] == comparison["all users"]["metrics"]


def test_the_anchor_has_to_be_reached_as_well():
    ranks = {"new": np.array([2] * 50), "old": np.array([2] * 50), "anchor": np.array([1] * 50)}
    record = compare_ranks(ranks, {}, margin=0.01)
    assert [comparison["verdict"] for comparison in record["comparisons"].values()] == ["not worse", "worse"]
    assert not meets(record, "not-worse")


def test_groups_have_the_differences_of_their_users():
    groups = {"length": (["short", "long", "none"], np.array([0] * 20 + [1] * 30))}
    ranks = {"new": np.array([1] * 20 + [0] * 30), "old": np.array([0] * 20 + [1] * 30)}
    short, long = compare_ranks(ranks, groups, 0.01)["comparisons"]["old"]["groups"]["length"]
    assert (short["name"], short["num_users"], short["metrics"]["HR@10"]["difference"]) == ("short", 20, 1)
    assert (long["name"], long["num_users"], long["metrics"]["NDCG@10"]["difference"]) == ("long", 30, -1)


def test_values_of_a_column_become_groups():
    names, places = value_groups(["web", None, "app", "web"])
    assert [names[place] for place in places] == ["web", "missing", "app", "web"]
    names, places = value_groups([*range(100), None])
    assert names == ["up to 24.75", "up to 49.5", "up to 74.25", "above 74.25", "missing"]
    assert np.bincount(places).tolist() == [25, 25, 25, 25, 1]
    names, places = value_groups([f"v{number:02}" for number in range(12) for _ in range(number + 1)])
    assert names == [*(f"v{number:02}" for number in range(2, 12)), "other values", "missing"]
    assert np.bincount(places)[-1] == 1 + 2
    names, places = value_groups([*map(Decimal, range(100)), float("nan")])
    assert names[-1] == "missing"
    assert np.bincount(places).tolist() == [25, 25, 25, 25, 1]
    names, places = value_groups([1, 2, True, "1"])
    assert len(places) == 4


def test_names_are_inert_in_the_report_and_the_picture():
    record = compare_ranks(
        {"new": np.array([1] * 50), "old": np.array([2] * 50)},
        {"a|b": (["<script>|$x$_y_\n# z"], np.zeros(50, int))},
        0.01,
    )
    record |= {"models": {"new": "<b>`new`", "old": "old|\n# heading"}, "protocol": "leave-one-out"}
    text = format_comparison(record)
    assert "<" not in text
    assert "\n# heading" not in text
    assert "\n# z" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {11}
    assert plot_comparison(record).startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A log with an event column, an item table, a model that has learnt the log, and one that has not."""
    folder = tmp_path_factory.mktemp("compare")
    write_chain(folder / "log.csv", num_users=120, num_items=20, length=12, follow=0.9)
    lines = (folder / "log.csv").read_text().splitlines()
    rows = [line + (",app" if number % 5 else ",web") for number, line in enumerate(lines[1:])]
    (folder / "log.csv").write_text("\n".join([lines[0] + ",channel", *rows]) + "\n")
    prepare(folder / "log.csv", folder / "data", event_columns=["channel"])
    items = sorted({line.split(",")[1] for line in lines[1:]})
    table = ["item_id,price", *(f"{item},{number}" for number, item in enumerate(items[:-1]))]
    (folder / "items.csv").write_text("\n".join(table) + "\n")
    for name, epochs in (("learnt", 15), ("fresh", 0.1)):
        train_prepared(
            folder / "data", arguments(folder / name, num_train_epochs=epochs, calibrate=False), with_baselines=False,
            **SMALL,
        )  # fmt: skip
    return folder


def test_the_command_tells_which_model_is_better_and_ends_with_0_or_1(chain, tmp_path):
    names = chain / "fresh", chain / "learnt"
    before = {path: path.read_bytes() for name in names for path in name.rglob("*") if path.is_file()}
    options = ["--data", chain / "data", "--use_cpu", "--require", "better"]
    lines = succeed("compare", *names, *options, "--report", tmp_path / "report")
    assert "new is better than old (margin 0.01)" in lines
    assert lines[-1] == "required: better; met"
    status, output, _ = run("compare", *names[::-1], *options)
    assert (status, "new is worse than old" in output) == (1, True)
    assert output.endswith("required: better; not met, exit status 1\n")
    assert {path: path.read_bytes() for name in names for path in name.rglob("*") if path.is_file()} == before
    record = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert record["models"] == {"new": str(names[1]), "old": str(names[0])}
    assert record["comparisons"]["old"]["all users"]["num_users"] == 120
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "comparison.json", "comparison.md", "comparison.png"
    }  # fmt: skip
    succeed("compare", *names, *options, "--report", tmp_path / "report")  # replaces the earlier one
    succeed("compare", *names[::-1], "--data", chain / "data", "--use_cpu")  # without a requirement: 0


def test_event_and_item_columns_divide_the_users_by_the_values_of_their_targets(chain):
    record = compare_prepared(
        chain / "fresh", chain / "learnt", chain / "data", slice_by=["channel", "price"], items=chain / "items.csv",
        anchor=chain / "learnt", use_cpu=True,
    )  # fmt: skip
    groups = record["comparisons"]["old"]["groups"]
    assert list(groups) == ["history length", "popularity of the target", "channel", "price"]
    lines = [line.split(",") for line in (chain / "log.csv").read_text().splitlines()[1:]]
    newest: dict = {}
    for user, item, time, channel in lines:
        newest[user] = max(newest.get(user, (-1.0, "", "")), (float(time), channel, item))
    expected = {name: sum(channel == name for _, channel, _ in newest.values()) for name in ("app", "web")}
    assert {part["name"]: part["num_users"] for part in groups["channel"]} == expected
    prices = {part["name"]: part["num_users"] for part in groups["price"]}
    priced = set((chain / "items.csv").read_text().replace("\n", ",").split(","))
    # Numbers of CSV are numbers, so their groups are quartiles.
    assert [name.split()[0] for name in prices] == ["up", "up", "up", "above", "missing"]
    assert prices["missing"] == sum(item not in priced for *_, item in newest.values()) > 0
    assert sum(prices.values()) == 120
    assert record["comparisons"]["anchor"]["verdict"] == "not worse"


def test_bad_input_is_told_in_one_line(chain, tmp_path):
    models, data = (chain / "fresh", chain / "learnt"), ["--data", chain / "data"]
    assert "there is no column colour to slice by: the event columns of" in fail(
        "compare", *models, *data, "--slice_by", "colour"
    )
    assert "those of" in fail("compare", *models, *data, "--slice_by", "colour", "--items", chain / "items.csv")
    (tmp_path / "twice.csv").write_text("item_id,price\n1,2\n1,3\n")
    twice = ["--items", tmp_path / "twice.csv", "--slice_by", "price"]
    assert "expected one row per item; got '1' twice" in fail("compare", *models, *data, *twice)
    assert "--items is for --slice_by" in fail("compare", *models, *data, "--items", chain / "items.csv")
    rows = [{"item_id": "item 1", "tags": ["a"]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lists.parquet")
    lists = ["--items", tmp_path / "lists.parquet", "--slice_by", "tags"]
    assert "cannot slice by tags, whose values are list" in fail("compare", *models, *data, *lists)
    assert "margin must be 0 or more" in fail("compare", *models, *data, "--margin", "-0.1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "holds something else than a report (notes.txt)" in fail(
        "compare", *models, *data, "--report", tmp_path / "other"
    )
    assert "is not a prepared folder" in fail("compare", *models, "--data", tmp_path)


def test_targets_that_one_model_has_trained_on_are_refused(tmp_path):
    write_chain(tmp_path / "log.csv", num_users=60, num_items=12, length=12, follow=0.9)
    times = sorted({float(line.split(",")[2]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]})
    early, late = times[len(times) // 2], times[3 * len(times) // 4]
    for name, split in (
        ("early", {"split": "temporal", "validation_cut": early, "test_cut": late}),
        ("all", {"split": "none"}),
    ):
        prepare(tmp_path / "log.csv", tmp_path / f"data-{name}", **split)
        train_prepared(
            tmp_path / f"data-{name}", arguments(tmp_path / name, num_train_epochs=1), with_baselines=False, **SMALL
        )
    message = fail("compare", tmp_path / "early", tmp_path / "all", "--data", tmp_path / "data-early", "--use_cpu")
    assert "all was trained on events up to" in message


def test_evaluate_takes_several_models(chain):
    lines = succeed("evaluate", chain / "fresh", chain / "learnt", "--data", chain / "data", "--use_cpu")
    assert lines[2].startswith(str(chain / "fresh"))
    assert lines[3].startswith(str(chain / "learnt"))
    assert sum(line.startswith("popularity ") for line in lines) == 1
    assert lines[-1] == f"next: bert4rec compare {chain / 'fresh'} {chain / 'learnt'} --data {chain / 'data'}"
    assert "--report is for one model" in fail(
        "evaluate", chain / "fresh", chain / "learnt", "--data", chain / "data", "--report", "x"
    )
