"""Models, batches and training steps for benchmarks/gpu.py and benchmarks/gpu_claims.py, and how they are timed."""

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
)
from bert4rec_hf.defaults import HEAD_WIDTH, default_architecture
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, PAD_TOKEN_ID
from bert4rec_hf.model.losses import IGNORE_INDEX

# Number of events of the log that the defaults are derived from.
EVENTS = 1_000_000
MASK_RATIO = 0.2
WARM_UP_CALLS = 3
# Seconds between two synchronisations while calls are timed.
SECONDS_PER_BLOCK = 0.05


def make_model(items: int, hidden_size: int, length: int, device: torch.device) -> Bert4RecForMaskedItemPrediction:
    """A new model with the defaults, on the device from the start."""
    given = {"hidden_size": hidden_size, "filter_seen_items": True}
    chosen = default_architecture(EVENTS, items, given)
    config = Bert4RecConfig(vocab_size=items + FIRST_ITEM_ID, max_position_embeddings=length, **chosen)
    with device:
        return Bert4RecForMaskedItemPrediction(config)


@cache
def make_tokenizer(items: int) -> Bert4RecTokenizer:
    return Bert4RecTokenizer.from_items(range(items))


def make_batch(
    items: int, lengths: Sequence[int], device: torch.device, num_negatives: int = 0
) -> dict[str, torch.Tensor]:
    """Histories of random items, as the collator masks them."""
    random = np.random.default_rng(0)
    rows = [{"input_ids": random.integers(FIRST_ITEM_ID, items + FIRST_ITEM_ID, length)} for length in lengths]
    collator = DataCollatorForMaskedItemPrediction(
        make_tokenizer(items), mask_ratio=MASK_RATIO, max_length=max(lengths), num_negatives=num_negatives
    )
    return {name: values.to(device) for name, values in collator(rows).items()}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    is_half = dtype != torch.float32
    return torch.autocast(device.type, dtype if is_half else torch.bfloat16, enabled=is_half)


def training_step(
    model: nn.Module, batch: Mapping[str, torch.Tensor], dtype: torch.dtype, compiled: Callable[..., Any] | None = None
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    device = next(model.parameters()).device
    forward = model if compiled is None else compiled

    def step() -> None:
        # Batches on a CPU are copied; batches on the device are not.
        on_device = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        with autocast(device, dtype):
            loss = forward(**on_device).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bert_step(items: int, hidden_size: int, batch: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """A step of `transformers.BertForMaskedLM` as it is used by hand: logits of all items at all positions."""
    input_ids = batch["input_ids"]
    length = input_ids.shape[1]
    config = BertConfig(
        vocab_size=items + FIRST_ITEM_ID,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // HEAD_WIDTH,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=length,
        pad_token_id=PAD_TOKEN_ID,
    )
    with input_ids.device:
        model = BertForMaskedLM(config).train()
        # The padding of the positions goes into an extra column, which is dropped.
        positions = batch["masked_positions"].where(batch["masked_positions"] >= 0, length)
        labels = torch.full((len(input_ids), length + 1), IGNORE_INDEX).scatter(1, positions, batch["labels"])
    plain = {"input_ids": input_ids, "attention_mask": batch["attention_mask"], "labels": labels[:, :-1].contiguous()}
    return training_step(model, plain, torch.bfloat16)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median over blocks of calls. The device is waited for after each block only."""
    for _ in range(WARM_UP_CALLS):
        run()
    synchronize(device)
    found: list[float] = []
    start, calls = time.perf_counter(), 1
    while not found or time.perf_counter() - start < seconds:
        block_start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        found.append((time.perf_counter() - block_start) / calls)
        calls = max(1, min(1000, round(SECONDS_PER_BLOCK / found[-1])))
    return statistics.median(found)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """Peak of the memory of tensors on a GPU since `free_memory`; on a CPU, of the whole process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) / 2**20 if found else math.nan


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".replace("|", "/")
