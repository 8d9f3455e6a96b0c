"""Training and evaluation end to end, with the real Trainer."""

import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline, set_seed
from transformers.trainer_utils import HPSearchBackend

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
    compute_metrics,
    prepare,
    preprocess_logits_for_metrics,
    ranking_metrics,
    ranking_rows,
    read_prepared,
    training_rows,
)
from bert4rec_hf.cli import main
from bert4rec_hf.configuration_bert4rec import FIRST_ITEM_ID, UNK_TOKEN_ID
from bert4rec_hf.cooccurrence import cooccurrence_vectors, keep_transitions
from bert4rec_hf.defaults import default_architecture, default_batch_size, default_transition_weight
from bert4rec_hf.metrics import SAMPLED_METRICS, Protocol, popularity_ranks
from bert4rec_hf.runs import evaluate_prepared, train_prepared
from bert4rec_hf.splits import sampled_candidates
from bert4rec_hf.trainer import SimilarLengthSampler

# Without transitions, which know these logs before anything is learnt.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_transitions": 0}


def write_chain(path: Path, num_users: int, num_items: int, length: int, follow: float) -> dict[str, str]:
    """A log in which item i is followed by a fixed next item with probability `follow`, else by any item."""
    chance = random.Random(0)
    items = [f"item {number}" for number in range(num_items)]
    shuffled = chance.sample(items, num_items)
    best_next = dict(zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True))
    lines = ["user_id,item_id,timestamp"]
    for user in range(num_users):
        item = chance.choice(items)
        for time in range(length):
            lines.append(f"{user},{item},{time}")
            item = best_next[item] if chance.random() < follow else chance.choice(items)
    path.write_text("\n".join(lines) + "\n")
    return best_next


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("chain")
    best_next = write_chain(folder / "log.csv", num_users=301, num_items=25, length=20, follow=0.8)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data", best_next


@pytest.fixture(scope="module")
def movielens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("movielens") / "data"
    try:
        prepare("ml-100k", folder)
    except OSError as error:
        pytest.skip(f"MovieLens 100K cannot be fetched: {error}")
    return folder


def arguments(output_dir, **options) -> Bert4RecTrainingArguments:
    defaults = {"num_train_epochs": 2, "use_cpu": True, "warmup_steps": 10, "disable_tqdm": True}
    return Bert4RecTrainingArguments(str(output_dir), **(defaults | options))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Bert4RecForMaskedItemPrediction.from_pretrained(folder).state_dict()


def assert_equal_weights(first: Path, second: Path) -> None:
    first_weights, second_weights = weights(first), weights(second)
    assert first_weights.keys() == second_weights.keys()
    different = [name for name in first_weights if not torch.equal(first_weights[name], second_weights[name])]
    assert different == []


def test_the_best_next_item_of_a_markov_chain_is_learnt(chain, tmp_path):
    data, best_next = chain
    train_prepared(data, arguments(tmp_path / "model", num_train_epochs=60, mask_ratio=0.2))
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "model"), device="cpu")
    chance = random.Random(1)
    histories = [[*chance.choices(list(best_next), k=4), item] for item in best_next for _ in range(4)]
    answers = recommend(histories, top_k=1, batch_size=50)
    hits = [answer[0]["item_id"] == best_next[history[-1]] for history, answer in zip(histories, answers, strict=True)]
    assert sum(hits) / len(hits) > 0.9
    record = evaluate_prepared(tmp_path / "model", data, use_cpu=True)
    # The chain is followed in .8 of the steps and by chance in 1 of 25 of the others.
    assert record["metrics"]["HR@1"] > 0.7 > 0.2 > record["floors"]["popularity"]["HR@1"]
    stored = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert record in stored


def test_our_trainer_and_the_plain_one_report_equal_metrics_and_train_equal_weights(movielens, tmp_path):
    data = movielens
    histories, tokenizer, _ = read_prepared(data)
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": 10, "filter_seen_items": True, **SMALL}
    pieces = {
        "data_collator": DataCollatorForMaskedItemPrediction(tokenizer, max_length=10),
        "train_dataset": training_rows(histories),
        "eval_dataset": ranking_rows(histories, tokenizer, "validation", filter_seen_items=True, max_length=10),
        "processing_class": tokenizer,
    }
    options = {
        "num_train_epochs": 1, "label_names": ["labels", "exclude_ids"], "per_device_eval_batch_size": 64,
        "eval_strategy": "no", "load_best_model_at_end": False, "train_sampling_strategy": "random",
    }  # fmt: skip
    set_seed(1)
    ours = Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction(Bert4RecConfig(**config)), arguments(tmp_path / "ours", **options), **pieces
    )
    ours.train()
    set_seed(1)
    plain = Trainer(
        Bert4RecForMaskedItemPrediction(Bert4RecConfig(**config)),
        TrainingArguments(
            **{
                name: getattr(ours.args, name)
                for name in ("learning_rate", "warmup_steps", "per_device_train_batch_size", "use_cpu", "label_names")
            },
            output_dir=str(tmp_path / "plain"),
            num_train_epochs=1,
            per_device_eval_batch_size=64,
            disable_tqdm=True,
        ),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        **pieces,
    )
    plain.train()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    ours_metrics, plain_metrics = ours.evaluate(), plain.evaluate()
    names = [name for name in plain_metrics if "@" in name or name in ("eval_MRR", "eval_loss")]
    assert len(names) == 14
    assert {name: ours_metrics[name] for name in names} == pytest.approx({name: plain_metrics[name] for name in names})
    assert ours_metrics["eval_HR@10"] > 0


def test_training_stops_after_so_many_evaluations_without_a_better_one(chain, tmp_path):
    data, _ = chain
    options = {"num_train_epochs": 10, "learning_rate": 0.0, "eval_strategy": "epoch", "save_strategy": "epoch"}
    trainer = train_prepared(data, arguments(tmp_path / "model", early_stopping_patience=2, **options), **SMALL)
    assert trainer.state.epoch == 3


