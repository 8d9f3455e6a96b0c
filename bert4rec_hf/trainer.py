"""`Bert4RecTrainer`: the Transformers Trainer that evaluates by ranking and writes the model card."""

import ctypes
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from datasets import Dataset
from huggingface_hub import upload_folder
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import (
    EvalLoopOutput,
    HubStrategy,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
    get_last_checkpoint,
)
from transformers.utils.hub import PushInProgress

from .configuration_bert4rec import DERIVED_FIELDS, FIRST_ITEM_ID, Bert4RecConfig
from .cooccurrence import keep_cooccurrence, start_from_cooccurrence
from .data_collator import DataCollatorForMaskedItemPrediction
from .learning_curve import training_record, write_training
from .losses import IGNORE_INDEX
from .metrics import (
    COVERAGE_CUTOFF,
    Protocol,
    floors,
    popularity_ranks,
    ranking_metrics,
    result_metrics,
    sampled_metrics,
)
from .model_card import (
    CURVE_FILE,
    EVALUATION_FILE,
    RECIPE_FILE,
    TRAINING_FILE,
    add_evaluation,
    read_evaluations,
    write_model_card,
)
from .modeling_bert4rec import Bert4RecForMaskedItemPrediction
from .publish import publish_code as publish_code_into
from .report import check_report_folder, evaluation_report, write_report
from .splits import (
    PREPARATION_FILE,
    check_prepared,
    ranking_rows,
    read_prepared,
    sampled_candidates,
    training_rows,
)
from .tokenization_bert4rec import Bert4RecTokenizer

logger = logging.getLogger(__name__)

# Of one machine or one run, no part of a recipe.
NO_RECIPE = {
    "output_dir", "run_name", "resume_from_checkpoint", "push_to_hub", "logging_dir", "local_rank", "deepspeed",
    "use_cpu", "dataloader_pin_memory", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "project",
}  # fmt: skip

# Training events from which a model is 128 wide; events an item below which items are rare: then it is 256 wide, unless
# they are too many for that, and has much dropout; width of its heads.
WIDE_FROM = 500_000
RARE_BELOW = 30
TOO_MANY_ITEMS = 100_000
HEAD_WIDTH = 32

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Of a checkpoint, what only the Trainer reads.
RESUMING_FILES = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json"]


