"""README.md of a model folder, written from the folder's own files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .metrics import Protocol

EVALUATION_FILE = "evaluation.json"
RECIPE_FILE = "recipe.yaml"
MARK = "<!-- Rewritten by bert4rec at every evaluation. Delete this line to keep a text of your own. -->"

SHOWN_METRICS = ("HR@1", "HR@10", "NDCG@10", "HR@100", "MRR", "coverage@10")
SHOWN_RECIPE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "per_device_train_batch_size",
    "mask_ratio", "train_windows", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_dropout_prob",
    "max_position_embeddings", "position_embedding_type", "normalization", "item_loss", "seed",
)  # fmt: skip


def read_evaluations(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of evaluation.json: protocol, metrics, floors; none if there is no file."""
    path = Path(folder) / EVALUATION_FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def add_evaluation(folder: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write a record into evaluation.json, in the place of one under the same protocol."""
    records = [old for old in read_evaluations(folder) if old["protocol"] != record["protocol"]]
    _write(Path(folder) / EVALUATION_FILE, json.dumps([*records, dict(record)], indent=2) + "\n")


def write_model_card(folder: str | os.PathLike) -> None:
    """README.md with the metrics, their protocol and the recipe; one that does not bear `MARK` is left alone."""
    folder = Path(folder)
    if (folder / "README.md").is_file() and MARK not in (folder / "README.md").read_text("utf-8"):
        return
    config = json.loads((folder / "config.json").read_text("utf-8"))
    recipe_path = folder / RECIPE_FILE
    recipe = yaml.safe_load(recipe_path.read_text("utf-8")) if recipe_path.is_file() else {}
    preparation_path = folder / "preparation.json"
    preparation = json.loads(preparation_path.read_text("utf-8")) if preparation_path.is_file() else None
    records = read_evaluations(folder)
    data_name = Path(preparation["source"]).stem if preparation else "interactions"
    results = [
        EvalResult(
            task_type="sequential-recommendation",
            task_name="Sequential recommendation",
            dataset_type=data_name,
            dataset_name=data_name,
            dataset_config=str(Protocol(**record["protocol"])),
            dataset_split=record["protocol"]["part"],
            metric_type=name,
            metric_value=round(record["metrics"][name], 6),
        )
        for record in records
        for name in SHOWN_METRICS
        if name in record["metrics"]
    ]
    data = ModelCardData(
        library_name="transformers",
        tags=["bert4rec", "sequential-recommendation", "recommender-system", "bert4rec_hf"],
        pipeline_tag="other",
        model_name="BERT4Rec",
        eval_results=results or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", MARK, "# BERT4Rec", _introduction(config, preparation), USAGE]
    if records:
        parts.append("## Metrics")
        parts += [_metrics_table(record) for record in records]
    if recipe:
        shown = {name: recipe[name] for name in SHOWN_RECIPE if name in recipe}
        parts.append(
            f"## Recipe\n\nThe whole of it is in `{RECIPE_FILE}`, for `bert4rec train --config`.\n\n```yaml\n"
            f"{yaml.safe_dump(shown, sort_keys=False)}```"
        )
    parts.append(
        "Architecture: Sun et al., [BERT4Rec](https://arxiv.org/abs/1904.06690), CIKM 2019. Written by bert4rec_hf."
    )
    _write(folder / "README.md", str(ModelCard("\n\n".join(parts) + "\n")))


def _introduction(config: Mapping[str, Any], preparation: Mapping[str, Any] | None) -> str:
    text = (
        f"Next-item recommendation over {config['vocab_size'] - 3:,} items from histories of up to "
        f"{config['max_position_embeddings'] - 1} items. Items that a user has had are "
        f"{'not ' if config['filter_seen_items'] else ''}recommended again, unless told otherwise."
    )
    if preparation:
        statistics = preparation["statistics"]
        text += (
            f" Trained on {statistics['num_training_events']:,} events of {statistics['num_training_users']:,} users."
        )
    return text


def _metrics_table(record: Mapping[str, Any]) -> str:
    protocol = Protocol(**record["protocol"])
    rows = {"**this model**": record["metrics"]} | record.get("floors", {})
    names = [name for name in SHOWN_METRICS if name in record["metrics"]]
    lines = [f"| | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for title, metrics in rows.items():
        cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return f"{protocol}. {protocol.describe_misses()}\n\n" + "\n".join(lines)


def _write(path: Path, text: str) -> None:
    """Beside, then moved, so that a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)


USAGE = """```python
import bert4rec_hf
from transformers import pipeline

recommend = pipeline("sequential-recommendation", model="path-or-hub-id-of-this-folder")
recommend(["item id", "newer item id"], top_k=5)
```"""