def test_the_trainer_alone_does_what_its_arguments_say_and_no_recipe_says_more(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False)
    given = arguments(
        tmp_path / "model", early_stopping_patience=1, num_train_epochs=6, learning_rate=0.0, eval_strategy="epoch",
        save_strategy="epoch", eval_steps=None, metric_for_best_model="eval_old_NDCG@10",
    )  # fmt: skip
    ranks = popularity_ranks(rows, histories, tokenizer.num_items)
    pieces = {"train_dataset": training_rows(histories), "processing_class": tokenizer}
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    protocol = Protocol.of(histories, {"split": {"name": "leave-one-out"}}, "validation", tokenizer.num_items, False)
    trainer = Bert4RecTrainer(
        None, given, None, pieces["train_dataset"], {"old": rows}, tokenizer, lambda: model,
        floors={"popularity": ranks}, protocol=protocol,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 2
    assert trainer.evaluation is None  # of several sets there is no one protocol
    assert trainer.floors == {"popularity": ranking_metrics(ranks)}
    recipe = yaml.safe_load((tmp_path / "model" / "checkpoint-10" / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 0.0
    assert not {"item_initialization", "train_windows", "window_step"} & recipe.keys()
    with pytest.raises(ValueError, match="expected a processing_class, the Bert4RecTokenizer"):
        Bert4RecTrainer(model, given, train_dataset=training_rows(histories))
    with pytest.raises(ValueError, match="expected a model or a model_init"):
        Bert4RecTrainer(args=given, **pieces)
    with pytest.raises(ValueError, match=r"the tokenizer has 28 token ids, the model 29: make it with"):
        Bert4RecTrainer(Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=29)), given, **pieces)
    with pytest.raises(ValueError, match="expected evaluation rows of ranking_rows, which have exclude_ids"):
        trainer.evaluate(rows.remove_columns("exclude_ids").select(range(2)))
    assert not Bert4RecTrainingArguments(str(tmp_path / "none"), eval_strategy="no").load_best_model_at_end
    with pytest.raises(ValueError, match="expected Bert4RecTrainingArguments or a data_collator"):
        Bert4RecTrainer(model, TrainingArguments(str(tmp_path / "plain"), use_cpu=True), **pieces)


def test_batches_are_of_similar_length_and_every_epoch_has_every_row_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(1, 200, 1003)
    sampler = SimilarLengthSampler(lengths, 32, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1003))
        batches = lengths[orders[-1][: 1003 // 32 * 32]].reshape(-1, 32)
        assert batches.sum() / (batches.max(axis=1).sum() * 32) > 0.8  # .51 in random order
    assert orders[0] == orders[2] != orders[1]
    assert list(SimilarLengthSampler(lengths, 32, seed=1)) != orders[0]


def test_evaluation_ranks_are_the_places_in_the_pipelines_answers_user_by_user(chain, tmp_path):
    data, _ = chain
    trainer = train_prepared(data, arguments(tmp_path / "model", num_train_epochs=1), filter_seen_items=True, **SMALL)
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)

    def shortened(row, number):
        ids, labels = (row[name][-2 - number % 7 :] for name in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels, "exclude_ids": ids[:-1]}

    rows = rows.map(shortened, with_indices=True)  # of other lengths, by which they are ranked
    prediction = trainer.predict(rows)
    ranks, _ = prediction.predictions
    assert prediction.label_ids.tolist() == [max(labels) for labels in rows["labels"]]
    trainer.args.prediction_loss_only = True
    assert trainer.predict(rows).predictions is None
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "model"), device="cpu", top_k=25)
    targets = [tokenizer.items[labels[-1] - 3] for labels in rows["labels"]]
    pasts = [tokenizer.token_ids_to_item_ids(ids[:-1]) for ids in rows["input_ids"]]
    answers = recommend(pasts, batch_size=64)
    assert len(ranks) == 301
    for rank, target, answer in zip(ranks, targets, answers, strict=True):
        shown = [entry["item_id"] for entry in answer]
        assert rank == (shown.index(target) + 1 if target in shown else 0)
    assert 0 < (ranks == 0).sum() < 301  # some targets are repeats, which are never shown


def test_numbers_of_other_weights_are_not_stored(chain, tmp_path):
    data, _ = chain
    options = {
        "max_steps": 20,
        "eval_steps": 10,
        "save_steps": 5,
        "load_best_model_at_end": False,
        "save_total_limit": 9,
    }
    trainer = train_prepared(data, arguments(tmp_path / "model", num_train_epochs=1, **options), **SMALL)
    stored = {path.parent.name for path in (tmp_path / "model").glob("*/evaluation.json")}
    assert stored == {"checkpoint-10", "checkpoint-20"}  # of those at 5, 10, 15 and 20
    (record,) = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert record == trainer.evaluation
    assert trainer.evaluate()["eval_NDCG@10"] == pytest.approx(record["metrics"]["NDCG@10"])
    trainer.args.eval_strategy, trainer.args.save_strategy = "no", "no"
    trainer.train()  # to the same step once more
    trainer.save_model(str(tmp_path / "trained on"))
    assert not (tmp_path / "trained on" / "evaluation.json").exists()


def test_metrics_among_sampled_items_say_so_in_their_names(chain, tmp_path, monkeypatch):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=50))
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False)
    trainer = Bert4RecTrainer(model, arguments(tmp_path), processing_class=tokenizer, eval_dataset=rows)
    full = trainer.evaluate()
    among_few = sampled_candidates(rows, histories, num_candidates=5)
    sampled = trainer.evaluate(among_few)
    assert "eval_NDCG@10" in full
    assert not any("sampled" in name for name in full)
    assert {name for name in sampled if "@" in name} == {
        f"eval_sampled_{name}" for name in SAMPLED_METRICS if "@" in name
    }
    assert sampled["eval_sampled_HR@10"] == 1  # of six
    assert sampled["eval_sampled_HR@1"] < 1
    for others in (list(among_few), IterableDataset.from_generator(lambda: iter(among_few))):
        found = trainer.evaluate(others)
        assert found.keys() == sampled.keys()
        assert found["eval_sampled_MRR"] == pytest.approx(sampled["eval_sampled_MRR"])
    monkeypatch.setattr(Bert4RecTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"several processes cannot tell .* evaluate on a datasets\.Dataset"):
        trainer.evaluate(others)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"metric_for_best_model must be one of sampled_HR@1, .*; got 'NDCG@10'"):
        Bert4RecTrainer(model, arguments(tmp_path), processing_class=tokenizer, eval_dataset=among_few)


