"""Training with several processes, and the examples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chain_runs import SMALL, arguments, free_port
from transformers import pipeline

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainer,
    evaluate_prepared,
    read_prepared,
    training_rows,
)


def test_of_several_gpus_without_a_launcher_one_is_used(chain, tmp_path, caplog):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    given = arguments(tmp_path, per_device_train_batch_size=8, eval_strategy="no", save_strategy="no")
    given._n_gpu = 4
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    trainer = Bert4RecTrainer(model, given, train_dataset=training_rows(histories), processing_class=tokenizer)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 8)
    assert "one of 4 GPUs is used; accelerate launch" in caplog.text


def test_the_example_with_the_plain_trainer_runs_and_its_model_recommends(chain, tmp_path):
    data, _ = chain
    example = Path(__file__).parent.parent.parent / "examples" / "plain_trainer.py"
    command = [sys.executable, str(example), str(data), str(tmp_path / "model")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "eval_NDCG@10" in outcome.stdout, outcome.stderr[-2000:]
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "model"), device="cpu")
    assert len(recommend(["item 3", "item 4"], top_k=5)) == 5


@pytest.mark.processes
def test_the_example_with_a_loop_of_its_own_runs_on_two_processes(chain, tmp_path):
    data, _ = chain
    example = Path(__file__).parent.parent.parent / "examples" / "accelerate_loop.py"
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         str(example), str(data), str(tmp_path / "model")],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 5, outcome.stderr[-3000:]
    printed = float(lines[-1].split()[4])
    assert lines[-1].endswith("of 301 users")
    assert evaluate_prepared(tmp_path / "model", data, "validation", use_cpu=True)["metrics"][
        "NDCG@10"
    ] == pytest.approx(printed, abs=5e-5)


@pytest.mark.processes
def test_two_processes_evaluate_like_one_and_save_one_model(chain, tmp_path):
    data = chain[0]
    launchers = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    }

    def launch(launcher, *words) -> str:
        # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
        outcome = subprocess.run(
            [sys.executable, "-m", *launchers[launcher], str(free_port()), "-m", "bert4rec_hf", *map(str, words)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return outcome.stdout

    model, log = tmp_path / "model", data.parent / "log.csv"
    printed = launch(
        "accelerate", "train", "--data", log, "--output_dir", model, "--num_train_epochs", "1", "--hidden_size", "32",
        "--eval_steps", "0.5", "--save_steps", "0.5",
    )  # fmt: skip
    assert [line.split(";")[0] for line in printed.splitlines() if "wrote" in line] == [
        f"wrote {model}-data", f"wrote {model}",
    ]  # fmt: skip
    data = f"{model}-data"
    assert len(list(model.glob("model*.safetensors"))) == 1
    launch("torchrun", "evaluate", model, "--data", data, "--per_device_eval_batch_size", "64")
    records = json.loads((model / "evaluation.json").read_text())
    two = next(record for record in records if record["protocol"]["part"] == "test")
    one = evaluate_prepared(model, data, use_cpu=True)
    # 301 users do not divide by two, so a test notices if a user is counted twice.
    assert two["protocol"]["num_users"] == 301
    metrics = {name: value for name, value in one["metrics"].items() if name != "loss"}
    assert {name: two["metrics"][name] for name in metrics} == metrics
