"""Training runs whose histories stay on disk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from chain_runs import SMALL, arguments, free_port, write_chain
from command_runs import fail, succeed

import bert4rec_hf.data.preparation
from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainer,
    prepare,
    train_prepared,
    training_rows,
)
from bert4rec_hf.data import counting
from bert4rec_hf.data import rows as row_module
from bert4rec_hf.data.histories import read_prepared, stream_prepared
from bert4rec_hf.data.rows import StreamedTrainingRows
from bert4rec_hf.training.sampler import StreamedRowSampler

NUM_USERS = 240


def write_numbered_log(path: Path) -> None:
    """Users of 3 to 30 events. The first item of a user occurs nowhere else."""
    chance = np.random.default_rng(0)
    columns: dict[str, list] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(NUM_USERS):
        length = int(chance.integers(3, 31))
        columns["user_id"] += [f"u{user}"] * length
        columns["item_id"] += [f"first {user}", *(f"i{item}" for item in chance.integers(40, size=length - 1))]
        columns["timestamp"] += list(range(length))
    pq.write_table(pa.table(columns), path)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """A prepared folder with about 13 files, each with one row group."""
    folder = tmp_path_factory.mktemp("numbered")
    write_numbered_log(folder / "log.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert4rec_hf.data.preparation, "EVENTS_PER_FILE", 300)
        prepare(folder / "log.parquet", folder / "data")
    return folder / "data"


def as_lists(rows) -> list[list[int]]:
    return [np.asarray(rows[index]["input_ids"]).tolist() for index in range(len(rows))]


@pytest.mark.parametrize("windows", ["whole", "proportional", "sliding"])
def test_streamed_rows_are_the_rows_in_memory(numbered, windows):
    cuts = {"max_length": 8, "windows": windows, "window_step": 0.4}
    in_memory = as_lists(training_rows(read_prepared(numbered)[0], **cuts))
    streamed = StreamedTrainingRows(stream_prepared(numbered)[0], **cuts)
    assert len(streamed.sizes) > 10
    assert as_lists(streamed) == in_memory
    assert [row["input_ids"].tolist() for row in streamed.__getitems__([5, 200, 5, 3])] == [
        in_memory[index] for index in (5, 200, 5, 3)
    ]
    assert streamed.lengths.tolist() == [min(len(row), 8) for row in in_memory]


def test_histories_without_a_training_part_are_no_streamed_rows(tmp_path):
    rows = [f"{user},{item},{time}" for user in "ab" for time, item in enumerate("xy")]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    prepare(tmp_path / "log.csv", tmp_path / "data", validation=False)
    folder = tmp_path / "data"
    table = pq.read_table(folder / "histories.parquet")
    ends = pa.array([0, 0], pa.int32())
    pq.write_table(table.set_column(table.column_names.index("train_end"), "train_end", ends), folder / "h.parquet")
    (folder / "h.parquet").rename(folder / "histories.parquet")
    with pytest.raises(ValueError, match="no history has a training part"):
        StreamedTrainingRows(stream_prepared(folder)[0], max_length=8)


@pytest.mark.parametrize("num_readers", [1, 4, 20])
def test_every_epoch_has_every_row_once_in_another_order_and_a_reader_reads_each_of_its_parts_once(
    numbered, monkeypatch, num_readers
):
    monkeypatch.setattr(row_module, "SHUFFLE_BUFFER_SIZE", 60)
    rows = StreamedTrainingRows(stream_prepared(numbered)[0], max_length=8)
    sampler = StreamedRowSampler(rows, 4, num_readers, seed=0, by_length=True)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(NUM_USERS)) != orders[-1]
    assert orders[0] == orders[2] != orders[1]
    batches = np.array(orders[0]).reshape(-1, 4)
    num_reads = []
    for reader in range(num_readers):
        own = StreamedTrainingRows(stream_prepared(numbered)[0], max_length=8)
        read, parts = own.histories.read, []
        monkeypatch.setattr(
            own.histories, "read", lambda part, read=read, parts=parts: [parts.append(part), read(part)][1]
        )
        for batch in batches[reader::num_readers]:
            own.__getitems__(batch.tolist())
        assert len(parts) == len(set(parts))
        num_reads.append(len(parts))
    # Where the rows of a reader begin and end, it shares a part with its neighbours.
    assert sum(num_reads) <= len(rows.sizes) + num_readers - 1


def test_batches_have_similar_lengths_and_those_of_a_step_too(monkeypatch, tmp_path):
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    rows = StreamedTrainingRows.__new__(StreamedTrainingRows)
    rows.lengths, rows.sizes, rows.buffer_size = lengths, np.full(10, 100), 250
    rows.ends = rows.sizes.cumsum()
    sampler = StreamedRowSampler(rows, 10, 2, seed=0, by_length=True)
    batches = lengths[list(sampler)].reshape(-1, 10)
    assert batches.sum() / (batches.max(axis=1).sum() * 10) > 0.75  # a random order gives .54
    means = batches.mean(axis=1).reshape(-1, 2)  # of the two readers at each step
    assert np.corrcoef(means.T)[0, 1] > 0.9
    mixed = lengths[list(StreamedRowSampler(rows, 10, 2, seed=0, by_length=False))].reshape(-1, 10)
    assert mixed.sum() / (mixed.max(axis=1).sum() * 10) < 0.65


def first_items(rows) -> dict[str, torch.Tensor]:
    return {"first": torch.tensor([int(row["input_ids"][0]) for row in rows]), "pid": torch.tensor([os.getpid()])}


def trainer_of(data: Path, output: Path, **options) -> Bert4RecTrainer:
    """A trainer whose batches are only the first item of each row, and the process of the worker."""
    histories, tokenizer, _ = stream_prepared(data)
    torch.manual_seed(0)
    return Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL)),
        arguments(output, per_device_train_batch_size=3, eval_strategy="no", **options),
        data_collator=first_items,
        train_dataset=StreamedTrainingRows(histories, max_length=8),
        processing_class=tokenizer,
    )


@pytest.mark.processes
def test_two_processes_with_two_workers_each_read_every_row_once_an_epoch(numbered, tmp_path):
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         __file__, "epochs", str(numbered), str(tmp_path)],
        check=False, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
    files = sorted(tmp_path.glob("seen-*.json"))
    assert len(files) == 2, outcome.stderr[-3000:]
    seen = [json.loads(path.read_text()) for path in files]
    expected = sorted(row[0] for row in as_lists(training_rows(read_prepared(numbered)[0])))
    orders = []
    for epoch in range(2):
        parts = [process["epochs"][epoch] for process in seen]
        assert len(parts[0]) == len(parts[1]) == NUM_USERS // 2
        assert sorted(parts[0] + parts[1]) == expected
        orders.append(parts)
    assert orders[0] != orders[1]
    assert all(process["workers"] == [2, 2] for process in seen)


def test_the_command_trains_from_disk_and_gives_the_folder_that_training_in_memory_gives(tmp_path):
    write_chain(tmp_path / "log.csv", num_users=300, num_items=25, length=12, follow=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bert4rec_hf.data.preparation, "EVENTS_PER_FILE", 1000)
        succeed("prepare", tmp_path / "log.csv", "--output", tmp_path / "data")
    assert len(list((tmp_path / "data").glob("histories-*.parquet"))) == 4
    shared = ["--data", tmp_path / "data", "--num_train_epochs", 4, "--hidden_size", 32, "--use_cpu", "true"]
    for name, streaming in (("memory", "false"), ("disk", "true")):
        succeed("train", *shared, "--output_dir", tmp_path / name, "--streaming", streaming)
        succeed("evaluate", tmp_path / name, "--data", tmp_path / "data", "--streaming", streaming)
    files = [sorted(path.name for path in (tmp_path / name).iterdir() if path.is_file()) for name in ("memory", "disk")]
    assert files[0] == files[1]
    recipes = [yaml.safe_load((tmp_path / name / "recipe.yaml").read_text()) for name in ("memory", "disk")]
    assert recipes[0] | {"streaming": True} == recipes[1]
    records = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("memory", "disk")]
    for memory, disk in zip(*records, strict=True):
        assert memory["protocol"] == disk["protocol"]
        assert memory.get("baselines") == disk.get("baselines")
        assert disk["metrics"]["NDCG@10"] == pytest.approx(memory["metrics"]["NDCG@10"], abs=0.05)
    # The same model and users give the same metrics, whether the histories are in memory or not.
    twice = []
    for streaming in ("true", "false"):
        options = ["--streaming", streaming, "--max_eval_samples", 50, "--part", "test"]
        succeed("evaluate", tmp_path / "disk", "--data", tmp_path / "data", *options)
        twice.append(json.loads((tmp_path / "disk" / "evaluation.json").read_text())[-1])
    assert twice[0] == twice[1]
    assert twice[0]["protocol"]["split"] == "leave-one-out (50 of 300 users drawn at random)"
    assert twice[0]["protocol"]["num_users"] == 50

    line = fail("train", *shared, "--output_dir", tmp_path / "x", "--max_eval_samples", 0)
    assert line.endswith("max_eval_samples must be at least 1; got 0")
    line = fail("evaluate", tmp_path / "disk", "--data", tmp_path / "data", "--max_eval_samples", 0)
    assert line.endswith("max_eval_samples must be at least 1; got 0")


def write_users(folder: Path, num_users: int) -> None:
    """Write a prepared folder with histories of 20 events among 1,000 items."""
    rows = [f"{user},{item},{item}" for user in range(2) for item in range(1000)]
    folder.parent.mkdir()
    (folder.parent / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    prepare(folder.parent / "log.csv", folder)
    chance, length = np.random.default_rng(0), 20
    schema = pq.read_schema(folder / "histories.parquet")
    with pq.ParquetWriter(folder / "histories.parquet", schema, compression="zstd") as writer:
        for first in range(0, num_users, 16_384):
            number = min(16_384, num_users - first)
            offsets = pa.array(np.arange(number + 1) * length, pa.int32())
            items = pa.array(chance.integers(1000, size=number * length).astype(str))
            times = pa.array(np.tile(np.arange(length), number))
            ends = [pa.array(np.full(number, length - 2 + end), pa.int32()) for end in (0, 0, 1)]
            users = pa.array(np.arange(first, first + number).astype(str))
            lists = [pa.ListArray.from_arrays(offsets, values) for values in (items, times)]
            writer.write_table(pa.table([users, *lists, *ends], schema=schema))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak memory is read from /proc")
def test_the_peak_memory_of_a_streamed_run_does_not_grow_with_the_number_of_users(tmp_path):
    peaks = []
    for num_users in (20_000, 120_000):
        folder = tmp_path / str(num_users)
        write_users(folder / "data", num_users)
        command = [sys.executable, __file__, "memory", str(folder / "data"), str(folder / "model")]
        outcome = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        peaks.append(int(outcome.stdout.splitlines()[-1]))
    # The same run with the histories in memory needs an eighth more.
    assert peaks[1] < 1.1 * peaks[0], peaks


def train_a_little(data: Path, output: Path, streaming: bool = True) -> int:
    """Train with all counts, and return the peak memory of this process in KiB."""
    counting.MAX_COUNTED_EVENTS = 100_000  # both logs have more
    steps = {"max_steps": 20, "eval_steps": 20, "save_steps": 20}
    options = {"per_device_train_batch_size": 64, "max_eval_samples": 1000, "streaming": streaming}
    train_prepared(data, arguments(output, **steps, **options), hidden_size=32, num_attention_heads=1)
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, mode, data, output, *rest = sys.argv
    if mode == "memory":
        print(train_a_little(Path(data), Path(output), *(word == "true" for word in rest)))
    if mode == "epochs":
        trainer = trainer_of(Path(data), Path(output), dataloader_num_workers=2)
        loader = trainer.get_train_dataloader()
        seen: dict[str, list] = {"epochs": [], "workers": []}
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = list(loader)
            seen["epochs"].append([int(first) for batch in batches for first in batch["first"]])
            seen["workers"].append(len({int(batch["pid"]) for batch in batches}))
        (Path(output) / f"seen-{trainer.args.process_index}.json").write_text(json.dumps(seen))
