"""Columns of an item table to numbers, numbers to vectors, new and withdrawn items in a model."""

import datetime
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.model.item_features import ItemFeatures, fit_projection, select_rows


def dense(features, values, number):
    places, found, starts = features.rows(values, number)
    table = torch.zeros(number, features.size)
    for item in range(number):
        part = slice(int(starts[item]), int(starts[item + 1]))
        table[item].index_add_(0, places[part], found[part])
    return table


def test_each_kind_has_the_numbers_that_it_promises():
    columns = [
        {"name": "brand", "kind": "category"},
        {"name": "genres", "kind": "categories", "separator": "|"},
        {"name": "price", "kind": "number"},
        {"name": "new", "kind": "boolean"},
        {"name": "look", "kind": "vector"},
    ]
    values = {
        "brand": ["a", "a", "b", None],
        "genres": ["x|y", "x", "y | x", ""],
        "price": [1.0, 3.0, None, 5.0],
        "new": [True, False, True, None],
        "look": [[3.0, 0.0], [0.0, 3.0], None, [3.0, 3.0]],
    }
    features = ItemFeatures.fit(columns, values)
    deviation = math.sqrt(8 / 3)
    half = 0.5**0.5
    size = math.sqrt((9 + 9 + 9 + 9) / 6)
    expected = [
        # 1 | a, other, missing | x, y, other, missing | price, missing | new, missing | look, missing
        [1, 1, 0, 0, half, half, 0, 0, -2 / deviation, 0, 1, 0, 3 / size, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, -1, 0, 0, 3 / size, 0],
        [1, 0, 1, 0, half, half, 0, 0, 0, 1, 1, 0, 0, 0, 1],
        [1, 0, 0, 1, 0, 0, 0, 1, 2 / deviation, 0, 0, 1, 3 / size, 3 / size, 0],
    ]
    torch.testing.assert_close(dense(features, values, 4), torch.tensor(expected))


def test_an_unknown_value_is_the_rare_one_and_a_lacking_column_is_missing():
    features = ItemFeatures.fit([{"name": "brand", "kind": "category"}], {"brand": ["a", "a", "b"]})
    assert dense(features, {"brand": ["never seen"]}, 1).tolist() == [[1, 0, 1, 0]]
    assert dense(features, {}, 1).tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["categories", "vector"])
def test_an_empty_list_is_a_missing_value(kind):
    with pytest.raises(ValueError, match="item feature 'x' has no value for any item that trains: leave it out"):
        ItemFeatures.fit([{"name": "x", "kind": kind}], {"x": [[], [None], None]})


def test_skewed_numbers_are_logarithms_and_a_typing_error_is_cut():
    values = [1.0] * 50 + [10_000.0]
    features = ItemFeatures.fit([{"name": "price", "kind": "number"}], {"price": values})
    assert features.columns[0]["logarithm"]
    assert not ItemFeatures.fit([{"name": "p", "kind": "number"}], {"p": [1, 2, 3]}).columns[0]["logarithm"]
    logarithms = np.log1p(values)
    of_zero = -logarithms.mean() / logarithms.std()  # the logarithm of a negative number is that of 0
    assert dense(features, {"price": [1e300, -1e300]}, 2)[:, 1].tolist() == [5.0, pytest.approx(of_zero, rel=1e-5)]


def test_dates_are_numbers_and_infinite_ones_are_refused():
    days = [datetime.date(2024, 1, 1), datetime.date(2024, 1, 3)]
    features = ItemFeatures.fit([{"name": "day", "kind": "number"}], {"day": days})
    assert dense(features, {"day": days}, 2)[:, 1].tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match=r"'day': expected finite numbers; got inf"):
        features.rows({"day": [math.inf]}, 1)
    with pytest.raises(ValueError, match=r"'day': expected finite numbers; got 'soon'"):
        features.rows({"day": ["soon"]}, 1)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("boolean", "perhaps", "expected true or false; got 'perhaps'"),
        ("vector", [1.0], "expected lists of 2 finite numbers; got"),
        ("vector", [1.0, math.nan], "expected lists of 2 finite numbers; got"),
        ("categories", 3, "expected a list of values; got 3"),
        ("category", ["a"], "expected one value; got"),
    ],
)
def test_a_value_of_another_kind_is_an_error_that_names_the_column(kind, value, message):
    good = {"boolean": [True], "vector": [[1.0, 2.0]], "categories": [["a"]], "category": ["a"]}[kind]
    features = ItemFeatures.fit([{"name": "thing", "kind": kind}], {"thing": good})
    with pytest.raises(ValueError, match=f"'thing': {message}"):
        features.rows({"thing": [value]}, 1)


