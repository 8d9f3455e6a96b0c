"""Generates the log of a shop, with views, carts and purchases, to test how defaults are derived.

    python benchmarks/shop.py shop.csv [--no_consecutive_repeats] [--sessions]
    python benchmarks/shop.py shop.csv --weeks 26

Each of 4,000 users visits the shop some times. A visit is about one of 60 categories, mostly one that the user likes.
The user views items of the category: mostly a neighbour of the item before, sometimes an item seen earlier in the
visit, else an item drawn by popularity. An item that pleases goes into the cart, and half of the carts end in
purchases. Some purchases are bought again in a later visit. All three are events of the same item, so almost half of
the events are repeats.

With --weeks, the visits are spread over these weeks, for benchmarks/updates.py. Three of ten items come into the shop
in the course of the weeks, each item becomes more or less popular by up to about a tenth a week, and before one visit
in ten, a user comes to like another category.

With --no_consecutive_repeats, an event of the same item as the event before is left out. With --sessions, each visit
with two events or more is a user of its own.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

NUM_USERS, NUM_ITEMS, NUM_CATEGORIES = 4_000, 1_500, 60
START, WEEK = 1_704_067_200, 7 * 24 * 60 * 60  # 1 January 2024, in seconds since 1970


def visit(random: np.random.Generator, items: np.ndarray, popularity: np.ndarray) -> list[tuple[int, str]]:
    """The events of one visit to a category: pairs of an item and the type of the event."""
    events: list[tuple[int, str]] = []
    item = int(random.choice(items, p=popularity))
    seen = [item]
    for _ in range(random.geometric(0.22)):
        events.append((item, "view"))
        if random.random() < 0.15:
            events.append((item, "cart"))
            if random.random() < 0.5:
                events.append((item, "purchase"))
        kind = random.random()
        if kind < 0.5:  # a neighbour in the shop's list of the category
            step = int(random.choice([-2, -1, 1, 1, 1, 2]))
            item = int(items[(int(np.flatnonzero(items == item)[0]) + step) % len(items)])
        elif kind < 0.7:
            item = seen[int(random.integers(len(seen)))]
        else:
            item = int(random.choice(items, p=popularity))
        seen.append(item)
    return events


def write_weeks(writer: Any, random: np.random.Generator, num_weeks: int) -> None:
    """Write the visits of all users, with times in seconds."""
    category_of = random.integers(NUM_CATEGORIES, size=NUM_ITEMS)
    weights = 1 / np.arange(1, NUM_ITEMS + 1) ** 0.7
    launched = np.where(random.random(NUM_ITEMS) < 0.3, random.uniform(0, num_weeks, NUM_ITEMS), 0)
    trend = random.normal(0, 0.08, NUM_ITEMS)
    for user in range(NUM_USERS):
        liked, bought = random.choice(NUM_CATEGORIES, 3, replace=False), []
        for week in np.sort(random.uniform(0, num_weeks, random.geometric(0.2))):
            if random.random() < 0.1:
                liked[random.integers(3)] = random.integers(NUM_CATEGORIES)
            category = int(random.choice(liked) if random.random() < 0.8 else random.integers(NUM_CATEGORIES))
            items = np.flatnonzero((category_of == category) & (launched <= week))
            popularity = weights[items] * np.exp(trend[items] * week)
            events = visit(random, items, popularity / popularity.sum())
            if bought and random.random() < 0.3:
                again = bought[int(random.integers(len(bought)))]
                events = [(again, "view"), (again, "purchase"), *events]
            bought += [item for item, kind in events if kind == "purchase"]
            for number, (item, kind) in enumerate(events):
                writer.writerow([f"user-{user}", f"item-{item}", START + int(week * WEEK) + number, kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--no_consecutive_repeats", action="store_true")
    parser.add_argument("--sessions", action="store_true")
    parser.add_argument("--weeks", type=int)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    category_of = random.integers(NUM_CATEGORIES, size=NUM_ITEMS)
    weights = 1 / np.arange(1, NUM_ITEMS + 1) ** 0.7
    categories = [np.flatnonzero(category_of == category) for category in range(NUM_CATEGORIES)]
    shares = [weights[items] / weights[items].sum() for items in categories]
    with Path(options.output).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp", "event_type"])
        if options.weeks:
            write_weeks(writer, random, options.weeks)
            return
        for user in range(NUM_USERS):
            liked, bought, second = random.choice(NUM_CATEGORIES, 3, replace=False), [], 0
            for number in range(random.geometric(0.35)):
                category = int(random.choice(liked) if random.random() < 0.8 else random.integers(NUM_CATEGORIES))
                events = visit(random, categories[category], shares[category])
                if bought and random.random() < 0.3:
                    again = bought[int(random.integers(len(bought)))]
                    events = [(again, "view"), (again, "purchase"), *events]
                bought += [item for item, kind in events if kind == "purchase"]
                if options.no_consecutive_repeats:
                    events = [
                        event for place, event in enumerate(events) if not place or event[0] != events[place - 1][0]
                    ]
                if options.sessions and len(events) < 2:
                    continue
                name = f"user-{user}-{number}" if options.sessions else f"user-{user}"
                for item, kind in events:
                    second += 1
                    writer.writerow([name, f"item-{item}", second, kind])


if __name__ == "__main__":
    main()
