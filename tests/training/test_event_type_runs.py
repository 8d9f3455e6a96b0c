"""Runs of models of event types and item features: streamed, resumed, on several processes, tuned, published."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from chain_runs import arguments, assert_equal_weights, free_port
from command_runs import fail, succeed
from safetensors.torch import load_file
from transformers import pipeline

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTrainer,
    evaluate_prepared,
    prepare,
    ranking_rows,
    read_prepared,
    train_prepared,
    training_rows,
)
from bert4rec_hf.data.counting import conversion_scores
from bert4rec_hf.data.histories import stream_prepared
from bert4rec_hf.data.rows import StreamedTrainingRows, stream_training_rows
from bert4rec_hf.hub.publish_code import publish_code
from bert4rec_hf.runs import tune
from bert4rec_hf.training.sampler import mean_number_of_targets

NUM_USERS, NUM_ITEMS = 41, 24  # so few events an item that item features train
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TYPES = {"event_type_column": "event_type", "target_event_types": ["purchase"], "weight_column": "stars"}


def write_log(path: Path) -> None:
    """A shop in which users view two items, put one into the cart, and often buy it two events later."""
    chance, rows = random.Random(0), []
    for user in range(NUM_USERS):
        for visit in range(3):
            cart, other, last = chance.sample(range(NUM_ITEMS), 3)
            events = [(cart, "cart"), (other, "view"), (last, "view"), (cart, "purchase")]
            events = events if chance.random() < 0.8 or not visit else events[:3]
            for number, (item, kind) in enumerate(events):
                rows.append((f"u{user}", f"i{item:02}", 10 * visit + number, kind, 1 + (number + user) % 5))
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "event_type", "stars"]).to_csv(path, index=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    write_log(folder / "log.csv")
    items = [f"i{item:02}" for item in range(NUM_ITEMS)]
    kinds = [f"k{item % 3}" for item in range(NUM_ITEMS)]
    pd.DataFrame({"item_id": items, "kind": kinds}).to_csv(folder / "items.csv", index=False)
    prepare(folder / "log.csv", folder / "data", items=folder / "items.csv", item_features=["kind"], **TYPES)
    return folder / "data"


@pytest.fixture(scope="module")
def model(data):
    folder = data.parent / "model"
    train_prepared(data, arguments(folder, num_train_epochs=1), **SMALL)
    return folder


def test_streamed_rows_have_the_types_and_weights_of_those_in_memory(data):
    histories, tokenizer, _ = read_prepared(data)
    names = ("input_ids", "event_type_ids", "loss_weights")
    expected = [tuple(map(tuple, (row[name] for name in names))) for row in training_rows(histories)]
    streamed = StreamedTrainingRows(stream_prepared(data)[0], max_length=50)
    found = [
        tuple(tuple(row[name].tolist()) for name in names) for row in map(streamed.__getitem__, range(len(streamed)))
    ]
    assert found == expected
    lines = stream_training_rows(data / "histories.parquet", tokenizer, has_weights=True)
    assert [tuple(map(tuple, (row[name] for name in names))) for row in lines] == expected
    targets = tokenizer.target_event_type_ids
    mean = sum(row[1].count(targets[0]) for row in expected) / len(expected)
    assert mean_number_of_targets(streamed, 50, targets) == pytest.approx(mean)
    assert mean_number_of_targets(training_rows(histories), 50, targets) == pytest.approx(mean)
    assert tune._defaults(data)["mask_ratio"] == 1.0
    streams, _, _ = stream_prepared(data)
    assert torch.equal(conversion_scores(streams, 3), conversion_scores(histories, 3))


def test_histories_without_a_target_in_their_training_part_are_an_error(tmp_path):
    kinds = ["view", "view", "buy", "buy"]
    events = [(f"u{user}", f"i{place}", place, kind) for user in range(5) for place, kind in enumerate(kinds)]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp", "event_type"]).to_csv(tmp_path / "log.csv")
    prepare(tmp_path / "log.csv", tmp_path / "data", event_type_column="event_type", target_event_types=["buy"])
    for options in ((), ("--streaming", "true")):
        message = fail(
            "train", "--data", tmp_path / "data", "--output_dir", tmp_path / "model", "--use_cpu", "true",
            "--hidden_size", 16, "--num_attention_heads", 2, *options,
        )  # fmt: skip
        assert "no history has an event of a target type in its training part" in message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_ends_with_the_unbroken_runs_weights(data, tmp_path, streaming):
    options = {
        "num_train_epochs": 2, "save_strategy": "epoch", "eval_strategy": "no", "load_best_model_at_end": False,
        "save_total_limit": None, "streaming": streaming,
    }  # fmt: skip
    train_prepared(data, arguments(tmp_path / "whole", **options), **SMALL)
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert "item_projection.weight" in load_file(first / "model.safetensors")  # the features train
    shutil.copytree(first, tmp_path / "resumed" / first.name)
    train_prepared(data, arguments(tmp_path / "resumed", resume_from_checkpoint="last", **options), **SMALL)
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "whole")
    assert loaded.history_scores.conversion_scores.any()


def test_a_model_that_goes_on_refuses_types_that_it_does_not_know(data, model, tmp_path):
    log = pd.read_csv(data.parent / "log.csv")
    log.loc[log.event_type == "view", "event_type"] = "look"
    log.to_csv(tmp_path / "log.csv", index=False)
    prepare(tmp_path / "log.csv", tmp_path / "data", **TYPES)
    message = fail(
        "train", "--data", tmp_path / "data", "--model_name_or_path", model, "--output_dir", tmp_path / "new",
        "--use_cpu", "true",
    )  # fmt: skip
    assert "does not know the event types look" in message
    assert "it knows cart, purchase, view: train a new model" in message
    prepare(data.parent / "log.csv", tmp_path / "carts", **(TYPES | {"target_event_types": ["cart"]}))
    for command in (("evaluate", model), ("compare", model, model)):
        message = fail(*command, "--data", tmp_path / "carts", "--use_cpu", "true")
        assert "targets of the event types cart; the model predicts purchase" in message


def test_models_are_compared_and_several_targets_are_evaluated(data, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    printed = "\n".join(succeed("compare", model, tmp_path / "model", "--data", data, "--use_cpu", "true"))
    assert "+0.0000" in printed
    succeed("evaluate", tmp_path / "model", "--data", data, "--use_cpu", "true", "--targets", "all")
    records = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert any("conversion" in record.get("baselines", {}) for record in records)


def test_rules_and_an_index_give_the_answers_of_the_exact_search(data, model, tmp_path):
    rows = pd.DataFrame(
        {"item_id": [f"i{item:02}" for item in range(NUM_ITEMS)], "kind": ["a", "b"] * (NUM_ITEMS // 2)}
    )
    rows.to_csv(tmp_path / "items.csv", index=False)
    recommend = pipeline("sequential-recommendation", model=str(model), device="cpu")
    history = [{"item_id": "i03", "event_type": "cart"}, {"item_id": "i05", "event_type": "view"}]
    exact = recommend(history, top_k=NUM_ITEMS)
    assert exact[0]["item_id"] == "i03"  # what is in the cart is bought
    from bert4rec_hf import ItemTable, Rules

    rules = Rules(ItemTable.read(tmp_path / "items.csv", recommend.tokenizer), where="kind = 'b'")
    found = recommend(history, top_k=NUM_ITEMS, rules=rules)
    assert found == [entry for entry in exact if int(entry["item_id"][1:]) % 2]

    class Index:
        """An index that finds nothing but item i00, so that the items with counted scores must be added."""

        def __len__(self):
            return NUM_ITEMS

        def search(self, vectors, count):
            return None, torch.full((len(vectors), 1), 3)

    assert recommend(history, top_k=1, index=Index()) == exact[:1]


def test_a_search_of_settings_trains_with_types(data, tmp_path, monkeypatch):
    searched = {"hidden_size": [32], "hidden_dropout_prob": [0.1], "mask_ratio": [0.9], "num_train_epochs": [1]}
    monkeypatch.setattr(tune, "SEARCHED", searched)
    monkeypatch.setattr(tune, "_defaults", lambda data: {name: values[0] for name, values in searched.items()})
    found = tune.tune_prepared(data, tmp_path / "search", minutes=0.05, use_cpu=True)
    assert found["trials"][0]["value"] > 0


def test_published_code_reads_types_without_this_package(model, tmp_path):
    shutil.copytree(model, tmp_path / "published")
    publish_code(tmp_path / "published")
    program = """
