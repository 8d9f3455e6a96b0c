"""evaluation.json and the model card, README.md, of a model folder. The card is written from the folder's files."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.histories import PREPARATION_FILE, read_preparation
from ..data.item_tables import ITEM_TABLE_FILE, describe, read_stored_table
from ..data.named_datasets import NAMED_DATASETS
from ..data.prepare_options import PrepareOptions
from ..evaluation.metrics import COVERAGE_CUTOFF, shown_metrics
from ..evaluation.protocol import PROTOCOL_FORM, Protocol
from ..files import write_file
from ..model.configuration_bert4rec import Bert4RecConfig
from ..model.tokenization_bert4rec import Bert4RecTokenizer
from ..reading import inert, read_json, read_yaml

EVALUATION_FILE = "evaluation.json"
TRAINING_FILE = "training.json"
CURVE_FILE = "learning_curve.png"
CALIBRATION_FILE = "calibration.json"
NEW_ITEMS_FILE = "new_items.json"
NEW_ITEMS_CURVE_FILE = "new_items.png"
RECIPE_FILE = "recipe.yaml"
# Files that say how good the weights are, and are wrong about other weights.
FILES_OF_WEIGHTS = (
    EVALUATION_FILE, TRAINING_FILE, CURVE_FILE, CALIBRATION_FILE, NEW_ITEMS_FILE, NEW_ITEMS_CURVE_FILE
)  # fmt: skip
MARK = "<!-- Rewritten by bert4rec at every evaluation. Delete this line to keep a text of your own. -->"
# The library as the Hub names libraries: lower case, hyphens. docs/how-to/publishing.md says what the Hub shows for it.
LIBRARY_NAME = "bert4rec-hf"
TAGS = ("bert4rec", "sequential-recommendation", "recommender-system", "bert4rec_hf")
THIS_FOLDER = "path-or-hub-id-of-this-folder"
# Finds the name of the model in the card's code snippet.
SNIPPET_MODEL = re.compile(r'model="(.+?)"')
SHOWN_RECIPE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "per_device_train_batch_size",
    "item_initialization", "num_transitions", "transition_weight", "next_item_weight", "repeat_weight",
    "recency_weight", "calibrate", "mask_ratio", "train_windows", "hidden_size",
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "gated_feed_forward", "hidden_dropout_prob",
    "max_position_embeddings", "position_embedding_type", "normalization", "item_loss", "seed",
)  # fmt: skip
# What each counted score is, for the card.
COUNTED_TERMS = {
    "transition_weight": "{} times the association with the newest items",
    "next_item_weight": "{} times ln(1 + 20 p) for an item that directly followed the newest item with probability p",
    "repeat_weight": "{} times ln(1 + n) for an item that the history has n times",
    "recency_weight": "{} / 2 ** n for an item that the history last had n items before its newest",
}
# What recency is with event types.
CONVERSION_TERM = (
    "{} times ln(1 + 20 p) for an item with which the same was last done as with items that were the next target with "
    "probability p"
)
METRICS = {"*": float}
# What the JSON files hold; see `read_json`.
EVALUATIONS_FORM = [
    {
        "source?": str,
        "protocol": PROTOCOL_FORM,
        "metrics": METRICS,
        "baselines?": {"*": METRICS},
        "groups?": {"*": {"model": METRICS, "*": METRICS}},
    }
]
CALIBRATION_FORM = {
    "adopted": bool,
    "were_chosen?": bool,
    "source?": str,
    "num_users?": int,
    "NDCG@10?": {"start": float, "cross_fitted": float},
}
TRAINING_FORM = {
    "protocol": PROTOCOL_FORM,
    "step": int,
    "max_steps": int,
    "chosen_step": int,
    "evaluations": [
        {"epoch": float, "step": int, "training_loss?": float, "loss?": float, "HR@10?": float, "NDCG@10?": float}
    ],
    "warnings": [str],
}
NEW_ITEMS_FORM = {
    "offset": float,
    "num_new_items?": int,
    "explained?": float,
    "num_targets?": int,
    "trades?": [{"offset?": float, "ndcg": float, "new_item_hit_rate": float}],
}
# Number of evaluations in the card's table of a run, beside the chosen one. training.json has all evaluations.
SHOWN_EVALUATIONS = 10
SAMPLED_LOSS_RECIPE = ("num_negatives", "negative_sampling", "gbce_calibration")


def read_evaluations(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the records of evaluation.json. Each has source, protocol, metrics and baselines.

    Args:
        folder: The model folder. Without the file, the list is empty.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / EVALUATION_FILE
    return read_json(path, EVALUATIONS_FORM, hint="remove it, and evaluate again") if path.is_file() else []


def read_calibration(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Read calibration.json of a model folder. None if the weights of its counted scores were not chosen on a log."""
    path = Path(folder) / CALIBRATION_FILE
    record = read_json(path, CALIBRATION_FORM, hint="remove it") if path.is_file() else None
    return record if record and record["adopted"] else None


