"""Measures how well items are recommended that nobody has had in the training part, by what is known about them.

    python benchmarks/new_items.py LOG ITEMS --item_features NAME … --category NAME [--seeds 1] [--output FOLDER]
                                   [--prepare NAME=VALUE …] [--set NAME=VALUE …] [--hold_out]

The split is temporal, and an item is new if it has no event before the validation cut. With --hold_out, which a log
without times needs, the split is leave-one-out, and a tenth of the items, drawn at random, has no event in the training
part: these items' events are taken out of the log. The targets are, for each user, the first event of a new item in the
test part, or with --hold_out the last event of an item that was taken out, and the history is all that is before it in
the log. All items are ranked, seen items as in the log's own protocol.

The rows of the table:

- our model, with the offset that was chosen on validation (at most 1 % of NDCG@10 lost), and with those that let a new
  item into 5, 20 and 50 % of the answers;
- the same model with the mean vector for every new item, as without features;
- the nearest neighbours by features: items whose numbers are most like the mean of the newest 20 items;
- popularity in the category: the share of the history in an item's category, divided among the items of the category;
- chance.

"All targets" are the test targets of the split, new items among the candidates. The script adds rows to
results/new_items.md.
"""

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Dataset
from tables import machine, write_section

from bert4rec_hf import Bert4RecConfig, Bert4RecTokenizer, Bert4RecTrainingArguments, prepare, train_prepared
from bert4rec_hf.data.data_collator import DataCollatorForMaskedItemPrediction
from bert4rec_hf.data.histories import Histories, read_prepared
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.evaluation.metrics import ranking_metrics
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID
from bert4rec_hf.training.new_items import SHARES_REACHED, choose_offset, set_offset, trade_new_items

TABLE = Path(__file__).parent / "results" / "new_items.md"
HELD_OUT = 10  # one of so many items
SHOWN_SHARES = (0.05, 0.2, 0.5)
HEADER = """# New items

Each section is a run of `benchmarks/new_items.py`, whose docstring says how targets, split and rows are made. New items
have no event in the training part; their vectors come from features. HR@10 and HR@100 are those of targets that are new
items, ranked among the whole catalogue; ± is the standard error over users. "All targets" is the NDCG@10 of the test
targets of the split, the new ones among them, so that it shows what recommending new items costs. The row in bold has
the offset that was chosen on validation. The baselines rank by what is known of the items alone, without regard to what
that costs.

A new item is rarely worth a place among the first ten, where an item that is known would stand: at a cost of a
hundredth, few new items are found there, fewer than the nearest neighbours by features find that show nothing else.
Among the first hundred, and at a higher offset among the first ten, the vectors from features find far more than any
baseline. On the groceries, whose split is in time, they do so at no cost.

The sections of Beauty and of the groceries were measured before features trained with the network. With them, the run
on Beauty (one seed) has HR@10 .0240, HR@100 .2530 and NDCG@10 .0084 of new items and .0560 of all targets with the
chosen offset, .0564 without new items (without features: .0537). The projection that has trained serves new items less
well than a regression on the trained vectors: .0202, .2346 and .0069 at the same .0560. [Quality](quality.md) has the
defaults with features.

RecTools 0.19.0 has no row: its SASRec takes item features, but ranks the items of its training events alone
(`process_dataset_train` makes the item ids from them), so it finds no new item.
"""


def is_held_out(item: str) -> bool:
    return int(hashlib.md5(item.encode(), usedforsecurity=False).hexdigest(), 16) % HELD_OUT == 0


def cold_rows(histories: Histories, tokenizer: Bert4RecTokenizer, is_new: np.ndarray, filtered: bool) -> Dataset:
    """For each user, the first test event of a new item as the target."""
    rows = []
    for user in range(len(histories)):
        start, end = histories.offsets[user], histories.offsets[user + 1]
        first = histories.target_positions["test"][user]
        if first < 0:
            continue
        items = histories.item_ids[start:end]
        places = np.flatnonzero(is_new[items[first:]]) + first
        if filtered:
            places = [place for place in places if items[place] not in items[:place]]
        if len(places):
            rows.append(row_of(items[: places[0]], int(items[places[0]]), tokenizer, filtered))
    return Dataset.from_list(rows)


def row_of(past: np.ndarray, target: int, tokenizer: Bert4RecTokenizer, filtered: bool) -> dict[str, Any]:
    past = past[past != UNK_TOKEN_ID]
    input_ids = tokenizer.append_mask(past.tolist())
    return {
        "input_ids": input_ids,
        "labels": [-100] * (len(input_ids) - 1) + [target],
        "history_ids": past.tolist(),
        "exclude_ids": np.unique(past).tolist() if filtered else [],
    }


