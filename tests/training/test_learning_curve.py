"""The learning curve: its record, its plot and its warnings."""

import json
import logging
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from chain_runs import SMALL, arguments, write_chain
from transformers import TrainerState

from bert4rec_hf import Protocol, prepare, ranking_metrics, train_prepared
from bert4rec_hf.training.learning_curve import (
    plot_training,
    standard_error_from_metrics,
    training_record,
    training_warnings,
)

PROTOCOL = Protocol("leave-one-out", "validation", "all 9 items", True, 1000, 0, 0.0, 0.0)
PNG = b"\x89PNG\r\n"
# 50 of a thousand users have rank 1 and the others are misses, so HR and NDCG at every k are .05.
BASELINE = {"popularity": ranking_metrics(np.arange(1000) < 50)}


def record(hits, *, losses=None, first=100, planned_steps=None, max_steps=-1, baselines=BASELINE):
    """The record of a run with an evaluation every hundred steps. `hits` are the hits of a thousand users in each."""
    log = []
    steps = range(first, first + 100 * len(hits), 100)
    for number, loss, step in zip(hits, losses or [3.0] * len(hits), steps, strict=True):
        metrics = ranking_metrics(np.arange(1000) < number) | {"loss": loss, "runtime": 9.0}
        if step:
            log.append({"loss": 1000 / step, "epoch": step / 100, "step": step})
        log.append({f"eval_{name}": value for name, value in metrics.items()} | {"epoch": step / 100, "step": step})
    state = TrainerState(global_step=step, max_steps=planned_steps or step, log_history=log)
    args = SimpleNamespace(max_steps=max_steps, num_train_epochs=len(hits))
    return training_record(state, args, PROTOCOL, baselines, step)


def test_every_evaluation_stands_in_the_record_with_the_training_loss_before_it():
    found = record([100, 200])
    assert [(entry["epoch"], entry["step"]) for entry in found["evaluations"]] == [(1.0, 100), (2.0, 200)]
    assert [entry["training_loss"] for entry in found["evaluations"]] == [10.0, 5.0]
    assert [entry["NDCG@10"] for entry in found["evaluations"]] == [0.1, 0.2]
    assert found["evaluations"][0]["loss"] == 3.0
    assert "runtime" not in found["evaluations"][0]
    assert found["training_losses"][1] == {"epoch": 2.0, "step": 200, "loss": 5.0}
    assert found["protocol"] == PROTOCOL.as_dict()


@pytest.mark.parametrize(("chosen", "evaluated"), [(100, [(100, 0.2)]), (300, [(100, 0.2), (300, 0.3)])])
def test_the_chosen_weights_evaluated_at_the_end_are_no_point_of_the_curve_at_the_last_step(chosen, evaluated):
    def entry(share, step):
        metrics = ranking_metrics(np.arange(10) < 10 * share)
        return {f"eval_{name}": value for name, value in metrics.items()} | {"epoch": 1.0, "step": step}

    at_the_end = 0.2 if chosen == 100 else 0.3
    log = [entry(0.2, 100), {"train_runtime": 1.0, "epoch": 1.0, "step": 300}, entry(at_the_end, 300)]
    state = TrainerState(global_step=300, max_steps=300, log_history=log)
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1)
    found = training_record(state, args, PROTOCOL, {}, chosen)
    assert [(entry["step"], entry["NDCG@10"]) for entry in found["evaluations"]] == evaluated


def test_without_training_or_evaluation_there_is_no_record():
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1)
    log = [{"loss": 1.0, "epoch": 1.0, "step": 5}]
    assert training_record(TrainerState(global_step=5, log_history=log), args, PROTOCOL, {}, 5) is None
    evaluated = TrainerState(global_step=0, log_history=[{"eval_NDCG@10": 0.5, "step": 0}])
    assert training_record(evaluated, args, PROTOCOL, {}, 0) is None


