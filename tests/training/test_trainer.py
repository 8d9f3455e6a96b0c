"""`Bert4RecTrainer`: training, evaluation, metrics, recipes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from chain_runs import SMALL, arguments, assert_equal_weights
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline, set_seed

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
    compute_metrics,
    evaluate_prepared,
    prepare,
    ranking_metrics,
    ranking_rows,
    read_prepared,
    target_ranks,
    train_prepared,
    training_rows,
)
from bert4rec_hf.cli import main
from bert4rec_hf.data.rows import sampled_candidates
from bert4rec_hf.evaluation.baselines import popularity_ranks
from bert4rec_hf.evaluation.metrics import SAMPLED_METRICS
from bert4rec_hf.evaluation.protocol import Protocol
from bert4rec_hf.model.configuration_bert4rec import UNK_TOKEN_ID


@pytest.fixture(scope="module")
def movielens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("movielens") / "data"
    try:
        prepare("ml-100k", folder)
    except OSError as error:
        pytest.skip(f"MovieLens 100K cannot be fetched: {error}")
    return folder


def test_the_best_next_item_of_a_markov_chain_is_learnt(chain, tmp_path):
    data, best_next = chain
    # Many evaluations, since late weights know no history that is longer than all of this log's training parts.
    often = {"eval_steps": 0.1, "save_steps": 0.1}
    train_prepared(data, arguments(tmp_path / "model", num_train_epochs=60, mask_ratio=0.2, **often))
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "model"), device="cpu")
    chance = random.Random(1)
    histories = [[*chance.choices(list(best_next), k=4), item] for item in best_next for _ in range(4)]
    answers = recommend(histories, top_k=1, batch_size=50)
    hits = [answer[0]["item_id"] == best_next[history[-1]] for history, answer in zip(histories, answers, strict=True)]
    assert sum(hits) / len(hits) > 0.9
    record = evaluate_prepared(tmp_path / "model", data, use_cpu=True)
    # The successor follows in .8 of the steps, and in 1 of 25 of the others by chance.
    assert record["metrics"]["HR@1"] > 0.7 > 0.2 > record["baselines"]["popularity"]["HR@1"]
    stored = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert record in stored


def test_our_trainer_and_the_plain_one_report_equal_metrics_and_train_equal_weights(movielens, tmp_path):
    data = movielens
    histories, tokenizer, _ = read_prepared(data)
    config = {"vocab_size": len(tokenizer), "max_position_embeddings": 10, **SMALL}
    trainer_inputs = {
        "data_collator": DataCollatorForMaskedItemPrediction(tokenizer, max_length=10),
        "train_dataset": training_rows(histories),
        "eval_dataset": ranking_rows(histories, tokenizer, "validation", filter_seen_items=False, max_length=10),
        "processing_class": tokenizer,
    }
    options = {
        "num_train_epochs": 1, "per_device_eval_batch_size": 64,
        "eval_strategy": "no", "load_best_model_at_end": False, "train_sampling_strategy": "random",
    }  # fmt: skip
    set_seed(1)
    ours = Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction(Bert4RecConfig(**config)),
        arguments(tmp_path / "ours", **options),
        **trainer_inputs,
    )
    ours.train()
    set_seed(1)
    plain = Trainer(
        Bert4RecForMaskedItemPrediction(Bert4RecConfig(**config)),
        TrainingArguments(
            **{
                name: getattr(ours.args, name)
                for name in ("learning_rate", "warmup_steps", "per_device_train_batch_size", "use_cpu")
            },
            output_dir=str(tmp_path / "plain"),
            num_train_epochs=1,
            per_device_eval_batch_size=64,
            disable_tqdm=True,
        ),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=target_ranks,
        **trainer_inputs,
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
    trainer_inputs = {"train_dataset": training_rows(histories), "processing_class": tokenizer}
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    protocol = Protocol.of(histories, {"split": {"name": "leave-one-out"}}, "validation", tokenizer.num_items, False)
    trainer = Bert4RecTrainer(
        None, given, None, trainer_inputs["train_dataset"], {"old": rows}, tokenizer, lambda: model,
        baselines={"popularity": ranks}, protocol=protocol,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == 2
    assert trainer.evaluation is None  # there is no single protocol for several datasets
    assert trainer.baselines == {"popularity": ranking_metrics(ranks)}
    recipe = yaml.safe_load((tmp_path / "model" / "checkpoint-10" / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 0.0
    assert not {"item_initialization", "train_windows", "window_step"} & recipe.keys()
    with pytest.raises(ValueError, match="expected a processing_class, the Bert4RecTokenizer"):
        Bert4RecTrainer(model, given, train_dataset=training_rows(histories), eval_dataset=rows)
    with pytest.raises(ValueError, match="expected a model or a model_init"):
        Bert4RecTrainer(args=given, **trainer_inputs)
    with pytest.raises(ValueError, match=r"the tokenizer has 28 token ids, the model 29: create the model"):
        Bert4RecTrainer(Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=29)), given, **trainer_inputs)
    with pytest.raises(
        ValueError, match="expected evaluation rows of ranking_rows; got rows without the column exclude_ids"
    ):
        trainer.evaluate(rows.remove_columns("exclude_ids").select(range(2)))
    assert not Bert4RecTrainingArguments(str(tmp_path / "none"), eval_strategy="no").load_best_model_at_end
    with pytest.raises(ValueError, match="expected Bert4RecTrainingArguments or a data_collator"):
        Bert4RecTrainer(model, TrainingArguments(str(tmp_path / "plain"), use_cpu=True), **trainer_inputs)


def test_evaluation_ranks_are_the_places_in_the_pipelines_answers_user_by_user(chain, tmp_path):
    data, _ = chain
    trainer = train_prepared(data, arguments(tmp_path / "model", num_train_epochs=1), filter_seen_items=True, **SMALL)
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)

    def shortened(row, number):
        ids, labels = (row[name][-2 - number % 7 :] for name in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels, "exclude_ids": ids[:-1]}

    rows = rows.map(shortened, with_indices=True)  # evaluation sorts by these lengths
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
    assert 0 < (ranks == 0).sum() < 301  # some targets are repeats, which are not shown


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
    assert stored == {"checkpoint-10", "checkpoint-20"}  # not those at steps 5 and 15
    (record,) = json.loads((tmp_path / "model" / "evaluation.json").read_text())
    assert record == trainer.evaluation
    assert trainer.evaluate()["eval_NDCG@10"] == pytest.approx(record["metrics"]["NDCG@10"])
    trainer.args.eval_strategy, trainer.args.save_strategy = "no", "no"
    trainer.train()  # ends at the same step with other weights
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
    assert sampled["eval_sampled_HR@10"] == 1  # among six items
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

    def transformed(rows):
        numbers = Dataset.from_dict({"number": range(len(rows))})
        numbers.set_transform(lambda batch: {name: rows[batch["number"]][name] for name in rows.column_names})
        return numbers

    options = {"max_steps": 2, "remove_unused_columns": False, "train_sampling_strategy": "random"}
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path, **options),
        None,
        transformed(trained),
        transformed(ranked),
        processing_class=tokenizer,
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
    assert train_prepared(data, given, **SMALL).args.mask_ratio == 1.0
    assert (given.mask_ratio, given.learning_rate, given.per_device_train_batch_size) == (None, 2e-3, 32)
    assert given.ddp_broadcast_buffers is False  # broadcasting could take 100 MB per step
    with pytest.raises(ValueError, match="leave out --bf16_full_eval and --fp16_full_eval; --bf16 true has half"):
        arguments(tmp_path / "model", bf16_full_eval=True)


def test_the_best_by_loss_is_the_lowest(chain, tmp_path):
    # At this learning rate, the loss rises again.
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


def test_weight_decay_is_not_of_the_item_table(chain, tmp_path):
    histories, tokenizer, _ = read_prepared(chain[0])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    # No row has [UNK], so only weight decay could change its vector.
    before = model.get_input_embeddings().weight[UNK_TOKEN_ID].clone()
    options = {"weight_decay": 0.5, "max_steps": 2, "warmup_steps": 0, "eval_strategy": "no", "save_strategy": "no"}
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path / "model", load_best_model_at_end=False, **options),
        train_dataset=training_rows(histories),
        processing_class=tokenizer,
    )
    trainer.train()
    assert before.any()
    assert torch.equal(model.get_input_embeddings().weight[UNK_TOKEN_ID], before)
    assert "model.layers.0.attention.query.weight" in trainer.get_decay_parameter_names(model)


def test_one_seed_gives_one_model_and_another_seed_another(chain, tmp_path):
    data, _ = chain
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        train_prepared(data, arguments(tmp_path / name, num_train_epochs=1, seed=seed), **SMALL)
    assert_equal_weights(tmp_path / "first", tmp_path / "again")
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "first", tmp_path / "other")


def test_fields_that_are_none_are_told_and_callbacks_called(chain, tmp_path):
    data, _ = chain
    with pytest.raises(TypeError, match=r"fields of Bert4RecConfig; got hiden_size, mask_ratio: training options"):
        train_prepared(data, arguments(tmp_path / "model"), hiden_size=32, mask_ratio=0.5)
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **options):
            steps.append(state.global_step)

    # With a limit of 1, Transformers removes the last checkpoint at the end if another one is the best.
    options = {"max_steps": 2, "save_total_limit": 2}
    train_prepared(data, arguments(tmp_path / "model", **options), callbacks=[Counts()], **SMALL)
    assert steps == [1, 2]
    options |= {"max_steps": 3, "resume_from_checkpoint": True}
    train_prepared(data, arguments(tmp_path / "model", **options), callbacks=[Counts()], **SMALL)
    assert steps == [1, 2, 3]


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


def test_data_that_the_model_does_not_fit_is_told(chain, tmp_path, caplog):
    data, _ = chain
    train_prepared(data, arguments(tmp_path / "model", max_steps=1), **SMALL)
    prepare(data.parent / "log.csv", tmp_path / "temporal", split="temporal", validation_cut=10, test_cut=12)
    evaluate_prepared(tmp_path / "model", data, use_cpu=True)
    assert "another preparation" not in caplog.text
    with pytest.raises(ValueError, match=r"model was trained on events up to \d+, and the test targets begin at \d+"):
        evaluate_prepared(tmp_path / "model", tmp_path / "temporal", use_cpu=True)
    prepare(data.parent / "log.csv", tmp_path / "filtered", min_item_events=2)
    evaluate_prepared(tmp_path / "model", tmp_path / "filtered", use_cpu=True)
    assert "model was trained on another preparation, of log.csv (filters {" in caplog.text
    (tmp_path / "log.csv").write_text((data.parent / "log.csv").read_text().replace("item ", ""))
    prepare(tmp_path / "log.csv", tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"model has none of the items of .*like 'item 0', .*those of the data like '0'"
    ):
        evaluate_prepared(tmp_path / "model", tmp_path / "other", use_cpu=True)
    train_prepared(tmp_path / "other", arguments(tmp_path / "new", max_steps=1), tmp_path / "model")
    assert "has none of the items of" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"report_to": ["tensorboard", "clearml"]}, "report_to names clearml, which is not installed"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1; got 0"),
        ({"window_step": 0.0}, "window_step must be above 0"),
        ({"train_windows": "newst"}, "train_windows must be one of newest, random, proportional, sliding; got 'newst'"),
        ({"output_dir": None}, "add --output_dir FOLDER"),
        ({"prediction_loss_only": True}, "leave out --prediction_loss_only"),
        ({"batch_eval_metrics": True}, "leave out --prediction_loss_only, --batch_eval_metrics"),
        ({"eval_do_concat_batches": False}, "the metrics are computed from all ranks together"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Bert4RecTrainingArguments(**({"output_dir": "model"} | option))


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
    # The model reads three items, and none is x, which the user has had most often.
    baselines = evaluate_prepared(tmp_path / "model", tmp_path / "data", use_cpu=True)["baselines"]
    assert baselines["personal popularity"]["HR@1"] == 1.0
    # Before the validation target b, the user has had x and a more often than b.
    baselines = json.loads((tmp_path / "model" / "training.json").read_text())["baselines"]
    assert (baselines["personal popularity"]["NDCG@1"], baselines["personal popularity"]["NDCG@5"]) == (0.0, 0.5)


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
