"""A prepared log of a Markov chain."""

from pathlib import Path

import pytest
from chain_runs import write_chain

from bert4rec_hf import prepare


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("chain")
    best_next = write_chain(folder / "log.csv", num_users=301, num_items=25, length=20, follow=0.8)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data", best_next
