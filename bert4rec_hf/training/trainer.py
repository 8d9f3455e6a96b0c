"""`Bert4RecTrainer`: the Transformers Trainer that evaluates by ranking and writes the model card."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sized
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    HubStrategy,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
    has_length,
    rotate_checkpoints,
)

from ..data.data_collator import DataCollatorForMaskedItemPrediction
from ..data.histories import PREPARATION_FILE
from ..data.item_tables import ITEM_TABLE_FILE
from ..data.rows import StreamedTrainingRows
from ..defaults import default_batch_size, default_learning_rate, default_mask_ratio
from ..evaluation.calibration import choose_weights, compare_targets, compare_with_baselines, set_weights, weights_of
from ..evaluation.metrics import COVERAGE_CUTOFF, CUTOFFS, ranking_metrics, result_metrics, sampled_metrics
from ..evaluation.protocol import Protocol
from ..files import files_beside, replace_folder, unfinished_folder, write_file
from ..hub.model_card import (
    CALIBRATION_FILE,
    FILES_OF_WEIGHTS,
    RECIPE_FILE,
    add_evaluation,
    read_evaluations,
    write_model_card,
)
from ..hub.publish_code import publish_code as publish_code_into
from ..hub.push import PushCheckpoints, push_folder
from ..model.configuration_bert4rec import DERIVED_FIELDS, FIRST_ITEM_ID, Bert4RecConfig
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .arguments import Bert4RecTrainingArguments
from .learning_curve import training_record, write_training
from .new_items import write_new_items
from .resume import FSDP_OPTIMIZER, FSDP_WEIGHTS
from .sampler import (
    SimilarLengthSampler,
    StreamedRowSampler,
    by_length,
    has_lengths,
    mean_number_of_targets,
    row_lengths,
)

logger = logging.getLogger(__name__)

# Arguments left out of recipes: specific to a machine or a run, or implied by others.
ARGUMENTS_LEFT_OUT_OF_RECIPES = {
    "output_dir", "run_name", "resume_from_checkpoint", "push_to_hub", "logging_dir", "local_rank", "deepspeed",
    "use_cpu", "dataloader_pin_memory", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "project",
    "greater_is_better", "eval_on_start",
}  # fmt: skip
WEIGHT_FILES = "*model*.safetensors"
# Columns of evaluation rows that `search` takes, not `forward`.
RANKING_INPUTS = ("history_ids", "exclude_ids", "candidate_ids", "history_type_ids", "target_type_ids")
# Under rules that change the order, a target is looked for in lists of this length, that of the longest metrics.
SERVED_LIST_LENGTH = CUTOFFS[-1]
# Arguments that only `train_prepared` reads.
ARGUMENTS_OF_TRAIN_PREPARED = {
    "item_initialization", "train_windows", "window_step", "update_rows", "streaming", "max_eval_samples", "calibrate",
}  # fmt: skip


class ItemLabelSmoother(LabelSmoother):
    """Transformers' `LabelSmoother` over the items only. The low logits of special tokens would dominate its mean."""

    def __call__(self, model_output: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        items = {"logits": model_output["logits"][..., FIRST_ITEM_ID:]}
        labels = torch.where(labels < FIRST_ITEM_ID, IGNORE_INDEX, labels - FIRST_ITEM_ID)
        return super().__call__(items, labels, *args, **kwargs)


class Bert4RecTrainer(Trainer):
    """The Transformers Trainer. It evaluates with `search`, the function that serving calls, and writes model folders.

    Evaluation rows come from `ranking_rows`. The metrics are those of `ranking_metrics`, and coverage@10, the share of
    the catalogue that is in the first ten recommendations of at least one user. `predict` returns the ranks and these
    recommendations.

    Args:
        model: A `Bert4RecForMaskedItemPrediction`. None: `model_init` creates it.
        args: The training arguments. They are copied. None: the defaults of `TrainingArguments`.
        data_collator: None: a `DataCollatorForMaskedItemPrediction` with the values of `Bert4RecTrainingArguments`.
        train_dataset: Rows from `training_rows` or `stream_training_rows`, or `StreamedTrainingRows`.
        eval_dataset: Rows from `ranking_rows`, or several such sets by name. None: nothing is evaluated.
        processing_class: The tokenizer of the model.
        model_init: Creates a model, for hyperparameter searches.
        protocol: The protocol of the evaluation rows. Without it, no metrics are stored in the model folder.
        baselines: Metrics or ranks of the baselines on the evaluation rows, by name. The learning curve shows them.
        preparation: The content of preparation.json, which is copied into the model folder.
        publish_code: Whether the model's code is copied into every saved folder; see `publish_code`.
        rules: `Rules` that the targets are ranked under. With `where` alone, these are the ranks among the items that
            meet it. With boosts, quotas or diversity, they are the places in the lists of `SERVED_LIST_LENGTH` items
            that `recommend` returns. A target that does not meet `where`, or is not in the list, has rank 0.
        kwargs: Further arguments of `Trainer`.

    Raises:
        ValueError: If there is neither a model nor a `model_init`, if the tokenizer is of another size than the model,
            if `data_collator`, `Bert4RecTrainingArguments` and tokenizer are missing, or if an argument does not fit.
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
        baselines: Mapping[str, Mapping[str, float] | np.ndarray] | None = None,
        preparation: Mapping[str, Any] | None = None,
        publish_code: bool = False,
        rules: Any = None,
        **kwargs: Any,
    ):
        if model is None and model_init is None:
            raise ValueError("expected a model or a model_init, which creates one; got neither")
        self.model_init = model_init
        config: Bert4RecConfig = (self.call_model_init() if model is None else model).config
        if processing_class is not None and len(processing_class) != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(processing_class)} token ids, the model {config.vocab_size}: create the model "
                "with Bert4RecConfig(vocab_size=len(tokenizer)); model.add_items(tokenizer, items) adds items to both"
            )
        # The arguments are copied, since the values chosen from this log may not suit another run.
        args = TrainingArguments() if args is None else copy(args)
        self.chooses_learning_rate = isinstance(args, Bert4RecTrainingArguments) and args.is_left_out("learning_rate")
        if isinstance(args, Bert4RecTrainingArguments):
            _choose(args, config, train_dataset)
            if eval_dataset is None and args.eval_strategy != IntervalStrategy.NO:
                logger.warning("there is no eval_dataset: nothing is evaluated, and the model is that of the last step")
                args.evaluate_nothing()
            elif "compute_metrics" not in kwargs:
                args.check_metric(eval_dataset)
        args.remove_unused_columns = False  # the collator drops unused columns; `prediction_step` needs the others
        hub_strategy, args.hub_strategy = args.hub_strategy, HubStrategy.END  # `PushCheckpoints` pushes checkpoints
        if args.n_gpu > 1:
            # The Trainer would use DataParallel, which would split the negatives of a batch between the GPUs.
            logger.warning("one of %d GPUs is used; accelerate launch -m bert4rec_hf train uses all", args.n_gpu)
            args._n_gpu = 1
        self.collates_by_args = data_collator is None
        if data_collator is None:
            data_collator = _collator(args, config, processing_class)
        # Where a checkpoint is made. None: none is made at present.
        self.unfinished: Path | None = None
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
        self.checkpoint_pushes = PushCheckpoints(self, hub_strategy)
        if self.args.push_to_hub:
            self.add_callback(self.checkpoint_pushes)
        if isinstance(args, Bert4RecTrainingArguments) and args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if self.args.label_smoothing_factor:
            if config.item_loss != "softmax":
                raise ValueError(
                    f"label_smoothing_factor is for item_loss softmax only; got {config.item_loss}: leave one of the "
                    "two out"
                )
            if config.filter_seen_items:
                logger.warning("with label_smoothing_factor, the loss is over all items, including seen items")
            self.label_smoother: LabelSmoother | None = ItemLabelSmoother(self.args.label_smoothing_factor)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            keep_inputs_and_outputs_in_float32(plugin)
        self.protocol = protocol
        self.baseline_ranks = {
            name: found for name, found in (baselines or {}).items() if isinstance(found, np.ndarray)
        }
        self.baselines = {
            name: found if isinstance(found, Mapping) else ranking_metrics(found)
            for name, found in (baselines or {}).items()
        }
        self.preparation = preparation
        self.publish_code = publish_code
        self.rules = rules
        self.evaluation: dict[str, Any] | None = None
        # The record of `calibrate`.
        self.calibration: dict[str, Any] | None = None
        # The record of `make_new_items`.
        self.new_items: dict[str, Any] | None = None
        # The protocol of the learning curve, if new items have joined the catalogue since.
        self.curve_protocol: Protocol | None = None
        # The item table, which goes into every saved folder. None: the log has none.
        self.item_table: Path | None = None
        # Whether the weights of the counted scores were chosen by the run that this one goes on from.
        self.weights_were_chosen = False
        # The step of the weights that `evaluation` was computed with. None: the weights have changed since.
        self.evaluated_step: int | None = None

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, **kwargs: Any) -> TrainOutput:
        self.evaluated_step = None
        if trial is not None and self.chooses_learning_rate:
            self.args.learning_rate = None  # `create_optimizer` chooses one for the model of this trial
        output = super().train(resume_from_checkpoint, trial, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_global_step != self.evaluated_step:
            self.evaluated_step = None
        return output

    # These private methods are overridden, since the Trainer refuses a checkpoint of FSDP in a run without it.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        weights = Path(resume_from_checkpoint) / FSDP_WEIGHTS
        if self.is_fsdp_enabled or not weights.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        whole = torch.load(weights, map_location="cpu", weights_only=True)
        (self.model if model is None else model).load_state_dict(whole)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled or not (Path(checkpoint) / FSDP_OPTIMIZER).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        by_name = torch.load(Path(checkpoint) / FSDP_OPTIMIZER, map_location="cpu", weights_only=True)
        model, optimizer = self.accelerator.unwrap_model(self.model), self.optimizer.optimizer
        set_optimizer_state_dict(model, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.args.learning_rate is None:
            self.args.learning_rate = default_learning_rate(self.model.config.hidden_size)
        return super().create_optimizer(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if self.collates_by_args:  # a hyperparameter search may have changed the arguments
            self.data_collator = _collator(self.args, self.model.config, self.processing_class)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if not isinstance(eval_dataset, str):  # a string is the name of one of several sets
            eval_dataset = self._by_length(self.eval_dataset if eval_dataset is None else eval_dataset)
        with _for_evaluation(self.args):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with _for_evaluation(self.args):
            return super().get_test_dataloader(self._by_length(test_dataset))

    def compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """HR, NDCG, MRR and coverage from `predictions=(ranks, recommended token ids)`."""
        found = prediction.predictions
        if not isinstance(found, tuple) or np.ndim(found[0]) != 1:
            raise ValueError("expected evaluation rows of ranking_rows; got rows without the column exclude_ids")
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
        """The loss, (ranks, recommended token ids) and targets of a batch, without scores over the catalogue."""
        ranking = {name: inputs[name] for name in RANKING_INPUTS if name in inputs}
        inputs = {name: values for name, values in inputs.items() if name not in ranking}
        if prediction_loss_only or "exclude_ids" not in ranking:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs, ranking = self._prepare_inputs(inputs), self._prepare_inputs(ranking)
        self.ranks_sampled = "candidate_ids" in ranking
        targets = inputs["labels"].amax(dim=1)
        with torch.no_grad(), self.compute_loss_context_manager():
            # The logits are skipped, since `search` computes scores for one chunk of the catalogue at a time.
            outputs = model(**inputs, skip_logits=True)
            ranking = {"history_ids": inputs["input_ids"]} | ranking
            ranker, states = self.accelerator.unwrap_model(model), outputs.prediction_states
            if self.rules is not None and self.rules.reorders:
                _, served, _ = ranker.search_by_rules(states, rules=self.rules, top_k=SERVED_LIST_LENGTH, **ranking)
                is_target = served == targets.unsqueeze(1)
                ranks = (is_target.int().argmax(dim=1) + 1).where(is_target.any(dim=1), 0)
                recommended = served[:, :COVERAGE_CUTOFF]
            else:
                if self.rules is not None and self.rules.allowed is not None:
                    ranking["allowed"] = self.rules.allowed.to(states.device)
                ranks, _, recommended = ranker.search(states, target_ids=targets, top_k=COVERAGE_CUTOFF, **ranking)
        # The Trainer averages over rows. Rows with a target outside the catalogue have no loss, so they count as 0
        # here, and `evaluation_loop` divides by the number of the other rows.
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
        if self.args.world_size > 1 and not has_length(dataloader):
            raise ValueError(
                "several processes cannot tell the last rows of a stream from the rows that pad its last batch: "
                "evaluate on a datasets.Dataset"
            )
        self.ranks_sampled = False
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if isinstance(output.label_ids, np.ndarray) and output.label_ids.ndim == 1:  # targets from `prediction_step`
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
        # The protocol describes all rows of the trainer's own eval_dataset, not one of several sets.
        if self.protocol is not None and eval_dataset is None and not isinstance(self.eval_dataset, dict):
            source = {"source": os.path.basename(self.preparation["source"])} if self.preparation else {}
            self.evaluation = source | {
                "protocol": self.protocol.as_dict(),
                "metrics": result_metrics(metrics, metric_key_prefix),
            }
            self.evaluated_step = self.state.global_step
        return metrics

    def calibrate(self) -> dict[str, Any]:
        """Choose the weights of the counted scores on `eval_dataset`, and compare the model with the baselines.

        The weights are set in the model's config if they pay; see `choose_weights`. The metrics of `evaluate` are then
        of targets that weights were chosen on, and their protocol says so. `save_model` writes the record into
        calibration.json. If the argument `calibrate` is False, the weights stay, and only the baselines are compared.

        Returns:
            The record of `choose_weights`, or weights and adopted without a choice; and, under baselines, the record of
            `compare_with_baselines`.

        Raises:
            ValueError: If `eval_dataset` is not one set of evaluation rows.
        """
        if not isinstance(self.eval_dataset, Dataset):
            raise ValueError(
                f"expected one eval_dataset, rows of ranking_rows; got {type(self.eval_dataset).__name__}: give the "
                "trainer the rows to calibrate on"
            )
        model = self.accelerator.unwrap_model(self.model).eval()
        rows = self.eval_dataset
        batch_size = self.args.per_device_eval_batch_size
        comparisons = compare_targets(model, rows, self.processing_class, batch_size=batch_size)
        weights = weights_of(model.config)
        chosen: dict[str, Any] = {"weights": weights, "adopted": False, "were_chosen": self.weights_were_chosen}
        if self.args.calibrate:
            chosen = choose_weights(comparisons, weights, were_chosen=self.weights_were_chosen)
        compared = compare_with_baselines(comparisons, chosen["weights"], self.baseline_ranks, rows["user_id"][:])
        # The processes must agree, while their devices may round differently.
        source = {"source": os.path.basename(self.preparation["source"])} if self.preparation else {}
        self.calibration = broadcast_object_list([chosen | source | {"baselines": compared}])[0]
        if self.calibration["adopted"]:
            set_weights(model.config, self.calibration["weights"])
            self.evaluated_step = None
            if self.protocol is not None:
                self.protocol = replace(self.protocol, calibrated=True)
        return self.calibration

    def grow_catalogue(self, eval_dataset: Dataset, protocol: Protocol) -> None:
        """Go on with the evaluation rows of a catalogue to which new items were added after training.

        Args:
            eval_dataset: Rows from `ranking_rows`, in the token ids of the larger catalogue.
            protocol: Their protocol.
        """
        assert self.protocol is not None  # for the type checker
        self.curve_protocol, self.protocol = self.protocol, replace(protocol, calibrated=self.protocol.calibrated)
        self.eval_dataset, self.evaluated_step = eval_dataset, None

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        # The item vectors do not decay: the vectors of items that are in no batch would shrink too.
        return [name for name in super().get_decay_parameter_names(model) if "item_embeddings" not in name]

    # This private method is overridden, since the only public alternative is to rewrite `get_train_dataloader`.
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        groups_by_length = self.args.train_sampling_strategy == "group_by_length"
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(rows, StreamedTrainingRows) and self.args.train_sampling_strategy != "sequential":
            num_readers = self.args.world_size * max(1, self.args.dataloader_num_workers)
            return StreamedRowSampler(rows, self.args.train_batch_size, num_readers, seed, groups_by_length)
        if not groups_by_length or not has_lengths(rows):
            return super()._get_train_sampler(train_dataset)
        lengths = np.minimum(row_lengths(rows), self.model.config.max_position_embeddings)
        # The batches of all processes have similar lengths, since the processes wait for one another at every step.
        return SimilarLengthSampler(lengths, self.args.train_batch_size * self.args.world_size, seed)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        if self._by_length(test_dataset) is test_dataset:
            return output
        places = np.argsort(by_length(test_dataset))  # the place of each row among the predictions

        def in_order(found: Any) -> Any:
            if isinstance(found, tuple):
                return tuple(in_order(part) for part in found)
            return None if found is None else found[places]

        return output._replace(predictions=in_order(output.predictions), label_ids=in_order(output.label_ids))

    def _by_length(self, rows: Any) -> Any:
        """Sort evaluation rows by length, which reduces padding.

        Rows without known lengths are not sorted, and neither are rows for a user's own metrics, which may depend on
        the order.
        """
        if has_lengths(rows) and self.compute_metrics == self.compute_ranking_metrics:
            return rows.select(by_length(rows))
        return rows

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a model folder: weights, configuration, catalogue, recipe, evaluations, learning curve and card.

        The Trainer also writes training_args.bin, a pickle of the arguments with paths of this machine. It has no
        tokens here, and is never pushed.

        Args:
            output_dir: The folder. None: that of the training arguments.
        """
        folder = Path(output_dir or self.args.output_dir)
        stale: set[str] = set()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_tokens(self.args))
            stack.enter_context(_writing(folder))
            new, old_weights = folder, _weights_digest(folder) if self.args.should_save else None
            # Without DeepSpeed, one process writes. With it, all do, into the same folder.
            if self.args.should_save and not self.is_deepspeed_enabled:
                new = stack.enter_context(files_beside(folder, last_file="config.json", own_files=stale))
            super().save_model(str(new), _internal_call=True)
            if self.args.should_save:
                if any(new.glob(WEIGHT_FILES)) and _weights_digest(new) != old_weights:
                    stale |= {*FILES_OF_WEIGHTS, *(path.name for path in folder.glob(WEIGHT_FILES))}
                for name in ("README.md", *FILES_OF_WEIGHTS):
                    if name in stale:
                        (new / name).unlink(missing_ok=True)
                    elif new != folder and (folder / name).is_file():
                        shutil.copy2(folder / name, new / name)
                self._complete_folder(new)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Make a checkpoint beside its place and move it there, so that a checkpoint is complete or not there."""
        place = Path(super()._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.unfinished = unfinished_folder(place)
        try:
            if self.args.should_save and self.unfinished.exists():
                shutil.rmtree(self.unfinished)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            with _writing(place):
                super()._save_checkpoint(model, trial)
            made = self.unfinished / place.name
            if self.state.best_model_checkpoint == str(made):
                self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(made / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
            if self.args.should_save:
                if place.exists():
                    replace_folder(made, place, self.unfinished / "old", {path.name for path in place.iterdir()})
                else:
                    os.rename(made, place)
        finally:
            if self.args.should_save:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished = None
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(place.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.unfinished is None else str(self.unfinished)

    def _complete_folder(self, folder: Path) -> None:
        """Write the files of a model folder that the Trainer itself does not write."""
        write_file(folder / RECIPE_FILE, yaml.safe_dump(self.recipe(), sort_keys=True, allow_unicode=True))
        if self.preparation is not None:
            preparation = dict(self.preparation) | {"source": os.path.basename(self.preparation["source"])}
            write_file(folder / PREPARATION_FILE, json.dumps(preparation, indent=2, ensure_ascii=False) + "\n")
        if self.item_table is not None and self.item_table.resolve() != (folder / ITEM_TABLE_FILE).resolve():
            write_file(folder / ITEM_TABLE_FILE, self.item_table.read_bytes())
        if self.calibration is not None:
            write_file(folder / CALIBRATION_FILE, json.dumps(self.calibration, indent=2) + "\n")
        if self.new_items is not None:
            write_new_items(folder, self.new_items)
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
        """The record of the run so far; see `learning_curve.training_record`. None without evaluations or protocol."""
        if self.protocol is None:
            return None
        step = self.state.global_step
        if self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step is not None:
            step = self.state.best_global_step
        protocol = self.curve_protocol or self.protocol
        if self.args.eval_strategy != IntervalStrategy.NO:
            protocol = replace(protocol, calibrated=False)  # the curve was measured before `calibrate`
        return training_record(self.state, self.args, protocol, self.baselines, step, self.calibration)

    def recipe(self) -> dict[str, Any]:
        """All training arguments and the architecture, in the form that `bert4rec train --config` reads.

        Without a preparation, the user created model and rows, so arguments that only `train_prepared` reads are left
        out.
        """
        left_out = (
            ARGUMENTS_LEFT_OUT_OF_RECIPES
            if self.preparation is not None
            else ARGUMENTS_LEFT_OUT_OF_RECIPES | ARGUMENTS_OF_TRAIN_PREPARED
        )
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
        precision = self.accelerator.mixed_precision  # an Accelerate configuration may have set it
        arguments |= {"bf16": precision == "bf16", "fp16": precision == "fp16"}
        # TrainingArguments turn this option into "all" or "no", but the command line only accepts true or false.
        arguments["include_num_input_tokens_seen"] = arguments["include_num_input_tokens_seen"] != "no"
        # The Hub id of the model that was trained further. A local path would be another folder on another machine.
        origin = config._name_or_path
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
        """Write README.md of the output folder from the files of the folder.

        `push_to_hub` passes its further arguments to this function, as in `push_to_hub(license="mit")`.

        Args:
            model_name: Title of the card.
            license: License of the model, for example "mit".
            language: Language codes, for the metadata.
            tags: Tags in addition to those of the package.
        """
        if self.is_world_process_zero():
            metadata = {"model_name": model_name, "license": license, "language": language, "tags": tags}
            write_model_card(self.args.output_dir, self.hub_model_id, self.processing_class, **metadata)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the model folder, without checkpoints and training_args.bin.

        Args:
            commit_message: Message of the commit.
            blocking: Whether to wait for the upload.
            token: Access token. None: `hub_token` of the training arguments.
            revision: Branch to push to. None: `hub_revision` of the training arguments.
            private: Whether a repository that is created is private.
            kwargs: Arguments of `create_model_card`.

        Returns:
            The return value of `huggingface_hub.upload_folder`; None on processes other than the main one.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            if private is not None:
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        model_tags = [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        name = (self.args.hub_model_id or os.path.abspath(self.args.output_dir)).rsplit("/", 1)[-1]
        self.create_model_card(**{"model_name": name} | kwargs, tags=[*tags, *model_tags] or None)
        self.checkpoint_pushes.finish()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id,
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )


def _choose(args: Bert4RecTrainingArguments, config: Bert4RecConfig, rows: Any) -> None:
    """Set the arguments that were left out, from the model and the training rows."""
    if args.mask_ratio is None:
        are_stored = has_lengths(rows) and len(rows)
        number = np.inf
        if are_stored:
            number = mean_number_of_targets(rows, config.max_position_embeddings, config.target_event_type_ids or ())
        args.mask_ratio = default_mask_ratio(number, len(rows) if are_stored else 1, config.causal_attention)
    if args.is_left_out("learning_rate"):
        args.learning_rate = default_learning_rate(config.hidden_size)
    if args.is_left_out("per_device_train_batch_size"):
        batch_size = default_batch_size(len(rows) if isinstance(rows, Sized) else 0)
        args.per_device_train_batch_size = max(1, batch_size // args.world_size)


@contextlib.contextmanager
def _for_evaluation(args: TrainingArguments) -> Iterator[None]:
    """Change the arguments so that a data loader drops no rows and keeps their order."""
    given = args.dataloader_drop_last, args.train_sampling_strategy
    args.dataloader_drop_last, args.train_sampling_strategy = False, "sequential"
    try:
        yield
    finally:
        args.dataloader_drop_last, args.train_sampling_strategy = given


@contextlib.contextmanager
def _without_tokens(args: TrainingArguments) -> Iterator[None]:
    """Remove tokens from the arguments while they are written to a file."""
    tokens = {name: value for name, value in vars(args).items() if name.endswith("_token")}
    try:
        for name in tokens:
            setattr(args, name, None)
        yield
    finally:
        for name, value in tokens.items():
            setattr(args, name, value)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raise OSError where torch.save could not write, which says so by RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in ("PytorchStreamWriter", "inline_container", "iostream error")):
            raise OSError(f"cannot write {folder}, maybe since the disk is full: {error}") from error
        raise


def _collator(
    args: TrainingArguments | None, config: Bert4RecConfig, tokenizer: Bert4RecTokenizer | None
) -> DataCollatorForMaskedItemPrediction:
    if not isinstance(args, Bert4RecTrainingArguments):
        raise ValueError(
            f"expected Bert4RecTrainingArguments or a data_collator; got {type(args).__name__} and no data_collator: "
            "masking needs arguments of its own"
        )
    if tokenizer is None:
        raise ValueError("expected a processing_class, the Bert4RecTokenizer of the catalogue; got None")
    assert args.mask_ratio is not None  # for the type checker
    return DataCollatorForMaskedItemPrediction(
        tokenizer,
        mask_ratio=args.mask_ratio,
        last_item_ratio=args.last_item_ratio,
        max_predictions=args.max_predictions,
        max_length=config.max_position_embeddings,
        random_windows=args.train_windows != "newest",
        causal=config.causal_attention,
        num_negatives=0 if config.item_loss == "softmax" else args.num_negatives,
        negative_sampling=args.negative_sampling,
    )


def keep_inputs_and_outputs_in_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keep FSDP2's mixed precision from casting inputs and outputs, such as token ids and scores.

    Weights, and the computations with them, stay in half precision.
    """
    policy: Any = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2 and policy is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, cast_forward_inputs=False)


def _weights_digest(folder: Path) -> str:
    """A digest of the weight files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHT_FILES)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
