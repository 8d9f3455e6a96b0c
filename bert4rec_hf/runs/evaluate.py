"""`bert4rec evaluate` as a function."""

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from ..data.counting import item_counts
from ..data.histories import time_type
from ..data.rows import has_earlier_event, sampled_candidates, target_ids_of
from ..evaluation.baselines import baseline_ranks
from ..evaluation.metrics import ranking_metrics, result_metrics, sampled_metrics
from ..evaluation.report import check_report_folder, evaluation_report, write_report
from ..evaluation.target_sets import set_metrics, target_sets
from ..hub.model_card import add_evaluation, read_calibration, read_card_files, write_model_card
from ..model.losses import IGNORE_INDEX
from ..serving.rules import Rules
from ..training.trainer import SERVED_LIST_LENGTH
from .ranking import predict, ranking_task

logger = logging.getLogger(__name__)


def evaluate_prepared(
    model: str | os.PathLike,
    data: str | os.PathLike,
    part: str = "test",
    *,
    protocol: str = "full",
    targets: str = "next",
    horizon: str | None = None,
    streaming: bool = False,
    max_eval_samples: int | None = None,
    per_device_eval_batch_size: int = 64,
    use_cpu: bool = False,
    disable_tqdm: bool = False,
    report: str | os.PathLike | None = None,
    rules: Rules | None = None,
) -> dict[str, Any]:
    """Rank the targets of a prepared folder with a model and with the baselines.

    If the model is a local folder, the metrics are also written into its evaluation.json and its card. Metrics under
    rules are not: the rules belong to a business, and the card may be published.

    Args:
        model: A model folder or Hub id.
        data: The prepared folder.
        part: "validation" or "test".
        protocol: "full" ranks each target among the whole catalogue. "paper" ranks it among 100 items drawn by
            popularity (see `rows.sampled_candidates`); the names of the metrics start with "sampled_", and there are no
            baselines.
        targets: "next" ranks the next event of each user. "all" also computes metrics with several targets per user;
            see `target_sets`. They are stored as a record of their own.
        horizon: With "all" and a temporal split, how long after the cut an event is a target, for example "7d". None:
            no limit.
        streaming: Whether the histories stay on disk, for a log larger than memory. Only the users who are ranked are
            read into memory.
        max_eval_samples: Maximum number of users to rank, drawn at random. None: all; with `streaming`, 50,000.
        per_device_eval_batch_size: Number of histories ranked at once.
        use_cpu: Whether to leave an accelerator unused.
        disable_tqdm: Whether to show no progress bar.
        report: A folder for report.json, report.md, report.png and ranks.parquet; see `report.write_report`. Only for
            the full protocol and without rules. None: no report.
        rules: Rules that the targets are ranked under; see `Bert4RecTrainer`. The protocol names them, and there are no
            baselines and no loss, since neither knows them. None: no rules.

    Returns:
        The record of evaluation.json: source, protocol, metrics and baselines. If some users have an empty history, it
        also has groups: the metrics of the users with and without a past. With event types, so have the targets whose
        item is in the history with another type, and the others. With all targets, it also has all_targets,
        the other record.

    Raises:
        ValueError: If a folder is not a model folder or a prepared folder, if the catalogue has none of the items of
            the data, if no user has a target, if the model has trained on the targets, if a report, all targets or
            rules are asked for with the protocol "paper", or a report with rules; or if the targets do not fit the
            data; see `target_sets`.
    """
    if targets not in ("next", "all"):
        raise ValueError(f"targets must be next or all; got {targets!r}")
    if horizon is not None and targets != "all":
        raise ValueError(f"--horizon is for --targets all; got {horizon}: leave it out, or add --targets all")
    if targets == "all" and protocol == "paper":
        raise ValueError("--targets all needs the full ranking; got --protocol paper: leave out one of the two")
    if rules is not None and (protocol == "paper" or report is not None):
        other = "--report" if report is not None else "--protocol paper"
        raise ValueError(f"{other} knows no rules; got {rules}: leave out one of the two")
    if report is not None:
        if protocol == "paper":
            raise ValueError("a report needs the full ranking; got --protocol paper: leave out one of the two")
        check_report_folder(report)
    task = ranking_task(
        model, data, part, streaming=streaming, max_eval_samples=max_eval_samples, timestamps=targets == "all"
    )
    if os.path.isdir(model):
        read_card_files(model)  # raises before the ranking if a file is damaged
    rows, histories, preparation, num_items = task.rows, task.histories, task.preparation, task.tokenizer.num_items
    sets = None
    if targets == "all":
        sets = target_sets(
            task.evaluated,
            task.tokenizer,
            preparation,
            part,
            horizon=horizon,
            time_type=time_type(data),
            **task.row_options,
        )
    if protocol == "paper":
        rows = sampled_candidates(rows, task.evaluated, counts=item_counts(histories, num_items))
    # With a temporal split, the sets have the same rows, without users who have no target.
    of_same_rows = sets is not None and preparation["split"]["name"] == "temporal"
    prediction, *others = predict(
        task,
        rows,
        *([] if sets is None or of_same_rows else [sets.rows]),
        batch_size=per_device_eval_batch_size,
        use_cpu=use_cpu,
        disable_tqdm=disable_tqdm,
        rules=rules,
    )
    described = task.protocol()
    if part == "validation" and os.path.isdir(model):
        calibration = read_calibration(model)
        was_here = calibration is not None and calibration.get("source") == os.path.basename(preparation["source"])
        described = replace(described, calibrated=was_here)
    rankings, measure = {"model": prediction.predictions[0]}, ranking_metrics
    if protocol == "paper":
        described, measure = (
            replace(described, candidates=f"the target and {_numbers_of(rows)} items drawn by popularity"),
            sampled_metrics,
        )
        metrics = measure(rankings["model"])
    elif rules is not None:
        described = replace(described, candidates=_candidates(rules, rows, num_items))
        metrics = result_metrics(prediction.metrics, "test")
        del metrics["loss"]
    else:
        rankings |= baseline_ranks(rows, histories, num_items)
        metrics = result_metrics(prediction.metrics, "test")
    record: dict[str, Any] = {
        "source": os.path.basename(preparation["source"]),
        "protocol": described.as_dict(),
        "metrics": metrics,
        "baselines": {name: measure(ranks) for name, ranks in rankings.items() if name != "model"},
    }
    has_past = np.asarray(rows["history_length"]) > 0
    divisions = [("users {} a past", has_past)]
    if "history_type_ids" in rows.column_names:
        divisions.append(("targets {} an earlier event of another type", has_earlier_event(rows)))
    groups = {
        f"{int(users.sum())} {title.format(word)}": {name: measure(ranks[users]) for name, ranks in rankings.items()}
        for title, is_in in divisions
        if not is_in.all()
        for word, users in (("with", is_in), ("without", ~is_in))
    }
    if groups:
        record["groups"] = groups
    of_sets = None
    if sets is not None:
        recommended = others[0].predictions[1] if others else prediction.predictions[1]
        if of_same_rows:
            recommended = recommended[np.isin(rows["user_id"][:], sets.rows["user_id"][:])]
        of_all = replace(
            described,
            targets=sets.description,
            num_users=len(sets.rows),
            num_users_without_past=sum(length == 0 for length in sets.rows["history_length"]),
            share_seen_targets=sets.share_seen(),
            share_unknown_targets=float((sets.token_ids < 0).mean()),
        )
        ranked = {} if rules else baseline_ranks(sets.expanded_rows(), histories, num_items)
        of_sets = {
            "source": record["source"],
            "protocol": of_all.as_dict(),
            "metrics": set_metrics(sets.ranks_in(recommended), sets.users),
            "baselines": {name: set_metrics(ranks, sets.users) for name, ranks in ranked.items()},
        }
    if PartialState().is_main_process and report is not None:
        found = evaluation_report(rows, histories, rankings, prediction.predictions[1], described, num_items)
        write_report(report, found, rows, rankings["model"])
    if PartialState().is_main_process and rules is None and os.path.isdir(model):
        try:
            add_evaluation(model, record)
            if of_sets is not None:
                add_evaluation(model, of_sets)
            write_model_card(model)
        except OSError as error:
            logger.warning("the metrics could not be written into %s: %s", model, error)
    return record if of_sets is None else record | {"all_targets": of_sets}


def _numbers_of(rows: Dataset) -> str:
    numbers = [len(items) for items in rows["candidate_ids"]]
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _candidates(rules: Rules, rows: Dataset, num_items: int) -> str:
    """What the targets are ranked among under rules, in words."""
    text = f"all {num_items} items"
    if rules.allowed is not None:
        targets = target_ids_of(rows)
        known = targets[targets != IGNORE_INDEX]
        share = float((~rules.allowed.numpy()[known]).sum() / len(targets))
        text = (
            f"{rules.num_allowed} of {num_items} items (where {rules.where}; {share:.1%} of the targets do not meet "
            "this and are misses)"
        )
    if rules.reorders:
        others = str(rules).removeprefix(f"where {rules.where}, ")
        text += f" in served lists of {SERVED_LIST_LENGTH} ({others}; targets beyond the list are misses)"
    return text
