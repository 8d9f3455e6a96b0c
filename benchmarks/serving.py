"""Measures the milliseconds of a warm request for ten items, with exact search and with an index.

    python benchmarks/serving.py [--items 3416 1000000] [--cluster_size 100] [--batches 1 64] [--repeats 200]
    python benchmarks/serving.py --model FOLDER --data FOLDER [--batches 1 64] [--repeats 200]

A request starts from token ids and filters seen items. The distribution of item and user vectors decides how much of
the exact answer an index finds, and how long it searches; `num_probes` trades recall for time. Without --model,
the vectors are generated: the items form clusters, a history has 50 items from three clusters, and the encoder averages
the history. With --model, the vectors are those of a trained model, and the histories are the uncut histories of test
users. The script writes its section of benchmarks/results/serving.md.
"""

import argparse
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from onnx_int8 import exported
from quality import log_name
from tables import machine, write_section
from torch.utils.data import DataLoader

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
    ItemIndex,
    ranking_rows,
    read_prepared,
)
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

TABLE = Path(__file__).resolve().parent / "results" / "serving.md"
HEADER = "# Serving\n\nWritten by `benchmarks/serving.py`, which says what is measured.\n"
LENGTH, TOP_K = 50, 10
CLUSTER_SIZE, CLUSTERS_OF_A_USER = 100, 3
NUM_PROBES = (64, 256)  # the first is ItemIndex's default
WARM, FEWEST, MOST_SECONDS = 3, 20, 40
Batch = dict[str, torch.Tensor]


def generated(
    num_items: int, length: int = LENGTH, cluster_size: int = CLUSTER_SIZE
) -> Bert4RecForMaskedItemPrediction:
    """An item's cluster is the remainder of its number."""
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(
        Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, hidden_size=64, max_position_embeddings=length + 1)
    )
    with torch.no_grad():
        items = model.get_input_embeddings().weight[FIRST_ITEM_ID:]
        centres = torch.randn(num_items // cluster_size, items.shape[1])
        items.copy_(centres[torch.arange(num_items) % len(centres)] + 0.5 * torch.randn_like(items))
        # As `start_from_cooccurrence` has it: [MASK] gets the mean of the history's vectors.
        attention = model.model.layers[0].attention
        torch.nn.init.orthogonal_(attention.value.weight)
        attention.output.weight.copy_(attention.value.weight.T)
    return model


def generated_histories(
    num_items: int, batch: int, length: int, random: torch.Generator, cluster_size: int = CLUSTER_SIZE
) -> Batch:
    """Generated histories for `recommend`, each with items from three clusters."""
    number = num_items // cluster_size
    of_user = torch.randint(number, (batch, CLUSTERS_OF_A_USER), generator=random)
    cluster = of_user.gather(1, torch.randint(CLUSTERS_OF_A_USER, (batch, length), generator=random))
    items = cluster + number * torch.randint(num_items // number, (batch, length), generator=random)
    input_ids = torch.full((batch, length + 1), MASK_TOKEN_ID)
    input_ids[:, :-1] = items + FIRST_ITEM_ID
    attention_mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "exclude_ids": input_ids[:, :-1].contiguous()}


def histories_of(data: str, model: str, batch: int) -> Iterator[Batch]:
    """The histories of test users in random order, repeatedly."""
    histories, tokenizer, _ = read_prepared(data, Bert4RecTokenizer.from_pretrained(model))
    length = tokenizer.model_max_length
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True, max_length=length)
    rows = rows.select_columns(["input_ids", "labels", "history_ids", "exclude_ids"])
    collator = DataCollatorForMaskedItemPrediction(tokenizer, max_length=length)
    random = torch.Generator().manual_seed(batch)
    while True:
        for found in DataLoader(rows, batch, shuffle=True, drop_last=True, collate_fn=collator, generator=random):
            yield {name: found[name] for name in ("input_ids", "attention_mask", "history_ids", "exclude_ids")}


def percentiles(seconds: list[float]) -> str:
    p50, p99 = np.percentile(np.array(seconds) * 1000, (50, 99))
    return f"{p50:.1f} / {p99:.1f}"


