"""Streams: training rows from Parquet shards, and counts and samples of histories that are read part by part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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
    baseline_ranks,
    cooccurrence_vectors,
    prepare,
    ranking_rows,
    read_prepared,
    stream_training_rows,
)
from bert4rec_hf.data import counting, preparation
from bert4rec_hf.data.counting import item_counts, recent_item_counts, sampled_histories, transitions
from bert4rec_hf.data.histories import stream_prepared
from bert4rec_hf.data.rows import users_with_targets
from bert4rec_hf.model.configuration_bert4rec import UNK_TOKEN_ID

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


@pytest.fixture(scope="module", params=["timed", "untimed"])
def prepared(request, tmp_path_factory) -> Path:
    """A prepared folder of several files. Some users do not train, and the catalogue lacks some items."""
    folder = tmp_path_factory.mktemp("prepared")
    chance = np.random.default_rng(0)
    columns = {
        "user_id": chance.integers(150, size=4000).astype(str),
        "item_id": (30 * chance.random(4000) ** 2).astype(int).astype(str),
        "timestamp": chance.integers(1000, size=4000),
    }
    options = {"split": "temporal", "min_user_events": 14, "min_item_events": 54}
    if request.param == "untimed":
        columns["position"] = columns.pop("timestamp")
        options = {}
    pq.write_table(pa.table(columns), folder / "log.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "EVENTS_PER_FILE", 200)
        prepare(folder / "log.parquet", folder / "data", **options)
    assert len(list((folder / "data").glob("histories-*"))) > 5
    return folder / "data"


def test_what_is_counted_from_disk_is_what_is_counted_in_memory(prepared):
    in_memory, tokenizer, _ = read_prepared(prepared)
    num_items = tokenizer.num_items
    has_unknown = in_memory.timestamps is not None
    assert ((in_memory.item_ids == UNK_TOKEN_ID) & in_memory.is_training()).any() == has_unknown
    assert (in_memory.train_end == 0).any() == has_unknown
    streamed, _, _ = stream_prepared(prepared)
    assert streamed.num_training_events() == in_memory.num_training_events()
    assert item_counts(streamed, num_items).tolist() == item_counts(in_memory, num_items).tolist()
    recent = recent_item_counts(in_memory, num_items, 0)
    assert 0 < recent.sum() < 0.3 * in_memory.num_training_events()
    assert recent_item_counts(streamed, num_items, 0).tolist() == recent.tolist()
    for of_memory, of_disk in zip(
        *(transitions(histories, num_items, 40, with_self_pairs=True) for histories in (in_memory, streamed)),
        strict=True,
    ):
        assert torch.equal(of_memory, of_disk)
    assert torch.equal(cooccurrence_vectors(in_memory, num_items, 8), cooccurrence_vectors(streamed, num_items, 8))
    for part in ("validation", "test"):
        assert streamed.num_targets(part) == in_memory.num_targets(part) > 10
        evaluated = users_with_targets(streamed, part)
        rows = [
            ranking_rows(histories, tokenizer, part, filter_seen_items=False) for histories in (in_memory, evaluated)
        ]
        assert rows[0].to_dict() == rows[1].to_dict()
        ranks = [baseline_ranks(rows[0], histories, num_items) for histories in (in_memory, streamed)]
        assert {name: found.tolist() for name, found in ranks[0].items()} == {
            name: found.tolist() for name, found in ranks[1].items()
        }
        drawn = [users_with_targets(histories, part, 10) for histories in (in_memory, streamed)]
        assert drawn[0].user_id.to_pylist() == drawn[1].user_id.to_pylist()
        assert len(set(drawn[0].user_id.to_pylist())) == len(drawn[0]) == drawn[0].num_targets(part) == 10
        assert ranking_rows(drawn[0], tokenizer, part, filter_seen_items=True).to_dict() == (
            ranking_rows(drawn[1], tokenizer, part, filter_seen_items=True).to_dict()
        )


def test_of_a_large_log_the_same_histories_are_counted_from_disk_as_in_memory(prepared, monkeypatch):
    in_memory, _, _ = read_prepared(prepared)
    for limit in (100, 400, 1000):
        monkeypatch.setattr(counting, "MAX_COUNTED_EVENTS", limit)
        for seed in (0, 1):
            samples = [sampled_histories(histories, seed) for histories in (in_memory, stream_prepared(prepared)[0])]
            assert samples[0].user_id.to_pylist() == samples[1].user_id.to_pylist()
            assert samples[0].item_ids.tolist() == samples[1].item_ids.tolist()
            assert samples[0].train_end.tolist() == samples[1].train_end.tolist()
            assert samples[0].is_trained().sum() == pytest.approx(limit, rel=0.6)
    assert [len(part) for part in stream_prepared(prepared)[0].parts()] != [len(in_memory)]


def test_a_log_on_disk_is_read_once_for_each_count(prepared, monkeypatch):
    streamed, tokenizer, _ = stream_prepared(prepared)
    read, parts = streamed.read, []
    monkeypatch.setattr(streamed, "read", lambda part, **options: [parts.append(part), read(part, **options)][1])
    for _ in range(2):
        item_counts(streamed, tokenizer.num_items)
        recent_item_counts(streamed, tokenizer.num_items, 0)
        transitions(streamed, tokenizer.num_items, 5, with_self_pairs=True)
    assert sorted(parts) == sorted([*range(len(streamed.row_groups))] * 3)  # counts, sample, recent counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]))
