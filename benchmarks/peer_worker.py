"""Trains a peer library, in its own environment, on the split of a prepared folder, and writes its recommendations.

    python peer_worker.py PEER HISTORIES.parquet OUTPUT_FOLDER SEED SETTINGS

SETTINGS is JSON and overrides the peer's own settings. The script writes lists.parquet (user_id, item_id, rank; 100
items for each test user, without seen items) and peer.json (epochs and whether their number was limited, parameters,
seconds, versions).
"""

import builtins
import importlib
import importlib.metadata
import json
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

LIST_LENGTH = 100

# The settings of RecTools' own benchmark: github.com/blondered/bert4rec_repro, recommenders/rectools/transformers.py.
# They are also the defaults of RecTools, except for the number of epochs and the patience for recall@10 on validation.
RECTOOLS = {
    "session_max_len": 100, "n_heads": 4, "n_factors": 256, "n_blocks": 2, "lr": 0.001, "loss": "softmax",
    "epochs": 200, "patience": 50, "precision": "32-true",
}  # fmt: skip

# The documented BERT4Rec.yaml and overall.yaml of RecBole and hopwise hold: histories of 50 items, 2 layers, hidden
# size 64, batches of 2048, 300 epochs, and early stopping after 10 evaluations without improvement.
RECBOLE_EPOCHS = 300

IMPLICIT = {
    "models": ["CosineRecommender", "TFIDFRecommender", "BM25Recommender"],
    "K": [20, 50, 100, 200, 500, 1000, 2000],
}


def events(histories: pd.DataFrame, ends: pd.Series) -> pd.DataFrame:
    """A table of the first `ends` events of each history: user_id, item_id, and place (from 0)."""
    lists = [items[:end] for items, end in zip(histories["item_id"], ends, strict=True)]
    lengths = [len(items) for items in lists]
    return pd.DataFrame({
        "user_id": np.repeat(histories["user_id"].to_numpy(), lengths),
        "item_id": np.concatenate(lists),
        "place": np.concatenate([np.arange(length) for length in lengths]),
    })  # fmt: skip


def listed(user_ids: list[str], lists: list) -> pd.DataFrame:
    """A table of recommendation lists: user_id, item_id, and rank (from 1)."""
    found = pd.DataFrame({"user_id": user_ids, "item_id": lists})
    return events(found, found["item_id"].map(len)).assign(rank=lambda rows: rows["place"] + 1)


def before(histories: pd.DataFrame, part: str) -> pd.Series:
    """The number of events before each user's target of a part, or of all events without a target."""
    return histories[f"{part}_position"].where(histories[f"{part}_position"] >= 0, histories["item_id"].map(len))


def validation_targets(histories: pd.DataFrame) -> pd.DataFrame:
    """user_id and item_id of the validation targets."""
    rows = histories[histories["validation_position"] >= 0]
    targets = [items[place] for items, place in zip(rows["item_id"], rows["validation_position"], strict=True)]
    return pd.DataFrame({"user_id": rows["user_id"], "item_id": targets})


def read_histories(file: str | Path) -> pd.DataFrame:
    """The histories, one row per user. The position of a missing target is -1."""
    histories = pq.read_table(file).select(
        ["user_id", "item_id", "train_end", "validation_position", "test_position"]
    ).to_pandas()  # fmt: skip
    for part in ("validation", "test"):
        histories[f"{part}_position"] = histories[f"{part}_position"].fillna(-1).astype(int)
    return histories


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of the installed packages."""
    installed = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed} | {"python": platform.python_version()}


def rectools_dataset(part: pd.DataFrame):
    """RecTools' Dataset from the table of `events`."""
    from rectools.dataset import Dataset

    times = pd.Timestamp(0) + pd.to_timedelta(part["place"], unit="s")
    return Dataset.construct(part[["user_id", "item_id"]].assign(weight=1, datetime=times))


