"""From a prepared folder to training and ranking rows."""

import pyarrow as pa
import pytest

from bert4rec_hf import Bert4RecTokenizer, ranking_rows, read_prepared, training_rows
from bert4rec_hf.splits import tokenize_histories


@pytest.fixture
def tokenizer():
    return Bert4RecTokenizer.from_items("abcdef", model_max_length=4)


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
    rows = training_rows(histories, max_length=3, windows_in_proportion=True)
    assert rows["user_id"] == ["long", "long", "short"]


def test_ranking_rows_are_what_serving_gets(histories, tokenizer):
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    assert rows["user_id"] == ["long", "fresh"]
    # The newest three items and [MASK]; the validation item is part of the test history.
    assert rows["input_ids"] == [[5, 6, 7, 1], [4, 1]]
    # The target of "fresh" is unknown to the catalogue.
    assert rows["labels"] == [[-100, -100, -100, 8], [-100, -100]]
    # The whole history, not the window.
    assert rows["exclude_ids"] == [[3, 4, 5, 6, 7], [4]]
    assert rows["history_length"] == [6, 1]


def test_a_user_without_a_past_is_ranked_from_a_lone_mask(histories, tokenizer):
    rows = ranking_rows(histories, tokenizer, "validation", filter_seen_items=False)
    assert rows["input_ids"][1] == [1]
    assert rows["labels"][1] == [4]
    assert rows["exclude_ids"] == [[], []]


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
