"""Measures how time and memory grow with history length, catalogue and users, and plans for 100 million users.

    python benchmarks/scaling.py

Each point runs in its own process on one core, on a machine that does nothing else. The script writes
results/scaling.md and its picture. An index of a million items, which takes a quarter of an hour, is in
benchmarks/results/serving.md.
"""

import functools
import inspect
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from large_catalogues import BATCH, LENGTH, NUM_NEGATIVES, peak_gib, train
from matplotlib.figure import Figure
from serving import TOP_K, generated, generated_histories
from sizing import BATCH as COUNTED
from sizing import GIB, MASK_RATIO, kept_bytes, on_meta
from tables import machine
from torch.utils.data import DataLoader

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    ItemIndex,
    prepare,
    read_prepared,
    training_rows,
)
from bert4rec_hf.data.histories import histories_files
from bert4rec_hf.data.rows import stream_training_rows
from bert4rec_hf.model import losses

TABLE = Path(__file__).resolve().parent / "results" / "scaling.md"
PICTURE = TABLE.parent.parent / "pictures" / "scaling.png"
LENGTHS, ITEMS = (50, 100, 200, 500, 1000), 3416
CATALOGUES = (10**3, 10**4, 10**5, 10**6)
INDEXED = CATALOGUES[:-1]
USERS, EVENTS_A_USER, ITEMS_OF_LOG = (10**3, 10**4, 10**5, 10**6), 20, 10**4
RANKED_AT_ONCE, MANY_RANKED_AT_ONCE = 256, 2048
MEASURED_WIDTH, WIDTH = 64, 128  # hidden sizes of what is measured and of what is planned


def train_step(item_loss: str, num_items: int, length: int = LENGTH) -> dict[str, float]:
    return {"seconds": train(item_loss, num_items, length), "GiB": peak_gib()}


def rank_users(
    num_items: int, length: int = LENGTH, num_users: int = RANKED_AT_ONCE, with_index: bool = False
) -> dict[str, float]:
    """Seconds per user for the ten best unseen items, with exact search in batches and with an index."""
    torch.set_num_threads(1)
    model = generated(num_items, length).eval()
    histories = generated_histories(num_items, num_users, length, torch.Generator().manual_seed(0))

    def seconds(rank: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            rank()
            times.append((time.perf_counter() - start) / num_users)
        return statistics.median(times)

    found = {"exact": seconds(lambda: model.recommend(**histories, top_k=TOP_K)), "GiB": peak_gib()}
    if with_index:
        start = time.perf_counter()
        index = ItemIndex.build(model)
        found["build"] = time.perf_counter() - start
        found["bytes"] = faiss.serialize_index(index.index).nbytes
        found["index"] = seconds(lambda: index.search(model.user_vectors(histories["input_ids"]), TOP_K + length))
    return found


def make_tokenizer(num_items: int) -> dict[str, float]:
    start = time.perf_counter()
    tokenizer = Bert4RecTokenizer.from_items(range(num_items), model_max_length=LENGTH)
    assert tokenizer.num_items == num_items
    return {"seconds": time.perf_counter() - start, "GiB": peak_gib()}


def prepare_log(log: str, data: str) -> dict[str, float]:
    start = time.perf_counter()
    prepare(log, data)
    return {"seconds": time.perf_counter() - start, "GiB": peak_gib()}


def make_batches(data: str, num_batches: int = 100) -> dict[str, float]:
    """Measure batches of the Trainer from a prepared folder, in memory and streamed."""
    start = time.perf_counter()
    histories, tokenizer, preparation = read_prepared(data)
    length = preparation["max_length"]
    rows = training_rows(histories, max_length=length, windows="proportional")
    found = {"seconds": time.perf_counter() - start}
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=length))
    with tempfile.TemporaryDirectory() as folder:
        arguments = Bert4RecTrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
        )
        trainer = Bert4RecTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    streamed = stream_training_rows([str(path) for path in histories_files(Path(data))], tokenizer)
    loaders = {"trainer": trainer.get_train_dataloader()}
    found["GiB"] = peak_gib()
    loaders["stream"] = DataLoader(streamed, BATCH, collate_fn=trainer.data_collator)
    for name, loader in loaders.items():
        start = time.perf_counter()
        batches = iter(loader)
        next(batches)
        found[f"{name}, first"] = time.perf_counter() - start
        start = time.perf_counter()
        num_rows = sum(len(batch["input_ids"]) for batch in itertools.islice(batches, num_batches))
        found[f"{name}, rows a second"] = num_rows / (time.perf_counter() - start)
    return found


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "train_step": train_step,
    "rank_users": rank_users,
    "make_tokenizer": make_tokenizer,
    "prepare_log": prepare_log,
    "make_batches": make_batches,
}


