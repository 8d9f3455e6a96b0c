"""Compares full and sampled losses for large catalogues: a training step, a whole run, and the quality.

    python benchmarks/large_catalogues.py
    python benchmarks/large_catalogues.py --whole [--output FOLDER]
    python benchmarks/large_catalogues.py --quality LOG [--epochs 5] [--seeds 3] [--output FOLDER]

- A step: 100,000 and a million items, drawn in proportion to 1 / rank; 32 histories of length 50, hidden size 64, 2
  layers, mask ratio .2, AdamW, one thread. Each loss runs in its own process.
- A whole run: `bert4rec train` from a prepared log of a million items and 4.5 million events to the model folder, with
  three steps only. Each model runs in its own process.
- Quality: validation NDCG@10 on LOG (in a form that benchmarks/quality.py accepts) after the given number of epochs.

Each measurement writes its section of benchmarks/results/large_catalogues.md.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from quality import log_name, named_seeds, prepared, spread
from quality import train as train_model
from tables import write_section

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainingArguments,
    prepare,
    train_prepared,
)
from bert4rec_hf.evaluation.protocol import Protocol
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

BATCH, LENGTH, MASK_RATIO, NUM_NEGATIVES, STEPS = 32, 50, 0.2, 1000, 5
ITEM_LOSSES = ("softmax", "sampled_softmax", "gbce")
TABLE = Path(__file__).resolve().parent / "results" / "large_catalogues.md"
HEADER = "# Large catalogues\n\n`benchmarks/large_catalogues.py` writes this page, one section per command.\n"
SAMPLED = {"item_loss": "sampled_softmax", "num_negatives": NUM_NEGATIVES}
QUALITY: dict[str, dict] = {
    "softmax": {},
    f"sampled softmax, {NUM_NEGATIVES:,} uniform negatives": SAMPLED,
    f"sampled softmax, {NUM_NEGATIVES:,} by popularity": SAMPLED | {"negative_sampling": "popularity"},
    "sampled softmax, 4,000 by popularity": SAMPLED | {"negative_sampling": "popularity", "num_negatives": 4000},
    f"gBCE, {NUM_NEGATIVES:,} uniform negatives": {"item_loss": "gbce", "num_negatives": NUM_NEGATIVES},
}
SHORT = {"eval_steps": 0.5, "save_steps": 0.5, "disable_tqdm": True}


def train(item_loss: str, num_items: int, length: int = LENGTH) -> float:
    """The median of the seconds per training step."""
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
        masked_positions = torch.from_numpy(places[:, : int(length * MASK_RATIO)])
        labels = input_ids.gather(1, masked_positions)
        options = {}
        if item_loss != "softmax":
            negatives = random.choice(num_items, min(NUM_NEGATIVES, num_items), replace=False)
            options["negative_ids"] = torch.from_numpy(negatives + FIRST_ITEM_ID)
        start = time.perf_counter()
        masked = input_ids.scatter(1, masked_positions, MASK_TOKEN_ID)
        model(input_ids=masked, labels=labels, masked_positions=masked_positions, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_gib() -> float:
    """The peak memory of this process so far. ru_maxrss is not used, since it is inherited from the parent process."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**20


def time_and_memory() -> list[str]:
    lines = ["| items | loss | seconds per step | peak GiB of the process |", "|---|---|---|---|"]
    for num_items in (100_000, 1_000_000):
        for item_loss in ITEM_LOSSES:
            command = [sys.executable, __file__, "--step", item_loss, str(num_items)]
            seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            lines.append(f"| {num_items:,} | {item_loss} | {seconds} | {peak} |")
            print(lines[-1], flush=True)
    intro = (
        f"`benchmarks/large_catalogues.py`, one thread, torch {torch.__version__}. A step has {BATCH} histories of "
        f"length {LENGTH} and {BATCH * int(LENGTH * MASK_RATIO)} labels. The model has hidden size 64 and 2 layers. "
        f"The sampled losses (sampled_softmax, gbce) have {NUM_NEGATIVES:,} negatives."
    )
    return [intro, "", *lines]


