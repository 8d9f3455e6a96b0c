"""Computes metrics of our lists with ranx and RecTools, or splits a log with RecBole, in the library's environment.

python peers.py metrics LISTS.json OUTPUT.json
python peers.py split FILE.inter OUTPUT.json
"""

import json
import sys
from pathlib import Path


def metrics(lists_file: str) -> dict:
    """The mean metrics of ranx and RecTools for each case, from lists [[item, score], ...] and one target per user."""
    import pandas as pd
    from ranx import Qrels, Run, evaluate
    from rectools.metrics import MRR, NDCG, HitRate, calc_metrics

    content = json.loads(Path(lists_file).read_text())
    cutoffs, targets = content["cutoffs"], content["targets"]
    ranx_names = {"MRR": "mrr"}
    rectools = {"MRR": MRR(k=content["num_items"])}
    for k in cutoffs:
        ranx_names |= {f"HR@{k}": f"hit_rate@{k}", f"NDCG@{k}": f"ndcg@{k}", f"MRR@{k}": f"mrr@{k}"}
        rectools |= {f"HR@{k}": HitRate(k=k), f"MRR@{k}": MRR(k=k)}
        rectools[f"NDCG@{k}"] = NDCG(k=k, log_base=2, divide_by_achievable=True)
        rectools[f"default NDCG@{k}"] = NDCG(k=k, log_base=2)
    qrels = Qrels({user: {target: 1} for user, target in targets.items()})
    interactions = pd.DataFrame({"user_id": list(targets), "item_id": list(targets.values())})
    found = {}
    for case, lists in content["lists"].items():
        run = Run({user: dict(served) for user, served in lists.items()})
        theirs = evaluate(qrels, run, list(ranx_names.values()))
        rows = [
            (user, item, place) for user, served in lists.items() for place, (item, _) in enumerate(served, start=1)
        ]
        reco = pd.DataFrame(rows, columns=["user_id", "item_id", "rank"])
        found[case] = {
            "ranx": {name: float(theirs[their_name]) for name, their_name in ranx_names.items()},
            "RecTools": {k: float(v) for k, v in calc_metrics(rectools, reco=reco, interactions=interactions).items()},
        }
    return found


def split(file: str) -> dict:
    """For each user, RecBole's training items in order, and its validation and test items."""
    import numpy as np

    for name in ("bool", "float", "int", "object"):  # RecBole 1.2 reads these names, but NumPy 2 lacks them
        if name not in np.__dict__:
            setattr(np, name, getattr(__builtins__, name))
    from recbole.config import Config
    from recbole.data import create_dataset

    path = Path(file).resolve()
    settings = {
        "data_path": str(path.parent.parent),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": 5,
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    }
    dataset = create_dataset(Config(model="BERT4Rec", dataset=path.stem, config_dict=settings))
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    training, validation, test = (part.inter_feat for part in dataset.build())

    def targets(rows):
        return zip(users[rows["user_id"].numpy()].tolist(), items[rows["item_id"].numpy()].tolist(), strict=True)

    found: dict = {}
    histories = items[training["item_id_list"].numpy()[:, 0]].tolist()
    for (user, item), first in zip(targets(training), histories, strict=True):
        # The first item is not a target. It is the history of the user's first row.
        found.setdefault(user, {"train": [first]})["train"].append(item)
    for part, rows in (("validation", validation), ("test", test)):
        for user, item in targets(rows):
            found[user][part] = item
    return found


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.argv[1:] = []  # RecBole's Config reads the command line
    result = {"metrics": metrics, "split": split}[arguments[0]](arguments[1])
    Path(arguments[2]).write_text(json.dumps(result))