def held_out_rows(log: pa.Table, tokenizer: Bert4RecTokenizer, filtered: bool, last: int, only_new: bool) -> Dataset:
    """For each user, an event of the whole log as the target. Items that were taken out are not in the history.

    Args:
        last: 1: the last event; 2: the one before it.
        only_new: The last event of an item that was taken out instead.
    """
    order = "timestamp" if "timestamp" in log.column_names else "position"
    rows = []
    users = duckdb.sql(f"select list(item_id order by {order}) from log group by user_id order by user_id").fetchall()
    for (items,) in users:
        places = (
            [place for place, item in enumerate(items) if is_held_out(item)]
            if only_new
            else range(len(items) - last + 1)
        )
        if not len(places):
            continue
        past = [item for item in items[: places[-1]] if not is_held_out(item)]
        # The last two events of a user are held out from training.
        (target,) = tokenizer.item_ids_to_token_ids([items[places[-1]]])
        if past and target != UNK_TOKEN_ID:
            rows.append(row_of(np.array(tokenizer.item_ids_to_token_ids(past)), target, tokenizer, filtered))
    return Dataset.from_list(rows)


@torch.no_grad()
def model_ranks(model: Any, tokenizer: Bert4RecTokenizer, rows: Dataset) -> np.ndarray:
    collator, ranks = DataCollatorForMaskedItemPrediction(tokenizer), []
    for start in range(0, len(rows), 64):
        batch = collator(list(rows.select(range(start, min(start + 64, len(rows))))))
        states = model.mask_states(batch["input_ids"], batch["attention_mask"])
        limits = {"history_ids": batch["history_ids"], "exclude_ids": batch["exclude_ids"]}
        ranks.append(model.search(states, target_ids=batch["labels"].amax(dim=1), **limits)[0].numpy())
    return np.concatenate(ranks)


def baseline_ranks(rows: Dataset, tokenizer: Bert4RecTokenizer, table: dict, category: str) -> dict[str, np.ndarray]:
    """The ranks of the baselines. Ties are broken at random, since most items of a category tie."""
    random = np.random.default_rng(0)
    places, values, starts = tokenizer.feature_rows(table, tokenizer.items)
    owners = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    numbers = torch.sparse_coo_tensor(torch.stack((owners, places)), values, check_invariants=False).coalesce()
    row_of_item = {item: row for row, item in enumerate(table["item_id"])}
    names = [None if item not in row_of_item else str(table[category][row_of_item[item]]) for item in tokenizer.items]
    codes = np.unique([str(name) for name in names], return_inverse=True)[1]
    sizes = np.bincount(codes)
    lengths = torch.zeros(len(tokenizer.items)).index_add_(0, owners, values.square()).sqrt().clamp(min=1e-6)
    found: dict[str, list[int]] = {"nearest by features": [], f"popularity in the {category}": []}
    for row in rows:
        past = np.array(row["history_ids"][-20:], int) - FIRST_ITEM_ID
        profile = torch.zeros(numbers.shape[1])
        for item in past:
            chosen = slice(int(starts[item]), int(starts[item + 1]))
            profile.index_add_(0, places[chosen], values[chosen] / lengths[item])
        similarity = ((numbers @ profile.unsqueeze(1)).squeeze(1) / lengths).numpy()
        history = np.array(row["history_ids"], int) - FIRST_ITEM_ID
        share = np.bincount(codes[history], minlength=len(sizes)) / sizes
        for name, scores in zip(found, (similarity, share[codes]), strict=True):
            scores = scores.astype(float)
            target = row["labels"][-1] - FIRST_ITEM_ID
            scores[np.array(row["exclude_ids"], int) - FIRST_ITEM_ID] = -np.inf
            above, equal = (scores > scores[target]).sum(), (scores == scores[target]).sum()
            found[name].append(1 + int(above) + int(random.integers(equal)))
    return {name: np.array(ranks) for name, ranks in found.items()}


def measured(model: Any, tokenizer: Bert4RecTokenizer, cold: Dataset, warm: Dataset) -> dict[str, np.ndarray]:
    return {"new": model_ranks(model, tokenizer, cold), "all": model_ranks(model, tokenizer, warm)}


def options_of(words: list[str]) -> dict[str, Any]:
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}


