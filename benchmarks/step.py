"""Compares a training step with the sum of its operations, each timed alone, and measures the rate of collation.

    python benchmarks/step.py

The step has 32 generated histories of length 200, 3,416 items, and models of width 64 and 256 with the defaults; mask
ratio .2, seen items filtered, bfloat16 if the processor supports it, one thread. Freed memory is kept, as the Trainer
does. The operations are the useful work only: no padding, and the last layer and the loss at labels only. The goals are
a step of at most 1.3 times their sum, and 50,000 masked histories per second. The script writes results/step.md. Run it
on a machine that does nothing else.
"""

import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tables import CPU, machine
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
)
from bert4rec_hf.data.histories import Histories
from bert4rec_hf.data.rows import training_rows
from bert4rec_hf.defaults import default_architecture
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID
from bert4rec_hf.model.layers import Bert4RecRotaryEmbedding, rotate
from bert4rec_hf.model.losses import softmax_loss

BATCH, LENGTH, ITEMS, EVENTS, HIDDEN_SIZES = 32, 200, 3416, 1_000_000, (64, 256)
DTYPE = torch.bfloat16 if "avx512_bf16" in CPU else torch.float32
# All are timed in turns in each round, so many calls each.
ROUNDS, CALLS = 10, 3
# Of the matrices whose multiplication shows what the machine can do.
SQUARE = 2048
OPERATORS_SHOWN = 12
BETWEEN = "between operators, Python among it"
COLLATED_ROWS = 100_000


class Operation(NamedTuple):
    """A part of the training step: how often it occurs, and the FLOP of its matrix multiplication each time."""

    name: str
    times: int
    flop: int
    run: Callable[[], Any]


def make_model(hidden_size: int, num_items: int = ITEMS) -> Bert4RecForMaskedItemPrediction:
    chosen = default_architecture(EVENTS, num_items, {"hidden_size": hidden_size})
    config = Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, filter_seen_items=True, **chosen)
    return Bert4RecForMaskedItemPrediction(config).train()


def make_rows(num_rows: int, length: int = LENGTH, num_items: int = ITEMS) -> Dataset:
    """Training rows of random items, in the form that the Trainer reads."""
    random = np.random.default_rng(0)
    histories = Histories(
        user_id=pa.array([str(user) for user in range(num_rows)]),
        item_ids=random.integers(FIRST_ITEM_ID, num_items + FIRST_ITEM_ID, num_rows * length, dtype=np.int32),
        offsets=np.arange(num_rows + 1) * length,
        train_end=np.full(num_rows, length),
        target_positions={},
        timestamps=None,
    )
    return training_rows(histories, max_length=length, windows="proportional").remove_columns("user_id")


def make_collator(num_items: int = ITEMS, length: int = LENGTH, **options: Any) -> DataCollatorForMaskedItemPrediction:
    tokenizer = Bert4RecTokenizer.from_items(range(num_items), model_max_length=length)
    return DataCollatorForMaskedItemPrediction(tokenizer, **options)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def training_step(
    model: Bert4RecForMaskedItemPrediction, batch: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Callable[[], None]:
    optimizer = make_optimizer(model)

    def step() -> None:
        with autocast(dtype):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def both_ways(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    """Forward, and backward to all inputs and parameters that have a gradient."""
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    wanted = [tensor for tensor in (*inputs, *parameters) if tensor.requires_grad]
    gradient = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), wanted, gradient)


