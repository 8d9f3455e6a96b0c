"""Runs of the command line, and small logs for it."""

import contextlib
import csv
import io
import random
from pathlib import Path

from safetensors.torch import load_file

from bert4rec_hf.cli import main

NUM_USERS, NUM_ITEMS = 60, 30
# None of these values is a default, so a test notices if a recipe is not read.
OPTIONS = {
    "num_train_epochs": 1,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "mask_ratio": 0.3,
    "learning_rate": 0.01,
    "seed": 5,
    "use_cpu": "true",
}


def run(*arguments):
    """Run a command in this process. Returns its status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # raised by argparse
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(*arguments):
    """Run a command that must succeed. Returns the lines of its standard output."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return out.splitlines()


def fail(*arguments):
    """Run a command that must fail with one line for the user. Returns this line."""
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    lines = err.splitlines()  # there are no progress bars, since standard error is not a terminal
    assert len(lines) == 1, err
    assert lines[0].startswith(f"bert4rec {arguments[0]}: ")
    return lines[0]


def flags(**options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def train_flags(**changes):
    return flags(**{name: value for name, value in (OPTIONS | changes).items() if value is not None})


def write_log(path, rows, header=("user_id", "item_id", "timestamp")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def random_rows(users, items, seed=0):
    """4 to 12 events per user, in order of time."""
    chance = random.Random(seed)
    return [
        (user, chance.choice(items), 1000 * number + event)
        for number, user in enumerate(users)
        for event in range(chance.randint(4, 12))
    ]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")