def test_rows_that_a_transform_makes_are_trained_and_evaluated(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=50))
    trained, ranked = (
        training_rows(histories),
        ranking_rows(histories, tokenizer, "validation", filter_seen_items=False),
    )

    def made(rows):
        of_numbers = Dataset.from_dict({"number": range(len(rows))})
        of_numbers.set_transform(lambda batch: {name: rows[batch["number"]][name] for name in rows.column_names})
        return of_numbers

    options = {"max_steps": 2, "remove_unused_columns": False, "train_sampling_strategy": "random"}
    trainer = Bert4RecTrainer(
        model, arguments(tmp_path, **options), None, made(trained), made(ranked), processing_class=tokenizer
    )
    trainer.train()
    assert trainer.evaluate()["eval_MRR"] == pytest.approx(trainer.evaluate(ranked)["eval_MRR"])


def test_the_loss_is_the_mean_over_targets_that_the_catalogue_has_whatever_the_batches(chain, tmp_path):
    data, _ = chain
    rows = [f"{user},item {item},{item}" for user in range(40) for item in range(5)]
    rows += [f"{user},{'new' if user % 3 else 'item 7'},99" for user in range(40)]
    rows += [f"{user},new,{time}" for user in range(40, 44) for time in (1, 99)]  # the shortest histories come first
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    prepare(tmp_path / "log.csv", tmp_path / "data", split="temporal", validation_cut=4, test_cut=50)
    train_prepared(data, arguments(tmp_path / "model", max_steps=1), **SMALL)
    losses = [
        evaluate_prepared(tmp_path / "model", tmp_path / "data", use_cpu=True, per_device_eval_batch_size=size)
        for size in (1, 2, 256)
    ]
    assert losses[0]["protocol"]["share_unknown_targets"] == pytest.approx(30 / 44)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "model").eval()
    histories, tokenizer, _ = read_prepared(tmp_path / "data", Bert4RecTokenizer.from_pretrained(tmp_path / "model"))
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=model.config.filter_seen_items)
    known = rows.filter(lambda row: row["labels"][-1] != -100).select_columns(["input_ids", "labels"])
    expected = model(**DataCollatorForMaskedItemPrediction(tokenizer)(list(known))).loss.item()
    for record in losses:
        assert record["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_arguments_are_left_as_they_were_and_half_precision_evaluation_is_refused(chain, tmp_path):
    data, _ = chain
    given = arguments(tmp_path / "model", max_steps=1)
    assert train_prepared(data, given, **SMALL).args.mask_ratio == 0.4
    assert (given.mask_ratio, given.learning_rate, given.per_device_train_batch_size) == (None, None, None)
    assert given.ddp_broadcast_buffers is False  # 100 MB a step, where items keep vectors
    with pytest.raises(ValueError, match="leave out --bf16_full_eval and --fp16_full_eval; --bf16 true has half"):
        arguments(tmp_path / "model", bf16_full_eval=True)


def test_a_checkpoint_is_a_full_model_folder(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "model"), **SMALL)
    checkpoint = next((tmp_path / "model").glob("checkpoint-*"))
    assert pipeline("sequential-recommendation", model=str(checkpoint), device="cpu")(["item 3"], top_k=2)
    for name in ("README.md", "recipe.yaml", "evaluation.json", "preparation.json", "items.json"):
        assert (checkpoint / name).is_file()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "NDCG@10" in card
    assert "leave-one-out, validation; all 25 items ranked" in card


def test_a_run_resumed_at_the_end_of_an_epoch_ends_with_the_unbroken_runs_weights(chain, tmp_path):
    data, _ = chain
    options = {
        "num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "no", "load_best_model_at_end": False,
        "save_total_limit": None,
    }  # fmt: skip
    train_prepared(data, arguments(tmp_path / "whole", **options), **SMALL)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == 3
    shutil.copytree(checkpoints[0], tmp_path / "resumed" / checkpoints[0].name)
    train_prepared(data, arguments(tmp_path / "resumed", resume_from_checkpoint="last", **options), **SMALL)
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")


def test_the_last_checkpoint_is_the_newest_that_was_finished(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "run", num_train_epochs=1), **SMALL)
    for step in (7, 99):  # of which the saving was interrupted
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        shutil.copy(tmp_path / "run" / "config.json", tmp_path / "run" / f"checkpoint-{step}")
    options = {"num_train_epochs": 2, "resume_from_checkpoint": "last"}
    trainer = train_prepared(data, arguments(tmp_path / "run", **options), **SMALL)
    assert trainer.state.global_step == 20
    assert f"going on from {tmp_path / 'run' / 'checkpoint-10'}" in caplog.text


class RowsSeen(TrainerCallback):
    """Collates like the collator and notes which rows came."""

    def __init__(self, collator):
        self.collator, self.rows = collator, []

    def __call__(self, features):
        self.rows += [tuple(feature["input_ids"]) for feature in features]
        return self.collator(features)


def test_the_best_by_loss_is_the_lowest(chain, tmp_path):
    # At this rate the loss rises again.
    options = {"metric_for_best_model": "loss", "num_train_epochs": 6, "learning_rate": 0.1, "save_total_limit": None}
    trainer = train_prepared(chain[0], arguments(tmp_path / "model", **options), **SMALL)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == min(losses) < max(losses)
    assert yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())["metric_for_best_model"] == "loss"


