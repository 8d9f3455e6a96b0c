"""The evaluation report: metrics of groups of users, and the popularity of the recommended items."""

import io
import itertools
import json
import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..data.counting import item_counts
from ..data.histories import AnyHistories
from ..data.rows import list_values, target_ids_of
from ..files import finished, write_file
from ..model.configuration_bert4rec import FIRST_ITEM_ID
from ..model.losses import IGNORE_INDEX
from ..reading import read_json
from .metrics import COVERAGE_CUTOFF, ranking_metrics, user_metrics
from .plotting import BLUE, GREEN, ORANGE, VERMILION, png
from .protocol import Protocol

REPORT_FILES = ("report.json", "report.md", "report.png", "ranks.parquet")
REPORT_KEYS = ("protocol", "slices", "recommendations")
# Smallest history length, in events before the target, of each group of users.
LENGTH_EDGES = (0, 1, 5, 10, 20, 50, 100, 200)
# Shares of the training events that separate head, torso and tail; see `item_groups`.
HEAD_SHARE, TORSO_SHARE = 0.5, 0.8
ITEM_GROUPS = ("head", "torso", "tail", "no training event")
UNKNOWN_GROUP = "not in the catalogue"
SYSTEM_COLOURS = (BLUE, GREEN, ORANGE, VERMILION)
# Colours of `ITEM_GROUPS`, from dark to light.
GROUP_COLOURS = ("#08306B", "#4292C6", "#C6DBEF", "#D0D0D0")


