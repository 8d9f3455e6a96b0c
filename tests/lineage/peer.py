"""Loads a file of `convert --to recbole` in the environment of RecBole or hopwise, and stores their scores.

python peer.py LIBRARY FILE.pth HISTORIES.json SCORES.pth
"""

import importlib
import json
import sys

import numpy as np
import torch


class Catalogue:
    """The part of a dataset that RecBole's and hopwise's BERT4Rec reads."""

    def __init__(self, num_items: int):
        self.num_items = num_items

    def num(self, field: str) -> int:
        return self.num_items


def main(library: str, file: str, histories_file: str, output: str) -> None:
    # RecBole 1.2 reads these names at import, but NumPy 2 no longer has them.
    for name in ("bool", "float", "int", "object"):
        if name not in np.__dict__:
            setattr(np, name, getattr(__builtins__, name))
    config_class = importlib.import_module(f"{library}.config").Config
    model_class = importlib.import_module(f"{library}.model.sequential_recommender").BERT4Rec
    content = torch.load(file, weights_only=True)
    length, num_items = content["config"]["MAX_ITEM_LIST_LENGTH"], len(content["item_id"])
    settings = content["config"] | {"train_neg_sample_args": None, "mask_ratio": 0.2}
    config = config_class(model="BERT4Rec", dataset="none", config_dict=settings)
    model = model_class(config, Catalogue(num_items)).eval()
    model.load_state_dict(content["state_dict"], strict=True)
    rows, lengths = [], []
    with open(histories_file) as handle:
        for history in json.load(handle):
            newest = [content["item_id"].index(item) for item in history][-length:]
            rows.append(newest + [0] * (length - len(newest)))
            lengths.append(len(newest))
    interaction = {model.ITEM_SEQ: torch.tensor(rows), model.ITEM_SEQ_LEN: torch.tensor(lengths)}
    with torch.no_grad():
        torch.save(model.full_sort_predict(interaction), output)


if __name__ == "__main__":
    sys.argv[1:], arguments = [], sys.argv[1:]  # the Config of both libraries reads the command line
    main(*arguments)
