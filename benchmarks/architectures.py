"""One architecture switch at a time on MovieLens 100K: what the defaults of `Bert4RecConfig` rest on.

    python benchmarks/architectures.py OUTPUT_FOLDER

The quickstart's recipe, two seeds each; chosen on validation, test beside it. Writes benchmarks/architectures.md.
"""

import shutil
import statistics
import sys
from pathlib import Path

import torch
import yaml

from bert4rec_hf import Bert4RecTrainingArguments, prepare
from bert4rec_hf.model_card import read_evaluations
from bert4rec_hf.trainer import evaluate_prepared, train_prepared

HERE = Path(__file__).parent
SEEDS = (42, 43)
SWITCHES: dict[str, dict] = {
    "defaults": {},
    "normalization: post": {"normalization": "post"},
    "position_embedding_type: learned_from_end": {"position_embedding_type": "learned_from_end"},
    "position_embedding_type: learned_from_start": {"position_embedding_type": "learned_from_start"},
    "prediction_head: true": {"prediction_head": True},
    "hidden_act: relu": {"hidden_act": "relu"},
    "hidden_dropout_prob: 0.2": {"hidden_dropout_prob": 0.2},
    "the paper's: post, learned from start, head": {
        "normalization": "post", "position_embedding_type": "learned_from_start", "prediction_head": True,
    },
}  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    prepare("ml-100k", folder / "data")
    recipe = yaml.safe_load((HERE.parent / "recipes" / "ml-100k.yaml").read_text("utf-8"))
    length = recipe.pop("max_position_embeddings")
    lines = ["| | validation NDCG@10 | test NDCG@10 | test HR@10 |", "|---|---|---|---|"]
    for title, switches in SWITCHES.items():
        validation, test = [], []
        for seed in SEEDS:
            output = folder / "model"
            shutil.rmtree(output, ignore_errors=True)
            arguments = Bert4RecTrainingArguments(str(output), seed=seed, disable_tqdm=True, **recipe)
            train_prepared(folder / "data", arguments, max_position_embeddings=length, **switches)
            validation.append(read_evaluations(output)[0]["metrics"])
            test.append(evaluate_prepared(output, folder / "data", disable_tqdm=True)["metrics"])
        cells = [
            " / ".join(f"{metrics[name]:.4f}" for metrics in runs)
            + f" (mean {statistics.mean(m[name] for m in runs):.4f})"
            for runs, name in ((validation, "NDCG@10"), (test, "NDCG@10"), (test, "HR@10"))
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = (
        "# One switch at a time, MovieLens 100K\n\n"
        f"Written by `benchmarks/architectures.py`; torch {torch.__version__}; seeds {SEEDS}. Leave-one-out, all 1,682 "
        "items ranked, seen items filtered, 943 users. The sampling error of NDCG@10 is about .0075: smaller gaps are "
        "unresolved.\n\n" + "\n".join(lines) + "\n"
    )
    (HERE / "architectures.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
