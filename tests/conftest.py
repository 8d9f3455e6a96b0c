"""Tests run offline and on one thread."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Processes that tests start import the helpers too. pytest itself finds them through `pythonpath`.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "helpers"), os.environ.get("PYTHONPATH")))
)

import torch

torch.set_num_threads(1)
