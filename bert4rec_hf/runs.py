"""`bert4rec train` and `bert4rec evaluate` as functions: `train_prepared` and `evaluate_prepared`."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from .data.counting import item_counts
from .data.histories import (
    AnyHistories,
    Histories,
    StreamedHistories,
    check_prepared,
    read_prepared,
    stream_prepared,
    time_type,
)
from .data.rows import (
    StreamedTrainingRows,
    ranking_rows,
    sampled_candidates,
    training_rows,
    update_rows,
    users_with_targets,
)
from .defaults import (
    UPDATE_EPOCHS,
    UPDATE_LEARNING_RATE,
    UPDATE_WARMUP,
    default_architecture,
    default_learning_rate,
    default_num_train_epochs,
    default_num_transitions,
    default_start_with_mean,
)
from .evaluation.baselines import baseline_ranks
from .evaluation.calibration import choose_weights, compare_targets, set_weights, weights_of
from .evaluation.metrics import ranking_metrics, result_metrics, sampled_metrics
from .evaluation.protocol import Protocol
from .evaluation.report import check_report_folder, evaluation_report, write_report
from .evaluation.seen_targets import check_targets, json_of_model, last_trained_time, with_period_of
from .evaluation.target_sets import set_metrics, target_sets
from .files import files_beside, write_file
from .hub.load import load_model
from .hub.model_card import (
    CALIBRATION_FILE,
    EVALUATION_FILE,
    RECIPE_FILE,
    add_evaluation,
    read_calibration,
    read_evaluations,
    write_model_card,
)
from .hub.publish_code import publish_code as publish_code_into
from .model.configuration_bert4rec import FIRST_ITEM_ID, Bert4RecConfig
from .model.history_scores import WEIGHT_FIELDS, HistoryScores
from .model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from .model.tokenization_bert4rec import Bert4RecTokenizer
from .training.arguments import Bert4RecTrainingArguments
from .training.initialization import keep_transitions, start_from_cooccurrence, start_new_items
from .training.progress import BriefProgress
from .training.resume import BestCheckpointHere, StartIsCheckpoint, check_output, check_resumable, last_checkpoint
from .training.trainer import Bert4RecTrainer

logger = logging.getLogger(__name__)

# A model, its tokenizer, the histories in its token ids, and the content of preparation.json.
ModelAndData = tuple[Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, AnyHistories, dict[str, Any]]


def train_prepared(
    data: str | os.PathLike,
    args: Bert4RecTrainingArguments,
    model_name_or_path: str | os.PathLike | None = None,
    *,
    publish_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    with_baselines: bool = True,
    **architecture: Any,
) -> Bert4RecTrainer:
    """Train a model on a prepared folder, and write the model folder `args.output_dir`.

    The run ends with a warning if it is under-trained, no better than a baseline, or no better than the model that it
    started from. Without validation targets (`--split none`, `--validation false`), nothing is evaluated, and the model
    is that of the last step.

    Args:
        data: The prepared folder.
        args: The training arguments. `resume_from_checkpoint` is the folder of a checkpoint, or "last" or True for the
            newest one in `output_dir`.
        model_name_or_path: A model folder or Hub id to train further. Its token ids stay, and new items are appended.
            None: a new model.
        publish_code: Whether the model's code is copied into the folder; see `publish_code`.
        callbacks: Further callbacks of the Trainer.
        with_baselines: Whether the baselines are computed. Without them, the run ends with fewer warnings.
        architecture: Fields of `Bert4RecConfig` for a new model. `default_architecture` chooses the other fields.

    Returns:
        The trainer, with the best model. Each trial of its `hyperparameter_search` starts from the same initial model
        as this run.

    Raises:
        TypeError: If a name in `architecture` is not a field of `Bert4RecConfig`.
        ValueError: If a folder is not a prepared folder or a model folder, if `output_dir` holds other files, if the
            checkpoint does not fit the run, or if the architecture differs from that of the model to train further, or
            that model has trained on the targets.
    """
    unknown = architecture.keys() - Bert4RecConfig.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"expected fields of Bert4RecConfig; got {', '.join(sorted(unknown))}: training options belong into "
            "Bert4RecTrainingArguments"
        )
    if model_name_or_path is None and args.max_steps < 0 and not args.num_train_epochs:
        raise ValueError(
            "num_train_epochs 0 is for a model that is trained further, with --model_name_or_path; a new model needs "
            "more: give another number, or leave it out"
        )
    check_output(args.output_dir, args.resume_from_checkpoint)
    check_prepared(data)
    args.check_metric()
    set_seed(args.seed)
    model, tokenizer, histories, preparation = _model_and_data(data, args, model_name_or_path, architecture)
    config = model.config
    args = copy(args)  # the caller's arguments stay as they are
    new_rows = None
    if model_name_or_path is not None:
        new_rows = _new_rows(
            histories, args, config.max_position_embeddings, last_trained_time(model_name_or_path, data)
        )
    if new_rows is not None:
        _choose_for_update(args, config)
        logger.warning(
            "an update of %s: %d histories have new events; %s",
            model_name_or_path, len(new_rows) // 2,
            "they train, and as many old rows (--update_rows all trains on all rows)"
            if args.max_steps > 0 or args.num_train_epochs
            else "catalogue and counts are updated, and the network stays (--num_train_epochs 1 trains it)",
        )  # fmt: skip
    elif args.is_left_out("num_train_epochs"):
        args.num_train_epochs = default_num_train_epochs(histories.num_training_events(), tokenizer.num_items)
    evaluated = users_with_targets(histories, "validation", args.max_eval_samples)
    validation = ranking_rows(
        evaluated,
        tokenizer,
        "validation",
        filter_seen_items=config.filter_seen_items,
        max_length=config.max_position_embeddings,
    )
    protocol, baselines = None, {}
    if len(validation):
        num_targets = histories.num_targets("validation")
        protocol = Protocol.of(
            evaluated, preparation, "validation", tokenizer.num_items, config.filter_seen_items, num_targets
        )
        # The pairs of streamed histories were counted for the model with the same seed.
        if with_baselines:
            baselines = baseline_ranks(
                validation, histories, tokenizer.num_items, seed=args.seed if args.streaming else 0
            )
    else:
        logger.warning(
            "%s has no validation targets: nothing is evaluated, and the model is that of the last step", data
        )
        if args.early_stopping_patience is not None:  # for example from the recipe of an evaluated run
            args.early_stopping_patience = None
            logger.warning(
                "early stopping is off without validation targets: all %g epochs (max_steps %d) are trained; set "
                "--num_train_epochs to the number after which the evaluated run stopped",
                args.num_train_epochs, args.max_steps,
            )  # fmt: skip
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    if model_name_or_path is not None and args.eval_strategy != IntervalStrategy.NO and not args.resume_from_checkpoint:
        args.eval_on_start = True  # the initial weights may be better than all later ones
    trainer = Bert4RecTrainer(
        model,
        args,
        train_dataset=_all_rows(histories, args, config.max_position_embeddings) if new_rows is None else new_rows,
        eval_dataset=validation,
        processing_class=tokenizer,
        protocol=protocol,
        baselines=baselines,
        preparation=preparation,
        publish_code=publish_code,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    if model_name_or_path is not None:
        calibration = json_of_model(model_name_or_path, CALIBRATION_FILE) or {}
        trainer.weights_were_chosen = calibration.get("were_chosen", False)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(BriefProgress)
    checkpoint = args.resume_from_checkpoint or None
    if checkpoint is not None:
        if checkpoint == "last" or checkpoint is True:
            checkpoint = last_checkpoint(Path(args.output_dir))
            if trainer.is_world_process_zero():
                logger.warning("resuming from %s", checkpoint)
        check_resumable(checkpoint, trainer.args, config, tokenizer, preparation)
        began = weights_of(Bert4RecConfig.from_pretrained(checkpoint))
        if began != weights_of(config):
            # The checkpoint's evaluations were under these weights. Those of a recipe may be calibrated already.
            logger.warning("the resumed run goes on with the weights of counted scores of %s", checkpoint)
            set_weights(config, began)
        trainer.add_callback(BestCheckpointHere)
    if args.eval_on_start:
        trainer.add_callback(StartIsCheckpoint(trainer))
    trainer.train(resume_from_checkpoint=checkpoint)
    if len(validation):
        trainer.calibrate()
    if len(validation) and trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # only the main process writes the folder; callers may read it at once
    training = trainer.training_record()
    if training is not None and trainer.is_world_process_zero():
        for warning in training["warnings"]:
            logger.warning(warning)
    # With model_init, each later call of `train` starts from the initial model, as a hyperparameter search needs.
    trainer.model_init = lambda: _model_and_data(data, args, model_name_or_path, architecture)[0]
    return trainer


def _choose_for_update(args: Bert4RecTrainingArguments, config: Bert4RecConfig) -> None:
    """Set the arguments that were left out of a run that updates a model."""
    chosen = {
        "num_train_epochs": UPDATE_EPOCHS,
        "learning_rate": UPDATE_LEARNING_RATE * default_learning_rate(config.hidden_size),
        "warmup_steps": UPDATE_WARMUP,
    }
    for name, value in chosen.items():
        if args.is_left_out(name):
            setattr(args, name, value)


def _new_rows(
    histories: AnyHistories, args: Bert4RecTrainingArguments, max_length: int, seen_until: float | None
) -> Dataset | None:
    """The rows of an update. None: the model has seen all events, the log has no times, or all rows are wanted."""
    if args.update_rows == "all" or isinstance(histories, StreamedHistories):
        return None
    if histories.timestamps is None or seen_until is None:
        return None
    rows = update_rows(histories, seen_until, max_length=max_length, seed=args.seed)
    return rows if len(rows) else None


def _all_rows(
    histories: AnyHistories, args: Bert4RecTrainingArguments, max_length: int
) -> Dataset | StreamedTrainingRows:
    """The rows of a run that trains on all of a log."""
    cuts: dict[str, Any] = {
        "max_length": max_length,
        "windows": args.train_windows if args.train_windows in ("proportional", "sliding") else "whole",
        "window_step": args.window_step,
    }
    if isinstance(histories, Histories):
        return training_rows(histories, **cuts)
    return StreamedTrainingRows(histories, **cuts)


def _model_and_data(
    data: str | os.PathLike,
    args: Bert4RecTrainingArguments,
    model_name_or_path: str | os.PathLike | None,
    architecture: Mapping[str, Any],
) -> ModelAndData:
    """The model before training, either new or to be trained further, with its data."""
    if model_name_or_path is None:
        model, tokenizer, histories, preparation = _new_model(data, args, dict(architecture))
    else:
        model, tokenizer, histories, preparation = _continued_model(data, args, model_name_or_path, dict(architecture))
    if model.config.num_transitions:
        # A model that is trained further gets the transitions of its new log.
        weight = model.config.transition_weight
        keep_transitions(model, histories, tokenizer.num_items, weight=weight, seed=args.seed)
    return model, tokenizer, histories, preparation


def _histories(
    data: str | os.PathLike, streaming: bool, tokenizer: Bert4RecTokenizer | None = None
) -> tuple[AnyHistories, Bert4RecTokenizer, dict[str, Any]]:
    return stream_prepared(data, tokenizer) if streaming else read_prepared(data, tokenizer)


def _new_model(data: str | os.PathLike, args: Bert4RecTrainingArguments, architecture: dict[str, Any]) -> ModelAndData:
    histories, tokenizer, preparation = _histories(data, args.streaming)
    given = {
        "max_position_embeddings": preparation["max_length"],
        "filter_seen_items": preparation["filter_seen_items"],
    } | architecture
    num_events, num_items = histories.num_training_events(), tokenizer.num_items
    config = Bert4RecConfig(vocab_size=len(tokenizer), **default_architecture(num_events, num_items, given))
    model = Bert4RecForMaskedItemPrediction(config)
    _skip_random_numbers(config)
    if args.item_initialization == "cooccurrence":
        with_mean = default_start_with_mean(num_events, num_items)
        start_from_cooccurrence(model, histories, num_items, with_mean=with_mean, seed=args.seed)
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer, histories, preparation


def _skip_random_numbers(config: Bert4RecConfig) -> None:
    """Let a seed give the model that it gave when the numbers in benchmarks/results were measured.

    The model then had a decoder. Its weights were drawn here, and then tied to the item vectors. Remove this function
    when the numbers are measured again.
    """
    torch.nn.Linear(config.hidden_size, config.vocab_size)
    torch.empty(config.vocab_size, config.hidden_size).normal_()


def _continued_model(
    data: str | os.PathLike, args: Bert4RecTrainingArguments, folder: str | os.PathLike, architecture: dict[str, Any]
) -> ModelAndData:
    """A model that is trained further. The new items of the log are added to it."""
    model = load_model(folder)
    policy = architecture.pop("filter_seen_items", None)  # may change, since no weights depend on it
    if policy is not None:
        model.config.filter_seen_items = policy
    other = [f"{name}={value}" for name, value in architecture.items() if getattr(model.config, name) != value]
    if other:
        raise ValueError(
            f"a model that is trained further keeps its architecture; {folder} does not have {', '.join(other)}: leave "
            "these options out"
        )
    tokenizer = Bert4RecTokenizer.from_pretrained(folder)
    catalogue, old_items = Bert4RecTokenizer.from_pretrained(data), set(tokenizer.items)
    titles = dict(zip(catalogue.items, catalogue.titles or [], strict=False))
    num_new = model.add_items(tokenizer, catalogue.items, {item: title for item, title in titles.items() if title})
    tokenizer.set_counts(dict(zip(catalogue.items, catalogue.counts, strict=True)))
    histories, tokenizer, preparation = _histories(data, args.streaming, tokenizer)
    if num_new:
        start_new_items(model, histories, tokenizer.num_items, num_new, seed=args.seed)
    has_validation = preparation["split"].get("validation")
    check_targets(folder, preparation, "validation" if has_validation else "test", is_trained_further=True)
    preparation = with_period_of(preparation, folder)
    if not old_items.intersection(catalogue.items):
        logger.warning("the catalogue of %s has none of the items of %s: all of them are new", folder, data)
    kept, asked = model.config.filter_seen_items, preparation["filter_seen_items"]
    if policy is None and kept != asked:
        logger.warning(
            "%s was prepared with filter_seen_items %s, but the model keeps its own, %s: --filter_seen_items %s "
            "changes the model", data, asked, kept, str(asked).lower(),
        )  # fmt: skip
    length = model.config.max_position_embeddings
    if length != preparation["max_length"]:
        logger.warning(
            "%s was prepared for length %d, but the model keeps its own, %d", data, preparation["max_length"], length
        )
    return model, tokenizer, histories, preparation


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
) -> dict[str, Any]:
    """Rank the targets of a prepared folder with a model and with the baselines.

    If the model is a local folder, the metrics are also written into its evaluation.json and its card.

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
            the full protocol. None: no report.

    Returns:
        The record of evaluation.json: source, protocol, metrics and baselines. If some users have an empty history, it
        also has groups: the metrics of the users with and without a past. With all targets, it also has all_targets,
        the other record.

    Raises:
        ValueError: If a folder is not a model folder or a prepared folder, if the catalogue has none of the items of
            the data, if no user has a target, if the model has trained on the targets, if a report or all targets are
            asked for with the protocol "paper", or if the targets do not fit the data; see `target_sets`.
    """
    check_prepared(data)
    if targets not in ("next", "all"):
        raise ValueError(f"targets must be next or all; got {targets!r}")
    if horizon is not None and targets != "all":
        raise ValueError(f"--horizon is for --targets all; got {horizon}: leave it out, or add --targets all")
    if targets == "all" and protocol == "paper":
        raise ValueError("--targets all needs the full ranking; got --protocol paper: leave out one of the two")
    if max_eval_samples is not None and max_eval_samples < 1:
        raise ValueError(f"max_eval_samples must be at least 1; got {max_eval_samples}")
    if report is not None:
        if protocol == "paper":
            raise ValueError("a report needs the full ranking; got --protocol paper: leave out one of the two")
        check_report_folder(report)
    loaded = load_model(model)
    tokenizer = Bert4RecTokenizer.from_pretrained(model)
    histories, tokenizer, preparation = _histories(data, streaming, tokenizer)
    _check_catalogue(model, tokenizer, data, histories)
    check_targets(model, preparation, part)
    if os.path.isdir(model):
        read_evaluations(model)  # raises before the ranking if evaluation.json is damaged
    policy, length = loaded.config.filter_seen_items, loaded.config.max_position_embeddings
    evaluated = users_with_targets(histories, part, max_eval_samples, timestamps=targets == "all")
    how: dict[str, Any] = {"filter_seen_items": policy, "max_length": length}
    rows = ranking_rows(evaluated, tokenizer, part, **how)
    if not len(rows):
        raise ValueError(
            f"no user of {data} has a {part} target; choose another --part, or prepare with another --split"
        )
    sets = None
    if targets == "all":
        sets = target_sets(evaluated, tokenizer, preparation, part, horizon=horizon, time_type=time_type(data), **how)
    if protocol == "paper":
        rows = sampled_candidates(rows, evaluated, counts=item_counts(histories, tokenizer.num_items))
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Bert4RecTrainer(
            loaded,
            Bert4RecTrainingArguments(
                nowhere,
                per_device_eval_batch_size=per_device_eval_batch_size,
                use_cpu=use_cpu,
                disable_tqdm=disable_tqdm or not sys.stderr.isatty(),
                eval_strategy="no",
                save_strategy="no",
            ),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # the record has all metrics
        prediction = trainer.predict(rows)
        metrics_of_sets = None
        if sets is not None:
            if preparation["split"]["name"] == "temporal":  # the same rows, without users who have no target
                recommended = prediction.predictions[1][np.isin(rows["user_id"][:], sets.rows["user_id"][:])]
            else:
                recommended = trainer.predict(sets.rows).predictions[1]
            metrics_of_sets = set_metrics(sets.ranks_in(recommended), sets.users)
    described = Protocol.of(evaluated, preparation, part, tokenizer.num_items, policy, histories.num_targets(part))
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
    else:
        rankings |= baseline_ranks(rows, histories, tokenizer.num_items)
        metrics = result_metrics(prediction.metrics, "test")
    record: dict[str, Any] = {
        "source": os.path.basename(preparation["source"]),
        "protocol": described.as_dict(),
        "metrics": metrics,
        "baselines": {name: measure(ranks) for name, ranks in rankings.items() if name != "model"},
    }
    has_past = np.asarray(rows["history_length"]) > 0
    if not has_past.all():
        record["groups"] = {
            f"{int(users.sum())} users {title} a past": {
                name: measure(ranks[users]) for name, ranks in rankings.items()
            }
            for title, users in (("with", has_past), ("without", ~has_past))
        }
    of_sets = None
    if sets is not None:
        of_all = replace(
            described,
            targets=sets.description,
            num_users=len(sets.rows),
            num_users_without_past=sum(length == 0 for length in sets.rows["history_length"]),
            share_seen_targets=sets.share_seen(),
            share_unknown_targets=float((sets.token_ids < 0).mean()),
        )
        ranked = baseline_ranks(sets.expanded_rows(), histories, tokenizer.num_items)
        of_sets = {
            "source": record["source"],
            "protocol": of_all.as_dict(),
            "metrics": metrics_of_sets,
            "baselines": {name: set_metrics(ranks, sets.users) for name, ranks in ranked.items()},
        }
    if trainer.is_world_process_zero() and report is not None:
        recommended = prediction.predictions[1]
        found = evaluation_report(rows, histories, rankings, recommended, described, tokenizer.num_items)
        write_report(report, found, rows, rankings["model"])
    if trainer.is_world_process_zero() and os.path.isdir(model):
        try:
            add_evaluation(model, record)
            if of_sets is not None:
                add_evaluation(model, of_sets)
            write_model_card(model)
        except OSError as error:
            logger.warning("the metrics could not be written into %s: %s", model, error)
    return record if of_sets is None else record | {"all_targets": of_sets}


def calibrate_prepared(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    streaming: bool = False,
    per_device_eval_batch_size: int = 64,
    use_cpu: bool = False,
) -> dict[str, Any]:
    """Choose the weights of a model's counted scores on the validation targets of a prepared folder.

    The counted scores are counted anew in the training part. A model without transitions, such as a converted one, gets
    them. The folder of the model is changed only if the chosen weights are clearly better; see `choose_weights`. Then
    calibration.json is written, recipe.yaml gets the weights, and evaluation.json, whose metrics are those of the
    former weights, is removed.

    Args:
        model: A model folder.
        data: The prepared folder.
        streaming: Whether the histories stay on disk, for a log larger than memory.
        per_device_eval_batch_size: Number of histories ranked at once.
        use_cpu: Whether to leave an accelerator unused.

    Returns:
        The record of `choose_weights`.

    Raises:
        ValueError: If a folder is not a model folder or a prepared folder, if the catalogue has none of the items of
            the data, if no user has a validation target, or if the model has trained on these targets.
    """
    check_prepared(data)
    if not Path(model).is_dir():
        raise ValueError(f"expected a model folder, which calibration changes; got {model}: download it first")
    loaded = load_model(model).eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(model)
    histories, tokenizer, preparation = _histories(data, streaming, tokenizer)
    _check_catalogue(model, tokenizer, data, histories)
    check_targets(model, preparation, "validation")
    config = loaded.config
    evaluated = users_with_targets(histories, "validation", None)
    rows = ranking_rows(
        evaluated,
        tokenizer,
        "validation",
        filter_seen_items=config.filter_seen_items,
        max_length=config.max_position_embeddings,
    )
    if not len(rows):
        raise ValueError(f"no user of {data} has a validation target; prepare with another --split, or --validation")
    if not config.num_transitions and default_num_transitions(tokenizer.num_items):
        config.num_transitions = default_num_transitions(tokenizer.num_items)
        config.transition_weight = config.next_item_weight = 0.0  # the model as it is
        loaded.history_scores = HistoryScores(config)
    if config.num_transitions:
        keep_transitions(loaded, histories, tokenizer.num_items, weight=config.transition_weight)
    if not use_cpu and torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    comparisons = compare_targets(loaded, rows, tokenizer, batch_size=per_device_eval_batch_size)
    before = (json_of_model(model, CALIBRATION_FILE) or {}).get("were_chosen", False)
    record = choose_weights(comparisons, weights_of(config), were_chosen=before)
    record |= {"source": os.path.basename(preparation["source"])}
    if record["adopted"]:
        set_weights(config, record["weights"])
        folder = Path(model)
        has_code = "auto_map" in json.loads((folder / "config.json").read_text("utf-8"))
        (folder / EVALUATION_FILE).unlink(missing_ok=True)
        with files_beside(folder, last_file="config.json") as beside:
            loaded.save_pretrained(beside)
            if (folder / RECIPE_FILE).is_file():
                recipe = yaml.safe_load((folder / RECIPE_FILE).read_text("utf-8"))
                recipe |= {name: getattr(config, name) for name in ("num_transitions", *WEIGHT_FIELDS.values())}
                text = yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True)
                (beside / RECIPE_FILE).write_text(text, "utf-8")
        if has_code:
            publish_code_into(folder)
        write_file(folder / CALIBRATION_FILE, json.dumps(record, indent=2) + "\n")
        write_model_card(folder)
    return record


def _check_catalogue(
    model: str | os.PathLike, tokenizer: Bert4RecTokenizer, data: str | os.PathLike, histories: AnyHistories
) -> None:
    """Raise ValueError if the catalogue of a model has none of the items of a prepared folder."""
    if not any((part.item_ids >= FIRST_ITEM_ID).any() for part in histories.parts()):
        catalogues = (tokenizer.items, Bert4RecTokenizer.from_pretrained(data).items)
        known, asked = (", ".join(map(repr, items[:3])) for items in catalogues)
        raise ValueError(
            f"the catalogue of {model} has none of the items of {data}: its ids look like {known}, those of the data "
            f"like {asked}; give data with the model's item ids"
        )


def _numbers_of(rows: Dataset) -> str:
    numbers = [len(items) for items in rows["candidate_ids"]]
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"
