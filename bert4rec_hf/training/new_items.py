"""Items that nobody has had yet: their vectors from features, and how often they are recommended."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from ..data.data_collator import DataCollatorForMaskedItemPrediction
from ..evaluation.metrics import ranking_metrics
from ..evaluation.plotting import BLUE, GREY, ORANGE, png
from ..files import write_file
from ..hub.model_card import NEW_ITEMS_CURVE_FILE, NEW_ITEMS_FILE
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from ..model.tokenization_bert4rec import Bert4RecTokenizer

logger = logging.getLogger(__name__)

# What new items may cost: the share of NDCG@10 over all targets that the chosen offset may lose.
MAX_LOSS = 0.01
# The offsets to choose from let a new item into the first ten of these shares of the histories.
SHARES_REACHED = tuple(place / 40 for place in range(41))
CUTOFF = 10
# A point of the curve is named if it is so far from other names, as a share of the width or the height.
ROOM_OF_A_NAME = 0.06


@torch.no_grad()
def add_new_items(model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, table: Any) -> int:
    """Give the items without a training event the vectors of their features.

    Items of the table that the catalogue lacks are added to it.

    Args:
        model: A model with a projection from item features, which is changed in place.
        tokenizer: Its tokenizer, with `item_features` and counts, which is changed in place.
        table: The item table.

    Returns:
        The number of items whose vectors come from features.
    """
    counts = np.array(tokenizer.counts or [1] * tokenizer.num_items)
    model.set_vectors_from_features(tokenizer, table, (np.flatnonzero(counts == 0) + FIRST_ITEM_ID).tolist())
    num_added = model.add_items(tokenizer, table)
    return int((counts == 0).sum()) + num_added


@dataclass
class Trade:
    """What an offset of new items leads to on validation.

    Attributes:
        offset: Added to the biases of new items. None: no new items.
        ndcg: NDCG@10 over all targets.
        new_item_hit_rate: HR@10 over the targets that are new items, among the whole catalogue.
    """

    offset: float | None
    ndcg: float
    new_item_hit_rate: float


@torch.no_grad()
def trade_new_items(
    model: Bert4RecForMaskedItemPrediction,
    tokenizer: Bert4RecTokenizer,
    rows: Dataset,
    *,
    batch_size: int = 64,
) -> tuple[list[Trade], int]:
    """How the offset of new items trades their hit rate against the quality over all targets.

    Each row is ranked twice, among the items that have trained and among the new ones. From the ten best of each, the
    place of the target in the first ten follows for every offset. The offsets are those with which a new item is among
    the first ten of some shares of the histories, `SHARES_REACHED`.

    Args:
        model: A model whose new items have vectors from features, with `config.new_item_offset` in their biases.
        tokenizer: Its tokenizer, with counts.
        rows: Rows from `ranking_rows`.
        batch_size: Number of histories ranked at once.

    Returns:
        The trade without new items, whose offset is None, and those of the offsets in ascending order; and the number
        of targets that are new items.
    """
    collator = DataCollatorForMaskedItemPrediction(tokenizer)
    is_new = torch.zeros(len(tokenizer), dtype=torch.bool, device=model.device)
    is_new[FIRST_ITEM_ID:] = torch.tensor(tokenizer.counts, device=model.device) == 0
    found: list[tuple[torch.Tensor, ...]] = []
    for batch in DataLoader(rows, batch_size, collate_fn=collator):
        batch = {name: values.to(model.device) for name, values in batch.items()}
        states = model.mask_states(batch["input_ids"], batch["attention_mask"], batch.get("event_type_ids"))
        targets = batch["labels"].amax(dim=1)
        names = "history_ids", "exclude_ids", "history_type_ids", "target_type_ids"
        limits = {name: batch[name] for name in names if name in batch}
        best = []
        for allowed in (~is_new, is_new):
            ranks, scores, _ = model.search(states, target_ids=targets, top_k=CUTOFF, allowed=allowed, **limits)
            best += [ranks, nn.functional.pad(scores, (0, CUTOFF - scores.shape[1]), value=-torch.inf)]
        candidates = targets.clamp(min=0).unsqueeze(1)
        own = model.search(states, top_k=1, candidate_ids=candidates, **limits)[1]
        is_new_target = is_new[targets.clamp(min=0)] & (targets >= 0)
        found.append(tuple(values.cpu() for values in (*best, own, is_new_target)))
    warm_ranks, warm, new_ranks, new, own, is_new_target = (torch.cat(parts) for parts in zip(*found, strict=True))
    needed = (warm[:, -1] - new[:, 0]).double()
    needed = needed[needed.isfinite()]
    offsets: list[float | None] = [None]
    if len(needed):
        shares = torch.tensor(SHARES_REACHED, dtype=torch.double)
        offsets += sorted({round(value, 2) for value in needed.quantile(shares).tolist()})
    trades = []
    for change in offsets:
        # A tie counts against the target, as everywhere.
        among_new = (new + (-torch.inf if change is None else change) >= own).sum(dim=1)
        among_warm = (warm >= own + (change or 0.0)).sum(dim=1)
        ranks = torch.where(is_new_target, new_ranks + among_warm, warm_ranks + among_new)
        is_ranked = torch.where(is_new_target, new_ranks * (change is not None), warm_ranks) > 0
        ranks = ranks.where(is_ranked, 0)
        of_new = ranks[is_new_target]
        hit_rate = float(((of_new > 0) & (of_new <= CUTOFF)).float().mean()) if len(of_new) else 0.0
        offset = None if change is None else round(change + model.config.new_item_offset, 2)
        trades.append(Trade(offset, ranking_metrics(ranks.numpy())[f"NDCG@{CUTOFF}"], hit_rate))
    return trades, int(is_new_target.sum())


def choose_offset(trades: list[Trade], offset: float) -> float:
    """The highest offset that loses at most `MAX_LOSS` of the quality without new items.

    Args:
        trades: What `trade_new_items` returns.
        offset: The offset of the model, which stays if there is none to choose from.
    """
    limit = (1 - MAX_LOSS) * trades[0].ndcg
    offered = [(trade.offset, trade.ndcg) for trade in trades if trade.offset is not None]
    cheap = [candidate for candidate, ndcg in offered if ndcg >= limit]
    return max(cheap, default=min((candidate for candidate, _ in offered), default=offset))


@torch.no_grad()
def set_offset(model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, offset: float) -> None:
    """Change the offset of the items without a training event."""
    places = torch.from_numpy(np.flatnonzero(np.array(tokenizer.counts) == 0) + FIRST_ITEM_ID)
    weight = model.item_bias.weight
    weight[places.to(weight.device)] += offset - model.config.new_item_offset
    model.config.new_item_offset = offset


def offer_new_items(
    model: Bert4RecForMaskedItemPrediction, tokenizer: Bert4RecTokenizer, rows: Dataset, *, batch_size: int = 64
) -> dict[str, Any]:
    """Choose the offset of new items on evaluation rows, and set it.

    Returns:
        offset; num_targets, the number of targets that are new items; and trades, one for each offset.
    """
    trades, num_targets = trade_new_items(model, tokenizer, rows, batch_size=batch_size)
    # The processes must agree, while their devices may round differently.
    offset = broadcast_object_list([choose_offset(trades, model.config.new_item_offset)])[0]
    set_offset(model, tokenizer, offset)
    return {"offset": offset, "num_targets": num_targets, "trades": [asdict(trade) for trade in trades]}


def write_new_items(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write new_items.json into a model folder and, if there were targets to measure it by, new_items.png."""
    write_file(Path(folder) / NEW_ITEMS_FILE, json.dumps(record, indent=2) + "\n")
    if record.get("num_targets"):
        write_file(Path(folder) / NEW_ITEMS_CURVE_FILE, plot_trades(record))


