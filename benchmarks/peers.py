"""Trains a peer library on our split, evaluates it with our metrics, and adds a row to the table of quality.py.

    python benchmarks/peers.py LOG --peer rectools-sasrec --seeds 3 [--output FOLDER] [--epochs N] [--set name=value …]

LOG has the forms that benchmarks/quality.py accepts. The peer runs in its own environment, which is created in
FOLDER/environments once. It trains on the events before the validation targets, may choose its checkpoint by these
targets, and recommends 100 items to each test user from all events before the test target. The ranks stay in FOLDER for
benchmarks/compare.py. Settings that are not given here are the peer's own; benchmarks/peer_worker.py names them and
their source. With `minutes=N`, RecTools ends its training after the epoch in which this time is over.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from quality import add_row, log_file, log_name, minutes, named_seeds, named_values, prepared, spread, write_ranks
from tables import processor

from bert4rec_hf.data.histories import HISTORIES_FILE, Histories, read_prepared
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.evaluation.baselines import baseline_ranks
from bert4rec_hf.evaluation.metrics import ranking_metrics
from bert4rec_hf.evaluation.protocol import Protocol
from bert4rec_hf.model.tokenization_bert4rec import Bert4RecTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "lineage"))
import return_trip  # noqa: E402

PYARROW = "pyarrow==21.0.0"  # the last version for NumPy 1, which RecBole and RecTools need
RECTOOLS = ["torch==2.13.0", "rectools[torch]==0.19.0", "pytorch-lightning==2.5.2"]
IMPLICIT = ["implicit==0.7.3", "pandas"]
REPLAY = ["torch==2.13.0", "replay-rec[torch]==0.22.0"]  # for benchmarks/speed.py
OTHERS = {"rectools": RECTOOLS, "implicit": IMPLICIT, "replay": REPLAY}
LIBRARIES = return_trip.LIBRARIES | {name: (packages, packages) for name, packages in OTHERS.items()}
return_trip.LIBRARIES = {name: (package, [*needed, PYARROW]) for name, (package, needed) in LIBRARIES.items()}
PEERS = {
    "rectools-bert4rec": "RecTools BERT4Rec",
    "rectools-sasrec": "RecTools SASRec",
    "recbole-bert4rec": "RecBole BERT4Rec",
    "hopwise-bert4rec": "hopwise BERT4Rec",
    "implicit-knn": "implicit item kNN",
}


def run(data: Path, environments: Path, folder: Path, peer: str, seed: int, settings: dict) -> dict:
    """Train and serve once, or read an earlier result."""
    done = folder / "peer.json"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        python = return_trip.environment(environments, peer.split("-")[0])
        file = (data / HISTORIES_FILE).resolve()
        command = [python, HERE / "peer_worker.py", peer, file, folder.resolve(), str(seed), json.dumps(settings)]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, check=True, cwd=folder, stdout=log, stderr=log)
    return json.loads(done.read_text())


def judge(lists: pa.Table, histories: Histories, tokenizer: Bert4RecTokenizer) -> tuple[list[str], np.ndarray]:
    """The test users and the ranks of their targets in their lists. A target that is not in the list has rank 0.

    Raises:
        ValueError: If a list has an item twice, an item that the user has had, or a gap in its ranks.
    """
    users = np.flatnonzero(histories.target_positions["test"] >= 0)
    starts = histories.offsets[users]
    targets = starts + histories.target_positions["test"][users]
    names = histories.user_id.take(pa.array(users)).to_pylist()
    places = {user_id: place for place, user_id in enumerate(names)}
    served_to = np.array([places[user_id] for user_id in lists["user_id"].to_pylist()])
    ranks = lists["rank"].to_numpy()
    # A user and an item, or a user and a rank, are encoded as one number, which may exceed 32 bits.
    size, item_ids = len(tokenizer), histories.item_ids.astype(np.int64)
    served = served_to * size + np.array(tokenizer.item_ids_to_token_ids(lists["item_id"].to_pylist()))
    had = np.concatenate([
        place * size + item_ids[start:end]
        for place, (start, end) in enumerate(zip(starts, targets, strict=True))
    ])  # fmt: skip
    if np.unique(served).size < len(served) or np.isin(served, had).any():
        raise ValueError("a list has an item twice, or one that its user has had")
    within = (ranks >= 1) & (ranks <= np.bincount(served_to)[served_to])
    if not within.all() or np.unique(served_to * size + ranks).size < len(ranks):
        raise ValueError("the ranks of a list are not 1, 2, 3 …")
    is_target = served == (np.arange(len(users)) * size + item_ids[targets])[served_to]
    found = np.zeros(len(users), np.int32)
    found[served_to[is_target]] = ranks[is_target]
    return names, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="peers")
    parser.add_argument("--epochs", type=int, help="maximum number of epochs, if the peer's own takes too long")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the peer")
    options = parser.parse_args()
    settings = named_values(options.set)
    if options.epochs:
        settings["epochs"] = options.epochs
    name = log_name(options.log)
    output = Path(options.output)
    data = prepared(options.log, output / name, None)
    histories, tokenizer, preparation = read_prepared(data)
    if preparation["split"]["name"] != "leave-one-out" or not preparation["filter_seen_items"]:
        parser.error("peers are run on leave-one-out with seen items filtered; prepare the log like that")
    suffix = "".join(f"-{setting}={value}" for setting, value in settings.items()).replace("/", "_")
    seeds = range(42, 42 + options.seeds)
    runs, metrics = [], []
    for seed in seeds:
        folder = output / name / f"{options.peer}{suffix}-{seed}"
        runs.append(run(data, output / "environments", folder, options.peer, seed, settings))
        users, ranks = judge(pq.read_table(folder / "lists.parquet"), histories, tokenizer)
        write_ranks(folder, users, ranks)
        metrics.append(ranking_metrics(ranks))
        print(f"seed {seed}: HR@10 {metrics[-1]['HR@10']:.4f}, NDCG@10 {metrics[-1]['NDCG@10']:.4f}", flush=True)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    protocol = Protocol.of(histories, preparation, "test", tokenizer.num_items, filter_seen_items=True)
    ranks = baseline_ranks(rows, histories, tokenizer.num_items)
    first = runs[0]
    ranking, parameters, epochs = PEERS[options.peer], "", ""
    if "epochs" in first:
        ranking += f", {named_seeds(seeds)}"
        parameters = f"{first['parameters']:,}"
        epochs = f"{statistics.mean(run['epochs'] for run in runs):.0f}"
        epochs += " (limited)" if any(run["limited"] for run in runs) else ""
    else:
        ranking += f", {first['chosen']}"
    ranking += f", `{' '.join(options.set)}`" if options.set else ""
    given = f"{log_file(options.log)} --peer {options.peer} --seeds {options.seeds}"
    given += f" --epochs {options.epochs}" if options.epochs else ""
    given += f" --set {' '.join(options.set)}" if options.set else ""
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    cells = [
        ranking,
        parameters,
        epochs,
        minutes(runs),
        *(spread([found[metric] for found in metrics]) for metric in ("HR@10", "NDCG@10")),
        spread([run["validation"] for run in runs]) if "validation" in first else "",
        f"`benchmarks/peers.py {given}`, {versions}, {processor(threads)}",
    ]
    add_row(
        name,
        data,
        protocol,
        {baseline: ranking_metrics(found) for baseline, found in ranks.items()},
        cells,
    )


if __name__ == "__main__":
    main()