def test_the_recipe_has_what_was_trained_in_and_can_be_read_again(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as an Accelerate configuration sets it
    options = {"max_steps": 1, "include_num_input_tokens_seen": True}
    train_prepared(chain[0], arguments(tmp_path / "model", **options), **SMALL)
    recipe = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    assert recipe["bf16"] is True
    assert recipe["include_num_input_tokens_seen"] is True
    again = ["--config", str(tmp_path / "model" / "recipe.yaml"), "--data", str(chain[0])]
    assert main(["train", *again, "--output_dir", str(tmp_path / "again")]) == 0


def test_a_run_is_resumed_only_as_what_it_was(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "run", num_train_epochs=1), **SMALL)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "log.csv").write_text((data.parent / "log.csv").read_text().replace("item 7", "item seven"))
    prepare(tmp_path / "log.csv", tmp_path / "other data")

    def resume(data, message, **options):
        given = {"num_train_epochs": 2, "resume_from_checkpoint": "last"}
        fields = {name: options.pop(name) for name in ("hidden_size", "item_loss") if name in options}
        with pytest.raises(ValueError, match=message):
            train_prepared(data, arguments(tmp_path / "run", **(given | options)), **(SMALL | fields))

    resume(data, "has hidden_size=32, not 16; num_attention_heads=1, not 2: a run that is resumed", hidden_size=16)
    resume(data, "has item_loss=softmax, not bpr", item_loss="bpr")
    resume(data, r"has learning_rate=0\.\d+, not 1e-05: a run that is resumed keeps its optimizer", learning_rate=1e-5)
    resume(data, r"has weight_decay=0\.0, not 0\.1: .*give the checkpoint as --model_name_or_path", weight_decay=0.1)
    resume(tmp_path / "other data", "was trained on a log with another catalogue: resume with the --data")
    lines = (data.parent / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(line for line in lines if not line.startswith("300,")) + "\n")
    prepare(tmp_path / "log.csv", tmp_path / "fewer users")
    resume(tmp_path / "fewer users", "was trained on a log with other statistics: resume with the --data")
    prepare(data.parent / "log.csv", tmp_path / "other split", validation=False)
    resume(tmp_path / "other split", "was trained on a log with other split and other statistics")
    resume(data, r"is at epoch 1, step 10, at or beyond the end .*max_steps=10.*ask for more", max_steps=10)
    resume(
        data, r"is at epoch 1, step 10, at or beyond the end .*num_train_epochs=0.5.*ask for more", num_train_epochs=0.5
    )
    resume(data, "is no checkpoint to resume from", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    model_only = tmp_path / "checkpoint-10"
    shutil.copytree(tmp_path / "run" / "checkpoint-10", model_only, ignore=shutil.ignore_patterns("optimizer*"))
    resume(data, "has the model only .*give it as --model_name_or_path", resume_from_checkpoint=str(model_only))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_copied_run_goes_on_from_its_own_best_checkpoint(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "first", num_train_epochs=1), **SMALL)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    for state in (tmp_path / "copy").glob("checkpoint-*/trainer_state.json"):  # none that comes is better
        state.write_text(json.dumps(json.loads(state.read_text()) | {"best_metric": 1.0}))
    options = {"num_train_epochs": 2, "resume_from_checkpoint": "last"}
    trainer = train_prepared(data, arguments(tmp_path / "copy", **options), **SMALL)
    assert Path(trainer.state.best_model_checkpoint).parent == tmp_path / "copy"
    assert Path(trainer.state.best_model_checkpoint).is_dir()


def test_a_run_resumed_in_mid_epoch_neither_loses_nor_repeats_rows_and_the_next_epoch_has_another_order(
    chain, tmp_path
):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 6 and not resumed

    seen = []
    for resumed in (False, True):
        collator = RowsSeen(DataCollatorForMaskedItemPrediction(tokenizer))
        set_seed(3)
        trainer = Bert4RecTrainer(
            Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL)),
            arguments(tmp_path, num_train_epochs=2, eval_strategy="no", save_steps=3, load_best_model_at_end=False),
            data_collator=collator,
            train_dataset=training_rows(histories),
            processing_class=tokenizer,
            callbacks=[Stop()],
        )
        trainer.train(resume_from_checkpoint=True if resumed else None)
        seen.append(collator.rows)
    # The loader reads one batch ahead, which the stopped run has not trained on.
    rows = seen[0][: 6 * 32] + seen[1]
    everything = sorted(map(tuple, training_rows(histories)["input_ids"]))
    first, second = rows[: len(everything)], rows[len(everything) :]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_weight_decay_is_not_of_the_item_table(chain, tmp_path):
    histories, tokenizer, _ = read_prepared(chain[0])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    no_item = model.decoder.weight[UNK_TOKEN_ID].clone()  # nothing reads it, so that decay alone could change it
    options = {"weight_decay": 0.5, "max_steps": 2, "warmup_steps": 0, "eval_strategy": "no", "save_strategy": "no"}
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path / "model", load_best_model_at_end=False, **options),
        train_dataset=training_rows(histories),
        processing_class=tokenizer,
    )
    trainer.train()
    assert no_item.any()
    assert torch.equal(model.decoder.weight[UNK_TOKEN_ID], no_item)
    assert "model.layers.0.attention.query.weight" in trainer.get_decay_parameter_names(model)


def test_one_seed_gives_one_model_and_another_seed_another(chain, tmp_path):
    data, _ = chain
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train_prepared(data, arguments(tmp_path / name, num_train_epochs=1, seed=seed), **SMALL)
    assert_equal_weights(tmp_path / "first", tmp_path / "again")
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "first", tmp_path / "other")


