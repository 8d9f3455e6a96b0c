"""Measures a recipe on a log, beside the baselines: leave-one-out, full ranking.

    python benchmarks/quality.py LOG [--recipe recipes/ml-1m.yaml] --seeds 3 [--without_validation] [--output FOLDER]
                                 [--set NAME=VALUE …] [--items ITEMS --item_features NAME …]

LOG is the name of a dataset, a file that `bert4rec prepare` accepts, or a prepared folder. The table names a log after
its file, NAME.parquet, or after its folder, NAME/interactions.parquet; the sources of the files are given below the
table. Without a recipe, the defaults are measured. Validation chooses the checkpoint, and the test targets are ranked
once. With --without_validation, the validation targets train too, and the model is that of the last step.

The script adds a row to results/quality.md. The models stay in FOLDER, where an interrupted run is resumed. The ranks
of each model and of the baselines stay there too, in `ranks.parquet`, for benchmarks/compare.py. Two processes:
`torchrun --nproc_per_node 2 benchmarks/quality.py …`.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from accelerate import PartialState
from tables import machine

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    evaluate_prepared,
    prepare,
    train_prepared,
)
from bert4rec_hf.data.histories import HISTORIES_FILE, PREPARATION_FILE, read_prepared
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.evaluation.baselines import baseline_ranks
from bert4rec_hf.evaluation.protocol import Protocol
from bert4rec_hf.hub.model_card import CURVE_FILE

HERE = Path(__file__).parent
TABLE = HERE / "results" / "quality.md"
CURVES = HERE / "pictures"
RANKS_FILE = "ranks.parquet"
HEADER = """# Quality

Each row is a run of `benchmarks/quality.py`, or of `benchmarks/peers.py` for another implementation (a peer). The last
column has the command.

- **Protocol.** The metrics are those of the test targets, which are read once. The split is leave-one-out, all items
  are ranked, and a tie counts against the model. Seen items are filtered unless the row of the log says otherwise. A
  peer is judged by the lists of 100 items that it serves.
- **Checkpoint.** The checkpoint is the one with the best validation NDCG@10. A peer chooses its checkpoint itself. In
  rows with "all but test trains", the validation targets train too, and the model is that of the last step.
- **Spread.** ± is the standard deviation over seeds. It does not include the sampling error over users, which is about
  .0036 NDCG@10 for 6,040 users and .0075 for 943. `benchmarks/compare.py` compares two rows user by user.
- **Versions.** "Defaults" are those of this version, with causal attention and its filter. "Defaults of 0.2.0" had
  bidirectional attention, 20 epochs everywhere, and no calibration. The other sections of this page are about the
  defaults and recipes of 0.2.0, unless they say `filter_share=0`, which this version had before the filter.
- **Columns.** The checksum of a log is that of its prepared histories. It does not depend on the format of the file.
  Parameters are the learnt ones, without transitions. Epochs link to the learning curve of the first seed.