def rectools(peer: str, histories: pd.DataFrame, folder: Path, seed: int, settings: dict) -> tuple[pd.DataFrame, dict]:
    import pytorch_lightning as lightning
    import torch
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, Timer
    from rectools import models
    from rectools.models.nn.transformers.utils import leave_one_out_mask

    class Recall(lightning.Callback):
        """recall@10 of the validation targets, computed as in RecTools' benchmark: seen items are ranked too."""

        def on_validation_epoch_start(self, trainer, module):
            self.hits = []

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            targets = batch["y"]
            logits = outputs.get("logits")
            if logits is None:  # a sampled loss has logits of a few items only
                sessions = module.torch_model.encode_sessions(batch, module.item_embs)
                logits = module.torch_model.similarity_module(sessions[:, -1], module.item_embs)
            best = logits.view(len(targets), -1).topk(10).indices
            self.hits.append((best == targets).any(dim=1).float())

        def on_validation_epoch_end(self, trainer, module):
            self.log("recall@10", torch.cat(self.hits).mean())
            print(f"epoch {trainer.current_epoch + 1}: recall@10 {torch.cat(self.hits).mean():.4f}", flush=True)

    settings = RECTOOLS | settings
    epochs, patience = settings.pop("epochs"), settings.pop("patience")
    precision, minutes = settings.pop("precision"), settings.pop("minutes", None)
    keeps_vectors = settings.pop("vectors", False)
    best = ModelCheckpoint(dirpath=folder / "checkpoint", monitor="recall@10", mode="max")
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling costs 10 to 20 % of the time

    def trainer() -> lightning.Trainer:
        return lightning.Trainer(
            max_epochs=epochs,
            min_epochs=1,
            deterministic=True,
            precision=precision,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            callbacks=[
                Recall(),
                best,
                EarlyStopping("recall@10", mode="max", patience=patience),
                Timer(duration=minutes and {"minutes": minutes}, interval="epoch"),
            ],
        )

    validated = histories["user_id"][histories["validation_position"] >= 0].to_numpy()
    lightning.seed_everything(seed)
    model_class = {"rectools-bert4rec": models.BERT4RecModel, "rectools-sasrec": models.SASRecModel}[peer]
    model = model_class(
        get_trainer_func=trainer,
        get_val_mask_func=lambda interactions: leave_one_out_mask(interactions, validated),
        **settings,
    )
    past = rectools_dataset(events(histories, before(histories, "test")))  # get_val_mask_func hides validation items
    model.fit(past)
    fitted = model.fit_trainer
    kept = next(callback for callback in fitted.callbacks if isinstance(callback, ModelCheckpoint))
    patient = next(callback for callback in fitted.callbacks if isinstance(callback, EarlyStopping))
    checkpoint = torch.load(kept.best_model_path, weights_only=False)
    model.lightning_model.load_state_dict(checkpoint["state_dict"])
    users = histories["user_id"][histories["test_position"] >= 0].to_numpy()
    lists = model.recommend(users=users, dataset=past, k=LIST_LENGTH, filter_viewed=True)
    if keeps_vectors:
        for part in ("validation", "test"):
            keep_rectools_vectors(model, histories, part, folder / f"vectors-{part}.npz")
    return lists, {
        "epochs": fitted.current_epoch,
        "best_epoch": checkpoint["epoch"] + 1,
        "limited": not patient.stopped_epoch and fitted.current_epoch < RECTOOLS["epochs"],
        "parameters": sum(parameter.numel() for parameter in model.torch_model.parameters()),
        "package": "rectools",
    }


