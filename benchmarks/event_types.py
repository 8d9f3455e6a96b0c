"""Measures how well purchases are predicted from all events of a shop, against from purchases alone and from counts.

    python benchmarks/event_types.py results.json [--seeds 42 1 2] [--epochs 4] [--delay 10]

The log is that of benchmarks/shop.py, with views, carts and purchases. There, a purchase directly follows the view or
cart of its item. With --delay 10, it comes 1 to 10 events later. Leave-one-out holds out the last two purchases
of each user; a target is ranked among all items after all events before it. The systems are compared on the targets of
users that both models rank. NDCG@10 and HR@10, with the standard error of paired differences over users.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bert4rec_hf import Bert4RecTrainingArguments, prepare, train_prepared
from bert4rec_hf.data.counting import item_counts
from bert4rec_hf.data.histories import read_prepared
from bert4rec_hf.data.rows import ranking_rows, target_ids_of
from bert4rec_hf.evaluation.baselines import baseline_ranks, personal_popularity_ranks, transition_ranks
from bert4rec_hf.evaluation.metrics import user_metrics


def carted_last(rows: Any, cart: int, counts: np.ndarray) -> np.ndarray:
    """(users,) ranks by what was put into the cart last and was not bought since, then by popularity."""
    targets, ranks = target_ids_of(rows), []
    order = np.lexsort((np.arange(len(counts)), -counts))
    order = order[order >= 3]
    for row, target in zip(rows, targets, strict=True):
        open_items: dict[int, None] = {}
        # The types of the input stand beside its items; the history that the input does not hold is older.
        types = row["event_type_ids"][:-1]
        for item, kind in zip(row["history_ids"][-len(types) :] if types else [], types, strict=True):
            open_items.pop(item, None)
            if kind == cart:
                open_items[item] = None
        excluded = set(row["exclude_ids"])
        first = [item for item in reversed(open_items) if item not in excluded]
        if target in excluded or target < 0:
            ranks.append(0)
        elif target in first:
            ranks.append(1 + first.index(target))
        else:
            skipped = excluded | set(first)
            above = sum(1 for item in order[: int(np.flatnonzero(order == target)[0])] if item not in skipped)
            ranks.append(1 + len(first) + above)
    return np.array(ranks)


def ranks_of_model(data: Path, output: Path, seed: int, epochs: int | None) -> dict[str, int]:
    """The rank of each user's test target under a model with the defaults."""
    chosen = {} if epochs is None else {"num_train_epochs": epochs}
    args = Bert4RecTrainingArguments(str(output), seed=seed, use_cpu=True, report_to=[], disable_tqdm=True, **chosen)
    trainer = train_prepared(data, args, with_baselines=False)
    histories, tokenizer, _ = read_prepared(data)
    policy = trainer.model.config.filter_seen_items
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=policy)
    ranks = trainer.predict(rows).predictions[0]
    return dict(zip(rows["user_id"][:], ranks.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--delay", type=int, default=0)
    options = parser.parse_args()
    systems: dict[str, list[dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "shop.csv"
        subprocess.run([sys.executable, str(Path(__file__).with_name("shop.py")), str(log)], check=True)
        if options.delay:
            # A purchase comes 1 to `delay` events later, as when the cart is paid for at the end of a visit.
            events = pd.read_csv(log)
            later = np.random.default_rng(0).integers(1, options.delay + 1, len(events)) + 0.5
            events["timestamp"] += np.where(events["event_type"] == "purchase", later, 0)
            events.to_csv(log, index=False)
        prepare(log, folder / "all", event_type_column="event_type", target_event_types=["purchase"])
        prepare(log, folder / "purchases", where="event_type = 'purchase'")
        for seed in options.seeds:
            for title, data in (("all events", "all"), ("purchases alone", "purchases")):
                found = ranks_of_model(folder / data, folder / f"{data}-{seed}", seed, options.epochs)
                systems.setdefault(title, []).append(found)
        histories, tokenizer, preparation = read_prepared(folder / "all")
        policy = preparation["filter_seen_items"]
        rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=policy, max_length=10**6)
        counts = item_counts(histories, tokenizer.num_items)
        cart = tokenizer.event_type_ids(["cart"])[0]
        users = rows["user_id"][:]
        baselines = {
            "carted last, not bought": carted_last(rows, cart, counts),
            "successors into purchases": transition_ranks(rows, histories, tokenizer.num_items),
            "personal popularity": personal_popularity_ranks(rows, histories, tokenizer.num_items),
        }
        others = baseline_ranks(rows, histories, tokenizer.num_items)
        baselines |= {
            title: others[title]
            for title in ("conversion", "popularity", "last-item co-occurrence", "session kNN", "EASE")
        }
        for title, ranks in baselines.items():
            systems[title] = [dict(zip(users, ranks.tolist(), strict=True))]
        # Whether the target was put into the cart and has not been bought since.
        purchase = tokenizer.event_type_ids(["purchase"])[0]
        carted = {}
        for row, target in zip(rows, target_ids_of(rows).tolist(), strict=True):
            kinds = [
                kind for item, kind in zip(row["history_ids"], row["event_type_ids"], strict=False) if item == target
            ]
            is_carted = cart in kinds and purchase not in kinds[len(kinds) - 1 - kinds[::-1].index(cart) :]
            carted[row["user_id"]] = is_carted
        numbers = preparation["statistics"]["events_per_type"]
    shared = sorted(set.intersection(*(set(run) for runs in systems.values() for run in runs)))
    is_carted = np.array([carted[user] for user in shared])
    results: dict[str, Any] = {
        "events_per_type": numbers,
        "filter_seen_items": policy,
        "seeds": options.seeds,
        "delay": options.delay,
    }
    for group, chosen in (
        ("all", np.ones(len(shared), bool)),
        ("in the cart", is_carted),
        ("not in the cart", ~is_carted),
    ):
        results[group] = {"num_users": int(chosen.sum())}
        ours = None
        for title, runs in systems.items():
            values = [user_metrics(np.array([run[user] for user in shared])[chosen]) for run in runs]
            mean = {metric: np.mean([value[metric] for value in values], axis=0) for metric in ("NDCG@10", "HR@10")}
            record = {metric: float(value.mean()) if len(value) else None for metric, value in mean.items()}
            if ours is None:
                ours = mean["NDCG@10"]
            elif len(ours) > 1:
                difference = ours - mean["NDCG@10"]
                record["gain of all events"] = float(difference.mean())
                record["standard error"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
            results[group][title] = record
    Path(options.output).write_text(json.dumps(results, indent=2) + "\n")
    for group in ("all", "in the cart", "not in the cart"):
        print(f"\n{group}: {results[group].pop('num_users')} users")
        print(pd.DataFrame(results[group]).T.round(4).to_string())


if __name__ == "__main__":
    main()