@pytest.mark.parametrize(
    ("hits", "options", "advice"),
    [
        ([100, 200, 300, 400], {}, "train longer: --num_train_epochs 8"),
        ([100, 200, 300, 400], {"max_steps": 400}, "train longer: --max_steps 800"),
        ([100, 200, 300, 400, 450], {"planned_steps": 4000}, "go on to step 4,000: --resume_from_checkpoint last"),
        ([100, 200, 300, 300], {}, None),  # flat at the end
        ([100, 200, 400, 300], {}, None),  # worse at the end
        ([300, 300, 300, 325], {}, None),  # two standard errors are .029
        ([900, 900, 900, 930], {}, None),  # beyond two standard errors, .016, but only 3 %
        ([300, 290, 280, 335], {}, "train longer: --num_train_epochs 8"),
        ([100, 400], {}, None),  # too few evaluations
    ],
)
def test_a_run_that_still_rises_at_its_end_is_called_under_trained(hits, options, advice):
    found = record(hits, **options)
    assert len(found["warnings"]) == (advice is not None)
    if advice is not None:
        assert found["warnings"][0].startswith("under-trained: validation NDCG@10 was still rising at step ")
        assert found["warnings"][0].endswith(advice)


@pytest.mark.parametrize(
    ("losses", "hits", "fall"),
    [
        ([5.0, 4.5, 4.0, 3.9], [300, 300, 300, 301], "0.10 to 3.90"),
        ([5.0, 4.5, 4.0, 3.92], [300, 300, 300, 301], None),  # so small a fall is also seen in converged runs
        ([5.0, 3.95, 4.0, 3.9], [300, 300, 300, 301], None),  # the loss was almost as low before
        ([5.0, 4.5, 4.0, 3.9], [300, 300, 301, 300], None),  # the ranking does not improve
        ([5.0, 4.5, 4.4, 4.2, 3.9], [300, 300, 300, 302, 301], "0.50 to 3.90"),  # the second last ranking is best
        ([5.0, 4.5, 4.0, float("nan")], [300, 300, 300, 301], None),
    ],
)
def test_a_run_whose_validation_loss_still_falls_at_its_end_is_called_under_trained(losses, hits, fall):
    warnings = record(hits, losses=losses)["warnings"]
    assert len(warnings) == (fall is not None)
    if fall is not None:
        assert warnings[0] == (
            f"under-trained: validation loss was still falling at step {100 * len(hits)}, by {fall} in the last "
            f"quarter of the steps; train longer: --num_train_epochs {2 * len(hits)}"
        )


def test_of_few_users_a_falling_validation_loss_may_be_chance():
    found = record([300, 300, 300, 301], losses=[5.0, 4.5, 4.0, 3.9])
    for num_users, warned in ((120, True), (90, False)):  # 1 / sqrt(num_users) is .091 and .105
        warnings = training_warnings(found | {"protocol": {"num_users": num_users}}, "", "")
        assert any(warning.startswith("under-trained: validation loss") for warning in warnings) == warned


@pytest.mark.parametrize(("hits", "warned"), [(50, True), (65, True), (80, False)])
def test_a_model_that_is_not_clearly_above_popularity_is_at_the_baseline(hits, warned):
    # Popularity has 50 hits. Two standard errors of the difference are .021 to .022.
    warnings = record([hits, hits, hits])["warnings"]
    assert len(warnings) == warned
    if warned:
        assert warnings[0].startswith(
            "at the popularity baseline: the validation NDCG@10 is not clearly above that of "
        )
        assert f"popularity, 0.0500 (difference {hits / 1000 - 0.05:+.4f}, standard error 0.0" in warnings[0]


@pytest.mark.parametrize("baseline", ["transitions", "last-item co-occurrence"])
@pytest.mark.parametrize(("hits", "expected"), [(50, "at the popularity baseline"), (120, "below {}"), (121, None)])
def test_a_model_that_is_no_better_than_a_baseline_is_told(baseline, hits, expected):
    baselines = BASELINE | {baseline: record([120])["evaluations"][0]}
    warnings = record([hits, hits], baselines=baselines)["warnings"]
    assert len(warnings) == (expected is not None)
    if expected is not None:
        assert warnings[0].startswith(expected.format(baseline))
    if hits == 120:
        assert warnings[0].startswith(
            f"below {baseline}: the best validation NDCG@10 is 0.1200, that of {baseline} is 0.1200; give the model "
            "more steps (--num_train_epochs 4, "
        )


