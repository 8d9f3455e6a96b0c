"""Measures the pieces that the plan of results/scaling.md rests on: what more processes, workers and shards bring.

    python benchmarks/scaling_pieces.py [sharded] [streaming] [bulk] [spark]

- sharded: training steps with an item table of a million rows, in one process, and sharded by FSDP2 over two and four;
  seconds a step, and memory of a process.
- streaming: rows a second of the data loader of `train --streaming`, by its workers.
- bulk: `recommend --histories` in one and two processes.
- spark: `prepare` from a table of Spark with one and two workers, and from the same Parquet file by DuckDB; needs
  pyspark and Java, as `make test-spark` installs them.

Each measurement runs in its own process, on a machine that does nothing else. The script writes a section of
results/scaling_pieces.md for each piece.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prepare_large import write_log
from tables import machine, write_section

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    prepare,
)
from bert4rec_hf.data.histories import StreamedHistories, histories_files
from bert4rec_hf.data.rows import StreamedTrainingRows

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from chain_runs import free_port
from process_runs import launch

TABLE = Path(__file__).resolve().parent / "results" / "scaling_pieces.md"
HEADER = f"""# Pieces of the plan

Written by `benchmarks/scaling_pieces.py`, which says what is measured; {os.cpu_count()} cores, {machine(1)} a process.
"""
WIDTH, LENGTH = 64, 50


def table(names: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


def measure_sharded(folder: Path) -> list[str]:
    num_items, steps = 1_000_000, 12
    items, data = [str(item) for item in range(num_items)], folder / "data"
    tokenizer = Bert4RecTokenizer.from_items(items, model_max_length=LENGTH)
    start = folder / "start"
    Bert4RecForMaskedItemPrediction(
        Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=WIDTH, max_position_embeddings=LENGTH, num_transitions=0)
    ).save_pretrained(start)
    log = folder / "log.csv"
    with log.open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for event in range(num_items):  # every item once, in histories of 50
            file.write(f"{event // LENGTH},{event},{event % LENGTH}\n")
    prepare(log, data)
    rows = []
    for num_processes, fsdp in ((1, False), (2, False), (2, True), (4, True)):
        output = folder / f"{num_processes}-{fsdp}"
        given = {
            "data": data, "output_dir": output, "max_steps": steps, "item_loss": "sampled_softmax",
            "num_negatives": 1000, "hidden_size": WIDTH, "max_position_embeddings": LENGTH, "num_transitions": 0,
            "item_initialization": "random", "mask_ratio": 0.2, "per_device_train_batch_size": 128 // num_processes,
            "eval_strategy": "no", "save_strategy": "no", "calibrate": "false", "disable_tqdm": "true",
            "max_eval_samples": 32, "logging_steps": 1,
        }  # fmt: skip
        words = ["train", *(word for pair in given.items() for word in (f"--{pair[0]}", pair[1]))]
        done = launch(num_processes, words, folder, fsdp, PEAKS=str(output))
        runtime = re.search(r"'train_runtime': '?([\d.]+)", done.stdout)
        if runtime is None:
            raise SystemExit(done.stderr[-3000:])
        peaks = [float(path.read_text()) for path in sorted(folder.glob(f"{output.name}.peak-*"))]
        assert len(peaks) == num_processes, peaks
        how = "FSDP2" if fsdp else "DDP" if num_processes > 1 else ""
        rows.append([f"{num_processes}", how, f"{float(runtime[1]) / steps:.2f}", f"{max(peaks):.2f}"])
        print(rows[-1], flush=True)
    return [
        f"{num_items:,} items, width {WIDTH}, 128 histories a step in all, 1,000 negatives, AdamW in float32: weights, "
        f"gradients and moments of the table are {16 * num_items * WIDTH / 2**30:.2f} GiB. Memory is the peak of a "
        "process in the steps, with PyTorch and the catalogue in it. The processes share the cores, and exchange over "
        "gloo.",
        "",
        *table(["processes", "", "seconds a step", "GiB a process"], rows),
    ]


def measure_streaming(folder: Path) -> list[str]:
    num_events, batch_size, num_batches = 20_000_000, 128, 3000
    log, data = folder / "log.parquet", folder / "data"
    write_log(log, num_events)
    prepare(log, data)
    rows = []
    for workers in (0, 1, 2, 4):
        command = [sys.executable, __file__, "--loader", str(data), str(workers), str(batch_size), str(num_batches)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append([str(workers), f"{float(out.splitlines()[-1]):,.0f}"])
        print(rows[-1], flush=True)
    files = sorted(data.glob("histories*.parquet"))
    groups = sum(pq.ParquetFile(path).num_row_groups for path in files)
    return [
        f"{num_events:,} events of {num_events // 100:,} users; windows of {LENGTH} items in batches of {batch_size}, "
        f"masked and padded; {len(files)} Parquet files with {groups} row groups, which the workers divide. "
        f"{batch_size * num_batches:,} rows after the first batch.",
        "",
        *table(["workers", "rows a second"], rows),
    ]


def read_rows(data: str, workers: int, batch_size: int, num_batches: int) -> float:
    """Rows a second of the Trainer's data loader."""
    tokenizer = Bert4RecTokenizer.from_pretrained(data, model_max_length=LENGTH)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1, max_position_embeddings=50)
    with tempfile.TemporaryDirectory() as folder:
        arguments = Bert4RecTrainingArguments(
            folder, per_device_train_batch_size=batch_size, dataloader_num_workers=workers, max_steps=1, use_cpu=True
        )
        rows = StreamedTrainingRows(StreamedHistories(histories_files(Path(data)), tokenizer), max_length=LENGTH)
        trainer = Bert4RecTrainer(
            Bert4RecForMaskedItemPrediction(config), arguments, train_dataset=rows, processing_class=tokenizer
        )
        batches = iter(trainer.get_train_dataloader())
        next(batches)
        start, number = time.perf_counter(), 0
        for batch in itertools.islice(batches, num_batches):
            number += len(batch["input_ids"])
        return number / (time.perf_counter() - start)