def line(name: str, seeds: list[dict[str, np.ndarray]]) -> str:
    """A row of the table: the means over the seeds."""
    of_seeds = [ranking_metrics(ranks["new"]) for ranks in seeds]
    new = {metric: sum(found[metric] for found in of_seeds) / len(seeds) for metric in of_seeds[0]}
    hits = np.mean([(ranks["new"] > 0) & (ranks["new"] <= 10) for ranks in seeds], axis=0)
    error = hits.std() / len(hits) ** 0.5
    overall = ""
    if "all" in seeds[0]:
        overall = f"{sum(ranking_metrics(ranks['all'])['NDCG@10'] for ranks in seeds) / len(seeds):.4f}"
    return f"| {name} | {new['HR@10']:.4f} ± {error:.4f} | {new['HR@100']:.4f} | {new['NDCG@10']:.4f} | {overall} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("items")
    parser.add_argument("--item_features", nargs="+", required=True)
    parser.add_argument("--category", required=True)
    parser.add_argument("--hold_out", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--prepare", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--output", default="new_items")
    options = parser.parse_args()
    folder = Path(options.output) / (
        Path(options.log).stem if Path(options.log).stem != "interactions" else Path(options.log).parent.name
    )
    data, log = folder / "data", options.log
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if options.hold_out:
            whole = pq.read_table(log)
            log = folder / "log.parquet"
            pq.write_table(
                whole.filter(pa.array([not is_held_out(item) for item in whole["item_id"].to_pylist()])), log
            )
        split = {} if options.hold_out else {"split": "temporal"}
        prepare(
            log, data, items=options.items, item_features=options.item_features, **split, **options_of(options.prepare)
        )
    table = pq.read_table(data / "items.parquet").to_pydict()
    given = options_of(options.set)
    fields = {name: value for name, value in given.items() if name in Bert4RecConfig.__annotations__}
    arguments = {name: value for name, value in given.items() if name not in fields}
    rows: dict[str, list[dict[str, np.ndarray]]] = {}
    for seed in range(42, 42 + options.seeds):
        output = folder / f"seed-{seed}"
        if not (output / "new_items.json").is_file():
            train_prepared(data, Bert4RecTrainingArguments(str(output), seed=seed, **arguments), **fields)
        model, tokenizer = load_model(output).eval(), Bert4RecTokenizer.from_pretrained(output)
        histories, tokenizer, _ = read_prepared(data, tokenizer)
        filtered = model.config.filter_seen_items
        is_new = np.concatenate((np.zeros(FIRST_ITEM_ID, bool), np.array(tokenizer.counts) == 0))
        record = json.loads((output / "new_items.json").read_text())
        if options.hold_out:
            whole = pq.read_table(options.log)
            validation = held_out_rows(whole, tokenizer, filtered, 2, False)
            trades, number = trade_new_items(model, tokenizer, validation)
            record |= {"num_targets": number, "offset": choose_offset(trades, 0.0)}
            set_offset(model, tokenizer, record["offset"])
            cold = held_out_rows(whole, tokenizer, filtered, 1, True)
            warm = held_out_rows(whole, tokenizer, filtered, 1, False)
        else:
            trades, _ = trade_new_items(
                model, tokenizer, ranking_rows(histories, tokenizer, "validation", filter_seen_items=filtered)
            )
            cold = cold_rows(histories, tokenizer, is_new, filtered)
            warm = ranking_rows(histories, tokenizer, "test", filter_seen_items=filtered)
        shares = dict(zip(SHARES_REACHED, trades[1:], strict=False))
        offsets = {"**features, the chosen offset**": record["offset"]}
        offsets |= {
            f"features, new items in {share:.0%} of the answers": shares[share].offset for share in SHOWN_SHARES
        }
        found = {}
        for name, offset in offsets.items():
            set_offset(model, tokenizer, offset)
            found[name] = measured(model, tokenizer, cold, warm)
        places = torch.from_numpy(np.flatnonzero(is_new))
        for parameter in (model.get_input_embeddings().weight, model.item_bias.weight):
            trained = torch.from_numpy(~is_new[FIRST_ITEM_ID:])
            parameter.data[places] = parameter.data[FIRST_ITEM_ID:][trained].mean(dim=0)
        found["the mean vector"] = measured(model, tokenizer, cold, warm)
        found |= {
            name: {"new": ranks} for name, ranks in baseline_ranks(cold, tokenizer, table, options.category).items()
        }
        for name, ranks in found.items():
            rows.setdefault(name, []).append(ranks)
    lines = [line(name, of_seeds) for name, of_seeds in rows.items()]
    lines.append(f"| chance | {10 / tokenizer.num_items:.4f} | {100 / tokenizer.num_items:.4f} | | |")
    words = [Path(word).name if Path(word).exists() else word for word in sys.argv[1:]]
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    facts = (
        f"{len(cold):,} targets that are new items; {tokenizer.num_items:,} items, of which "
        f"{record['num_new_items']:,} are new. The features explain {record['explained']:.0%} of the vectors of items "
        f"left out. Seeds: {options.seeds}. `benchmarks/new_items.py {shlex.join(words)}`, "
        f"{machine(torch.get_num_threads())}."
    )
    header = ["| | new items, HR@10 | HR@100 | NDCG@10 | all targets |", "|---|---|---|---|---|"]
    title = folder.name + (", a tenth of the items held out" if options.hold_out else ", split in time")
    write_section(TABLE, HEADER, title, [facts, "", *header, *lines])


if __name__ == "__main__":
    main()