def test_a_new_model_starts_from_co_occurrences_unless_it_is_told(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    tables = {}
    for name in ("cooccurrence", "random"):
        options = {"max_steps": 1, "learning_rate": 0.0, "seed": 7, "item_initialization": name}
        trainer = train_prepared(data, arguments(tmp_path / name, **options), **SMALL)
        tables[name] = trainer.model.get_input_embeddings().weight.detach()
        assert trainer.recipe()["item_initialization"] == name
    vectors = cooccurrence_vectors(histories, tokenizer.num_items, SMALL["hidden_size"], seed=7)
    assert torch.equal(tables["cooccurrence"][FIRST_ITEM_ID:], vectors)
    assert torch.equal(tables["cooccurrence"][:FIRST_ITEM_ID], tables["random"][:FIRST_ITEM_ID])
    assert not torch.equal(tables["random"][FIRST_ITEM_ID:], vectors)


def test_a_model_keeps_transitions_of_its_log_and_one_that_goes_on_those_of_its_new_one(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    first = train_prepared(data, arguments(tmp_path / "first", max_steps=1), **sizes).model
    assert first.config.num_transitions == 64
    weight = default_transition_weight(int(histories.is_training().sum()), tokenizer.num_items)
    expected = Bert4RecForMaskedItemPrediction(first.config)
    keep_transitions(expected, histories, tokenizer.num_items, weight=weight)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "first")
    loaded.decoder.next_scores.zero_()
    loaded.save_pretrained(tmp_path / "first")
    on = train_prepared(data, arguments(tmp_path / "on", max_steps=1), model_name_or_path=tmp_path / "first").model
    for model in (first, on):
        assert torch.equal(model.decoder.next_ids, expected.decoder.next_ids)
        assert torch.equal(model.decoder.next_scores, expected.decoder.next_scores)
    assert expected.decoder.next_scores.any()
    assert train_prepared(data, arguments(tmp_path / "none", max_steps=1), **SMALL).model.decoder.next_ids is None


def test_the_rarer_items_are_the_more_their_transitions_count():
    weights = [default_transition_weight(num_events, 1000) for num_events in (0, 5_000, 20_000, 40_000, 300_000)]
    assert weights == [1.5, 1.5, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(("rare_below", "wide_from"), [(0, 10**6), (10**6, 10**6), (0, 1)])
def test_a_new_model_starts_with_the_mean_of_a_history_where_the_log_is_small_and_no_item_rare(
    chain, tmp_path, monkeypatch, rare_below, wide_from
):
    monkeypatch.setattr("bert4rec_hf.defaults.RARE_BELOW", rare_below)
    monkeypatch.setattr("bert4rec_hf.defaults.WIDE_FROM", wide_from)
    options = {"max_steps": 1, "learning_rate": 0.0}
    trainer = train_prepared(chain[0], arguments(tmp_path / "model", **options), **SMALL)
    attention = trainer.model.model.layers[0].attention
    assert torch.equal(attention.output.weight, attention.value.weight.T) == (rare_below < wide_from == 10**6)


def test_a_model_to_serve_trains_on_all_events_by_the_recipe_of_the_one_that_was_evaluated(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "evaluated"), **SMALL)
    prepare(data.parent / "log.csv", tmp_path / "all", split="none")
    recipe = ["--config", str(tmp_path / "evaluated" / "recipe.yaml"), "--data", str(tmp_path / "all")]
    assert main(["train", *recipe, "--output_dir", str(tmp_path / "served")]) == 0
    assert "no validation targets: nothing is evaluated, the last step is the model" in caplog.text
    names = {path.name for path in (tmp_path / "served").iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "evaluated").iterdir() if path.is_file()} - {
        "evaluation.json", "training.json", "learning_curve.png",
    }  # fmt: skip
    assert_equal_weights(tmp_path / "served", next((tmp_path / "served").glob("checkpoint-*")))
    assert yaml.safe_load((tmp_path / "served" / "recipe.yaml").read_text())["num_train_epochs"] == 2
    card = (tmp_path / "served" / "README.md").read_text()
    assert "Trained on 6,020 events of 301 users in `log.csv`. Nothing was held out" in card
    assert "--split none" in card
    assert "bert4rec evaluate" not in card
    assert pipeline("sequential-recommendation", model=str(tmp_path / "served"), device="cpu")(["item 3"], top_k=2)
    assert "nothing stops early" not in caplog.text
    train_prepared(tmp_path / "all", arguments(tmp_path / "other", early_stopping_patience=2), **SMALL)
    assert "nothing stops early: all 2 epochs" in caplog.text


def test_fields_that_are_none_are_told_and_callbacks_called(chain, tmp_path):
    data, _ = chain
    with pytest.raises(TypeError, match=r"got hiden_size, mask_ratio, no fields of Bert4RecConfig; how to train is"):
        train_prepared(data, arguments(tmp_path / "model"), hiden_size=32, mask_ratio=0.5)
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            steps.append(state.global_step)

    train_prepared(data, arguments(tmp_path / "model", max_steps=2), callbacks=[Counts()], **SMALL)
    assert steps == [1, 2]
    options = {"max_steps": 3, "resume_from_checkpoint": True}
    train_prepared(data, arguments(tmp_path / "model", **options), callbacks=[Counts()], **SMALL)
    assert steps == [1, 2, 3]


def test_a_search_over_hyperparameters_masks_by_those_of_the_trial(chain, tmp_path):
    tokenizer = Bert4RecTokenizer.from_pretrained(chain[0])
    config = Bert4RecConfig(vocab_size=len(tokenizer), **SMALL)
    trainer = Bert4RecTrainer(
        None,
        arguments(tmp_path / "model"),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": [[3, 4, 5]]}),
        eval_dataset=Dataset.from_dict({"input_ids": [[3, 4, 5]]}),
        model_init=lambda: Bert4RecForMaskedItemPrediction(config),
    )
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: {"mask_ratio": 0.9}
    trainer._hp_search_setup(SimpleNamespace(params={}))
    assert trainer.data_collator.mask_ratio == 0.9
    assert trainer.args.learning_rate is None
    config.hidden_size = 256
    trainer.call_model_init()
    assert trainer.args.learning_rate == 1e-3
    trainer.hp_space = lambda trial: {"learning_rate": 0.5}
    trainer._hp_search_setup(SimpleNamespace(params={}))
    trainer.call_model_init()
    assert trainer.args.learning_rate == 0.5


