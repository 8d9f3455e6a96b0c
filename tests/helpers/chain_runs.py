"""Logs of Markov chains, and short training runs on them."""

import random
import socket
from pathlib import Path

import torch

from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTrainingArguments

# There are no transitions, since they would predict these logs without any training.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_transitions": 0}


def write_chain(path: Path, num_users: int, num_items: int, length: int, follow: float) -> dict[str, str]:
    """Write a log in which each item has one successor, which follows with probability `follow`; else any item follows.

    Returns:
        The successor of each item.
    """
    chance = random.Random(0)
    items = [f"item {number}" for number in range(num_items)]
    shuffled = chance.sample(items, num_items)
    best_next = dict(zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True))
    lines = ["user_id,item_id,timestamp"]
    for user in range(num_users):
        item = chance.choice(items)
        for time in range(length):
            lines.append(f"{user},{item},{time}")
            item = best_next[item] if chance.random() < follow else chance.choice(items)
    path.write_text("\n".join(lines) + "\n")
    return best_next


def arguments(output_dir, **options) -> Bert4RecTrainingArguments:
    # Few evaluations and checkpoints: they take most of the time of a run as short as these.
    defaults = {
        "num_train_epochs": 2, "use_cpu": True, "warmup_steps": 10, "disable_tqdm": True, "eval_steps": 0.25,
        "save_steps": 0.25,
    }  # fmt: skip
    return Bert4RecTrainingArguments(str(output_dir), **(defaults | options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Bert4RecForMaskedItemPrediction.from_pretrained(folder).state_dict()


def assert_equal_weights(first: Path, second: Path) -> None:
    first_weights, second_weights = weights(first), weights(second)
    assert first_weights.keys() == second_weights.keys()
    different = [name for name in first_weights if not torch.equal(first_weights[name], second_weights[name])]
    assert different == []


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
