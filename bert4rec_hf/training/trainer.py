"""`Bert4RecTrainer`: the Transformers Trainer that evaluates by ranking and writes the model card."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import (
    EvalLoopOutput,
    HubStrategy,
    IntervalStrategy,
    PredictionOutput,
    TrainOutput,
    has_length,
)

from ..data.data_collator import DataCollatorForMaskedItemPrediction
from ..data.rows import StreamedTrainingRows
from ..defaults import default_batch_size, default_learning_rate, default_mask_ratio
from ..evaluation.calibration import choose_weights, compare_targets, compare_with_baselines, set_weights, weights_of
from ..evaluation.metrics import COVERAGE_CUTOFF, CUTOFFS, ranking_metrics, result_metrics, sampled_metrics
from ..evaluation.protocol import Protocol
from ..hub.push import PushCheckpoints
from ..model.configuration_bert4rec import FIRST_ITEM_ID, Bert4RecConfig
from ..model.losses import IGNORE_INDEX
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from .arguments import Bert4RecTrainingArguments
from .item_feature_training import ItemFeatureTraining
from .model_folders import ModelFolderMixin
from .sampler import (
    SimilarLengthSampler,
    StreamedRowSampler,
    by_length,
    has_lengths,
    mean_number_of_targets,
    row_lengths,
)

logger = logging.getLogger(__name__)

# Columns of evaluation rows that `search` takes, not `forward`.
RANKING_INPUTS = ("history_ids", "exclude_ids", "candidate_ids", "history_type_ids", "target_type_ids")
# Under rules that change the order, a target is looked for in lists of this length, that of the longest metrics.
SERVED_LIST_LENGTH = CUTOFFS[-1]


class ItemLabelSmoother(LabelSmoother):
    """Transformers' `LabelSmoother` over the items only. The low logits of special tokens would dominate its mean."""

    def __call__(self, model_output: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        items = {"logits": model_output["logits"][..., FIRST_ITEM_ID:]}
        labels = torch.where(labels < FIRST_ITEM_ID, IGNORE_INDEX, labels - FIRST_ITEM_ID)
        return super().__call__(items, labels, *args, **kwargs)


class Bert4RecTrainer(ModelFolderMixin, Trainer):
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
        # Whether the projection from item features trains.
        self.trains_item_features = False
        # Whether the weights of the counted scores were chosen by the run that this one goes on from.
        self.weights_were_chosen = False

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, **kwargs: Any) -> TrainOutput:
        self.evaluated_step = None
        if trial is not None and self.chooses_learning_rate:
            self.args.learning_rate = None  # `create_optimizer` chooses one for the model of this trial
        output = super().train(resume_from_checkpoint, trial, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_global_step != self.evaluated_step:
            self.evaluated_step = None
        return output

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.args.learning_rate is None:
            self.args.learning_rate = default_learning_rate(self.model.config.hidden_size)
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args, **kwargs)
        if is_new and self.trains_item_features:
            optimizer.add_param_group({"params": [self.model.item_projection.weight], "weight_decay": 0.0})
        return optimizer

    def train_item_features(self, table: Any) -> None:
        """Train the projection from item features, where the model has one, together with the item vectors.

        Args:
            table: The item table. See `ItemFeatureTraining`.
        """
        self.trains_item_features = True
        self.add_callback(ItemFeatureTraining(self.processing_class, table, seed=self.args.seed))

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
