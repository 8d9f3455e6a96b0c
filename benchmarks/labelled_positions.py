"""Compares two training steps: the last layer and head compute labelled positions only, or all positions.

    python benchmarks/labelled_positions.py

The script measures time and memory with 128 histories of length 200, 3,416 items, hidden size 64, 2 layers and mask
ratio .2. The two variants run in turns, each in its own process, so that their peak memory is separate. The ratio is
that of the medians.
"""

import resource
import statistics
import subprocess
import sys
import time

BATCH, LENGTH, ITEMS, STEPS, ROUNDS = 128, 200, 3416, 5, 3
VARIANTS = ("labelled positions", "everywhere")


def measure(variant: str) -> None:
    import numpy as np
    import torch

    from bert4rec_hf import (
        Bert4RecConfig,
        Bert4RecForMaskedItemPrediction,
        Bert4RecTokenizer,
        DataCollatorForMaskedItemPrediction,
    )
    from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID
    from bert4rec_hf.model.losses import softmax_loss

    torch.manual_seed(0)
    tokenizer = Bert4RecTokenizer.from_items(range(ITEMS), model_max_length=LENGTH)
    rows = np.random.default_rng(0).integers(FIRST_ITEM_ID, len(tokenizer), (BATCH, LENGTH))
    batch = DataCollatorForMaskedItemPrediction(tokenizer)([{"input_ids": row} for row in rows])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.where(batch["labels"] < 0, -100, batch["labels"] - FIRST_ITEM_ID)
    is_label = batch["masked_positions"] >= 0
    item_labels = torch.full(batch["input_ids"].shape, -100)
    rows_of_labels = torch.arange(BATCH).unsqueeze(1).expand_as(labels)[is_label]
    item_labels[rows_of_labels, batch["masked_positions"][is_label]] = labels[is_label]
    item_labels = item_labels.flatten()

    def loss() -> torch.Tensor:
        if variant == "labelled positions":
            return model(**batch).loss
        states = model.head(model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state)
        weight, bias = model.get_input_embeddings().weight[FIRST_ITEM_ID:], model.item_bias.weight[FIRST_ITEM_ID:]
        return softmax_loss(states.flatten(0, 1), weight, bias, item_labels)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(statistics.median(times[1:]), (after - before) / 2**20, float(value))


def main() -> None:
    results: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS):
        for variant in VARIANTS:
            command = [sys.executable, __file__, variant]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[variant].append([float(word) for word in output.split()])
    print(f"{'head':<20}{'seconds a step':>16}{'GiB on top':>12}{'loss':>10}")
    for variant, runs in results.items():
        seconds, memory, loss = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{variant:<20}{seconds:>16.3f}{memory:>12.2f}{loss:>10.4f}")
    labelled, everywhere = (list(zip(*results[variant], strict=True)) for variant in VARIANTS)
    speed = statistics.median(everywhere[0]) / statistics.median(labelled[0])
    memory = statistics.median(everywhere[1]) / statistics.median(labelled[1])
    print(f"{speed:.1f} times as fast, {memory:.1f} times less memory (medians of {ROUNDS} processes each)")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
