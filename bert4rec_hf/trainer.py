"""`Bert4RecTrainer`: the Transformers Trainer that evaluates by ranking and writes the model card."""

import ctypes
import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sized
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
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
    TrainingArguments,
)
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import (
    EvalLoopOutput,
    HubStrategy,
    PredictionOutput,
    TrainOutput,
    has_length,
)
from transformers.utils.hub import PushInProgress

from .configuration_bert4rec import DERIVED_FIELDS, FIRST_ITEM_ID, Bert4RecConfig
from .data_collator import DataCollatorForMaskedItemPrediction
from .defaults import default_batch_size, default_learning_rate, default_mask_ratio
from .learning_curve import training_record, write_training
from .losses import IGNORE_INDEX
from .metrics import (
    COVERAGE_CUTOFF,
    Protocol,
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
    write_file,
    write_model_card,
)
from .publish import publish_code as publish_code_into
from .splits import (
    PREPARATION_FILE,
)
from .tokenization_bert4rec import Bert4RecTokenizer

logger = logging.getLogger(__name__)

# Of one machine or one run, or what another argument says, no part of a recipe.
NO_RECIPE = {
    "output_dir", "run_name", "resume_from_checkpoint", "push_to_hub", "logging_dir", "local_rank", "deepspeed",
    "use_cpu", "dataloader_pin_memory", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "project",
    "greater_is_better", "eval_on_start",
}  # fmt: skip

# What only `train_prepared` reads.
OF_PREPARED = {"item_initialization", "train_windows", "window_step"}

