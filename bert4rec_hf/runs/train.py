"""`bert4rec train` as a function."""

import logging
import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..data.histories import AnyHistories, Histories, StreamedHistories, check_prepared
from ..data.item_tables import read_stored_table
from ..data.rows import StreamedTrainingRows, training_rows, update_rows, users_with_targets
from ..defaults import (
    UPDATE_EPOCHS,
    UPDATE_LEARNING_RATE,
    UPDATE_WARMUP,
    default_learning_rate,
    default_num_train_epochs,
    default_train_item_features,
)
from ..evaluation.baselines import baseline_ranks
from ..evaluation.calibration import set_weights, weights_of
from ..evaluation.protocol import Protocol
from ..evaluation.seen_targets import json_of_model, last_trained_time
from ..hub.model_card import CALIBRATION_FILE, CALIBRATION_FORM
from ..model.configuration_bert4rec import Bert4RecConfig
from ..training.arguments import Bert4RecTrainingArguments
from ..training.progress import BriefProgress
from ..training.resume import (
    BestCheckpointHere,
    StartIsCheckpoint,
    check_output,
    check_resumable,
    last_checkpoint,
    named_if_lost,
)
from ..training.trainer import Bert4RecTrainer
from .model_and_data import item_table, model_and_data, rows_for
from .new_items import make_new_items

logger = logging.getLogger(__name__)


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
        ConnectionError: If another process of the run ends early.
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
    model, tokenizer, histories, preparation = model_and_data(data, args, model_name_or_path, architecture)
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
    validation = rows_for(config, evaluated, tokenizer, "validation")
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
    trainer.item_table = item_table(data, model_name_or_path)
    for callback in callbacks:
        trainer.add_callback(callback)
    if model_name_or_path is not None:
        calibration = json_of_model(model_name_or_path, CALIBRATION_FILE, CALIBRATION_FORM) or {}
        trainer.weights_were_chosen = calibration.get("were_chosen", False)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(BriefProgress)
    checkpoint = args.resume_from_checkpoint or None
    if checkpoint is not None:
        if checkpoint == "last" or checkpoint is True:
            checkpoint = last_checkpoint(Path(args.output_dir))
            if trainer.is_world_process_zero():
                logger.warning("resuming from %s", checkpoint)
        check_resumable(checkpoint, trainer.args, config, tokenizer, preparation, trainer.is_fsdp_enabled)
        began = weights_of(Bert4RecConfig.from_pretrained(checkpoint))
        if began != weights_of(config):
            # The checkpoint's evaluations were under these weights. Those of a recipe may be calibrated already.
            logger.warning("the resumed run goes on with the weights of counted scores of %s", checkpoint)
            set_weights(config, began)
        trainer.add_callback(BestCheckpointHere)
    are_features_trained = default_train_item_features(histories.num_training_events(), tokenizer.num_items)
    if config.num_item_features and trainer.item_table is not None and are_features_trained:
        _train_item_features(trainer, trainer.item_table, checkpoint)
    if args.eval_on_start:
        trainer.add_callback(StartIsCheckpoint(trainer))
    with named_if_lost(args):
        trainer.train(resume_from_checkpoint=checkpoint)
        if len(validation):
            trainer.calibrate()
        make_new_items(trainer, data)
        if len(validation) and trainer.evaluated_step != trainer.state.global_step:
            trainer.evaluate()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()  # only the main process writes the folder; callers may read it at once
    training = trainer.training_record()
    if training is not None and trainer.is_world_process_zero():
        for warning in training["warnings"]:
            logger.warning(warning)
    # With model_init, each later call of `train` starts from the initial model, as a hyperparameter search needs.
    trainer.model_init = lambda: model_and_data(data, args, model_name_or_path, architecture)[0]
    return trainer


def _train_item_features(trainer: Bert4RecTrainer, table: Path, checkpoint: str | None) -> None:
    """Let the projection from item features train, unless the weights of this run or its checkpoint are sharded."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or hasattr(trainer.model, "unshard")
    if not is_sharded and (checkpoint is None or Bert4RecConfig.from_pretrained(checkpoint).num_item_features):
        trainer.train_item_features(read_stored_table(table).to_pydict())
        return
    trainer.model.config.num_item_features, trainer.model.item_projection.weight = 0, None


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