def measure(
    model: Bert4RecForMaskedItemPrediction,
    histories: Callable[[], Iterator[Batch]],
    repeats: int,
    index: ItemIndex,
    others: dict[str, Callable],
) -> dict[str, str]:
    """Milliseconds of each way to search, and recall@10 of the index, on the same batches."""

    def requests() -> Iterator[Batch]:
        start = time.perf_counter()
        for repeat, batch in enumerate(itertools.islice(histories(), repeats + WARM)):
            if repeat > WARM + FEWEST and time.perf_counter() - start > MOST_SECONDS:
                return
            yield batch

    def encoded(request: Batch) -> torch.Tensor:
        return model.user_vectors(request["input_ids"], request["attention_mask"])

    def by_index(num_probes: int, request: Batch) -> torch.Tensor:
        index.num_probes = num_probes
        return model.recommend(**request, top_k=TOP_K, index=index)[1]

    def exactly(request: Batch) -> torch.Tensor:
        return model.recommend(**request, top_k=TOP_K)[1]

    ways: dict[str, Callable] = {
        "encoder": encoded,
        "exact": exactly,
        **others,
        **{f"index {num_probes}": functools.partial(by_index, num_probes) for num_probes in NUM_PROBES},
    }
    cells = {}
    for name, answer in ways.items():
        seconds = []
        for request in requests():
            start = time.perf_counter()
            answer(request)
            seconds.append(time.perf_counter() - start)
        cells[name] = percentiles(seconds[WARM:])
    for num_probes in NUM_PROBES:
        found = total = 0
        for request in itertools.islice(requests(), FEWEST):
            exact = exactly(request)
            found += int((by_index(num_probes, request).unsqueeze(2) == exact.unsqueeze(1)).sum())
            total += exact.numel()
        cells[f"index {num_probes}"] += f", {found / total:.3f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a trained one in place of generated ones")
    parser.add_argument("--data", help="the prepared folder whose test users ask, with --model")
    parser.add_argument("--items", type=int, nargs="*", default=[3416, 1_000_000])
    parser.add_argument("--cluster_size", type=int, default=CLUSTER_SIZE)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    if bool(options.model) != bool(options.data):
        parser.error("--model and --data go together")
    models = (
        [load_model(options.model)]
        if options.model
        else (generated(number, cluster_size=options.cluster_size) for number in options.items)
    )
    lines = [
        "| items | batch | encoder | exact | by ONNX | by ONNX, int8 | "
        + " | ".join(f"by an index, {num_probes}" for num_probes in NUM_PROBES)
        + " | building it |",
        "|---" * (7 + len(NUM_PROBES)) + "|",
    ]
    for model in models:
        model.eval()
        start = time.perf_counter()
        index = ItemIndex.build(model)
        building = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            others = {name: answer for name, (answer, _) in exported(model, Path(folder)).items()}
            for batch in options.batches:

                def histories(batch: int = batch, num_items: int = len(index)) -> Iterator[Batch]:
                    if options.model:
                        return histories_of(options.data, options.model, batch)
                    random = torch.Generator().manual_seed(batch)
                    return (
                        generated_histories(num_items, batch, LENGTH, random, options.cluster_size)
                        for _ in itertools.count()
                    )

                cells = measure(model, histories, options.repeats, index, others)
                lines.append(f"| {len(index):,} | {batch} | {' | '.join(cells.values())} | {building:.0f} s |")
                print(lines[-1], flush=True)
    title = f"Generated weights, 64 wide, clusters of {options.cluster_size:,} items"
    given = f"--items {' '.join(map(str, options.items))} --cluster_size {options.cluster_size}"
    if options.model:
        width = models[0].item_vectors().shape[1] - 1
        name = log_name(options.data)
        title, given = f"A model of {name}, item vectors {width:,} wide", f"--model MODEL --data {name}"
    command = f"`benchmarks/serving.py {given} --repeats {options.repeats}`"
    intro = (
        f"Milliseconds a request, p50 / p99 of {options.repeats}, or of as many as {MOST_SECONDS} seconds allow, of "
        "which p99 is about the slowest. By an index also recall@10, the share of the exact answer that it finds, by "
        f"`num_probes`. {machine(torch.get_num_threads())}. {command}"
    )
    write_section(TABLE, HEADER, title, [intro, "", *lines])


if __name__ == "__main__":
    main()
