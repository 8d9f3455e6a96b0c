"""The learning curve of a training run: its evaluations as data and as a plot, and warnings about the run."""

import itertools
import json
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments

from ..evaluation.metrics import result_metrics
from ..evaluation.plotting import BLUE, GREEN, GREY, ORANGE, VERMILION, png
from ..evaluation.protocol import Protocol
from ..files import write_file
from ..hub.model_card import CURVE_FILE, TRAINING_FILE

# Metrics that an evaluation must have for the curve and its warnings.
NEEDED = {f"eval_{metric}@{k}" for metric in ("HR", "NDCG") for k in (1, 5, 10)}
# Smallest rise of NDCG@10 in the last quarter of a run, as a share of its last value, that counts as under-trained.
# A linear decay of the learning rate to zero lifts the last quarter of a converged run by up to 5 %.
RISE = 0.07
# Smallest fall of the validation loss in the last quarter that counts as under-trained, and smallest rise since its
# lowest value that counts as overfitting. The same decay lowers the loss of a converged run by up to .07.
LOSS_CHANGE = 0.09


def training_record(
    state: TrainerState,
    args: TrainingArguments,
    protocol: Protocol,
    baselines: Mapping[str, Mapping[str, float]],
    chosen_step: int,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The content of training.json.

    Args:
        state: The state of the Trainer. Its log is saved in checkpoints, so a resumed run has the whole curve.
        args: The training arguments.
        protocol: The protocol of the evaluations.
        baselines: Metrics of the baselines on the same rows, by name.
        chosen_step: The step of the weights that were kept.
        calibration: The record of `Bert4RecTrainer.calibrate`. None: the model was not compared with the baselines yet.

    Returns:
        None if there was no training or no evaluation. Otherwise the keys are: protocol; step, max_steps and
        chosen_step; baselines; evaluations, each with epoch, step, training_loss (the last logged one), loss (the
        validation loss) and the metrics; training_losses, all logged ones; warnings, the sentences of
        `training_warnings`.
    """
    evaluations: dict[int, dict[str, Any]] = {}
    losses: list[dict[str, Any]] = []
    ended = False
    for entry in state.log_history:
        ended = ended or "train_runtime" in entry
        place = {"epoch": entry.get("epoch"), "step": entry["step"]}
        if "loss" in entry:
            losses.append(place | {"loss": _finite(entry["loss"])})
        # An evaluation after the end of training is of the chosen weights, which may be of an earlier step. Evaluations
        # with a user's own metrics may lack the metrics that the curve needs.
        elif entry.keys() >= NEEDED and not (ended and chosen_step != entry["step"]):
            metrics = {name: _finite(value) for name, value in result_metrics(entry, "eval").items()}
            training_loss = losses[-1]["loss"] if losses else None
            evaluations.setdefault(entry["step"], place | {"training_loss": training_loss} | metrics)
    if not evaluations or not state.global_step:
        return None
    record: dict[str, Any] = {
        "protocol": protocol.as_dict(),
        "step": state.global_step,
        "max_steps": state.max_steps,
        "chosen_step": chosen_step,
        "baselines": {name: dict(metrics) for name, metrics in baselines.items()},
        "evaluations": list(evaluations.values()),
        "training_losses": losses,
    }
    longer, shorter = (
        (f"--max_steps {2 * args.max_steps}", f"--max_steps {max(1, args.max_steps // 2)}")
        if args.max_steps > 0
        else (
            f"--num_train_epochs {math.ceil(2 * args.num_train_epochs)}",
            f"--num_train_epochs {args.num_train_epochs / 2:g}",
        )
    )
    return record | {"warnings": training_warnings(record, longer, shorter, calibration)}


def training_warnings(
    record: Mapping[str, Any], longer: str, shorter: str, calibration: Mapping[str, Any] | None = None
) -> list[str]:
    """Warnings about a training run, one sentence each. The list is empty if there is nothing to warn of.

    - Under-trained by NDCG@10: the last evaluation is the best one, and it exceeds the best of the first three quarters
      of the run by more than two standard errors and by more than `RISE` of its value. The standard error is that of
      one evaluation over its users. The standard error of the difference of two evaluations, user by user, is .6 to .8
      of it on MovieLens 100K.
    - Under-trained by validation loss, which has less noise: the best evaluation is in the last quarter, and the last
      loss is below the lowest of the first three quarters by more than `LOSS_CHANGE` and by more than two standard
      errors. The differences of users are taken to have a standard deviation of .5, as on MovieLens 100K.
    - Overfitting: the last validation loss is above the lowest one by more than `LOSS_CHANGE` and by more than two
      standard errors. The advice is then to train less, and never to train longer.
    - No better than at its start: the evaluation before the first step is better than all later ones.
    - At the popularity baseline: the best NDCG@10 does not exceed that of popularity by more than two standard errors
      of the difference, with users taken as unpaired.
    - Below a baseline: the final model, with calibrated weights, is worse than a baseline by more than two standard
      errors, user by user. Without a calibration: the best NDCG@10 does not exceed that of the baseline.

    A schedule that decays to zero flattens every curve at its end. So the absence of a warning does not prove that a
    longer run would not be better.

    Args:
        record: The record from `training_record`, still without its warnings.
        longer: The command-line option that makes the run twice as long.
        shorter: The command-line option that makes the run half as long.
        calibration: The record of `Bert4RecTrainer.calibrate`.
    """
    num_users, evaluations = record["protocol"]["num_users"], record["evaluations"]
    values = np.array([evaluation["NDCG@10"] for evaluation in evaluations])
    losses = np.array(
        [evaluation.get("loss") for evaluation in evaluations], float
    )  # None becomes NaN, which is no fall
    steps = np.array([evaluation["step"] for evaluation in evaluations])
    best = evaluations[int(values.argmax())]
    warnings = []
    clear_change = max(LOSS_CHANGE, 2 * 0.5 / math.sqrt(max(num_users, 1)))
    less = f"train less ({shorter}), or with more dropout (--hidden_dropout_prob)"
    rise = losses[-1] - np.min(losses, initial=np.inf, where=np.isfinite(losses))
    is_overfitted = bool(rise > clear_change)
    if is_overfitted:
        lowest = evaluations[int(np.nanargmin(losses))]
        warnings.append(
            f"overfitting: the validation loss was lowest at step {lowest['step']:,} and rose by {rise:.2f} to "
            f"{losses[-1]:.2f} at step {record['step']:,}; {less}"
        )
    early = steps <= 0.75 * steps[-1]
    # Without an evaluation in the third quarter, the rise may lie before the last quarter.
    has_third_quarter = (early & (steps > 0.5 * steps[-1])).any()
    if not is_overfitted and has_third_quarter and best["step"] > 0.75 * steps[-1]:
        gain, fall = values[-1] - values[early].max(), losses[early].min() - losses[-1]
        clear_gain = max(2 * standard_error_from_metrics(best, num_users), RISE * values[-1])
        seen = None
        if best is evaluations[-1] and gain > clear_gain:
            seen = f"NDCG@10 was still rising at step {record['step']:,}, by {gain:.4f} to {values[-1]:.4f}"
        elif fall > clear_change:
            seen = f"loss was still falling at step {record['step']:,}, by {fall:.2f} to {losses[-1]:.2f}"
        if seen:
            advice = (
                f"train longer: {longer}"
                if record["step"] >= record["max_steps"]
                else f"go on to step {record['max_steps']:,}: --resume_from_checkpoint last"
            )
            warnings.append(f"under-trained: validation {seen} in the last quarter of the steps; {advice}")
    if steps[0] == 0 and len(values) > 1 and values[0] > values[1:].max():
        is_kept = record["chosen_step"] == 0
        kept = "the run ends with the model of its start" if is_kept else "keep the model that training continued from"
        warnings.append(
            f"no better than at its start: validation NDCG@10 was {values[0]:.4f} before the first step and "
            f"{values[1:].max():.4f} at most after it; {kept}; try a smaller --learning_rate"
        )
    more = f"give the model more steps ({longer}, a smaller --per_device_train_batch_size) or another --learning_rate"
    more = less if is_overfitted else more
    compared = (calibration or {}).get("baselines", {})
    popularity = record["baselines"].get("popularity")
    if popularity is not None:
        error = math.hypot(*(standard_error_from_metrics(metrics, num_users) for metrics in (best, popularity)))
        difference = best["NDCG@10"] - popularity["NDCG@10"]
        if "popularity" in compared:
            difference, error = compared["popularity"]["difference"], compared["popularity"]["standard_error"]
        if difference <= 2 * error:
            return [
                *warnings,
                f"at the popularity baseline: the validation NDCG@10 is not clearly above that of popularity, "
                f"{popularity['NDCG@10']:.4f} (difference {difference:+.4f}, standard error {error:.4f}); {more}",
            ]
    for name, metrics in record["baselines"].items():
        if name in compared:
            difference, error = compared[name]["difference"], compared[name]["standard_error"]
            if difference < -2 * error:
                warnings.append(
                    f"below {name}: its validation NDCG@10 exceeds that of the model by {-difference:.4f} (standard "
                    f"error {error:.4f}, user by user); {more}"
                )
        elif best["NDCG@10"] <= metrics["NDCG@10"]:
            warnings.append(
                f"below {name}: the best validation NDCG@10 is {best['NDCG@10']:.4f}, that of {name} is "
                f"{metrics['NDCG@10']:.4f}; {more}"
            )
    return warnings


def standard_error_from_metrics(metrics: Mapping[str, float], num_users: int) -> float:
    """Estimate the standard error of NDCG@10 over users from HR and NDCG at 1, 5 and 10.

    Within each of the groups of ranks 1, 2 to 5 and 6 to 10, every hit is taken to have the mean gain of the group. The
    estimate is at most a few percent too low.

    Args:
        metrics: HR@k and NDCG@k for k = 1, 5, 10.
        num_users: Number of users of the metrics.
    """
    second_moment = hits_above = gain_above = 0.0
    for k in (1, 5, 10):
        hits, gain = metrics[f"HR@{k}"] - hits_above, metrics[f"NDCG@{k}"] - gain_above
        second_moment += gain**2 / hits if hits > 0 else 0.0
        hits_above, gain_above = metrics[f"HR@{k}"], metrics[f"NDCG@{k}"]
    return math.sqrt(max(second_moment - metrics["NDCG@10"] ** 2, 0.0) / max(num_users, 1))


def write_training(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write training.json and learning_curve.png into a model folder."""
    write_file(Path(folder) / TRAINING_FILE, json.dumps(record, indent=2) + "\n")
    write_file(Path(folder) / CURVE_FILE, plot_training(record))


def plot_training(record: Mapping[str, Any]) -> bytes:
    """The learning curve as PNG: training loss, validation loss, NDCG@10 with the baselines."""
    from matplotlib.figure import Figure  # imported here because matplotlib is slow to load

    evaluations, losses = record["evaluations"], record["training_losses"]
    # Fixed margins, since a layout that matplotlib finds draws everything twice, at every checkpoint.
    figure = Figure(figsize=(12.5, 3.6))
    figure.subplots_adjust(left=0.05, right=0.83, bottom=0.14, top=0.8, wspace=0.2)
    figure.suptitle(textwrap.fill(str(Protocol(**record["protocol"])), 180), fontsize=9)
    panels = figure.subplots(1, 3, sharex=True)
    curves = (
        ("training loss", losses, "loss", GREY, ""),
        ("validation loss (full softmax)", evaluations, "loss", VERMILION, "o"),
        ("validation NDCG@10", evaluations, "NDCG@10", BLUE, "o"),
    )
    for panel, (title, entries, name, colour, marker) in zip(panels, curves, strict=True):
        values = np.array([entry.get(name) for entry in entries], float)  # None becomes NaN, a gap
        panel.plot([entry["epoch"] for entry in entries], values, color=colour, marker=marker, markersize=4)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        for entry, value in zip(entries, values, strict=True):
            if marker and entry["step"] == record["chosen_step"]:
                panel.plot(
                    entry["epoch"], value, "*", color=ORANGE, markeredgecolor="black", markersize=14,
                    label=f"these weights, step {entry['step']:,}",
                )  # fmt: skip
    baselines = sorted(record["baselines"].items(), key=lambda baseline: -baseline[1]["NDCG@10"])
    looks = itertools.cycle(itertools.product(("--", ":", "-."), (GREEN, VERMILION, GREY)))
    for (title, metrics), (style, colour) in zip(baselines, looks, strict=False):
        value = metrics["NDCG@10"]
        panels[-1].axhline(value, color=colour, linestyle=style, linewidth=1.2, label=f"{title} {value:.4f}")
    panels[-1].margins(y=0.1)  # room for the star
    panels[-1].set_ylim(bottom=0)
    if panels[-1].get_legend_handles_labels()[0]:
        panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return png(figure)


def _finite(value: float) -> float | None:
    """The value, or None if it is not finite, since JSON has no NaN."""
    return value if math.isfinite(value) else None
