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


def target_ranks(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """The rank of each row's target, as the plain `transformers.Trainer`'s `preprocess_logits_for_metrics`.

    So no scores are gathered over an evaluation. The ranks are the network's alone, without `HistoryScores`, and
    among all items: neither exclude_ids nor candidate_ids of the rows are read, since the plain Trainer hands over
    logits and labels only. `Bert4RecTrainer` ranks as serving does.

    Args:
        logits: (batch, positions, vocab size).
        labels: (batch, positions) token ids; one of a row is its target, the others are -100.

    Returns:
        (batch,) ranks from 1, where a tie counts against the target; 0 for a row whose labels are all -100.

    Raises:
        ValueError: If logits and labels have different shapes.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    if scores.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected labels of shape {tuple(scores.shape[:-1])}, one for each position of the logits; got "
            f"{tuple(labels.shape)}"
        )
    targets, places = labels.max(dim=1)
    scores = scores[torch.arange(len(scores), device=scores.device), places, FIRST_ITEM_ID:]
    target_scores = scores.gather(1, (targets - FIRST_ITEM_ID).clamp(min=0).unsqueeze(1))
    return (scores >= target_scores).sum(dim=1).masked_fill(targets < FIRST_ITEM_ID, 0)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For a plain `transformers.Trainer`, after `target_ranks`.

    Raises:
        ValueError: If the predictions are no ranks.
    """
    if np.ndim(prediction.predictions) != 1:
        raise ValueError(
            "expected ranks, one for each row: give the plain Trainer preprocess_logits_for_metrics=target_ranks too; "
            "Bert4RecTrainer has metrics of its own"
        )
    return ranking_metrics(prediction.predictions)
