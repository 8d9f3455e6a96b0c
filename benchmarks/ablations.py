"""Measures one change at a time to a recipe: the evidence for the recipes and for the defaults of a new model.

    python benchmarks/ablations.py LOG --recipe recipes/ml-100k.yaml --seeds 3 [--output FOLDER]

LOG has the forms that benchmarks/quality.py accepts. Only validation targets are ranked, so that the test targets stay
unread. The script writes its part of benchmarks/results/ablations.md. Results in FOLDER are not measured again.
"""

import argparse
import json
import re
import shutil
import statistics
import time
from pathlib import Path

import torch
import yaml
from quality import log_file, log_name, named_seeds, prepared, spread, train

from bert4rec_hf.evaluation.protocol import Protocol

TABLE = Path(__file__).resolve().parent / "results" / "ablations.md"
HEADER = """# Ablations

The numbers are of validation targets unless a column says test. Each caption names the script and the command that
measured the table.

`benchmarks/ablations.py` writes the sections that are named after a log. It changes one option of a recipe at a time
and trains the Transformer alone (`num_transitions: 0`). Each run counts with the best of its ten evaluations. ± is the
standard deviation over seeds. A difference is that of the means over seeds. Differences below the standard error over
users, .0075 NDCG@10 for the 943 users of MovieLens 100K, are unresolved. Minutes are CPU time.
"""
PAPER = {
    "normalization": "post", "position_embedding_type": "learned_from_start", "causal_attention": False,
    "prediction_head": True, "gated_feed_forward": False, "hidden_act": "gelu",
}  # fmt: skip
CHANGES: dict[str, dict] = {
    "the recipe": {},
    "bidirectional attention": {"causal_attention": False, "mask_ratio": 0.2},
    "starts at random": {"item_initialization": "random"},
    "plain feed-forward layers, GELU": {"gated_feed_forward": False, "hidden_act": "gelu"},
    "gated by GELU": {"hidden_act": "gelu"},
    "post-normalisation": {"normalization": "post"},
    "learned positions from the end": {"position_embedding_type": "learned_from_end"},
    "learned positions from the start": {"position_embedding_type": "learned_from_start"},
    "prediction head": {"prediction_head": True},
    "the paper's architecture": PAPER,
    "width 128": {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 320},
    "3 layers": {"num_hidden_layers": 3},
    "dropout .2": {"hidden_dropout_prob": 0.2},
    "dropout 0": {"hidden_dropout_prob": 0.0},
    "mask_ratio .1": {"mask_ratio": 0.1},
    "mask_ratio .4": {"mask_ratio": 0.4},
    "mask_ratio .6": {"mask_ratio": 0.6},
    "last_item_ratio .2": {"last_item_ratio": 0.2},
    "windows: the newest": {"train_windows": "newest"},
    "windows: one random": {"train_windows": "random"},
    "length 200": {"max_position_embeddings": 200},
    "batch 128": {"per_device_train_batch_size": 128},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "cosine schedule": {"lr_scheduler_type": "cosine"},
    "constant learning rate": {"lr_scheduler_type": "constant_with_warmup"},
    "no warm-up": {"warmup_steps": 0},
    "warm-up of 300 steps": {"warmup_steps": 300},
    "weight decay .01": {"weight_decay": 0.01},
    "weight decay .1": {"weight_decay": 0.1},
    "twice the epochs": {"num_train_epochs": 2.0},  # factor of the recipe's epochs
    "sampled softmax, 256 negatives": {"item_loss": "sampled_softmax"},
    "gBCE, 256 negatives": {"item_loss": "gbce"},
}


def measure(data: Path, folder: Path, recipe: dict, title: str, seed: int) -> dict:
    """Train once, or read an earlier result."""
    change = dict(CHANGES[title])
    if "num_train_epochs" in change:
        change["num_train_epochs"] *= recipe["num_train_epochs"]
    name = re.sub(r"\W+", "-", title)
    done, output = folder / f"{name}-{seed}.json", folder / "model"
    if not done.is_file():
        shutil.rmtree(output, ignore_errors=True)
        start = time.process_time()
        trainer = train(data, output, recipe | {"disable_tqdm": True, "num_transitions": 0} | change, seed)
        record = {"metrics": trainer.evaluation["metrics"], "protocol": trainer.evaluation["protocol"]}
        done.write_text(json.dumps(record | {"cpu_minutes": (time.process_time() - start) / 60}))
    return json.loads(done.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="ablations")
    options = parser.parse_args()
    recipe = yaml.safe_load(Path(options.recipe).read_text("utf-8"))
    name = log_name(options.log)
    folder = Path(options.output) / name
    data = prepared(options.log, folder, recipe.get("max_position_embeddings"))
    seeds = range(42, 42 + options.seeds)
    lines, base = [], 0.0
    for title in CHANGES:
        runs = [measure(data, folder, recipe, title, seed) for seed in seeds]
        values = [run["metrics"]["NDCG@10"] for run in runs]
        if not lines:
            base = statistics.mean(values)
            protocol = Protocol(**runs[0]["protocol"])
            given = f"{log_file(options.log)} --recipe {options.recipe} --seeds {options.seeds}"
            command = f"`benchmarks/ablations.py {given}`"
            lines = [
                f"## {name}", "", f"{protocol}; {named_seeds(seeds)}; torch {torch.__version__}; {command}", "",
                "| | NDCG@10 | difference | HR@10 | minutes |", "|---|---|---|---|---|",
            ]  # fmt: skip
        cells = [
            title,
            spread(values),
            f"{statistics.mean(values) - base:+.4f}" if CHANGES[title] else "",
            spread([run["metrics"]["HR@10"] for run in runs]),
            f"{statistics.mean(run['cpu_minutes'] for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = TABLE.read_text("utf-8") if TABLE.is_file() else HEADER
    others = re.sub(rf"\n## {re.escape(name)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL)
    TABLE.write_text(others + "\n" + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
