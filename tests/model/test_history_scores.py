"""`HistoryScores`: counted scores that are added to the network's."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import FIRST, MASK, NUM_ITEMS, PAD, VOCAB, WITH_HISTORY, make_model

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.model.history_scores import (
    NUM_NEWEST_ITEMS,
    WEIGHT_FIELDS,
    add_to_scores,
    item_occurrences,
    newest_items,
    values_of,
)


def by_item(pairs, row: int = 0) -> dict[int, float]:
    """The values of a row by item, without the padding at its start."""
    items, values = (part[row].tolist() for part in pairs)
    padding = items.count(0)
    assert items[:padding] == values[:padding] == [0] * padding
    assert all(first < second for first, second in pairwise(items[padding:]))
    return dict(zip(items[padding:], values[padding:], strict=True))


def test_of_the_newest_items_each_counts_half_as_much_as_the_one_after_it():
    ids = torch.tensor([[5, 9, 0, 0], [0, 0, 0, 0], [9, 0, 5, 0]])
    newest, shares, is_start = newest_items(ids)
    assert newest[:, :3].tolist() == [[9, 5, 0], [0, 0, 0], [5, 9, 0]]
    assert not newest[:, 3:].any()
    torch.testing.assert_close(shares[:, :3], torch.tensor([[2 / 3, 1 / 3, 0], [0, 0, 0], [2 / 3, 1 / 3, 0]]))
    assert is_start.nonzero().tolist() == [[1, 0]]
    # Only the newest items are read, even if padding follows them.
    many = newest_items(torch.arange(FIRST, 30).unsqueeze(0))[0][0]
    assert many.tolist() == [*range(29, 29 - NUM_NEWEST_ITEMS, -1)]
    assert newest_items(torch.tensor([[9, *[0] * 300]]))[0][0, 0] == 9


def test_an_item_is_counted_in_one_place_with_the_age_of_its_newest_occurrence():
    history_ids = torch.tensor([[5, 9, 5, 0, 5, 8], [0, 0, 0, 0, 0, 0], [*[7] * 4, 6, 0]])
    found = [
        [(item, count, age) for item, count, age in zip(*row, strict=True) if count]
        for row in zip(*(values.tolist() for values in item_occurrences(history_ids)), strict=True)
    ]
    assert found == [[(5, 3, 1), (8, 1, 0), (9, 1, 3)], [], [(6, 1, 0), (7, 4, 1)]]


@pytest.mark.parametrize("options", [*WITH_HISTORY.values()], ids=[*WITH_HISTORY])
def test_pairs_are_unique_in_order_and_the_sums_that_loops_give(options):
    model = make_model(transition_weight=0.7, popularity_weight=11.0, **options)
    scores, config = model.history_scores, model.config
    torch.manual_seed(1)
    histories = torch.randint(0, VOCAB, (40, 30))  # including special tokens
    histories[:10, 5:] = PAD
    histories[10:13] = PAD
    mask = (torch.rand(histories.shape) < 0.9).long()
    with torch.autocast("cpu", torch.bfloat16):
        pairs = scores(histories, mask)
    assert pairs[0].dtype == torch.long
    assert pairs[1].dtype == torch.float32
    assert torch.equal(torch.stack([*scores(histories.where(mask == 1, PAD))]), torch.stack([*pairs]))
    for row, (history, attended) in enumerate(zip(histories.tolist(), mask.tolist(), strict=True)):
        items = [item for item, seen in zip(history, attended, strict=True) if item >= FIRST and seen]
        newest = items[: -NUM_NEWEST_ITEMS - 1 : -1]
        weights = [0.5**age for age in range(len(newest))]
        expected: dict[int, float] = defaultdict(float)
        if config.num_transitions:
            shares = [config.transition_weight * weight / sum(weights) for weight in weights]
            for item, share in zip(newest or [PAD], shares or [config.popularity_weight], strict=True):
                for successor, score in zip(scores.successor_ids[item], scores.successor_scores[item], strict=True):
                    expected[int(successor)] += share * float(score)
            newest_item = (newest or [PAD])[0]
            for successor, score in zip(
                scores.successor_ids[newest_item], scores.next_item_scores[newest_item], strict=True
            ):
                expected[int(successor)] += config.next_item_weight * float(score)
        for item, count in Counter(items).items():
            expected[item] += config.repeat_weight * math.log1p(count)
            expected[item] += config.recency_weight * 0.5 ** items[::-1].index(item)
        found = by_item(pairs, row)
        expected = {item: value for item, value in expected.items() if value}
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-5)


def test_the_weighted_features_sum_to_the_scores():
    weights = {"transitions": 0.7, "next_items": 3.0, "popularity": 11.0, "repeats": 0.8, "recency": 2.0}
    model = make_model(num_transitions=5, **{WEIGHT_FIELDS[name]: weight for name, weight in weights.items()})
    scores, config = model.history_scores, model.config
    histories = torch.tensor([[5, 9, 5, 8], [0, 0, 0, 0]])
    features = scores.features(histories)
    assert features.keys() == WEIGHT_FIELDS.keys()
    for row in range(2):
        expected: dict[int, float] = defaultdict(float)
        for name, pairs in features.items():
            assert all(value > 0 for value in by_item(pairs, row).values())
            for item, value in by_item(pairs, row).items():
                expected[item] += weights[name] * value
        assert by_item(scores(histories), row) == pytest.approx(expected, abs=1e-6)
    assert by_item(features["repeats"]) == pytest.approx({5: math.log(3), 8: math.log(2), 9: math.log(2)})
    assert by_item(features["recency"]) == {5: 0.5, 8: 1.0, 9: 0.25}
    assert by_item(features["transitions"])
    assert not by_item(features["transitions"], 1)
    # The weights are read at every call.
    for field in WEIGHT_FIELDS.values():
        setattr(config, field, 0.0)
    assert not by_item(scores(histories))


def test_pairs_are_added_where_their_items_are():
    pairs = torch.tensor([[0, 4, 7], [3, 5, 9]]), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    added = add_to_scores(torch.zeros(2, 10), pairs)
    assert added.nonzero().tolist() == [[0, 4], [0, 7], [1, 3], [1, 5], [1, 9]]
    assert torch.equal(add_to_scores(torch.zeros(2, 4), pairs, start=4), added[:, 4:8])
    candidates = torch.tensor([[7, 5, 0, 4], [9, 7, 3, 3]])
    assert torch.equal(values_of(pairs, candidates), added.gather(1, candidates))
    nothing = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0)
    assert not add_to_scores(torch.zeros(2, 10), nothing).any()
    assert values_of(nothing, candidates).shape == (2, 4)


def test_an_older_repeat_counts_beyond_the_input():
    model = make_model(repeat_weight=50.0)
    ids, history = torch.tensor([[5, 9, MASK]]), torch.tensor([[7, 7, 7, 5, 9]])
    assert set(model.recommend(ids, top_k=2)[1][0].tolist()) == {5, 9}
    assert model.recommend(ids, history_ids=history, top_k=1)[1].tolist() == [[7]]
    assert model.rank(ids, torch.tensor([7]), history_ids=history).tolist() == [1]
    with pytest.raises(ValueError, match="the model has transitions or repeats: give history_ids"):
        model.search(model.mask_states(ids), top_k=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_stay_exact_in_a_model_that_is_loaded_in_half_precision(tmp_path, dtype):
    model = make_model(num_transitions=20, vocab_size=2000, popularity_weight=1000.0)
    model.history_scores.successor_ids[PAD] = torch.arange(1000, 1020)
    model.history_scores.successor_scores[PAD] = torch.linspace(1000.0, 1001.0, 20)
    model.save_pretrained(tmp_path)
    empty = torch.tensor([[MASK]])
    expected = [*range(1019, 999, -1)]
    assert model.recommend(empty, top_k=20)[1].tolist() == [expected]
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.get_input_embeddings().weight.dtype == dtype
    assert loaded.history_scores.successor_scores.dtype == torch.float32
    assert torch.equal(loaded.history_scores.successor_scores, model.history_scores.successor_scores)
    assert loaded.recommend(empty, top_k=20)[1].tolist() == [expected]


def test_transitions_have_room_for_token_ids_in_half_precision():
    model = make_model(num_transitions=2, vocab_size=2000).bfloat16()
    ids = torch.tensor([[1001, MASK]])
    model.history_scores.successor_ids[1001] = torch.tensor([1003, 1999])
    model.history_scores.successor_scores[1001] = torch.tensor([500.0, 400.0])
    assert model.recommend(ids, top_k=2)[1].tolist() == [[1003, 1999]]


def test_an_item_that_is_new_has_no_transitions():
    model = make_model(num_transitions=5)
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    before = model.history_scores.successor_ids.clone(), model.history_scores.successor_scores.clone()
    assert model.add_items(tokenizer, ["new"]) == 1
    for table, old in zip(
        (model.history_scores.successor_ids, model.history_scores.successor_scores), before, strict=True
    ):
        assert len(table) == VOCAB + 1
        assert torch.equal(table[:-1], old)
        assert not table[-1].any()


def test_a_config_that_lacks_its_transitions_starts_without_them(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = Bert4RecConfig.from_pretrained(tmp_path, num_transitions=4)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, config=config)
    assert torch.equal(loaded.history_scores.successor_ids, torch.zeros(VOCAB, 4, dtype=torch.int))
    assert torch.equal(loaded.history_scores.successor_scores, torch.zeros(VOCAB, 4))
    with pytest.raises(Exception, match="num_transitions must be at least 0; got -1"):
        Bert4RecConfig(num_transitions=-1)


def test_a_model_of_an_earlier_release_has_no_next_item_scores_and_loads_without_a_report(tmp_path):
    model = make_model(num_transitions=5)
    model.history_scores.next_item_scores.fill_(3.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["history_scores.next_item_scores"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not loaded.history_scores.next_item_scores.any()
    assert torch.equal(loaded.history_scores.successor_ids, model.history_scores.successor_ids)