@dataclass
class Bert4RecTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what masked item prediction needs; the other defaults are measured ones."""

    mask_ratio: float | None = field(
        default=None, metadata={"help": "Probability of each item to be masked; chosen from the lengths if left out."}
    )
    item_initialization: str = field(
        default="cooccurrence",
        metadata={
            "choices": ["cooccurrence", "random"],
            "help": "Where a new model starts: from which items stand near one another, or anywhere.",
        },
    )
    last_item_ratio: float = field(
        default=0.0, metadata={"help": "Share of training rows whose only mask is the last item."}
    )
    max_predictions: int | None = field(default=None, metadata={"help": "Most masks of a row; no limit if left out."})
    train_windows: str = field(
        default="proportional",
        metadata={
            "choices": ["newest", "random", "proportional", "sliding"],
            "help": "Of a history longer than the model, train on its newest items, on a random window an epoch, "
            "on as many random windows an epoch as it holds, or on every window of a sliding one.",
        },
    )
    window_step: float = field(
        default=0.5, metadata={"help": "How far a sliding window moves, as a share of the model's length."}
    )
    num_negatives: int = field(
        default=256, metadata={"help": "Items drawn a training batch, unless the item loss is softmax."}
    )
    negative_sampling: str = field(
        default="uniform",
        metadata={"choices": ["uniform", "popularity"], "help": "How they are drawn."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak of the learning rate; chosen from the model's width if left out."}
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=100, metadata={"help": "Steps, or below 1 a share of all steps."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Number of epochs."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Histories a training step; chosen from their number if left out."}
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Histories ranked at once."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "choices": ["random", "sequential", "group_by_length"],
            "help": "group_by_length: in random order, with batches of similar length, which need little padding.",
        },
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to rank the validation targets."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps, or below 1 a share of all steps."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 a share of all steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept, the best besides."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps, or below 1 a share of all steps."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    metric_for_best_model: str | None = field(default="NDCG@10", metadata={"help": "Metric of the best."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Send buffers to all processes at each step; they are equal from the start."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one; never if left out."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for
            # TrainingArguments want to be told: without, there is no bf16, and torchrun's processes train each alone.
            self.use_cpu = True
        if self.output_dir is None:
            raise ValueError("expected an output_dir, the folder that the model goes to: say --output_dir FOLDER")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps must be at least 1; got {self.gradient_accumulation_steps}")
        if not self.window_step > 0:
            raise ValueError(f"window_step must be above 0, a share of the model's length; got {self.window_step}")
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ValueError(
                f"nothing to train: max_steps is {self.max_steps}, num_train_epochs {self.num_train_epochs}"
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "evaluation in half precision would round the weights that are saved, and tie scores: leave out "
                "--bf16_full_eval and --fp16_full_eval; --bf16 true has half precision where it does no harm"
            )
        known = [*ranking_metrics(np.ones(1)), f"coverage@{COVERAGE_CUTOFF}", "loss"]
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}; got {best!r}")
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # One process would send slices of its batches to the others, which rows of other lengths do not allow.
            self.accelerator_config.dispatch_batches = False


class BriefProgress(ProgressCallback):
    """A progress bar, and one line an evaluation instead of fifteen metrics."""

    loss = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            config = model.config
            self.training_bar.write(
                f"{config.num_hidden_layers} layers of width {config.hidden_size}, {model.num_parameters():,} weights; "
                f"{state.max_steps:,} steps, {state.num_train_epochs} epochs"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        if not state.is_world_process_zero or self.training_bar is None:
            return
        self.training_bar.set_postfix_str(f"loss {self.loss:.3f}", refresh=False)
        if "eval_NDCG@10" in logs:
            self.training_bar.write(
                f"epoch {logs['epoch']:6.2f}   training loss {self.loss:.3f}   validation loss "
                f"{logs['eval_loss']:.3f}   HR@10 {logs['eval_HR@10']:.4f}   NDCG@10 {logs['eval_NDCG@10']:.4f}"
            )


class BestCheckpointHere(TrainerCallback):
    """After a run's folder was copied or moved, its best checkpoint is the one inside it, and not to be deleted."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint is not None:
            here = Path(args.output_dir) / Path(state.best_model_checkpoint).name
            if here.is_dir():
                state.best_model_checkpoint = str(here)