def keep_rectools_vectors(model, histories: pd.DataFrame, part: str, path: Path) -> None:
    """Write the vectors of the users with a target and of the items, whose products are the scores of the model."""
    network, kept = model.lightning_model, {}
    of_vectors, of_users = network._get_user_item_embeddings, network._recommend_u2i

    def keep_vectors(*args, **kwargs):
        kept["user_vectors"], kept["item_vectors"] = found = of_vectors(*args, **kwargs)
        return found

    def keep_users(user_ids, *args, **kwargs):
        dataset = kwargs.get("dataset") or next(value for value in args if hasattr(value, "user_id_map"))
        found = of_users(user_ids, *args, **kwargs)
        # RecTools reads the vectors by the internal ids of users and items.
        kept["users"] = dataset.user_id_map.convert_to_external(np.arange(len(kept["user_vectors"])))
        kept["items"] = dataset.item_id_map.convert_to_external(np.arange(len(kept["item_vectors"])))
        return found

    network._get_user_item_embeddings, network._recommend_u2i = keep_vectors, keep_users
    users = histories["user_id"][histories[f"{part}_position"] >= 0].to_numpy()
    model.recommend(users, rectools_dataset(events(histories, before(histories, part))), k=10, filter_viewed=True)
    network._get_user_item_embeddings, network._recommend_u2i = of_vectors, of_users
    vectors = {name: kept.pop(name).float().numpy() for name in ("user_vectors", "item_vectors")}
    np.savez(path, **{name: np.asarray(values, str) for name, values in kept.items()}, **vectors)


def recbole_trainer(library: str, histories: pd.DataFrame, folder: Path, seed: int, settings: dict) -> tuple:
    """The trainer (with its model) of RecBole or hopwise; its three data loaders; dataset; log; and items by code."""
    # RecBole 1.2 reads these names at import, but NumPy 2 no longer has them.
    for name in ("bool", "float", "int", "object"):
        if name not in np.__dict__:
            setattr(np, name, getattr(builtins, name))
    config_class = importlib.import_module(f"{library}.config").Config
    data = importlib.import_module(f"{library}.data")
    utils = importlib.import_module(f"{library}.utils")

    log = events(histories, histories["item_id"].map(len))
    log["item_id"], items = pd.factorize(log["item_id"])
    (folder / "log").mkdir(parents=True, exist_ok=True)
    header = ["user_id:token", "item_id:token", "timestamp:float"]
    log["user_id"] = pd.factorize(log["user_id"])[0]  # row number of the history
    log.to_csv(folder / "log" / "log.inter", sep="\t", index=False, header=header)

    config = config_class(
        model="BERT4Rec",
        dataset="log",
        config_dict={
            "data_path": str(folder),
            "checkpoint_dir": str(folder / "checkpoint"),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "train_neg_sample_args": None,
            "use_gpu": False,
            "show_progress": False,
            "seed": seed,
        }
        | settings,
    )
    utils.init_seed(config["seed"], config["reproducibility"])
    utils.init_logger(config)
    dataset = data.create_dataset(config)
    loaders = data.data_preparation(config, dataset)
    utils.init_seed(config["seed"], config["reproducibility"])
    model = utils.get_model(config["model"])(config, loaders[0]._dataset)
    trainer = utils.get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    return trainer, loaders, dataset, log, items