def test_a_model_of_all_events_is_no_model_to_evaluate_on_some_of_them(chain, tmp_path, caplog):
    data, _ = chain
    prepare(data.parent / "log.csv", tmp_path / "all", split="none")
    train_prepared(tmp_path / "all", arguments(tmp_path / "served", max_steps=1), **SMALL)
    (tmp_path / "next.csv").write_text((data.parent / "log.csv").read_text())
    prepare(tmp_path / "next.csv", tmp_path / "next")
    prepare(tmp_path / "next.csv", tmp_path / "next all", split="none")
    told = "served was trained on all events of log.csv: those that next.csv has too are no test of it"
    train_prepared(tmp_path / "next all", arguments(tmp_path / "on", max_steps=1), tmp_path / "served")
    assert told not in caplog.text
    for test in (
        lambda: evaluate_prepared(tmp_path / "served", tmp_path / "next", use_cpu=True),
        lambda: train_prepared(tmp_path / "next", arguments(tmp_path / "onward", max_steps=1), tmp_path / "served"),
    ):
        caplog.clear()
        test()
        assert told in caplog.text


def test_a_model_may_go_on_week_by_week_where_a_cut_keeps_its_training_before_the_targets(chain, tmp_path, caplog):
    data, _ = chain
    log = data.parent / "log.csv"
    prepare(log, tmp_path / "first week", split="temporal", validation_cut=10, test_cut=12)
    shutil.copy(log, tmp_path / "renamed.csv")
    prepare(tmp_path / "renamed.csv", tmp_path / "second week", split="temporal", validation_cut=14, test_cut=16)
    train_prepared(tmp_path / "first week", arguments(tmp_path / "first", max_steps=1), **SMALL)
    train_prepared(tmp_path / "second week", arguments(tmp_path / "second", max_steps=1), tmp_path / "first")
    evaluate_prepared(tmp_path / "first", tmp_path / "second week", use_cpu=True)
    assert "another preparation" not in caplog.text
    evaluate_prepared(tmp_path / "second", tmp_path / "first week", use_cpu=True)  # of which it has trained on targets
    assert "second was trained on another preparation, of renamed.csv (split {" in caplog.text


def test_a_model_that_goes_on_is_told_apart_from_where_it_began(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "model", num_train_epochs=8), **SMALL)
    prepare(data.parent / "log.csv", tmp_path / "data", filter_seen_items=True, max_length=7)
    worse = {"learning_rate": 5.0, "warmup_steps": 0, "max_steps": 6, "eval_steps": 3, "save_steps": 3}
    trainer = train_prepared(tmp_path / "data", arguments(tmp_path / "on", **worse), tmp_path / "model")
    evaluations = json.loads((tmp_path / "on" / "training.json").read_text())["evaluations"]
    assert evaluations[0]["step"] == 0
    assert evaluations[0]["NDCG@10"] > max(found["NDCG@10"] for found in evaluations[1:])
    assert "no better than at its start: validation NDCG@10 was 0." in caplog.text
    assert "was prepared with filter_seen_items True, the model goes on with its own, False" in caplog.text
    assert "was prepared for length 7, the model goes on with its own, 50" in caplog.text
    assert trainer.model.config.filter_seen_items is False
    caplog.clear()
    trainer = train_prepared(
        tmp_path / "data", arguments(tmp_path / "filtered", max_steps=1), tmp_path / "model", filter_seen_items=True
    )
    assert trainer.model.config.filter_seen_items is True
    assert "filter_seen_items" not in caplog.text


def test_metrics_of_ones_own_see_the_rows_in_their_order_and_need_no_others(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, preparation = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False, max_length=50)
    order = np.random.default_rng(0).permutation(len(rows))
    rows = rows.select(order).map(
        lambda row, place: {name: row[name][place % 9 :] for name in ("input_ids", "labels")}, with_indices=True
    )
    targets = [max(labels) for labels in rows["labels"]]
    seen = []

    def measure(prediction):
        seen.append(prediction.label_ids.tolist())
        return {"NDCG@10": 0.5, "diversity": float(np.unique(prediction.predictions[1]).size)}

    config = Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=50, **SMALL)
    protocol = Protocol.of(histories, preparation, "test", tokenizer.num_items, False)
    trainer = Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction(config), arguments(tmp_path / "run", max_steps=2, eval_steps=1, save_steps=1),
        train_dataset=training_rows(histories), eval_dataset=rows, processing_class=tokenizer, protocol=protocol,
        compute_metrics=measure,
    )  # fmt: skip
    trainer.train()
    predicted = trainer.predict(rows)
    assert seen
    assert all(found == targets for found in seen)
    assert predicted.label_ids.tolist() == targets
    assert predicted.metrics["test_diversity"] > 1


