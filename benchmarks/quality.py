"""A recipe on a log: leave-one-out, full ranking, seen items filtered, beside the floors.

    python benchmarks/quality.py LOG --recipe recipes/ml-1m.yaml --seeds 3 [--output FOLDER]

LOG is a dataset's name or a file as `bert4rec prepare` takes it; a Parquet file with a column `position` in place of
times is ordered by that. Validation chooses the checkpoint, test is read once. Appends a row to benchmarks/quality.md;
the models stay in FOLDER, where a run that was interrupted is taken up again.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
import yaml

from bert4rec_hf import Bert4RecConfig, Bert4RecTrainingArguments, prepare
from bert4rec_hf.metrics import Protocol
from bert4rec_hf.trainer import evaluate_prepared, train_prepared

HERE = Path(__file__).parent
TABLE = HERE / "quality.md"
HEADER = """# Quality

One row a run of `benchmarks/quality.py`, which its command names. Test targets, read once; the checkpoint is the best
on validation (NDCG@10). Leave-one-out, all items ranked, seen items filtered, ties against the model. ± is the
standard deviation over seeds; the sampling error over users comes on top: about .0036 NDCG@10 on 6,040 users, .0075
on 943.

| log (sha256) | ranking | parameters | epochs | minutes a seed | HR@10 | NDCG@10 | validation NDCG@10 | command |
|---|---|---|---|---|---|---|---|---|
"""


def prepared(log: str, folder: Path, length: int | None) -> Path:
    data = folder / (f"data-{length}" if length else "data")
    if not data.exists():
        has_position = log.endswith(".parquet") and "position" in pq.read_schema(log).names
        order = {"sequence_column": "position"} if has_position else {}
        prepare(log, data, filter_seen_items=True, max_length=length, **order)
    return data


def run(data: Path, output: Path, recipe: dict, seed: int) -> dict:
    """Train and evaluate once; what is there already is read."""
    done = output / "quality.json"
    if done.is_file():
        return json.loads(done.read_text())
    start = time.perf_counter()
    fields = {name: value for name, value in recipe.items() if name in Bert4RecConfig.__annotations__}
    options = {name: value for name, value in recipe.items() if name not in fields}
    resume = "last" if list(output.glob("checkpoint-*")) else None
    args = Bert4RecTrainingArguments(str(output), **options | {"seed": seed}, resume_from_checkpoint=resume)
    trainer = train_prepared(data, args, **fields)
    seconds = time.perf_counter() - start
    record = evaluate_prepared(output, data) | {
        "seconds": seconds,
        "resumed": resume is not None,
        "epochs": trainer.state.epoch,
        "parameters": trainer.model.num_parameters(),
        "validation": trainer.evaluation["metrics"]["NDCG@10"],
    }
    done.write_text(json.dumps(record, indent=2))
    return record


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="quality")
    options = parser.parse_args()
    recipe_path = Path(options.recipe)
    recipe = yaml.safe_load(recipe_path.read_text("utf-8"))
    name = Path(options.log).parent.name if options.log.endswith("interactions.parquet") else Path(options.log).stem
    folder = Path(options.output) / name
    data = prepared(options.log, folder, recipe.get("max_position_embeddings"))
    runs = [run(data, folder / f"{recipe_path.stem}-{seed}", recipe, seed) for seed in range(42, 42 + options.seeds)]
    digest = hashlib.sha256((data / "histories.parquet").read_bytes()).hexdigest()[:8]
    text = TABLE.read_text("utf-8") if TABLE.is_file() else HEADER
    log = f"{name} ({digest})"
    protocol = Protocol(**runs[0]["protocol"])
    if f"| {log} |" not in text:
        text += f"| **{log}** | {protocol} | | | | | | | |\n"
        for floor, metrics in runs[0]["floors"].items():
            text += f"| {log} | {floor} | | | | {metrics['HR@10']:.4f} | {metrics['NDCG@10']:.4f} | | |\n"
    seeds = ", ".join(str(seed) for seed in range(42, 42 + options.seeds))
    cells = [
        log, f"`{options.recipe}`, seed{'s' if options.seeds > 1 else ''} {seeds}", f"{runs[0]['parameters']:,}",
        f"{statistics.mean(run['epochs'] for run in runs):.0f}",
        f"{statistics.mean(run['seconds'] for run in runs) / 60:.1f}"
        + (" (resumed)" if any(run["resumed"] for run in runs) else ""),
        *(spread([run["metrics"][metric] for run in runs]) for metric in ("HR@10", "NDCG@10")),
        spread([run["validation"] for run in runs]),
        f"`benchmarks/quality.py {os.path.basename(options.log) if name == Path(options.log).stem else name} "
        f"--recipe {options.recipe} --seeds {options.seeds}`, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread of {platform.machine()}",
    ]  # fmt: skip
    TABLE.write_text(text + f"| {' | '.join(cells)} |\n", "utf-8")
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
