"""FSDP2 with weights really sharded over two CPU processes: train, evaluate, recommend, save for one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chain_runs import free_port, write_chain

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    prepare,
    ranking_rows,
    read_prepared,
    training_rows,
)
from bert4rec_hf.training.trainer import keep_inputs_and_outputs_in_float32


def pieces(data: Path) -> dict:
    histories, tokenizer, _ = read_prepared(data)
    return {
        "train_dataset": training_rows(histories),
        "eval_dataset": ranking_rows(histories, tokenizer, "validation", filter_seen_items=False),
        "processing_class": tokenizer,
    }


def arguments(folder: Path) -> Bert4RecTrainingArguments:
    return Bert4RecTrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=16, use_cpu=True, disable_tqdm=True,
        eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip


def histories_in_tokens(model) -> torch.Tensor:
    numbers = torch.arange(8 * 5).reshape(8, 5) % (model.config.vocab_size - 3) + 3
    return torch.cat((numbers, torch.ones(8, 1, dtype=torch.long)), dim=1)


def in_half_precision() -> list[bool]:
    """Whether sharded weights in bfloat16 recommend what whole ones in float32 do, where transitions decide."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=2003, hidden_size=32, num_transitions=4)  # more than bfloat16 can count to
    model = Bert4RecForMaskedItemPrediction(config).eval()
    model.decoder.history_scores.successor_ids[:] = torch.stack([torch.randperm(2000)[:4] + 3 for _ in range(2003)])
    model.decoder.history_scores.successor_scores[:] = torch.tensor([40.0, 38.0, 36.0, 34.0])
    histories = torch.cat((torch.randint(3, 2003, (8, 5)), torch.ones(8, 1, dtype=torch.long)), dim=1)
    _, expected = model.recommend(histories, top_k=4)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_inputs_and_outputs_in_float32(plugin)
    for part in (*model.model.layers, model):
        fully_shard(part, mp_policy=plugin.mixed_precision_policy)
    scores, item_ids = model.recommend(histories, top_k=4)
    return [torch.equal(item_ids, expected), scores.dtype == torch.float32]


def train_sharded(data: Path, start: Path, output: Path) -> None:
    """What each of the two processes does."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    model = Bert4RecForMaskedItemPrediction.from_pretrained(start, distributed_config=DistributedConfig(fsdp_size=2))
    trainer = Bert4RecTrainer(model, arguments(output), **pieces(data))
    shard = model.decoder.weight.to_local().shape
    trainer.train()
    metrics = trainer.evaluate()
    scores, item_ids = model.eval().recommend(histories_in_tokens(model), top_k=5)
    trainer.save_model()
    half = in_half_precision()
    if dist.get_rank() == 0:
        report = {
            "shard": list(shard), "metrics": metrics, "scores": scores.tolist(), "item_ids": item_ids.tolist(),
            "half": half,
        }  # fmt: skip
        (output / "report.json").write_text(json.dumps(report))
    dist.barrier()


@pytest.mark.processes
def test_sharded_weights_train_evaluate_recommend_and_are_saved_whole(tmp_path):
    data, start, output = tmp_path / "data", tmp_path / "start", tmp_path / "output"
    write_chain(tmp_path / "log.csv", num_users=101, num_items=21, length=12, follow=0.9)
    prepare(tmp_path / "log.csv", data)
    tokenizer = Bert4RecTokenizer.from_pretrained(data)
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=50, hidden_size=32, num_transitions=4)
    model = Bert4RecForMaskedItemPrediction(config)
    model.decoder.history_scores.successor_ids[3:] = torch.stack([torch.randperm(21)[:4] + 3 for _ in range(21)])
    model.decoder.history_scores.successor_scores[3:] = torch.rand(21, 4)
    model.save_pretrained(start)
    # Such runs may abort at interpreter exit after the work is done: what they wrote is what counts.
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         __file__, str(data), str(start), str(output)],
        check=False, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert (output / "report.json").is_file(), outcome.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    assert report["half"] == [True, True]
    # Each process holds half of the item table's 24 rows.
    assert report["shard"] == [12, 32]
    alone = Bert4RecForMaskedItemPrediction.from_pretrained(output)
    assert not torch.equal(alone.decoder.weight, model.decoder.weight)
    assert torch.equal(alone.decoder.history_scores.successor_ids, model.decoder.history_scores.successor_ids)
    assert torch.equal(alone.decoder.history_scores.successor_scores, model.decoder.history_scores.successor_scores)
    scores, item_ids = alone.recommend(histories_in_tokens(alone), top_k=5)
    assert item_ids.tolist() == report["item_ids"]
    torch.testing.assert_close(scores, torch.tensor(report["scores"]), atol=1e-5, rtol=0)
    metrics = Bert4RecTrainer(alone, arguments(tmp_path / "alone"), **pieces(data)).evaluate()
    for name in ("eval_HR@10", "eval_NDCG@10", "eval_MRR", "eval_coverage@10"):
        assert metrics[name] == pytest.approx(report["metrics"][name], abs=1e-9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_sharded(*map(Path, sys.argv[1:]))
