"""Ranks -> HR, NDCG, MRR."""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import EvalPrediction

from ..model.configuration_bert4rec import FIRST_ITEM_ID

CUTOFFS = (1, 5, 10, 20, 50, 100)
COVERAGE_CUTOFF = 10
# In tables; all of them are stored.
SHOWN_METRICS = ("HR@1", "HR@10", "NDCG@10", "HR@100", "MRR", "coverage@10")
SAMPLED_METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR, NDCG and MRR of one target a user.

    Args:
        ranks: (users,) from 1; 0 for a target that is never shown, a miss everywhere.

    Returns:
        HR@k and NDCG@k for k in `CUTOFFS`, and MRR; 0 if there are no users.
    """
    ranks = np.asarray(ranks)
    places = np.where(ranks > 0, ranks, np.inf)
    count = max(len(ranks), 1)
    metrics = {}
    for k in CUTOFFS:
        hits = places <= k
        metrics[f"HR@{k}"] = float(hits.sum() / count)
        metrics[f"NDCG@{k}"] = float((hits / np.log2(places + 1)).sum() / count)
    metrics["MRR"] = float((1 / places).sum() / count)
    return metrics


def result_metrics(logged: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Of what the Trainer logs, the results without their prefix, and no timing."""
    names = {name.removeprefix(f"{prefix}_"): value for name, value in logged.items()}
    return {name: value for name, value in names.items() if "@" in name or name in ("MRR", "loss")}


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The names for a table."""
    return [name for name in (*SHOWN_METRICS, *(f"sampled_{name}" for name in SAMPLED_METRICS)) if name in metrics]


def sampled_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Those of Sun et al. 2019, of ranks among sampled items, which their names say."""
    metrics = ranking_metrics(ranks)
    return {f"sampled_{name}": metrics[name] for name in SAMPLED_METRICS}


def preprocess_logits_for_metrics(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """For a plain `transformers.Trainer`: the rank of each target, so that no scores are gathered.

    Needs `TrainingArguments(label_names=["labels", "exclude_ids"])` and the rows of `ranking_rows`.

    Args:
        logits: (batch, P, vocab_size) at the `label_positions`.
        labels: labels (batch, length) and exclude_ids (batch, E).

    Returns:
        (batch,) ranks as `Bert4RecForMaskedItemPrediction.rank` has them.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    targets, exclude_ids = labels
    places = targets.argmax(dim=1, keepdim=True)
    if len(places) > 1 and exclude_ids.shape == places.shape and exclude_ids.any() and (exclude_ids == places).all():
        raise ValueError('set TrainingArguments(label_names=["labels", "exclude_ids"]): got label_positions')
    scores = scores[:, -1] if scores.shape[1] == 1 else scores[torch.arange(len(scores)), places[:, 0]]
    targets = targets.amax(dim=1, keepdim=True)
    scores = scores.scatter(1, exclude_ids.clamp(min=0), -torch.inf)  # padded with -100 across processes
    scores[:, :FIRST_ITEM_ID] = -torch.inf
    target_scores = scores.gather(1, targets.clamp(min=0))
    ranks = (scores >= target_scores).sum(dim=1)
    return ranks.masked_fill(target_scores.isneginf().squeeze(1), 0)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For a plain `transformers.Trainer`, after `preprocess_logits_for_metrics`.

    Raises:
        ValueError: If the predictions are no ranks.
    """
    if np.ndim(prediction.predictions) != 1:
        raise ValueError(
            "expected ranks, one for each row: hand preprocess_logits_for_metrics to the plain Trainer as well; "
            "Bert4RecTrainer has metrics of its own"
        )
    return ranking_metrics(prediction.predictions)
