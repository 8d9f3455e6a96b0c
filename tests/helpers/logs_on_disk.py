"""Small logs as files, and the histories that `prepare` makes from them."""

import csv
from pathlib import Path

from bert4rec_hf.data.preparation import histories

HEADER = ("user_id", "item_id", "timestamp")


def write_csv(path: Path, rows, header=HEADER, **options) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **options)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def rows_of(log, **options) -> list[dict]:
    return histories(log, **options).to_pyarrow().to_pylist()


def items_of(log, **options) -> dict[str, list[str]]:
    return {row["user_id"]: row["item_id"] for row in rows_of(log, **options)}


TEMPORAL = [
    ("a", "x", 0), ("a", "y", 1), ("a", "z", 6), ("a", "x", 8), ("a", "w", 9),
    ("b", "y", 2), ("b", "x", 3), ("b", "rare", 4),
    ("c", "x", 5), ("c", "new", 9),
    ("d", "y", 7),
]  # fmt: skip
