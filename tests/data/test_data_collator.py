"""The collator masks for training and pads for ranking. Its random numbers come from torch."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from bert4rec_hf import Bert4RecTokenizer, DataCollatorForMaskedItemPrediction

PAD, MASK, UNK, FIRST = 0, 1, 2, 3
IGNORED = -100
ROWS = [{"input_ids": list(range(3, 3 + length))} for length in (1, 2, 5, 9, 14)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_collator(**options) -> DataCollatorForMaskedItemPrediction:
    tokenizer = Bert4RecTokenizer.from_items((f"{number:03}" for number in range(100)), model_max_length=20)
    return DataCollatorForMaskedItemPrediction(tokenizer, **options)


def labels_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The labels at their positions in the input (batch, length); -100 at other positions."""
    spread = torch.full(batch["input_ids"].shape, IGNORED)
    for row, positions, labels in zip(spread, batch["masked_positions"], batch["labels"], strict=True):
        row[positions[positions >= 0]] = labels[positions >= 0]
        assert (labels[positions < 0] == IGNORED).all()
    return spread


def test_the_share_of_masked_items_is_near_the_mask_ratio():
    for mask_ratio in (0.2, 0.6):
        labels = labels_of(make_collator(mask_ratio=mask_ratio)([{"input_ids": [7] * 20}] * 2000))
        # The standard error over 40000 items is at most .0025.
        assert abs((labels != IGNORED).float().mean() - mask_ratio) < 0.013


def test_every_position_is_masked_equally_often():
    labels = labels_of(make_collator(mask_ratio=0.2)([{"input_ids": [7] * 20}] * 4000))
    # The standard error of each position over 4000 rows is .0063.
    assert ((labels != IGNORED).float().mean(dim=0) - 0.2).abs().max() < 0.035


def test_every_row_that_has_items_has_a_label():
    rows = [{"input_ids": [3] * (1 + number % 9)} for number in range(300)]
    labels = make_collator(mask_ratio=0.01)(rows)["labels"]
    assert ((labels != IGNORED).sum(dim=1) >= 1).all()


def test_the_mask_of_a_row_that_chance_left_without_one_stands_anywhere():
    batch = make_collator(mask_ratio=1e-9)([{"input_ids": [7, 7, 7, 7]}] * 400)
    assert batch["masked_positions"].shape == (400, 1)
    assert (torch.bincount(batch["masked_positions"].flatten(), minlength=4) > 60).all()


def test_padding_and_special_tokens_are_never_masked():
    rows = [{"input_ids": [UNK, 5, MASK, 6]}, {"input_ids": [PAD, 7]}, {"input_ids": [UNK, MASK]}] * 50
    batch = make_collator(mask_ratio=0.99)(rows)
    labels = labels_of(batch)
    labelled = labels != IGNORED
    assert labelled.any(dim=0).tolist() == [False, True, False, True]
    assert (labels[labelled] >= FIRST).all()
    assert batch["input_ids"][0::3, 0].unique().tolist() == [UNK]
    assert batch["input_ids"][1::3, 0].unique().tolist() == [PAD]
    assert batch["attention_mask"][1].tolist() == [0, 1, 0, 0]
    # A row without items has no label.
    assert not labelled[2::3].any()


def test_masked_inputs_are_always_mask_and_labels_the_original():
    batch = make_collator(mask_ratio=0.5)(ROWS)
    labelled = labels_of(batch) != IGNORED
    assert (batch["input_ids"][labelled] == MASK).all()
    restored = torch.where(labelled, labels_of(batch), batch["input_ids"])
    for row, feature in zip(restored.tolist(), ROWS, strict=True):
        history = feature["input_ids"]
        assert row == history + [PAD] * (14 - len(history))
    assert not (batch["input_ids"][~labelled] == MASK).any()
    assert batch["attention_mask"].sum(dim=1).tolist() == [1, 2, 5, 9, 14]
    assert list(batch) == ["input_ids", "attention_mask", "labels", "masked_positions"]
    assert {values.dtype for values in batch.values()} == {torch.long}


def test_masked_positions_say_where_the_labels_are():
    batch = make_collator(mask_ratio=0.5)(ROWS)
    counts = (batch["labels"] != IGNORED).sum(dim=1)
    assert batch["masked_positions"].shape == batch["labels"].shape == (5, counts.max())
    for row, positions, count in zip(batch["input_ids"], batch["masked_positions"], counts, strict=True):
        assert positions[:count].tolist() == (row == MASK).nonzero().flatten().tolist()
        assert (positions[count:] == -1).all()


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.int32)])
def test_histories_may_be_lists_arrays_or_tensors(convert):
    expected = make_collator()(ROWS)
    torch.manual_seed(0)
    batch = make_collator()([{"input_ids": convert(row["input_ids"])} for row in ROWS])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_histories_are_left_as_they_were():
    rows = [{"input_ids": np.array([5, 6, 7])}, {"input_ids": torch.tensor([8, 9, 10])}]
    make_collator(mask_ratio=0.99)(rows)
    assert [row["input_ids"].tolist() for row in rows] == [[5, 6, 7], [8, 9, 10]]