def test_where_no_checkpoint_is_kept_the_last_step_is_the_model(chain, tmp_path):
    data, _ = chain
    trainer = train_prepared(data, arguments(tmp_path / "run", max_steps=20, save_strategy="no"), **SMALL)
    assert trainer.evaluated_step == 20 == json.loads((tmp_path / "run" / "training.json").read_text())["chosen_step"]
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_data_that_the_model_does_not_fit_is_told(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "model", max_steps=1), **SMALL)
    prepare(data.parent / "log.csv", tmp_path / "temporal", split="temporal")
    evaluate_prepared(tmp_path / "model", data, use_cpu=True)
    assert "another preparation" not in caplog.text
    evaluate_prepared(tmp_path / "model", tmp_path / "temporal", use_cpu=True)
    assert "model was trained on another preparation, of log.csv (split {'name': 'leave-one-out'" in caplog.text
    (tmp_path / "log.csv").write_text((data.parent / "log.csv").read_text().replace("item ", ""))
    prepare(tmp_path / "log.csv", tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"model knows none of the items of .*like 'item 0', .*those of the data like '0'"
    ):
        evaluate_prepared(tmp_path / "model", tmp_path / "other", use_cpu=True)
    train_prepared(tmp_path / "other", arguments(tmp_path / "new", max_steps=1), tmp_path / "model")
    assert "knows none of the items of" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"report_to": ["tensorboard", "clearml"]}, "report_to names clearml, which is not installed"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0"),
        ({"window_step": 0.0}, "window_step must be above 0"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last would leave users out of every evaluation"),
        ({"train_windows": "newst"}, "train_windows must be one of newest, random, proportional, sliding; got 'newst'"),
        ({"output_dir": None}, "say --output_dir FOLDER"),
        ({"prediction_loss_only": True}, "leave out --prediction_loss_only"),
        ({"batch_eval_metrics": True}, "leave out --prediction_loss_only, --batch_eval_metrics"),
        ({"eval_do_concat_batches": False}, "the metrics are those of all ranks together"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Bert4RecTrainingArguments(**({"output_dir": "model"} | option))


def test_of_several_gpus_without_a_launcher_one_is_used(chain, tmp_path, caplog):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    given = arguments(tmp_path, per_device_train_batch_size=8, eval_strategy="no", save_strategy="no")
    given._n_gpu = 4
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    trainer = Bert4RecTrainer(model, given, train_dataset=training_rows(histories), processing_class=tokenizer)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 8)
    assert "one of 4 GPUs is used; accelerate launch" in caplog.text


def test_a_trainer_with_a_collator_of_its_own_evaluates_without_a_tokenizer(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=True)
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    collator = DataCollatorForMaskedItemPrediction(tokenizer)
    found = [
        Bert4RecTrainer(model, arguments(tmp_path), collator, eval_dataset=rows, **given).evaluate()
        for given in ({}, {"processing_class": tokenizer})
    ]
    assert found[0]["eval_coverage@10"] == found[1]["eval_coverage@10"] > 0


def test_personal_popularity_is_of_whole_histories_and_not_of_what_the_model_reads(tmp_path):
    events = [(user, item) for user in range(20) for item in [*"xxxab", f"other-{user % 9}", *"abx"]]
    log = ["user_id,item_id,timestamp", *(f"{user},{item},{time}" for time, (user, item) in enumerate(events))]
    (tmp_path / "log.csv").write_text("\n".join(log) + "\n")
    prepare(tmp_path / "log.csv", tmp_path / "data", max_length=4)
    train_prepared(tmp_path / "data", arguments(tmp_path / "model", num_train_epochs=1), **SMALL)
    # Of the three items that the model reads, none is the x that its user has had most often.
    floors = evaluate_prepared(tmp_path / "model", tmp_path / "data", use_cpu=True)["floors"]
    assert floors["personal popularity"]["HR@1"] == 1.0
    # Before the validation target, b, it has had x and a more often.
    floors = json.loads((tmp_path / "model" / "training.json").read_text())["floors"]
    assert (floors["personal popularity"]["NDCG@1"], floors["personal popularity"]["NDCG@5"]) == (0.0, 0.5)


def test_without_validation_targets_these_train_and_the_numbers_say_so(chain, tmp_path):
    data, _ = chain
    preparation = prepare(data.parent / "log.csv", tmp_path / "data", validation=False)
    assert preparation["statistics"]["num_training_events"] == 301 * 19
    given = arguments(tmp_path / "model")
    train_prepared(tmp_path / "data", given, **SMALL)
    assert given.load_best_model_at_end
    protocol = evaluate_prepared(tmp_path / "model", tmp_path / "data", use_cpu=True)["protocol"]
    assert protocol["split"] == "leave-one-out (no validation targets, which train)"
    assert protocol["num_users"] == 301


def test_warm_start_keeps_token_ids_and_appends_new_items(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "old", num_train_epochs=1), **SMALL)
    lines = ["user_id,item_id,timestamp"]
    lines += [
        f"{user},{item},{time}" for user in range(9) for time, item in enumerate(("AAA", "item 3", "item 4", "zz"))
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    prepare(tmp_path / "log.csv", tmp_path / "new data")
    train_prepared(tmp_path / "new data", arguments(tmp_path / "new", num_train_epochs=1), tmp_path / "old")
    old = Bert4RecTokenizer.from_pretrained(tmp_path / "old")
    new = Bert4RecTokenizer.from_pretrained(tmp_path / "new")
    assert new.items == [*old.items, "AAA", "zz"]
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "new")
    assert model.config.vocab_size == len(new) == model.decoder.bias.shape[0]
    # A folder is no part of a recipe, by which another model is trained; what the Hub has is.
    assert "model_name_or_path" not in yaml.safe_load((tmp_path / "new" / "recipe.yaml").read_text())
    model.config._name_or_path = "somebody/chain"
    rows = read_prepared(data, new)[0]
    trainer = Bert4RecTrainer(
        model, arguments(tmp_path / "hub"), eval_dataset=training_rows(rows), processing_class=new
    )
    trainer.save_model()
    assert trainer.recipe()["model_name_or_path"] == "somebody/chain"
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "base_model: somebody/chain" in card
    before = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "old")
    # An item that the new log lacks has moved only a little.
    old_row = before.decoder.weight[old.item_ids_to_token_ids(["item 7"])[0]]
    new_row = model.decoder.weight[new.item_ids_to_token_ids(["item 7"])[0]]
    assert torch.nn.functional.cosine_similarity(old_row, new_row, dim=0) > 0.9