import json, sys
sys.modules["bert4rec_hf"] = None
from transformers import pipeline
recommend = pipeline("bert4rec-recommendation", model=sys.argv[1], device="cpu", trust_remote_code=True)
print(json.dumps(recommend(json.loads(sys.argv[2]), top_k=5, explain=True)))
"""
    history = [{"item_id": "i03", "event_type": "cart"}, "i05"]
    outcome = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "published"), json.dumps(history)],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    recommend = pipeline("sequential-recommendation", model=str(model), device="cpu")
    assert json.loads(outcome.stdout.splitlines()[-1]) == recommend(history, top_k=5, explain=True)


@pytest.mark.processes
def test_two_processes_train_and_evaluate_like_one(data, tmp_path):
    def launch(*words):
        # The processes may abort at interpreter exit after their work, so their files are checked and not their status.
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
        return subprocess.run(
            [*command, str(free_port()), "-m", "bert4rec_hf", *map(str, words)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    folder = tmp_path / "model"
    small = ("--hidden_size", 16, "--num_attention_heads", 2, "--num_train_epochs", 1, "--use_cpu", "true")
    outcome = launch("train", "--data", data, "--output_dir", folder, *small)
    assert (folder / "config.json").is_file(), outcome.stderr[-3000:]
    launch("evaluate", folder, "--data", data, "--use_cpu", "true")
    records = json.loads((folder / "evaluation.json").read_text())
    two = next(record for record in records if record["protocol"]["part"] == "test")
    one = evaluate_prepared(folder, data, use_cpu=True)
    metrics = {name: value for name, value in one["metrics"].items() if name != "loss"}
    assert {name: two["metrics"][name] for name in metrics} == metrics
    histories, _, _ = read_prepared(data)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(folder)
    assert torch.equal(loaded.history_scores.conversion_scores, conversion_scores(histories, 3))


def sharded_inputs(data: Path) -> dict:
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False)
    return {"train_dataset": training_rows(histories), "eval_dataset": rows, "processing_class": tokenizer}


def train_sharded(data: Path, start: Path, output: Path) -> None:
    """The program of each of two processes, each of which holds half of the weights."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    model = Bert4RecForMaskedItemPrediction.from_pretrained(start, distributed_config=DistributedConfig(fsdp_size=2))
    # The learning rate of the first step is 0.
    given = arguments(output, num_train_epochs=4, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    trainer = Bert4RecTrainer(model, given, **sharded_inputs(data))
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if dist.get_rank() == 0:
        (output / "report.json").write_text(json.dumps(metrics))
    dist.barrier()


@pytest.mark.processes
def test_sharded_weights_train_with_types_and_are_saved_whole(data, tmp_path):
    histories, tokenizer, _ = read_prepared(data)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), max_position_embeddings=50, num_event_types=3, recency_weight=1.0,
        target_event_type_ids=tokenizer.target_event_type_ids, **SMALL,
    )  # fmt: skip
    start = Bert4RecForMaskedItemPrediction(config)
    start.history_scores.conversion_scores.copy_(conversion_scores(histories, 3))
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    output = tmp_path / "output"
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
         __file__, str(data), str(tmp_path / "start"), str(output)],
        check=False, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert (output / "report.json").is_file(), outcome.stderr[-3000:]
    alone = Bert4RecForMaskedItemPrediction.from_pretrained(output)
    assert torch.equal(alone.history_scores.conversion_scores, start.history_scores.conversion_scores)
    types, before = (found.model.embeddings.event_type_embeddings.weight for found in (alone, start))
    assert not torch.equal(types, before)
    metrics = Bert4RecTrainer(alone, arguments(tmp_path / "alone"), **sharded_inputs(data)).evaluate()
    report = json.loads((output / "report.json").read_text())
    for name in ("eval_HR@10", "eval_NDCG@10", "eval_MRR"):
        assert metrics[name] == pytest.approx(report[name], abs=1e-9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_sharded(*map(Path, sys.argv[1:]))
