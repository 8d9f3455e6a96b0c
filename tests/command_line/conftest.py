"""A prepared log and a trained model."""

import pytest
from command_runs import NUM_ITEMS, NUM_USERS, random_rows, succeed, train_flags, write_log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def rows():
    return random_rows(range(1, NUM_USERS + 1), range(101, 101 + NUM_ITEMS))


@pytest.fixture(scope="module")
def log(folder, rows):
    return write_log(folder / "log.csv", rows)


@pytest.fixture(scope="module")
def prepared(folder, log):
    """A prepared folder and what the command printed."""
    return folder / "data", succeed("prepare", log, "--output", folder / "data")


@pytest.fixture(scope="module")
def data(prepared):
    return prepared[0]


@pytest.fixture(scope="module")
def trained(folder, data):
    """A model folder and what the command printed."""
    model = folder / "model"
    return model, succeed("train", "--data", data, "--output_dir", model, *train_flags())


@pytest.fixture(scope="module")
def model(trained):
    return trained[0]