def plot_trades(record: Mapping[str, Any]) -> bytes:
    """The trade of new items as PNG: their HR@10 against NDCG@10 over all targets, a point for each offset."""
    from matplotlib.figure import Figure  # imported here because matplotlib is slow to load

    without, *trades = record["trades"]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    limit = (1 - MAX_LOSS) * without["ndcg"]
    axes.axvline(limit, color=GREY, linestyle="--", linewidth=1.2, label=f"{MAX_LOSS:.0%} less than without new items")
    points = [(trade["ndcg"], trade["new_item_hit_rate"]) for trade in trades]
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4)
    sizes, named = np.ptp([(without["ndcg"], 0.0), *points], axis=0) + 1e-12, np.zeros((0, 2))
    for trade, point in zip(trades, points, strict=True):
        if trade["offset"] == record["offset"]:
            axes.plot(*point, "*", color=ORANGE, markeredgecolor="black", markersize=14, label="chosen")
        if (np.abs((named - point) / sizes).max(axis=1) > ROOM_OF_A_NAME).all():
            axes.annotate(f"{trade['offset']:.3g}", point, xytext=(4, 4), textcoords="offset points", fontsize=7)
            named = np.vstack((named, point))
    axes.set_title("Validation; the numbers are the offsets", fontsize=10)
    axes.set_xlabel("NDCG@10, all targets")
    axes.set_ylabel(f"HR@10, {record['num_targets']:,} targets that are new items")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)