def generated(folder: Path) -> Path:
    """A prepared log of a million items, each with at least one event. The items of a user are near one item."""
    num_items, users, length = 1_000_000, 70_000, LENGTH
    random = np.random.default_rng(0)
    near = (random.pareto(1.0, users * length) * 20).astype(np.int64)
    items = (random.integers(0, num_items, users).repeat(length) + near) % num_items
    items = np.concatenate((items, random.permutation(num_items)))
    columns = {"user_id": np.arange(len(items)) // length, "item_id": items, "timestamp": np.arange(len(items))}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "log.parquet")
    prepare(folder / "log.parquet", folder / "data", split="none")
    return folder / "data"


def whole_run(data: Path, width: int, initialization: str) -> float:
    """CPU seconds from the prepared log to the model folder."""
    folder = data.parent / f"model-{width}-{initialization}"
    shutil.rmtree(folder, ignore_errors=True)
    arguments = Bert4RecTrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=BATCH,
        item_initialization=initialization,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    start = time.process_time()
    train_prepared(data, arguments, hidden_size=width)
    return time.process_time() - start


def whole_runs(folder: Path) -> list[str]:
    data = generated(folder)
    lines = ["| hidden size | item vectors start from | CPU seconds | peak GiB of the process |", "|---|---|---|---|"]
    for width in (64, 128):
        for initialization in ("random", "cooccurrence"):
            command = [sys.executable, __file__, "--run", str(data), str(width), initialization]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            seconds, peak = done[-1].split()
            lines.append(f"| {width} | {initialization} | {seconds} | {peak} |")
            print(lines[-1], flush=True)
    intro = (
        f"`benchmarks/large_catalogues.py --whole`, one thread, torch {torch.__version__}. The log has 1,000,000 "
        f"items, 4,500,000 events and histories of length {LENGTH}. A run reads the prepared log, trains three steps "
        f"of {BATCH} histories with the full softmax and AdamW, and writes the model folder."
    )
    return [intro, "", *lines]


def quality(log: str, epochs: int, seeds: range, output: Path) -> list[str]:
    data = prepared(log, output / log_name(log), None)
    lines = ["| loss | NDCG@10 | ratio to the full softmax | HR@10 | CPU minutes |", "|---|---|---|---|---|"]
    full = 0.0
    for title, change in QUALITY.items():
        runs = []
        for seed in seeds:
            folder = output / log_name(log) / "model"
            shutil.rmtree(folder, ignore_errors=True)
            start = time.process_time()
            trainer = train_model(data, folder, SHORT | {"num_train_epochs": epochs} | change, seed)
            runs.append(trainer.evaluation["metrics"] | {"minutes": (time.process_time() - start) / 60})
            print(title, json.dumps(runs[-1]), flush=True)
        values = [run["NDCG@10"] for run in runs]
        full = full or statistics.mean(values)
        cells = [
            title,
            spread(values),
            f"{statistics.mean(values) / full:.3f}",
            spread([run["HR@10"] for run in runs]),
            f"{statistics.mean(run['minutes'] for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    protocol = Protocol(**trainer.evaluation["protocol"])
    command = f"`benchmarks/large_catalogues.py --quality {log_name(log)} --epochs {epochs} --seeds {len(seeds)}`"
    intro = f"{command}. {protocol}; {named_seeds(seeds)}. All settings are the defaults, except {epochs} epochs."
    return [intro, "", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help="whole runs with a million items")
    parser.add_argument("--quality", metavar="LOG")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="large_catalogues")
    options = parser.parse_args()
    if options.step:
        print(f"{train(options.step[0], int(options.step[1])):.3f} {peak_gib():.2f}")
    elif options.run:
        data, width, initialization = options.run
        print(f"{whole_run(Path(data), int(width), initialization):.0f} {peak_gib():.2f}")
    elif options.whole:
        write_section(TABLE, HEADER, "A whole run", whole_runs(Path(options.output)))
    elif options.quality:
        lines = quality(options.quality, options.epochs, range(42, 42 + options.seeds), Path(options.output))
        write_section(TABLE, HEADER, f"Quality, {log_name(options.quality)}", lines)
    else:
        write_section(TABLE, HEADER, "A training step", time_and_memory())


if __name__ == "__main__":
    main()