def test_the_example_with_the_plain_trainer_runs_and_its_model_recommends(chain, tmp_path):
    data, _ = chain
    example = Path(__file__).parent.parent / "examples" / "plain_trainer.py"
    command = [sys.executable, str(example), str(data), str(tmp_path / "model")]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "eval_NDCG@10" in outcome.stdout, outcome.stderr[-2000:]
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "model"), device="cpu")
    assert len(recommend(["item 3", "item 4"], top_k=5)) == 5


@pytest.mark.processes
def test_the_example_with_a_loop_of_its_own_runs_on_two_processes(chain, tmp_path):
    data, _ = chain
    example = Path(__file__).parent.parent / "examples" / "accelerate_loop.py"
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         str(example), str(data), str(tmp_path / "model")],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("epoch")]
    assert len(lines) == 5, outcome.stderr[-3000:]
    printed = float(lines[-1].split()[4])
    assert lines[-1].endswith("of 301 users")
    assert evaluate_prepared(tmp_path / "model", data, "validation", use_cpu=True)["metrics"][
        "NDCG@10"
    ] == pytest.approx(printed, abs=5e-5)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_evaluate_like_one_and_save_one_model(chain, tmp_path, launcher):
    data = chain[0]
    command = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"],
    }[launcher]

    def launch(*words) -> str:
        # Such runs may abort at interpreter exit after the work is done: what they wrote is what counts.
        outcome = subprocess.run(
            [sys.executable, "-m", *command, str(free_port()), "-m", "bert4rec_hf", *map(str, words)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return outcome.stdout

    model, log = tmp_path / "model", data.parent / "log.csv"
    printed = launch("train", "--data", log, "--output_dir", model, "--num_train_epochs", "1", "--hidden_size", "32")
    assert [line.split(";")[0] for line in printed.splitlines() if "wrote" in line] == [
        f"wrote {model}-data", f"wrote {model}",
    ]  # fmt: skip
    data = f"{model}-data"
    assert len(list(model.glob("model*.safetensors"))) == 1
    launch("evaluate", model, "--data", data, "--per_device_eval_batch_size", "64")
    records = json.loads((model / "evaluation.json").read_text())
    two = next(record for record in records if record["protocol"]["part"] == "test")
    one = evaluate_prepared(model, data, use_cpu=True)
    # 301 users do not divide by two: a user counted twice would show.
    assert two["protocol"]["num_users"] == 301
    metrics = {name: value for name, value in one["metrics"].items() if name != "loss"}
    assert {name: two["metrics"][name] for name in metrics} == metrics


def test_a_new_models_width_and_dropout_follow_from_the_log_and_the_rest_from_them():
    small = default_architecture(90_000, 1_000, {})
    assert small == {
        "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 160, "gated_feed_forward": True,
        "hidden_act": "silu", "hidden_dropout_prob": 0.1, "num_transitions": 64, "repeat_weight": 1.0,
    }  # fmt: skip
    large = default_architecture(600_000, 20_000, {})
    assert (large["hidden_size"], large["num_attention_heads"], large["intermediate_size"]) == (128, 4, 320)
    assert large["hidden_dropout_prob"] == 0.1
    rare = default_architecture(599_999, 20_000, {})
    assert (rare["hidden_size"], rare["num_attention_heads"], rare["intermediate_size"]) == (256, 8, 672)
    assert (rare["hidden_dropout_prob"], rare["num_transitions"]) == (0.5, 64)
    many = default_architecture(499_999, 100_001, {})
    assert (many["hidden_size"], many["hidden_dropout_prob"], many["num_transitions"]) == (64, 0.5, 0)
    assert default_architecture(90_000, 1_000, {"filter_seen_items": True})["repeat_weight"] == 0
    plain = default_architecture(
        500_000, 20_000, {"hidden_size": 48, "gated_feed_forward": False, "hidden_act": "relu"}
    )
    assert plain == {
        "hidden_size": 48, "intermediate_size": 192, "gated_feed_forward": False, "hidden_act": "relu",
        "hidden_dropout_prob": 0.5, "num_transitions": 64, "repeat_weight": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("hidden_size", "given", "expected"), [(64, None, 2e-3), (256, None, 1e-3), (256, 0.1, 0.1)])
def test_wide_models_learn_more_slowly_unless_it_is_told(tmp_path, hidden_size, given, expected):
    tokenizer = Bert4RecTokenizer.from_items(range(30), model_max_length=100)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=8)
    model = Bert4RecForMaskedItemPrediction(config)
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4})
    options = {"learning_rate": given, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path / "model", **options, num_train_epochs=2, warmup_steps=0),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.recipe()["learning_rate"] == expected
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) == expected


def test_large_logs_are_trained_in_larger_batches_shared_by_the_processes():
    sizes = [default_batch_size(rows) for rows in (0, 943, 16_000, 16_001, 40_000, 10**9)]
    assert sizes == [32, 32, 32, 64, 128, 1024]


@pytest.mark.parametrize(
    ("rows", "given", "expected"),
    [
        ([[3, 4, 5]] * 3 + [[3] * 60], None, 0.4),
        ([[3, 4, 5]] * 3 + [[3] * 90], None, 0.2),
        ([[3, 4, 5]] * 15 + [[3] * 300], None, 0.4),  # of which the model gets 200
        ([[3, 4, 5]], 0.3, 0.3),
        ([], None, 0.2),
    ],
)
def test_short_histories_have_more_masks_unless_it_is_told(tmp_path, rows, given, expected):
    tokenizer = Bert4RecTokenizer.from_items(range(30), model_max_length=100)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path / "model", mask_ratio=given),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
    )
    assert trainer.data_collator.mask_ratio == trainer.args.mask_ratio == trainer.recipe()["mask_ratio"] == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_that_was_freed_is_not_faulted_in_again():
    code = """
import ctypes, resource, torch
from bert4rec_hf.trainer import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: how many huge pages there are is chance

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory()
# The first few may not fit into what was freed before.
print(given_back >= 1000, [faults() for _ in range(5)][-1] < given_back / 4)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC", "THP"))}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.split() == ["True", "True"]
