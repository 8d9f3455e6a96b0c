"""What the commands print about a prepared log, an evaluation, a calibration and recommendations."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..data.prepare_options import PrepareOptions
from ..evaluation.metrics import shown_metrics
from ..evaluation.protocol import Protocol
from ..reading import inert
from .parser import one_line

# The verdicts of `compare_ranks` in a sentence.
VERDICTS = {
    "better": "better than",
    "not worse": "not worse than",
    "worse": "worse than",
    "unclear": "neither shown to be worse nor shown to be not worse than",
}
# A user with more events in one minute looks like a bot, or like an id that many people share.
EVENTS_A_MINUTE_OF_A_PERSON = 60


def show(text: str) -> None:
    """Print lines whose names and titles, which come from data, are inert in a terminal."""
    print("\n".join(map(inert, text.split("\n"))))


def print_preparation(prepared: Mapping[str, Any], options: PrepareOptions) -> None:
    """Print the statistics of a log, and the defaults that were chosen for it.

    Args:
        prepared: The content of preparation.json.
        options: The options of the preparation.
    """
    statistics = prepared["statistics"]
    lengths = statistics["history_length"]
    show(
        f"{statistics['num_users']:,} users, {statistics['num_items']:,} items, "
        f"{statistics['num_events']:,} events; history lengths: median {lengths['median']:g}, "
        f"three quarters up to {lengths['p75']:g}, longest {lengths['max']:,}"
    )
    tied, order = statistics["share_tied_times"], prepared["columns"]["sequence_column"]
    show(
        f"repeated events {statistics['share_repeated_events']:.1%}, "
        f"{f'tied times {tied:.1%}' if tied is not None else f'no times: in the order of {order}'}, "
        f"cold targets {statistics['share_cold_targets']:.1%}"
    )
    if "events_per_type" in statistics:
        targets = prepared["filters"]["target_event_types"]
        counts = ", ".join(f"{name} {number:,}" for name, number in statistics["events_per_type"].items())
        show(
            f"events by type: {counts}; targets are of the type{'s' if len(targets) > 1 else ''} {', '.join(targets)}, "
            f"of which {statistics['share_repeated_target_events']:.1%} are repeats"
        )
    identical = statistics["num_duplicate_rows"]
    if identical and options.duplicates == "keep":
        show(
            f"{identical:,} rows repeat the user, item and time of another row: if these are duplicates by mistake, "
            "--duplicates drop_identical keeps one of each"
        )
    busy = [
        f"{user['user_id']} ({user['num_events']:,} events, "
        + (f"{user['most_in_a_minute']:,} in one minute)" if user["most_in_a_minute"] else "no times)")
        for user in statistics["longest_histories"]
        if (user["most_in_a_minute"] or 0) > EVENTS_A_MINUTE_OF_A_PERSON
    ]
    if busy:
        show(
            f"users that look like no persons: {', '.join(busy)}; --max_user_events leaves out users with more events, "
            "--where those that you name"
        )
    if prepared["split"]["name"] == "none":
        show("no targets are held out: all events train")
    else:
        show(
            f"{prepared['split']['name']}: {statistics['num_validation_targets']:,} validation and "
            f"{statistics['num_test_targets']:,} test targets"
        )
    if options.max_length:
        reason = "as given"
    elif lengths["p75"] <= prepared["max_length"]:
        reason = "the shortest of 50, 100, 200 that three quarters of the histories fit into"
    else:
        reason = "the longest of 50, 100, 200; more than a quarter of the histories are longer"
    show(f"history length {prepared['max_length']} ({reason})")
    if options.filter_seen_items is not None:
        reason = "as given"
    elif prepared["filter_seen_items"]:
        reason = "fewer than 5 % of events are repeats"
    else:
        reason = "5 % of events or more are repeats"
    policy = "are not recommended again" if prepared["filter_seen_items"] else "may be recommended again"
    filtered = prepared["filter_seen_items"] and prepared["filters"].get("min_rating") is not None
    show(f"seen items {policy} ({reason})" + ("; events rated lower do not count as seen" if filtered else ""))


def format_evaluation(record: Mapping[str, Any], others: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Format an evaluation as text: its protocol, and a table of the metrics of the model and the baselines.

    Args:
        record: A record of evaluation.json.
        others: The records of all models by name, if there are several. They have the same protocol.
    """
    widths = {name: max(13, len(name) + 2) for name in shown_metrics(record["metrics"])}
    protocol = Protocol.from_dict(record["protocol"])
    models = others or {"model": record}
    tables = {"": {name: model["metrics"] for name, model in models.items()} | record["baselines"]}
    for heading, group in record.get("groups", {}).items():
        tables[heading] = {name: model["groups"][heading]["model"] for name, model in models.items()}
        tables[heading] |= {name: metrics for name, metrics in group.items() if name != "model"}
    width = max(len(title) for table in tables.values() for title in table)
    lines = [str(protocol), " " * width + "".join(f"{name:>{wide}}" for name, wide in widths.items())]
    for heading, table in tables.items():
        lines += [heading] if heading else []
        for title, metrics in table.items():
            cells = [f"{metrics[name]:{wide}.4f}" if name in metrics else " " * wide for name, wide in widths.items()]
            lines.append(f"{title:<{width}}" + "".join(cells).rstrip())
    return "\n".join([*lines, protocol.describe_misses()])


