"""Proves or refutes what is claimed for GPUs, and measures training and ranking on one.

    python benchmarks/gpu.py [--device cuda|cpu] [--sizes full|small] [--minutes 8] [--output FILE]

- Claims: each is tried with a small model. A claim that fails is refuted, and the others are still tried.
- A training step against its floors: the time that each operation needs at least, by the memory bandwidth and the rate
  of matrix multiplication that the device reaches. Goal: 3,416 items, 1,024 histories of length 200, width 256, at 60 %
  of the sum of the floors.
- Training throughput beside `BertForMaskedLM`. Goal: ten times as many histories a second.
- Ranking throughput.

The script needs one GPU and no network. It writes the page after each part. With `--device cpu --sizes small`, all that
a CPU can do runs in half a minute. The exit status is 1 if a claim is refuted or a part fails, and 2 without a GPU.
"""

import argparse
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from gpu_claims import CLAIMS, NotApplicableError, compile_backend, prove
from gpu_steps import (
    bert_step,
    free_memory,
    make_batch,
    make_model,
    one_line,
    peak_gib,
    seconds_per_call,
    training_step,
)
from tables import machine

from bert4rec_hf import Bert4RecForMaskedItemPrediction
from bert4rec_hf.files import write_file
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.md"
NO_GPU = "No GPU has been available: nothing on this page was measured on a GPU."
NUM_NEGATIVES, TOP_K = 1000, 10
GOAL_SHARE, GOAL_RATIO = 0.6, 10
# Share of the time after which no training cell starts, so that ranking is measured too.
TRAINING_SHARE = 0.93
# Whose peak memory is shown.
PEAK_OF = {"cuda": " of tensors", "cpu": " of the process so far"}
# Bytes of a number in bfloat16, float32 and int64.
HALF, SINGLE, LONG = 2, 4, 8


class Sizes(NamedTuple):
    """What is measured, the most important first."""

    step: tuple[int, int, int, int]  # items, hidden size, batch size, length
    catalogues: tuple[int, ...]
    widths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    length: int
    ranking_width: int
    ranking_batch_sizes: tuple[int, ...]
    square: int  # rows of the matrices whose product shows the rate
    copied: int  # numbers that are copied to show the bandwidth
    seconds: float  # for which a call is timed


SIZES = {
    "full": Sizes(
        step=(3416, 256, 1024, 200),
        catalogues=(3416, 54_542, 1_000_000),
        widths=(256, 64, 128),
        batch_sizes=(1024, 32, 4096, 512, 128),
        length=50,
        ranking_width=128,
        ranking_batch_sizes=(64, 1024),
        square=8192,
        copied=2**28,
        seconds=1.0,
    ),
    "small": Sizes(
        step=(100, 32, 4, 10),
        catalogues=(100, 300),
        widths=(32,),
        batch_sizes=(4, 2),
        length=8,
        ranking_width=32,
        ranking_batch_sizes=(2, 4),
        square=64,
        copied=2**16,
        seconds=0.01,
    ),
}


class Budget:
    """The time that the script may take."""

    def __init__(self, minutes: float):
        self.minutes, self.start = minutes, time.monotonic()

    def is_over(self, share: float = 1.0) -> bool:
        return time.monotonic() - self.start >= 60 * self.minutes * share

    @property
    def not_run(self) -> str:
        return f"not run: {self.minutes:g} minutes were over"


def claims_section(device: torch.device, sizes: Sizes, budget: Budget) -> list[str]:
    lines = ["| claim | result |", "|---|---|"]
    for title, claim in CLAIMS.items():
        lines.append(f"| {title} | {budget.not_run if budget.is_over() else prove(claim, device)} |")
        print(lines[-1], flush=True)
    return lines


def measured_cell(
    run: Callable[[], Callable[[], Any]], histories: int, device: torch.device, seconds: float
) -> tuple[float, str]:
    """Histories per second of what `run` prepares, and the cell of the table."""
    free_memory(device)
    try:
        rate = histories / seconds_per_call(run(), device, seconds)
    except NotApplicableError as reason:
        return math.nan, f"not applicable: {reason}"
    except torch.OutOfMemoryError:
        return math.nan, "out of memory"
    except Exception as error:
        return math.nan, f"failed: {one_line(error)}"
    return rate, f"{rate:,.0f} ({peak_gib(device):.2f} GiB)"


