"""`bert4rec tune` as a function: a search over the few settings that matter, which ends in a recipe."""

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import TrainerCallback

from ..data.histories import check_prepared, read_prepared
from ..data.rows import training_rows
from ..defaults import default_architecture, default_mask_ratio, default_num_train_epochs
from ..evaluation.plotting import BLUE, GREY, ORANGE, png
from ..files import folder_beside, write_file
from ..training.arguments import Bert4RecTrainingArguments
from ..training.resume import check_output
from ..training.sampler import mean_number_of_targets
from .train import train_prepared

logger = logging.getLogger(__name__)

RECIPE_FILE, TRIALS_FILE, PICTURE_FILE = "recipe.yaml", "trials.json", "tuning.png"
# The settings that are searched, with the values that are tried.
SEARCHED: dict[str, list[Any]] = {
    "hidden_size": [64, 128, 256],
    "hidden_dropout_prob": [0.1, 0.2, 0.3, 0.5],
    "mask_ratio": [0.25, 0.5, 1.0],
    "num_train_epochs": [2, 5, 10, 20, 40],
}
# Number of trials that run to their end before others are pruned, and of evaluations before a trial is pruned.
TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING = 3, 2


def tune_prepared(
    data: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    minutes: float = 60.0,
    bf16: bool = False,
    use_cpu: bool = False,
    seed: int = 42,
) -> dict[str, Any]:
    """Search width, dropout, mask ratio and epochs on the validation targets, and write the best as a recipe.

    The first trial has the defaults of the log. Optuna's tree-structured Parzen estimator chooses the next ones
    (Bergstra et al., NeurIPS 2011). A trial that is below the median of the others at the same share of its steps is
    pruned. A trial's value is its cross-fitted NDCG@10 with calibrated weights, that of the weights after its last
    step. The search ends after the given time. A trial that is not finished then does not count.

    Args:
        data: The prepared folder.
        output_dir: The folder to write: recipe.yaml, with the four settings; trials.json, with all trials; and
            tuning.png, their picture.
        minutes: Time of the search.
        bf16: Whether to train in bfloat16. The recipe then has it too.
        use_cpu: Whether to leave an accelerator unused.
        seed: Seed of the search and of every trial.

    Returns:
        The content of trials.json: best, the settings of the best trial; and trials, each with settings, value (None
        if it was pruned or not finished), state ("complete", "pruned" or "unfinished"), seconds, and the validation
        NDCG@10 of its evaluations.

    Raises:
        ImportError: If Optuna is not installed.
        ValueError: If the folder is not a prepared folder, has no validation targets, or `output_dir` holds files; or
            if not even the trial with the defaults is finished in time.
    """
    import optuna

    check_prepared(data)
    check_output(output_dir, None)
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0; got {minutes}")
    defaults = _defaults(data)
    deadline = time.monotonic() + 60 * minutes
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING),
    )
    study.enqueue_trial(defaults)
    trials: list[dict[str, Any]] = []
    with folder_beside(Path(output_dir), last_file=RECIPE_FILE) as folder:

        def run(trial: Any) -> float:
            settings = {
                name: trial.suggest_categorical(name, sorted({*values, defaults[name]}))
                for name, values in SEARCHED.items()
            }
            begun = time.monotonic()
            watch = _Watch(trial, deadline)
            record: dict[str, Any] = {"settings": settings, "value": None, "state": "unfinished"}
            trials.append(record)
            with tempfile.TemporaryDirectory() as nowhere:
                arguments = Bert4RecTrainingArguments(
                    nowhere,
                    bf16=bf16,
                    use_cpu=use_cpu,
                    seed=seed,
                    save_strategy="no",
                    disable_tqdm=True,
                    **{name: settings[name] for name in ("mask_ratio", "num_train_epochs")},
                )
                trainer = train_prepared(
                    data,
                    arguments,
                    callbacks=[watch],
                    with_baselines=False,
                    **{name: settings[name] for name in ("hidden_size", "hidden_dropout_prob")},
                )
            record |= {"seconds": round(time.monotonic() - begun, 1), "evaluations": watch.values}
            if watch.ended is not None:
                record["state"] = watch.ended
                raise optuna.TrialPruned
            assert trainer.calibration is not None
            record |= {"value": trainer.calibration["NDCG@10"]["cross_fitted"], "state": "complete"}
            logger.warning("trial %d: NDCG@10 %.4f, %s", len(trials), record["value"], _listed(settings))
            return record["value"]

        study.optimize(run, timeout=max(0.0, deadline - time.monotonic()))
        complete = [record for record in trials if record["state"] == "complete"]
        if not complete:
            raise ValueError(
                f"not one trial was finished in {minutes:g} minutes: give more --minutes, or train with the defaults"
            )
        best = max(complete, key=lambda record: record["value"])
        found = {"best": best["settings"], "trials": trials}
        comment = (
            f"# bert4rec tune: the best of {len(trials)} trials in {minutes:g} minutes. Cross-fitted validation "
            f"NDCG@10 {best['value']:.4f}; the defaults: {_value_of(trials[0])}.\n"
        )
        recipe = best["settings"] | ({"bf16": True} if bf16 else {})
        write_file(folder / TRIALS_FILE, json.dumps(found, indent=2) + "\n")
        write_file(folder / PICTURE_FILE, plot_trials(trials))
        write_file(folder / RECIPE_FILE, comment + yaml.safe_dump(recipe, sort_keys=False))
    return found


