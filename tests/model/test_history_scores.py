"""What is counted in the log and added to the scores."""

import pytest
import torch
from small_models import FIRST, MASK, NUM_ITEMS, PAD, VOCAB, make_model

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.model.history_scores import NUM_NEWEST_ITEMS, item_counts, newest_items


def test_of_the_newest_items_each_counts_half_as_much_as_the_one_after_it():
    # [PAD], [UNK], what is not attended to and what comes later count for nothing.
    ids = torch.tensor([[5, 9, MASK, 0, 0], [0, 0, 0, 0, MASK], [9, 2, 5, MASK, 7], [8, 9, 5, MASK, 0]])
    mask = (ids != PAD).long()
    mask[3, 0] = 0
    expected = [{5: 1 / 3, 9: 2 / 3}, {PAD: 1.0}, {9: 1 / 5, 5: 4 / 5}, {9: 1 / 3, 5: 2 / 3}]
    positions = torch.tensor([[2], [4], [3], [3]])
    at_positions = newest_items(ids, mask, positions).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        everywhere = newest_items(ids, mask, None)[range(4), positions.flatten()]
    for newest in (at_positions, everywhere):
        for row, weights in zip(newest, expected, strict=True):
            found = zip(row[:NUM_NEWEST_ITEMS].tolist(), row[NUM_NEWEST_ITEMS:].tolist(), strict=True)
            assert {item: weight for item, weight in found if weight} == pytest.approx(weights)
    # As far as floats reach, and farther; of more than are looked at the newest.
    far = torch.tensor([[9, *[2] * 300, MASK]])
    assert newest_items(far, None, torch.tensor([[301]]))[0, 0, [0, NUM_NEWEST_ITEMS]].tolist() == [9, 1]
    many = newest_items(torch.arange(FIRST, 30).unsqueeze(0), None, torch.tensor([[20]]))[0, 0]
    assert many[:NUM_NEWEST_ITEMS].tolist() == [*range(FIRST + 19, FIRST + 19 - NUM_NEWEST_ITEMS, -1)]


def test_how_often_each_item_stands_before_a_position():
    # [PAD], [UNK], what is not attended to and what comes later count for nothing.
    ids = torch.tensor([[5, 9, 5, MASK, 5], [0, 0, 0, 0, MASK], [9, 2, 9, MASK, 7], [8, 9, 8, MASK, 0]])
    mask = (ids != PAD).long()
    mask[3, 0] = 0
    expected = [{5: 2, 9: 1}, {}, {9: 2}, {9: 1, 8: 1}]
    positions = torch.tensor([[3], [4], [3], [3]])
    at_positions = item_counts(ids, mask, positions).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        everywhere = item_counts(ids, mask, None)[range(4), positions.flatten()]
    for found in (at_positions, everywhere):
        for row, counts in zip(found, expected, strict=True):
            pairs = zip(row[:5].tolist(), row[5:].tolist(), strict=True)
            assert sorted((item, count) for item, count in pairs if count) == sorted(counts.items())
    # What is at a position does not stand before it.
    assert item_counts(ids, mask, torch.tensor([[2]] * 4))[0, 0, 5:].tolist() == [1, 1, 0, 0, 0]
    # More than half precision can count to.
    with torch.autocast("cpu", torch.bfloat16):
        many = item_counts(torch.tensor([[*[7] * 301, MASK]]), None, torch.tensor([[301]]))[0, 0]
    assert many[[0, 302]].tolist() == [7, 301]


def test_transitions_have_room_for_token_ids_in_half_precision():
    model = make_model(num_transitions=2, vocab_size=2000).bfloat16()
    ids = torch.tensor([[1001, MASK]])
    model.decoder.history_scores.successor_ids[1001] = torch.tensor([1003, 1999])
    model.decoder.history_scores.successor_scores[1001] = torch.tensor([500.0, 400.0])
    assert model.recommend(ids, top_k=2)[1].tolist() == [[1003, 1999]]


def test_an_item_that_is_new_has_no_transitions():
    model = make_model(num_transitions=5)
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    before = model.decoder.history_scores.successor_ids.clone(), model.decoder.history_scores.successor_scores.clone()
    assert model.add_items(tokenizer, ["new"]) == 1
    for table, old in zip(
        (model.decoder.history_scores.successor_ids, model.decoder.history_scores.successor_scores), before, strict=True
    ):
        assert len(table) == VOCAB + 1
        assert torch.equal(table[:-1], old)
        assert not table[-1].any()


def test_a_config_that_lacks_its_transitions_starts_without_them(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = Bert4RecConfig.from_pretrained(tmp_path, num_transitions=4)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, config=config)
    assert torch.equal(loaded.decoder.history_scores.successor_ids, torch.zeros(VOCAB, 4, dtype=torch.int))
    assert torch.equal(loaded.decoder.history_scores.successor_scores, torch.zeros(VOCAB, 4))
    with pytest.raises(Exception, match="num_transitions must be at least 0; got -1"):
        Bert4RecConfig(num_transitions=-1)