def test_a_calibrated_model_is_compared_with_the_baselines_user_by_user():
    names = ("popularity", "EASE", "session kNN", "item kNN")
    metrics = record([120])["evaluations"][0]
    differences = dict(zip(names, (0.02, -0.005, -0.002, 0.0), strict=True))
    compared = {name: {"difference": value, "standard_error": 0.002} for name, value in differences.items()}
    found = record([60, 60], baselines=dict.fromkeys(names, metrics))
    warnings = training_warnings(found, "longer", "shorter", {"baselines": compared})
    assert len(warnings) == 1  # the metrics before the calibration are below those of all four
    assert warnings[0].startswith(
        "below EASE: its validation NDCG@10 exceeds that of the model by 0.0050 (standard error 0.0020, user by user); "
        "give the model more steps (longer, "
    )
    compared["popularity"]["difference"] = 0.003
    warnings = training_warnings(found, "longer", "shorter", {"baselines": compared})
    assert [warning.split(":")[0] for warning in warnings] == ["at the popularity baseline"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 3.2, 3.4, 3.6], "lowest at step 100 and rose by 0.60 to 3.60 at step 400"),
        ([3.0, 2.8, 2.85, 2.95], "lowest at step 200 and rose by 0.15 to 2.95 at step 400"),
        ([3.0, 2.8, 2.8, 2.85], None),
        ([float("nan"), 2.8, 2.85, 2.95], "lowest at step 200 and rose by 0.15 to 2.95 at step 400"),
        ([3.0, 2.8, 2.85, float("nan")], None),
    ],
)
def test_a_run_that_overfits_is_told_to_train_less_and_never_longer(losses, expected):
    warnings = record([200, 230, 260, 300], losses=losses)["warnings"]  # the ranking improves until the end
    if expected is not None:
        assert warnings == [
            f"overfitting: the validation loss was {expected}; train less (--num_train_epochs 2), or with more dropout "
            "(--hidden_dropout_prob)"
        ]
    below = record([20, 30, 40, 50], losses=losses)["warnings"][-1]
    assert below.startswith("at the popularity baseline")
    assert ("train less" in below) is (expected is not None)
    assert ("more steps" in below) is (expected is None)


@pytest.mark.parametrize(
    ("hits", "warned"), [([300, 250, 290], True), ([300, 250, 300], False), ([300, 310, 290], False), ([300], False)]
)
def test_a_model_that_went_on_and_is_not_better_for_it_is_told(hits, warned):
    state = record(hits, first=0, planned_steps=300) if len(hits) > 1 else record([200, *hits])
    warnings = [warning for warning in state["warnings"] if warning.startswith("no better than at its start")]
    assert len(warnings) == warned
    if warned:
        assert "was 0.3000 before the first step and 0.2900 at most after it; keep the model" in warnings[0]


def test_metrics_of_somebodys_own_make_no_curve_and_no_error():
    log = [{"loss": 1.0, "epoch": 1.0, "step": 5}, {"eval_NDCG@10": 0.5, "eval_loss": 1.0, "epoch": 1.0, "step": 5}]
    state = TrainerState(global_step=5, max_steps=5, log_history=log)
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1)
    assert training_record(state, args, PROTOCOL, BASELINE, 5) is None


def test_the_standard_error_from_stored_metrics_is_that_over_users():
    chance = np.random.default_rng(0)
    for scale in (1, 8, 100):
        ranks = 1 + chance.exponential(scale, 5000).astype(int)
        gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
        exact = gains.std(ddof=1) / len(ranks) ** 0.5
        assert standard_error_from_metrics(ranking_metrics(ranks), len(ranks)) == pytest.approx(exact, rel=0.05)
    assert standard_error_from_metrics(ranking_metrics(np.zeros(0)), 0) == 0


