"""Comparison of models user by user: differences with intervals, for all users and for groups of users."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from .metrics import user_metrics
from .plotting import BLUE, ORANGE, png

# What is compared. The first metric decides.
METRICS = ("NDCG@10", "HR@10")
NUM_RESAMPLES = 10_000
# Intervals contain the true difference in this share of samples of users.
CONFIDENCE = 0.95
REQUIREMENTS = ("better", "not-worse")
# Resamples that are drawn at once, so that memory does not grow with their number.
CHUNK_SIZE = 100
# A column with more values than this is shown by quartiles if it has numbers, else by its most frequent values.
MAX_VALUES = 10
COMPARISON_FILES = ("comparison.json", "comparison.md", "comparison.png")
COMPARISON_KEYS = ("protocol", "models", "comparisons")


def paired_bootstrap(
    differences: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float, float, float]:
    """The mean difference, its 95 % interval, and the share of resamples with a mean of 0 or less.

    The users are drawn with replacement (paired bootstrap, Efron & Tibshirani 1993). Users with equal differences are
    drawn together, by one multinomial draw, so a resample costs the number of different values, not that of users.

    Args:
        differences: (users,) the metric of one model minus that of the other, at least one user.
        num_resamples: Number of resamples.
        seed: Equal seeds give equal resamples.
    """
    values, counts = np.unique(differences, return_counts=True)
    random, shares = np.random.default_rng(seed), counts / counts.sum()
    means = np.concatenate([
        random.multinomial(len(differences), shares, size=min(CHUNK_SIZE, num_resamples - start)) @ values
        for start in range(0, num_resamples, CHUNK_SIZE)
    ]) / len(differences)  # fmt: skip
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(differences.mean()), float(low), float(high), float((means <= 0).mean())


def compare_ranks(
    ranks: Mapping[str, np.ndarray], groups: Mapping[str, tuple[Sequence[str], np.ndarray]], margin: float
) -> dict[str, Any]:
    """Compare the model "new" with the other models, for all users and for groups of users.

    Args:
        ranks: (users,) ranks of the same targets by name of the model: "new", "old", and possibly "anchor". 0 is a
            miss.
        groups: For each title, the names of the groups and the group (users,) of each user.
        margin: A loss of NDCG@10 below which "new" counts as not worse.

    Returns:
        A record with margin, num_users, and comparisons. These have, for each other model, its "verdict" ("better",
        "worse", "not worse" or "unclear", by the interval of NDCG@10 of all users), "all users", and "groups": a list
        of slices by title. A slice is {name, num_users, metrics}. For each of `METRICS`, metrics has the values of both
        models and the difference, low and high of `paired_bootstrap`.
    """
    values = {name: user_metrics(of_model) for name, of_model in ranks.items()}
    comparisons = {}
    for other in (name for name in ranks if name != "new"):
        everyone = _slice("all users", values["new"], values[other], np.ones(len(ranks["new"]), bool))
        comparisons[other] = {
            "verdict": _verdict(everyone["metrics"][METRICS[0]], margin),
            "all users": everyone,
            "groups": {
                title: [
                    _slice(names[number], values["new"], values[other], of_user == number)
                    for number in np.unique(of_user)
                ]
                for title, (names, of_user) in groups.items()
            },
        }
    return {"margin": margin, "num_users": len(ranks["new"]), "comparisons": comparisons}


def meets(record: Mapping[str, Any], requirement: str) -> bool:
    """Whether "new" is "better" or "not-worse" than every other model of a record of `compare_ranks`."""
    allowed = ("better",) if requirement == "better" else ("better", "not worse")
    return all(comparison["verdict"] in allowed for comparison in record["comparisons"].values())


def value_groups(values: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    """Group users by the values of a column.

    Args:
        values: (users,) numbers, texts, booleans or None, which stands for a missing value.

    Returns:
        The names of the groups, and the group (users,) of each user. More than ten different numbers are divided at
        their quartiles. Of more than ten other values, the most frequent have groups of their own.
    """
    # NaN, which is not equal to itself, is missing too.
    values = [None if value is None or value != value else value for value in values]
    values = [float(value) if isinstance(value, Decimal) else value for value in values]
    known = [value for value in values if value is not None]
    different = set(known)
    if len(different) > MAX_VALUES and all(isinstance(value, int | float) for value in different):
        edges = np.unique(np.quantile(np.array(known, float), (0.25, 0.5, 0.75)))
        bounds = [f"up to {edges[0]:.12g}", *(f"up to {edge:.12g}" for edge in edges[1:]), f"above {edges[-1]:.12g}"]
        names = [*bounds, "missing"]
        places = [len(bounds) if value is None else int(np.searchsorted(edges, value, side="left")) for value in values]
        return names, np.array(places, int)
    texts = [None if value is None else str(value) for value in values]
    found, counts = np.unique([text for text in texts if text is not None], return_counts=True)
    shown = sorted(found[np.argsort(-counts, kind="stable")][:MAX_VALUES].tolist())
    place_of = {text: place for place, text in enumerate(shown)}
    names = [*shown, "other values", "missing"]
    return names, np.array([len(shown) + 1 if text is None else place_of.get(text, len(shown)) for text in texts], int)


def format_comparison(record: Mapping[str, Any]) -> str:
    """A record of `runs.compare.compare_prepared` as Markdown."""
    models = record["models"]
    parts = ["# Comparison", f"{record['protocol']}.", f"- new: {_inert(models['new'])}"]
    for other in record["comparisons"]:
        parts[-1] += f"\n- {other}: {_inert(models[other])}"
    parts.append(
        f"Differences are new minus the other model, user by user, with their {CONFIDENCE:.0%} intervals over users "
        f"(paired bootstrap). Not worse means that the interval of {METRICS[0]} lies above {-record['margin']:g}. "
        "The intervals do not include the variation between training seeds, and each group's interval is for this "
        "group alone: of twenty groups, one is expected to lie outside by chance."
    )
    for other, comparison in record["comparisons"].items():
        parts.append(f"## New and {other}: {comparison['verdict']}")
        for title, slices in {"": [comparison["all users"]], **comparison["groups"]}.items():
            header = f"| {_inert(title)} | users |"
            for metric in METRICS:
                header += f" new, {metric} | {other} | difference | interval |"
            lines = [header, "|---" * (2 + 4 * len(METRICS)) + "|"]
            for part in slices:
                cells = [_inert(part["name"]), f"{part['num_users']:,}"]
                for found in part["metrics"].values():
                    cells += [f"{found['new']:.4f}", f"{found['other']:.4f}", f"{found['difference']:+.4f}"]
                    cells.append(f"{found['low']:+.4f} to {found['high']:+.4f}")
                lines.append(f"| {' | '.join(cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot_comparison(record: Mapping[str, Any]) -> bytes:
    """The differences of NDCG@10 and their intervals, for all users and for each group, as a PNG."""
    from matplotlib.figure import Figure  # imported here because matplotlib is slow to load

    metric = METRICS[0]
    drawn = {}
    for other, comparison in record["comparisons"].items():
        slices = {"": [comparison["all users"]], **comparison["groups"]}
        drawn[other] = [(title, part) for title, parts in slices.items() for part in parts]
    labels = [
        f"{f'{title}: ' if title else ''}{part['name']} (n={part['num_users']:,})".replace("$", r"\$")
        for title, part in next(iter(drawn.values()))
    ]
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(labels)), layout="constrained")
    panel: Any = figure.subplots()
    for number, ((other, parts), colour, marker) in enumerate(zip(drawn.items(), (BLUE, ORANGE), "os", strict=False)):
        places = np.arange(len(parts)) + 0.22 * number
        found = [part["metrics"][metric] for _, part in parts]
        means = np.array([values["difference"] for values in found])
        lows, highs = (np.array([values[name] for values in found]) for name in ("low", "high"))
        panel.errorbar(
            means, places, xerr=[np.maximum(means - lows, 0), np.maximum(highs - means, 0)], fmt=marker, color=colour,
            capsize=2, markersize=5, label=f"new minus {other}",
        )  # fmt: skip
    panel.axvline(0, color="black", linewidth=0.8)
    panel.axvline(-record["margin"], color="black", linewidth=0.8, linestyle=":", label="minus the margin")
    panel.set_yticks(np.arange(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title(f"Difference of {metric} and its {CONFIDENCE:.0%} interval", fontsize=10)
    panel.legend(fontsize=8, loc="best")
    return png(figure)


def _slice(
    title: str, of_new: Mapping[str, np.ndarray], of_other: Mapping[str, np.ndarray], users: np.ndarray
) -> dict[str, Any]:
    metrics = {}
    for name in METRICS:
        mine, others = of_new[name][users], of_other[name][users]
        mean, low, high, _ = paired_bootstrap(mine - others)
        values = {"new": float(mine.mean()), "other": float(others.mean())}
        metrics[name] = values | {"difference": mean, "low": low, "high": high}
    return {"name": title, "num_users": int(users.sum()), "metrics": metrics}


def _verdict(found: Mapping[str, float], margin: float) -> str:
    if found["low"] > 0:
        return "better"
    if found["low"] >= -margin:
        return "not worse"
    return "worse" if found["high"] < 0 else "unclear"


def _inert(text: str) -> str:
    """A name in a line of Markdown, in which no character of it has a meaning."""
    escaped = "".join(f"&#{ord(character)};" if character in "|<>&`*_[]\\" else character for character in text)
    return " ".join(escaped.split())
