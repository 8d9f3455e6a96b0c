"""Features of the Trainer that users expect, with our trainer and with the plain one."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from chain_runs import write_chain
from small_models import HostWaitsForDeviceError, NoSynchronization
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
    compute_metrics,
    prepare,
    ranking_rows,
    read_prepared,
    target_ranks,
    training_rows,
)

TRAINERS = ["ours", "plain"]
# For runs that are evaluated only when they have ended.
AT_THE_END = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder / "log.csv", num_users=200, num_items=20, length=16, follow=0.9)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data"


def make_trainer(which: str, data: Path, folder: Path, callbacks=None, **options):
    histories, tokenizer, _ = read_prepared(data)
    set_seed(0)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), max_position_embeddings=20))
    trainer_inputs = {
        "data_collator": DataCollatorForMaskedItemPrediction(tokenizer, max_length=20),
        "train_dataset": training_rows(histories),
        "eval_dataset": ranking_rows(histories, tokenizer, "validation", filter_seen_items=False, max_length=20),
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    options = {
        "num_train_epochs": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 32, "use_cpu": True,
        "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "disable_tqdm": True,
        "warmup_steps": 0.1, "lr_scheduler_type": "linear",
        "load_best_model_at_end": True, "metric_for_best_model": "NDCG@10", "greater_is_better": True,
    } | options  # fmt: skip
    if which == "ours":
        return Bert4RecTrainer(model, Bert4RecTrainingArguments(str(folder), **options), **trainer_inputs)
    return Trainer(
        model,
        TrainingArguments(str(folder), **options),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=target_ranks,
        **trainer_inputs,
    )


def evaluations(trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_NDCG@10" in entry]


@pytest.mark.parametrize("which", TRAINERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16},
    ],
    ids=["default", "label_smoothing", "gradient_checkpointing", "workers", "bf16", "accumulation"],
)
def test_a_run_learns_as_well_with(data, tmp_path, which, options):
    trainer = make_trainer(which, data, tmp_path, **options, **AT_THE_END)
    if which == "plain" and "label_smoothing_factor" in options:
        with pytest.raises(ValueError, match="with label_smoothing_factor use Bert4RecTrainer"):
            trainer.train()
        return
    trainer.train()
    metrics = trainer.evaluate()
    # In .9 of the steps, the next item is the successor. Popularity hits .05 of the targets.
    assert metrics["eval_HR@1"] > 0.6
    assert torch.isfinite(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile is tested on Linux only")
@pytest.mark.parametrize("which", TRAINERS)
def test_a_compiled_model_learns_as_well(data, tmp_path, which):
    trainer = make_trainer(which, data, tmp_path, torch_compile=True, **AT_THE_END)
    trainer.train()
    assert trainer.evaluate()["eval_HR@1"] > 0.6


class NoSynchronizationInSteps(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.guard = NoSynchronization()
        self.guard.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.guard.__exit__(None, None, None)


def test_a_step_of_the_trainer_never_waits_for_the_device(data, tmp_path):
    make_trainer("ours", data, tmp_path, callbacks=[NoSynchronizationInSteps()], num_train_epochs=1).train()
    callback = NoSynchronizationInSteps()
    trainer = make_trainer("plain", data, tmp_path, callbacks=[callback], num_train_epochs=1)
    with pytest.raises(HostWaitsForDeviceError):  # its check for losses that are not finite waits
        trainer.train()
    callback.on_step_end(None, None, None)


def test_batches_in_pinned_memory_are_copied_without_waiting(tmp_path, monkeypatch):
    assert not Bert4RecTrainingArguments(str(tmp_path)).accelerator_config.non_blocking
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    chosen = {"accelerator_config": {"non_blocking": False}}
    for options, expected in (({}, True), ({"dataloader_pin_memory": False}, False), (chosen, False)):
        arguments = Bert4RecTrainingArguments(str(tmp_path), **options)
        assert arguments.accelerator_config.non_blocking == expected


class SpoilTheLastEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if state.epoch == args.num_train_epochs:
            torch.nn.init.zeros_(model.get_input_embeddings().weight)


@pytest.mark.parametrize("which", TRAINERS)
def test_the_best_checkpoint_by_ndcg_is_what_remains(data, tmp_path, which):
    trainer = make_trainer(which, data, tmp_path, callbacks=[SpoilTheLastEpoch()], num_train_epochs=4)
    trainer.train()
    scores = [entry["eval_NDCG@10"] for entry in evaluations(trainer)]
    assert max(scores) > scores[-1]
    assert trainer.evaluate()["eval_NDCG@10"] == pytest.approx(max(scores))


@pytest.mark.parametrize("which", TRAINERS)
def test_early_stopping_ends_a_run_that_no_longer_improves(data, tmp_path, which):
    callback = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make_trainer(which, data, tmp_path, callbacks=[callback], num_train_epochs=30, learning_rate=0.0)
    trainer.train()
    assert len(evaluations(trainer)) == 3


@pytest.mark.parametrize("which", TRAINERS)
def test_tensorboard_gets_every_loss_and_metric_of_the_log(data, tmp_path, monkeypatch, which):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    options = {"num_train_epochs": 2, "logging_steps": 3, "report_to": "tensorboard"}
    trainer = make_trainer(which, data, tmp_path / "model", **options)
    trainer.train()
    arrived = EventAccumulator(str(tmp_path / "events")).Reload()
    for tag, name in (("train/loss", "loss"), ("eval/NDCG@10", "eval_NDCG@10"), ("eval/loss", "eval_loss")):
        logged = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        assert len(logged) >= 2
        assert [(event.step, event.value) for event in arrived.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in logged
        ]


def test_label_smoothing_is_over_items_alone(data, tmp_path):
    trainer = make_trainer("ours", data, tmp_path, label_smoothing_factor=0.1)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(8)])
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    logits = trainer.model.eval()(**inputs).logits
    is_label = batch["labels"] != -100
    expected = torch.nn.functional.cross_entropy(
        logits[is_label][:, 3:], batch["labels"][is_label] - 3, label_smoothing=0.1
    )
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)
    trainer.model.config.item_loss = "gbce"
    with pytest.raises(ValueError, match="label_smoothing_factor is for item_loss softmax only; got gbce"):
        Bert4RecTrainer(trainer.model, trainer.args, trainer.data_collator, eval_dataset=trainer.eval_dataset)
