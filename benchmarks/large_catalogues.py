"""A training step with 100,000 and a million items: full and sampled losses, time and memory.

    python benchmarks/large_catalogues.py

32 histories of length 50, hidden size 64, 2 layers, mask ratio .2, AdamW, one thread; items in proportion to 1 / rank.
Each loss runs in a process of its own.
"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction
from bert4rec_hf.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

BATCH, LENGTH, MASK_RATIO, NUM_NEGATIVES, STEPS = 32, 50, 0.2, 1000, 5
ITEM_LOSSES = ("softmax", "sampled_softmax", "gbce")


def train(item_loss: str, num_items: int, length: int = LENGTH) -> float:
    """Seconds a training step, the median."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, max_position_embeddings=length, item_loss=item_loss)
    model = Bert4RecForMaskedItemPrediction(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    random = np.random.default_rng(0)
    seconds = []
    for _ in range(STEPS):
        ranks = np.exp(random.random((BATCH, length)) * np.log(num_items)).astype(np.int64)
        input_ids = torch.from_numpy(ranks - 1 + FIRST_ITEM_ID)
        places = random.permuted(np.tile(np.arange(length), (BATCH, 1)), axis=1)
        label_positions = torch.from_numpy(places[:, : int(length * MASK_RATIO)])
        labels = torch.full_like(input_ids, -100).scatter(1, label_positions, input_ids.gather(1, label_positions))
        options = {}
        if item_loss != "softmax":
            negatives = random.choice(num_items, min(NUM_NEGATIVES, num_items), replace=False)
            options["negative_ids"] = torch.from_numpy(negatives + FIRST_ITEM_ID)
        start = time.perf_counter()
        masked = input_ids.scatter(1, label_positions, MASK_TOKEN_ID)
        model(input_ids=masked, labels=labels, label_positions=label_positions, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_gib() -> float:
    """Of this process up to now. Not ru_maxrss, which a process has from the one that started it."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**20


def main() -> None:
    if len(sys.argv) > 1:
        print(f"{train(sys.argv[1], int(sys.argv[2])):.3f} {peak_gib():.2f}")
        return
    print("| items | loss | seconds a step | peak GiB of the process |\n|---|---|---|---|")
    for num_items in (100_000, 1_000_000):
        for item_loss in ITEM_LOSSES:
            command = [sys.executable, __file__, item_loss, str(num_items)]
            seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            print(f"| {num_items:,} | {item_loss} | {seconds} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
