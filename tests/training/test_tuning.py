"""`bert4rec tune`: a search over a few settings, which ends in a recipe."""

import itertools
import json
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

from bert4rec_hf import prepare
from bert4rec_hf.cli import main
from bert4rec_hf.runs import tune

PNG = b"\x89PNG\r\n"
SEARCHED = {
    "hidden_size": [32, 64], "hidden_dropout_prob": [0.1, 0.6], "mask_ratio": [0.2, 0.9], "num_train_epochs": [1, 2],
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Let a trial take seconds."""
    monkeypatch.setattr(tune, "SEARCHED", SEARCHED)
    monkeypatch.setattr(tune, "_defaults", lambda data: {name: values[0] for name, values in SEARCHED.items()})


def test_the_search_starts_from_the_defaults_and_ends_in_a_recipe_that_trains(chain, tmp_path, capsys, quick):
    begun = time.monotonic()
    command = ["tune", "--data", str(chain[0]), "--output_dir", str(tmp_path / "search"), "--minutes", "0.2"]
    assert main([*command, "--use_cpu", "true"]) == 0
    assert time.monotonic() - begun < 60
    assert {path.name for path in (tmp_path / "search").iterdir()} == {"recipe.yaml", "trials.json", "tuning.png"}
    found = json.loads((tmp_path / "search" / "trials.json").read_text())
    first, *others = found["trials"]
    assert first["settings"] == {name: values[0] for name, values in SEARCHED.items()}
    assert others
    for trial in found["trials"]:
        assert (trial["value"] is None) == (trial["state"] != "complete")
        assert all(trial["settings"][name] in values for name, values in SEARCHED.items())
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    best = max(complete, key=lambda trial: trial["value"])
    assert found["best"] == best["settings"]
    text = (tmp_path / "search" / "recipe.yaml").read_text()
    assert yaml.safe_load(text) == best["settings"]
    assert f"validation NDCG@10 {best['value']:.4f}; the defaults: {first['value']:.4f}." in text
    assert (tmp_path / "search" / "tuning.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert f"next: bert4rec train --config {tmp_path / 'search'}/recipe.yaml --data {chain[0]}" in printed
    recipe = ["--config", str(tmp_path / "search" / "recipe.yaml"), "--data", str(chain[0]), "--max_steps", "2"]
    assert main(["train", *recipe, "--output_dir", str(tmp_path / "model"), "--use_cpu", "true"]) == 0
    trained = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    assert {name: trained[name] for name in best["settings"]} == best["settings"]


def test_a_bad_trial_is_pruned(chain, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(tune, "TRIALS_BEFORE_PRUNING", 1)
    monkeypatch.setattr(tune, "EVALUATIONS_BEFORE_PRUNING", 1)
    monkeypatch.setattr(tune, "SEARCHED", SEARCHED | {"hidden_size": [32], "num_train_epochs": [2]})
    evaluated = tune._Watch.on_evaluate

    def with_a_value_that_falls_with_dropout(self, args, state, control, metrics=None, **kwargs):
        metrics = metrics | {"eval_NDCG@10": 1 - self.trial.params["hidden_dropout_prob"]}
        evaluated(self, args, state, control, metrics, **kwargs)

    monkeypatch.setattr(tune._Watch, "on_evaluate", with_a_value_that_falls_with_dropout)
    for minutes in (0.25, 1.0, 4.0):  # as many as the machine needs
        found = tune.tune_prepared(chain[0], tmp_path / f"search {minutes}", minutes=minutes, use_cpu=True)
        pruned = [trial for trial in found["trials"] if trial["state"] == "pruned"]
        if pruned:
            break
    assert pruned
    assert all(len(trial["evaluations"]) < 10 for trial in pruned)


def test_without_time_for_one_trial_nothing_is_written(chain, tmp_path, capsys, quick, monkeypatch):
    # A clock that each look moves on by .01 s ends the trial after a few steps, however fast the machine is.
    looks = itertools.count()
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(looks)))
    command = ["tune", "--data", str(chain[0]), "--output_dir", str(tmp_path / "search"), "--minutes"]
    assert main([*command, "0.001"]) == 2
    assert next(looks) > 6
    assert "not one trial was finished in 0.001 minutes: give more --minutes" in capsys.readouterr().err
    assert main([*command, "0"]) == 2
    assert "minutes must be above 0; got 0.0" in capsys.readouterr().err
    assert not (tmp_path / "search").exists()


def test_what_cannot_be_searched_is_an_error(chain, tmp_path, capsys, monkeypatch):
    prepare(chain[0].parent / "log.csv", tmp_path / "all", split="none")
    command = ["tune", "--output_dir", str(tmp_path / "search"), "--data"]
    assert main([*command, str(tmp_path / "all")]) == 2
    assert "has no validation targets to search on; prepare with another --split" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(chain[0])])
    assert "pip install 'bert4rec_hf[tune]'" in capsys.readouterr().err


def test_the_defaults_are_those_of_the_log(chain):
    assert tune._defaults(chain[0]) == {
        "hidden_size": 64, "hidden_dropout_prob": 0.1, "mask_ratio": 1.0, "num_train_epochs": 20,
    }  # fmt: skip
