"""Compares evaluation with other libraries: metrics with ranx and RecTools, leave-one-out with RecBole and SASRec.

    python tests/agreement/run.py FOLDER

The script creates the environments of the libraries in FOLDER (once) and prints the differences. The exit code is 1 if
there is a difference that docs/concepts/protocols.md does not explain.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, histories, ranking_metrics, read_log
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID
from bert4rec_hf.model.losses import IGNORE_INDEX

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "lineage"))
import return_trip  # noqa: E402

SASREC_LOG = HERE.parents[2] / "shared" / "data" / "ml-1m-sasrec" / "interactions.parquet"
ML_100K = "lib/python*/site-packages/recbole/dataset_example/ml-100k/ml-100k.inter"  # comes with RecBole
METRIC_LIBRARIES = ["ranx==0.3.21", "rectools==0.19.0"]
return_trip.LIBRARIES["metrics"] = (METRIC_LIBRARIES, METRIC_LIBRARIES)

CUTOFFS = (1, 5, 10, 20, 100)
NUM_USERS, NUM_ITEMS = 500, 300
TOLERANCE = 1e-9
MUST_AGREE = ("no ties", "ties, target last among equals")

Parts = dict[str, dict[str, Any]]


def ask(environments: Path, library: str, task: str, file: Path) -> Any:
    output = file.with_suffix(".answer")
    python = return_trip.environment(environments, library)
    subprocess.run(
        [python, HERE / "peers.py", task, file, output],
        check=True,
        cwd=file.parent,
        env=os.environ | {"NUMBA_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
    )
    return json.loads(output.read_text())


def search(
    scores: torch.Tensor, targets: torch.Tensor, exclude_ids: torch.Tensor
) -> tuple[torch.Tensor, list[list[tuple[int, float]]]]:
    """Serve from given scores (users, items). Returns the ranks of the targets and full lists of items and scores."""
    num_items = scores.shape[1]
    config = Bert4RecConfig(
        vocab_size=num_items + FIRST_ITEM_ID, hidden_size=num_items, num_hidden_layers=1, intermediate_size=4
    )
    model = Bert4RecForMaskedItemPrediction(config).eval()
    with torch.no_grad():  # with these weights, the hidden state contains the score of each item
        model.get_input_embeddings().weight.zero_()[FIRST_ITEM_ID:] = torch.eye(num_items)
        model.item_bias.weight.zero_()
    ranks, best, item_ids = model.search(
        scores.unsqueeze(1), target_ids=targets, exclude_ids=exclude_ids, top_k=num_items
    )
    lists = [
        [(item, score) for item, score in zip(items, values, strict=True) if item]
        for items, values in zip(item_ids.tolist(), best.tolist(), strict=True)
    ]
    return ranks, lists


def compare_metrics(environments: Path, folder: Path) -> bool:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(NUM_USERS, NUM_ITEMS, generator=generator)
    order = torch.stack([torch.randperm(NUM_ITEMS, generator=generator) for _ in range(NUM_USERS)]) + FIRST_ITEM_ID
    exclude_ids, targets = order[:, :20], order[:, 20].clone()
    scores.scatter_add_(1, targets.unsqueeze(1) - FIRST_ITEM_ID, torch.full((NUM_USERS, 1), 1.5))
    targets[0], targets[1] = exclude_ids[0, 0], IGNORE_INDEX  # a seen item and an unknown item: both are misses
    tied = (scores * 4).round() / 4
    assert all(len(row.unique()) == NUM_ITEMS for row in scores)

    ranks, ours, lists = {}, {}, {}
    for kind, values in (("no ties", scores), ("ties", tied)):
        ranks[kind], lists[kind] = search(values, targets, exclude_ids)
        found = ranks[kind].numpy()
        ours[kind] = {name: value for name, value in ranking_metrics(found).items() if name[-3:] != "@50"}
        for k in CUTOFFS:
            ours[kind][f"MRR@{k}"] = ranking_metrics(np.where(found <= k, found, 0))["MRR"]

    def ordered(sign: int) -> list[list[tuple[int, float]]]:
        """The lists with ties resolved: the target is last (sign 1) or first (sign -1) among items of equal score."""
        rows = []
        for served, target in zip(lists["ties"], targets.tolist(), strict=True):
            row = sorted(served, key=lambda entry: (-entry[1], sign * (entry[0] == target)))
            rows.append([(item, -place) for place, (item, _) in enumerate(row)])
        return rows

    cases = {
        "no ties": lists["no ties"],
        "ties, target last among equals": ordered(1),
        "ties, in the order served": lists["ties"],
        "ties, target first among equals": ordered(-1),
    }
    file = folder / "lists.json"
    content = {
        "cutoffs": CUTOFFS,
        "num_items": NUM_ITEMS,
        "targets": {str(user): str(target) for user, target in enumerate(targets.tolist())},
        "lists": {
            case: {str(user): [[str(item), score] for item, score in row] for user, row in enumerate(rows)}
            for case, rows in cases.items()
        },
    }
    file.write_text(json.dumps(content))
    theirs = ask(environments, "metrics", "metrics", file)

    num_tied = 0
    for served, target in zip(lists["ties"], targets.tolist(), strict=True):
        values = [score for _, score in served]
        num_tied += target in dict(served) and values.count(dict(served)[target]) > 1
    print(f"{NUM_USERS} users, {NUM_ITEMS} items of which each has seen 20; in the case of ties {num_tied} targets tie")
    print(f"{'':42}" + "".join(f"{name:>10}" for name in ("HR@10", "NDCG@10", "MRR@10", "MRR")))
    for kind, mine in ours.items():
        print(
            f"{'ours, ' + kind:42}" + "".join(f"{mine[name]:10.4f}" for name in ("HR@10", "NDCG@10", "MRR@10", "MRR"))
        )
    print(
        f"{'largest difference to ours, all cutoffs':42}"
        + "".join(f"{name:>10}" for name in ("HR", "NDCG", "MRR@k", "MRR"))
    )
    agrees = True
    for case, answers in theirs.items():
        mine = ours["no ties" if case == "no ties" else "ties"]
        for library, values in answers.items():
            groups = {"HR@": 0.0, "NDCG@": 0.0, "MRR@": 0.0, "MRR": 0.0}
            for name, value in mine.items():
                group = name[: name.find("@") + 1] or name
                groups[group] = max(groups[group], abs(values[name] - value))
            same = max(groups.values()) < TOLERANCE
            agrees &= same or case not in MUST_AGREE
            print(f"{case + ': ' + library:42}" + "".join(f"{value:10.1e}" for value in groups.values()))
    # RecTools' default NDCG is divided by the DCG of k relevant items.
    default = theirs["no ties"]["RecTools"]
    ideals = {k: sum(1 / math.log2(place + 1) for place in range(1, k + 1)) for k in CUTOFFS}
    agrees &= all(
        abs(default[f"default NDCG@{k}"] * ideals[k] - ours["no ties"][f"NDCG@{k}"]) < TOLERANCE for k in ideals
    )
    print(f"RecTools' default NDCG@10, no ties: {default['default NDCG@10']:.4f}, ours divided by {ideals[10]:.2f}")
    return agrees


def our_split(log: Path, user_column: str, item_column: str, **order: str | None) -> Parts:
    """For each user, our training items in order, and our validation and test items."""
    table = histories(read_log(log), user_column=user_column, item_column=item_column, **order)
    parts: Parts = {}
    for row in table.to_pyarrow().to_pylist():
        parts[row["user_id"]] = {"train": row["item_id"][: row["train_end"]]}
        for part in ("validation", "test"):
            if row[f"{part}_position"] is not None:
                parts[row["user_id"]][part] = row["item_id"][row[f"{part}_position"]]
    return parts


def differing(ours: Parts, theirs: Parts, same: Callable[[Any], Any] = lambda parts: parts) -> set[str]:
    """The users that only one of the splits has, or whose parts differ."""
    return {user for user in ours.keys() | theirs.keys() if same(ours.get(user, {})) != same(theirs.get(user, {}))}


def without_order(parts: dict[str, Any]) -> dict[str, Any]:
    return parts | {"train": sorted(parts.get("train", []))}


def compare_with_recbole(environments: Path, folder: Path) -> bool:
    python = return_trip.environment(environments, "recbole")
    lines = next(python.parent.parent.glob(ML_100K)).read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    times = np.array([int(row[3]) for row in rows])
    rounded = times.astype(np.float32).astype(np.int64)
    exact = np.unique(times, return_inverse=True)[1]  # numbers in order of time, which a float32 represents exactly

    def write(name: str, values: np.ndarray) -> Path:
        file = folder / name / f"{name}.inter"
        file.parent.mkdir()
        body = "".join(f"{row[0]}\t{row[1]}\t{value}\n" for row, value in zip(rows, values, strict=True))
        file.write_text("user_id:token\titem_id:token\ttimestamp:float\n" + body)
        return file

    columns = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    files = {"raw": write("raw", times), "rounded": write("rounded", rounded), "exact": write("exact", exact)}
    ours = {name: our_split(file, **columns) for name, file in files.items()}
    theirs = {name: ask(environments, "recbole", "split", files[name]) for name in ("raw", "exact")}

    # Users with two events of the same time, of which one is before and one after a cut.
    tied: dict[str, set[str]] = {"seconds": set(), "float32": set()}
    for kind, values in (("seconds", times), ("float32", rounded)):
        user_times: dict[str, list[int]] = {}
        for row, value in zip(rows, values.tolist(), strict=True):
            user_times.setdefault(row[0], []).append(value)
        for user, found in user_times.items():
            newest = sorted(found)[-3:]
            if len(set(newest)) < 3:
                tied[kind].add(user)
    num_users = len(ours["raw"])
    parts = differing(ours["raw"], theirs["raw"], without_order)
    results = {
        "raw times, users without ties at a cut": len(parts - tied["float32"]),
        "our split of float32 times, theirs of raw times": len(differing(ours["rounded"], theirs["raw"])),
        "numbered times, which a float32 represents": len(differing(ours["exact"], theirs["exact"])),
        "our split of numbered times, ours of raw times": len(differing(ours["exact"], ours["raw"])),
    }
    print(f"\nRecBole 1.2.1, LS valid_and_test, order TO: {num_users} users of MovieLens 100K")
    print(
        f"tied at a cut: {len(tied['seconds'])} users to the second, {len(tied['float32'])} as float32, RecBole's type"
    )
    print(f"raw times: {len(parts)} users ({len(parts) / num_users:.1%}) have another item in some part, ", end="")
    print(f"{len(differing(ours['raw'], theirs['raw']))} another item or order")
    for case, number in results.items():
        print(f"{case + ':':50}{number:4} users differ")
    return num_users == 943 and not any(results.values())


def sasrec_split(file: Path) -> Parts:
    """The split of SASRec's data_partition, in file order. Users with fewer than 3 events are used in training only."""
    items: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        user, item = line.split(" ")
        items.setdefault(user, []).append(item)
    return {
        user: {"train": found} if len(found) < 3 else {"train": found[:-2], "validation": found[-2], "test": found[-1]}
        for user, found in items.items()
    }


