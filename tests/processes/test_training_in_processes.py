"""Training in one, two and four processes, DDP and FSDP2: equal metrics, and runs that go on after a kill.

Every item is masked and nothing is dropped, and the rows divide into whole steps. So the runs differ by rounding only.
"""

import json
import os
from pathlib import Path

import pytest
from chain_runs import write_chain
from process_runs import launch
from safetensors.torch import load_file

from bert4rec_hf import prepare

pytestmark = pytest.mark.skipif("TEST_PROCESSES" not in os.environ, reason="takes minutes: make test-processes")

NUM_USERS = 320  # ten steps of 32 rows an epoch
OPTIONS = {
    "num_train_epochs": 2, "hidden_size": 16, "hidden_dropout_prob": 0, "mask_ratio": 1, "learning_rate": 0.01,
    "warmup_steps": 2, "save_steps": 5, "eval_steps": 5, "save_total_limit": 20, "calibrate": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder / "log.csv", num_users=NUM_USERS, num_items=25, length=12, follow=0.8)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data"


def train(data: Path, output: Path, num_processes: int, *words: str, fsdp: bool = False, **variables: str) -> str:
    """Train in so many processes. Returns standard error."""
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    words = ("train", "--data", data, "--output_dir", output, *options, *words)
    return launch(num_processes, words, output.parent, fsdp, **variables).stderr


def last_step(folder: Path, said: str) -> tuple[dict[str, float], dict]:
    """Metrics and weights of the last step. An earlier one may be the best, which would show nothing."""
    last = folder / "checkpoint-20"
    assert (folder / "evaluation.json").is_file(), said[-3000:]
    (record,) = json.loads((last / "evaluation.json").read_text())
    return record["metrics"], load_file(last / "model.safetensors")


def assert_equal_runs(one: Path, other: Path, said: str) -> None:
    """Weights and loss are equal up to rounding. Rounding may exchange a target and an item of nearly equal score."""
    (expected, weights), (found, of_other) = last_step(one, said), last_step(other, said)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    for name in ("HR@10", "NDCG@10", "MRR"):
        assert found[name] == pytest.approx(expected[name], abs=1 / NUM_USERS)
    # From step 5 to step 20, they change by up to .07.
    assert max(float((weights[name] - of_other[name]).abs().max()) for name in weights) < 1e-3


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """The model of an unbroken run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "model"
    last_step(folder, train(data, folder, 1))
    return folder


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_train_like_one(data, alone, tmp_path, num_processes, fsdp):
    said = train(data, tmp_path / "model", num_processes, fsdp=fsdp)
    assert_equal_runs(alone, tmp_path / "model", said)


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_killed_runs_end_with_advice_and_go_on_with_other_numbers_of_processes(data, alone, tmp_path, fsdp):
    model = tmp_path / "model"
    said = train(data, model, 2, fsdp=fsdp, KILL="7,1")
    (line,) = [line for line in said.splitlines() if line.startswith("bert4rec train: ")]
    # The process or the launcher notices first.
    assert "process 0 of 2 has lost another one" in line or "process 0 of 2 was told to end (SIGTERM)" in line
    assert "go on from checkpoint-5 with --resume_from_checkpoint last" in line
    said = train(data, model, 4, "--resume_from_checkpoint", "last", fsdp=fsdp, KILL="12,0")
    assert f"resuming from {model / 'checkpoint-5'}" in said
    lines = [line for line in said.splitlines() if line.startswith("bert4rec train: ")]
    assert 1 <= len(lines) <= 3  # the launcher may end a process before it has said so
    assert all("go on from checkpoint-10 with --resume_from_checkpoint last" in line for line in lines)
    said = train(data, model, 1, "--resume_from_checkpoint", "last")
    assert f"resuming from {model / 'checkpoint-10'}" in said
    assert_equal_runs(alone, model, said)