def measure_bulk(folder: Path) -> list[str]:
    num_items, sizes = 10_000, (20_000, 80_000)
    tokenizer = Bert4RecTokenizer.from_items([str(item) for item in range(num_items)], model_max_length=LENGTH)
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=WIDTH, max_position_embeddings=LENGTH)
    Bert4RecForMaskedItemPrediction(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for size in sizes:
        write_histories(folder / str(size), size, num_items)
    rows = []
    for num_processes in (1, 2):
        seconds = []
        for size in sizes:
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port"]
            command = [
                sys.executable, *([*launcher, str(free_port())] if num_processes > 1 else []), "-m", "bert4rec_hf",
                "recommend", str(folder / "model"), "--histories", str(folder / str(size)),
                "--output", str(folder / f"{size}-{num_processes}"),
            ]  # fmt: skip
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            seconds.append(time.perf_counter() - start)
        rate = (sizes[1] - sizes[0]) / (seconds[1] - seconds[0])
        rows.append([str(num_processes), f"{rate:,.0f}", f"{seconds[0] - sizes[0] / rate:.1f}"])
        print(rows[-1], flush=True)
    return [
        f"Ten of {num_items:,} items for each of {sizes[0]:,} and {sizes[1]:,} histories of 30 items, in 8 files; "
        f"width {WIDTH}, 2 layers, exactly. The rate is that of the further {sizes[1] - sizes[0]:,} histories, the "
        "start is what remains of the first: imports, the model, and the end of the processes.",
        "",
        *table(["processes", "histories a second", "seconds of the start"], rows),
    ]


def write_histories(folder: Path, size: int, num_items: int) -> None:
    folder.mkdir()
    chance = np.random.default_rng(size)
    for part in range(8):
        users = [f"u{part}-{row}" for row in range(size // 8)]
        items = [list(map(str, row)) for row in chance.integers(0, num_items, (size // 8, 30))]
        pq.write_table(pa.table({"user_id": users, "item_id": items}), folder / f"part-{part}.parquet")


def measure_spark(folder: Path) -> list[str]:
    num_events = 5_000_000
    log = folder / "log.parquet"
    write_log(log, num_events)
    rows = []
    for what in ("DuckDB", "1", "2"):
        command = [sys.executable, __file__, "--prepare", str(log), str(folder / f"data-{what}"), what]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        seconds = float(out.splitlines()[-1])
        name = what if what == "DuckDB" else f"Spark, {what} worker{'s' if what == '2' else ''}"
        rows.append([name, f"{seconds:.1f}", f"{num_events / seconds:,.0f}"])
        print(rows[-1], flush=True)
    of_duckdb, of_spark = (pq.read_table(folder / f"data-{what}" / "histories.parquet") for what in ("DuckDB", "2"))
    assert of_spark.equals(of_duckdb.cast(of_spark.schema))
    return [
        f"{num_events:,} events of {num_events // 100:,} users, from one Parquet file, by leave-one-out. Spark runs "
        "with workers of one core and 2 GiB each on the same machine (`local-cluster`), and its start is not counted. "
        "The histories are equal.",
        "",
        *table(["by", "seconds", "events a second"], rows),
    ]


def seconds_of_prepare(log: str, data: str, what: str) -> float:
    if what == "DuckDB":
        start = time.perf_counter()
        prepare(log, data)
        return time.perf_counter() - start
    import ibis
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    options = {
        "spark.ui.enabled": "false", "spark.sql.session.timeZone": "UTC", "spark.executor.memory": "2g",
        "spark.driver.memory": "2g",
    }  # fmt: skip
    builder = SparkSession.builder.master(f"local-cluster[{what},1,2048]")
    for name, value in options.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    connection = ibis.pyspark.connect(session)
    session.read.parquet(log).createOrReplaceTempView("events")
    session.sql("SELECT count(*) FROM events").collect()  # the workers have started
    start = time.perf_counter()
    prepare(connection.table("events"), data)
    seconds = time.perf_counter() - start
    session.stop()
    return seconds


PIECES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "sharded": ("A sharded item table", measure_sharded),
    "streaming": ("Rows from disk", measure_streaming),
    "bulk": ("Bulk recommendations", measure_bulk),
    "spark": ("Preparation on Spark", measure_spark),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=", ".join(PIECES))
    options = parser.parse_args()
    unknown = [piece for piece in options.pieces if piece not in PIECES]
    if unknown:
        parser.error(f"expected {', '.join(PIECES)}; got {unknown[0]!r}")
    for piece in options.pieces or PIECES:
        title, measure = PIECES[piece]
        with tempfile.TemporaryDirectory() as folder:
            write_section(TABLE, HEADER, title, measure(Path(folder)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--loader", data, *numbers]:
            print(json.dumps(read_rows(data, *map(int, numbers))))
        case ["--prepare", log, data, what]:
            print(json.dumps(seconds_of_prepare(log, data, what)))
        case _:
            main()
