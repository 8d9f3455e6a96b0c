"""Training rows streamed from Parquet shards: every row once, whatever the number of processes and workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chain_runs import free_port
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
    stream_training_rows,
)

NUM_SHARDS, ROWS = 4, 24
TOKENIZER = Bert4RecTokenizer.from_items(range(200), model_max_length=8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Shards of histories with an extra column. The first item of each row identifies the row."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(NUM_SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        table = pa.table(
            {
                "user_id": [f"u{number}" for number in numbers],
                "item_id": [
                    [str(number), "unheard of", *map(str, range(100, 101 + number % 5)), "199"] for number in numbers
                ],
                "train_end": pa.array([3 + number % 5 for number in numbers], pa.int32()),
                "country": ["nl"] * ROWS,
            }
        )
        pq.write_table(table, folder / f"histories-{shard}.parquet")
    return str(folder / "histories-*.parquet")


def firsts(rows) -> list[int]:
    return [int(TOKENIZER.token_ids_to_item_ids([row["input_ids"][0]])[0]) for row in rows]


def test_streamed_rows_are_the_training_part_without_unknown_items(shards):
    rows = list(stream_training_rows(shards, TOKENIZER))
    assert set(rows[0]) == {"input_ids"}
    assert TOKENIZER.token_ids_to_item_ids(rows[7]["input_ids"]) == ["7", "100", "101", "102"]
    assert firsts(rows) == list(range(NUM_SHARDS * ROWS))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_and_workers_share_the_rows_without_repeats_or_gaps(shards, num_processes, num_workers):
    seen = []
    for rank in range(num_processes):
        rows = split_dataset_by_node(stream_training_rows(shards, TOKENIZER), rank=rank, world_size=num_processes)
        loader = DataLoader(rows, batch_size=5, num_workers=num_workers, collate_fn=list)
        part = [first for batch in loader for first in firsts(batch)]
        assert len(part) == NUM_SHARDS * ROWS / num_processes
        seen += part
    assert sorted(seen) == list(range(NUM_SHARDS * ROWS))


def test_workers_that_are_started_anew_are_sent_the_rows(shards):
    rows = stream_training_rows(shards, TOKENIZER)
    loader = DataLoader(rows, batch_size=5, num_workers=1, collate_fn=list, multiprocessing_context="spawn")
    assert [first for batch in loader for first in firsts(batch)] == list(range(NUM_SHARDS * ROWS))


def train(shards: str, folder: Path) -> None:
    """Train for one pass over the rows, and write down the rows that this process collated."""
    collator, seen = DataCollatorForMaskedItemPrediction(TOKENIZER), []

    def collate(rows):
        seen.extend(firsts(rows))
        return collator(rows)

    arguments = Bert4RecTrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, disable_tqdm=True,
        max_steps=NUM_SHARDS * ROWS // 4 // int(os.environ.get("WORLD_SIZE", 1)),
        eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(TOKENIZER), max_position_embeddings=8)),
        arguments,
        data_collator=collate,
        train_dataset=stream_training_rows(shards, TOKENIZER),
        processing_class=TOKENIZER,
    )
    trainer.train()
    (folder / f"seen-{arguments.process_index}.json").write_text(json.dumps(seen))


def test_the_trainer_trains_on_every_streamed_row_once(shards, tmp_path):
    train(shards, tmp_path)
    assert sorted(json.loads((tmp_path / "seen-0.json").read_text())) == list(range(NUM_SHARDS * ROWS))


@pytest.mark.processes
def test_two_processes_train_on_every_streamed_row_once(shards, tmp_path):
    # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         __file__, shards, str(tmp_path)],
        check=False, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    files = sorted(tmp_path.glob("seen-*.json"))
    assert len(files) == 2, outcome.stderr[-3000:]
    parts = [json.loads(path.read_text()) for path in files]
    assert sorted(parts[0] + parts[1]) == list(range(NUM_SHARDS * ROWS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]))
