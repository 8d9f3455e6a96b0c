"""`Bert4RecTrainingArguments`: the Trainer's arguments, with those of masked item prediction."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy

from ..evaluation.metrics import COVERAGE_CUTOFF, ranking_metrics, sampled_metrics

# Values of arguments that were left out, where no `Bert4RecTrainer` chooses them from the log.
FALLBACKS: dict[str, Any] = {"learning_rate": 2e-3, "per_device_train_batch_size": 32}


@dataclass
class Bert4RecTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what masked item prediction needs; the other defaults are measured ones.

    Where a model starts and what its rows are is for `train_prepared`, which makes them: `item_initialization`,
    `window_step`, and of `train_windows` all but "newest".
    """

    mask_ratio: float | None = field(
        default=None, metadata={"help": "Probability of each item to be masked; chosen from the lengths if left out."}
    )
    item_initialization: str = field(
        default="cooccurrence",
        metadata={
            "choices": ["cooccurrence", "random"],
            "help": "Item embeddings of a new model: from co-occurrence in the training data, or random.",
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
            "help": "For a history longer than the model's input, train on: its newest items; one random window an "
            "epoch; ceil(its length / the model's) of them; or every position of a sliding window.",
        },
    )
    window_step: float = field(
        default=0.5, metadata={"help": "How far a sliding window moves, as a share of the model's length."}
    )
    num_negatives: int = field(
        default=256, metadata={"help": "Negative items drawn per training batch; unused with item loss softmax."}
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
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Histories ranked at once."})
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
    metric_for_best_model: str | None = field(default="NDCG@10", metadata={"help": "Metric that picks the best."})
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether more of it is better; so it is of all but a loss, if left out."}
    )
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Send buffers to all processes at each step; they are equal from the start."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one; never if left out."}
    )

    def __post_init__(self) -> None:
        # What was left out has the value that the plain Trainer gets; `Bert4RecTrainer` chooses from the log.
        self.chosen_from_log = {name for name in FALLBACKS if getattr(self, name) is None}
        for name in self.chosen_from_log:
            setattr(self, name, FALLBACKS[name])
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
        for name in Bert4RecTrainingArguments.__annotations__:
            choices, value = self.__dataclass_fields__[name].metadata.get("choices"), getattr(self, name)
            if choices is not None and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if self.prediction_loss_only or self.batch_eval_metrics or not self.eval_do_concat_batches:
            raise ValueError(
                "the metrics are those of all ranks together: leave out --prediction_loss_only, --batch_eval_metrics "
                "and --eval_do_concat_batches"
            )
        if self.eval_strategy == "no":
            if self.early_stopping_patience is not None:
                raise ValueError("early_stopping_patience needs evaluations: leave out one of it and eval_strategy no")
            self.load_best_model_at_end = False  # nothing says which is the best
        if self.save_strategy == "no":
            self.load_best_model_at_end = False  # nor is it kept
        super().__post_init__()
        # Those two are not always among the available where they are.
        available = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
        lacking = set(self.report_to) & INTEGRATION_TO_CALLBACK.keys() - available
        if lacking:
            raise ValueError(
                f"report_to names {', '.join(sorted(lacking))}, which is not installed: install it, or leave it out"
            )
        if self.accelerator_config.dispatch_batches is None:
            # One process would send slices of its batches to the others, which rows of other lengths do not allow.
            self.accelerator_config.dispatch_batches = False

    def evaluate_nothing(self) -> None:
        """For a run without evaluation rows: its last step is the model."""
        if self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs evaluations: leave it out, or give evaluation rows")
        self.eval_strategy, self.load_best_model_at_end = IntervalStrategy.NO, False

    def check_metric(self, rows: Any = None) -> None:
        """Raise unless `metric_for_best_model` is one that the trainer computes by itself, of these rows."""
        if isinstance(rows, Dataset) and "candidate_ids" in rows.column_names:
            known = [*sampled_metrics(np.ones(1)), "loss"]
        else:
            known = [*ranking_metrics(np.ones(1)), f"coverage@{COVERAGE_CUTOFF}", "loss"]
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        # Before it may stand the name of one of several evaluation sets.
        if not any(best == name or best.endswith(f"_{name}") for name in known):
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}; got {best!r}")