def test_the_json_has_everything():
    columns = [{"name": "genres", "kind": "categories", "separator": ";"}, {"name": "v", "kind": "vector"}]
    values = {"genres": ["a;b", "b;a"], "v": [[1.0, 2.0], [3.0, 4.0]]}
    features = ItemFeatures.fit(columns, values)
    again = ItemFeatures.from_json(features.to_json())
    torch.testing.assert_close(dense(again, values, 2), dense(features, values, 2))


def test_the_projection_is_ridge_regression():
    torch.manual_seed(0)
    values = [float(number) for number in torch.randn(60)]
    features = ItemFeatures.fit([{"name": "x", "kind": "number"}], {"x": values})
    rows = features.rows({"x": values}, 60)
    targets = torch.randn(60, 4)
    counts = torch.randint(1, 20, (60,)).float()
    weights, penalty, _ = fit_projection(rows, targets, counts)
    matrix = dense(features, {"x": values}, 60)[:, : len(weights)].double()
    share = (counts / (counts + 5)).double().unsqueeze(1)
    mean = (targets.double() * share).sum(0) / share.sum()
    gram = matrix.T @ (share * matrix) + penalty * torch.eye(len(weights)).double()
    expected = torch.linalg.solve(gram, matrix.T @ (share * (targets.double() - mean)))
    expected[0] += mean
    torch.testing.assert_close(weights.double(), expected, atol=2e-3, rtol=0)


def test_the_projection_finds_vectors_that_follow_from_the_features():
    torch.manual_seed(0)
    names = [f"brand {number % 7}" for number in range(350)]
    features = ItemFeatures.fit([{"name": "brand", "kind": "category"}], {"brand": names})
    of_brand = torch.randn(7, 9)
    targets = of_brand[torch.arange(350) % 7] + 0.01 * torch.randn(350, 9)
    rows = features.rows({"brand": names}, 350)
    weights, penalty, explained = fit_projection(rows, targets, torch.full((350,), 100.0))
    assert penalty == 1.0
    assert explained > 0.98
    chosen = select_rows(rows, torch.arange(350) < 7)
    assert len(chosen[2]) == 8
    assert len(weights) <= features.size


@pytest.fixture
def model_and_tokenizer():
    items = [f"item {number}" for number in range(40)]
    tokenizer = Bert4RecTokenizer.from_items(items, counts=dict.fromkeys(items, 3))
    tokenizer.item_features = ItemFeatures.fit(
        [{"name": "brand", "kind": "category"}], {"brand": [f"b{number % 4}" for number in range(40)]}
    )
    torch.manual_seed(0)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_item_features=tokenizer.item_features.size, new_item_offset=0.5
    )
    model = Bert4RecForMaskedItemPrediction(config).eval()
    model.item_projection.weight = torch.randn(tokenizer.item_features.size, 17)
    return model, tokenizer


@pytest.mark.parametrize("kind", [dict, pa.table, pd.DataFrame])
def test_new_items_of_a_table_get_the_vectors_of_their_features(model_and_tokenizer, kind):
    model, tokenizer = model_and_tokenizer
    old = model.item_vectors().clone()
    table = kind({"item_id": ["new", "item 3", "other"], "brand": ["b1", "b1", None], "title": ["New", "Three", None]})
    assert model.add_items(tokenizer, table) == 2
    weight = model.item_projection.weight
    places = tokenizer.item_features.columns[0]["values"].index("b1")
    vectors = model.item_vectors()
    torch.testing.assert_close(vectors[:40], old)
    for place, column in ((40, 1 + places), (41, weight.shape[0] - 1)):
        expected = weight[0] + weight[column]
        expected[-1] += 0.5
        torch.testing.assert_close(vectors[place], expected)
    assert tokenizer.title("new") == "New"
    assert tokenizer.title("item 3") == "Three"
    # A new item is recommended and may be in a history at once.
    batch = tokenizer([["new", "item 1"]], return_tensors="pt")
    _, found = model.recommend(batch["input_ids"], top_k=42)
    assert {40 + 3, 41 + 3} <= set(found[0].tolist())


