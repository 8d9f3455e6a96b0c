"""FSDP2 as `accelerate launch` and recipes/accelerate/fsdp.yaml set it up, sharding over two CPU processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from chain_runs import free_port
from log_and_model import HIDDEN_SIZE, answers, trainer_inputs, write_log_and_model
from process_runs import FSDP, shard_without_gpus

from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTrainer, Bert4RecTrainingArguments
from bert4rec_hf.training.resume import StartIsCheckpoint


def arguments(folder: Path) -> Bert4RecTrainingArguments:
    """Arguments that evaluate and save between steps and load the best epoch at the end, as in `bert4rec train`."""
    return Bert4RecTrainingArguments(
        str(folder), num_train_epochs=4, per_device_train_batch_size=8, learning_rate=0.01, warmup_steps=1,
        eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip


def train_sharded(data: Path, start: Path, output: Path) -> None:
    """The program of each of the two processes."""
    shard_without_gpus()
    trainer = Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction.from_pretrained(start), arguments(output), **trainer_inputs(data)
    )
    trainer.train()
    model = trainer.model
    metrics = trainer.evaluate()
    trained = answers(model.eval())
    trainer.save_model()
    # `prepare` is also called without a trainer, and the model answers before its first forward pass.
    fresh = Bert4RecForMaskedItemPrediction.from_pretrained(start).eval()
    fresh, _ = trainer.accelerator.prepare(fresh, torch.optim.SGD(fresh.parameters()))
    untrained = answers(fresh)
    # A run that only makes the model worse ends with the model of its start.
    choice = {"metric_for_best_model": "loss", "greater_is_better": False, "eval_on_start": True}
    worse = replace(arguments(output / "worse"), learning_rate=5.0, num_train_epochs=1, **choice)
    spoilt = Bert4RecTrainer(Bert4RecForMaskedItemPrediction.from_pretrained(start), worse, **trainer_inputs(data))
    spoilt.add_callback(StartIsCheckpoint(spoilt))
    spoilt.train()
    losses = [record["eval_loss"] for record in spoilt.state.log_history if "eval_loss" in record]
    losses.append(spoilt.evaluate()["eval_loss"])
    if trainer.is_world_process_zero():
        torch.save({"trained": trained, "untrained": untrained}, output / "answers.pt")
        report = {
            "shards": [list(part.weight.to_local().shape) for part in (model.get_input_embeddings(), model.item_bias)],
            "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
            "metrics": metrics,
            "best": trainer.state.best_metric,
            "losses_of_worse_run": losses,
        }
        (output / "report.json").write_text(json.dumps(report))
    trainer.accelerator.wait_for_everyone()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("no", 1e-5),
        pytest.param(
            "bf16",
            0.1,
            marks=pytest.mark.skipif("TEST_PROCESSES" not in os.environ, reason="takes long: make test-processes"),
        ),
    ],
)
def test_weights_that_accelerate_shards_train_and_answer_like_the_whole_ones(tmp_path, precision, tolerance):
    output, config = tmp_path / "output", tmp_path / "fsdp.yaml"
    data, start, model = write_log_and_model(tmp_path)
    on_two_cpus = {"num_processes": 2, "use_cpu": True, "mixed_precision": precision}
    config.write_text(yaml.safe_dump(yaml.safe_load(FSDP.read_text()) | on_two_cpus))
    # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
    outcome = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config),
         "--main_process_port", str(free_port()), __file__, str(data), str(start), str(output)],
        check=False, timeout=300, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (output / "report.json").is_file(), outcome.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    # Each process holds half of the 24 rows of the item table, and half of the biases.
    assert report["shards"] == [[12, HIDDEN_SIZE], [12]]
    assert report["losses"][-1] < report["losses"][0] - 0.3
    assert report["metrics"]["eval_NDCG@10"] == report["best"]
    before, after, kept = report["losses_of_worse_run"]
    assert kept == before < after
    found = torch.load(output / "answers.pt")
    alone = Bert4RecForMaskedItemPrediction.from_pretrained(output)
    assert not torch.equal(alone.get_input_embeddings().weight, model.get_input_embeddings().weight)
    for name, whole in (("trained", alone), ("untrained", model.eval())):
        expected = answers(whole)
        if precision != "no":  # items with close scores may change places
            for values in (found[name], expected):
                del values["item_ids"], values["ranks"]
        torch.testing.assert_close(found[name], expected, atol=tolerance, rtol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_sharded(*map(Path, sys.argv[1:]))
