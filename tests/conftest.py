"""Tests run offline, and on one thread: the machine has better uses for the others."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Programs that tests start as processes of their own import the helpers as well; pytest has them by `pythonpath`.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parent / "helpers"), os.environ.get("PYTHONPATH")))
)

import torch

torch.set_num_threads(1)