def test_the_picture_is_drawn_of_one_evaluation_and_of_a_loss_that_is_no_number():
    one = record([100])
    one["training_losses"], one["evaluations"][0]["loss"] = [], None
    for found in (one, record([100, 200, 300])):
        assert plot_training(json.loads(json.dumps(found, allow_nan=False))).startswith(PNG)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder / "log.csv", num_users=120, num_items=15, length=12, follow=0.9)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data"


def read(folder):
    return json.loads((folder / "training.json").read_text("utf-8"))


def test_model_and_checkpoints_hold_curve_picture_and_table(chain, tmp_path):
    options = {"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": None}
    trainer = train_prepared(chain, arguments(tmp_path, **options), **SMALL)
    final = read(tmp_path)
    logged = {entry["step"]: entry for entry in reversed(trainer.state.log_history) if "eval_NDCG@10" in entry}
    assert [entry["step"] for entry in final["evaluations"]] == sorted(logged) == [4, 8, 12, 16]
    for entry in final["evaluations"]:
        assert entry["NDCG@10"] == logged[entry["step"]]["eval_NDCG@10"]
    assert final["chosen_step"] == trainer.state.best_global_step
    first = read(tmp_path / "checkpoint-4")
    assert first["evaluations"] == final["evaluations"][:1]
    assert (first["step"], first["max_steps"], first["chosen_step"]) == (4, 16, 4)
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert (folder / "learning_curve.png").read_bytes().startswith(PNG)
        card = (folder / "README.md").read_text("utf-8")
        assert "![Learning curve](learning_curve.png)" in card
        assert f"The weights are those of step {read(folder)['chosen_step']}; the run was at step" in card
    assert f"| **1** | **4** | **{first['evaluations'][0]['training_loss']:.4f}** |" in card


def test_a_resumed_run_has_the_whole_curve(chain, tmp_path):
    options = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": None}
    train_prepared(chain, arguments(tmp_path / "whole", **options), **SMALL)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    train_prepared(chain, arguments(tmp_path / "resumed", resume_from_checkpoint="last", **options), **SMALL)
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "resumed")
    assert len(whole["evaluations"]) == 3
    assert resumed["evaluations"] == whole["evaluations"]


def test_a_log_without_any_order_is_reported_at_the_baseline_in_log_and_card(tmp_path, caplog):
    chance = random.Random(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(60):
        lines += [f"{user},{min(chance.randrange(40), chance.randrange(40))},{time}" for time in range(9)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    prepare(tmp_path / "log.csv", tmp_path / "data")
    with caplog.at_level(logging.WARNING, "bert4rec_hf"):
        train_prepared(tmp_path / "data", arguments(tmp_path / "model"), **SMALL)
    (warning,) = read(tmp_path / "model")["warnings"]
    assert warning.startswith("at the popularity baseline")
    assert [entry.getMessage() for entry in caplog.records if entry.name == "bert4rec_hf.runs.train"] == [warning]
    assert f"> **Warning**: {warning}." in (tmp_path / "model" / "README.md").read_text("utf-8")


def test_a_curve_of_other_weights_does_not_stay_in_the_folder(chain, tmp_path):
    trainer = train_prepared(chain, arguments(tmp_path, num_train_epochs=1), **SMALL)
    trainer.protocol = None
    trainer.save_model()
    assert (tmp_path / "training.json").is_file()  # the weights have not changed
    trainer.model.item_bias.weight.data += 1
    trainer.save_model()
    assert not (tmp_path / "training.json").exists()
    assert not (tmp_path / "learning_curve.png").exists()
    assert "learning_curve.png" not in (tmp_path / "README.md").read_text("utf-8")


def test_matplotlib_is_loaded_by_a_picture_only():
    code = "import sys, bert4rec_hf, bert4rec_hf.runs.train, bert4rec_hf.cli; print('matplotlib' in sys.modules)"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert outcome.stdout.split() == ["False"]