def test_a_table_that_does_not_fit_changes_nothing(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    with pytest.raises(ValueError, match="'brand': expected one value"):
        model.add_items(tokenizer, {"item_id": ["new"], "brand": [["b1"]]})
    with pytest.raises(ValueError, match="needs the column item_id; got brand"):
        model.add_items(tokenizer, {"brand": ["b1"]})
    with pytest.raises(ValueError, match="expected a table with item_id and brand; got the columns item_id"):
        model.add_items(tokenizer, {"item_id": ["new"]})
    assert len(tokenizer) == model.config.vocab_size == 43


def test_ids_alone_still_get_the_mean(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    mean = model.item_vectors().mean(0)
    model.add_items(tokenizer, ["new"])
    torch.testing.assert_close(model.item_vectors()[40], mean)


def test_features_and_projection_are_in_the_folder(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path)
    other = Bert4RecTokenizer.from_pretrained(tmp_path)
    table = {"item_id": ["new"], "brand": ["b2"]}
    again.add_items(other, table)
    model.add_items(tokenizer, table)
    assert torch.equal(again.item_vectors(), model.item_vectors())
    half = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.add_items(Bert4RecTokenizer.from_pretrained(tmp_path), table)
    torch.testing.assert_close(half.item_vectors(), model.item_vectors(), atol=0.05, rtol=0.02)


def test_a_withdrawn_item_is_never_recommended_but_still_read():
    tokenizer = Bert4RecTokenizer.from_items([f"item {number}" for number in range(30)])
    torch.manual_seed(1)
    config = Bert4RecConfig(vocab_size=33, hidden_size=16, repeat_weight=5.0)
    model = Bert4RecForMaskedItemPrediction(config).eval()
    batch = tokenizer([["item 1", "item 2"]], return_tensors="pt")
    before_scores, before = model.recommend(batch["input_ids"], top_k=30)
    best = before[0, 0].item()
    model.config.withdrawn_item_ids = [best]
    scores, found = model.recommend(batch["input_ids"], top_k=30)
    assert found[0, :29].tolist() == before[0, 1:].tolist()
    torch.testing.assert_close(scores[0, :29], before_scores[0, 1:])  # the history is read as it was
    assert found[0, 29] == 0
    assert model.rank(batch["input_ids"], torch.tensor([best])).tolist() == [0]
    _, candidates = model.recommend(batch["input_ids"], candidate_ids=torch.tensor([best, before[0, 5].item()]))
    assert candidates[0, 0] == before[0, 5]
    _, similar = model.similar_items(torch.tensor([before[0, 3].item()]), top_k=30)
    assert best not in similar[0].tolist()
    assert model.item_vectors()[best - 3, -1] == -1e4


def test_the_config_refuses_what_is_no_item():
    with pytest.raises(ValueError, match="withdrawn_item_ids must be token ids of items; got 2"):
        Bert4RecConfig(vocab_size=10, withdrawn_item_ids=[2])
    with pytest.raises(ValueError, match="num_item_features must be at least 0; got -1"):
        Bert4RecConfig(num_item_features=-1)


def test_random_tables_never_fail_outside_of_value_errors():
    random = np.random.default_rng(0)
    pool = [
        None,
        "",
        " ",
        "a",
        "a|b",
        "|",
        1,
        -1.5,
        math.nan,
        math.inf,
        True,
        [],
        ["a", None],
        [1.0],
        {},
        b"x",
        "é" * 50,
    ]
    for _ in range(300):
        kind = random.choice(["category", "categories", "number", "boolean", "vector"])
        values = [pool[place] for place in random.integers(len(pool), size=6)]
        column = {"name": "c", "kind": str(kind), "separator": "|"}
        message = ""
        try:
            rows = ItemFeatures.fit([column], {"c": values}).rows({"c": values}, 6)
        except ValueError as error:
            message = str(error)
        assert "'c'" in message or (rows[1].isfinite().all() and rows[2][-1] == len(rows[0]) == len(rows[1]))