| log (checksum) | ranking | parameters | epochs | minutes a seed | HR@10 | NDCG@10 | validation NDCG@10 | command |
|---|---|---|---|---|---|---|---|---|
"""


def log_file(log: str) -> str:
    """The name of a log for commands, from a log or a prepared folder: a file, or the name of a dataset."""
    if Path(log).is_dir():
        log = json.loads((Path(log) / PREPARATION_FILE).read_text("utf-8"))["source"]
    path = Path(log)
    return f"{path.parent.name}/{path.name}" if path.name == "interactions.parquet" else path.name


def log_name(log: str) -> str:
    path = Path(log_file(log))
    return path.parent.name or path.stem


def prepared(log: str, folder: Path, length: int | None, validation: bool = True, **features: Any) -> Path:
    if (Path(log) / HISTORIES_FILE).is_file():
        preparation = json.loads((Path(log) / PREPARATION_FILE).read_text("utf-8"))
        if preparation["split"].get("validation", True) != validation:
            raise SystemExit(f"{log} was prepared {'without' if validation else 'with'} validation targets")
        return Path(log)
    words = ["data", *([str(length)] if length else []), *([] if validation else ["all-but-test"])]
    data = folder / "-".join([*words, *(["with-features"] if features else [])])
    if not data.exists():
        prepare(log, data, max_length=length, validation=validation, **features)
    return data


def checksum(data: Path) -> str:
    """A checksum of the histories and their targets. A checksum of the file would depend on the writer and the time."""
    columns = ["user_id", "item_id", "train_end", "validation_position", "test_position"]
    histories = pq.read_table(data / HISTORIES_FILE, columns=columns).to_pydict()
    return hashlib.sha256(json.dumps(histories).encode()).hexdigest()[:8]


def write_ranks(folder: Path, user_ids: Sequence[str], ranks: Sequence[int]) -> None:
    pq.write_table(pa.table({"user_id": user_ids, "rank": pa.array(ranks, pa.int32())}), folder / RANKS_FILE)


def rank_baselines(folder: Path, data: Path) -> None:
    """Write the rank of each user's test target under each baseline into a folder with the baseline's name."""
    histories, tokenizer, preparation = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=preparation["filter_seen_items"])
    for baseline, ranks in baseline_ranks(rows, histories, tokenizer.num_items).items():
        (folder / baseline).mkdir(exist_ok=True)
        write_ranks(folder / baseline, rows["user_id"][:], ranks)


def train(data: Path, output: Path, recipe: dict, seed: int) -> Bert4RecTrainer:
    """Train with a recipe for `bert4rec train --config`, from the last checkpoint if there is one."""
    fields = {name: value for name, value in recipe.items() if name in Bert4RecConfig.__annotations__}
    options = {name: value for name, value in recipe.items() if name not in fields} | {"seed": seed}
    resume = "last" if list(output.glob("checkpoint-*")) else None
    arguments = Bert4RecTrainingArguments(str(output), **options, resume_from_checkpoint=resume)
    return train_prepared(data, arguments, **fields)


def run(data: Path, output: Path, recipe: dict, seed: int) -> dict:
    """Train and evaluate once, or read an earlier result of the same recipe and log."""
    done, given = output / "quality.json", {"recipe": recipe, "log": checksum(data)}
    if done.is_file():
        record = json.loads(done.read_text())
        if {name: record.get(name) for name in given} != given:
            raise SystemExit(f"{output} is of another recipe or log: move it away, or choose another --output")
        return record
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer = train(data, output, recipe, seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    record = (
        given
        | evaluate_prepared(output, data, report=output / "report")
        | {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "resumed": trainer.args.resume_from_checkpoint is not None,
            "epochs": trainer.state.epoch,
            "parameters": trainer.model.num_parameters(),
            "validation": trainer.evaluation and trainer.evaluation["metrics"]["NDCG@10"],
        }
    )
    if PartialState().is_main_process:
        shutil.copyfile(output / "report" / RANKS_FILE, output / RANKS_FILE)
        done.write_text(json.dumps(record, indent=2))
    PartialState().wait_for_everyone()
    return record


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def add_row(
    name: str, data: Path, protocol: Protocol, baselines: Mapping[str, Mapping[str, float]], cells: Sequence[str]
) -> None:
    """Add a row below the rows of its log, or replace the row of the same run and number of threads."""
    log, cells = f"{name} ({checksum(data)})", [cell.replace("|", "\\|") for cell in cells]
    lines = (TABLE.read_text("utf-8") if TABLE.is_file() else HEADER).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|---")) + 1
    end = next((number for number, line in enumerate(lines) if number >= first and line[:1] != "|"), len(lines))
    of_log = [number for number in range(first, end) if lines[number].startswith((f"| {log} |", f"| **{log}** |"))]
    rows = [] if of_log else [f"| **{log}** | {protocol} | | | | | | | |"]
    for baseline, metrics in {} if of_log else baselines.items():
        rows.append(f"| {log} | {baseline} | | | | {metrics['HR@10']:.4f} | {metrics['NDCG@10']:.4f} | | |")
    rows.append(f"| {' | '.join([log, *cells])} |")
    same = [
        number
        for number in of_log
        if lines[number].startswith(f"| {log} | {cells[0]} |") and lines[number].endswith(f"| {cells[-1]} |")
    ]
    end = of_log[-1] + 1 if of_log else end
    lines[slice(same[0], same[0] + 1) if same else slice(end, end)] = rows
    TABLE.write_text("\n".join(lines) + "\n", "utf-8")
    print(*rows, sep="\n")


def minutes(runs: Sequence[Mapping]) -> str:
    """The mean minutes over runs, and the mean CPU minutes of their first processes."""
    seconds, of_cpu = (statistics.mean(run[name] for run in runs) for name in ("seconds", "cpu_seconds"))
    return f"{seconds / 60:.1f} (CPU {of_cpu / 60:.1f})"


def named_values(pairs: Sequence[str]) -> dict:
    """Parse NAME=VALUE, with values in YAML."""
    return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def named_seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--without_validation", action="store_true")
    parser.add_argument("--items", help="an item table")
    parser.add_argument("--item_features", nargs="*", default=[])
    parser.add_argument("--output", default="quality")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="changes to the recipe")
    options = parser.parse_args()
    recipe = yaml.safe_load(Path(options.recipe).read_text("utf-8")) if options.recipe else {}
    recipe |= named_values(options.set)
    name = log_name(options.log)
    folder = Path(options.output) / name
    state = PartialState(cpu=not torch.accelerator.is_available())
    features = {"items": options.items, "item_features": options.item_features} if options.item_features else {}
    with state.main_process_first():
        length = recipe.get("max_position_embeddings")
        data = prepared(options.log, folder, length, not options.without_validation, **features)
    seeds = range(42, 42 + options.seeds)
    title, stem = (f"`{options.recipe}`", Path(options.recipe).stem) if options.recipe else ("defaults", "defaults")
    given = f" --recipe {options.recipe}" if options.recipe else ""
    if options.without_validation:
        title, stem, given = f"{title}, all but test trains", f"{stem}-all-but-test", f"{given} --without_validation"
    if features:
        title, stem = f"{title}, item features {' '.join(options.item_features)}", f"{stem}-with-features"
        table = f" --items {log_file(options.items)}" if options.items else ""
        given += f"{table} --item_features {shlex.join(options.item_features)}"
    if options.set:
        named = " ".join(options.set)
        title, stem = f"{title}, `{named}`", "-".join([stem, *options.set]).replace("/", "_")
        given += f" --set {named}"
    runs = [run(data, folder / f"{stem}-{seed}", recipe, seed) for seed in seeds]
    if not state.is_main_process:
        return
    rank_baselines(folder, data)
    launcher = f"torchrun --nproc_per_node {state.num_processes} " if state.num_processes > 1 else ""
    epochs, validated = f"{statistics.mean(run['epochs'] for run in runs):.0f}", runs[0]["validation"] is not None
    if validated:
        CURVES.mkdir(exist_ok=True)
        curve = CURVES / f"{name}-{stem}.png"
        shutil.copyfile(folder / f"{stem}-{seeds[0]}" / CURVE_FILE, curve)
        epochs = f"[{epochs}](../{CURVES.name}/{curve.name})"
    cells = [
        f"{title}, {named_seeds(seeds)}",
        f"{runs[0]['parameters']:,}",
        epochs,
        minutes(runs) + (" (resumed)" if any(run["resumed"] for run in runs) else ""),
        *(spread([run["metrics"][metric] for run in runs]) for metric in ("HR@10", "NDCG@10")),
        spread([run["validation"] for run in runs]) if validated else "",
        f"`{launcher}benchmarks/quality.py {log_file(options.log)}{given} --seeds {options.seeds}`, "
        f"{machine(torch.get_num_threads(), state.num_processes)}",
    ]
    add_row(name, data, Protocol(**runs[0]["protocol"]), runs[0]["baselines"], cells)


if __name__ == "__main__":
    main()
