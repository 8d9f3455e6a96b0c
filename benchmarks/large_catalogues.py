"""A training step with 100,000 and a million items: full and sampled softmax, time and memory.

    python benchmarks/large_catalogues.py

32 histories of length 50, hidden size 64, 2 layers, mask ratio .2, AdamW, one thread; items in proportion to 1 / rank.
Each way runs in a process of its own. "At once" makes the logits of all labels together.
"""

import resource
import statistics
import subprocess
import sys
import time

BATCH, LENGTH, STEPS = 32, 50, 5
WAYS = ("softmax at once", "softmax", "sampled_softmax", "gbce")


def measure(way: str, num_items: int) -> None:
    import numpy as np
    import torch

    from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, losses
    from bert4rec_hf.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

    if way == "softmax at once":
        losses.LOGITS_AT_ONCE = np.inf
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Bert4RecConfig(
        vocab_size=num_items + FIRST_ITEM_ID, max_position_embeddings=LENGTH, item_loss=way.split()[0]
    )
    model = Bert4RecForMaskedItemPrediction(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    random = np.random.default_rng(0)
    seconds = []
    for _ in range(STEPS):
        ranks = np.exp(random.random((BATCH, LENGTH)) * np.log(num_items)).astype(np.int64)
        input_ids = torch.from_numpy(ranks - 1 + FIRST_ITEM_ID)
        label_positions = torch.from_numpy(random.permuted(np.tile(np.arange(LENGTH), (BATCH, 1)), axis=1)[:, :10])
        labels = torch.full_like(input_ids, -100).scatter(1, label_positions, input_ids.gather(1, label_positions))
        options = {}
        if model.config.item_loss != "softmax":
            options["negative_ids"] = torch.from_numpy(random.choice(num_items, 1000, replace=False) + FIRST_ITEM_ID)
        start = time.perf_counter()
        masked = input_ids.scatter(1, label_positions, MASK_TOKEN_ID)
        model(input_ids=masked, labels=labels, label_positions=label_positions, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{statistics.median(seconds):.3f} {peak:.2f}")


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]))
        return
    print("| items | loss | seconds a step | peak GiB of the process |\n|---|---|---|---|")
    for num_items in (100_000, 1_000_000):
        for way in WAYS:
            command = [sys.executable, __file__, way, str(num_items)]
            seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            print(f"| {num_items:,} | {way} | {seconds} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
