"""The contract of Transformers' Trainer, and of hyperparameter searches, with model, arguments and trainer."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from chain_runs import SMALL, arguments, write_chain
from transformers import Trainer, TrainingArguments

import bert4rec_hf.training.trainer as trainer_module
from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
    compute_metrics,
    prepare,
    ranking_rows,
    read_prepared,
    target_ranks,
    train_prepared,
    training_rows,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder / "log.csv", num_users=101, num_items=15, length=10, follow=0.9)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data"


def trainer_inputs(data: Path) -> dict:
    histories, tokenizer, _ = read_prepared(data)
    return {
        "data_collator": DataCollatorForMaskedItemPrediction(tokenizer),
        "train_dataset": training_rows(histories),
        "eval_dataset": ranking_rows(histories, tokenizer, "validation", filter_seen_items=False, max_length=50),
        "processing_class": tokenizer,
    }


def make_model(data: Path, **options) -> Bert4RecForMaskedItemPrediction:
    torch.manual_seed(0)
    _, tokenizer, _ = read_prepared(data)
    return Bert4RecForMaskedItemPrediction(
        Bert4RecConfig(**({"vocab_size": len(tokenizer), "max_position_embeddings": 50} | SMALL | options))
    )


def test_metrics_written_for_run_mlm_work_in_a_plain_trainer(data, tmp_path):
    """The accuracy of the argmax of the logits where labels are not -100, as in the example script run_mlm.py."""

    def preprocess_logits(logits, labels):
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)

    def accuracy(prediction):
        predictions, labels = prediction.predictions.reshape(-1), prediction.label_ids.reshape(-1)
        return {"accuracy": float((predictions == labels)[labels != -100].mean())}

    args = TrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=40, learning_rate=5e-3, disable_tqdm=True)
    trainer = Trainer(
        make_model(data),
        args,
        **trainer_inputs(data),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=preprocess_logits,
    )
    assert trainer.label_names == ["labels"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.4  # chance gives 1/15
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.label_ids.shape == (101, 1)


def test_a_plain_trainer_takes_our_arguments(data, tmp_path):
    args = Bert4RecTrainingArguments(
        str(tmp_path), max_steps=3, eval_steps=3, save_steps=3, use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="random",
    )  # fmt: skip
    assert (args.train_batch_size, args.learning_rate) == (32, 2e-3)
    trainer = Trainer(
        make_model(data), args, **trainer_inputs(data), compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=target_ranks,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None


def test_arguments_of_one_run_are_chosen_anew_for_another(data, tmp_path):
    args = Bert4RecTrainingArguments(str(tmp_path), use_cpu=True)
    wide = Bert4RecTrainer(make_model(data, hidden_size=256), args, **trainer_inputs(data))
    narrow = Bert4RecTrainer(make_model(data), args, **trainer_inputs(data))
    assert (wide.args.learning_rate, narrow.args.learning_rate, args.learning_rate) == (1e-3, 2e-3, 2e-3)
    args.learning_rate = 0.5
    assert Bert4RecTrainer(make_model(data), args, **trainer_inputs(data)).args.learning_rate == 0.5
    given = Bert4RecTrainingArguments(str(tmp_path), use_cpu=True, learning_rate=2e-3)
    assert Bert4RecTrainer(make_model(data, hidden_size=256), given, **trainer_inputs(data)).args.learning_rate == 2e-3


def test_a_trainer_without_evaluation_rows_trains_and_keeps_its_last_step(data, tmp_path, caplog):
    parts = trainer_inputs(data)
    del parts["eval_dataset"]
    trainer = Bert4RecTrainer(make_model(data), arguments(tmp_path / "model", max_steps=4), **parts)
    assert "there is no eval_dataset: nothing is evaluated, and the model is that of the last step" in caplog.text
    trainer.train()
    trainer.save_model()
    assert trainer.state.global_step == 4
    assert not (tmp_path / "model" / "evaluation.json").exists()
    with pytest.raises(ValueError, match="early_stopping_patience needs evaluations"):
        Bert4RecTrainer(make_model(data), arguments(tmp_path, early_stopping_patience=1), **parts)


def test_rows_of_a_last_short_batch_are_dropped_from_training_and_from_no_evaluation(data, tmp_path):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 64, "num_train_epochs": 3}
    trainer = Bert4RecTrainer(make_model(data), arguments(tmp_path, **options), **trainer_inputs(data))
    trainer.train()
    assert trainer.state.global_step == 3  # 101 rows have one full batch per epoch
    assert len(trainer.get_eval_dataloader()) == 2  # one of 64 rows and one of the rest
    assert len(trainer.predict(trainer.eval_dataset).label_ids) == 101
    assert trainer.args.dataloader_drop_last


@pytest.mark.parametrize("made_by", ["Bert4RecTrainer", "train_prepared"])
def test_optuna_searches_with_each_trainer(data, tmp_path, made_by):
    pytest.importorskip("optuna")
    given = arguments(
        tmp_path / "model", max_steps=6, eval_strategy="steps", eval_steps=6, save_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    if made_by == "train_prepared":
        trainer = train_prepared(data, given, **SMALL)
    else:
        parts = trainer_inputs(data)
        del parts["data_collator"]
        trainer = Bert4RecTrainer(None, given, **parts, model_init=lambda: make_model(data))
    seen = []

    class Sees(trainer_module.DataCollatorForMaskedItemPrediction):
        def __post_init__(self):
            seen.append(self.mask_ratio)
            super().__post_init__()

    trainer_module.DataCollatorForMaskedItemPrediction, before = Sees, DataCollatorForMaskedItemPrediction
    rates = []
    try:
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {"mask_ratio": trial.suggest_categorical("mask_ratio", [0.3, 0.6])},
            compute_objective=lambda metrics: rates.append(trainer.args.learning_rate) or metrics["eval_NDCG@10"],
            n_trials=2,
            direction="maximize",
            backend="optuna",
        )
    finally:
        trainer_module.DataCollatorForMaskedItemPrediction = before
    assert best.objective > 0
    assert set(seen) <= {0.3, 0.6}
    assert len(seen) >= 2
    # The learning rate is not searched, so it is derived for each model.
    assert rates == [2e-3] * 2
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        compute_objective=lambda metrics: rates.append(trainer.args.learning_rate) or metrics["eval_NDCG@10"],
        n_trials=2, direction="maximize", backend="optuna",
    )  # fmt: skip
    assert all(1e-4 <= rate <= 1e-3 for rate in rates[2:])
    assert best.hyperparameters["learning_rate"] in rates[2:]


def test_no_token_is_written_and_the_arguments_stay_as_they_were(data, tmp_path):
    given = arguments(tmp_path / "model", max_steps=2, hub_token="hf_secret", eval_steps=2, save_steps=2)
    trainer = Bert4RecTrainer(make_model(data), given, **trainer_inputs(data))
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.name == "training_args.bin"} == {"model", "checkpoint-2"}
    assert not any(b"hf_secret" in path.read_bytes() for path in files)


# The private methods of Transformers that our classes override. A public replacement should be used as soon as there is
# one. If Transformers renames a method, this test fails before users notice that ours is no longer called.
PRIVATE_HOOKS = {
    Bert4RecTrainer: {
        "_get_output_dir", "_get_train_sampler", "_load_from_checkpoint", "_load_optimizer_and_scheduler",
        "_save_checkpoint",
    },
    Bert4RecForMaskedItemPrediction: {"_init_weights", "_load_pretrained_model"},
    Bert4RecTokenizer: {"_encode_plus", "_decode", "_save_pretrained"},
}  # fmt: skip


@pytest.mark.parametrize("ours", PRIVATE_HOOKS)
def test_private_hooks_are_few_and_still_those_of_transformers(ours):
    def methods(kind) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if re.match("_[a-z]", name)}

    own = [kind for kind in ours.__mro__ if kind.__module__.startswith("bert4rec_hf")]
    bases = [kind for kind in ours.__mro__ if kind.__module__.startswith("transformers")]
    overridden = {name for kind in own for name in methods(kind) if name in vars(kind)} & set.union(
        *map(methods, bases)
    )
    assert overridden == PRIVATE_HOOKS[ours]


def test_transformers_calls_the_private_hook_for_its_sampler(data, tmp_path, monkeypatch):
    trainer = Bert4RecTrainer(make_model(data), arguments(tmp_path), **trainer_inputs(data))
    calls = []
    monkeypatch.setattr(
        Bert4RecTrainer, "_get_train_sampler", lambda self, *args: calls.append(args) or np.arange(101).tolist()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert calls
    assert len(batch["input_ids"]) == 32
