"""From a prepared folder to training and ranking rows."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

import bert4rec_hf.data.rows
from bert4rec_hf import Bert4RecTokenizer, ranking_rows, read_prepared, training_rows
from bert4rec_hf.data.histories import Histories, tokenize_histories
from bert4rec_hf.data.rows import sampled_candidates, update_rows


@pytest.fixture
def tokenizer():
    return Bert4RecTokenizer.from_items(list("abcdef"), model_max_length=4)


@pytest.fixture
def histories(tokenizer):
    return tokenize_histories(
        pa.table(
            {
                "user_id": ["long", "short", "fresh"],
                "item_id": [["a", "b", "x", "c", "d", "e", "f"], ["a"], ["b", "y"]],
                "train_end": pa.array([5, 1, 0], pa.int32()),
                "validation_position": pa.array([5, None, 0], pa.int32()),
                "test_position": pa.array([6, None, 1], pa.int32()),
            }
        ),
        tokenizer,
    )


def test_training_rows_hold_the_training_part_without_unknown_items(histories):
    rows = training_rows(histories)
    assert rows["user_id"] == ["long", "short"]
    assert rows["input_ids"] == [[3, 4, 5, 6], [3]]


def test_windows_in_proportion_repeat_a_long_history(histories):
    rows = training_rows(histories, max_length=3, windows="proportional")
    assert rows["user_id"] == ["long", "long", "short"]


def test_sliding_windows_are_counted_back_from_the_newest_and_the_oldest_is_as_long(histories):
    rows = training_rows(histories, max_length=3, windows="sliding", window_step=0.7)
    assert rows["user_id"] == ["long", "long", "short"]
    assert rows["input_ids"] == [[4, 5, 6], [3, 4, 5], [3]]
    rows = training_rows(histories, max_length=2, windows="sliding", window_step=0.5)
    assert rows["input_ids"] == [[5, 6], [4, 5], [3, 4], [3]]


def test_an_update_trains_on_the_histories_with_new_events_and_on_as_many_old_rows(tokenizer):
    items = [list("abcdef"), list("fedcba"), ["c"], ["a", "b"]]
    histories = tokenize_histories(
        pa.table(
            {
                "user_id": ["some", "most", "old", "held out"],
                "item_id": items,
                "timestamp": [[1, 2, 3, 4, 5, 11], [1, 2, 11, 12, 13, 14], [10], [10, 20]],
                "train_end": pa.array([6, 6, 1, 1], pa.int32()),
                "validation_position": pa.array([None, None, None, 1], pa.int32()),
                "test_position": pa.array([None] * 4, pa.int32()),
            }
        ),
        tokenizer,
    )
    token_ids = [tokenizer.item_ids_to_token_ids(history) for history in items]
    rows = update_rows(histories, 10, max_length=4)
    # The four new events of "most" are half of its row, which is then its whole history.
    assert rows["user_id"][:2] == ["some", "most"]
    assert rows["input_ids"][:2] == [token_ids[0][-4:], token_ids[1]]
    drawn = set()
    for seed in range(100):
        rows = update_rows(histories, 10, max_length=4, seed=seed)
        assert len(rows) == 4
        drawn |= {(user, tuple(row)) for user, row in zip(rows["user_id"][2:], rows["input_ids"][2:], strict=True)}
    windows = {("some", tuple(token_ids[0][start : start + 4])) for start in range(3)}
    windows |= {("most", tuple(token_ids[1][start : start + 4])) for start in range(3)}
    # The held-out event of the last user is neither new nor old.
    assert drawn == windows | {("old", (token_ids[2][0],)), ("held out", (token_ids[3][0],))}
    assert len(update_rows(histories, 14, max_length=4)) == 0


def test_ranking_rows_are_what_serving_gets(histories, tokenizer):
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    assert rows["user_id"] == ["long", "fresh"]
    # A row has the newest three items and [MASK]. The test history includes the validation item.
    assert rows["input_ids"] == [[5, 6, 7, 1], [4, 1]]
    # The catalogue lacks the target of "fresh".
    assert rows["labels"] == [[-100, -100, -100, 8], [-100, -100]]
    # The whole history is excluded, not only the window.
    assert rows["exclude_ids"] == [[3, 4, 5, 6, 7], [4]]
    assert rows["history_length"] == [6, 1]


def test_a_user_without_a_past_is_ranked_from_a_lone_mask(histories, tokenizer):
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False)
    assert rows["input_ids"][1] == [1]
    assert rows["labels"][1] == [4]
    assert rows["exclude_ids"] == [[], []]


def test_ranking_rows_make_no_list_of_python_objects(monkeypatch):
    monkeypatch.setattr(bert4rec_hf.data.rows, "Dataset", lambda table: table)  # its fingerprint takes memory
    num_users, length = 1000, 200
    tokenizer = Bert4RecTokenizer.from_items(range(1000), model_max_length=length)
    histories = Histories(
        user_id=pa.array(map(str, range(num_users))),
        item_ids=np.random.default_rng(0).integers(3, 1003, num_users * length, np.int32),
        offsets=np.arange(num_users + 1) * length,
        train_end=np.full(num_users, length - 2),
        target_positions={"test": np.full(num_users, length - 1)},
        timestamps=None,
    )
    tracemalloc.start()
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows["input_ids"][7].as_py() == [*histories.item_ids[7 * length : 8 * length - 1], 1]
    assert peak < 30 * num_users * length  # a column takes 4 bytes per item, and a list of numbers 40


def test_ranking_rows_of_nobody_have_the_columns_of_others(histories, tokenizer):
    some = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    histories.target_positions["test"] = np.full(3, -1)
    none = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    assert len(none) == 0
    assert none.features == some.features


def test_more_text_than_one_array_of_strings_holds_is_read():
    many, text = 33, "x" * 2**26  # 64 MiB, 33 times in the table but once in memory
    part = pa.table(
        {
            "user_id": [text],
            "item_id": [["a", text]],
            "train_end": pa.array([0], pa.int32()),
            "validation_position": pa.array([None], pa.int32()),
            "test_position": pa.array([None], pa.int32()),
        }
    )
    last = part.set_column(0, "user_id", [["last"]]).set_column(4, "test_position", [pa.array([1], pa.int32())])
    tokenizer = Bert4RecTokenizer.from_items(list("a"), model_max_length=4)
    histories = tokenize_histories(pa.concat_tables([part] * many + [last]), tokenizer)
    assert histories.item_ids.tolist() == [3, 2] * (many + 1)
    assert histories.offsets.tolist() == list(range(0, 2 * many + 3, 2))
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    assert rows[:] == {
        "user_id": ["last"],
        "input_ids": [[3, 1]],
        "labels": [[-100, -100]],
        "history_ids": [[3]],
        "exclude_ids": [[3]],
        "history_length": [1],
    }


def test_a_folder_that_is_not_prepared_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"is not a prepared folder .*bert4rec prepare"):
        read_prepared(tmp_path)


def test_an_unknown_part_is_an_error(histories, tokenizer):
    with pytest.raises(ValueError, match="validation, test; got 'train'"):
        ranking_rows(histories, tokenizer, "train", filter_seen_items=False)


def test_nothing_to_train_on_is_an_error(tokenizer):
    table = pa.table(
        {
            "user_id": ["u"],
            "item_id": [["a"]],
            "train_end": pa.array([0], pa.int32()),
            "validation_position": pa.array([0], pa.int32()),
            "test_position": pa.array([None], pa.int32()),
        }
    )
    with pytest.raises(ValueError, match="no history has a training part"):
        training_rows(tokenize_histories(table, tokenizer))


def many_users(num_users: int) -> tuple:
    """Ranking rows of users with item 29 in the past and target 1, and their histories.

    In the history of one more user, item k occurs k times.
    """
    tokenizer = Bert4RecTokenizer.from_items((f"{k:02}" for k in range(30)), model_max_length=4)
    log = [f"{k:02}" for k in range(30) for _ in range(k)]
    table = pa.table(
        {
            "user_id": ["log", *(f"user {number}" for number in range(num_users))],
            "item_id": [log] + [["29", "01"]] * num_users,
            "train_end": pa.array([len(log)] + [1] * num_users, pa.int32()),
            "validation_position": pa.array([None] * (num_users + 1), pa.int32()),
            "test_position": pa.array([None] + [1] * num_users, pa.int32()),
        }
    )
    histories = tokenize_histories(table, tokenizer)
    return ranking_rows(histories, tokenizer, "test", filter_seen_items=True), histories


@pytest.mark.parametrize("num_candidates", [2, 5])  # of 27 items: 2 by rejection, 5 by exponential races
def test_sampled_candidates_go_by_popularity_and_are_none_of_the_users_own(num_candidates):
    rows, histories = many_users(3000)
    drawn = np.array(sampled_candidates(rows, histories, num_candidates=num_candidates)["candidate_ids"]) - 3
    assert drawn.shape == (3000, num_candidates)
    assert all(len(set(row)) == num_candidates for row in drawn.tolist())
    assert not np.isin(drawn, [0, 1, 29]).any()  # an item without a count, the target, and the past
    # The first draw of each user is proportional to the counts. The counts of items 2 to 28 sum to 405.
    share = np.bincount(drawn[:, 0], minlength=30) / 3000
    counts = np.arange(30)
    expected = counts * np.isin(counts, [0, 1, 29], invert=True) / sum(range(2, 29))
    assert np.abs(share - expected).max() < 0.02
    assert np.corrcoef(share[2:29], expected[2:29])[0, 1] > 0.9


def test_sampled_candidates_are_the_same_for_one_seed_and_all_that_are_left_if_few_are():
    rows, histories = many_users(20)
    first, again, other = (
        sampled_candidates(rows, histories, num_candidates=5, seed=seed)["candidate_ids"] for seed in (1, 1, 2)
    )
    assert list(first) == list(again) != list(other)
    everything = sampled_candidates(rows, histories, num_candidates=100)["candidate_ids"]
    assert [sorted(row) for row in everything] == [list(range(5, 32))] * 20


def test_windows_are_those_there_are_and_have_a_length(histories):
    with pytest.raises(ValueError, match="windows must be whole, proportional or sliding; got 'newest'"):
        training_rows(histories, windows="newest", max_length=5)
    with pytest.raises(ValueError, match="proportional windows need a max_length"):
        training_rows(histories, windows="proportional")
