"""Calibration: the weights of the counted scores, chosen on validation targets."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from chain_runs import SMALL, arguments
from small_models import FIRST, VOCAB, make_model

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    calibrate_prepared,
    evaluate_prepared,
    prepare,
    train_prepared,
)
from bert4rec_hf.cli import main
from bert4rec_hf.command_line.output import format_calibration
from bert4rec_hf.data.histories import read_prepared
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.evaluation import calibration
from bert4rec_hf.evaluation.calibration import (
    Comparisons,
    choose_weights,
    compare_targets,
    compare_with_baselines,
    set_weights,
    weights_of,
)
from bert4rec_hf.model.history_scores import WEIGHT_FIELDS


def write_shop(path, num_users: int = 300) -> None:
    """A log in which the next item is the same, the successor of the newest item, or the first one again."""
    chance = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for user in range(num_users):
            item = int(chance.integers(30))
            first = item
            for time in range(int(chance.integers(3, 15))):
                file.write(f"{user},item {item:02},{time}\n")
                kind = chance.random()
                if kind > 0.8:
                    item = int(chance.integers(30))
                elif kind > 0.5:
                    item = (item * 7 + 3) % 30
                elif kind > 0.3:
                    item = first


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "log.csv")
    prepare(folder / "log.csv", folder / "data")
    return folder / "data"


def gain(rank: int) -> float:
    return 1 / math.log2(rank + 1) if 0 < rank <= 10 else 0.0


@pytest.mark.parametrize("filter_seen_items", [False, True])
def test_the_gains_of_any_weights_are_those_of_ranking_with_them(tmp_path, filter_seen_items):
    chance = np.random.default_rng(1)
    tokenizer = Bert4RecTokenizer.from_items([f"{number:02}" for number in range(VOCAB - FIRST)], model_max_length=12)
    with (tmp_path / "log.csv").open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for user in range(80):
            for time in range(int(chance.integers(1, 20))):
                file.write(f"{user},{chance.integers(VOCAB - FIRST):02},{time}\n")
    prepare(tmp_path / "log.csv", tmp_path / "data", filter_seen_items=filter_seen_items)
    histories, tokenizer, _ = read_prepared(tmp_path / "data", tokenizer)
    model = make_model(num_transitions=5, next_item_weight=1.0, filter_seen_items=filter_seen_items)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=filter_seen_items, max_length=12)
    before = weights_of(model.config)
    comparisons = compare_targets(model, rows, tokenizer, batch_size=7)
    assert weights_of(model.config) == before
    assert sorted(comparisons.user_ids) == sorted(rows["user_id"])
    expected_features = ["transitions", "next_items"] if filter_seen_items else [*WEIGHT_FIELDS][:4]
    assert comparisons.used_features() == expected_features
    for number in range(12):
        weights = {name: float(chance.choice([0, 0.1, 1, 5, 40])) if number else 0.0 for name in WEIGHT_FIELDS}
        set_weights(model.config, weights)
        found = dict(zip(comparisons.user_ids, comparisons.gains(weights), strict=True))
        for row in rows:
            rank = model.rank(
                torch.tensor([row["input_ids"]]),
                torch.tensor([max(row["labels"])]),
                history_ids=torch.tensor([row["history_ids"]]),
                exclude_ids=torch.tensor([row["exclude_ids"]], dtype=torch.long),
            )
            assert found[row["user_id"]] == pytest.approx(gain(int(rank)), abs=1e-9)


def comparisons_of(network: np.ndarray, feature: np.ndarray) -> Comparisons:
    """Comparisons of one target a user with some items, with one feature, the transitions."""
    num_users, num_items = network.shape
    features = np.zeros((len(WEIGHT_FIELDS), num_users * num_items), np.float32)
    features[0] = feature.ravel()
    return Comparisons(
        user_ids=[f"user {number}" for number in range(num_users)],
        users=np.arange(num_users),
        num_always_above=np.zeros(num_users, int),
        starts=np.arange(num_users + 1) * num_items,
        network=network.ravel().astype(np.float32),
        features=features,
    )


START = dict.fromkeys(WEIGHT_FIELDS, 0.0) | {"transitions": 0.25, "popularity": 20.0}


def test_weights_that_pay_are_adopted_and_the_gain_is_measured_on_users_they_were_not_chosen_on():
    chance = np.random.default_rng(0)
    # The network is at random. The feature is higher for the target than for others, mostly.
    comparisons = comparisons_of(chance.normal(size=(500, 30)), chance.normal(-1, 1, size=(500, 30)))
    record = choose_weights(comparisons, START)
    assert record["adopted"]
    assert record["start_weights"] == START
    assert record["weights"] == START | {"transitions": record["weights"]["transitions"]}
    assert record["weights"]["transitions"] >= 1
    found = record["NDCG@10"]
    assert found["start"] == pytest.approx(comparisons.gains(START).mean())
    assert found["chosen"] == pytest.approx(comparisons.gains(record["weights"]).mean())
    assert found["start"] < found["cross_fitted"] <= found["chosen"] + 1e-9
    assert choose_weights(comparisons, START) == record


def test_weights_that_only_fit_the_noise_are_not_adopted():
    adopted = []
    for seed in range(10):
        chance = np.random.default_rng(seed)
        comparisons = comparisons_of(chance.normal(size=(300, 30)), chance.normal(size=(300, 30)) * 0.02)
        record = choose_weights(comparisons, START)
        adopted.append(record["adopted"])
        if not record["adopted"]:
            assert record["weights"] == START
            assert record["NDCG@10"]["chosen"] == record["NDCG@10"]["start"]
    assert sum(adopted) <= 3


def test_weights_that_were_chosen_before_give_way_only_to_others_that_are_better_by_two_standard_errors():
    chance = np.random.default_rng(6)
    comparisons = comparisons_of(chance.normal(size=(300, 30)), chance.normal(-0.1, 1, size=(300, 30)))
    record, again = (choose_weights(comparisons, START, were_chosen=before) for before in (False, True))
    gain = record["NDCG@10"]["cross_fitted"] - record["NDCG@10"]["start"]
    assert 1 < gain / record["standard_error"] < 2
    assert [record["adopted"], again["adopted"]] == [True, False]
    assert [record["were_chosen"], again["were_chosen"]] == [True, True]
    assert again["weights"] == START
    assert not choose_weights(comparisons_of(np.zeros((0, 5)), np.zeros((0, 5))), START)["were_chosen"]


def test_no_user_and_no_feature_choose_nothing():
    nothing = comparisons_of(np.zeros((0, 5)), np.zeros((0, 5)))
    chance = np.random.default_rng(0)
    for comparisons in (nothing, comparisons_of(chance.normal(size=(50, 20)), np.zeros((50, 20)))):
        record = choose_weights(comparisons, START)
        assert not record["adopted"]
        assert record["weights"] == START


@pytest.mark.parametrize(("num_new", "is_searched"), [(3, False), (49, False), (50, True)])
def test_a_few_users_without_a_past_do_not_choose_the_weight_of_popularity(num_new, is_searched):
    chance = np.random.default_rng(0)
    comparisons = comparisons_of(chance.normal(size=(500, 30)), chance.normal(-1, 1, size=(500, 30)))
    comparisons.features[4, : num_new * 30] = chance.normal(size=num_new * 30)
    comparisons.features[0, : num_new * 30] = 0
    assert comparisons.used_features() == ["transitions", "popularity"][: 1 + is_searched]
    record = choose_weights(comparisons, START)
    assert record["adopted"]
    assert (record["weights"]["popularity"] == START["popularity"]) != is_searched


def test_a_single_user_chooses_nothing():
    comparisons = comparisons_of(np.array([[1.0, -1]]), np.array([[-5.0, 0]]))
    record = json.loads(json.dumps(choose_weights(comparisons, START), allow_nan=False))
    assert not record["adopted"]
    assert record["standard_error"] is None
    assert "since there is only one validation user" in format_calibration(record)
    assert compare_with_baselines(comparisons, START, {"best": np.array([1])}, ["user 0"]) == {}


def test_a_large_log_is_sampled(monkeypatch, shop):
    monkeypatch.setattr(calibration, "MAX_CALIBRATED_USERS", 50)
    histories, tokenizer, _ = read_prepared(shop)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False, max_length=12)
    model = make_model(vocab_size=len(tokenizer), repeat_weight=1.0)
    found = compare_targets(model, rows, tokenizer)
    assert len(found.user_ids) == len(set(found.user_ids)) == 50
    assert compare_targets(model, rows, tokenizer).user_ids == found.user_ids


def test_baselines_are_compared_user_by_user():
    comparisons = comparisons_of(np.array([[-1.0, -1], [1, -1], [1, 1]]), np.zeros((3, 2)))
    ranks = {"best": np.array([1, 1, 1, 1]), "none": np.array([0, 11, 0, 100])}
    found = compare_with_baselines(comparisons, START, ranks, ["user 2", "another", "user 0", "user 1"])
    gains = np.array([1, 1 / math.log2(3), 1 / 2])
    for name, of_baseline in (("best", 1), ("none", 0)):
        difference = gains - of_baseline
        assert found[name]["difference"] == pytest.approx(difference.mean())
        assert found[name]["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(3))


def test_a_trained_model_has_calibrated_weights_and_says_so(shop, tmp_path, capsys):
    options = SMALL | {"num_transitions": 8, "transition_weight": 3.0}  # too much for this log
    trainer = train_prepared(shop, arguments(tmp_path / "model", num_train_epochs=1), **options)
    record = json.loads((tmp_path / "model" / "calibration.json").read_text())
    assert record["adopted"]
    assert record == json.loads(json.dumps(trainer.calibration))
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "model")
    assert weights_of(model.config) == record["weights"]
    stored = json.loads((tmp_path / "model" / "evaluation.json").read_text())[-1]
    assert stored["protocol"]["calibrated"]
    assert stored["metrics"]["NDCG@10"] == pytest.approx(record["NDCG@10"]["chosen"], abs=1e-6)
    again = evaluate_prepared(tmp_path / "model", shop, "validation", use_cpu=True)
    assert again["protocol"]["calibrated"]
    assert again["metrics"]["NDCG@10"] == pytest.approx(stored["metrics"]["NDCG@10"])
    assert not evaluate_prepared(tmp_path / "model", shop, use_cpu=True)["protocol"]["calibrated"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("seen items kept; 300 users; weights of counted scores chosen on these targets") == 1
    # The curve was measured before.
    training = json.loads((tmp_path / "model" / "training.json").read_text())
    assert not training["protocol"]["calibrated"]
    assert "Here, the weights of the counted scores are those before calibration." in card
    assert f"cross-fitted NDCG@10 {record['NDCG@10']['cross_fitted']:.4f}" in card
    checkpoint = next((tmp_path / "model").glob("checkpoint-*"))
    assert not (checkpoint / "calibration.json").exists()
    for name, compared in record["baselines"].items():
        assert compared["difference"] > -2 * compared["standard_error"], name


def test_without_calibration_the_weights_stay(shop, tmp_path):
    options = SMALL | {"num_transitions": 8, "repeat_weight": 0.7, "next_item_weight": 0.1}
    train_prepared(shop, arguments(tmp_path / "model", num_train_epochs=1, calibrate=False), **options)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "model")
    assert (model.config.repeat_weight, model.config.next_item_weight) == (0.7, 0.1)
    record = json.loads((tmp_path / "model" / "calibration.json").read_text())
    assert not record["adopted"]
    assert "EASE" in record["baselines"]
    assert not json.loads((tmp_path / "model" / "evaluation.json").read_text())[-1]["protocol"]["calibrated"]
    assert "before calibration" not in (tmp_path / "model" / "README.md").read_text()


def test_without_evaluations_in_training_the_curve_is_of_the_calibrated_model(shop, tmp_path):
    options = SMALL | {"num_transitions": 8, "transition_weight": 3.0}
    trainer = train_prepared(shop, arguments(tmp_path / "model", num_train_epochs=1, eval_strategy="no"), **options)
    assert trainer.calibration["adopted"]
    assert json.loads((tmp_path / "model" / "training.json").read_text())["protocol"]["calibrated"]
    assert "before calibration" not in (tmp_path / "model" / "README.md").read_text()


def test_a_run_resumes_with_the_recipe_of_the_calibrated_run(shop, tmp_path, caplog):
    options = SMALL | {"num_transitions": 8, "transition_weight": 3.0}
    train_prepared(shop, arguments(tmp_path / "model", num_train_epochs=1), **options)
    calibrated = Bert4RecConfig.from_pretrained(tmp_path / "model")
    assert calibrated.transition_weight != 3
    given = {field: getattr(calibrated, field) for field in WEIGHT_FIELDS.values()}
    trainer = train_prepared(
        shop, arguments(tmp_path / "model", num_train_epochs=2, resume_from_checkpoint="last"), **(options | given)
    )
    assert trainer.calibration["start_weights"]["transitions"] == 3
    assert "goes on with the weights of counted scores of" in caplog.text


def test_a_trainer_without_one_set_of_evaluation_rows_cannot_calibrate(shop, tmp_path):
    histories, tokenizer, _ = read_prepared(shop)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False, max_length=12)
    model = make_model(vocab_size=len(tokenizer))
    trainer = Bert4RecTrainer(model, arguments(tmp_path), eval_dataset={"one": rows}, processing_class=tokenizer)
    with pytest.raises(ValueError, match="expected one eval_dataset, rows of ranking_rows; got dict"):
        trainer.calibrate()


@pytest.mark.parametrize("publish_code", [False, True])
def test_a_model_without_counts_gets_them_by_the_command(shop, tmp_path, capsys, publish_code):
    options = SMALL | {"repeat_weight": 0.0, "recency_weight": 0.0}
    train_prepared(
        shop, arguments(tmp_path / "model", num_train_epochs=1, calibrate=False), publish_code=publish_code, **options
    )
    evaluate_prepared(tmp_path / "model", shop, use_cpu=True)
    before = json.loads((tmp_path / "model" / "config.json").read_text())
    assert main(["calibrate", str(tmp_path / "model"), "--data", str(shop)]) == 0
    printed = capsys.readouterr().out
    assert "weights of counted scores chosen on validation: transitions " in printed
    assert f"wrote {tmp_path / 'model'}; next: bert4rec evaluate" in printed
    record = json.loads((tmp_path / "model" / "calibration.json").read_text())
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert after["num_transitions"] == 64
    assert after.get("auto_map") == before.get("auto_map")
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed <= {"num_transitions", "use_cache", *WEIGHT_FIELDS.values()}
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "model")
    assert model.history_scores.successor_ids.any()
    assert weights_of(model.config) == record["weights"]
    recipe = yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text())
    assert {name: recipe[field] for name, field in WEIGHT_FIELDS.items()} == record["weights"]
    assert recipe["num_transitions"] == 64
    assert not (tmp_path / "model" / "evaluation.json").exists()  # its metrics were those of the former weights
    found = evaluate_prepared(tmp_path / "model", shop, "validation", use_cpu=True)
    assert found["metrics"]["NDCG@10"] == pytest.approx(record["NDCG@10"]["chosen"], abs=1e-6)
    # The second calibration starts from the weights of the first, and finds nothing better.
    assert not calibrate_prepared(tmp_path / "model", shop, use_cpu=True)["adopted"]


def test_a_folder_that_cannot_be_calibrated_is_an_error(shop, tmp_path, capsys):
    assert main(["calibrate", "somebody/model", "--data", str(shop)]) == 2
    assert "expected a model folder, which calibration changes; got somebody/model" in capsys.readouterr().err
    train_prepared(shop, arguments(tmp_path / "model", max_steps=1), **SMALL)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()}
    (tmp_path / "other.csv").write_text((shop.parent / "log.csv").read_text().replace("item ", "thing "))
    prepare(tmp_path / "other.csv", tmp_path / "other")
    assert main(["calibrate", str(tmp_path / "model"), "--data", str(tmp_path / "other")]) == 2
    assert "has none of the items of" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.is_file()} == before
    prepare(shop.parent / "log.csv", tmp_path / "all", split="none")
    assert main(["calibrate", str(tmp_path / "model"), "--data", str(tmp_path / "all")]) == 2
    assert "has a validation target; prepare with another --split" in capsys.readouterr().err