def recbole(peer: str, histories: pd.DataFrame, folder: Path, seed: int, settings: dict) -> tuple[pd.DataFrame, dict]:
    library = peer.removesuffix("-bert4rec")
    trainer, loaders, dataset, log, items = recbole_trainer(library, histories, folder, seed, settings)
    import torch

    train, validation, test = loaders
    model = trainer.model
    trainer.fit(train, validation, saved=True, show_progress=False)
    # RecBole's own loading fails with a torch that by default loads weights only.
    checkpoint = torch.load(trainer.saved_model_file, weights_only=False)
    model.load_state_dict(checkpoint["state_dict"])
    model.eval()

    internal = dataset.token2id("item_id", np.arange(len(items)).astype(str))
    codes = np.full(internal.max() + 1, -1)
    codes[internal] = np.arange(len(items))
    past_lengths = histories["test_position"].to_numpy()
    coded = log.groupby("user_id")["item_id"].agg(list)
    user_ids, lists = [], []
    with torch.no_grad():
        for batch in test:
            interaction = batch[0]
            scores = model.full_sort_predict(interaction).view(len(interaction), -1)
            scores[:, 0] = -torch.inf  # padding
            numbers = dataset.id2token("user_id", interaction["user_id"].numpy()).astype(int)
            targets = codes[interaction["item_id"].numpy()]
            for number, target, row in zip(numbers, targets, scores, strict=True):
                user_id, past = histories["user_id"][number], coded[number][: past_lengths[number]]
                if target != coded[number][len(past)]:
                    raise ValueError(f"{library} has another test target for user {user_id}")
                row[internal[past]] = -torch.inf  # RecBole and hopwise do not filter seen items
                best = row.topk(min(LIST_LENGTH, int(row.isfinite().sum()))).indices.numpy()
                user_ids.append(user_id)
                lists.append(items[codes[best]])
    epochs = len(trainer.train_loss_dict)
    return listed(user_ids, lists), {
        "epochs": epochs,
        "best_epoch": checkpoint["epoch"] + 1,
        "limited": epochs == trainer.config["epochs"] < RECBOLE_EPOCHS,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "package": library,
    }


def implicit(peer: str, histories: pd.DataFrame, folder: Path, seed: int, settings: dict) -> tuple[pd.DataFrame, dict]:
    from implicit import nearest_neighbours
    from scipy.sparse import csr_matrix

    settings = IMPLICIT | settings  # validation chooses among them
    items = pd.Index(np.unique(np.concatenate(histories["item_id"].tolist())))

    def matrix(ends: pd.Series) -> csr_matrix:
        part = events(histories, ends)
        rows = pd.Index(histories["user_id"]).get_indexer(part["user_id"])
        columns = items.get_indexer(part["item_id"])
        return csr_matrix((np.ones(len(part)), (rows, columns)), shape=(len(histories), len(items)))

    def serve(model: nearest_neighbours.ItemItemRecommender, part: str, length: int) -> pd.DataFrame:
        past = matrix(before(histories, part))
        rows = np.flatnonzero(histories[f"{part}_position"] >= 0)
        found = []
        for row in rows:
            best, scores = model.recommend(row, past[row], N=length)
            found.append(best[scores > 0])  # when few items have a score, implicit fills the list with seen items
        return listed(histories["user_id"].to_numpy()[rows], [items[best] for best in found])

    targets = validation_targets(histories)
    train = matrix(histories["train_end"])
    best, model = -1.0, None
    for name in settings["models"]:
        for neighbours in settings["K"]:
            candidate = getattr(nearest_neighbours, name)(K=neighbours, num_threads=1)
            candidate.fit(train, show_progress=False)
            hits = serve(candidate, "validation", 10).merge(targets)
            found = float((1 / np.log2(hits["rank"] + 1)).sum() / len(targets))
            print(f"{name}, K={neighbours}: NDCG@10 {found:.4f}", flush=True)
            if found > best:
                best, model = found, candidate
    return serve(model, "test", LIST_LENGTH), {
        "chosen": f"{type(model).__name__}, K={model.K}",
        "validation": best,
        "package": "implicit",
    }


def main(peer: str, file: str, output: str, seed: str, settings: str) -> None:
    start = time.perf_counter()
    folder = Path(output)
    histories = read_histories(file)
    run = {"rectools": rectools, "recbole": recbole, "hopwise": recbole, "implicit": implicit}[peer.split("-")[0]]
    lists, record = run(peer, histories, folder, int(seed), json.loads(settings))
    lists[["user_id", "item_id", "rank"]].to_parquet(folder / "lists.parquet", index=False)
    used = resource.getrusage(resource.RUSAGE_SELF)
    record["versions"] = versions(record.pop("package"), "torch", "pytorch-lightning")
    record |= {"seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
    (folder / "peer.json").write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.argv[1:], arguments = [], sys.argv[1:]  # RecBole's Config reads the command line
    main(*arguments)
