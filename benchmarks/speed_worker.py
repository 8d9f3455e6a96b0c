"""Runs one system in its own environment: times training steps and ranking, or records its validation curve.

    python speed_worker.py SYSTEM PREPARED_FOLDER OPTIONS

OPTIONS is JSON. With `steps`, the script measures time and memory. Without `steps`, it trains until the system stops or
its time limit is over. The script works in the current folder and writes speed.json there. It imports only the packages
that the system needs.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peer_worker import (
    RECTOOLS,
    before,
    events,
    read_histories,
    recbole_trainer,
    rectools_dataset,
    validation_targets,
    versions,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

LAYERS, HEADS, TOP_K, RANKING_BATCH_SIZE = 2, 2, 10, 64


class StopTrainingError(Exception):
    """Ends a training loop that cannot be stopped in another way."""


class Clock:
    """Records when each optimizer step ends, in the training loop of any library. The warm-up steps are not timed."""

    def __init__(self, warmup: int, steps: int):
        self.warmup, self.steps, self.times, self.peak_gib = warmup, steps, [], 0.0
        register_optimizer_step_post_hook(self.tick)

    @property
    def total(self) -> int:
        return self.warmup + self.steps

    def tick(self, *_) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > self.total:
            raise StopTrainingError
        # ru_maxrss is not used, since it is inherited from the parent process.
        self.peak_gib = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

    def seconds_a_step(self) -> float:
        return (self.times[self.total - 1] - self.times[self.warmup - 1]) / self.steps


def pasts(histories: pd.DataFrame, part: str = "test") -> list[list[str]]:
    """The items before the target of a part, for each user who has such a target."""
    rows = histories[histories[f"{part}_position"] >= 0]
    return [list(items[:end]) for items, end in zip(rows["item_id"], rows[f"{part}_position"], strict=True)]


def ndcg(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """The mean NDCG@10 of one target per row. A tie counts against the target."""
    ranks = (scores >= scores.gather(1, targets.view(-1, 1))).sum(dim=1)
    return float((1 / torch.log2(ranks + 1.0)).where(ranks <= TOP_K, 0).mean())


# Each of these functions trains under the clock. It returns the number of rows per epoch, and a function that
# recommends to all test users and returns their number.


def ours(data: Path, histories: pd.DataFrame, clock: Clock, shape: dict) -> tuple[int, Callable[[], int]]:
    from transformers import pipeline

    from bert4rec_hf import Bert4RecTrainingArguments, train_prepared
    from bert4rec_hf.data.histories import read_prepared
    from bert4rec_hf.data.rows import training_rows

    windows, rows_of = ("newest", "whole") if shape["newest"] else ("proportional", "proportional")
    rows = len(training_rows(read_prepared(data)[0], max_length=shape["length"], windows=rows_of))
    # Batches differ in length, so at least a whole epoch is timed.
    clock.steps = max(clock.steps, -(-rows // shape["batch"]))
    arguments = Bert4RecTrainingArguments(
        "model",
        per_device_train_batch_size=shape["batch"],
        train_windows=windows,
        bf16=shape["bf16"],
        max_steps=clock.total,
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    train_prepared(
        data,
        arguments,
        max_position_embeddings=shape["length"],
        hidden_size=shape["hidden_size"],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    recommend = pipeline("sequential-recommendation", model="model")

    def rank() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=shape["bf16"]):  # as in evaluation with the option bf16
            return len(recommend(pasts(histories), top_k=TOP_K, batch_size=RANKING_BATCH_SIZE))

    return rows, rank


def bert_by_hand(histories: pd.DataFrame, shape: dict, **options) -> tuple:
    """`transformers.BertForMaskedLM` in a program written by hand: logits of all items at all positions of the batch.

    Returns:
        The Trainer; the items; and a function from histories to the scores (histories, items) of the next item and, for
        each history, the columns of the items that it contains.
    """
    from torch.nn.utils.rnn import pad_sequence
    from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

    pad, mask, first_item = 0, 1, 2
    items = pd.Index(np.unique(np.concatenate(histories["item_id"].tolist())))

    def token_ids(history: list[str], length: int) -> torch.Tensor:
        return torch.from_numpy(items.get_indexer(history[-length:])) + first_item

    def batch_of(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        return {"input_ids": input_ids, "attention_mask": (input_ids != pad).long()}

    def masked(features: list[dict]) -> dict[str, torch.Tensor]:
        batch = batch_of([feature["input_ids"] for feature in features])
        is_masked = (torch.rand(batch["input_ids"].shape) < 0.2) & (batch["input_ids"] != pad)
        labels = batch["input_ids"].where(is_masked, -100)
        return batch | {"input_ids": batch["input_ids"].masked_fill(is_masked, mask), "labels": labels}

    config = BertConfig(
        vocab_size=len(items) + first_item,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * shape["hidden_size"],
        max_position_embeddings=shape["length"],
        pad_token_id=pad,
    )
    model = BertForMaskedLM(config)
    trained = zip(histories["item_id"], histories["train_end"], strict=True)
    rows = [{"input_ids": token_ids(history[:end], shape["length"])} for history, end in trained if end > 0]
    arguments = TrainingArguments(
        "model",
        per_device_train_batch_size=shape["batch"],
        learning_rate=1e-3,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )

    @torch.no_grad()
    def score(past: list[list[str]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.eval()
        known = [token_ids(history, len(history)) for history in past]
        batch = batch_of([torch.cat([row[1 - shape["length"] :], torch.tensor([mask])]) for row in known])
        last = batch["attention_mask"].sum(dim=1) - 1
        scores = model(**batch).logits[torch.arange(len(past)), last, first_item:]
        return scores, [row - first_item for row in known]

    return Trainer(model, arguments, data_collator=masked, train_dataset=rows), items, score


def bert(data: Path, histories: pd.DataFrame, clock: Clock, shape: dict) -> tuple[int, Callable[[], int]]:
    trainer, items, score = bert_by_hand(histories, shape, max_steps=clock.total)
    trainer.train()

    def rank() -> int:
        lists = []
        for past in DataLoader(pasts(histories), RANKING_BATCH_SIZE, collate_fn=list):
            scores, known = score(past)
            for row, seen in zip(scores, known, strict=True):
                row[seen] = -torch.inf
            lists += [items[best] for best in scores.topk(TOP_K).indices.numpy()]
        return len(lists)

    return len(trainer.train_dataset), rank


def rectools(data: Path, histories: pd.DataFrame, clock: Clock, shape: dict) -> tuple[int, Callable[[], int]]:
    """RecTools with its defaults, which its own benchmark sets too, except for the shape and the number of steps."""
    from pytorch_lightning import Trainer
    from rectools.models import BERT4RecModel

    model = BERT4RecModel(
        session_max_len=shape["length"],
        n_factors=shape["hidden_size"],
        n_blocks=LAYERS,
        n_heads=HEADS,
        batch_size=shape["batch"],
        recommend_batch_size=RANKING_BATCH_SIZE,
        get_trainer_func=lambda: Trainer(
            max_epochs=-1,
            max_steps=clock.total,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ),
    )
    model.fit(rectools_dataset(events(histories, histories["train_end"])))
    past = rectools_dataset(events(histories, before(histories, "test")))
    users = histories["user_id"][histories["test_position"] >= 0].to_numpy()

    def rank() -> int:
        return model.recommend(users=users, dataset=past, k=TOP_K, filter_viewed=True)["user_id"].nunique()

    return len(model.data_preparator.get_dataloader_train().dataset), rank


def replay_by_defaults(histories: pd.DataFrame, **shape) -> tuple:
    """RePlay's model with its defaults, except for the shape and the loss (softmax, logits at masked positions only).

    Returns:
        The model; its training rows; the items; a function that converts histories to RePlay's sequences; and a
        function that creates a Lightning trainer.
    """
    import lightning
    from replay.data import FeatureHint, FeatureType
    from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorSchema
    from replay.models.nn.sequential import Bert4Rec
    from replay.models.nn.sequential.bert4rec import Bert4RecTrainingDataset

    items = pd.Index(np.unique(np.concatenate(histories["item_id"].tolist())))
    item = TensorFeatureInfo(
        "item_id",
        FeatureType.CATEGORICAL,
        is_seq=True,
        feature_hint=FeatureHint.ITEM_ID,
        cardinality=len(items),
        embedding_dim=shape["hidden_size"],
    )
    schema = TensorSchema(item)

    def sequences(lists: list) -> PandasSequentialDataset:
        codes = [items.get_indexer(history) for history in lists if len(history)]
        table = pd.DataFrame({"user_id": np.arange(len(codes)), "item_id": codes})
        return PandasSequentialDataset(schema, "user_id", "item_id", table)

    def trainer(**options) -> lightning.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        return lightning.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **options)

    trained = zip(histories["item_id"], histories["train_end"], strict=True)
    rows = Bert4RecTrainingDataset(sequences([history[:end] for history, end in trained]), shape["max_seq_len"])
    return Bert4Rec(schema, loss_type="CE_restricted", **shape), rows, items, sequences, trainer


def replay(data: Path, histories: pd.DataFrame, clock: Clock, shape: dict) -> tuple[int, Callable[[], int]]:
    from replay.models.nn.sequential.bert4rec import Bert4RecPredictionDataset
    from replay.models.nn.sequential.callbacks import PandasPredictionCallback
    from replay.models.nn.sequential.postprocessors import RemoveSeenItems

    model, rows, _, sequences, trainer = replay_by_defaults(
        histories,
        block_count=LAYERS,
        head_count=HEADS,
        hidden_size=shape["hidden_size"],
        max_seq_len=shape["length"],
    )
    trainer(max_epochs=-1, max_steps=clock.total).fit(model, DataLoader(rows, shape["batch"], shuffle=True))
    past = sequences(pasts(histories))

    def rank() -> int:
        lists = PandasPredictionCallback(TOP_K, "user_id", "item_id", postprocessors=[RemoveSeenItems(past)])
        loader = DataLoader(Bert4RecPredictionDataset(past, shape["length"]), RANKING_BATCH_SIZE)
        trainer(callbacks=[lists]).predict(model, loader, return_predictions=False)
        return lists.get_result()["user_id"].nunique()

    return len(rows), rank


def hopwise(data: Path, histories: pd.DataFrame, clock: Clock, shape: dict) -> tuple[int, Callable[[], int]]:
    """hopwise with its defaults, except for the shape and the batch sizes."""
    settings = {
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "hidden_size": shape["hidden_size"],
        "inner_size": 4 * shape["hidden_size"],
        "MAX_ITEM_LIST_LENGTH": shape["length"],
        "train_batch_size": shape["batch"],
        "eval_batch_size": RANKING_BATCH_SIZE,
    }
    trainer, (train, _, test), *_ = recbole_trainer("hopwise", histories, Path.cwd(), 42, settings)
    with contextlib.suppress(StopTrainingError):
        while True:
            trainer._train_epoch(train, 0)

    @torch.no_grad()
    def rank() -> int:
        trainer.model.eval()
        lists = []
        for interaction, *_ in test:
            if len(lists) >= (histories["test_position"] >= 0).sum():  # when only some users are ranked
                break
            scores = trainer.model.full_sort_predict(interaction).view(len(interaction), -1)
            # hopwise does not filter seen items. Those in the model's window, and padding (item 0), are filtered here.
            lists += scores.scatter(1, interaction["item_id_list"], -torch.inf).topk(TOP_K).indices.tolist()
        return len(lists)

    return len(train.dataset), rank


class Stopwatch:
    """Counts wall and CPU seconds while it runs, and records the validation NDCG@10 at points of this time."""

    def __init__(self):
        self.wall = self.cpu = 0.0
        self.curve = []

    def start(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall += time.perf_counter() - self.started[0]
        self.cpu += time.process_time() - self.started[1]

    def note(self, epoch: float, value: float) -> None:
        self.curve.append({"epoch": epoch, "seconds": self.wall, "cpu_seconds": self.cpu, "NDCG@10": value})
        print(self.curve[-1], flush=True)


# Each of these functions trains while its stopwatch runs, evaluates while it is stopped, and returns the curve. All
# items are ranked, including seen ones.


def quality_of_ours(data: Path, histories: pd.DataFrame, options: dict) -> list[dict]:
    from quality import train
    from transformers import TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    watch = Stopwatch()

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            # Evaluation and saving follow a step; the methods below restart the watch without their time.
            watch.stop()
            watch.start()

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            # The evaluation of the best model after training is no point of the curve.
            if not watch.curve or state.epoch > watch.curve[-1]["epoch"]:
                watch.note(state.epoch, metrics["eval_NDCG@10"])
            watch.start()

        def on_save(self, args, state, control, **kwargs):
            watch.start()

    DEFAULT_CALLBACKS.append(Watching)
    watch.start()  # the time includes reading the folder and computing the initial item vectors
    train(data, Path("model"), options["recipe"] | {"filter_seen_items": False}, 42)
    return watch.curve


def quality_of_hopwise(data: Path, histories: pd.DataFrame, options: dict) -> list[dict]:
    deadline = time.monotonic() + 60 * options["peer_minutes"]
    trainer, (train, validation, _), *_ = recbole_trainer("hopwise", histories, Path.cwd(), 42, options["settings"])
    watch = Stopwatch()
    train_epoch = trainer._train_epoch

    def watched(*args, **kwargs):
        watch.start()
        loss = train_epoch(*args, **kwargs)
        watch.stop()
        return loss

    def note(epoch: int, score: float) -> None:
        watch.note(epoch + 1, float(score))
        if time.monotonic() > deadline:
            raise StopTrainingError

    trainer._train_epoch = watched
    with contextlib.suppress(StopTrainingError):  # hopwise may also stop early by itself
        trainer.fit(train, validation, saved=False, show_progress=False, callback_fn=note)
    return watch.curve


def quality_of_rectools(data: Path, histories: pd.DataFrame, options: dict) -> list[dict]:
    """RecTools with its defaults, validated as in its own benchmark."""
    from pytorch_lightning import Callback, Trainer, seed_everything
    from rectools.models import BERT4RecModel
    from rectools.models.nn.transformers.utils import leave_one_out_mask

    deadline = time.monotonic() + 60 * options["peer_minutes"]
    watch = Stopwatch()

    class Watching(Callback):
        def on_train_epoch_start(self, trainer, module):
            watch.start()

        def on_validation_epoch_start(self, trainer, module):
            watch.stop()
            self.scores, self.targets = [], []

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            targets = batch["y"].view(-1, 1)
            self.targets.append(targets)
            self.scores.append(outputs["logits"].view(len(targets), -1))

        def on_validation_epoch_end(self, trainer, module):
            watch.note(trainer.current_epoch + 1, ndcg(torch.cat(self.scores), torch.cat(self.targets)))
            trainer.should_stop = time.monotonic() > deadline

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=RECTOOLS["epochs"],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            callbacks=[Watching()],
        )

    validated = histories["user_id"][histories["validation_position"] >= 0].to_numpy()
    seed_everything(42)
    model = BERT4RecModel(
        get_trainer_func=trainer,
        get_val_mask_func=lambda interactions: leave_one_out_mask(interactions, validated),
    )
    model.fit(rectools_dataset(events(histories, before(histories, "test"))))
    return watch.curve


def quality_of_bert(data: Path, histories: pd.DataFrame, options: dict) -> list[dict]:
    """BertForMaskedLM in the shape of our recipe, in batches of 32, with a learning rate that falls over its epochs."""
    from transformers import TrainerCallback

    deadline = time.monotonic() + 60 * options["peer_minutes"]
    watch = Stopwatch()
    shape = {"hidden_size": 64, "length": options["length"], "batch": 32}
    trainer, items, score = bert_by_hand(histories, shape, num_train_epochs=options["epochs"], seed=42)
    past = pasts(histories, "validation")
    targets = torch.from_numpy(items.get_indexer(validation_targets(histories)["item_id"]))

    class Watching(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            watch.start()

        def on_epoch_end(self, args, state, control, **kwargs):
            watch.stop()
            scores = torch.cat([score(part)[0] for part in DataLoader(past, RANKING_BATCH_SIZE, collate_fn=list)])
            watch.note(state.epoch, ndcg(scores, targets))
            control.should_training_stop = time.monotonic() > deadline

    trainer.add_callback(Watching())
    trainer.train()
    return watch.curve


def quality_of_replay(data: Path, histories: pd.DataFrame, options: dict) -> list[dict]:
    """RePlay with its defaults, hidden size 256 and length 100, in batches of 32, until the deadline."""
    from lightning import Callback, seed_everything
    from replay.models.nn.sequential.bert4rec import Bert4RecPredictionDataset

    deadline = time.monotonic() + 60 * options["peer_minutes"]
    watch = Stopwatch()
    seed_everything(42)
    length = 100
    model, rows, items, sequences, trainer = replay_by_defaults(histories, hidden_size=256, max_seq_len=length)
    past = DataLoader(Bert4RecPredictionDataset(sequences(pasts(histories, "validation")), length), RANKING_BATCH_SIZE)
    targets = torch.from_numpy(items.get_indexer(validation_targets(histories)["item_id"]))

    class Watching(Callback):
        def on_train_epoch_start(self, trainer, module):
            watch.start()

        def on_train_epoch_end(self, trainer, module):
            watch.stop()
            module.eval()
            with torch.no_grad():
                scores = torch.cat([module.predict_step(batch, 0) for batch in past])
            module.train()
            watch.note(trainer.current_epoch + 1, ndcg(scores, targets))
            trainer.should_stop = time.monotonic() > deadline

    trainer(max_epochs=-1, callbacks=[Watching()]).fit(model, DataLoader(rows, 32, shuffle=True))
    return watch.curve


SPEED = {"ours": ours, "bert": bert, "rectools": rectools, "replay": replay, "hopwise": hopwise}
QUALITY = {
    "ours": quality_of_ours,
    "bert": quality_of_bert,
    "rectools": quality_of_rectools,
    "replay": quality_of_replay,
    "hopwise": quality_of_hopwise,
}


def main(system: str, folder: str, options: str) -> None:
    data, options = Path(folder), json.loads(options)
    histories = read_histories(data / "histories.parquet")
    package = {"ours": "bert4rec_hf", "bert": "transformers", "replay": "replay-rec"}.get(system, system)
    record = {"versions": versions(package, "torch")}
    if "steps" in options:
        if options["users"]:
            histories.loc[np.flatnonzero(histories["test_position"] >= 0)[options["users"] :], "test_position"] = -1
        clock = Clock(options["warmup"], options["steps"])
        rows, rank = SPEED[system](data, histories, clock, options)
        start = time.perf_counter()
        users = rank()
        record |= {
            "rows": rows,
            "steps": clock.steps,
            "seconds_a_step": clock.seconds_a_step(),
            "peak": clock.peak_gib,
            "seconds_a_user": (time.perf_counter() - start) / users,
            "users": users,
        }
    else:
        start = time.monotonic()
        record["curve"] = QUALITY[system](data, histories, options)
        record["stopped"] = time.monotonic() - start > 60 * options["peer_minutes"]
    Path("speed.json").write_text(json.dumps(record))


if __name__ == "__main__":
    sys.argv[1:], given = [], sys.argv[1:]  # RecBole's Config reads the command line
    main(*given)