# Bytes of a model from which on freed memory is given back: gaps of that size take more than they save.
LARGE_MODEL = 2**27

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Of a checkpoint, what only the Trainer reads.
RESUMING_FILES = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json"]


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
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last would leave users out of every evaluation: leave it out")
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
            trained = "before the first step" if math.isnan(self.loss) else f"training loss {self.loss:.3f}"
            self.training_bar.write(
                f"epoch {logs['epoch']:6.2f}   {trained}   validation loss {logs['eval_loss']:.3f}   "
                f"HR@10 {logs['eval_HR@10']:.4f}   NDCG@10 {logs['eval_NDCG@10']:.4f}"
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


class ItemLabelSmoother(LabelSmoother):
    """Transformers' own, over items: the logits of special tokens are so low that their mean would be all of it."""

    def __call__(self, model_output: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        items = {"logits": model_output["logits"][..., FIRST_ITEM_ID:]}
        labels = torch.where(labels < FIRST_ITEM_ID, IGNORE_INDEX, labels - FIRST_ITEM_ID)
        return super().__call__(items, labels, *args, **kwargs)


class Bert4RecTrainer(Trainer):
    """The Transformers Trainer, evaluating with `search`, the function that serves.

    Evaluation rows come from `ranking_rows`. Metrics are those of `ranking_metrics` and coverage@10, the share of
    the catalogue that stands in anybody's ten recommendations. `predict` returns ranks and those recommendations.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init: As in `Trainer`; the
            collator is made from `Bert4RecTrainingArguments` if it is None.
        protocol: Of the evaluation rows; metrics are stored in the model folder only with it.
        floors: Metrics of rankings without a model on the evaluation rows, or their ranks, by name, to stand in the
            learning curve.
        preparation: The content of preparation.json, kept in the model folder.
        publish_code: Whether every folder that is saved gets our code, see `publish.publish_code`.

    Raises:
        ValueError: Without a collator and what it is made from, `Bert4RecTrainingArguments` and a `processing_class`.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Bert4RecTokenizer | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        *,
        protocol: Protocol | None = None,
        floors: Mapping[str, Mapping[str, float] | np.ndarray] | None = None,
        preparation: Mapping[str, Any] | None = None,
        publish_code: bool = False,
        **kwargs: Any,
    ):
        if model is None and model_init is None:
            raise ValueError("expected a model or a model_init that makes one")
        self.model_init = model_init
        config: Bert4RecConfig = (self.call_model_init() if model is None else model).config
        if processing_class is not None and len(processing_class) != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(processing_class)} token ids, the model {config.vocab_size}: make it with "
                "Bert4RecConfig(vocab_size=len(tokenizer)); model.add_items(tokenizer, items) lets both grow together"
            )
        self.chooses_learning_rate = isinstance(args, Bert4RecTrainingArguments) and args.learning_rate is None
        if isinstance(args, Bert4RecTrainingArguments):
            args = _chosen(args, config, train_dataset)
            if "compute_metrics" not in kwargs:
                args.check_metric(eval_dataset)
        if args is not None and args.n_gpu > 1:
            # DataParallel, which the Trainer would take, gives each GPU a part of the negatives of a batch.
            logger.warning("one of %d GPUs is used; accelerate launch -m bert4rec_hf train uses all", args.n_gpu)
            args._n_gpu = 1
        self.collates_by_args = data_collator is None
        if data_collator is None:
            data_collator = _collator(args, config, processing_class)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            **{"compute_metrics": self.compute_ranking_metrics} | kwargs,
        )
        if isinstance(args, Bert4RecTrainingArguments) and args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if self.args.label_smoothing_factor:
            if config.item_loss != "softmax":
                raise ValueError(f"label_smoothing_factor is for item_loss softmax alone; got {config.item_loss}")
            if config.filter_seen_items:
                logger.warning("with label_smoothing_factor the loss is over all items, seen ones among them")
            self.label_smoother: LabelSmoother | None = ItemLabelSmoother(self.args.label_smoothing_factor)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            keep_scores_whole(plugin)
        self.protocol = protocol
        self.floors = {
            name: found if isinstance(found, Mapping) else ranking_metrics(found)
            for name, found in (floors or {}).items()
        }
        self.preparation = preparation
        self.publish_code = publish_code
        self.evaluation: dict[str, Any] | None = None
        self.evaluated_step: int | None = None  # whose weights the evaluation is of; None: no longer these

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.evaluated_step = None
        if self.args.device.type == "cpu" and self.model.get_memory_footprint() < LARGE_MODEL:
            keep_freed_memory()
        return super().train(*args, **kwargs)

    def compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """HR, NDCG, MRR and coverage from `predictions=(ranks, recommended token ids)`."""
        found = prediction.predictions
        if not isinstance(found, tuple) or np.ndim(found[0]) != 1:
            raise ValueError("expected evaluation rows of ranking_rows, which have exclude_ids")
        ranks, recommended = found
        num_shown = np.unique(recommended[recommended > 0]).size
        num_items = self.model.config.vocab_size - FIRST_ITEM_ID
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
        self.ranks_sampled = "candidate_ids" in inputs
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

    def _hp_search_setup(self, trial: Any) -> None:
        """With a trial's masking and, for its width, learning rate too, in a search over hyperparameters."""
        if trial is not None and self.chooses_learning_rate:
            self.args.learning_rate = None
        super()._hp_search_setup(trial)
        if self.collates_by_args:
            self.data_collator = _collator(self.args, self.model.config, self.processing_class)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        args = getattr(self, "args", None)  # not there yet when the first model is made
        if args is not None and args.learning_rate is None:
            args.learning_rate = default_learning_rate(model.config.hidden_size)
        return model

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if self.args.world_size > 1 and not has_length(dataloader):
            raise ValueError(
                "several processes cannot tell the last rows of a stream from those that fill up its last batch: "
                "evaluate on a datasets.Dataset"
            )
        self.ranks_sampled = False
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if isinstance(output.label_ids, np.ndarray) and output.label_ids.ndim == 1:  # of `prediction_step` above
            num_known = max(1, int((output.label_ids != IGNORE_INDEX).sum()))
            output.metrics[f"{metric_key_prefix}_loss"] *= len(output.label_ids) / num_known
        if (
            self.ranks_sampled
            and self.compute_metrics == self.compute_ranking_metrics
            and isinstance(output.predictions, tuple)
        ):
            for name in result_metrics(output.metrics, metric_key_prefix).keys() - {"loss"}:
                del output.metrics[f"{metric_key_prefix}_{name}"]
            for name, value in sampled_metrics(output.predictions[0]).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # The protocol is that of the trainer's own rows, all of them: of several sets, each is evaluated by itself.
        if self.protocol is not None and eval_dataset is None and not isinstance(self.eval_dataset, dict):
            source = {"source": os.path.basename(self.preparation["source"])} if self.preparation else {}
            self.evaluation = source | {
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
        if self.args.train_sampling_strategy != "group_by_length" or not _has_lengths(rows):
            return super()._get_train_sampler(train_dataset)
        lengths = np.minimum(row_lengths(rows), self.model.config.max_position_embeddings)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Of all processes together: they wait for one another at every step.
        return SimilarLengthSampler(lengths, self.args.train_batch_size * self.args.world_size, seed)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        if not self._is_sorted(test_dataset):
            return output
        places = np.argsort(by_length(test_dataset))  # of the rows among what was predicted

        def in_order(found: Any) -> Any:
            if isinstance(found, tuple):
                return tuple(in_order(part) for part in found)
            return None if found is None else found[places]

        return output._replace(predictions=in_order(output.predictions), label_ids=in_order(output.label_ids))

    def _is_sorted(self, rows: Any) -> bool:
        """Whether rows are evaluated by length; somebody's own metrics may need them in their order."""
        return _has_lengths(rows) and self.compute_metrics == self.compute_ranking_metrics

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # So that little is padding; all processes share the batches of any one sampler.
        return by_length(eval_dataset).tolist() if self._is_sorted(eval_dataset) else SequentialSampler(eval_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        old_weights = _weights_digest(folder) if self.args.should_save else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # A pickle with this machine's paths, and the Hub token if it was an argument; the recipe says the same.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        write_file(folder / RECIPE_FILE, yaml.safe_dump(self.recipe(), sort_keys=True, allow_unicode=True))
        if self.preparation is not None:
            preparation = dict(self.preparation) | {"source": os.path.basename(self.preparation["source"])}
            write_file(folder / PREPARATION_FILE, json.dumps(preparation, indent=2, ensure_ascii=False) + "\n")
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
        write_model_card(folder, self.hub_model_id, self.processing_class)

    def training_record(self) -> dict[str, Any] | None:
        """How the run went up to now, see `learning_curve.training_record`; None without evaluations or protocol."""
        if self.protocol is None:
            return None
        best = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step
        return training_record(self.state, self.args, self.protocol, self.floors, best or self.state.global_step)

    def recipe(self) -> dict[str, Any]:
        """All arguments and the architecture, as `bert4rec train --config` takes them.

        Without a preparation, model and rows are somebody's own, and what `train_prepared` makes them of is left out.
        """
        left_out = NO_RECIPE if self.preparation is not None else NO_RECIPE | OF_PREPARED
        arguments = {
            name: value
            for name, value in self.args.to_dict().items()
            if value is not None
            and name not in left_out
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
        precision = self.accelerator.mixed_precision  # which an Accelerate configuration may have set
        arguments |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
        # The command line knows only whether, where TrainingArguments have made the words "all" and "no" of it.
        arguments["include_num_input_tokens_seen"] = arguments["include_num_input_tokens_seen"] != "no"
        origin = config._name_or_path  # of a model that goes on; a folder's name would mean another one elsewhere
        if origin and not os.path.exists(origin):
            arguments["model_name_or_path"] = origin
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
            write_model_card(self.args.output_dir, self.hub_model_id, self.processing_class, **metadata)

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


def _chosen(args: Bert4RecTrainingArguments, config: Bert4RecConfig, rows: Any) -> Bert4RecTrainingArguments:
    """A copy with what was left out chosen, since another run with these arguments may choose otherwise."""
    args = copy(args)
    if args.mask_ratio is None:
        has_lengths = _has_lengths(rows) and len(rows)
        lengths = np.minimum(row_lengths(rows), config.max_position_embeddings) if has_lengths else np.inf
        args.mask_ratio = default_mask_ratio(float(np.mean(lengths)))
    if args.learning_rate is None:
        args.learning_rate = default_learning_rate(config.hidden_size)
    if args.per_device_train_batch_size is None:
        batch_size = default_batch_size(len(rows) if isinstance(rows, Sized) else 0)
        args.per_device_train_batch_size = max(1, batch_size // args.world_size)
    return args


def _collator(
    args: TrainingArguments | None, config: Bert4RecConfig, tokenizer: Bert4RecTokenizer | None
) -> DataCollatorForMaskedItemPrediction:
    if not isinstance(args, Bert4RecTrainingArguments):
        raise ValueError("expected Bert4RecTrainingArguments or a data_collator: masking has its own arguments")
    if tokenizer is None:
        raise ValueError("expected a processing_class, the Bert4RecTokenizer of the catalogue")
    assert args.mask_ratio is not None  # for the type checker: it is chosen by now
    return DataCollatorForMaskedItemPrediction(
        tokenizer,
        mask_ratio=args.mask_ratio,
        last_item_ratio=args.last_item_ratio,
        max_predictions=args.max_predictions,
        max_length=config.max_position_embeddings,
        random_windows=args.train_windows != "newest",
        num_negatives=0 if config.item_loss == "softmax" else args.num_negatives,
        negative_sampling=args.negative_sampling,
    )


def keep_scores_whole(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let FSDP2's mixed precision leave inputs and outputs as they are: token ids and scores among them.

    Its weights are in half precision all the same, and so is what is computed with them.
    """
    policy: Any = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, cast_forward_inputs=False)


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


def _has_lengths(rows: Any) -> bool:
    """Whether the rows are stored; those that a transform makes as they are read have no lengths yet."""
    return isinstance(rows, Dataset) and "input_ids" in rows.column_names


def row_lengths(rows: Dataset) -> np.ndarray:
    """(rows,), of their `input_ids`."""
    return pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy(zero_copy_only=False)


def by_length(rows: Dataset) -> np.ndarray:
    """Numbers of the rows, the shortest first."""
    return row_lengths(rows).argsort(kind="stable")
