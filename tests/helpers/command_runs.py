"""Running the command line, and small logs for it."""

import contextlib
import csv
import io
import random
from pathlib import Path

from safetensors.torch import load_file

from bert4rec_hf.cli import main

NUM_USERS, NUM_ITEMS = 60, 30
# None of these is a default, so that a recipe that is not read would show.
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
    """Status, standard output and standard error of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(*arguments):
    """Lines of standard output of a command that works."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return out.splitlines()


def fail(*arguments):
    """The one line that a user's mistake gives."""
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    lines = err.splitlines()  # without progress bars, since this is no terminal
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
    """Events in the order of time, 4 to 12 a user."""
    chance = random.Random(seed)
    return [
        (user, chance.choice(items), 1000 * number + event)
        for number, user in enumerate(users)
        for event in range(chance.randint(4, 12))
    ]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")