def format_differences(record: Mapping[str, Any]) -> str:
    """Format a comparison as text: for each other model, whether the new one is better, and for all groups.

    Args:
        record: The record of `compare_prepared`.
    """
    lines = [record["protocol"], *(f"{name:<6} {model}" for name, model in record["models"].items())]
    for other, comparison in record["comparisons"].items():
        everyone = comparison["all users"]
        slices = [("", everyone), *((title, part) for title, parts in comparison["groups"].items() for part in parts)]
        labels = [f"{title}: {part['name']}" if title else part["name"] for title, part in slices]
        width = max(map(len, labels)) + 2
        lines += ["", f"{'NDCG@10':<{width}}{'users':>8}{'new':>9}{other:>9}{'difference':>12}  95 % interval"]
        for label, (_, part) in zip(labels, slices, strict=True):
            found = part["metrics"]["NDCG@10"]
            lines.append(
                f"{label:<{width}}{part['num_users']:>8,}{found['new']:9.4f}{found['other']:9.4f}"
                f"{found['difference']:+12.4f}  {found['low']:+.4f} to {found['high']:+.4f}"
            )
        lines.append(f"new is {VERDICTS[comparison['verdict']]} {other} (margin {record['margin']:g})")
    return "\n".join(lines)


def print_features(data: str) -> None:
    """Print the item features of a prepared folder, one line each."""
    import pyarrow.parquet as pq

    from ..data.item_tables import ITEM_TABLE_FILE, describe
    from ..model.tokenization_bert4rec import Bert4RecTokenizer

    features = Bert4RecTokenizer.from_pretrained(data).item_features
    assert features is not None  # for the type checker
    show("item features: " + "\n               ".join(describe(features, pq.read_table(Path(data) / ITEM_TABLE_FILE))))


def format_calibration(record: Mapping[str, Any]) -> str:
    """Format the result of a calibration as text: the weights, and what they gain.

    Args:
        record: The record of `choose_weights`.
    """

    def listed(weights: Mapping[str, float]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {weight:.3g}" for name, weight in weights.items())

    metrics, error = record["NDCG@10"], record["standard_error"]
    if error is None:
        return f"weights of counted scores kept, since there is only one validation user: {listed(record['weights'])}"
    gain = metrics["cross_fitted"] - metrics["start"]
    found = (
        f"cross-fitted NDCG@10 {metrics['cross_fitted']:.4f} instead of {metrics['start']:.4f} on "
        f"{record['num_users']:,} validation users ({gain:+.4f}, standard error {error:.4f})"
    )
    if record["adopted"]:
        return f"weights of counted scores chosen on validation: {listed(record['weights'])}; {found}"
    return f"weights of counted scores kept, since others are not clearly better: {listed(record['weights'])}; {found}"


def print_item(heading: str, item_id: str, title: str | None, value: str = "") -> None:
    """Print a line with a rank or word, an item id, a value and a title."""
    show(f"{heading:>5}  {inert(item_id):>8}  {value:>8}  {one_line(title or '')}".rstrip())


def print_entries(entries: Iterable[Mapping[str, Any]]) -> None:
    """Print recommendations or similar items, with the items of the history that carry them if they are explained.

    Args:
        entries: Answers of the pipeline.
    """
    for rank, entry in enumerate(entries, start=1):
        print_item(str(rank), entry["item_id"], entry.get("title"), f"{entry['score']:.3f}")
        if entry.get("because"):
            names = [one_line(source.get("title") or source["item_id"]) for source in entry["because"]]
            show(f"{'':5}  because you had {', '.join(names)}")
