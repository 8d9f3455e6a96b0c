"""Explanations agree with known causes, and with loops over histories that lack one item."""

import pytest
import torch
from small_models import FIRST, MASK, VOCAB, WITH_HISTORY, make_model, mask_scores, pad

from bert4rec_hf import Bert4RecTokenizer
from bert4rec_hf.model import explanation

LENGTH = 12
# Repeated items, an empty history, and histories that are longer than the model.
HISTORIES = [
    [5, 9, 17, 5, 30, 4],
    [],
    [11, 3, 11],
    [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 7],
    [20, 21, 20, 22] * 4,
]
EXCLUDED = torch.tensor([[5, 9, 17, 30, 4], [0] * 5, [11, 3, 3, 0, 0], [39, 38, 37, 36, 2], [20, 21, 22, 0, 0]])
CANDIDATES = {
    "catalogue": None,
    "candidates": torch.tensor([39, 5, 12, 3, 28, 11, 20, 0]),
    "candidates-by-row": torch.tensor([[5, 39, 12, 0], [3, 4, 11, 12], [39, 0, 0, 0], [10, 20, 30, 0], [6, 7, 8, 9]]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return Bert4RecTokenizer.from_items(map(str, range(VOCAB - FIRST)), model_max_length=LENGTH)


def padded(histories, side="right"):
    length = max(map(len, histories))
    rows = [[0] * (length - len(row)) + row if side == "left" else row + [0] * (length - len(row)) for row in histories]
    return torch.tensor(rows)


def network_scores(model, history: list[int]) -> torch.Tensor:
    """(vocabulary,) the network's scores after a history, in serving."""
    with torch.no_grad():
        return model(torch.tensor([[*history[-(LENGTH - 1) :], MASK]])).logits[0, -1].double()


def counted_part(model, history: list[int], item: int, source: int) -> float:
    """The part of a source in the counted scores of an item, by loops."""
    config, counted, part = model.config, model.history_scores, 0.0
    if item == source:
        repeats, age = history.count(item), history[::-1].index(item)
        part += config.repeat_weight * torch.tensor(1.0 + repeats).log().item() + config.recency_weight * 0.5**age
    if config.num_transitions:
        newest = history[::-1][:8]
        for age, start in enumerate(newest):
            if start == source:
                share = 0.5**age / sum(0.5**place for place in range(len(newest)))
                is_item = counted.successor_ids[start] == item
                part += config.transition_weight * share * float(counted.successor_scores[start][is_item].sum())
                if age == 0:
                    part += config.next_item_weight * float(counted.next_item_scores[start][is_item].sum())
    return part


@pytest.mark.parametrize("candidate_ids", CANDIDATES.values(), ids=CANDIDATES)
@pytest.mark.parametrize("exclude_ids", [None, EXCLUDED], ids=["nothing-excluded", "excluded"])
def test_a_contribution_is_what_the_centred_score_loses_without_the_item(model, tokenizer, candidate_ids, exclude_ids):
    item_ids = torch.tensor([[12, 39, 5], [11, 3, 0], [3, 11, 28], [39, 7, 20], [20, 8, 22]])
    sources, contributions = model.explain(
        tokenizer, padded(HISTORIES), item_ids, candidate_ids=candidate_ids, exclude_ids=exclude_ids
    )
    assert sources.shape == (5, 14)
    assert contributions.shape == (5, 3, 14)
    assert contributions.dtype == torch.float32
    for row, history in enumerate(HISTORIES):
        distinct = list(dict.fromkeys(history[::-1]))
        assert sources[row].tolist() == distinct + [0] * (14 - len(distinct))
        assert (contributions[row, :, len(distinct) :] == 0).all()
        allowed = set(range(FIRST, VOCAB) if candidate_ids is None else candidate_ids.expand(5, -1)[row].tolist())
        allowed -= {0} if exclude_ids is None else {0, *exclude_ids[row].tolist()}
        whole = network_scores(model, history)
        for place, source in enumerate(distinct):
            changes = whole - network_scores(model, [item for item in history if item != source])
            mean = changes[sorted(allowed)].mean() if allowed else 0.0
            for column, item in enumerate(item_ids[row].tolist()):
                expected = float(changes[item] - mean) + counted_part(model, history, item, source) if item else 0.0
                assert contributions[row, column, place].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("options", WITH_HISTORY.values(), ids=WITH_HISTORY)
def test_the_counted_parts_sum_to_the_value_that_is_added_to_the_score(options):
    counted = make_model(popularity_weight=0.0, **options).history_scores
    everything = torch.arange(VOCAB).expand(len(HISTORIES), -1)
    for side in ("left", "right"):
        history_ids = padded(HISTORIES, side)
        parts = counted.contributions(history_ids, everything, everything)
        expected = torch.zeros(len(HISTORIES), VOCAB).scatter_add_(1, *counted(history_ids))
        expected[:, :FIRST] = 0
        torch.testing.assert_close(parts.sum(dim=2), expected, atol=1e-6, rtol=0)
        assert (parts >= 0).all()
        assert (parts[1] == 0).all()
        assert parts.sum() > 1


def test_the_networks_contributions_of_all_candidates_sum_to_0(tokenizer):
    everything = torch.arange(FIRST, VOCAB).expand(len(HISTORIES), -1)
    _, contributions = make_model().explain(tokenizer, padded(HISTORIES), everything)
    assert contributions.abs().max() > 0.5
    assert contributions.sum(dim=1).abs().max() < 1e-3


def of_two_tastes() -> tuple[torch.nn.Module, list[int], list[int]]:
    """A model whose state is the mean of the items' vectors, and the items of two tastes at right angles."""
    model = make_model(causal_attention=True, hidden_size=16, num_attention_heads=1, num_hidden_layers=1)
    first, second = [FIRST + number for number in range(6)], [FIRST + 6 + number for number in range(6)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        attention = model.model.layers[0].attention
        attention.value.weight.copy_(torch.eye(16))
        attention.output.weight.copy_(torch.eye(16))
        vectors = model.get_input_embeddings().weight
        vectors[first] = torch.tensor([1.0, -1.0] * 8)
        vectors[second] = torch.tensor([1.0, 1.0, -1.0, -1.0] * 4)
    return model, first, second


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_recommended_for_one_taste_is_carried_by_the_items_of_that_taste(tokenizer, dtype):
    model, first, second = of_two_tastes()
    model = model.to(dtype)
    history = [
        second[0],
        first[0],
        first[1],
        second[1],
        first[2],
        second[0],
        first[0],
    ]  # four of seven are of the first
    input_ids = torch.tensor([[*history, MASK]])
    _, best = model.recommend(input_ids, top_k=3, exclude_ids=torch.tensor([history]))
    assert sorted(best[0].tolist()) == first[3:]
    best = torch.cat((best, torch.tensor([[second[2]]])), dim=1)
    sources, contributions = model.explain(tokenizer, torch.tensor([history]), best)
    of_first = torch.isin(sources[0], torch.tensor(first))
    assert (contributions[0, :3, of_first] > 0.05).all()
    assert (contributions[0, :3, ~of_first] < -0.05).all()
    assert (contributions[0, 3, of_first] < -0.05).all()
    assert (contributions[0, 3, ~of_first] > 0.05).all()
    # An item that the history has twice counts more.
    assert sources[0, contributions[0, 0].argmax()] == first[0]


def test_padding_on_either_side_and_other_rows_of_the_batch_change_nothing(model, tokenizer):
    item_ids = torch.tensor([[12, 39], [11, 3], [3, 11], [39, 7], [20, 8]])
    together = [model.explain(tokenizer, padded(HISTORIES, side), item_ids) for side in ("left", "right")]
    for row, history in enumerate(HISTORIES):
        alone = model.explain(tokenizer, torch.tensor([history], dtype=torch.long), item_ids[row : row + 1])
        for sources, contributions in together:
            number = alone[0].shape[1]
            assert torch.equal(sources[row, :number], alone[0][0])
            torch.testing.assert_close(contributions[row, :, :number], alone[1][0])


def test_items_that_are_too_old_have_counted_parts_only(tokenizer, monkeypatch):
    history = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 11]])
    item_ids = torch.tensor([[20, 6, 30]])
    model = make_model(repeat_weight=0.8)
    sources, whole = model.explain(tokenizer, history, item_ids)
    monkeypatch.setattr(explanation, "NUM_EXPLAINED_ITEMS", 3)
    _, newest = model.explain(tokenizer, history, item_ids)
    assert sources[0].tolist() == [11, 5, 10, 9, 8, 7, 6]
    torch.testing.assert_close(newest[..., :3], whole[..., :3])
    expected = torch.zeros(1, 3, 4)
    expected[0, 1, 3] = 0.8 * torch.tensor(2.0).log()  # 6 repeats itself
    torch.testing.assert_close(newest[..., 3:], expected)
    assert (whole[..., 3:] != expected).all()