def check_report_folder(
    folder: str | os.PathLike, files: Sequence[str] = REPORT_FILES, keys: Collection[str] = REPORT_KEYS
) -> None:
    """Raise ValueError unless a folder is missing, empty, or holds nothing but an earlier report.

    Args:
        folder: The folder.
        files: The files of a report. The first one is JSON.
        keys: Keys of this JSON, which show that the folder is a report.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for --report")
    names = [path.name for path in finished(folder)]
    # Temporary files of `write_file` may remain from a run that was killed.
    starts = tuple(f".{Path(name).stem}." for name in files)
    others = [name for name in names if name not in files and not (name.startswith(starts) and name.endswith(".new"))]
    if others or (names and not _has_keys(folder / files[0], keys)):
        raise ValueError(
            f"{folder} holds something else than a report ({(others or [f'no {files[0]} of bert4rec'])[0]}); choose "
            "another folder for --report"
        )


def item_groups(counts: np.ndarray) -> np.ndarray:
    """Divide the items of a catalogue into head, torso and tail by their training events.

    An item belongs to the head if all more frequent items together have less than `HEAD_SHARE` of the events, to the
    torso if they have less than `TORSO_SHARE`, and to the tail otherwise. So the head is the smallest set of items with
    half of the events, and equally frequent items are in the same group.

    Args:
        counts: (items,) number of training events of each item.

    Returns:
        (items,) indices into `ITEM_GROUPS`. The last group has the items without training events.
    """
    values, places, sizes = np.unique(counts, return_inverse=True, return_counts=True)
    above = 1 - (values * sizes).cumsum() / max(counts.sum(), 1)
    # The tolerance keeps an item whose share equals a limit in its group despite rounding.
    groups = (above > HEAD_SHARE - 1e-9).astype(int) + (above > TORSO_SHARE - 1e-9)
    groups[values == 0] = 3
    return groups[places]


def user_groups(rows: Dataset, counts: np.ndarray) -> dict[str, tuple[list[str], np.ndarray]]:
    """The groups of users by "history length" (events before the target) and by "popularity of the target".

    Args:
        rows: Rows from `ranking_rows`.
        counts: (items,) number of training events of each item.

    Returns:
        For each title, the names of the groups and the group (users,) of each user.
    """
    groups, targets = item_groups(counts), target_ids_of(rows)
    known = targets != IGNORE_INDEX
    target_groups = np.where(known, groups[np.where(known, targets - FIRST_ITEM_ID, 0)], len(ITEM_GROUPS))
    length_groups = np.searchsorted(LENGTH_EDGES, np.asarray(rows["history_length"]), side="right") - 1
    length_names = [
        str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(LENGTH_EDGES)
    ]
    return {
        "history length": ([*length_names, f"{LENGTH_EDGES[-1]}+"], length_groups),
        "popularity of the target": ([*ITEM_GROUPS, UNKNOWN_GROUP], target_groups),
    }


def evaluation_report(
    rows: Dataset,
    histories: AnyHistories,
    rankings: Mapping[str, np.ndarray],
    recommended: np.ndarray,
    protocol: Protocol,
    num_items: int,
) -> dict[str, Any]:
    """Compute metrics for groups of users, and statistics of the recommended items.

    Args:
        rows: Rows from `ranking_rows`.
        histories: The histories of the rows. The popularity of an item is counted in their training part.
        rankings: (users,) ranks by name: "model" and the rankings of `baseline_ranks`.
        recommended: (users, 10) token ids that the model recommends. Ids below 3 fill rows with fewer items.
        protocol: The protocol of the ranks.
        num_items: Number of items in the catalogue.

    Returns:
        The report, which report.json stores:

        - protocol: the protocol as a mapping.
        - overall: the slice of all users.
        - slices: lists of slices by "history length" (events before the target) and by "popularity of the target".
          A slice is {name, num_users, systems}. For each ranking, systems has HR@10, NDCG@10, the standard error of
          NDCG@10 over users (None for a single user) and MRR. Groups without users are left out.
        - items: the number of items and the share of training events of each of `ITEM_GROUPS`.
        - recommendations: for the model, for popularity and for the targets: average_popularity (mean number of
          training events of the shown items) and the shares of `ITEM_GROUPS`. The model and popularity also have
          coverage@10 and gini. The Gini coefficient is 0 if all items of the catalogue are shown equally often, and
          near 1 if a single item is shown.
    """
    counts = item_counts(histories, num_items)[FIRST_ITEM_ID:]
    groups, targets = item_groups(counts), target_ids_of(rows)
    sizes = np.bincount(groups, minlength=len(ITEM_GROUPS))
    events = np.bincount(groups, weights=counts, minlength=len(ITEM_GROUPS)) / max(counts.sum(), 1)
    shown = {"model": recommended, "popularity": popular_items(rows, counts), "targets": targets[:, None]}
    return {
        "protocol": protocol.as_dict(),
        "overall": _slice("all users", rankings, np.ones(len(rows), bool)),
        "slices": {
            title: _slices(rankings, of_user, names) for title, (names, of_user) in user_groups(rows, counts).items()
        },
        "items": {
            name: {"num_items": int(size), "share_of_training_events": float(share)}
            for name, size, share in zip(ITEM_GROUPS, sizes, events, strict=True)
        },
        "recommendations": {
            name: _exposure(token_ids, counts, groups, name != "targets") for name, token_ids in shown.items()
        },
    }


def popular_items(rows: Dataset, counts: np.ndarray) -> np.ndarray:
    """The most popular items for each row, without the row's `exclude_ids`.

    Args:
        rows: Rows from `ranking_rows`.
        counts: (items,) number of training events. Among equally frequent items, the lower token id comes first.

    Returns:
        (users, 10) token ids, padded with 0.
    """
    order = np.argsort(-counts, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    excluded, lengths = list_values(rows, "exclude_ids")
    users = np.repeat(np.arange(len(rows)), lengths)
    # For each user's excluded places in ascending order: the number of places before it that are not excluded.
    ascending = np.sort(users * len(order) + places[excluded - FIRST_ITEM_ID]) - users * len(order)
    free_before = ascending - (np.arange(len(users)) - np.repeat(lengths.cumsum() - lengths, lengths))
    shown = np.zeros((len(rows), COVERAGE_CUTOFF), np.int64)
    for number in range(min(COVERAGE_CUTOFF, len(order))):
        place = number + np.bincount(users[free_before <= number], minlength=len(rows))
        there = place < len(order)
        shown[there, number] = order[place[there]] + FIRST_ITEM_ID
    return shown


def write_report(folder: str | os.PathLike, report: Mapping[str, Any], rows: Dataset, ranks: np.ndarray) -> None:
    """Write report.json, report.md, report.png and ranks.parquet.

    Args:
        folder: A folder that is missing, empty, or holds nothing but an earlier report.
        report: The report from `evaluation_report`.
        rows: Rows from `ranking_rows`.
        ranks: (users,) ranks of the model. ranks.parquet has the columns user_id and rank; the rank of a miss is 0.

    Raises:
        ValueError: If the folder holds other files.
    """
    check_report_folder(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # report.json is written first, because it identifies the folder as a report.
    write_file(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_file(folder / "report.md", format_report(report))
    write_file(folder / "report.png", plot_report(report))
    content = io.BytesIO()
    user_ids = rows.with_format("arrow")["user_id"][:]
    pq.write_table(pa.table({"user_id": user_ids, "rank": pa.array(ranks, pa.int32())}), content)
    write_file(folder / "ranks.parquet", content.getvalue())


def format_report(report: Mapping[str, Any]) -> str:
    """The report as Markdown tables."""
    protocol, items = Protocol(**report["protocol"]), report["items"]
    systems = list(report["overall"]["systems"])
    parts = ["# Evaluation report", f"{protocol}. {protocol.describe_misses()}"]
    parts.append("The tables show NDCG@10 ± its standard error over users, and HR@10 and MRR of the model.")
    header = ["users", *(f"{name}, NDCG@10" for name in systems), "model, HR@10", "model, MRR"]
    for title, slices in {"all users": [report["overall"]], **report["slices"]}.items():
        table = []
        for part in slices:
            model = part["systems"]["model"]
            cells = [_with_error(part["systems"][name]) for name in systems]
            cells += [f"{model['HR@10']:.4f}", f"{model['MRR']:.4f}"]
            table.append([part["name"], f"{part['num_users']:,}", *cells])
        parts.append(_table(["" if title == "all users" else title, *header], table))
    parts.append("![Report](report.png)")
    parts.append(
        f"The table compares the first {COVERAGE_CUTOFF} recommendations of all users with their targets. Average "
        "popularity is the mean number of training events of the shown items. Gini is 0 if all items are shown equally "
        "often."
    )
    table = [
        [
            name,
            f"{shown['average_popularity']:,.1f}",
            *(f"{shown['shares'][group]:.1%}" for group in ITEM_GROUPS),
            *(f"{shown[key]:.4f}" if key in shown else "" for key in (f"coverage@{COVERAGE_CUTOFF}", "gini")),
        ]
        for name, shown in report["recommendations"].items()
    ]
    names = ["average popularity", *ITEM_GROUPS, f"coverage@{COVERAGE_CUTOFF}", "Gini"]
    parts.append(_table(["shown by", *names], table))
    parts.append(
        "An item belongs to the head if all more frequent items together have less than "
        f"{HEAD_SHARE:.0%} of the training events, to the torso if they have less than {TORSO_SHARE:.0%}, and to the "
        "tail otherwise."
    )
    table = [
        [name, f"{group['num_items']:,}", f"{group['share_of_training_events']:.1%}"] for name, group in items.items()
    ]
    parts.append(_table(["items", "number", "share of the training events"], table))
    return "\n\n".join(parts) + "\n"


def plot_report(report: Mapping[str, Any]) -> bytes:
    """Plot NDCG@10 by slice for model and baselines, and the item groups of the shown items, as a PNG."""
    from matplotlib.figure import Figure  # imported here because matplotlib is slow to load

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(str(Protocol(**report["protocol"])), fontsize=9, wrap=True)
    parts: Any = figure.subfigures(2, 1)
    above, below = parts
    systems = list(report["overall"]["systems"])
    for panel, (title, slices) in zip(above.subplots(1, 2), report["slices"].items(), strict=True):
        for number, (name, colour, marker) in enumerate(zip(systems, SYSTEM_COLOURS, "os^D", strict=False)):
            found = [part["systems"][name] for part in slices]
            places = np.arange(len(slices)) + (number - (len(systems) - 1) / 2) * 0.14  # markers stand side by side
            errors = [metrics["NDCG@10_standard_error"] or 0.0 for metrics in found]
            panel.errorbar(
                places, [metrics["NDCG@10"] for metrics in found], errors,
                fmt=marker, color=colour, markersize=6, capsize=2, label=name,
            )  # fmt: skip
        labels = [f"{textwrap.fill(part['name'], 11)}\nn={part['num_users']:,}" for part in slices]
        panel.set_xticks(range(len(slices)), labels, fontsize=8)
        panel.set_title(f"NDCG@10 ± standard error, by {title}", fontsize=10)
        panel.set_ylim(bottom=-0.03 * panel.get_ylim()[1])  # room for markers at 0
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    above.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(systems), fontsize=8)
    items, shown = report["items"], report["recommendations"]
    num_items = max(sum(group["num_items"] for group in items.values()), 1)
    bars = {
        "items of the catalogue": {name: group["num_items"] / num_items for name, group in items.items()},
        "training events": {name: group["share_of_training_events"] for name, group in items.items()},
        "targets": shown["targets"]["shares"],
        f"top {COVERAGE_CUTOFF} of the model": shown["model"]["shares"],
        f"top {COVERAGE_CUTOFF} of popularity": shown["popularity"]["shares"],
    }
    panel, left = below.subplots(), np.zeros(len(bars))
    for group, colour in zip(ITEM_GROUPS, GROUP_COLOURS, strict=True):
        widths = np.array([shares[group] for shares in bars.values()])
        drawn = panel.barh(list(bars), widths, left=left, color=colour, label=group)
        texts = [f"{width:.0%}" if width >= 0.04 else "" for width in widths]
        text_colour = "white" if group in ("head", "torso") else "black"
        panel.bar_label(drawn, texts, label_type="center", color=text_colour, fontsize=9)
        left += widths
    panel.invert_yaxis()
    panel.set_xlim(0, 1)
    panel.set_xticks([])
    panel.spines[:].set_visible(False)
    below.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(ITEM_GROUPS), fontsize=8)
    coverage, gini = shown["model"][f"coverage@{COVERAGE_CUTOFF}"], shown["model"]["gini"]
    panel.set_title(f"Popularity of shown items; the model: coverage@10 {coverage:.4f}, Gini {gini:.4f}", fontsize=10)
    return png(figure)


def _slices(rankings: Mapping[str, np.ndarray], groups: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """One slice for each group that has users, in the order of the names."""
    return [_slice(names[group], rankings, groups == group) for group in np.unique(groups)]


def _slice(title: str, rankings: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, Any]:
    systems: dict[str, dict[str, float | None]] = {}
    for system, ranks in rankings.items():
        ranks = ranks[users]
        metrics = ranking_metrics(ranks)
        gains = user_metrics(ranks)["NDCG@10"]
        error = float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else None
        systems[system] = {name: metrics[name] for name in ("HR@10", "NDCG@10", "MRR")}
        systems[system]["NDCG@10_standard_error"] = error
    return {"name": title, "num_users": int(users.sum()), "systems": systems}


def _exposure(token_ids: np.ndarray, counts: np.ndarray, groups: np.ndarray, catalogue: bool) -> dict[str, Any]:
    """Statistics of shown items, from token ids of any shape. Ids below 3 are padding."""
    items = token_ids[token_ids >= FIRST_ITEM_ID] - FIRST_ITEM_ID
    number = max(len(items), 1)
    shares = np.bincount(groups[items], minlength=len(ITEM_GROUPS)) / number
    found: dict[str, Any] = {
        "average_popularity": float(counts[items].sum() / number),
        "shares": {name: float(share) for name, share in zip(ITEM_GROUPS, shares, strict=True)},
    }
    if catalogue:
        shown = np.sort(np.bincount(items, minlength=len(counts)))
        places = np.arange(1, len(shown) + 1)
        gini = 2 * (places * shown).sum() / (len(shown) * number) - (len(shown) + 1) / len(shown)
        found |= {f"coverage@{COVERAGE_CUTOFF}": float((shown > 0).mean()), "gini": float(gini)}
    return found


def _with_error(metrics: Mapping[str, Any]) -> str:
    error = metrics["NDCG@10_standard_error"]
    return f"{metrics['NDCG@10']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _has_keys(path: Path, keys: Collection[str]) -> bool:
    """Whether a file is a JSON object with some keys."""
    try:
        return bool(read_json(path, dict.fromkeys(keys, object)))
    except (OSError, ValueError):
        return False
