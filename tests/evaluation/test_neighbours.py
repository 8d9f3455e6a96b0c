"""The baselines session kNN, item kNN and EASE, against loops and NumPy."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from bert4rec_hf import Bert4RecTokenizer
from bert4rec_hf.data.histories import Histories, tokenize_histories
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.evaluation import neighbours
from bert4rec_hf.evaluation.baselines import baseline_ranks
from bert4rec_hf.evaluation.neighbours import ease, history_knn, item_knn, shared_users

NUM_ITEMS, FIRST, SIZE = 12, 3, 15


def random_histories(num_users: int = 40) -> tuple[Histories, list[list[int]]]:
    """Histories of random items with repeats, and the training part of each, as token ids."""
    chance = np.random.default_rng(0)
    rows = [
        [int(item) for item in chance.integers(0, NUM_ITEMS, chance.integers(1, 9))] for _ in range(num_users - 1)
    ] + [[]]
    items = [f"{number:02}" for number in range(NUM_ITEMS)]
    starts = chance.permutation(num_users)
    times = [[1000 * int(start) + place for place in range(len(row))] for start, row in zip(starts, rows, strict=True)]
    table = pa.table({
        "user_id": pa.array([str(user) for user in range(num_users)]),
        "item_id": pa.array([[items[item] for item in row] for row in rows], pa.list_(pa.string())),
        "train_end": pa.array([max(0, len(row) - 1) for row in rows], pa.int32()),
        "validation_position": pa.array([len(row) - 1 if len(row) > 1 else None for row in rows], pa.int32()),
        "test_position": pa.array([None] * num_users, pa.int32()),
        "timestamp": pa.array(times, pa.list_(pa.int64())),
    })  # fmt: skip
    histories = tokenize_histories(table, Bert4RecTokenizer.from_items(items, model_max_length=10))
    return histories, [[item + FIRST for item in row[:-1]] for row in rows]


@pytest.mark.parametrize("counts_at_once", [1, 50, 2**24])
def test_shared_users_are_counted_once_each(monkeypatch, counts_at_once):
    monkeypatch.setattr(neighbours, "COUNTS_AT_ONCE", counts_at_once)
    histories, trained = random_histories()
    expected = np.zeros((SIZE, SIZE))
    for row in trained:
        for one in set(row):
            for other in set(row):
                expected[one, other] += 1
    assert shared_users(histories, NUM_ITEMS).numpy() == pytest.approx(expected)


def test_item_knn_sums_the_cosines_of_the_nearest_items(monkeypatch):
    monkeypatch.setattr(neighbours, "ITEM_NEIGHBOURS", 4)
    histories, trained = random_histories()
    has = np.array([[item in row for item in range(SIZE)] for row in trained], float)
    lengths = np.maximum(np.sqrt(has.sum(0)), 1)
    cosines = has.T @ has / lengths / lengths[:, None]
    np.fill_diagonal(cosines, 0)
    for row in cosines:
        row[row < np.sort(row)[-4]] = 0
    found = item_knn(shared_users(histories, NUM_ITEMS))(torch.tensor([[0, 5, 7], [9, 9, 4]]))
    assert found.numpy() == pytest.approx(np.stack([cosines[[5, 7]].sum(0), cosines[[9, 4]].sum(0)]), abs=1e-6)


def test_ease_is_the_closed_form_of_its_paper():
    histories, trained = random_histories()
    has = np.array([[item in row for item in range(SIZE)] for row in trained], float)
    inverse = np.linalg.inv(has.T @ has + neighbours.EASE_REGULARISATION * np.eye(SIZE))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    found = ease(shared_users(histories, NUM_ITEMS))(torch.tensor([[0, 5, 7], [9, 9, 4]]))
    assert found.numpy() == pytest.approx(np.stack([weights[[5, 7]].sum(0), weights[[9, 4]].sum(0)]), abs=1e-6)


def test_session_knn_scores_the_items_of_similar_histories(monkeypatch):
    monkeypatch.setattr(neighbours, "MATCHED_ITEMS", 3)
    histories, trained = random_histories()
    history = [9, 4, 11, 4, 7]
    ages = {7: 0, 4: 1, 11: 2}  # 9 is older than the newest three items
    similar = []
    for user, row in enumerate(trained):
        shared = set(row) & ages.keys()
        weight = sum(1 - ages[item] / 3 for item in shared)
        if shared:
            similar.append((weight / math.sqrt(len(set(row))), user, min(ages[item] for item in shared)))
    similar.sort(reverse=True)
    # No tie decides which histories are the neighbours.
    number = next(number for number in range(5, 20) if similar[number - 1][0] > similar[number][0] + 1e-6)
    monkeypatch.setattr(neighbours, "HISTORY_NEIGHBOURS", number)
    expected = np.zeros(SIZE)
    for value, user, age in similar[:number]:
        for item in set(trained[user]):
            expected[item] += value / (1 + age)
    item_ids, values = history_knn(histories, NUM_ITEMS)(torch.tensor([[0, 0, *history], [0] * 7]))
    found = np.zeros((2, SIZE))
    np.put_along_axis(found, item_ids.numpy(), values.numpy(), axis=1)
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert not found[1].any()
    assert item_ids[0].tolist() == sorted(set(item_ids[0].tolist()))


def test_only_the_newest_histories_with_an_item_become_neighbours(monkeypatch):
    monkeypatch.setattr(neighbours, "NEWEST_HISTORIES_OF_AN_ITEM", 1)
    histories, trained = random_histories()
    ends = {
        user: histories.timestamps[histories.offsets[user] + len(row) - 1] for user, row in enumerate(trained) if row
    }
    newest = max((user for user, row in enumerate(trained) if 5 in row), key=lambda user: ends[user])
    item_ids, _ = history_knn(histories, NUM_ITEMS)(torch.tensor([[5]]))
    assert set(item_ids[0].tolist()) == set(trained[newest])


def test_only_the_newest_items_of_a_neighbour_are_scored(monkeypatch):
    histories, trained = random_histories()
    longest = max(range(len(trained)), key=lambda user: len(set(trained[user])))
    item_ids, values = history_knn(histories.select(np.arange(len(histories)) == longest), NUM_ITEMS)(
        torch.tensor([trained[longest][-1:]])
    )
    monkeypatch.setattr(neighbours, "NEWEST_ITEMS_OF_A_NEIGHBOUR", 2)
    newest_ids, newest_values = history_knn(histories.select(np.arange(len(histories)) == longest), NUM_ITEMS)(
        torch.tensor([trained[longest][-1:]])
    )
    assert item_ids.shape[1] > 2
    assert newest_ids[0].tolist() == sorted(list(dict.fromkeys(reversed(trained[longest])))[:2])
    assert newest_values[0].tolist() == values[0, :2].tolist()  # the norm is that of the whole history


def test_padding_is_not_summed_since_beside_a_long_history_it_would_be_most_of_the_work():
    table = torch.rand(SIZE, SIZE)
    table[0] = torch.nan  # which would stay NaN with a weight of 0
    found = neighbours._sum_of_rows(table, torch.tensor([[0, 0, 0, 5], [4, 4, 4, 4], [0, 0, 0, 0]]))
    assert torch.equal(found, torch.stack((table[5], table[4], torch.zeros(SIZE))))


def test_a_large_catalogue_has_no_square_matrix(monkeypatch):
    histories, _ = random_histories()
    tokenizer = Bert4RecTokenizer.from_items([f"{number:02}" for number in range(NUM_ITEMS)], model_max_length=10)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=True)
    assert {"session kNN", "item kNN", "EASE"} <= baseline_ranks(rows, histories, NUM_ITEMS).keys()
    monkeypatch.setattr("bert4rec_hf.evaluation.baselines.MAX_ITEMS_OF_A_MATRIX", NUM_ITEMS - 1)
    found = baseline_ranks(rows, histories, NUM_ITEMS)
    assert "session kNN" in found
    assert not {"item kNN", "EASE"} & found.keys()


def test_seen_items_are_left_out_and_ties_go_to_the_more_popular():
    histories, trained = random_histories()
    tokenizer = Bert4RecTokenizer.from_items([f"{number:02}" for number in range(NUM_ITEMS)], model_max_length=10)
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=True)
    scores = item_knn(shared_users(histories, NUM_ITEMS))
    counts = np.bincount([item for row in trained for item in row], minlength=SIZE)
    expected = []
    for history, excluded, labels in zip(rows["history_ids"], rows["exclude_ids"], rows["labels"], strict=True):
        target, values = max(labels), scores(torch.tensor([[*history]]))[0].double().tolist()
        keys = {item: (values[item], counts[item]) for item in range(FIRST, SIZE) if item not in excluded}
        expected.append(sum(key >= keys[target] for key in keys.values()) if target in keys else 0)
    assert 0 in expected
    assert baseline_ranks(rows, histories, NUM_ITEMS)["item kNN"].tolist() == expected