def test_an_item_that_the_model_does_not_read_changes_exactly_nothing(tokenizer):
    history = torch.tensor([[*range(FIRST, FIRST + 20)]])
    _, contributions = make_model().explain(tokenizer, history, torch.tensor([[30, 31]]))
    assert (contributions[..., : LENGTH - 1] != 0).all()
    assert (contributions[..., LENGTH - 1 :] == 0).all()


def test_a_converted_model_drops_the_oldest_item_of_what_is_left(tokenizer):
    model = make_model()
    dropping = Bert4RecTokenizer.from_items(tokenizer.items, model_max_length=LENGTH, drop_oldest_item=True)
    sources, contributions = model.explain(dropping, torch.tensor([[5, 9, 17]]), torch.tensor([[20]]))
    assert sources.tolist() == [[17, 9, 5]]
    whole = network_scores(model, [9, 17])
    for place, left in enumerate(([9], [17], [17])):
        changes = whole - network_scores(model, left)
        expected = changes[20] - changes[FIRST:].mean()
        assert contributions[0, 0, place].item() == pytest.approx(expected.item(), abs=1e-5)


def test_inputs_with_their_mask_are_histories_too(model, tokenizer):
    input_ids, _ = pad(HISTORIES[:3], "left")
    item_ids = torch.tensor([[12], [11], [3]])
    with_mask = model.explain(tokenizer, input_ids, item_ids)
    without = model.explain(tokenizer, padded(HISTORIES[:3]), item_ids)
    for one, other in zip(with_mask, without, strict=True):
        torch.testing.assert_close(one, other)


