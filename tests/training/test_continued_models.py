"""Models that are trained further, and models that are trained on all events."""

import json
import shutil

import pytest
import torch
import yaml
from chain_runs import SMALL, arguments, assert_equal_weights
from transformers import pipeline

from bert4rec_hf import (
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    evaluate_prepared,
    prepare,
    read_prepared,
    train_prepared,
    training_rows,
)
from bert4rec_hf.cli import main
from bert4rec_hf.defaults import (
    UPDATE_EPOCHS,
    UPDATE_LEARNING_RATE,
    UPDATE_WARMUP,
    default_learning_rate,
    default_transition_weight,
)
from bert4rec_hf.evaluation.seen_targets import last_trained_time
from bert4rec_hf.training.initialization import keep_transitions


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
    loaded.history_scores.successor_scores.zero_()
    loaded.save_pretrained(tmp_path / "first")
    on = train_prepared(data, arguments(tmp_path / "on", max_steps=1), model_name_or_path=tmp_path / "first").model
    for model in (first, on):
        assert torch.equal(model.history_scores.successor_ids, expected.history_scores.successor_ids)
        assert torch.equal(model.history_scores.successor_scores, expected.history_scores.successor_scores)
    assert expected.history_scores.successor_scores.any()
    assert (
        train_prepared(data, arguments(tmp_path / "none", max_steps=1), **SMALL).model.history_scores.successor_ids
        is None
    )


def test_a_model_to_serve_trains_on_all_events_by_the_recipe_of_the_one_that_was_evaluated(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "evaluated"), **SMALL)
    prepare(data.parent / "log.csv", tmp_path / "all", split="none")
    recipe = ["--config", str(tmp_path / "evaluated" / "recipe.yaml"), "--data", str(tmp_path / "all")]
    assert main(["train", *recipe, "--output_dir", str(tmp_path / "served")]) == 0
    assert "no validation targets: nothing is evaluated, and the model is that of the last step" in caplog.text
    names = {path.name for path in (tmp_path / "served").iterdir() if path.is_file()}
    assert names == {path.name for path in (tmp_path / "evaluated").iterdir() if path.is_file()} - {
        "evaluation.json", "training.json", "learning_curve.png", "calibration.json",
    }  # fmt: skip
    assert_equal_weights(tmp_path / "served", next((tmp_path / "served").glob("checkpoint-*")))
    assert yaml.safe_load((tmp_path / "served" / "recipe.yaml").read_text())["num_train_epochs"] == 2
    card = (tmp_path / "served" / "README.md").read_text()
    assert "It was trained on 6,020 events of 301 users in `log.csv`. The events that it has seen are from" in card
    assert "No events were held out" in card
    assert "--split none" in card
    assert "bert4rec evaluate" not in card
    assert pipeline("sequential-recommendation", model=str(tmp_path / "served"), device="cpu")(["item 3"], top_k=2)
    assert "early stopping is off" not in caplog.text
    train_prepared(tmp_path / "all", arguments(tmp_path / "other", early_stopping_patience=2), **SMALL)
    assert "early stopping is off without validation targets: all 2 epochs" in caplog.text


def test_a_model_of_all_events_is_no_model_to_evaluate_on_some_of_them(chain, tmp_path, caplog):
    data, _ = chain
    prepare(data.parent / "log.csv", tmp_path / "all", split="none")
    train_prepared(tmp_path / "all", arguments(tmp_path / "served", max_steps=1), **SMALL)
    (tmp_path / "next.csv").write_text((data.parent / "log.csv").read_text())
    prepare(tmp_path / "next.csv", tmp_path / "next")
    prepare(tmp_path / "next.csv", tmp_path / "next all", split="none")
    warning = (
        "served was trained on all events of log.csv: targets of next.csv among these events are no test of this model"
    )
    train_prepared(tmp_path / "next all", arguments(tmp_path / "on", max_steps=1), tmp_path / "served")
    assert warning not in caplog.text
    for test in (
        lambda: evaluate_prepared(tmp_path / "served", tmp_path / "next", use_cpu=True),
        lambda: train_prepared(tmp_path / "next", arguments(tmp_path / "onward", max_steps=1), tmp_path / "served"),
    ):
        caplog.clear()
        test()
        assert warning in caplog.text


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
    with pytest.raises(ValueError, match="second was trained on events up to 13, and the test targets begin at 12"):
        evaluate_prepared(tmp_path / "second", tmp_path / "first week", use_cpu=True)
    with pytest.raises(
        ValueError, match="second was trained on events up to 13, and the validation targets begin at 10"
    ):
        train_prepared(tmp_path / "first week", arguments(tmp_path / "back", max_steps=1), tmp_path / "second")
    # The period of a model that goes on includes that of the model before it.
    prepare(tmp_path / "renamed.csv", tmp_path / "third week", split="temporal", validation_cut=17, test_cut=18)
    trained = json.loads((tmp_path / "second" / "preparation.json").read_text())["trained_period"]
    assert trained == [0, 13]
    assert "The events that it has seen are from 0 to 13." in (tmp_path / "second" / "README.md").read_text()


