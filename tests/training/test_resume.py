"""Checkpoints, and runs that resume from them."""

import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chain_runs import SMALL, arguments, assert_equal_weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import TrainerCallback, pipeline, set_seed

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainer,
    DataCollatorForMaskedItemPrediction,
    prepare,
    read_prepared,
    train_prepared,
    training_rows,
)
from bert4rec_hf.data.histories import stream_prepared
from bert4rec_hf.data.rows import StreamedTrainingRows
from bert4rec_hf.training.resume import FSDP_OPTIMIZER, FSDP_WEIGHTS, check_resumable, named_if_lost


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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_resumed_at_the_end_of_an_epoch_ends_with_the_unbroken_runs_weights(chain, tmp_path, streaming):
    data, _ = chain
    options = {
        "num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "no", "load_best_model_at_end": False,
        "save_total_limit": None, "streaming": streaming,
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
    for step in (7, 99):  # checkpoints whose saving was interrupted
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        shutil.copy(tmp_path / "run" / "config.json", tmp_path / "run" / f"checkpoint-{step}")
    options = {"num_train_epochs": 2, "resume_from_checkpoint": "last"}
    trainer = train_prepared(data, arguments(tmp_path / "run", **options), **SMALL)
    assert trainer.state.global_step == 20
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-10'}" in caplog.text


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_and_the_next_run_makes_it(chain, tmp_path, monkeypatch):
    data, _ = chain

    def fail(trainer, output_dir):
        assert (Path(output_dir) / "model.safetensors").is_file()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Bert4RecTrainer, "_save_rng_state", fail)
        with pytest.raises(OSError, match="no space left"):
            train_prepared(data, arguments(tmp_path / "run"), **SMALL)
    assert not [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]
    shutil.rmtree(tmp_path / "run")
    left = tmp_path / "run" / ".checkpoint-10.launch.new" / "checkpoint-10"  # by a run that was killed
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_text("hal")
    trainer = train_prepared(data, arguments(tmp_path / "run", save_total_limit=1), **SMALL)
    assert not left.exists()
    best = Path(trainer.state.best_model_checkpoint)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        assert json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert best.is_dir()
    names = {path.name for path in best.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "evaluation.json"} <= names
    assert not list((tmp_path / "run").glob("**/.*.new"))


def test_a_run_resumed_from_its_start_goes_back_to_it_if_nothing_better_follows(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "old", calibrate=False), **SMALL)
    options = {
        "num_train_epochs": 1, "learning_rate": 1.0, "update_rows": "all", "calibrate": False,
        "metric_for_best_model": "loss",
    }  # fmt: skip
    train_prepared(data, arguments(tmp_path / "run", **options), model_name_or_path=tmp_path / "old")
    assert_equal_weights(tmp_path / "run", tmp_path / "old")
    shutil.copytree(tmp_path / "run" / "checkpoint-0", tmp_path / "resumed" / "checkpoint-0")
    train_prepared(
        data, arguments(tmp_path / "resumed", resume_from_checkpoint="last", **options),
        model_name_or_path=tmp_path / "old",
    )  # fmt: skip
    assert_equal_weights(tmp_path / "resumed", tmp_path / "old")


