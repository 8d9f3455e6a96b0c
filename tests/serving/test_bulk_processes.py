"""Recommendations by several processes that share a folder."""

import os
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chain_runs import free_port

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.cli import main
from bert4rec_hf.serving import history_files

ITEMS = [str(item) for item in range(10, 60)]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
}
# A command with small parts. The process that answers the user of $FAIL fails or is killed.
SMALL_PARTS = """
import os, signal, sys
from bert4rec_hf.cli import main
from bert4rec_hf.serving import bulk, history_files

history_files.ROWS_PER_PART = 7
answer = bulk._Run.answer

def fails(run, batch):
    if os.environ["FAIL"] in batch.users.to_pylist():
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no memory is left")
    return answer(run, batch)

bulk._Run.answer = fails
if __name__ == "__main__":
    sys.exit(main())
"""

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, model_max_length=8)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "max_position_embeddings": 8, "initializer_range": 0.5}
    Bert4RecForMaskedItemPrediction(Bert4RecConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """Five files with 40 users. Some have exclusions, candidates, unknown items or no history."""
    folder, chance = tmp_path_factory.mktemp("histories"), random.Random(0)
    for part, users in enumerate([range(9), range(9, 10), range(10, 10), range(10, 30), range(30, 40)]):
        kind = pa.list_(pa.string())
        columns = {
            "item_id": [chance.sample([*ITEMS, "unknown"], chance.randrange(12)) for _ in users],
            "exclude": [chance.sample(ITEMS, 9) if user % 3 == 0 else None for user in users],
            "candidates": [chance.sample(ITEMS, 20) if user % 4 == 0 else None for user in users],
        }
        columns = {name: pa.array(lists, kind) for name, lists in columns.items()}
        names = pa.array([f"user {user}" for user in users], pa.string())
        pq.write_table(pa.table({"user_id": names} | columns), folder / f"{part}.parquet")
    return folder


def launch(launcher, words, arguments, **variables):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), *map(str, words), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"FAIL": "", "HOW": ""} | variables,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_write_the_files_of_one(model, histories, tmp_path, launcher):
    arguments = ["recommend", model, "--top_k", 5, "--batch_size", 4, "--device", "cpu", "--histories", histories]
    arguments += ["--exclude", "no item", 10, "--candidates", "neither", *ITEMS]
    (tmp_path / "two").mkdir()  # an empty folder is filled, though one process may write before the other looks
    done = launch(launcher, ["-m", "bert4rec_hf"], [*arguments, "--output", tmp_path / "two"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"wrote {tmp_path / 'two'}: user_id, item_id, rank and score for 40 histories\n"
    assert main([*map(str, arguments), "--output", str(tmp_path / "one")]) == 0
    given = [
        item for path in histories.iterdir() for items in pq.read_table(path)["item_id"].to_pylist() for item in items
    ]
    num_unknown = given.count("unknown")
    # One process warns for all.
    assert re.findall("left out 1 items that .*|the catalogue lacks .*|left out .* 'unknown'", done.stderr) == [
        "left out 1 items that the catalogue lacks, such as 'neither'",
        "the catalogue lacks 1 of the 2 excluded items: 'no item'",
        f"left out {num_unknown} items that the catalogue lacks, such as 'unknown'",
    ]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    users = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "two").iterdir())))["user_id"].unique()
    assert users.to_pylist() == [f"user {number}" for number in range(40)]
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_two_processes_keep_the_rules_of_one(model, histories, tmp_path):
    columns = {"item_id": ITEMS, "category": [number % 3 for number in range(50)], "price": list(range(50))}
    pq.write_table(pa.table(columns), tmp_path / "items.parquet")
    arguments = ["recommend", model, "--top_k", 5, "--device", "cpu", "--histories", histories]
    arguments += ["--items", tmp_path / "items.parquet", "--where", "price < 30", "--boost", "1: price < 9"]
    arguments += ["--max_per", "category:1"]
    done = launch("torchrun", ["-m", "bert4rec_hf"], [*arguments, "--output", tmp_path / "two"])
    assert done.returncode == 0, done.stderr[-3000:]
    # One process warns for all.
    (warning,) = re.findall("40 of 40 histories get fewer than 5 items: .*", done.stderr)
    assert re.search(r"max_per category:1 leaves [\d.]+ of the best 100 on average for \d+$", warning)
    assert main([*map(str, arguments), "--output", str(tmp_path / "one")]) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_two_processes_divide_the_rows_of_one_file(model, histories, tmp_path, monkeypatch):
    table = pa.concat_tables(map(pq.read_table, sorted(histories.iterdir())))
    pq.write_table(table, tmp_path / "in.parquet")  # with one row group
    (tmp_path / "run.py").write_text(SMALL_PARTS)
    arguments = ["recommend", model, "--histories", tmp_path / "in.parquet", "--device", "cpu"]
    done = launch("torchrun", [tmp_path / "run.py"], [*arguments, "--output", tmp_path / "two"])
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(history_files, "ROWS_PER_PART", 7)
    assert main([*map(str, arguments), "--output", str(tmp_path / "one")]) == 0
    assert main([*map(str, arguments), "--output", str(tmp_path / "one.parquet")]) == 0
    assert sorted(contents(tmp_path / "one")) == [f"part-0000{part}-of-00006.parquet" for part in range(6)]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    parts = pa.concat_tables(map(pq.read_table, sorted((tmp_path / "two").iterdir())))
    assert parts.equals(pq.read_table(tmp_path / "one.parquet"))


@pytest.mark.parametrize(
    ("how", "user", "output"),
    [("an error", "user 20", "new"), ("an error", "user 9", "old"), ("killed", "user 20", "old")],
    ids=["the second fails", "the first fails", "the second is killed"],
)
def test_a_process_that_ends_early_leaves_nothing_and_an_earlier_output_as_it_was(
    model, histories, tmp_path, how, user, output
):
    arguments = ["recommend", str(model), "--device", "cpu", "--histories"]
    assert main([*arguments, str(histories / "0.parquet"), "--output", str(tmp_path / "old")]) == 0
    before = contents(tmp_path / "old")
    (tmp_path / "run.py").write_text(SMALL_PARTS)
    words = [*arguments, histories, "--output", tmp_path / output]
    done = launch("torchrun", [tmp_path / "run.py"], words, FAIL=user, HOW=how)
    assert done.returncode != 0
    assert "wrote" not in done.stdout
    if how == "an error":
        assert done.stderr.count("bert4rec recommend: no memory is left\n") == 1
    assert contents(tmp_path / "old") == before
    assert {path.name for path in tmp_path.iterdir()} == {"old", "run.py"}
