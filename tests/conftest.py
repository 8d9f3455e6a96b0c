"""Tests run offline and on one thread."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Processes that tests start import the helpers too. pytest itself finds them through `pythonpath`.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "helpers"), os.environ.get("PYTHONPATH")))
)

import pytest
import torch

import bert4rec_hf.runs.train

torch.set_num_threads(1)
# Each run of the Trainer collects garbage, which takes half a second while it also looks at all that is imported.
gc.freeze()


def pytest_collection_modifyitems(items):
    """Files whose tests take long come first, so that the processes that share the files end together."""
    slow = ("training", "serving", "hub")
    items.sort(key=lambda item: item.path.parent.name not in slow)


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def curves_without_drawing(request):
    """Learning curves are drawn only for tests that look at them. Drawing took a quarter of the time of the others."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.endswith(("test_learning_curve", "test_demo")):
            patch.setattr(bert4rec_hf.training.learning_curve, "plot_training", lambda record: b"\x89PNG\r\n\x1a\n")
        yield