def operations(
    model: Bert4RecForMaskedItemPrediction, batch: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> list[Operation]:
    """The operations that a step needs. In the last layer, each history has its average number of labels as queries."""
    model = copy.deepcopy(model)  # AdamW is going to change it
    config, embeddings = model.config, model.model.embeddings
    layer: Any = model.model.layers[0]
    attention, feed_forward = (copy.deepcopy(module).to(dtype) for module in (layer.attention, layer.feed_forward))
    rows, length = batch["input_ids"].shape
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    is_label = batch["labels"] >= 0
    num_labels = int(is_label.sum())
    rotary = Bert4RecRotaryEmbedding(config)(torch.arange(length).expand(rows, -1), torch.float32)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    def of_heads(positions: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return random(rows, positions, heads, hidden // heads, dtype=dtype).transpose(1, 2)

    found = [
        Operation("item look-up", 1, 0, both_ways(embeddings.item_embeddings, batch["input_ids"])),
        Operation("dropout of the embeddings", 1, 0, both_ways(embeddings.dropout, random(rows * length, hidden))),
    ]
    # All layers but the last are at all positions; of the last, only what keys and values come from.
    whole = config.num_hidden_layers - 1
    for last, (where, number) in enumerate([("all positions", rows * length), ("labels", num_labels)]):
        queries = round(number / rows)
        states, narrow = random(number, hidden), random(number, hidden, dtype=dtype)
        gate, wide = random(number, inner, dtype=dtype), random(number, inner, dtype=dtype)
        turn = both_ways(rotate, of_heads(queries, dtype), *(angles[:, :, :queries] for angles in rotary))
        attend = both_ways(scaled_dot_product_attention, of_heads(queries), of_heads(length), of_heads(length))
        multiply = both_ways(lambda a, b: layer.feed_forward.activation(a) * b, gate, wide)
        square, oblong = 6 * number * hidden * hidden, 6 * number * hidden * inner
        # How often at all positions, how often at labels.
        parts: list[tuple[str, tuple[int, int], int, Callable[[], Any]]] = [
            (f"linear {hidden} to {hidden}", (4 * whole + 2, 2), square, both_ways(attention.query, narrow)),
            (f"linear {hidden} to {inner}", (2 * whole, 2), oblong, both_ways(feed_forward.inner, narrow)),
            (f"linear {inner} to {hidden}", (whole, 1), oblong, both_ways(feed_forward.outer, wide)),
            ("attention in float32", (whole, 1), 12 * rows * queries * length * hidden, attend),
            ("rotary positions", (2 * whole + 1, 1), 0, turn),
            ("activation times gate", (whole, 1), 0, multiply),
            ("layer norm", (2 * whole + 1, 2), 0, both_ways(layer.attention_norm, states)),
            ("dropout", (2 * whole, 2), 0, both_ways(layer.dropout, narrow)),
            # One forward, one backward.
            ("residual sum", (4 * whole + 1, 3), 0, partial(torch.add, states.detach(), narrow.detach())),
        ]
        found += [Operation(f"{name}, {where}", times[last], flop, run) for name, times, flop, run in parts]

    seen = batch["input_ids"].unsqueeze(1).expand(-1, is_label.shape[1], -1)[is_label] - FIRST_ITEM_ID
    labels = batch["labels"][is_label] - FIRST_ITEM_ID
    tables = embeddings.item_embeddings.weight, model.item_bias.weight
    table = [tensor[FIRST_ITEM_ID:].detach().requires_grad_() for tensor in tables]

    def item_softmax(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        with autocast(dtype):
            return softmax_loss(states, weight, bias, labels, excluded_ids=seen)

    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    flop = 6 * num_labels * hidden * len(table[0])
    return [
        *found,
        Operation("item softmax", 1, flop, both_ways(item_softmax, random(num_labels, hidden), *table)),
        Operation("gradient clipping", 1, 0, lambda: nn.utils.clip_grad_norm_(parameters, 1.0)),
        Operation("AdamW", 1, 0, make_optimizer(model).step),
    ]


def milliseconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds of CPU time per call of each function: the median over rounds in which they take turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, found in zip(runs, times, strict=True):
            run()  # brings into the caches what the others have driven out
            for _ in range(CALLS):
                start = time.process_time()
                run()
                found.append(1000 * (time.process_time() - start))
    return [statistics.median(found) for found in times]


def by_operator(run: Callable[[], Any]) -> Counter[str]:
    """Milliseconds per call in each of PyTorch's operators, without the operators that it calls."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(ROUNDS):
            with record_function(BETWEEN):
                run()
    return Counter({event.key: event.self_cpu_time_total / 1000 / ROUNDS for event in profiled.key_averages()})


def step_section(
    model: Bert4RecForMaskedItemPrediction, batch: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> list[str]:
    parts = [part for part in operations(model, batch, dtype) if part.times]
    step = training_step(model, batch, dtype)
    matrix = torch.randn(SQUARE, SQUARE, dtype=dtype)
    of_step, of_square, *of_parts = milliseconds([step, lambda: matrix @ matrix, *(part.run for part in parts)])
    total = sum(part.times * each for part, each in zip(parts, of_parts, strict=True))
    flop = sum(part.times * part.flop for part in parts)
    rate, best = flop / of_step / 1e6, 2 * SQUARE**3 / of_square / 1e6
    computed, num_labels = batch["masked_positions"].numel(), int((batch["labels"] >= 0).sum())
    lines = [
        f"## {model.config.hidden_size} wide",
        "",
        f"A step takes {of_step:.1f} ms, {of_step / total:.2f} times the {total:.1f} ms of its operations. Its matrix "
        f"multiplications are {flop / 1e9:.2f} GFLOP, {rate:.0f} GFLOP a second: {rate / best:.0%} of the {best:.0f} "
        f"that {SQUARE:,} x {SQUARE:,} matrices are multiplied with in {str(dtype).removeprefix('torch.')}. The step "
        f"computes {computed:,} positions for {num_labels:,} labels, of each history as many as of that with most.",
        "",
        "| operation, forward and backward | times | ms each | ms | GFLOP |",
        "|---|---|---|---|---|",
    ]
    for part, each in zip(parts, of_parts, strict=True):
        gflop = f"{part.times * part.flop / 1e9:.3f}" if part.flop else ""
        lines.append(f"| {part.name} | {part.times} | {each:.3f} | {part.times * each:.2f} | {gflop} |")

    def all_parts() -> None:
        for part in parts:
            for _ in range(part.times):
                part.run()

    profiled = by_operator(step)
    rest = Counter(profiled)
    rest.subtract(by_operator(all_parts))  # `-` would leave out what is less in the step
    lines += [
        "",
        f"Where the rest goes, by PyTorch's operator: a profiled step, {profiled.total():.1f} ms, less its profiled "
        f"operations, {rest.total():.1f} ms more than they; operators that took less in the step are not shown.",
        "",
        "| operator | ms in the step | of these in no operation | share of the step |",
        "|---|---|---|---|",
    ]
    for name, found in rest.most_common(OPERATORS_SHOWN):
        lines.append(f"| {name} | {profiled[name]:.2f} | {found:.2f} | {found / profiled.total():.1%} |")
    return lines


def collation_rates(rows: Dataset, collator: DataCollatorForMaskedItemPrediction, batch_size: int) -> list[float]:
    """Rows per second of CPU time that the collator masks, and that the Trainer's data loader reads and masks."""
    seconds = 0.0
    for features in DataLoader(rows, batch_size, collate_fn=list):
        start = time.process_time()
        collator(features)
        seconds += time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        arguments = Bert4RecTrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
        )
        model = make_model(HIDDEN_SIZES[0])
        trainer = Bert4RecTrainer(model, arguments, train_dataset=rows, data_collator=collator)
        loader = trainer.get_train_dataloader()
        start = time.process_time()
        for _ in loader:
            pass
        return [len(rows) / seconds, len(rows) / (time.process_time() - start)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    collator = make_collator()
    batch = collator(list(make_rows(BATCH)))
    lines = [
        "# A training step and its parts",
        "",
        f"Written by `benchmarks/step.py`, which says what is measured; {machine(torch.get_num_threads())}. CPU time, "
        f"medians of {ROUNDS * CALLS} calls in {ROUNDS} rounds in turns. Goal: a step of at most 1.3 times its "
        "operations.",
    ]
    for hidden_size in HIDDEN_SIZES:
        section = step_section(make_model(hidden_size), batch, DTYPE)
        print(*section, sep="\n", flush=True)
        lines += ["", *section]
    rows = make_rows(COLLATED_ROWS)
    section = [
        "## Collation",
        "",
        f"Of {COLLATED_ROWS:,} histories of length {LENGTH}, a second on one core. Goal: 50,000 masked.",
        "",
        "| histories a batch | masked by the collator | read and masked by the Trainer's data loader |",
        "|---|---|---|",
    ]
    for batch_size in (BATCH, 1024):
        masked, read = collation_rates(rows, collator, batch_size)
        section.append(f"| {batch_size:,} | {masked:,.0f} | {read:,.0f} |")
    print(*section, sep="\n")
    (Path(__file__).resolve().parent / "results" / "step.md").write_text(
        "\n".join([*lines, "", *section]) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
