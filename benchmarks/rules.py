"""Measures what rules cost: the time of a call of the pipeline under rules, beside the same call without.

    python benchmarks/rules.py --model FOLDER --data FOLDER [--histories 256] [--batch_size 64] [--repeats 40]

The histories are those of test users, drawn at random. The columns of the item table are generated: a price, a sale, a
category of ten, and up to three of six genres. All ways answer the same histories in every repeat, one after another in
an order that rotates, and each is divided by the call without rules of the same repeat. The script writes its section
of benchmarks/results/rules.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from quality import log_name
from tables import machine, write_section
from transformers import pipeline

from bert4rec_hf import Bert4RecTokenizer, ItemTable, Rules, read_prepared
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.model import recommendation

TABLE = Path(__file__).resolve().parent / "results" / "rules.md"
HEADER = "# Rules\n\nWritten by `benchmarks/rules.py`, which says what is measured.\n"
WARM = 3
# The way of earlier versions, in which every list of candidates counts as short.
GATHERED = ", gathered"


def generated_items(tokenizer: Bert4RecTokenizer, seed: int = 0) -> ItemTable:
    random, number = np.random.default_rng(seed), tokenizer.num_items
    columns = {
        "item_id": tokenizer.items,
        "price": random.uniform(0, 100, number),
        "on_sale": random.random(number) < 0.1,
        "category": random.choice(list("abcdefghij"), number),
        "genres": [random.choice(list("uvwxyz"), random.integers(4), replace=False).tolist() for _ in range(number)],
    }
    return ItemTable(pa.table(columns), "generated")


def ways(tokenizer: Bert4RecTokenizer, items: ItemTable, num_candidates: int) -> dict[str, dict[str, Any]]:
    """Options of the pipeline, by name. The first is without rules."""
    chosen = np.random.default_rng(1).permutation(tokenizer.items)[:num_candidates].tolist()
    all_rules = {"where": "price < 77", "boosts": {"on_sale": 0.5}, "max_per": "category:2", "diversity": 0.3}
    return {
        "none": {},
        f"{num_candidates:,} shared candidates": {"candidates": chosen},
        f"{num_candidates:,} shared candidates{GATHERED}": {"candidates": chosen},
        "50 shared candidates": {"candidates": chosen[:50]},
        "where, three quarters of the items": {"rules": Rules(items, where="price < 77")},
        "where, a twentieth of the items": {"rules": Rules(items, where="price < 5")},
        "boosts": {"rules": Rules(items, boosts={"on_sale": 0.5})},
        "quotas, of a value": {"rules": Rules(items, max_per="category:2")},
        "quotas, of lists": {"rules": Rules(items, max_per="genres:3")},
        "diversity": {"rules": Rules(diversity=0.3)},
        "where, boosts, quotas and diversity": {"rules": Rules(items, **all_rules)},
    }


def measure(answer: Callable[..., Any], options: dict[str, dict[str, Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, in each repeat."""
    names, seconds = list(options), {name: [] for name in options}
    share = recommendation.LEAST_SHARE_OF_A_LONG_LIST
    for repeat in range(repeats + WARM):
        for place in range(len(names)):
            name = names[(place + repeat) % len(names)]
            recommendation.LEAST_SHARE_OF_A_LONG_LIST = 2.0 if name.endswith(GATHERED) else share
            start = time.perf_counter()
            answer(**options[name])
            seconds[name].append(time.perf_counter() - start)
    recommendation.LEAST_SHARE_OF_A_LONG_LIST = share
    return {name: found[WARM:] for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--histories", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=1300)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    model = load_model(options.model)
    histories, tokenizer, _ = read_prepared(options.data, Bert4RecTokenizer.from_pretrained(options.model))
    users = np.random.default_rng(0).permutation(len(histories))[: options.histories]
    raw = [
        tokenizer.token_ids_to_item_ids(histories.item_ids[histories.offsets[user] : histories.offsets[user + 1] - 1])
        for user in users
    ]
    recommend = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu")
    items = generated_items(tokenizer)
    found = measure(
        lambda **given: recommend(raw, batch_size=options.batch_size, **given),
        ways(tokenizer, items, options.candidates),
        options.repeats,
    )
    none = found["none"]
    lines = ["| rules | milliseconds | ratio to none | quartiles |", "|---|---|---|---|"]
    for name, seconds in found.items():
        ratios = [one / other for one, other in zip(seconds, none, strict=True)]
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        lines.append(f"| {name} | {1000 * statistics.median(seconds):.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    start = time.perf_counter()
    items.mask("price < 50 AND category IN ('a', 'b') OR 'x' IN genres")
    once = time.perf_counter() - start
    name = log_name(options.data)
    command = (
        f"benchmarks/rules.py --model MODEL --data {name} --histories {options.histories} --batch_size "
        f"{options.batch_size} --candidates {options.candidates} --repeats {options.repeats}"
    )
    intro = (
        f"One call of the pipeline for {options.histories} histories, top 10 of {tokenizer.num_items:,} items: the "
        f"median of {options.repeats} repeats, and the median and the quartiles of its ratio to the call without rules "
        f"of the same repeat. A new condition takes {1000 * once:.0f} ms once. {machine(torch.get_num_threads())}. "
        f"`{command}`"
    )
    write_section(TABLE, HEADER, f"A model of {name}, batches of {options.batch_size}", [intro, "", *lines])


if __name__ == "__main__":
    main()
