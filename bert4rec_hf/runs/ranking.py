"""Ranking the held-out targets of a prepared folder with a model, which `evaluate` and `compare` share."""

import os
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PredictionOutput

from ..data.histories import PARTS, AnyHistories, Histories, check_prepared
from ..data.rows import users_with_targets
from ..evaluation.protocol import Protocol
from ..evaluation.seen_targets import check_targets
from ..hub.load import load_model
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..serving.rules import Rules
from ..training.arguments import Bert4RecTrainingArguments
from ..training.trainer import Bert4RecTrainer
from .model_and_data import check_catalogue, read_histories, rows_for


@dataclass(frozen=True)
class RankingTask:
    """A model, and the targets that it ranks.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        histories: All histories, in the token ids of the model.
        evaluated: The histories of the users that are ranked.
        rows: The rows of `ranking_rows` of these users.
        preparation: The content of preparation.json.
        part: "validation" or "test".
    """

    model: Bert4RecForMaskedItemPrediction
    tokenizer: Bert4RecTokenizer
    histories: AnyHistories
    evaluated: Histories
    rows: Dataset
    preparation: dict[str, Any]
    part: str

    @property
    def row_options(self) -> dict[str, Any]:
        """The arguments of `ranking_rows` that the model decides."""
        config = self.model.config
        return {"filter_seen_items": config.filter_seen_items, "max_length": config.max_position_embeddings}

    def protocol(self) -> Protocol:
        """The protocol of ranking these targets among all items."""
        return Protocol.of(
            self.evaluated,
            self.preparation,
            self.part,
            self.tokenizer.num_items,
            self.model.config.filter_seen_items,
            self.histories.num_targets(self.part),
        )


def ranking_task(
    model: str | os.PathLike,
    data: str | os.PathLike,
    part: str,
    *,
    streaming: bool = False,
    max_eval_samples: int | None = None,
    timestamps: bool = False,
) -> RankingTask:
    """Load a model and the targets of a prepared folder.

    Args:
        model: A model folder or Hub id.
        data: The prepared folder.
        part: "validation" or "test".
        streaming: Whether the histories stay on disk.
        max_eval_samples: Maximum number of users, drawn at random. None: all; with `streaming`, 50,000.
        timestamps: Whether the times of streamed histories are read too.

    Raises:
        ValueError: If a folder is not a model folder or a prepared folder, if the catalogue has none of the items of
            the data, if no user has a target, or if the model has trained on the targets.
    """
    check_prepared(data)
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}; got {part!r}")
    if max_eval_samples is not None and max_eval_samples < 1:
        raise ValueError(f"max_eval_samples must be at least 1; got {max_eval_samples}")
    loaded = load_model(model)
    tokenizer = Bert4RecTokenizer.from_pretrained(model)
    histories, tokenizer, preparation = read_histories(data, streaming, tokenizer)
    check_catalogue(model, tokenizer, data, histories)
    check_targets(model, preparation, part)
    evaluated = users_with_targets(histories, part, max_eval_samples, timestamps=timestamps)
    rows = rows_for(loaded.config, evaluated, tokenizer, part)
    if not len(rows):
        raise ValueError(
            f"no user of {data} has a {part} target; choose another --part, or prepare with another --split"
        )
    return RankingTask(loaded, tokenizer, histories, evaluated, rows, preparation, part)


def predict(
    task: RankingTask,
    *datasets: Dataset,
    batch_size: int = 64,
    use_cpu: bool = False,
    disable_tqdm: bool = False,
    rules: Rules | None = None,
) -> list[PredictionOutput]:
    """What `Bert4RecTrainer.predict` returns for each dataset of rows: ranks, recommended items and metrics.

    Args:
        task: The model and its tokenizer.
        datasets: Rows such as those of `ranking_rows`.
        batch_size: Number of histories ranked at once.
        use_cpu: Whether to leave an accelerator unused.
        disable_tqdm: Whether to show no progress bar. Without a terminal, there is never one.
        rules: Rules that the targets are ranked under; see `Bert4RecTrainer`. None: no rules.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Bert4RecTrainer(
            task.model,
            Bert4RecTrainingArguments(
                nowhere,
                per_device_eval_batch_size=batch_size,
                use_cpu=use_cpu,
                disable_tqdm=disable_tqdm or not sys.stderr.isatty(),
                eval_strategy="no",
                save_strategy="no",
            ),
            processing_class=task.tokenizer,
            rules=rules,
        )
        trainer.remove_callback(PrinterCallback)  # the caller has all metrics
        return [trainer.predict(rows) for rows in datasets]
