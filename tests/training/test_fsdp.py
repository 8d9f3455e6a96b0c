"""FSDP2 with weights really sharded over two CPU processes: train, evaluate, recommend, save for one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from chain_runs import free_port
from log_and_model import HIDDEN_SIZE, answers, trainer_inputs, write_log_and_model

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTrainer, Bert4RecTrainingArguments
from bert4rec_hf.training.trainer import keep_inputs_and_outputs_in_float32


def arguments(folder: Path) -> Bert4RecTrainingArguments:
    return Bert4RecTrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=16, use_cpu=True, disable_tqdm=True,
        eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip


def in_half_precision() -> list[bool]:
    """Whether weights sharded in bfloat16 recommend as whole weights in float32, and whether scores are float32.

    Transitions decide the recommendations.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=2003, hidden_size=32, num_transitions=4)  # bfloat16 cannot represent all ids
    model = Bert4RecForMaskedItemPrediction(config).eval()
    model.history_scores.successor_ids[:] = torch.stack([torch.randperm(2000)[:4] + 3 for _ in range(2003)])
    model.history_scores.successor_scores[:] = torch.tensor([40.0, 38.0, 36.0, 34.0])
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
    """The program of each of the two processes."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    model = Bert4RecForMaskedItemPrediction.from_pretrained(start, distributed_config=DistributedConfig(fsdp_size=2))
    trainer = Bert4RecTrainer(model, arguments(output), **trainer_inputs(data))
    shard = model.get_input_embeddings().weight.to_local().shape
    trainer.train()
    calibration = trainer.calibrate()
    metrics = trainer.evaluate()
    found = answers(model.eval())
    trainer.save_model()
    half = in_half_precision()
    if dist.get_rank() == 0:
        torch.save(found, output / "answers.pt")
        report = {"shard": list(shard), "metrics": metrics, "half": half, "calibration": calibration}
        (output / "report.json").write_text(json.dumps(report))
    dist.barrier()


@pytest.mark.skipif(
    torch.__version__ < "2.13" or transformers.__version__ < "5.20",
    reason="from_pretrained shards weights from Transformers 5.20 and torch 2.13 on",
)
@pytest.mark.processes
def test_sharded_weights_train_evaluate_recommend_and_are_saved_whole(tmp_path):
    output = tmp_path / "output"
    data, start, model = write_log_and_model(tmp_path)
    # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         __file__, str(data), str(start), str(output)],
        check=False, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert (output / "report.json").is_file(), outcome.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    assert report["half"] == [True, True]
    # Each process holds half of the 24 rows of the item table.
    assert report["shard"] == [12, HIDDEN_SIZE]
    # The calibration computed the scores of sharded weights.
    assert report["calibration"]["NDCG@10"]["chosen"] == pytest.approx(report["metrics"]["eval_NDCG@10"], abs=1e-6)
    alone = Bert4RecForMaskedItemPrediction.from_pretrained(output)
    assert not torch.equal(alone.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(alone.history_scores.successor_ids, model.history_scores.successor_ids)
    assert torch.equal(alone.history_scores.successor_scores, model.history_scores.successor_scores)
    torch.testing.assert_close(answers(alone), torch.load(output / "answers.pt"), atol=1e-5, rtol=0)
    metrics = Bert4RecTrainer(alone, arguments(tmp_path / "alone"), **trainer_inputs(data)).evaluate()
    for name in ("eval_HR@10", "eval_NDCG@10", "eval_MRR", "eval_coverage@10"):
        assert metrics[name] == pytest.approx(report["metrics"][name], abs=1e-9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_sharded(*map(Path, sys.argv[1:]))