def test_explaining_leaves_the_model_as_it_was(model, tokenizer):
    input_ids, mask = pad(HISTORIES[:3])
    before = mask_scores(model, input_ids, mask)
    model.explain(tokenizer, padded(HISTORIES[:3]), torch.tensor([[12], [11], [3]]))
    assert torch.equal(mask_scores(model, input_ids, mask), before)


@pytest.mark.parametrize("history_ids", [torch.zeros(0, 3), torch.zeros(2, 0), torch.zeros(2, 3)])
def test_without_items_there_is_nothing_to_name(model, tokenizer, history_ids):
    item_ids = torch.tensor([[5, 6]] * len(history_ids), dtype=torch.long).reshape(-1, 2)
    sources, contributions = model.explain(tokenizer, history_ids.long(), item_ids)
    assert sources.shape == (len(history_ids), 0)
    assert contributions.shape == (len(history_ids), 2, 0)


def test_wrong_arguments_are_errors(tokenizer):
    model, history = make_model(), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"shapes \(batch, H\) and \(batch, k\); got \(1, 2\) and \(1,\)"):
        model.explain(tokenizer, history, torch.tensor([5]))
    with pytest.raises(ValueError, match=r"got \(1, 2\) and \(2, 1\)"):
        model.explain(tokenizer, history, torch.tensor([[5], [6]]))
    with pytest.raises(ValueError, match="token ids must lie between"):
        model.explain(tokenizer, history, torch.tensor([[VOCAB]]))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train().explain(tokenizer, history, torch.tensor([[5]]))