# A training step against its floors.


class Operation(NamedTuple):
    """A part of the training step: how often it occurs, its FLOP and its bytes each time."""

    name: str
    times: int
    flop: int
    bytes: int


def operations(model: Bert4RecForMaskedItemPrediction, rows: int, length: int, num_labels: int) -> list[Operation]:
    """The operations that a step needs, forward and backward, as benchmarks/step.py lists them.

    Bytes: each input is read once, each output is written once. Matrix multiplications and attention have bfloat16
    inputs and outputs; autocast keeps the item vectors, the residual stream and layer norms in float32.
    """
    config, positions = model.config, rows * length
    hidden, inner, items = config.hidden_size, config.intermediate_size, config.vocab_size - FIRST_ITEM_ID
    head = hidden // config.num_attention_heads
    table, states = items * hidden, positions * hidden
    parameters = sum(parameter.numel() for parameter in model.parameters())

    def linear(number: int, wide: int, narrow: int) -> int:
        # Forward reads input and weight and writes the output. Backward reads the gradient of the output, input and
        # weight, and writes the gradients of the input and, in float32, of the weight.
        return HALF * number * (3 * wide + 2 * narrow) + (2 * HALF + SINGLE) * wide * narrow

    look_up = LONG * positions + SINGLE * (min(states, table) + 2 * states + table)
    found = [
        Operation("item look-up", 1, 0, look_up),
        Operation("dropout of the embeddings", 1, 0, 4 * SINGLE * states),
    ]
    # All layers but the last are at all positions; of the last, only what keys and values come from.
    whole = config.num_hidden_layers - 1
    for last, (where, number) in enumerate([("all positions", positions), ("labels", num_labels)]):
        narrow, wide = number * hidden, number * inner
        turn = 4 * (HALF * narrow + SINGLE * number * head)  # cosines and sines are read in both directions
        attend = 6 * HALF * (narrow + states)
        # How often at all positions, how often at labels.
        parts: list[tuple[str, tuple[int, int], int, int]] = [
            (f"linear {hidden} to {hidden}", (4 * whole + 2, 2), 6 * narrow * hidden, linear(number, hidden, hidden)),
            (f"linear {hidden} to {inner}", (2 * whole, 2), 6 * narrow * inner, linear(number, hidden, inner)),
            (f"linear {inner} to {hidden}", (whole, 1), 6 * narrow * inner, linear(number, inner, hidden)),
            ("attention", (whole, 1), 12 * narrow * length, attend),
            ("rotary positions", (2 * whole + 1, 1), 0, turn),
            ("activation times gate", (whole, 1), 0, 8 * HALF * wide),
            ("layer norm", (2 * whole + 1, 2), 0, 5 * SINGLE * narrow),
            ("dropout", (2 * whole, 2), 0, 4 * HALF * narrow),
            # One forward, one backward.
            ("residual sum", (4 * whole + 1, 3), 0, (2 * SINGLE + HALF) * narrow),
        ]
        found += [Operation(f"{name}, {where}", times[last], flop, size) for name, times, flop, size in parts]
    # The logits are no output: a fused loss keeps them in the caches.
    softmax = 2 * SINGLE * (num_labels * hidden + table + items) + LONG * (positions + num_labels)
    return [
        *found,
        Operation("item softmax", 1, 6 * num_labels * table, softmax),
        Operation("gradient clipping", 1, 0, 2 * SINGLE * parameters),
        Operation("AdamW", 1, 0, 7 * SINGLE * parameters),
    ]


