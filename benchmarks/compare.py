"""Compares two rankings of the same test users, user by user, with a paired bootstrap.

    python benchmarks/compare.py A B [--resamples 10000]

A and B are folders with a `ranks.parquet` from benchmarks/quality.py, benchmarks/peers.py or `bert4rec evaluate
--report`, or quoted patterns of several folders, such as `'quality/ml-1m/recipe-*'`. The metrics of several folders
(seeds) are first averaged for each user. The script prints the mean of A minus B with its 95 % interval over users. The
interval does not include the variation between seeds.
"""

import argparse
import glob
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bert4rec_hf.evaluation.compare import METRICS, NUM_RESAMPLES, paired_bootstrap
from bert4rec_hf.evaluation.metrics import user_metrics

RANKS_FILE = "ranks.parquet"


def gains(pattern: str) -> tuple[list[str], np.ndarray, int]:
    """The users in order, their NDCG@10 and HR@10 (2, users), and the number of folders that were averaged."""
    found = [pattern] if Path(pattern).is_dir() else sorted(glob.glob(pattern))
    folders = [folder for folder in found if (Path(folder) / RANKS_FILE).is_file()]
    if not folders:
        raise ValueError(f"no folder {pattern} has a {RANKS_FILE}")
    recipes = {re.sub(r"-\d+$", "", Path(folder).name) for folder in folders}
    if len(recipes) > 1:
        raise ValueError(
            f"{pattern} matches runs of different recipes, {', '.join(sorted(recipes))}; name a pattern of one recipe"
        )
    users: list[str] = []
    values = []
    for folder in folders:
        table = pq.read_table(Path(folder) / RANKS_FILE).sort_by("user_id")
        if users and table["user_id"].to_pylist() != users:
            raise ValueError(f"{folders[0]} and {folder} do not have the same test users")
        users = table["user_id"].to_pylist()
        ranks = table["rank"].to_numpy()
        found = user_metrics(ranks)
        values.append([found[metric] for metric in METRICS])
    return users, np.mean(values, axis=0), len(folders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--resamples", type=int, default=NUM_RESAMPLES)
    options = parser.parse_args()
    try:
        (users, of_a, folders_a), (others, of_b, folders_b) = gains(options.a), gains(options.b)
        if users != others:
            raise ValueError(
                f"A and B do not have the same test users ({len(users):,} and {len(others):,}, of which "
                f"{len(set(users) & set(others)):,} are in both): rank both on one prepared folder"
            )
    except ValueError as error:
        parser.error(str(error))
    print(f"A: {options.a}\nB: {options.b}")
    print(f"{len(users):,} users; A: {folders_a} seed(s), B: {folders_b} seed(s); {options.resamples:,} resamples\n")
    print("| | A | B | A - B | 95 % interval | share of resamples ≤ 0 |\n|---|---|---|---|---|---|")
    for metric, a, b in zip(METRICS, of_a, of_b, strict=True):
        mean, low, high, share = paired_bootstrap(a - b, num_resamples=options.resamples)
        print(f"| {metric} | {a.mean():.4f} | {b.mean():.4f} | {mean:+.4f} | {low:+.4f} to {high:+.4f} | {share:.4f} |")


if __name__ == "__main__":
    main()
