"""The start of a run: whether it may write into a folder, whether it can resume, and its start as a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.histories import PREPARATION_FILE, read_preparation
from ..files import finished
from ..hub.model_card import RECIPE_FILE
from ..model.configuration_bert4rec import Bert4RecConfig
from ..model.history_scores import WEIGHT_FIELDS
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..reading import read_yaml

# Arguments that must not change in a resumed run, since its optimizer and scheduler were created with them.
OPTIMIZER_ARGUMENTS = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Weights and optimizer of a checkpoint that FSDP saved whole. Accelerate chooses these names.
FSDP_WEIGHTS, FSDP_OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a folder, or None. The Trainer's state is the file that is written last."""
    steps = [path.parent.name.removeprefix("checkpoint-") for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    newest = max((int(step) for step in steps if step.isdecimal()), default=None)
    return None if newest is None else str(folder / f"checkpoint-{newest}")


def check_resumable(
    checkpoint: str | None,
    args: TrainingArguments,
    config: Bert4RecConfig,
    tokenizer: Bert4RecTokenizer,
    preparation: Mapping[str, Any],
    is_sharded: bool = False,
) -> None:
    """Raise ValueError if a run cannot resume from a checkpoint.

    The checkpoint must be complete, of the same architecture, catalogue and log, before the end of the run, and with
    the same optimizer arguments and rows a step as the run. The number of processes may differ, and so may the weights
    of counted scores, as in the recipe of a run that was calibrated.

    Args:
        checkpoint: The folder of the checkpoint.
        args: The arguments of the run.
        config: The config of the run's model.
        tokenizer: The tokenizer of the run.
        preparation: The content of preparation.json of the run's data.
        is_sharded: Whether FSDP shards the weights of the run.
    """
    if checkpoint is None or not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
        found = f"{checkpoint} is no checkpoint" if checkpoint else f"{args.output_dir} has no checkpoint"
        raise ValueError(f"{found} to resume from: name the folder of one, or leave --resume_from_checkpoint out")
    if Bert4RecTokenizer.from_pretrained(checkpoint).items != tokenizer.items:
        other = ["another catalogue"]
    else:
        trained = read_preparation(checkpoint) if (Path(checkpoint) / PREPARATION_FILE).is_file() else preparation
        other = [f"other {name}" for name in ("split", "filters", "statistics") if trained[name] != preparation[name]]
    if other:
        raise ValueError(
            f"{checkpoint} was trained on a log with {' and '.join(other)}: resume with the --data (and "
            "--model_name_or_path) of the original run, or train it further on new data with --model_name_or_path and "
            "another --output_dir"
        )
    began = Bert4RecConfig.from_pretrained(checkpoint)
    other = [
        f"{name}={getattr(began, name)}, not {getattr(config, name)}"
        for name in Bert4RecConfig.__annotations__
        if getattr(began, name) != getattr(config, name) and name not in WEIGHT_FIELDS.values()
    ]
    if other:
        raise ValueError(
            f"{checkpoint} has {'; '.join(other)}: a resumed run keeps its architecture; leave these options out"
        )
    recipe = Path(checkpoint) / RECIPE_FILE
    recorded = read_yaml(recipe) if recipe.is_file() else {}
    asked = args.to_dict()
    other = [
        f"{name}={recorded[name]}, not {asked[name]}"
        for name in OPTIMIZER_ARGUMENTS
        if name in recorded and recorded[name] != asked[name]
    ]
    if other:
        raise ValueError(
            f"{checkpoint} has {'; '.join(other)}: a resumed run keeps its optimizer; to train it further with another "
            "one, give the checkpoint as --model_name_or_path, and another --output_dir"
        )
    if not any(Path(checkpoint).glob("optimizer*")) and not args.deepspeed:
        raise ValueError(
            f"{checkpoint} has the model only (save_only_model), not the optimizer to resume with: give the checkpoint "
            "as --model_name_or_path, and another --output_dir"
        )
    if is_sharded and (Path(checkpoint) / "optimizer.pt").is_file():
        raise ValueError(
            f"{checkpoint} was saved without FSDP, which cannot resume from it: resume without FSDP, or give the "
            "checkpoint as --model_name_or_path, and another --output_dir"
        )
    _check_rows_a_step(Path(checkpoint), recorded, args)
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    # At exactly max_steps, the Trainer would still take one more step.
    is_beyond = state.global_step >= args.max_steps if args.max_steps > 0 else state.epoch > args.num_train_epochs
    if is_beyond:
        raise ValueError(
            f"{checkpoint} is at epoch {state.epoch:g}, step {state.global_step}, at or beyond the end of the run "
            f"(num_train_epochs={args.num_train_epochs:g}, max_steps={args.max_steps}): increase --num_train_epochs or "
            "--max_steps"
        )


def _check_rows_a_step(checkpoint: Path, recorded: Mapping[str, Any], args: TrainingArguments) -> None:
    """Raise ValueError if a step of a run has other rows than one of the checkpoint.

    The Trainer finds its place in an epoch by the number of steps.
    """
    processes = len(list(checkpoint.glob("rng_state*.pth")))  # each process saves its own
    if not processes or "per_device_train_batch_size" not in recorded:
        return
    before = processes * recorded["per_device_train_batch_size"] * recorded.get("gradient_accumulation_steps", 1)
    others = args.world_size * args.gradient_accumulation_steps
    now = others * args.per_device_train_batch_size
    if now == before:
        return
    advice = f"set --per_device_train_batch_size {before // others}"
    if before % others:
        advice = f"choose a number of processes, times --gradient_accumulation_steps, that divides {before}"
    raise ValueError(
        f"{checkpoint} was trained with {before} rows a step over {processes} process{'es' if processes > 1 else ''}; "
        f"got {now} over {args.world_size}: a resumed run keeps its rows a step; {advice}"
    )


def is_of_lost_process(error: RuntimeError) -> bool:
    """Whether PyTorch raised the error because another process of the run has ended or cannot be reached."""
    # Gloo has no class of errors of its own.
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


class _ToldToEndError(BaseException):
    """SIGTERM has come. It is no Exception, so that no library takes it for an error of its own."""


@contextlib.contextmanager
def named_if_lost(args: TrainingArguments) -> Iterator[None]:
    """Raise a ConnectionError that says how to go on, if another process of the run ends early.

    Either a process notices by itself, when it exchanges data, or the launcher notices first and sends SIGTERM.
    """
    takes_signals = args.world_size > 1 and threading.current_thread() is threading.main_thread()

    def end(*_: Any) -> None:
        raise _ToldToEndError

    before = signal.signal(signal.SIGTERM, end) if takes_signals else None
    try:
        yield
    except (RuntimeError, _ToldToEndError) as error:
        if isinstance(error, RuntimeError) and (args.world_size == 1 or not is_of_lost_process(error)):
            raise
        assert args.output_dir is not None  # for the type checker
        last = last_checkpoint(Path(args.output_dir))
        advice = f"go on from {Path(last).name} with --resume_from_checkpoint last" if last else "start the run again"
        happened = (
            "has lost another one, which has ended or cannot be reached (without a message of its own, it was killed, "
            "for example for want of memory)"
            if isinstance(error, RuntimeError)
            else "was told to end (SIGTERM), as launchers do when another process has ended"
        )
        raise ConnectionError(
            f"process {args.process_index} of {args.world_size} {happened}: {advice}; the number of processes may "
            "change"
        ) from error
    finally:
        if takes_signals:
            signal.signal(signal.SIGTERM, before)


def check_output(folder: str | os.PathLike, resume_from_checkpoint: str | None) -> None:
    """Raise ValueError if a new training run would overwrite files."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --output_dir")
    names = [path.name for path in finished(folder)]
    checkpoints = [name for name in names if name.startswith("checkpoint-")]
    if not names or (resume_from_checkpoint and checkpoints):
        return
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    hint = ", or resume with --resume_from_checkpoint last" if last_checkpoint(folder) else ""
    raise ValueError(f"{folder} is not empty ({shown}); choose another --output_dir{hint}")


class BestCheckpointHere(TrainerCallback):
    """Corrects the path of the best checkpoint in a run's folder that was moved, so that it is not deleted."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint is not None:
            here = Path(args.output_dir) / Path(state.best_model_checkpoint).name
            if here.is_dir():
                state.best_model_checkpoint = str(here)


class StartIsCheckpoint(TrainerCallback):
    """Makes a checkpoint of the model before the first step. If no later one is better, it is loaded at the end.

    The Trainer itself evaluates this model with `eval_on_start`, but neither saves it nor counts it as the best.

    Args:
        trainer: The trainer of the run.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0 and state.best_metric is None and args.load_best_model_at_end:
            # These private methods are what the Trainer calls after each later evaluation.
            self.trainer._determine_best_metric(metrics, trial=None)
            # This comes before saving, since the run may be resumed from this very checkpoint.
            state.best_model_checkpoint = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-0")
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