def compare_with_sasrec(folder: Path) -> bool:
    if not SASREC_LOG.is_file():
        print(f"\nSASRec's file: skipped, since {SASREC_LOG.parent.name} is not available")
        return True
    log = pq.read_table(SASREC_LOG, columns=["user_id", "item_id", "position"])
    log = log.sort_by([("user_id", "ascending"), ("position", "ascending")])
    short = pa.table({"user_id": [6041, 6042, 6042], "item_id": [1, 1, 2], "position": [0, 0, 1]})
    log = pa.concat_tables([log, short.cast(log.schema)])
    pq.write_table(log, folder / "log.parquet")
    text = folder / "ml-1m.txt"
    text.write_text("".join(f"{row['user_id']} {row['item_id']}\n" for row in log.to_pylist()))
    theirs = sasrec_split(text)
    ours = our_split(folder / "log.parquet", "user_id", "item_id", sequence_column="position")
    number = len(differing(ours, theirs))
    print(f"\nSASRec's file of MovieLens 1M, and two users of one and two events: {len(theirs)} users, {number} differ")
    return len(theirs) == 6042 and not number


def main() -> None:
    environments = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        agrees = [
            compare_metrics(environments, folder),
            compare_with_recbole(environments, folder),
            compare_with_sasrec(folder),
        ]
    sys.exit(int(not all(agrees)))


if __name__ == "__main__":
    main()