def add_evaluation(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Add a record to evaluation.json. It replaces a record of the same log and protocol."""

    def key(record: Mapping[str, Any]) -> tuple[Any, Any]:
        return record.get("source"), record["protocol"]

    records = [old for old in read_evaluations(folder) if key(old) != key(record)]
    write_file(Path(folder) / EVALUATION_FILE, json.dumps([*records, dict(record)], indent=2) + "\n")


def write_model_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    tokenizer: Bert4RecTokenizer | None = None,
    **metadata: Any,
) -> None:
    """Write the model card, README.md: use, metrics under their protocol, limits, and commands to reproduce them.

    A README.md without `MARK` is left alone. A folder without config.json, such as that of a PEFT adapter, gets no
    card.

    Args:
        folder: The model folder.
        repo_id: The model's repository on the Hub. None: the name in the existing card, or a placeholder.
        tokenizer: The folder's tokenizer. None: it is read, which takes seconds for a million items.
        metadata: Fields of `ModelCardData`, such as license. Other metadata of an existing card stays.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return
    files = read_card_files(folder)
    if files is None:
        return
    old, repo_id = files.old, repo_id or files.repo_id
    config, recipe, preparation, records = files.config, files.recipe, files.preparation, files.records
    calibration = files.calibration
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = Bert4RecTokenizer.from_pretrained(folder)

    kept = {name: value for name, value in old.to_dict().items() if name != "model-index"}
    given = {name: value for name, value in metadata.items() if value is not None}
    tags = given.get("tags") or []
    written = {
        "library_name": LIBRARY_NAME,
        "tags": [*TAGS, *kept.get("tags", []), *([tags] if isinstance(tags, str) else tags)],
        "pipeline_tag": "other",
        "model_name": given.get("model_name") or old.get("model_name") or "BERT4Rec",
        "eval_results": _results(records, preparation) or None,
    }
    if preparation and preparation["source"] in NAMED_DATASETS:
        written["datasets"] = [preparation["source"]]
    if "model_name_or_path" in recipe:
        written["base_model"] = recipe["model_name_or_path"]
    data = ModelCardData(**(kept | given | written))

    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {_plain(written['model_name'])}",
        _introduction(config, recipe, preparation, calibration),
    ]
    parts += [_usage(repo_id, tokenizer)]
    if records:
        parts.append("## Metrics")
        parts += [_metrics_table(record, preparation) for record in records]
    if files.training is not None:
        parts.append(_training(files.training, is_calibrated=calibration is not None))
    if tokenizer is not None and tokenizer.item_features is not None:
        parts.append(_new_items(folder, tokenizer, files.new_items))
    parts.append(_limits(config, tokenizer, records))
    if recipe:
        parts.append(_reproduction(repo_id, recipe, preparation, tokenizer))
    parts.append(
        "Architecture: Sun et al., [BERT4Rec](https://arxiv.org/abs/1904.06690), CIKM 2019. bert4rec_hf wrote this "
        "card."
    )
    write_file(folder / "README.md", str(ModelCard("\n\n".join(parts) + "\n")))