class RowsSeen(TrainerCallback):
    """A collator that also records the rows that it gets."""

    def __init__(self, collator):
        self.collator, self.rows = collator, []

    def __call__(self, features):
        self.rows += [tuple(feature["input_ids"]) for feature in features]
        return self.collator(features)


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

    resume(data, "has hidden_size=32, not 16; num_attention_heads=1, not 2: a resumed run", hidden_size=16)
    resume(data, "has item_loss=softmax, not bpr", item_loss="bpr")
    resume(data, r"has learning_rate=0\.\d+, not 1e-05: a resumed run keeps its optimizer", learning_rate=1e-5)
    resume(data, r"has weight_decay=0\.0, not 0\.1: .*give the checkpoint as --model_name_or_path", weight_decay=0.1)
    resume(tmp_path / "other data", "was trained on a log with another catalogue: resume with the --data")
    lines = (data.parent / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(line for line in lines if not line.startswith("300,")) + "\n")
    prepare(tmp_path / "log.csv", tmp_path / "fewer users")
    resume(tmp_path / "fewer users", "was trained on a log with other statistics: resume with the --data")
    prepare(data.parent / "log.csv", tmp_path / "other split", validation=False)
    resume(tmp_path / "other split", "was trained on a log with other split and other statistics")
    resume(data, r"is at epoch 1, step 10, at or beyond the end .*max_steps=10.*: increase", max_steps=10)
    resume(
        data, r"is at epoch 1, step 10, at or beyond the end .*num_train_epochs=0.5.*: increase", num_train_epochs=0.5
    )
    rows = "was trained with 32 rows a step over 1 process; got {} over 1: a resumed run keeps its rows a step; {}$"
    resume(data, rows.format(16, "set --per_device_train_batch_size 32"), per_device_train_batch_size=16)
    resume(data, rows.format(2048, "choose a number .* that divides 32"), gradient_accumulation_steps=64)
    resume(data, "is no checkpoint to resume from", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    model_only = tmp_path / "checkpoint-10"
    shutil.copytree(tmp_path / "run" / "checkpoint-10", model_only, ignore=shutil.ignore_patterns("optimizer*"))
    resume(data, "has the model only .*give the checkpoint as --model", resume_from_checkpoint=str(model_only))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_copied_run_goes_on_from_its_own_best_checkpoint(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "first", num_train_epochs=1), **SMALL)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    for state in (tmp_path / "copy").glob("checkpoint-*/trainer_state.json"):  # no later one is better
        state.write_text(json.dumps(json.loads(state.read_text()) | {"best_metric": 1.0}))
    options = {"num_train_epochs": 2, "resume_from_checkpoint": "last"}
    trainer = train_prepared(data, arguments(tmp_path / "copy", **options), **SMALL)
    assert Path(trainer.state.best_model_checkpoint).parent == tmp_path / "copy"
    assert Path(trainer.state.best_model_checkpoint).is_dir()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_resumed_in_mid_epoch_neither_loses_nor_repeats_rows_and_the_next_epoch_has_another_order(
    chain, tmp_path, streaming
):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    in_memory = training_rows(histories)
    rows_to_train = StreamedTrainingRows(stream_prepared(data)[0], max_length=50) if streaming else in_memory

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
            train_dataset=rows_to_train,
            processing_class=tokenizer,
            callbacks=[Stop()],
        )
        trainer.train(resume_from_checkpoint=True if resumed else None)
        seen.append(collator.rows)
    # The stopped run has not trained on the batch that the loader has read ahead.
    rows = seen[0][: 6 * 32] + seen[1]
    everything = sorted(map(tuple, in_memory["input_ids"]))
    first, second = rows[: len(everything)], rows[len(everything) :]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_where_no_checkpoint_is_kept_the_last_step_is_the_model(chain, tmp_path):
    data, _ = chain
    trainer = train_prepared(data, arguments(tmp_path / "run", max_steps=20, save_strategy="no"), **SMALL)
    assert trainer.evaluated_step == 20 == json.loads((tmp_path / "run" / "training.json").read_text())["chosen_step"]
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_a_run_without_fsdp_goes_on_from_a_checkpoint_of_fsdp(chain, tmp_path):
    data, _ = chain
    options = {"num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "no", "load_best_model_at_end": False}
    options |= {"save_total_limit": None}
    trainer = train_prepared(data, arguments(tmp_path / "whole", **options), **SMALL)
    checkpoint = tmp_path / "resumed" / "checkpoint-10"
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", checkpoint)
    # FSDP saves weights under other names, and the state of the optimizer by the names of the weights.
    model, optimizer = trainer.model, trainer.optimizer.optimizer
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    whole = StateDictOptions(full_state_dict=True)
    torch.save(get_optimizer_state_dict(model, optimizer, options=whole), checkpoint / FSDP_OPTIMIZER)
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / FSDP_WEIGHTS)
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "model.safetensors").unlink()
    train_prepared(data, arguments(tmp_path / "resumed", resume_from_checkpoint="last", **options), **SMALL)
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")


def test_a_checkpoint_saved_without_fsdp_is_not_for_a_sharded_run(chain, tmp_path):
    data, _ = chain
    trainer = train_prepared(data, arguments(tmp_path / "run", num_train_epochs=1), **SMALL)
    given = trainer.model.config, trainer.processing_class, trainer.preparation
    with pytest.raises(ValueError, match="was saved without FSDP, which cannot resume from it: resume without FSDP"):
        check_resumable(str(tmp_path / "run" / "checkpoint-10"), trainer.args, *given, is_sharded=True)


@pytest.mark.parametrize(
    ("checkpoint", "advice"),
    [("checkpoint-7", "go on from checkpoint-7 with --resume_from_checkpoint last"), (None, "start the run again")],
)
def test_a_lost_process_is_named_with_what_to_do(tmp_path, checkpoint, advice):
    if checkpoint is not None:
        (tmp_path / checkpoint).mkdir()
        (tmp_path / checkpoint / "trainer_state.json").write_text("{}")
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")
    args = SimpleNamespace(world_size=4, process_index=2, output_dir=str(tmp_path))
    with (
        pytest.raises(ConnectionError, match=f"process 2 of 4 has lost another one, .*: {advice}; "),
        named_if_lost(args),
    ):
        raise lost
    for error, processes in ((lost, 1), (RuntimeError("out of memory"), 4)):
        args.world_size = processes
        with pytest.raises(RuntimeError) as raised, named_if_lost(args):
            raise error
        assert raised.value is error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM between processes")
def test_a_process_that_the_launcher_ends_says_how_to_go_on(tmp_path):
    args = SimpleNamespace(world_size=2, process_index=1, output_dir=str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    expected = r"process 1 of 2 was told to end \(SIGTERM\), as launchers do .*: start the run again; "
    with pytest.raises(ConnectionError, match=expected), named_if_lost(args):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    args.world_size = 1
    with named_if_lost(args):
        assert signal.getsignal(signal.SIGTERM) is before