class SimilarLengthSampler(Sampler[int]):
    """Rows in random order, another each epoch, with batches of similar length: little is padding.

    Transformers' own goes from long to short over and over, and cannot be resumed in the middle of an epoch.

    Args:
        lengths: (rows,), of what the model gets.
        batch_size: Rows a batch.
        seed: Equal seeds give equal orders.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate's data loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = np.argsort(self.lengths * random.uniform(0.9, 1.1, len(self)))
        order = np.roll(order, random.integers(len(self)))  # the last batch, a short one, is not always of the longest
        whole = len(self) // self.batch_size * self.batch_size
        batches = random.permutation(order[:whole].reshape(-1, self.batch_size))
        return iter([*batches.ravel().tolist(), *order[whole:].tolist()])


class Bert4RecTrainer(Trainer):
    """The Transformers Trainer, evaluating with `search`, the function that serves.

    Evaluation rows come from `ranking_rows`. Metrics are those of `ranking_metrics` and coverage@10, the share of
    the catalogue that stands in anybody's ten recommendations. `predict` returns ranks and those recommendations.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class: As in `Trainer`; the collator is
            made from the arguments if it is None.
        protocol: Of the evaluation rows; metrics are stored in the model folder only with it.
        floors: Metrics of rankings without a model on the evaluation rows, by name, to stand in the learning curve.
        preparation: The content of preparation.json, kept in the model folder.
        publish_code: Whether every folder that is saved gets our code, see `publish.publish_code`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        protocol: Protocol | None = None,
        floors: Mapping[str, Mapping[str, float]] | None = None,
        preparation: Mapping[str, Any] | None = None,
        publish_code: bool = False,
        **kwargs: Any,
    ):
        if isinstance(args, Bert4RecTrainingArguments):
            args = copy(args)  # another run with these may choose otherwise
            rows = kwargs.get("train_dataset")
            if args.mask_ratio is None:
                has_lengths = isinstance(rows, Dataset) and len(rows)
                args.mask_ratio = default_mask_ratio(row_lengths(rows).mean() if has_lengths else math.inf)
            if args.learning_rate is None:
                args.learning_rate = default_learning_rate(model.config.hidden_size)
            if args.per_device_train_batch_size is None:
                batch_size = default_batch_size(len(rows) if isinstance(rows, Sized) else 0)
                args.per_device_train_batch_size = max(1, batch_size // args.world_size)
            if kwargs.get("data_collator") is None:
                kwargs["data_collator"] = DataCollatorForMaskedItemPrediction(
                    kwargs["processing_class"],
                    mask_ratio=args.mask_ratio,
                    last_item_ratio=args.last_item_ratio,
                    max_predictions=args.max_predictions,
                    max_length=model.config.max_position_embeddings,
                    random_windows=args.train_windows != "newest",
                    num_negatives=0 if model.config.item_loss == "softmax" else args.num_negatives,
                    negative_sampling=args.negative_sampling,
                )
        super().__init__(model, args, **{"compute_metrics": self.compute_ranking_metrics} | kwargs)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        self.protocol = protocol
        self.floors = floors or {}
        self.preparation = preparation
        self.publish_code = publish_code
        self.evaluation: dict[str, Any] | None = None
        self.evaluated_step: int | None = None  # whose weights the evaluation is of; None: no longer these

    def compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """HR, NDCG, MRR and coverage from `predictions=(ranks, recommended token ids)`."""
        ranks, recommended = prediction.predictions
        num_shown = np.unique(recommended[recommended > 0]).size
        num_items = self.processing_class.num_items
        return ranking_metrics(ranks) | {f"coverage@{COVERAGE_CUTOFF}": num_shown / num_items}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss a row, (ranks, recommended token ids), targets: no scores leave the step."""
        if prediction_loss_only or "exclude_ids" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        targets = inputs["labels"].amax(dim=1)
        with torch.no_grad(), self.compute_loss_context_manager():
            # No scores here: `search` makes them, of a part of the catalogue at a time.
            outputs = model(**inputs, item_ids=targets[:0])
            ranks, _, recommended = self.accelerator.unwrap_model(model).search(
                outputs.prediction_states,
                target_ids=targets,
                top_k=COVERAGE_CUTOFF,
                exclude_ids=inputs["exclude_ids"],
                candidate_ids=inputs.get("candidate_ids"),
            )
        # The Trainer takes the mean over rows, of which those whose target the catalogue lacks have no loss.
        is_known = targets != IGNORE_INDEX
        return outputs.loss.detach() * is_known.float().mean(), (ranks, recommended), targets

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if isinstance(output.label_ids, np.ndarray) and output.label_ids.ndim == 1:  # of `prediction_step` above
            num_known = max(1, int((output.label_ids != IGNORE_INDEX).sum()))
            output.metrics[f"{metric_key_prefix}_loss"] *= len(output.label_ids) / num_known
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.protocol is not None and eval_dataset is None:  # the protocol is that of the trainer's own rows
            self.evaluation = {
                "protocol": self.protocol.as_dict(),
                "metrics": result_metrics(metrics, metric_key_prefix),
            }
            self.evaluated_step = self.state.global_step
        return metrics

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_global_step != self.evaluated_step:
            self.evaluated_step = None

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        # Nor the item table: an item that no batch has would shrink all the same.
        tables = ("item_embeddings.weight", "decoder.weight")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(tables)]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(rows, Dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = np.minimum(row_lengths(rows), self.model.config.max_position_embeddings)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Of all processes together: they wait for one another at every step.
        return SimilarLengthSampler(lengths, self.args.train_batch_size * self.args.world_size, seed)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        if not isinstance(test_dataset, Dataset):
            return output
        places = np.argsort(by_length(test_dataset))  # of the rows among what was predicted

        def in_order(found: Any) -> Any:
            if isinstance(found, tuple):
                return tuple(in_order(part) for part in found)
            return None if found is None else found[places]

        return output._replace(predictions=in_order(output.predictions), label_ids=in_order(output.label_ids))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # So that little is padding; all processes share the batches of any one sampler.
        return (
            by_length(eval_dataset).tolist() if isinstance(eval_dataset, Dataset) else SequentialSampler(eval_dataset)
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        old_weights = _weights_digest(folder)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # A pickle with this machine's paths, and the Hub token if it was an argument; the recipe says the same.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        text = yaml.safe_dump(self.recipe(), sort_keys=True, allow_unicode=True)
        (folder / RECIPE_FILE).write_text(text, "utf-8")
        if self.preparation is not None:
            preparation = dict(self.preparation) | {"source": os.path.basename(self.preparation["source"])}
            text = json.dumps(preparation, indent=2, ensure_ascii=False) + "\n"
            (folder / PREPARATION_FILE).write_text(text, "utf-8")
        if _weights_digest(folder) != old_weights:
            (folder / EVALUATION_FILE).unlink(missing_ok=True)  # numbers of other weights
            (folder / TRAINING_FILE).unlink(missing_ok=True)
            (folder / CURVE_FILE).unlink(missing_ok=True)
        protocols = [record["protocol"] for record in read_evaluations(folder)]
        is_of_these_weights = self.evaluated_step == self.state.global_step
        if self.evaluation is not None and is_of_these_weights and self.evaluation["protocol"] not in protocols:
            add_evaluation(folder, self.evaluation)
        training = self.training_record()
        if training is not None:
            write_training(folder, training)
        if self.publish_code:
            publish_code_into(folder)
        write_model_card(folder, self.hub_model_id)

    def training_record(self) -> dict[str, Any] | None:
        """How the run went up to now, see `learning_curve.training_record`; None without evaluations or protocol."""
        if self.protocol is None:
            return None
        best = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step
        return training_record(self.state, self.args, self.protocol, self.floors, best or self.state.global_step)

    def recipe(self) -> dict[str, Any]:
        """All arguments and the architecture, as `bert4rec train --config` takes them."""
        arguments = {
            name: value
            for name, value in self.args.to_dict().items()
            if value is not None
            and name not in NO_RECIPE
            and not name.startswith(("hub_", "_"))
            and self.args.__dataclass_fields__.get(name) is not None
            and self.args.__dataclass_fields__[name].init
        }
        config = self.model.config
        architecture = {
            name: getattr(config, name)
            for name in Bert4RecConfig.__annotations__
            if name not in DERIVED_FIELDS and hasattr(config, name)
        }
        return json.loads(json.dumps(arguments | architecture, default=str))

    def create_model_card(
        self,
        *,
        model_name: str | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md of the output folder from what the folder says.

        `push_to_hub` calls this with the arguments that it does not know itself: `push_to_hub(license="mit")`.
        """
        if self.is_world_process_zero():
            metadata = {"model_name": model_name, "license": license, "language": language, "tags": tags}
            write_model_card(self.args.output_dir, self.hub_model_id, **metadata)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the checkpoint, which is a model folder, as the model; and as `hub_strategy` says, whole beside it."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        # Old checkpoints are deleted after this: nothing may still be reading them.
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        pushes: list[tuple[str | None, list[str] | None]] = [(None, RESUMING_FILES)]
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            pushes.append(("last-checkpoint", None))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            pushes.append((Path(checkpoint_folder).name, None))
        jobs = [
            upload_folder(
                repo_id=self.hub_model_id,
                folder_path=checkpoint_folder,
                path_in_repo=path,
                ignore_patterns=ignored,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                run_as_future=True,
            )
            for path, ignored in pushes
        ]
        self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        pushed, self.push_in_progress = getattr(self, "push_in_progress", None), None
        for error in (job.exception() for job in (pushed.jobs if pushed else ())):
            if error is not None:  # training goes on, and ends with a push of the whole
                logger.warning("a checkpoint could not be pushed: %s", error)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        # As above: with save_total_limit=1, the last checkpoint is deleted here.
        self._finish_current_push()
        return super()._finalize_training(*args)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for what is allocated next, in the whole process; elsewhere this does nothing.

    Large tensors are given back to the system otherwise, at every step, and each of their pages is faulted in anew.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


def _weights_digest(folder: Path) -> str:
    """The same for the same weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def row_lengths(rows: Dataset) -> np.ndarray:
    """(rows,), of their `input_ids`."""
    return pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy(zero_copy_only=False)


def by_length(rows: Dataset) -> np.ndarray:
    """Numbers of the rows, the shortest first."""
    return row_lengths(rows).argsort(kind="stable")


def default_mask_ratio(mean_length: float) -> float:
    """.2, or .4 where rows have fewer than 20 items on average, of which a fifth is hardly more than one."""
    return 0.4 if mean_length < 20 else 0.2


def default_learning_rate(hidden_size: int) -> float:
    """.002, or .001 for a model 256 wide or wider."""
    return 2e-3 if hidden_size < 256 else 1e-3


def default_batch_size(num_rows: int) -> int:
    """Histories a step of all processes together: 32, doubled while an epoch has more than 500 steps, 1,024 at most.

    Small batches learn fastest a history; a large log has enough histories for larger ones.
    """
    batch_size = 32
    while batch_size < 1024 and num_rows > 500 * batch_size:
        batch_size *= 2
    return batch_size


def default_architecture(num_events: int, num_items: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of `Bert4RecConfig`, what a new model has unless it is told; benchmarks/ablations.md has what it rests on.

    64 wide, 128 from half a million training events on; 256 where items are rare, with fewer than 30 events each, of
    at most 100,000; dropout .1, or .5 where they are rare; heads of 32; gated SiLU feed-forward layers with as many
    weights as plain ones four times as wide have; fixed vectors of 512 where items are rare, of at most 100,000.

    Args:
        num_events, num_items: Of the training part and the catalogue.
        given: Fields that are told, from which the others follow.
    """
    are_rare = _are_rare(num_events, num_items)
    hidden_size = 64 if num_events < WIDE_FROM else 128
    cooccurrence_size = 0
    if are_rare and num_items <= TOO_MANY_ITEMS:
        hidden_size, cooccurrence_size = 256, 512
    hidden_size = given.get("hidden_size", hidden_size)
    chosen: dict[str, Any] = {
        "hidden_size": hidden_size,
        "hidden_dropout_prob": 0.5 if are_rare else 0.1,
        "cooccurrence_size": cooccurrence_size,
    }
    if hidden_size % HEAD_WIDTH == 0:
        chosen["num_attention_heads"] = hidden_size // HEAD_WIDTH
    if given.get("gated_feed_forward", True):
        width = max(1, 8 * hidden_size // 3 // HEAD_WIDTH) * HEAD_WIDTH
        chosen |= {"gated_feed_forward": True, "hidden_act": "silu", "intermediate_size": width}
    else:
        chosen["intermediate_size"] = 4 * hidden_size
    return chosen | dict(given)


def _are_rare(num_events: int, num_items: int) -> bool:
    return num_events < RARE_BELOW * num_items


def train_prepared(
    data: str | os.PathLike,
    args: Bert4RecTrainingArguments,
    model_name_or_path: str | os.PathLike | None = None,
    *,
    publish_code: bool = False,
    **architecture: Any,
) -> Bert4RecTrainer:
    """From a prepared folder to a model folder, `args.output_dir`.

    Warns at the end of a run that was still rising, or that has not learnt more than popularity. Where nobody has a
    validation target (`--split none`, `--validation false`), nothing is evaluated, and the last step is the model.

    Args:
        data: The prepared folder.
        args: `resume_from_checkpoint` is a checkpoint's folder, or "last".
        model_name_or_path: A model to go on from. Its token ids stay; items that are new come behind them.
        publish_code: Whether the folder gets our code, see `publish.publish_code`.
        architecture: Fields of `Bert4RecConfig`, for a new model; the others as `default_architecture` has them.

    Returns:
        The trainer, with the best model.

    Raises:
        ValueError: If a folder is not what it should be, if `output_dir` holds something else, or if there is to be
            early stopping without validation targets.
    """
    check_output(args.output_dir, args.resume_from_checkpoint)
    check_prepared(data)
    set_seed(args.seed)
    if model_name_or_path is None:
        histories, tokenizer, preparation = read_prepared(data)
        derived = {
            "max_position_embeddings": preparation["max_length"],
            "filter_seen_items": preparation["filter_seen_items"],
        }
        num_events, num_items = int(histories.is_training().sum()), tokenizer.num_items
        if args.item_initialization == "random":
            architecture = {"cooccurrence_size": 0} | architecture
        chosen = default_architecture(num_events, num_items, architecture)
        config = Bert4RecConfig(vocab_size=len(tokenizer), **(derived | chosen))
        model = Bert4RecForMaskedItemPrediction(config)
        if args.item_initialization == "cooccurrence":
            # The mean saves small logs two thirds of their epochs; large ones end no better, and rare items worse.
            with_mean = num_events < WIDE_FROM and not _are_rare(num_events, num_items)
            start_from_cooccurrence(model, histories, num_items, with_mean=with_mean, seed=args.seed)
        if config.cooccurrence_size:
            keep_cooccurrence(model, histories, num_items, seed=args.seed)
        tokenizer.model_max_length = config.max_position_embeddings
    else:
        model = load_model(model_name_or_path)
        other = [f"{name}={value}" for name, value in architecture.items() if getattr(model.config, name) != value]
        if other:
            raise ValueError(
                f"a model that goes on training keeps its architecture; {model_name_or_path} has not "
                f"{', '.join(other)}: leave that out"
            )
        tokenizer = Bert4RecTokenizer.from_pretrained(model_name_or_path)
        catalogue, old_items = Bert4RecTokenizer.from_pretrained(data), set(tokenizer.items)
        titles = dict(zip(catalogue.items, catalogue.titles or [], strict=False))
        model.add_items(tokenizer, catalogue.items, {item: title for item, title in titles.items() if title})
        tokenizer.set_counts(dict(zip(catalogue.items, catalogue.counts, strict=True)))
        histories, tokenizer, preparation = read_prepared(data, tokenizer)
        if not old_items.intersection(catalogue.items):
            logger.warning("%s knows none of the items of %s: all of them are new", model_name_or_path, data)
    config = model.config
    validation = ranking_rows(
        histories,
        tokenizer,
        "validation",
        filter_seen_items=config.filter_seen_items,
        max_length=config.max_position_embeddings,
    )
    protocol, of_floors = None, {}
    if len(validation):
        protocol = Protocol.of(histories, preparation, "validation", tokenizer.num_items, config.filter_seen_items)
        of_floors = {"popularity": ranking_metrics(popularity_ranks(validation, histories, tokenizer.num_items))}
    elif args.early_stopping_patience is not None:
        raise ValueError(
            f"{data} has no validation targets to stop early by: leave out --early_stopping_patience and say how long "
            "with --num_train_epochs or --max_steps"
        )
    else:
        logger.warning("%s has no validation targets: nothing is evaluated, the last step is the model", data)
        args = copy(args)  # another run with these may have some
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
    trainer = Bert4RecTrainer(
        model,
        args,
        train_dataset=training_rows(
            histories,
            max_length=config.max_position_embeddings,
            windows=args.train_windows if args.train_windows in ("proportional", "sliding") else "whole",
            window_step=args.window_step,
        ),
        eval_dataset=validation,
        processing_class=tokenizer,
        protocol=protocol,
        floors=of_floors,
        preparation=preparation,
        publish_code=publish_code,
    )
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(BriefProgress)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None:
        checkpoint = get_last_checkpoint(args.output_dir) if checkpoint == "last" else checkpoint
        check_resumable(checkpoint, args, config, tokenizer)
        trainer.add_callback(BestCheckpointHere)
    trainer.train(resume_from_checkpoint=checkpoint)
    if len(validation) and trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()  # the folder is the main process's work, and may be read at once
    training = trainer.training_record()
    if training is not None and trainer.is_world_process_zero():
        for warning in training["warnings"]:
            logger.warning(warning)
    return trainer


def evaluate_prepared(
    model: str | os.PathLike,
    data: str | os.PathLike,
    part: str = "test",
    *,
    protocol: str = "full",
    per_device_eval_batch_size: int = 256,
    use_cpu: bool = False,
    disable_tqdm: bool = False,
    report: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Rank the targets of a prepared folder with a model and with the floors.

    Args:
        model: A model folder or Hub id.
        data: The prepared folder.
        part: "validation" or "test".
        protocol: "full", or "paper": among 100 items drawn by popularity, see `splits.sampled_candidates`, with
            metrics whose names say so.
        per_device_eval_batch_size, use_cpu, disable_tqdm: As in `TrainingArguments`.
        report: A folder for report.json, report.md and report.png, see `report.evaluation_report`; the full protocol
            only.

    Raises:
        ValueError: If a folder is not what it should be, if nobody has a target, or for a report of sampled ranks.

    Returns:
        The record {protocol, metrics, floors}, and groups if users without a past are among them. It is written
        into the model's folder as well if that is a local one.
    """
    check_prepared(data)
    if report is not None:
        if protocol == "paper":
            raise ValueError("a report is of the full ranking: leave out --protocol paper or --report")
        check_report_folder(report)
    loaded = load_model(model)
    tokenizer = Bert4RecTokenizer.from_pretrained(model)
    histories, tokenizer, preparation = read_prepared(data, tokenizer)
    if not (histories.item_ids >= FIRST_ITEM_ID).any():
        catalogues = (tokenizer.items, Bert4RecTokenizer.from_pretrained(data).items)
        known, asked = (", ".join(map(repr, items[:3])) for items in catalogues)
        raise ValueError(
            f"{model} knows none of the items of {data}: its ids look like {known}, those of the data like {asked}"
        )
    _warn_of_other_preparation(model, preparation)
    policy, length = loaded.config.filter_seen_items, loaded.config.max_position_embeddings
    rows = ranking_rows(histories, tokenizer, part, filter_seen_items=policy, max_length=length)
    if not len(rows):
        raise ValueError(f"no user of {data} has a {part} target")
    if protocol == "paper":
        rows = sampled_candidates(rows, histories)
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Bert4RecTrainer(
            loaded,
            Bert4RecTrainingArguments(
                nowhere,
                per_device_eval_batch_size=per_device_eval_batch_size,
                use_cpu=use_cpu,
                disable_tqdm=disable_tqdm,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
            ),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # the record says it all
        prediction = trainer.predict(rows)
    described = Protocol.of(histories, preparation, part, tokenizer.num_items, policy)
    rankings, measure = {"model": prediction.predictions[0]}, ranking_metrics
    if protocol == "paper":
        described, measure = (
            replace(described, candidates="the target and 100 items drawn by popularity"),
            sampled_metrics,
        )
        metrics = measure(rankings["model"])
    else:
        rankings |= floors(rows, histories, tokenizer.num_items)
        metrics = result_metrics(prediction.metrics, "test")
    record: dict[str, Any] = {
        "protocol": described.as_dict(),
        "metrics": metrics,
        "floors": {name: measure(ranks) for name, ranks in rankings.items() if name != "model"},
    }
    has_past = np.asarray(rows["history_length"]) > 0
    if not has_past.all():
        record["groups"] = {
            f"{int(users.sum())} users {title} a past": {
                name: measure(ranks[users]) for name, ranks in rankings.items()
            }
            for title, users in (("with", has_past), ("without", ~has_past))
        }
    if trainer.is_world_process_zero() and report is not None:
        recommended = prediction.predictions[1]
        write_report(report, evaluation_report(rows, histories, rankings, recommended, described, tokenizer.num_items))
    if trainer.is_world_process_zero() and os.path.isdir(model):
        add_evaluation(model, record)
        write_model_card(model)
    return record


def _warn_of_other_preparation(model: str | os.PathLike, preparation: Mapping[str, Any]) -> None:
    """What held out nothing, or other events, has trained on targets; that it is the same log is all we can see."""
    own = Path(model) / PREPARATION_FILE
    if not own.is_file():
        return
    trained = json.loads(own.read_text("utf-8"))
    other = [
        f"{name} {trained[name]}, here {preparation[name]}"
        for name in ("split", "filters")
        if trained[name] != preparation[name]
    ]
    if other and trained["source"] == os.path.basename(preparation["source"]):
        logger.warning(
            "%s was trained on another preparation of %s (%s): what it trained on may hold targets of this one",
            model, trained["source"], "; ".join(other),
        )  # fmt: skip


def load_model(model: str | os.PathLike) -> Bert4RecForMaskedItemPrediction:
    """A model folder or Hub id; raises ValueError for a folder that is none."""
    if os.path.isdir(model):
        config = Path(model) / "config.json"
        kind = json.loads(config.read_text("utf-8")).get("model_type") if config.is_file() else None
        if kind != Bert4RecConfig.model_type:
            found = f"its config.json says model_type {kind!r}" if kind else "it has no config.json with a model_type"
            raise ValueError(f"{model} is not a BERT4Rec model folder ({found}): make one with bert4rec train")
    try:
        return Bert4RecForMaskedItemPrediction.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"{model} is neither a model folder nor a model that the Hub gives: {error}") from error


def check_resumable(
    checkpoint: str | None, args: TrainingArguments, config: Bert4RecConfig, tokenizer: Bert4RecTokenizer
) -> None:
    """Raise if a checkpoint is none, is of another model, or is beyond the end of the run that would go on from it."""
    if checkpoint is None or not (Path(checkpoint) / TRAINER_STATE_NAME).is_file():
        where = checkpoint or f"{args.output_dir}, where the last one was asked for,"
        raise ValueError(
            f"{where} is no checkpoint to resume from: name its folder, or leave --resume_from_checkpoint out"
        )
    if Bert4RecTokenizer.from_pretrained(checkpoint).items != tokenizer.items:
        raise ValueError(
            f"{checkpoint} was trained on another catalogue: resume with the --data (and --model_name_or_path) that it "
            "began with, or go on to new data with --model_name_or_path in another --output_dir"
        )
    began = Bert4RecConfig.from_pretrained(checkpoint)
    other = [
        f"{name}={getattr(began, name)}, not {getattr(config, name)}"
        for name in Bert4RecConfig.__annotations__
        if getattr(began, name) != getattr(config, name)
    ]
    if other:
        raise ValueError(f"{checkpoint} has {'; '.join(other)}: a run that is resumed keeps its architecture")
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    is_beyond = state.global_step > args.max_steps if args.max_steps > 0 else state.epoch > args.num_train_epochs
    if is_beyond:
        raise ValueError(
            f"{checkpoint} is at epoch {state.epoch:g}, step {state.global_step}, beyond the end that was asked for "
            f"(num_train_epochs={args.num_train_epochs:g}, max_steps={args.max_steps}): ask for more"
        )


def check_output(folder: str | os.PathLike, resume_from_checkpoint: str | None) -> None:
    """Raise if a new training run would write over something."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another --output_dir")
    names = sorted(path.name for path in folder.iterdir())
    checkpoints = [name for name in names if name.startswith("checkpoint-")]
    if not names or (resume_from_checkpoint and checkpoints):
        return
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    hint = ", or go on with --resume_from_checkpoint last" if checkpoints else ""
    raise ValueError(f"{folder} is not empty ({shown}); choose another --output_dir{hint}")
