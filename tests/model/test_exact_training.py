"""Accumulated, distributed and plain steps give the same update, although rows have different numbers of labels."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from chain_runs import free_port
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
)

NUM_ITEMS, LENGTH = 40, 12


def masked_rows() -> Dataset:
    """Rows that are masked in advance, so that all runs see the same masks. A row has one to all but one label."""
    chance = np.random.default_rng(0)
    rows = []
    for number in range(64):
        items = chance.integers(3, NUM_ITEMS + 3, chance.integers(2, LENGTH + 1))
        masked = chance.permutation(len(items)) < 1 + number % (len(items) - 1)
        rows.append({"input_ids": np.where(masked, 1, items), "labels": np.where(masked, items, -100)})
    return Dataset.from_list(rows)


def train(folder, trainer_class=Trainer, arguments_class=TrainingArguments, **options) -> dict[str, torch.Tensor]:
    set_seed(0)
    model = Bert4RecForMaskedItemPrediction(
        Bert4RecConfig(vocab_size=NUM_ITEMS + 3, hidden_dropout_prob=0.0, max_position_embeddings=LENGTH)
    )
    defaults = {
        "per_device_train_batch_size": 32, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant",
        "warmup_steps": 0, "max_grad_norm": 1.0, "num_train_epochs": 2, "use_cpu": True, "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    if arguments_class is Bert4RecTrainingArguments:
        defaults["load_best_model_at_end"] = False
    trainer = trainer_class(
        model,
        arguments_class(str(folder), **(defaults | options)),
        data_collator=DataCollatorForMaskedItemPrediction(
            Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=LENGTH)
        ),
        train_dataset=masked_rows(),
    )
    trainer.train()
    trainer.save_model()
    return model.state_dict()


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("trainer_class", "arguments_class"),
    [(Trainer, TrainingArguments), (Bert4RecTrainer, Bert4RecTrainingArguments)],
    ids=["plain", "ours"],
)
def test_accumulated_small_batches_give_the_update_of_one_big_batch(tmp_path, trainer_class, arguments_class):
    classes = {"trainer_class": trainer_class, "arguments_class": arguments_class}
    big = train(tmp_path, **classes)
    small = train(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=8, **classes)
    set_seed(0)
    start = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=NUM_ITEMS + 3)).state_dict()
    assert distance(big, start) > 1e-2
    assert distance(big, small) < 1e-5


def test_one_seed_and_no_dropout_give_bit_equal_runs(tmp_path):
    first, second = train(tmp_path), train(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.processes
def test_two_processes_give_the_update_of_one(tmp_path):
    one = train(tmp_path / "one")
    # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         __file__, str(tmp_path / "two")],
        check=False, timeout=300,
    )  # fmt: skip
    two = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "two").state_dict()
    assert distance(one, two) < 1e-5


if __name__ == "__main__":
    # This program is one of two processes. Each has half of every batch.
    train(sys.argv[1], per_device_train_batch_size=16)