def in_own_process(measure: str, **options: Any) -> dict[str, float]:
    command = [sys.executable, __file__, measure, json.dumps(options)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def write_log(path: Path, num_users: int) -> None:
    """Write a log with items drawn in proportion to 1 / rank. The n-th events of all users precede the next ones."""
    random = np.random.default_rng(0)
    schema = pa.schema([("user_id", pa.int32()), ("item_id", pa.int32()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for number in range(EVENTS_A_USER):
            items = np.exp(random.random(num_users) * np.log(ITEMS_OF_LOG))
            times = np.arange(num_users) + number * num_users
            columns = [random.permutation(num_users).astype(np.int32), items.astype(np.int32), times]
            writer.write_table(pa.table(columns, schema=schema))


Point = dict[str, float]


def measured(
    run: Callable[..., dict[str, float]] = in_own_process,
    lengths: Sequence[int] = LENGTHS,
    catalogues: Sequence[int] = CATALOGUES,
    users: Sequence[int] = USERS,
    indexed: Sequence[int] = INDEXED,
) -> dict[str, list[Point]]:
    """For each series, a list of points: the size, and the time and memory it needs."""
    series: dict[str, list[Point]] = {"history length": [], "catalogue": [], "catalogue, by an index": [], "users": []}

    def add(name: str, point: Point) -> None:
        series[name].append(point)
        print(f"{name}: {json.dumps(point)}", flush=True)

    for length in lengths:
        step = run("train_step", item_loss="softmax", num_items=ITEMS, length=length)
        point = {
            "length": length,
            "seconds a step": step["seconds"],
            "milliseconds a history": 1000 * step["seconds"] / BATCH,
            "GiB at most": step["GiB"],
            "seconds to rank a user": run("rank_users", num_items=ITEMS, length=length)["exact"],
        }
        add("history length", point)
    for num_items in catalogues:
        point = {"items": num_items}
        for item_loss in ("softmax", "sampled_softmax"):
            step = run("train_step", item_loss=item_loss, num_items=num_items)
            point |= {f"seconds a step, {item_loss}": step["seconds"], f"GiB at most, {item_loss}": step["GiB"]}
        ranked = run("rank_users", num_items=num_items)
        many = run("rank_users", num_items=num_items, num_users=MANY_RANKED_AT_ONCE)
        tokenizer = run("make_tokenizer", num_items=num_items)
        point |= {
            "seconds to rank a user": ranked["exact"],
            f"GiB at most to rank {RANKED_AT_ONCE}": ranked["GiB"],
            f"GiB at most to rank {MANY_RANKED_AT_ONCE:,}": many["GiB"],
            "seconds of the tokenizer": tokenizer["seconds"],
            "GiB at most of the tokenizer": tokenizer["GiB"],
        }
        add("catalogue", point)
    for num_items in indexed:
        ranked = run("rank_users", num_items=num_items, with_index=True)
        point = {
            "items": num_items,
            "seconds to rank a user, exactly": ranked["exact"],
            "seconds by the index": ranked["index"],
            "milliseconds an item to build it": 1000 * ranked["build"] / num_items,
            "bytes an item": ranked["bytes"] / num_items,
        }
        add("catalogue, by an index", point)
    for num_users in users:
        with tempfile.TemporaryDirectory() as folder:
            log, data = Path(folder) / "log.parquet", Path(folder) / "data"
            write_log(log, num_users)
            prepared = run("prepare_log", log=str(log), data=str(data))
            made = run("make_batches", data=str(data))
        point = {
            "users": num_users,
            "seconds of `prepare`": prepared["seconds"],
            "GiB at most of `prepare`": prepared["GiB"],
            "seconds of `read_prepared` and `training_rows`": made["seconds"],
            "GiB at most of these": made["GiB"],
            "seconds to the first batch": made["trainer, first"],
            "rows a second after that": made["trainer, rows a second"],
            "rows a second of `stream_training_rows`": made["stream, rows a second"],
        }
        add("users", point)
    return series


def proportional(points: Sequence[Point], name: str, at: float) -> float:
    """Extrapolate a series linearly from its last two points."""
    (x, y), (next_x, next_y) = ((next(iter(point.values())), point[name]) for point in points[-2:])
    return next_y + (next_y - y) / (next_x - x) * (at - next_x)


def by_power(points: Sequence[Point], name: str, at: float) -> float:
    """Extrapolate a series with the power law of its last two points, without shrinking."""
    (x, y), (next_x, next_y) = ((next(iter(point.values())), point[name]) for point in points[-2:])
    return next_y * (at / next_x) ** max(0.0, math.log(next_y / y) / math.log(next_x / x))


@dataclass(frozen=True)
class Gpu:
    """Peak rates per second of a GPU, and the share of these rates that is assumed to be reached."""

    name: str = "A100 SXM"
    memory: float = 80 * GIB
    bf16_flops: float = 312e12
    fp32_flops: float = 19.5e12
    memory_bandwidth: float = 2.0e12
    link_bandwidth: float = 300e9  # bytes one way to the others of its node
    share: float = 0.3
    share_of_memory: float = 0.8


A100 = Gpu()
# Numbers that an optimizer keeps of an item table (rows, columns); but for the row-wise one, by its name as `optim`.
OPTIMIZER_STATE: dict[str, Callable[[int, int], int]] = {
    "adamw_torch_fused": lambda rows, columns: 2 * rows * columns,
    "second moment row-wise": lambda rows, columns: rows * columns + rows,
    "rmsprop": lambda rows, columns: rows * columns,
    "adafactor": lambda rows, columns: rows + columns,
}
# Bytes a number of the whole table that pass through every GPU in a step: 2 of the table in bf16; of its gradient by
# the softmax 4, 4 times the loss's, 2 in bf16 and 2 with the special tokens' rows; by a sampled loss 2, 2 with the
# special tokens' rows and 2 of the embedding.
PASSING_BYTES = {"softmax": 14, "sampled_softmax": 8}
# Bytes a score that are there at once: in bf16 and in fp32; of a sampled loss also masked, and beside the label's.
SCORE_BYTES = {"softmax": 6, "sampled_softmax": 14}
# Bytes a score that the softmax moves: written by the product 2, made fp32 6, amax 4, sub_, exp_ and mul_ 8 each, two
# sums 4 each, made bf16 6, read by two products 4.
SCORE_TRAFFIC = 54
# Bytes a number of the table that the softmax moves for each part of the labels: the table read twice 4, the part's
# gradient written and read 4, added to the others' 8.
PART_TRAFFIC = 16
# Bytes that ranking moves: a score written 4, looked at for NaN 6, by top-k 8; a number of the table copied 8, read 4.
RANKED_TRAFFIC, RANKED_TABLE_TRAFFIC = 18, 12


@functools.cache
def encoder_costs(hidden_size: int, length: int) -> tuple[int, float]:
    """For one history: FLOP of a forward pass, also with all positions of the last layer, and bytes of activations."""
    model = on_meta(1, hidden_size, length)
    weights = sum(weight.numel() for weight in model.model.layers.parameters())
    flops = 2 * length * weights + 4 * model.config.num_hidden_layers * length**2 * hidden_size
    return flops, kept_bytes(model, length) / COUNTED


# Rows a second of one of two data-loader workers, by benchmarks/scaling_pieces.py.
ROWS_OF_WORKER = 19_000


def plan(
    num_users: int,
    num_items: int,
    num_gpus: int,
    *,
    hidden_size: int = WIDTH,
    length: int = LENGTH,
    batch_size: int = 16_384,
    item_loss: str = "sampled_softmax",
    optim: str = "adamw_torch_fused",
    logits_at_once: int = losses.MAX_LOGITS_PER_CHUNK,
    gpu: Gpu = A100,
) -> dict[str, float]:
    """Bytes on each GPU, and seconds of a step and of an epoch with one window per user.

    Weights, gradients and optimizer state are fp32 and sharded by FSDP2; products are bf16. Biases and the weights of
    the encoder, less than a hundredth of the total, are left out. Activations are counted in fp32.
    """
    table = num_items * hidden_size
    histories = batch_size / num_gpus
    labels = histories * int(length * MASK_RATIO)
    is_full = item_loss == "softmax"
    scored = num_items if is_full else NUM_NEGATIVES
    labels_at_once = min(labels, max(1, logits_at_once // num_items)) if is_full else labels
    owned = (8 * table + 4 * OPTIMIZER_STATE[optim](num_items, hidden_size)) / num_gpus
    passing = PASSING_BYTES[item_loss] * table
    encoder_flops, encoder_bytes = encoder_costs(hidden_size, length)
    activations = histories * encoder_bytes
    scores = SCORE_BYTES[item_loss] * labels_at_once * scored

    flops = 3 * (histories * encoder_flops + 2 * labels * scored * hidden_size)
    # What a step holds is written once and read once; activations have gradients besides.
    moved = 2 * (owned + passing) + 4 * activations + SCORE_TRAFFIC * labels * scored
    if is_full:
        moved += PART_TRAFFIC * table * math.ceil(labels / labels_at_once)
    # bf16, gathered before forward and backward pass, the gradient once.
    sent = 3 * 2 * table * (num_gpus - 1) / num_gpus
    seconds = (flops / gpu.bf16_flops + moved / gpu.memory_bandwidth + sent / gpu.link_bandwidth) / gpu.share
    return {
        "owned": owned,
        "passing": passing,
        "activations and scores": activations + scores,
        "together": owned + passing + activations + scores,
        "seconds a step": seconds,
        "seconds an epoch": seconds * math.ceil(num_users / batch_size),
    }


def fewest_gpus(num_users: int, num_items: int, **options: Any) -> int:
    """The smallest power of two of GPUs that the model fits into."""
    room = A100.share_of_memory * A100.memory
    numbers = (2**power for power in range(11))
    return next(number for number in numbers if plan(num_users, num_items, number, **options)["together"] <= room)


def ranking_seconds(num_items: int, *, hidden_size: int = WIDTH, length: int = LENGTH, gpu: Gpu = A100) -> float:
    """Seconds of exact ranking for one user of a batch on one GPU: the encoder in bf16, the scores in fp32."""
    moved = num_items * (RANKED_TRAFFIC + RANKED_TABLE_TRAFFIC * hidden_size / RANKED_AT_ONCE)
    encoder_flops, _ = encoder_costs(hidden_size, length)
    computing = encoder_flops / gpu.bf16_flops + 2 * num_items * hidden_size / gpu.fp32_flops
    return (computing + moved / gpu.memory_bandwidth) / gpu.share


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if isinstance(value, int) or value >= 1000 else f"{value:.3g}"


def table(points: Sequence[Mapping[str, float | str]]) -> list[str]:
    rows = [f"| {' | '.join(map(shown, row))} |" for row in (points[0], *(point.values() for point in points))]
    return [rows[0], "|---" * len(points[0]) + "|", *rows[1:]]


def draw(series: Mapping[str, list[Point]], path: Path) -> None:
    figure = Figure(figsize=(20, 5), layout="constrained")
    for panel, points in zip(figure.subplots(1, len(series)), series.values(), strict=True):
        growing, *names = points[0]
        for name in names:
            if name.startswith(("seconds", "GiB")):
                line = {"linestyle": "--" if name.startswith("GiB") else "-", "label": name.replace("`", "")}
                panel.plot([point[growing] for point in points], [point[name] for point in points], marker="o", **line)
        panel.set(xscale="log", yscale="log", xlabel=growing, ylabel="seconds (solid), GiB (dashed)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def plan_lines(series: Mapping[str, list[Point]], num_users: int = 10**8, num_items: int = 10**7) -> list[str]:
    """The section on the plan, with the measurements extrapolated to its size."""
    cases: list[tuple[int | None, dict[str, Any]]] = [
        (1, {"batch_size": 1024}),
        (1, {}),
        (1, {"optim": "adafactor"}),
        (8, {"batch_size": 1024}),
        (8, {}),
        (None, {"hidden_size": 256}),
        (None, {"hidden_size": 512}),
        (8, {"item_loss": "softmax"}),
        (8, {"item_loss": "softmax", "logits_at_once": 2**31}),
    ]
    defaults = {name: parameter.default for name, parameter in inspect.signature(plan).parameters.items()}
    rows: list[dict[str, float | str]] = []
    for number, options in cases:
        chosen = defaults | options
        num_gpus = number or fewest_gpus(num_users, num_items, **options)
        found = plan(num_users, num_items, num_gpus, **options)
        at_once = f", 2^{math.log2(chosen['logits_at_once']):.0f} logits at a time"
        rows.append(
            {
                "item loss": chosen["item_loss"] + (at_once if chosen["item_loss"] == "softmax" else ""),
                "optim": chosen["optim"],
                "hidden size": chosen["hidden_size"],
                "histories a step": chosen["batch_size"],
                "GPUs": num_gpus,
                "GiB a GPU: its shard": found["owned"] / GIB,
                "the whole table passing": found["passing"] / GIB,
                "activations and scores": found["activations and scores"] / GIB,
                "together": found["together"] / GIB,
                "seconds a step": found["seconds a step"],
                "hours an epoch": found["seconds an epoch"] / 3600,
            }
        )
    widths = (64, 128, 256, 512)
    fewest = ", ".join(str(fewest_gpus(num_users, num_items, hidden_size=width)) for width in widths)
    bytes_a_number = {
        name: 8 + 4 * numbers(num_items, WIDTH) / (num_items * WIDTH) for name, numbers in OPTIMIZER_STATE.items()
    }
    adamw, row_wise, second_moment, factored = bytes_a_number.values()
    epoch = plan(num_users, num_items, 8)["seconds an epoch"]
    events = num_users * LENGTH
    prepared, tokenizer = (
        [proportional(series[name], f"{unit} of {what}", at) for unit in ("seconds", "GiB at most")]
        for name, what, at in (
            ("users", "`prepare`", events / EVENTS_A_USER),
            ("catalogue", "the tokenizer", num_items),
        )
    )
    searched, built, index_bytes = (
        by_power(series["catalogue, by an index"], name, num_items) * WIDTH / MEASURED_WIDTH
        for name in ("seconds by the index", "milliseconds an item to build it", "bytes an item")
    )

    def piece(anchor: str) -> str:
        return f"[measured](scaling_pieces.md#{anchor})"

    return [
        f"## A plan for {num_users:,} users and {num_items:,} items",
        "",
        f"Computed by `plan`, not measured: no GPU has been at hand. An {A100.name} has {A100.memory / GIB:.0f} GiB, "
        f"of which {A100.share_of_memory:.0%} may be filled. It reaches {A100.share:.0%} of its "
        f"{A100.bf16_flops / 1e12:.0f} TFLOP/s in bf16, {A100.fp32_flops / 1e12:.3g} TFLOP/s in fp32, "
        f"{A100.memory_bandwidth / 1e12:.3g} TB/s of memory and {A100.link_bandwidth / 1e9:.0f} GB/s to the other GPUs "
        "of its node, one after the other. Weights, gradients and optimizer state are fp32, products bf16; 2 layers, "
        f"mask ratio {MASK_RATIO}, {NUM_NEGATIVES:,} negatives where they are sampled, one window of {LENGTH} items a "
        "user and epoch. With FSDP2 (`recipes/accelerate/fsdp.yaml`) each GPU owns equally many rows of the item "
        "table, of their gradients and of their optimizer state; but the whole table in bf16 and its gradient pass "
        "through each GPU in every step. With a million items on CPU processes "
        f"({piece('a-sharded-item-table')}), four instead of two processes save .23 GiB each, where the formula says "
        ".24, and what passes, in float32, takes .47 GiB, where it says .48.",
        "",
        *table(rows),
        "",
        f"- **GPUs.** By memory, the fewest at hidden size {', '.join(map(str, widths))}: {fewest}. Where one holds "
        "it, `recipes/accelerate/one_gpu.yaml`, nothing is sharded. Every step moves the whole table, so that an epoch "
        "is shortened by larger batches first, and by more GPUs only with these. Batches above 1,024 histories are "
        "more than the package chooses itself; what larger ones cost in quality, and several nodes, have not been "
        "measured.",
        "- **Loss.** The sampled softmax. The full one makes so few labels' logits at a time that moving the table's "
        "gradient costs most; `losses.MAX_LOGITS_PER_CHUNK` is what to raise on a GPU with the memory for it.",
        f"- **Optimizer.** With AdamW the item table takes {adamw:.0f} bytes a number, 8 of them moments. A second "
        f"moment of one number a row would leave {row_wise:.1f}, {1 - row_wise / adamw:.0%} less, but no `optim` of "
        f"Transformers has that. Above two million items take `--optim adafactor`, {factored:.1f} bytes: a second "
        "moment of one number a row and one a column, and no first. It runs on one GPU and under DDP, not on a table "
        f"that FSDP2 shards; there `--optim rmsprop`, a second moment alone, takes {second_moment:.0f}. On "
        "MovieLens 100K, two seeds show no cost of Adafactor, and leave open whether RMSprop has one: test NDCG@10 "
        ".1371 with AdamW, .1370 and .1340 ([Quality](quality.md)); paired, -.0001 (95 % interval -.0046 to +.0042) "
        "and -.0032 (-.0075 to +.0010). The numbers an optimizer keeps are counted in `tests/test_benchmarks.py` from "
        "a step of the Trainer.",
        f"- **Batches.** An epoch in {epoch / 3600:.2f} hours, on 8 GPUs, reads {num_users / epoch:,.0f} rows a "
        f"second. A data-loader worker of `train --streaming` makes {ROWS_OF_WORKER:,} "
        f"({piece('rows-from-disk')}), so that takes {math.ceil(num_users / epoch / ROWS_OF_WORKER)} workers, which "
        "divide the row groups of the Parquet files, of 16,384 users each.",
        f"- **Preparation.** In proportion to the last two points, {events:,} events would take one core "
        f"{prepared[0] / 3600:.1f} hours and {prepared[1]:,.0f} GiB: with a memory limit, 100 million events took 2.7 "
        "GiB ([Logs larger than memory](prepare_large.md), `benchmarks/prepare_large.py`). `prepare` takes a table of "
        f"Spark or a warehouse as well ({piece('preparation-on-spark')}); `make test-spark` shows that the result is "
        f"equal. The tokenizer, which every process has, would take {tokenizer[0]:.0f} seconds and {tokenizer[1]:.0f} "
        "GiB.",
        f"- **Ranking all users once.** Exactly, {num_users * ranking_seconds(num_items) / 3600:.0f} GPU hours. By "
        f"`ItemIndex`, {num_users * searched / 3600:,.0f} core hours after {num_items * built / 3.6e6:,.0f} to build "
        f"it, and {num_items * index_bytes / GIB:.0f} GiB, if each goes on growing with the power between its last two "
        "points, and in proportion to the width. `bert4rec recommend` divides the files of histories among processes: "
        "two on two cores answer twice as many histories a second as one "
        f"({piece('bulk-recommendations')}), and `tests/serving/test_bulk_processes.py` shows that they write what one "
        "writes.",
    ]


def text(series: Mapping[str, list[Point]], picture: str) -> str:
    headings = {
        "history length": f"{ITEMS:,} items, softmax over all.",
        "catalogue": f"Histories of {LENGTH} items; {NUM_NEGATIVES:,} negatives where they are sampled.",
        "catalogue, by an index": "`ItemIndex` with its defaults; its recall@10, and a million items: "
        "[serving.md](serving.md).",
        "users": f"{EVENTS_A_USER} events a user, {ITEMS_OF_LOG:,} items; read from and written to Parquet. Batches "
        f"of {BATCH} rows, made in the process itself.",
    }
    lines = [
        "# Scaling",
        "",
        f"Written by `benchmarks/scaling.py`; {machine(1)}. Hidden size "
        f"64, 2 layers, {BATCH} histories a training step, {RANKED_AT_ONCE} users ranked at once, seen items "
        "filtered; medians. Memory is that of the whole process, with PyTorch in it.",
        "",
        f"![Seconds and GiB by history length, catalogue and users]({picture})",
        "",
    ]
    for name, points in series.items():
        lines += [f"## By {name}", "", headings[name], "", *table(points), ""]
    return "\n".join([*lines, *plan_lines(series)]) + "\n"


def main() -> None:
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core also for DuckDB and the index
        print(json.dumps(MEASURES[sys.argv[1]](**json.loads(sys.argv[2]))))
        return
    series = measured()
    draw(series, PICTURE)
    TABLE.write_text(text(series, f"../pictures/{PICTURE.name}"), "utf-8")


if __name__ == "__main__":
    main()
