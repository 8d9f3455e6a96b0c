"""New items from prepare to recommendations: trained with features, updated, withdrawn."""

import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chain_runs import arguments
from command_runs import fail, succeed
from safetensors.torch import load_file
from transformers import pipeline

from bert4rec_hf import Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, prepare, train_prepared
from bert4rec_hf.data.histories import read_prepared
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.runs.update_items import update_items
from bert4rec_hf.training.new_items import Trade, choose_offset, set_offset, trade_new_items

NUM_GROUPS, OLD_PER_GROUP, NEW_PER_GROUP = 6, 8, 2


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A log whose users stay within a group, with two items of each group that are only sold at the end."""
    folder, chance = tmp_path_factory.mktemp("shop"), random.Random(0)
    groups = {f"{group}-{number}": f"g{group}" for group in range(NUM_GROUPS) for number in range(OLD_PER_GROUP)}
    new = {f"{group}-new{number}": f"g{group}" for group in range(NUM_GROUPS) for number in range(NEW_PER_GROUP)}
    rows = []
    for user in range(240):
        group = user % NUM_GROUPS
        for time in range(20):
            number = chance.randrange(OLD_PER_GROUP)
            name = f"{group}-{number}"
            if time >= 16 and chance.random() < 0.3:
                name = f"{group}-new{chance.randrange(NEW_PER_GROUP)}"
            rows.append((str(user), name, time))
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), folder / "log.parquet")
    names = [*groups, *new, "0-unsold"]
    table = {
        "item_id": names,
        "group": [*groups.values(), *new.values(), "g0"],
        "title": [f"Title of {n}" for n in names],
    }
    pq.write_table(pa.table(table), folder / "items.parquet")
    prepare(
        folder / "log.parquet",
        folder / "data",
        items=folder / "items.parquet",
        item_features=["group"],
        split="temporal",
        validation_cut=16,
        test_cut=18,
        filter_seen_items=False,
    )
    train_prepared(
        folder / "data",
        arguments(folder / "model", num_train_epochs=6, eval_steps=0.1, save_steps=0.1),
        hidden_size=32,
        intermediate_size=64,
    )
    return folder


@pytest.fixture
def model(shop, tmp_path):
    return shutil.copytree(shop / "model", tmp_path / "model")


def test_new_items_are_recommended_to_those_who_like_their_group(shop):
    recommend = pipeline("sequential-recommendation", model=str(shop / "model"))
    tokenizer = recommend.tokenizer
    assert {f"{group}-new0" for group in range(NUM_GROUPS)} <= set(tokenizer.items)
    assert "0-unsold" in tokenizer.items
    assert tokenizer.title("3-new1") == "Title of 3-new1"
    new = [item for item in tokenizer.items if "new" in item]
    for group in range(NUM_GROUPS):
        history = [f"{group}-{number}" for number in (1, 4, 2, 7, 3)]
        found = [entry["item_id"] for entry in recommend({"history": history, "candidates": new}, top_k=2)]
        assert sorted(found) == [f"{group}-new0", f"{group}-new1"]
        found = [entry["item_id"] for entry in recommend([f"{group}-new0", f"{group}-new1"], top_k=8)]
        assert sum(item.startswith(f"{group}-") for item in found) >= 6  # a new item says what its group says


def test_the_folder_says_what_was_chosen(shop):
    record = json.loads((shop / "model" / "new_items.json").read_text())
    assert record["num_new_items"] == NUM_GROUPS * NEW_PER_GROUP + 1
    assert record["explained"] > 0.5
    assert record["num_targets"] > 20
    assert pq.read_table(shop / "model" / "items.parquet").num_rows == NUM_GROUPS * 10 + 1
    offsets = [trade["offset"] for trade in record["trades"]]
    assert offsets[0] is None
    assert offsets[1:] == sorted(offsets[1:])
    assert record["offset"] in offsets
    config = json.loads((shop / "model" / "config.json").read_text())
    assert config["new_item_offset"] == record["offset"]
    assert (shop / "model" / "new_items.png").read_bytes().startswith(b"\x89PNG")
    card = (shop / "model" / "README.md").read_text()
    assert "![The trade of new items](new_items.png)" in card
    assert f"HR@10 of {record['num_targets']} new targets" in card
    assert "61 of 61 items have it" in card
    assert "scores are arbitrary" not in card
    recipe = (shop / "model" / "recipe.yaml").read_text()
    assert "num_item_features" not in recipe
    curve = json.loads((shop / "model" / "training.json").read_text())
    assert curve["protocol"]["candidates"] == "all 48 items"
    evaluation = json.loads((shop / "model" / "evaluation.json").read_text())
    assert evaluation[0]["protocol"]["candidates"] == "all 61 items"


def test_features_do_not_train_where_items_have_many_events(shop):
    (checkpoint, *_) = (shop / "model").glob("checkpoint-*")
    assert "item_projection.weight" not in load_file(checkpoint / "model.safetensors")
    assert "item_projection.weight" in load_file(shop / "model" / "model.safetensors")


def test_new_targets_are_found_at_last(shop):
    model = Bert4RecForMaskedItemPrediction.from_pretrained(shop / "model").eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(shop / "model")
    histories, _, _ = read_prepared(shop / "data", tokenizer)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    trades, number = trade_new_items(model, tokenizer, rows)
    assert number > 20
    assert max(trade.new_item_hit_rate for trade in trades) > 0.8
    assert trades[0].new_item_hit_rate == 0


def test_the_trade_is_that_of_ranking_anew_with_each_offset(shop):
    model = Bert4RecForMaskedItemPrediction.from_pretrained(shop / "model").eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(shop / "model")
    histories, _, _ = read_prepared(shop / "data", tokenizer)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False)
    trades, _ = trade_new_items(model, tokenizer, rows)
    for trade in trades[1::6]:
        set_offset(model, tokenizer, trade.offset)
        ranks = []
        for row in rows:
            inputs = torch.tensor([row["input_ids"]])
            limits = {"history_ids": torch.tensor([row["history_ids"] or [0]])}
            ranks.append(int(model.rank(inputs, torch.tensor([row["labels"][-1]]), **limits)))
        ranks = np.array(ranks)
        gains = np.where((ranks > 0) & (ranks <= 10), 1 / np.log2(1 + np.maximum(ranks, 1)), 0)
        assert trade.ndcg == pytest.approx(gains.mean(), abs=2e-3)


def test_the_highest_offset_that_costs_a_hundredth_is_chosen():
    trades = [Trade(None, 0.1, 0), Trade(-1.0, 0.1, 0), Trade(0.5, 0.0995, 0.1), Trade(1.0, 0.0985, 0.2)]
    assert choose_offset(trades, 0.0) == 0.5
    assert choose_offset([Trade(None, 0.1, 0), Trade(-1.0, 0.05, 0.5), Trade(0.0, 0.01, 0.6)], 0.0) == -1.0
    assert choose_offset([Trade(None, 0.1, 0)], 0.25) == 0.25


def test_items_are_added_changed_and_withdrawn(model, tmp_path):
    rows = {
        "item_id": ["2-fresh", "1-1", "0-0"],
        "group": ["g2", "g1", "g0"],
        "title": ["Fresh", "Renamed", None],
        "withdrawn": [False, False, True],
    }
    pq.write_table(pa.table(rows), tmp_path / "update.parquet")
    before = Bert4RecTokenizer.from_pretrained(model)
    old = Bert4RecForMaskedItemPrediction.from_pretrained(model)
    record = update_items(model, tmp_path / "update.parquet")
    assert (record["num_new"], record["num_changed"], record["num_withdrawn"]) == (1, 1, 1)
    recommend = pipeline("sequential-recommendation", model=str(model))
    assert recommend.tokenizer.items[:-1] == before.items
    assert recommend.tokenizer.title("1-1") == "Renamed"
    assert recommend.tokenizer.title("0-0") == "Title of 0-0"
    new = recommend(
        {"history": ["2-1", "2-2", "2-3"], "candidates": ["2-fresh", "1-new0", "3-new0", "0-unsold"]}, top_k=1
    )
    assert new[0]["item_id"] == "2-fresh"
    found = [entry["item_id"] for entry in recommend(["0-1", "0-0"], top_k=60)]
    assert "0-0" not in found
    assert len(found) == 60
    torch.testing.assert_close(recommend.model.item_vectors()[1:61], old.item_vectors()[1:])
    table = pq.read_table(model / "items.parquet").to_pydict()
    assert len(table["item_id"]) == 62
    assert dict(zip(table["item_id"], table["title"], strict=True))["2-fresh"] == "Fresh"
    # Taken back.
    pq.write_table(pa.table({"item_id": ["0-0"], "withdrawn": [False]}), tmp_path / "back.parquet")
    assert update_items(model, tmp_path / "back.parquet")["num_withdrawn"] == 0
    recommend = pipeline("sequential-recommendation", model=str(model))
    assert "0-0" in [entry["item_id"] for entry in recommend(["0-1", "0-0"], top_k=62)]


def test_rows_of_json_get_the_types_that_the_columns_have(model, tmp_path):
    """The types of a few rows alone would be others: a title of digits is no number, and an empty list has no type."""
    first = {"item_id": ["0-0"], "title": ["T"], "tags": [["a"]], "sizes": [[1, 2]], "price": [1.5], "sale": [True]}
    pq.write_table(pa.table(first), tmp_path / "first.parquet")
    update_items(model, tmp_path / "first.parquet")
    types = {field.name: field.type for field in pq.read_schema(model / "items.parquet")}
    rows = [
        {"item_id": "0-1", "title": "1984", "tags": [1, 2], "sizes": []},
        {"item_id": "0-2", "title": None, "tags": None, "price": None, "sale": None},
    ]
    for row in rows:
        (tmp_path / "row.jsonl").write_text(json.dumps(row))
        update_items(model, tmp_path / "row.jsonl")
    table = pq.read_table(model / "items.parquet")
    assert {field.name: field.type for field in table.schema} == types
    found = {row["item_id"]: row for row in table.to_pylist()}
    assert (found["0-1"]["title"], found["0-1"]["tags"], found["0-1"]["sizes"]) == ("1984", ["1", "2"], [])
    assert (found["0-2"]["tags"], found["0-2"]["sale"], found["0-0"]["sizes"]) == (None, None, [1, 2])
    (tmp_path / "row.jsonl").write_text('{"item_id": "0-3", "sizes": [1, 2.5]}')
    before = (model / "items.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"column 'sizes' of the new item table is list.*double.*, and list.*int64"):
        update_items(model, tmp_path / "row.jsonl")
    assert (model / "items.parquet").read_bytes() == before


def test_the_offset_is_the_users_choice(model):
    assert update_items(model, new_item_offset=50.0)["offset"] == 50.0
    recommend = pipeline("sequential-recommendation", model=str(model))
    assert all("new" in entry["item_id"] or "unsold" in entry["item_id"] for entry in recommend(["1-1"], top_k=5))
    update_items(model, new_item_offset=-50.0)
    recommend = pipeline("sequential-recommendation", model=str(model))
    assert not any("new" in entry["item_id"] for entry in recommend(["1-1"], top_k=48))


def test_a_model_without_features_learns_to_make_vectors(shop, tmp_path):
    prepare(
        shop / "log.parquet",
        tmp_path / "plain",
        split="temporal",
        validation_cut=16,
        test_cut=18,
        filter_seen_items=False,
    )
    train_prepared(
        tmp_path / "plain", arguments(tmp_path / "model", num_train_epochs=4), hidden_size=32, intermediate_size=64
    )
    assert not (tmp_path / "model" / "new_items.json").exists()
    record = update_items(tmp_path / "model", data=shop / "data", output=tmp_path / "with")
    assert record["num_new"] == NUM_GROUPS * NEW_PER_GROUP + 1
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "with"))
    new = [item for item in recommend.tokenizer.items if "new" in item]
    found = recommend({"history": ["4-1", "4-2", "4-3"], "candidates": new}, top_k=2)
    assert sorted(entry["item_id"] for entry in found) == ["4-new0", "4-new1"]
    assert json.loads((tmp_path / "with" / "new_items.json").read_text())["num_targets"] > 0
    assert not (tmp_path / "model" / "items.parquet").exists()  # the given folder stays


@pytest.mark.parametrize("num_train_epochs", [0, 1])
def test_a_model_that_is_trained_further_keeps_its_features(shop, model, tmp_path, num_train_epochs):
    train_prepared(shop / "data", arguments(tmp_path / "further", num_train_epochs=num_train_epochs), str(model))
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "further"))
    assert len(recommend.tokenizer.items) == 61
    new = [item for item in recommend.tokenizer.items if "new" in item]
    found = recommend({"history": ["4-1", "4-2", "4-3"], "candidates": new}, top_k=2)
    assert sorted(entry["item_id"] for entry in found) == ["4-new0", "4-new1"]


def test_on_the_command_line(shop, model, tmp_path):
    words = ("--items", shop / "items.parquet", "--item_features", "group", "--split", "temporal")
    prepared = succeed("prepare", shop / "log.parquet", "--output", tmp_path / "data", *words)
    assert "item features: group: category, 6 values; 61 of 61 items have it" in prepared
    (tmp_path / "update.csv").write_text("item_id,group\n5-late,g5\n")
    updated = succeed("update-items", model, "--items", tmp_path / "update.csv")
    assert updated[0].startswith("1 items added, 0 changed; 0 are withdrawn; offset of new items ")
    assert fail("update-items", model).endswith("nothing to do: give --items, --data or --new_item_offset")
    (tmp_path / "bad.csv").write_text("item_id,withdrawn\n1-1,perhaps\n")
    failed = fail("update-items", model, "--items", tmp_path / "bad.csv")
    assert "the column withdrawn must be true or false in every row" in failed
    failed = fail("update-items", model, "--items", tmp_path / "typo.csv")
    assert "there is no file" in failed  # the table of the folder does not stand in for it
    fail("update-items", tmp_path / "nowhere", "--items", tmp_path / "update.csv")
