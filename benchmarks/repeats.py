"""Generates a log with many repeated items, as in groceries or music, to test how defaults are derived.

    python benchmarks/repeats.py repeats.csv

Each of 2,000 users has some favourites among 800 items. Six of ten events are a favourite, mostly the one whose last
event is the longest ago. The other events are drawn from all items by popularity.
"""

import csv
import sys
from pathlib import Path

import numpy as np

NUM_USERS, NUM_ITEMS = 2_000, 800


def main() -> None:
    random = np.random.default_rng(0)
    popularity = 1 / np.arange(1, NUM_ITEMS + 1) ** 0.8
    popularity /= popularity.sum()
    with Path(sys.argv[1]).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for user in range(NUM_USERS):
            favourites = list(random.choice(NUM_ITEMS, random.integers(3, 9), replace=False, p=popularity))
            for day in range(random.integers(10, 90)):
                if random.random() < 0.6:
                    # Favourites are sorted by their last event, the oldest first.
                    item = favourites.pop(min(random.geometric(0.7) - 1, len(favourites) - 1))
                    favourites.append(item)
                else:
                    item = random.choice(NUM_ITEMS, p=popularity)
                writer.writerow([f"user-{user}", f"item-{item}", day])


if __name__ == "__main__":
    main()
