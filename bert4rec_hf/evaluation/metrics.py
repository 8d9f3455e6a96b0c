"""Ranking metrics, HR, NDCG and MRR, from the ranks of the targets."""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import EvalPrediction

from ..model.configuration_bert4rec import FIRST_ITEM_ID

CUTOFFS = (1, 5, 10, 20, 50, 100)
COVERAGE_CUTOFF = 10
# Metrics that tables show. evaluation.json has all of them.
SHOWN_METRICS = ("HR@1", "HR@10", "NDCG@10", "HR@100", "MRR", "coverage@10")
# Metrics with several targets per user; see `target_sets.set_metrics`.
SET_METRICS = ("recall@10", "NDCG@10", "MAP@10", "HR@10")
SAMPLED_METRICS = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR, NDCG and MRR, with one target per user.

    Args:
        ranks: (users,) ranks from 1. 0 stands for a target that is never shown, which is a miss at every cutoff.

    Returns:
        HR@k and NDCG@k for k in `CUTOFFS`, and MRR. All are 0 if there are no users.
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


def user_metrics(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """NDCG@10 and HR@10 of each user, (users,) float64, from ranks (users,); see `ranking_metrics`."""
    is_hit = (ranks > 0) & (ranks <= 10)
    return {"NDCG@10": np.where(is_hit, 1 / np.log2(np.maximum(ranks, 1) + 1), 0.0), "HR@10": is_hit.astype(float)}


def result_metrics(logged: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The metrics and the loss among the values that the Trainer logs, without their prefix."""
    names = {name.removeprefix(f"{prefix}_"): value for name, value in logged.items()}
    return {name: value for name, value in names.items() if "@" in name or name in ("MRR", "loss")}


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The names of the metrics that a table shows."""
    of_sets = (f"all_targets_{name}" for name in SET_METRICS)
    sampled = (f"sampled_{name}" for name in SAMPLED_METRICS)
    return [name for name in (*SHOWN_METRICS, *of_sets, *sampled) if name in metrics]


def sampled_metrics(ranks: np.ndarray) -> dict[str, float]:
    """The metrics of Sun et al. 2019, from ranks among sampled items. Their names start with "sampled_"."""
    metrics = ranking_metrics(ranks)
    return {f"sampled_{name}": metrics[name] for name in SAMPLED_METRICS}


def target_ranks(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Rank each row's target by the logits: `preprocess_logits_for_metrics` for a plain `transformers.Trainer`.

    With it, the Trainer gathers ranks instead of scores over the catalogue. The ranks use the network's scores only,
    without `HistoryScores`, and are among all items. The columns exclude_ids and candidate_ids have no effect, since a
    plain Trainer passes only logits and labels. `Bert4RecTrainer` ranks as serving does.

    Args:
        logits: (batch, positions, vocab size), or a tuple that starts with them.
        labels: (batch, positions) token ids. One label of a row is its target, the others are -100.

    Returns:
        (batch,) ranks from 1; a tie counts against the target. 0 for a row whose labels are all -100.

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
    """`ranking_metrics` as `compute_metrics` of a plain `transformers.Trainer`, together with `target_ranks`.

    Args:
        prediction: Its `predictions` are the ranks (users,) from `target_ranks`.

    Raises:
        ValueError: If the predictions are not ranks.
    """
    if np.ndim(prediction.predictions) != 1:
        raise ValueError(
            f"expected ranks, one for each row; got an array with {np.ndim(prediction.predictions)} dimensions: give "
            "the plain Trainer preprocess_logits_for_metrics=target_ranks too, or use Bert4RecTrainer, which needs "
            "neither"
        )
    return ranking_metrics(prediction.predictions)