@dataclass(frozen=True)
class CardFiles:
    """What the files of a model folder say for its card.

    Attributes:
        old: The metadata of the card that is there.
        repo_id: The model's name in that card, or a placeholder.
        config: The values of config.json and the defaults of the others.
        recipe: The content of recipe.yaml. Empty without the file.
        preparation: The content of preparation.json. None without the file.
        records: See `read_evaluations`.
        calibration: See `read_calibration`.
        training: The content of training.json. None without the file.
        new_items: The content of new_items.json. None without the file.
    """

    old: Any
    repo_id: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    preparation: dict[str, Any] | None
    records: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    training: dict[str, Any] | None
    new_items: dict[str, Any] | None


def read_card_files(folder: str | os.PathLike) -> CardFiles | None:
    """Read the files that a model card is written from.

    Returns:
        Their content. None if the card that is there is the user's own.

    Raises:
        ValueError: If a file is damaged.
    """
    folder = Path(folder)
    try:
        text = (folder / "README.md").read_text("utf-8") if (folder / "README.md").is_file() else ""
        if text and MARK not in text:
            return None
        old = ModelCard(text, ignore_metadata_errors=True).data if text else ModelCardData()
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / 'README.md'} is damaged ({' '.join(str(error).split())}): remove it") from error
    shown_id = SNIPPET_MODEL.search(text)
    training, new_items = folder / TRAINING_FILE, folder / NEW_ITEMS_FILE
    return CardFiles(
        old=old,
        repo_id=shown_id[1] if shown_id else THIS_FOLDER,
        config=Bert4RecConfig.from_dict(read_json(folder / "config.json", {})).to_dict(),
        recipe=read_yaml(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else {},
        preparation=read_preparation(folder) if (folder / PREPARATION_FILE).is_file() else None,
        records=read_evaluations(folder),
        calibration=read_calibration(folder),
        training=read_json(training, TRAINING_FORM, hint="remove it") if training.is_file() else None,
        new_items=read_json(new_items, NEW_ITEMS_FORM, hint="remove it") if new_items.is_file() else None,
    )


def _results(records: list[dict[str, Any]], preparation: Mapping[str, Any] | None) -> list[EvalResult]:
    """Every stored metric of the model, for the Hub's model-index."""
    trained_on = preparation["source"] if preparation else "interactions"
    results = []
    for record in records:
        data_name = Path(record.get("source") or trained_on).stem
        protocol = Protocol.from_dict(record["protocol"])
        groups = record.get("groups", {})
        parts = {"": record["metrics"]} | {f"; {group}": ranked["model"] for group, ranked in groups.items()}
        results += [
            EvalResult(
                task_type="sequential-recommendation",
                task_name="Sequential recommendation",
                # The Hub takes no other characters here.
                dataset_type=re.sub(r"[^\w.-]+", "-", data_name, flags=re.ASCII).strip("-") or "interactions",
                dataset_name=data_name,
                dataset_config=f"{protocol}{part}",
                dataset_split=protocol.part,
                metric_type=name,
                metric_value=round(value, 6),
            )
            for part, metrics in parts.items()
            for name, value in metrics.items()
        ]
    return results


def _introduction(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    preparation: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None,
) -> str:
    text = (
        f"This model recommends the next item from {config['vocab_size'] - 3:,} items. It reads the newest "
        f"{config['max_position_embeddings'] - 1} items of a history. By default, items that a user has had are "
        f"{'not ' if config['filter_seen_items'] else ''}recommended again."
    )
    counted = COUNTED_TERMS | ({"recency_weight": CONVERSION_TERM} if config.get("num_event_types") else {})
    terms = [
        text.format(f"{config[field]:.3g}")
        for field, text in counted.items()
        if config.get(field) and (config.get("num_transitions") or field in ("repeat_weight", "recency_weight"))
    ]
    if terms:
        text += (
            " A score is the sum of the Transformer's score and of scores that were counted in the log: "
            f"{'; '.join(terms)}."
        )
    if calibration is not None and calibration.get("NDCG@10") and calibration.get("num_users") is not None:
        metrics = calibration["NDCG@10"]
        text += (
            f" The weights of the counted scores were chosen on {calibration['num_users']:,} validation users "
            f"(cross-fitted NDCG@10 {metrics['cross_fitted']:.4f} instead of {metrics['start']:.4f})."
        )
    if preparation:
        statistics, source = preparation["statistics"], preparation["source"]
        text += (
            f" It was trained on {statistics['num_training_events']:,} events of "
            f"{statistics['num_training_users']:,} users in {_code(source)}."
        )
        targets = preparation.get("filters", {}).get("target_event_types")
        if targets and statistics.get("events_per_type"):
            text += (
                f" It reads events of the types {', '.join(map(_code, statistics['events_per_type']))}, "
                f"and recommends for {', '.join(map(_code, targets))}."
            )
        if preparation.get("trained_period"):
            first, last = preparation["trained_period"]
            text += f" The events that it has seen are from {_plain(first)} to {_plain(last)}."
        if "model_name_or_path" in recipe:
            text += f" Training continued from the model {_code(recipe['model_name_or_path'])}."
        if _holds_nothing_out(preparation):
            text += " No events were held out, so the model cannot be evaluated on this log."
        if source in NAMED_DATASETS:
            text += f" {NAMED_DATASETS[source].license} Cite {NAMED_DATASETS[source].citation}."
    return text


def _holds_nothing_out(preparation: Mapping[str, Any]) -> bool:
    return preparation.get("split", {}).get("name") == "none"


def _usage(repo_id: str, tokenizer: Bert4RecTokenizer | None) -> str:
    """A code snippet that runs as it is, with the two most frequent items as history."""
    items, comment = ["item id", "newer item id"], ""
    if tokenizer is not None:
        counts = tokenizer.counts or [0] * tokenizer.num_items
        places = sorted(range(len(counts)), key=lambda place: -counts[place])[:2]
        items = [tokenizer.items[place] for place in places]
        titles = [" ".join((tokenizer.title(item) or "").split()) for item in items]
        comment = f"  # {'; '.join(titles)}" if all(titles) else ""
    history = json.dumps(items, ensure_ascii=False)
    code = f"""import bert4rec_hf  # registers the pipeline
from transformers import pipeline

recommend = pipeline("sequential-recommendation", model="{inert(repo_id)}")
history = {inert(history)}{inert(comment)}
for item in recommend(history, top_k=5):  # oldest item first; unknown items are left out
    print(item)
"""
    return f"With the Python package `bert4rec_hf` installed:\n\n{_fenced(code, 'python')}"


def _new_items(folder: Path, tokenizer: Bert4RecTokenizer, record: Mapping[str, Any] | None) -> str:
    """Which features the items have, and what recommending new items costs."""
    features, lines = tokenizer.item_features, ["## Item features and new items"]
    assert features is not None  # for the type checker
    if (folder / ITEM_TABLE_FILE).is_file():
        table = read_stored_table(folder / ITEM_TABLE_FILE)
        lines.append("\n".join(f"- {_code(line)}" for line in describe(features, table)))
    if record is not None and "num_new_items" in record:
        lines.append(f"{describe_new_items(record)}.")
    if (folder / NEW_ITEMS_CURVE_FILE).is_file():
        lines.append(
            f"![The trade of new items]({NEW_ITEMS_CURVE_FILE})\n\nAnother point of this curve is chosen with "
            f"`bert4rec update-items MODEL --new_item_offset VALUE`; `{NEW_ITEMS_FILE}` has the values."
        )
    return "\n\n".join(lines)


def describe_new_items(record: Mapping[str, Any]) -> str:
    """A sentence on the items that nobody has had yet: where their vectors come from, and what they cost.

    Args:
        record: The content of new_items.json.
    """
    text = (
        f"{record['num_new_items']:,} new items have vectors from their features, which explain "
        f"{max(0.0, record['explained']):.0%} of the vectors of items left out"
    )
    trades = record.get("trades", [])
    chosen = next((trade for trade in trades if trade["offset"] == record["offset"]), None)
    if chosen is None:
        return f"{text}; offset {record['offset']:g}"
    return (
        f"{text}; with offset {record['offset']:g}, HR@10 of {record['num_targets']:,} new targets is "
        f"{chosen['new_item_hit_rate']:.4f}, and NDCG@10 of all is {chosen['ndcg']:.4f} instead of "
        f"{trades[0]['ndcg']:.4f} without new items (validation)"
    )


def _limits(config: Mapping[str, Any], tokenizer: Bert4RecTokenizer | None, records: list[dict[str, Any]]) -> str:
    lines = [
        "The catalogue is fixed until it is updated: an unknown item is left out of histories and never recommended. "
        "All users without a history get the same recommendations."
    ]
    if tokenizer is not None and tokenizer.counts is not None:
        num_cold = sum(count == 0 for count in tokenizer.counts)
        known = (
            "their vectors come from their features"
            if config.get("num_item_features")
            else "their scores are arbitrary"
        )
        lines[0] += f" {num_cold:,} of {tokenizer.num_items:,} items are cold: they have no training event, so {known}."
    metrics = [record["metrics"] for record in reversed(records)]
    name = f"coverage@{COVERAGE_CUTOFF}"
    coverage = next((of_record[name] for of_record in metrics if name in of_record), None)
    lines.append(
        "The model learns from recorded behaviour, including the popularity bias of the log."
        + (
            f" The first {COVERAGE_CUTOFF} recommendations of all evaluated users together cover {coverage:.1%} of the "
            "catalogue."
            if coverage is not None
            else ""
        )
    )
    lines.append(
        "The metrics replay a log: only the item that a user had next counts as correct, whatever was shown to the "
        "user at the time. They do not say what people would choose if they were shown these recommendations."
    )
    if any(record["protocol"]["split"].startswith("leave-one-out") for record in records):
        lines.append(
            "Leave-one-out trains on events that are later than the targets of other users. A temporal split is closer "
            "to production use."
        )
    lines.append("Scores are logits: they order the items of one answer. They are not probabilities.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _reproduction(
    repo_id: str,
    recipe: Mapping[str, Any],
    preparation: Mapping[str, Any] | None,
    tokenizer: Bert4RecTokenizer | None,
) -> str:
    commands = [] if repo_id == THIS_FOLDER else [f"hf download {shlex.quote(repo_id)} {RECIPE_FILE} --local-dir ."]
    if preparation:
        words = ["bert4rec", "prepare", preparation["source"], "--output", "data"]
        split = {"split" if name == "name" else name: value for name, value in preparation["split"].items()}
        options = preparation["columns"] | preparation["filters"] | split
        if tokenizer is not None and tokenizer.titles is not None and preparation["source"] not in NAMED_DATASETS:
            options["item_titles"] = "TITLES"
        if options.get("item_features") and preparation["source"] not in NAMED_DATASETS:
            options = {"items": "ITEMS"} | {name: value for name, value in options.items() if name != "item_titles"}
        for name, value in options.items():
            if value not in (None, [], getattr(PrepareOptions, name, None)):
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        commands.append(shlex.join(words))
    commands.append(f"bert4rec train --data data --output_dir model --config {RECIPE_FILE}")
    if not preparation or not _holds_nothing_out(preparation):
        commands.append("bert4rec evaluate model --data data")
    names = SHOWN_RECIPE + (SAMPLED_LOSS_RECIPE if recipe.get("item_loss", "softmax") != "softmax" else ())
    shown = {name: recipe[name] for name in names if name in recipe}
    return (
        f"## Reproduce\n\n{_fenced(''.join(f'{inert(command)}{chr(10)}' for command in commands), 'bash')}\n\n"
        f"`{RECIPE_FILE}` has all arguments. The main ones are:\n\n"
        f"{_fenced(yaml.safe_dump(shown, sort_keys=False), 'yaml')}"
    )


def _metrics_table(record: Mapping[str, Any], preparation: Mapping[str, Any] | None) -> str:
    protocol, source = Protocol.from_dict(record["protocol"]), record.get("source")
    is_other = source and preparation and source != os.path.basename(preparation["source"])
    other = f"Evaluated on {_code(source)}: " if is_other else ""
    rows = {"**this model**": record["metrics"]} | record.get("baselines", {})
    for group, ranked in record.get("groups", {}).items():
        rows |= {f"{name}, {group}": metrics for name, metrics in ranked.items()}
    names = shown_metrics(record["metrics"])
    lines = [f"| | {' | '.join(map(_plain, names))} |", f"|---{'|---' * len(names)}|"]
    for title, metrics in rows.items():
        cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        shown = title if title == "**this model**" else _plain(title)
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return f"{other}{_plain(protocol)}. {protocol.describe_misses()}\n\n" + "\n".join(lines)


def _training(record: Mapping[str, Any], *, is_calibrated: bool) -> str:
    evaluations, step = record["evaluations"], record["chosen_step"]
    protocol = Protocol.from_dict(record["protocol"])
    before = " Here, the weights of the counted scores are those before calibration."
    lines = [
        f"The weights are those of step {step:,}; the run was at step {record['step']:,} of {record['max_steps']:,}. "
        f"Validation protocol: {_plain(protocol)}.{before if is_calibrated and not protocol.calibrated else ''} "
        f"`{TRAINING_FILE}` has all metrics of all evaluations."
    ]
    lines += [f"> **Warning**: {_plain(warning)}." for warning in record["warnings"]]
    lines.append(f"![Learning curve]({CURVE_FILE})")
    stride = -(-len(evaluations) // SHOWN_EVALUATIONS)
    shown = [
        evaluation
        for place, evaluation in enumerate(reversed(evaluations))
        if place % stride == 0 or evaluation["step"] == step
    ]
    names = {"training_loss": "training loss", "loss": "validation loss", "HR@10": "HR@10", "NDCG@10": "NDCG@10"}
    table = [f"| epoch | step | {' | '.join(names.values())} |", f"|---|---{'|---' * len(names)}|"]
    for evaluation in reversed(shown):
        numbers = [evaluation.get(name) for name in names]
        cells = [f"{evaluation['epoch']:.4g}", f"{evaluation['step']:,}"]
        cells += ["" if number is None else f"{number:.4f}" for number in numbers]
        bold = "**" if evaluation["step"] == step else ""
        table.append("".join(f"| {bold}{cell}{bold if cell else ''} " for cell in cells) + "|")
    return "## Training\n\n" + "\n\n".join([*lines, "\n".join(table)])


def _plain(value: Any) -> str:
    """A value as Markdown that shows it and does nothing else."""
    return re.sub(r"([\\`*\[\]<|~])", r"\\\1", inert(" ".join(str(value).split())))


def _code(value: Any) -> str:
    """A value as a code span."""
    text = inert(" ".join(str(value).split()))
    fence = "`" * (_longest_fence(text) + 1)
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def _fenced(text: str, language: str) -> str:
    """Lines as a code block, which no line of them ends."""
    fence = "`" * max(3, _longest_fence(text) + 1)
    return f"{fence}{language}\n{text}{fence}"


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
