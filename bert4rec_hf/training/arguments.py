"""`Bert4RecTrainingArguments`: the Trainer's arguments, and the arguments of masked item prediction."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy

from ..defaults import STREAMED_EVAL_SAMPLES
from ..evaluation.metrics import COVERAGE_CUTOFF, ranking_metrics, sampled_metrics

# Values of arguments that a plain Trainer uses if they are left out. `Bert4RecTrainer` chooses the first two from the
# log. `train_prepared` chooses the number of epochs, and all but the batch size for an update.
FALLBACKS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 20.0,
    "warmup_steps": 100.0,
}


@dataclass
class Bert4RecTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the arguments of masked item prediction, and with defaults that were measured for it.

    Some arguments have an effect only in `train_prepared`, which creates the model and the training rows:
    `item_initialization`, `window_step`, `update_rows`, `streaming`, `max_eval_samples`, `calibrate`, and every value
    of `train_windows` except "newest".
    """

    mask_ratio: float | None = field(
        default=None,
        metadata={"help": "Probability that an item is masked; chosen from the history lengths if left out."},
    )
    item_initialization: str = field(
        default="cooccurrence",
        metadata={
            "choices": ["cooccurrence", "random"],
            "help": "Initial item embeddings of a new model: from co-occurrence in the training data, or random.",
        },
    )
    last_item_ratio: float = field(
        default=0.0, metadata={"help": "Share of training rows whose only mask is the last item."}
    )
    max_predictions: int | None = field(
        default=None, metadata={"help": "Maximum number of masks in a row; no limit if left out."}
    )
    train_windows: str = field(
        default="proportional",
        metadata={
            "choices": ["newest", "random", "proportional", "sliding"],
            "help": "Which part of a history longer than the model's input trains. newest: its newest items; random: "
            "one random window per epoch; proportional: ceil(history length / input length) random windows per epoch; "
            "sliding: all windows of a sliding window.",
        },
    )
    window_step: float = field(
        default=0.5, metadata={"help": "Distance between two sliding windows, as a share of the model's input length."}
    )
    update_rows: str = field(
        default="new",
        metadata={
            "choices": ["new", "all"],
            "help": "Which rows train in an update. new: the histories with events later than those that the model has "
            "seen, and as many old rows; all: all rows, with the other defaults of a new model.",
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Leave the histories on disk and read training rows as they are needed, for a log larger than "
            "memory. Rows are shuffled in buffers instead of all together."
        },
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of users whose validation targets are ranked, drawn at random. All if left out; "
            f"with streaming, {STREAMED_EVAL_SAMPLES}."
        },
    )
    calibrate: bool = field(
        default=True,
        metadata={
            "help": "After training, choose the weights of the counted scores (transition_weight, next_item_weight, "
            "repeat_weight, recency_weight, popularity_weight) on the validation targets, if this pays. Without, the "
            "weights stay as they are given or chosen from the log."
        },
    )
    num_negatives: int = field(
        default=256, metadata={"help": "Number of negative items drawn per batch; item loss softmax needs none."}
    )
    negative_sampling: str = field(
        default="uniform",
        metadata={"choices": ["uniform", "popularity"], "help": "How negative items are drawn."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate; chosen from the model's width if left out."}
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "Number of warm-up steps; a value below 1 is a share of all steps; 100 if left out, or .1 for an "
            "update."
        },
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Number of epochs; if left out, 20, or 10 where items are rare. An update of a model with new "
            "events has 0: the network stays, and catalogue, counts and their weights are updated."
        },
    )
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "Number of rows per training step; chosen from the number of rows if left out."},
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Number of histories ranked at once."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "choices": ["random", "sequential", "group_by_length"],
            "help": "Order of the training rows. group_by_length: random order, in batches of similar length, which "
            "need little padding.",
        },
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to rank the validation targets."})
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Steps between two evaluations; a value below 1 is a share of all steps."}
    )
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint."})
    save_steps: float = field(
        default=0.1, metadata={"help": "Steps between two checkpoints; a value below 1 is a share of all steps."}
    )
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Number of checkpoints to keep, in addition to the best one."}
    )
    logging_steps: float = field(
        default=0.02, metadata={"help": "Steps between two logs; a value below 1 is a share of all steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Leave losses that are not finite out of the log. The check waits for the GPU in each step."},
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Load the best checkpoint after training."})
    metric_for_best_model: str | None = field(
        default="NDCG@10", metadata={"help": "Metric that decides which checkpoint is the best."}
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={"help": "Whether a higher metric_for_best_model is better; if left out, true unless it is a loss."},
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False,
        metadata={"help": "Broadcast buffers at each step, which is not needed: buffers do not change in training."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric; never if left out."},
    )

    def __post_init__(self) -> None:
        # An argument that is left out gets the value for a plain Trainer; `Bert4RecTrainer` chooses from the log.
        self.chosen_from_log = {name for name in FALLBACKS if getattr(self, name) is None}
        for name in self.chosen_from_log:
            setattr(self, name, FALLBACKS[name])
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # pinned memory is of use only with an accelerator
            # Without use_cpu, TrainingArguments refuses bf16, and the processes of torchrun train independently.
            self.use_cpu = True
        if self.output_dir is None:
            raise ValueError("expected an output_dir, the folder to write the model to: add --output_dir FOLDER")
        if self.gradient_accumulation_steps < 1:
            raise ValueError(f"gradient_accumulation_steps must be at least 1; got {self.gradient_accumulation_steps}")
        if not self.window_step > 0:
            raise ValueError(f"window_step must be above 0, a share of the model's length; got {self.window_step}")
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(f"max_eval_samples must be at least 1; got {self.max_eval_samples}")
        if self.max_steps == 0 or (self.max_steps < 0 and (self.num_train_epochs or 0) < 0):
            raise ValueError(
                "there are no steps to train; expected max_steps or num_train_epochs above 0; got "
                f"max_steps={self.max_steps}, num_train_epochs={self.num_train_epochs}"
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "evaluation in half precision rounds the weights that are saved, and ties scores: leave out "
                "--bf16_full_eval and --fp16_full_eval; --bf16 true has half precision where it does no harm"
            )
        for name in Bert4RecTrainingArguments.__annotations__:
            choices, value = self.__dataclass_fields__[name].metadata.get("choices"), getattr(self, name)
            if choices is not None and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if self.prediction_loss_only or self.batch_eval_metrics or not self.eval_do_concat_batches:
            raise ValueError(
                "the metrics are computed from all ranks together: leave out --prediction_loss_only, "
                "--batch_eval_metrics and --eval_do_concat_batches"
            )
        if self.eval_strategy == "no":
            if self.early_stopping_patience is not None:
                raise ValueError(
                    "early_stopping_patience needs evaluations; got eval_strategy no: leave one of the two out"
                )
            self.load_best_model_at_end = False  # without evaluations, no checkpoint is known to be the best
        if self.save_strategy == "no":
            self.load_best_model_at_end = False  # there are no checkpoints to load
        is_accelerator_config_left_out = self.accelerator_config is None
        super().__post_init__()
        # Transformers does not always list these two integrations, even if they are installed.
        available = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
        lacking = set(self.report_to) & INTEGRATION_TO_CALLBACK.keys() - available
        if lacking:
            raise ValueError(
                f"report_to names {', '.join(sorted(lacking))}, which is not installed: install it, or leave it out"
            )
        if self.accelerator_config.dispatch_batches is None:
            # With dispatching, one process sends slices of its batches to the others, which fails for rows of
            # different lengths.
            self.accelerator_config.dispatch_batches = False
        if is_accelerator_config_left_out:
            # A copy from pinned memory to a GPU can be queued. Otherwise it waits for all earlier steps.
            self.accelerator_config.non_blocking = self.dataloader_pin_memory

    def is_left_out(self, name: str) -> bool:
        """Whether one of `FALLBACKS` was left out when the arguments were created, and has not been set since."""
        return name in self.chosen_from_log and getattr(self, name) == FALLBACKS[name]

    def evaluate_nothing(self) -> None:
        """Switch off evaluation, for a run without evaluation rows. The model is then that of the last step."""
        if self.early_stopping_patience is not None:
            raise ValueError(
                "early_stopping_patience needs evaluations; got no evaluation rows: leave it out, or give an "
                "eval_dataset"
            )
        self.eval_strategy, self.load_best_model_at_end = IntervalStrategy.NO, False

    def check_metric(self, rows: Any = None) -> None:
        """Raise ValueError unless the trainer computes `metric_for_best_model` for these evaluation rows."""
        if isinstance(rows, Dataset) and "candidate_ids" in rows.column_names:
            known = [*sampled_metrics(np.ones(1)), "loss"]
        else:
            known = [*ranking_metrics(np.ones(1)), f"coverage@{COVERAGE_CUTOFF}", "loss"]
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        # With several evaluation sets, the name of the metric starts with the name of one of them.
        if not any(best == name or best.endswith(f"_{name}") for name in known):
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}; got {best!r}")