def test_a_model_keeps_the_period_of_the_log_that_it_began_with(chain, tmp_path):
    data, _ = chain
    log = data.parent / "log.csv"
    prepare(log, tmp_path / "old", split="temporal", validation_cut=14, test_cut=16)
    prepare(log, tmp_path / "new", where="timestamp >= 10 and timestamp < 15", split="none")
    train_prepared(tmp_path / "old", arguments(tmp_path / "first", max_steps=1), **SMALL)
    train_prepared(tmp_path / "new", arguments(tmp_path / "second", max_steps=1), tmp_path / "first")
    trained = json.loads((tmp_path / "second" / "preparation.json").read_text())["trained_period"]
    assert trained == [0, 14]


def test_the_checksum_tells_histories_apart_where_split_and_filters_are_the_same(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "model", max_steps=1), **SMALL)
    lines = (data.parent / "log.csv").read_text().splitlines()
    (tmp_path / "reordered.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    (tmp_path / "shorter.csv").write_text("\n".join(lines[:-1]))
    assert (
        prepare(tmp_path / "reordered.csv", tmp_path / "reordered")["checksum"]
        == json.loads((data / "preparation.json").read_text())["checksum"]
    )
    evaluate_prepared(tmp_path / "model", tmp_path / "reordered", use_cpu=True)
    assert "another preparation" not in caplog.text
    prepare(tmp_path / "shorter.csv", tmp_path / "shorter")
    train_prepared(tmp_path / "shorter", arguments(tmp_path / "onward", max_steps=1), tmp_path / "model")
    assert "another preparation" not in caplog.text
    evaluate_prepared(tmp_path / "model", tmp_path / "shorter", use_cpu=True)
    assert "(other histories, by the checksum of preparation.json)" in caplog.text


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
    assert "the run ends with the model of its start; try a smaller --learning_rate" in caplog.text
    before, after = (Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / name) for name in ("model", "on"))
    for name, weights in before.named_parameters():
        assert torch.equal(weights, after.get_parameter(name)), name
    assert "The weights are those of step 0; the run was at step 6 of 6." in (tmp_path / "on" / "README.md").read_text()
    assert "was prepared with filter_seen_items True, but the model keeps its own, False" in caplog.text
    assert "was prepared for length 7, but the model keeps its own, 50" in caplog.text
    assert trainer.model.config.filter_seen_items is False
    caplog.clear()
    trainer = train_prepared(
        tmp_path / "data", arguments(tmp_path / "filtered", max_steps=1), tmp_path / "model", filter_seen_items=True
    )
    assert trainer.model.config.filter_seen_items is True
    assert "filter_seen_items" not in caplog.text


def test_an_update_knows_whether_the_weights_of_its_model_were_chosen_even_two_updates_ago(chain, tmp_path):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "model", max_steps=1), **SMALL | {"num_transitions": 8})
    for name, were_chosen in (("once", False), ("twice", True)):
        path = tmp_path / "model" / "calibration.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"were_chosen": were_chosen}))
        trainer = train_prepared(data, arguments(tmp_path / name, num_train_epochs=0), tmp_path / "model")
        assert trainer.weights_were_chosen == were_chosen
        record = json.loads((tmp_path / name / "calibration.json").read_text())
        assert record["were_chosen"] == (were_chosen or record["adopted"])


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
    assert model.config.vocab_size == len(new) == model.item_bias.weight.shape[0]
    # A recipe does not name a local model folder to start from. It names a model on the Hub.
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
    # The vector of an item that the new log lacks changes only a little.
    old_row = before.get_input_embeddings().weight[old.item_ids_to_token_ids(["item 7"])[0]]
    new_row = model.get_input_embeddings().weight[new.item_ids_to_token_ids(["item 7"])[0]]
    assert torch.nn.functional.cosine_similarity(old_row, new_row, dim=0) > 0.9