def ceilings(device: torch.device, sizes: Sizes) -> tuple[float, float, float]:
    """Bytes copied per second, read and written; FLOP per second of matrix multiplication in bfloat16, in float32."""
    source = torch.rand(sizes.copied, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    bandwidth = 2 * SINGLE * sizes.copied / seconds_per_call(copy, device, sizes.seconds)
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.randn(sizes.square, sizes.square, device=device, dtype=dtype)
        rates.append(2 * sizes.square**3 / seconds_per_call(partial(torch.mm, matrix, matrix), device, sizes.seconds))
    return bandwidth, *rates


def floors_section(device: torch.device, sizes: Sizes, budget: Budget) -> list[str]:
    if budget.is_over():
        return [budget.not_run]
    bandwidth, rate, rate_in_float32 = ceilings(device, sizes)
    items, hidden, rows, length = sizes.step
    free_memory(device)
    model = make_model(items, hidden, length, device).train()
    batch = make_batch(items, [length] * rows, device)
    num_labels = int((batch["labels"] >= 0).sum())
    table = [
        "| operation, forward and backward | times | GFLOP each | MB each | floor, ms | binding |",
        "|---|---|---|---|---|---|",
    ]
    total = 0.0
    for part in operations(model, rows, length, num_labels):
        by_bytes, by_flop = part.times * part.bytes / bandwidth, part.times * part.flop / rate
        total += max(by_bytes, by_flop)
        cells = [part.name, part.times, f"{part.flop / 1e9:.3g}" if part.flop else "", f"{part.bytes / 1e6:.3g}"]
        cells += [f"{1000 * max(by_bytes, by_flop):.3g}", "bytes" if by_bytes > by_flop else "FLOP"]
        table.append(f"| {' | '.join(map(str, cells))} |")
    table.append(f"| sum | | | | {1000 * total:.3g} | |")

    def compiled() -> Callable[[], None]:
        torch.compiler.reset()
        return training_step(model, batch, torch.bfloat16, torch.compile(model, backend=compile_backend(device)))

    steps: dict[str, Callable[[], Callable[[], None]]] = {
        "launched eagerly": lambda: training_step(model, batch, torch.bfloat16),
        "with `torch.compile`": compiled,
        "`BertForMaskedLM` by hand": lambda: bert_step(items, hidden, batch),
    }
    table += ["", "| step | ms | share that the floors are | histories a second |", "|---|---|---|---|"]
    for name, step in steps.items():
        rate_of_step, cell = measured_cell(step, rows, device, sizes.seconds)
        milliseconds, share = f"{1000 * rows / rate_of_step:.2f}", f"{total * rate_of_step / rows:.0%}"
        table.append(f"| {name} | {milliseconds} | {share} | {cell} |")
    return [
        f"{items:,} items, {rows:,} histories of length {length}, width {hidden}, {num_labels:,} labels, bf16 by "
        f"autocast. The device copies {bandwidth / 1e9:,.1f} GB a second (read and written). It multiplies "
        f"{sizes.square:,} x {sizes.square:,} matrices with {rate / 1e12:.3g} TFLOP a second in bf16, and "
        f"{rate_in_float32 / 1e12:.3g} in float32. The operations are the useful work only: labels in the last layer "
        f"and the loss, and no logits in memory. The step computes {batch['masked_positions'].numel():,} positions for "
        "the labels. Autocast keeps the item vectors, the residual stream, layer norms and the optimizer in float32. "
        f"Goals: a share of {GOAL_SHARE:.0%}, and {GOAL_RATIO} times `BertForMaskedLM` by hand.",
        "",
        *table,
    ]


# Throughput.


def training_section(device: torch.device, sizes: Sizes, budget: Budget) -> list[str]:
    def ours(items: int, hidden_size: int, rows: int, item_loss: str = "softmax") -> Callable[[], None]:
        model = make_model(items, hidden_size, sizes.length, device).train()
        model.config.item_loss = item_loss
        num_negatives = 0 if item_loss == "softmax" else min(NUM_NEGATIVES, items)
        return training_step(model, make_batch(items, [sizes.length] * rows, device, num_negatives), torch.bfloat16)

    def bert(items: int, hidden_size: int, rows: int) -> Callable[[], None]:
        return bert_step(items, hidden_size, make_batch(items, [sizes.length] * rows, device))

    found = {}
    for rows in sizes.batch_sizes:
        for hidden_size in sizes.widths:
            for items in sizes.catalogues:
                shape = (items, hidden_size, rows)
                kinds: list[Callable[..., Any] | None] = [ours, partial(ours, item_loss="sampled_softmax"), bert]
                if items < max(sizes.catalogues):
                    kinds[1] = None
                cells = []
                for kind in kinds:
                    if kind is None:
                        cells.append((math.nan, ""))
                    elif budget.is_over(TRAINING_SHARE):
                        cells.append((math.nan, budget.not_run))
                    else:
                        cells.append(measured_cell(partial(kind, *shape), rows, device, sizes.seconds))
                (full, _), _, (by_hand, _) = cells
                ratio = "" if math.isnan(full / by_hand) else f"{full / by_hand:.1f}"
                found[shape] = [*(cell for _, cell in cells), ratio]
                print(shape, *found[shape], sep=" | ", flush=True)
    return [
        f"Histories of length {sizes.length} in a second of training steps in bf16, and the peak memory"
        f"{PEAK_OF[device.type]}. The batch is masked once, and is on the device. Goal: {GOAL_RATIO} times "
        "`BertForMaskedLM` by hand.",
        "",
        f"| items | width | batch | full softmax | sampled softmax, {NUM_NEGATIVES:,} negatives | `BertForMaskedLM` "
        "| full softmax beside it |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {items:,} | {width} | {rows:,} | {' | '.join(cells)} |"
            for (items, width, rows), cells in sorted(found.items())
        ),
    ]