class _Watch(TrainerCallback):
    """Reports the evaluations of a trial, and ends it if it is pruned or the time is over."""

    def __init__(self, trial: Any, deadline: float):
        self.trial, self.deadline = trial, deadline
        self.values: list[float] = []
        self.ended: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.deadline and state.global_step < state.max_steps:
            self.ended, control.should_training_stop = "unfinished", True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.ended is not None or state.global_step >= state.max_steps:
            return
        self.values.append(metrics["eval_NDCG@10"])
        self.trial.report(self.values[-1], len(self.values))
        if self.trial.should_prune():
            self.ended, control.should_training_stop = "pruned", True


def _defaults(data: str | os.PathLike) -> dict[str, Any]:
    """The values that the defaults have for the searched settings, on a log."""
    histories, tokenizer, preparation = read_prepared(data)
    if not histories.num_targets("validation"):
        raise ValueError(f"{data} has no validation targets to search on; prepare with another --split")
    given = {"filter_seen_items": preparation["filter_seen_items"]}
    targets = tokenizer.target_event_type_ids
    chosen = default_architecture(histories.num_training_events(), tokenizer.num_items, given)
    length = preparation["max_length"]
    rows = training_rows(histories, max_length=length, windows="proportional")
    return {
        "hidden_size": chosen["hidden_size"],
        "hidden_dropout_prob": chosen["hidden_dropout_prob"],
        "mask_ratio": default_mask_ratio(
            mean_number_of_targets(rows, length, targets), len(rows), chosen["causal_attention"]
        ),
        "num_train_epochs": int(default_num_train_epochs(histories.num_training_events(), tokenizer.num_items)),
    }


def plot_trials(trials: list[dict[str, Any]]) -> bytes:
    """The value of each trial by its number and by each setting, as PNG."""
    from matplotlib.figure import Figure  # imported here because matplotlib is slow to load

    complete = [(number, record) for number, record in enumerate(trials, start=1) if record["state"] == "complete"]
    values = np.array([record["value"] for _, record in complete])
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    panels = figure.subplots(1, 1 + len(SEARCHED), sharey=True)
    panels[0].plot([number for number, _ in complete], values, "o", color=BLUE, markersize=4)
    panels[0].step(
        [number for number, _ in complete], np.maximum.accumulate(values), where="post", color=GREY, linewidth=1
    )
    panels[0].set_xlabel("trial")
    panels[0].set_ylabel("cross-fitted validation NDCG@10")
    best = int(values.argmax())
    for panel, name in zip(panels[1:], SEARCHED, strict=True):
        tried = sorted({record["settings"][name] for _, record in complete})
        places = np.array([tried.index(record["settings"][name]) for _, record in complete])
        panel.plot(places, values, "o", color=BLUE, markersize=4)
        panel.plot(places[best], values[best], "*", color=ORANGE, markeredgecolor="black", markersize=13)
        panel.set_xticks(range(len(tried)), [f"{value:g}" for value in tried])
        panel.set_xlabel(name)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return png(figure)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _value_of(record: dict[str, Any]) -> str:
    return "not finished" if record["value"] is None else f"{record['value']:.4f}"