def weekly(tmp_path, number):
    """A log in which 40 users have an item a day, and a new item each week, prepared up to the end of a week."""
    log = tmp_path / "weeks.csv"
    if not log.exists():
        days = [
            (user, f"item {(3 * user + day) % 9}" if day % 7 else f"new {day // 7}", day)
            for user in range(40)
            for day in range(28)
        ]
        log.write_text(
            "user_id,item_id,timestamp\n" + "".join(f"{user},{item},2026-03-{day + 1:02}\n" for user, item, day in days)
        )
    cut = f"2026-03-{7 * number + 1:02}"
    prepare(log, tmp_path / f"week {number}", split="temporal", validation=False, test_cut=cut, max_length=10)
    return tmp_path / f"week {number}"


def test_an_update_trains_on_the_new_events_by_defaults_of_its_own(tmp_path, caplog):
    train_prepared(weekly(tmp_path, 2), arguments(tmp_path / "first", num_train_epochs=1), **SMALL)
    second = weekly(tmp_path, 3)
    assert last_trained_time(tmp_path / "first", second) == 1773446400_000000  # 14 March 2026 in microseconds
    quiet = {"use_cpu": True, "disable_tqdm": True}
    given = Bert4RecTrainingArguments(str(tmp_path / "default"), **quiet)
    trainer = train_prepared(second, given, tmp_path / "first")
    assert "40 histories have new events; catalogue and counts are updated, and the network stays" in caplog.text
    assert trainer.args.num_train_epochs == UPDATE_EPOCHS == trainer.state.global_step == 0
    trainer = train_prepared(
        second, Bert4RecTrainingArguments(str(tmp_path / "second"), num_train_epochs=1, **quiet), tmp_path / "first"
    )
    assert "40 histories have new events; they train, and as many old rows" in caplog.text
    assert trainer.args.learning_rate == UPDATE_LEARNING_RATE * default_learning_rate(SMALL["hidden_size"])
    assert trainer.args.warmup_steps == UPDATE_WARMUP
    assert (given.num_train_epochs, given.warmup_steps) == (20, 100)  # the caller's arguments stay
    rows = trainer.train_dataset
    assert len(rows) == 80
    # The newest window has the seven new events and, as half of a row would be less, as many old ones.
    assert {len(row) for row in rows["input_ids"][:40]} == {14}
    assert {len(row) for row in rows["input_ids"][40:]} == {10}
    all_rows = arguments(tmp_path / "third", update_rows="all", max_steps=1)
    assert len(train_prepared(second, all_rows, tmp_path / "first").train_dataset) == 40 * 3
    # Without new events, all rows train, by the defaults of a new model.
    caplog.clear()
    assert (
        len(train_prepared(second, arguments(tmp_path / "fourth", max_steps=1), tmp_path / "second").train_dataset)
        == 120
    )


def test_an_update_keeps_the_network_and_counts_anew(tmp_path):
    train_prepared(
        weekly(tmp_path, 2), arguments(tmp_path / "first", num_train_epochs=8), **SMALL | {"num_transitions": 8}
    )
    second = weekly(tmp_path, 3)
    train_prepared(
        second, Bert4RecTrainingArguments(str(tmp_path / "second"), use_cpu=True, disable_tqdm=True), tmp_path / "first"
    )
    before, after = (Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / name) for name in ("first", "second"))
    old, new = (Bert4RecTokenizer.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert set(new.items) - set(old.items) == {"new 2"}
    for name, weights in before.named_parameters():
        assert torch.equal(weights, after.get_parameter(name)[: len(weights)]), name
    histories = read_prepared(second, new)[0]
    keep_transitions(before := Bert4RecForMaskedItemPrediction(after.config), histories, new.num_items)
    assert torch.equal(before.history_scores.successor_ids, after.history_scores.successor_ids)
    # The new item comes after item k, then item k + 1 would have come: it lies among its neighbours.
    vectors = after.get_input_embeddings().weight.detach()
    (place,) = new.item_ids_to_token_ids(["new 2"])
    assert vectors[place].norm() > 0
    assert not torch.equal(vectors[place], vectors[3 : len(old)].mean(dim=0))
    with pytest.raises(ValueError, match="num_train_epochs 0 is for a model that is trained further"):
        train_prepared(second, arguments(tmp_path / "none", num_train_epochs=0), **SMALL)