def ranking_section(device: torch.device, sizes: Sizes, budget: Budget) -> list[str]:
    def prepared(items: int, rows: int) -> Callable[[], Any]:
        model = make_model(items, sizes.ranking_width, sizes.length, device).eval()
        input_ids = torch.randint(FIRST_ITEM_ID, items + FIRST_ITEM_ID, (rows, sizes.length), device=device)
        input_ids[:, -1] = MASK_TOKEN_ID
        return lambda: model.recommend(input_ids, exclude_ids=input_ids, top_k=TOP_K)

    lines = [
        f"Histories of length {sizes.length} in a second of `recommend(top_k={TOP_K})` without seen items, width "
        f"{sizes.ranking_width}, and the peak memory{PEAK_OF[device.type]}.",
        "",
        "| items | batch | histories a second |",
        "|---|---|---|",
    ]
    for items in sizes.catalogues:
        for rows in sizes.ranking_batch_sizes:
            cell = budget.not_run
            if not budget.is_over():
                _, cell = measured_cell(partial(prepared, items, rows), rows, device, sizes.seconds)
            lines.append(f"| {items:,} | {rows:,} | {cell} |")
            print(lines[-1], flush=True)
    return lines


SECTIONS = {
    "Claims": claims_section,
    "A training step against its floors": floors_section,
    "Training throughput": training_section,
    "Ranking throughput": ranking_section,
}


def head(device: torch.device, name_of_sizes: str) -> str:
    if device.type == "cpu":
        title, place = "GPU: a trial run on a CPU", machine(torch.get_num_threads())
        measured = (
            f"{NO_GPU} The tables show a run with `--device cpu --sizes {name_of_sizes}`, which tests the script."
        )
    else:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which(command[0]) else None
        driver = done.stdout.strip().splitlines()[0] if done is not None and done.stdout.strip() else "unknown"
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        title, measured = "GPU", f"A run with `--sizes {name_of_sizes}`."
        place = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}, "
        place += f"torch {torch.__version__}"
    return (
        f"# {title}\n\nWritten by `benchmarks/gpu.py`, which says what is measured. {measured} {place}, "
        f"transformers {transformers.__version__}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", choices=[*SIZES], default="full")
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement starts after this time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is available: run with --device cpu --sizes small to try the script", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.init()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    budget, page, has_failed = Budget(options.minutes), head(device, options.sizes), False
    for title, section in SECTIONS.items():
        try:
            lines = section(device, SIZES[options.sizes], budget)
        except Exception as error:
            lines, has_failed = [f"failed: {one_line(error)}"], True
        has_failed |= any("refuted: " in line or "failed: " in line for line in lines)
        page += "\n" + "\n".join([f"## {title}", "", *lines]) + "\n"
        write_file(options.output, page)
    print(page)
    return int(has_failed)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.exit(main())