def test_last_item_ratio_1_masks_the_last_item_alone():
    batch = make_collator(mask_ratio=0.9, last_item_ratio=1)(ROWS)
    assert batch["masked_positions"].tolist() == [[0], [1], [4], [8], [13]]
    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == [1] * 5


def test_last_item_ratio_is_a_share_of_the_rows():
    batch = make_collator(mask_ratio=0.9, last_item_ratio=0.25)([{"input_ids": [7] * 20}] * 1000)
    only_last = (batch["labels"] != IGNORED).sum(dim=1) == 1
    # The standard error is .014.
    assert abs(only_last.float().mean() - 0.25) < 0.07
    assert (batch["masked_positions"][only_last, 0] == 19).all()


def originals(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The windows before masking."""
    return torch.where(labels_of(batch) != IGNORED, labels_of(batch), batch["input_ids"]).tolist()


def test_random_windows_of_a_long_history_vary_and_are_contiguous():
    windows = originals(make_collator(max_length=4)([{"input_ids": range(3, 13)}] * 300))
    starts = {window[0] for window in windows}
    assert starts == set(range(3, 10))
    assert all(window == list(range(window[0], window[0] + 4)) for window in windows)


def test_without_random_windows_the_newest_items_are_taken():
    windows = originals(make_collator(max_length=4, random_windows=False)([{"input_ids": range(3, 13)}] * 30))
    assert windows == [[9, 10, 11, 12]] * 30


def test_the_longest_row_is_that_of_the_tokenizer_unless_said_otherwise():
    rows = [{"input_ids": [7] * 30}]
    assert make_collator()(rows)["input_ids"].shape == (1, 20)
    assert make_collator(max_length=25)(rows)["input_ids"].shape == (1, 25)


def test_equal_seeds_give_equal_batches_and_the_next_call_another():
    collator = make_collator(max_length=6)
    first, second = collator(ROWS), collator(ROWS)
    torch.manual_seed(0)
    again = collator(ROWS)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], second["input_ids"])


def test_masks_differ_between_workers_and_epochs_and_repeat_under_the_same_seed():
    # Every batch has the same histories, so batches differ only in their masks.
    rows = [{"input_ids": list(range(3, 21))}] * 8

    def two_epochs() -> list[list[torch.Tensor]]:
        torch.manual_seed(5)
        loader = DataLoader(rows, batch_size=2, num_workers=2, collate_fn=make_collator(mask_ratio=0.5))
        return [[batch["input_ids"] for batch in loader] for _ in range(2)]

    first, second = two_epochs()
    # Batches 0 and 2 come from one worker, 1 and 3 from the other.
    assert len({str(batch.tolist()) for batch in first + second}) == 8
    for epoch, again in zip((first, second), two_epochs(), strict=True):
        assert all(torch.equal(batch, repeated) for batch, repeated in zip(epoch, again, strict=True))


def test_an_empty_row_is_legal_and_has_no_label():
    batch = make_collator(mask_ratio=0.9)([{"input_ids": []}, {"input_ids": [5, 6]}])
    assert batch["input_ids"][0].tolist() == [PAD, PAD]
    assert batch["attention_mask"][0].tolist() == [0, 0]
    assert (batch["labels"][0] == IGNORED).all()
    assert (batch["masked_positions"][0] == -1).all()
    assert (batch["labels"][1] != IGNORED).any()


def test_a_batch_of_empty_rows_is_one_column_of_padding():
    batch = make_collator()([{"input_ids": []}, {"input_ids": np.array([], dtype=np.int64)}])
    assert batch["input_ids"].tolist() == batch["attention_mask"].tolist() == [[PAD], [PAD]]
    assert batch["labels"].tolist() == [[IGNORED], [IGNORED]]
    assert batch["masked_positions"].tolist() == [[-1], [-1]]


EVALUATION_ROWS = [
    {"input_ids": [5, 6, MASK], "labels": [IGNORED, IGNORED, 9], "exclude_ids": [5, 6, 7]},
    {"input_ids": [MASK], "labels": [12], "exclude_ids": []},
    {"input_ids": [8, MASK], "labels": [IGNORED, IGNORED], "exclude_ids": [8]},
]


def test_evaluation_columns_come_in_one_order_and_others_are_left_out():
    row = {"candidate_ids": [5, 7], "user_id": "u", "history_ids": [9, 5], "input_ids": [5, MASK], "exclude_ids": [5]}
    batch = make_collator()([row | {"labels": [IGNORED, 9], "rating": 3.5}])
    assert list(batch) == [
        "input_ids", "attention_mask", "labels", "masked_positions", "history_ids", "exclude_ids", "candidate_ids",
    ]  # fmt: skip
    assert batch["history_ids"].tolist() == [[9, 5]]


def test_rows_with_labels_are_padded_and_not_masked():
    batch = make_collator(mask_ratio=0.99)(EVALUATION_ROWS)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, MASK], [MASK, PAD, PAD], [8, MASK, PAD]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "labels": [[9], [12], [IGNORED]],
        # The last row has a position too, although the catalogue lacks its target.
        "masked_positions": [[2], [0], [1]],
        "exclude_ids": [[5, 6, 7], [0, 0, 0], [8, 0, 0]],
    }


def test_rows_with_labels_need_no_random_numbers():
    before = torch.get_rng_state()
    make_collator()(EVALUATION_ROWS)
    assert torch.equal(torch.get_rng_state(), before)


def test_exclude_ids_have_at_least_one_column_where_rows_have_them():
    rows = [{"input_ids": [MASK], "labels": [12], "exclude_ids": []}] * 2
    assert make_collator()(rows)["exclude_ids"].tolist() == [[0], [0]]
    assert "exclude_ids" not in make_collator()([{"input_ids": [MASK], "labels": [12]}])


@pytest.mark.parametrize("mask_ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_a_mask_ratio_out_of_range_is_an_error(mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio must lie between 0 and 1, both excluded; got {mask_ratio}"):
        make_collator(mask_ratio=mask_ratio)


@pytest.mark.parametrize("last_item_ratio", [-0.1, 1.1])
def test_a_last_item_ratio_out_of_range_is_an_error(last_item_ratio):
    with pytest.raises(ValueError, match=f"last_item_ratio must lie between 0 and 1; got {last_item_ratio}"):
        make_collator(last_item_ratio=last_item_ratio)


@pytest.mark.parametrize("wrong", [103, -1])
def test_ids_beyond_the_vocabulary_are_errors(wrong):
    collator = make_collator()
    message = rf"between 0 and 102, the largest id of the tokenizer; got .*{wrong}"
    assert collator([{"input_ids": [102]}])["labels"].tolist() == [[102]]
    with pytest.raises(ValueError, match=message):
        collator([{"input_ids": [5, wrong]}])
    with pytest.raises(ValueError, match=message):
        collator([{"input_ids": [wrong, MASK], "labels": [IGNORED, 5]}])
    with pytest.raises(ValueError, match=message):
        collator([{"input_ids": [5, MASK], "labels": [IGNORED, wrong]}])
    with pytest.raises(ValueError, match=message):
        collator([{"input_ids": [5, MASK], "labels": [IGNORED, 5], "exclude_ids": [wrong]}])


def counted_collator(counts: dict[str, int] | None, **options) -> DataCollatorForMaskedItemPrediction:
    tokenizer = Bert4RecTokenizer.from_items((f"{number:03}" for number in range(100)), counts=counts)
    return DataCollatorForMaskedItemPrediction(tokenizer, **options)


def test_uniform_negatives_are_of_the_catalogue_each_at_most_once_and_each_as_often():
    collator = make_collator(num_negatives=20)
    batches = [collator(ROWS) for _ in range(2000)]
    assert set(batches[0]) == {"input_ids", "attention_mask", "labels", "masked_positions", "negative_ids"}
    draws = torch.stack([batch["negative_ids"] for batch in batches])
    assert draws.shape == (2000, 20)
    assert draws.dtype == torch.long
    assert all(len(set(draw)) == 20 for draw in draws.tolist())
    counts = torch.bincount(draws.flatten(), minlength=103)
    assert counts[:FIRST].tolist() == [0, 0, 0]
    # The standard deviation of 2000 draws with probability .2 is 18.
    assert (counts[FIRST:] - 400).abs().max() < 80


@pytest.mark.parametrize("num_negatives", [100, 101, 10**6])
def test_uniform_negatives_are_at_most_the_catalogue(num_negatives):
    negatives = make_collator(num_negatives=num_negatives)(ROWS)["negative_ids"]
    assert sorted(negatives.tolist()) == list(range(3, 103))


def test_popular_negatives_come_in_proportion_to_the_counts_with_their_log_probabilities():
    collator = counted_collator({"000": 60, "007": 30, "099": 10}, num_negatives=5, negative_sampling="popularity")
    batches = [collator([{"input_ids": [10, 3]}, {"input_ids": [102]}, {"input_ids": []}]) for _ in range(4000)]
    ids = torch.stack([batch["negative_ids"] for batch in batches])
    assert ids.shape == (4000, 5)
    assert set(ids.flatten().tolist()) == {3, 10, 102}  # an item without a count is never drawn
    for token_id, share in ((3, 0.6), (10, 0.3), (102, 0.1)):
        # The standard error over 20000 draws is at most .0035.
        assert abs((ids == token_id).float().mean() - share) < 0.015
    logs = torch.stack([batch["negative_log_probabilities"] for batch in batches])
    expected = torch.zeros(103)
    expected[[3, 10, 102]] = torch.tensor([0.6, 0.3, 0.1]).log()
    torch.testing.assert_close(logs, expected[ids])
    drawn = {3: 1 - 0.4**5, 10: 1 - 0.7**5, 102: 1 - 0.9**5}
    for batch in batches[:400]:
        positions, log_p = batch["masked_positions"], batch["positive_log_probabilities"]
        assert log_p.dtype == torch.float
        assert positions.shape == log_p.shape
        labels = batch["labels"].tolist()
        expected_p = [[np.log(drawn[label]) if label != IGNORED else 0.0 for label in row] for row in labels]
        torch.testing.assert_close(log_p, torch.tensor(expected_p), check_dtype=False)


def test_a_label_without_a_count_has_the_log_probability_of_one():
    collator = counted_collator({"000": 9}, num_negatives=1, negative_sampling="popularity")
    batch = collator([{"input_ids": [50]}])
    torch.testing.assert_close(batch["positive_log_probabilities"], torch.tensor([[1 / 9]]).log())


def test_one_popular_item_alone_is_certain():
    collator = counted_collator({"000": 9}, num_negatives=2, negative_sampling="popularity")
    batch = collator([{"input_ids": [3]}])
    assert batch["negative_ids"].tolist() == [3, 3]
    assert batch["negative_log_probabilities"].tolist() == [0, 0]
    assert batch["positive_log_probabilities"].tolist() == [[0]]


@pytest.mark.parametrize("negative_sampling", ["uniform", "popularity"])
def test_negatives_repeat_under_the_same_seed_and_change_no_mask(negative_sampling):
    counts = {f"{number:03}": 1 + number for number in range(100)}
    collator = counted_collator(counts, num_negatives=10, negative_sampling=negative_sampling)
    first, second = collator(ROWS), collator(ROWS)
    torch.manual_seed(0)
    again = collator(ROWS)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["negative_ids"], second["negative_ids"])
    torch.manual_seed(0)
    without = make_collator()(ROWS)
    assert all(torch.equal(first[name], without[name]) for name in without)


@pytest.mark.parametrize("negative_sampling", ["uniform", "popularity"])
def test_rows_with_labels_get_no_negatives(negative_sampling):
    collator = counted_collator({"000": 1}, num_negatives=10, negative_sampling=negative_sampling)
    assert set(collator(EVALUATION_ROWS)) == set(make_collator()(EVALUATION_ROWS))


@pytest.mark.parametrize("counts", [None, {}, {"000": 0}], ids=["missing", "none", "zero"])
def test_popular_negatives_without_counts_are_an_error(counts):
    with pytest.raises(ValueError, match=r"needs the items' training counts.*tokenizer\.set_counts, or choose uniform"):
        counted_collator(counts, num_negatives=10, negative_sampling="popularity")
    assert counted_collator(counts, negative_sampling="popularity")(ROWS)  # counts are needed for negatives only


def test_bad_values_of_the_negatives_are_errors():
    with pytest.raises(ValueError, match="num_negatives must be at least 0; got -1"):
        make_collator(num_negatives=-1)
    with pytest.raises(ValueError, match="negative_sampling must be uniform or popularity; got 'log'"):
        make_collator(num_negatives=1, negative_sampling="log")


def test_of_more_masks_than_wanted_a_random_part_stays():
    tokenizer = Bert4RecTokenizer.from_items(map(str, range(40)), model_max_length=40)
    rows = [{"input_ids": list(range(3, 43))}] * 500
    collator = DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=0.5, max_predictions=4)
    masked = (labels_of(collator(rows)) != -100).numpy()
    assert (masked.sum(axis=1) == 4).all()
    assert (np.abs(masked.mean(axis=0) - 0.1) < 0.06).all()  # at every position equally often
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        make_collator(max_length=0)
    with pytest.raises(ValueError, match="max_predictions must be at least 1; got 0"):
        DataCollatorForMaskedItemPrediction(tokenizer, max_predictions=0)


@pytest.mark.parametrize("row", [["10", "12"], [3.5, 4.0]])
def test_raw_item_ids_are_no_token_ids(row):
    with pytest.raises(TypeError, match=r"input_ids must be token ids, integers; got .*item_ids_to_token_ids"):
        make_collator()([{"input_ids": row}])
