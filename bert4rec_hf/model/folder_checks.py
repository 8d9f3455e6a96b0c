# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""Checks of a model folder that may come from a stranger, before it is loaded: links, paths, and sizes of weights."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import nn

# A model may have at most this number of times the numbers of its files, since quantised weights are packed; and
# `NUMBERS_WITHOUT_FILE` more, for a part that is initialised.
NUMBERS_PER_STORED_NUMBER = 8
NUMBERS_WITHOUT_FILE = 2**24


def check_links(folder: str | os.PathLike) -> None:
    """Raise ValueError if a symbolic link in a folder leads out of it.

    The links of a snapshot in the cache of the Hub lead to the cache's folder "blobs", which is allowed.
    """
    for path in Path(folder).iterdir():
        if path.is_symlink() and not _is_inside(folder, path):
            raise ValueError(
                f"{path} is a link out of the folder, to {path.resolve()}: replace it with a copy of that file, if you "
                "trust the folder"
            )


def _is_inside(folder: str | os.PathLike, path: str | os.PathLike) -> bool:
    own, target = Path(folder).resolve(), Path(path).resolve()
    blobs = [own.parent.parent / "blobs"] if own.parent.name == "snapshots" else []
    return any(target.is_relative_to(place) for place in (own, *blobs))


def check_weight_files(model: nn.Module, files: Sequence[str], folder: str | os.PathLike) -> None:
    """Check the files of a model's weights, before memory is taken for the weights.

    Args:
        model: The model on the device "meta", with the sizes that config.json says.
        files: The files, of which those of another kind than safetensors are not read.
        folder: What the model is loaded from, a folder or a Hub id.

    Raises:
        ValueError: If a file is not in the folder, or the model needs far more memory than the files have numbers.
        SafetensorError: If a file is damaged.
    """
    if os.path.isdir(folder):
        for file in files:
            if not _is_inside(folder, file):
                raise ValueError(f"the weights of {folder} must be in the folder; got {Path(file).resolve()}")
    if not all(file.endswith(".safetensors") for file in files):
        return
    num_stored = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            num_stored += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    num_needed = sum(tensor.numel() for tensor in model.state_dict().values())
    if num_needed > NUMBERS_PER_STORED_NUMBER * num_stored + NUMBERS_WITHOUT_FILE:
        raise ValueError(
            f"the sizes in config.json of {folder} are those of a model of {num_needed:,} numbers; its weights have "
            f"{num_stored:,}: they do not belong together"
        )
