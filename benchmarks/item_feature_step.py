"""Times a training step with item features beside one without, on generated histories.

    python benchmarks/item_feature_step.py

Each item has five of 2,000 values and a number. The models are those that the defaults choose for logs of the size of
MovieLens 1M, of Amazon Beauty 5-core, and of Amazon Beauty without filters. A step is the forward and backward pass,
clipping, and AdamW, in float32. Steps with and without features take turns on one batch. The goal is a ratio of at most
1.25. The script writes results/item_feature_step.md.
"""

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import machine, write_section
from transformers import TrainerState

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
)
from bert4rec_hf.defaults import default_architecture, default_batch_size, default_mask_ratio
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID
from bert4rec_hf.model.item_features import ItemFeatures
from bert4rec_hf.training.item_feature_training import ItemFeatureTraining, fit_item_projection

TABLE = Path(__file__).parent / "results" / "item_feature_step.md"
# Events, users, items and the length of a history.
LOGS = [(1_000_209, 6_040, 3_416, 200), (198_502, 22_363, 12_101, 9), (394_908, 40_226, 54_542, 10)]
NUM_VALUES, VALUES_OF_AN_ITEM = 2_000, 5
ROUNDS = 12
HEADER = """# The cost of item features in a training step

`benchmarks/item_feature_step.py` times a training step with item features beside one without; its docstring says how.
Serving has no cost, since the model's table holds the sums.
"""


class Run:
    """A model that trains, with item features or without."""

    def __init__(self, model: Bert4RecForMaskedItemPrediction, training: ItemFeatureTraining | None):
        self.model, self.training, self.state = model, training, TrainerState()
        parameters: list[torch.Tensor] = list(model.parameters())
        if training is not None:
            parameters.append(model.item_projection.weight)
            training.on_train_begin(None, self.state, None, model=model)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        began = time.perf_counter()
        if self.training is not None:
            self.training.on_step_begin(None, self.state, None, model=self.model)
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.training is not None:
            self.training.on_pre_optimizer_step(None, self.state, None, model=self.model)
        self.optimizer.step()
        if self.training is not None:
            self.training.on_optimizer_step(None, self.state, None, model=self.model)
        self.model.zero_grad()
        self.state.global_step += 1
        return time.perf_counter() - began


def item_table(num_items: int) -> dict[str, list[Any]]:
    chance = np.random.default_rng(0)
    values = chance.integers(0, NUM_VALUES, (num_items, VALUES_OF_AN_ITEM)).astype(str).tolist()
    items = [str(item) for item in range(num_items)]
    return {"item_id": items, "tags": values, "price": chance.random(num_items).tolist()}


def main() -> None:
    lines = [
        "| items | width | histories a step, of length | numbers of an item | without, ms | with, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for num_events, num_users, num_items, length in LOGS:
        config = Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, **default_architecture(num_events, num_items, {}))
        model = Bert4RecForMaskedItemPrediction(config).train()
        table = item_table(num_items)
        tokenizer = Bert4RecTokenizer.from_items(table["item_id"], counts=dict.fromkeys(table["item_id"], 5))
        columns = [{"name": "tags", "kind": "categories"}, {"name": "price", "kind": "number"}]
        tokenizer.item_features = ItemFeatures.fit(columns, table)
        with_features = copy.deepcopy(model)
        fit_item_projection(with_features, tokenizer, table)
        runs = [Run(model, None), Run(with_features, ItemFeatureTraining(tokenizer, table))]
        batch_size = default_batch_size(num_users)
        mask_ratio = default_mask_ratio(length, num_users, config.causal_attention)
        collator = DataCollatorForMaskedItemPrediction(
            tokenizer, mask_ratio=mask_ratio, max_length=length, causal=config.causal_attention
        )
        chance = np.random.default_rng(0)
        items = chance.integers(FIRST_ITEM_ID, num_items + FIRST_ITEM_ID, (batch_size, length))
        batch = collator([{"input_ids": row} for row in items])
        for run in runs:
            run.step(batch)
        seconds = [[run.step(batch) for run in runs] for _ in range(ROUNDS)]
        without, with_them = (1000 * statistics.median(column) for column in zip(*seconds, strict=True))
        lines.append(
            f"| {num_items:,} | {config.hidden_size} | {batch_size}, {length} | {VALUES_OF_AN_ITEM + 2} "
            f"| {without:.0f} | {with_them:.0f} | {with_them / without:.2f} |"
        )
    write_section(TABLE, HEADER, machine(torch.get_num_threads()), [f"Medians of {ROUNDS} steps.", "", *lines])


if __name__ == "__main__":
    main()
