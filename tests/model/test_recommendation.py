"""recommend, rank and search agree with sorting the full matrix of scores."""

import math

import numpy as np
import pytest
import torch
from small_models import (
    FIRST,
    HISTORIES,
    MASK,
    PAD,
    VOCAB,
    WITH_HISTORY,
    gradients,
    make_model,
    make_popularity_model,
    mask_scores,
    pad,
    training_batch,
)

from bert4rec_hf.model import modeling_bert4rec as modeling
from bert4rec_hf.model import recommendation
from bert4rec_hf.model.history_scores import NUM_NEWEST_ITEMS


def history_scores_by_loops(model, histories) -> torch.Tensor:
    """Scores (histories, vocabulary) that the transitions and repeats of a model add, computed with loops."""
    added = torch.zeros(len(histories), VOCAB)
    for row, history in zip(added, histories, strict=True):
        for item in set(history):
            row[item] += model.config.repeat_weight * math.log(1 + history.count(item))
            row[item] += model.config.recency_weight * 0.5 ** history[::-1].index(item)
        newest = history[::-1][:NUM_NEWEST_ITEMS]
        for age, item in enumerate((newest or [PAD]) if model.config.num_transitions else []):
            share = 0.5**age / sum(0.5**age for age in range(max(1, len(newest))))
            for next_id, score in zip(
                model.history_scores.successor_ids[item],
                model.history_scores.successor_scores[item],
                strict=True,
            ):
                row[next_id] += share * score
        for item in newest[:1] if model.config.num_transitions else []:
            for next_id, score in zip(
                model.history_scores.successor_ids[item], model.history_scores.next_item_scores[item], strict=True
            ):
                row[next_id] += model.config.next_item_weight * score
    return added


EXCLUDED = torch.tensor([[5, 9, 17, 30, 4], [11, 3, 0, 0, 0], [39, 38, 37, 36, 0], [0, 0, 0, 0, 0]])
CANDIDATES = {
    "catalogue": None,
    "candidates": torch.tensor([39, 5, 12, 3, 28, 11, 20]),
    "candidates-by-row": torch.tensor([[5, 39, 12, 0], [3, 4, 11, 12], [39, 0, 0, 0], [10, 20, 30, 0]]),
}
with_candidates = pytest.mark.parametrize("candidate_ids", CANDIDATES.values(), ids=CANDIDATES.keys())
with_exclusion = pytest.mark.parametrize("exclude_ids", [None, EXCLUDED], ids=["nothing-excluded", "excluded"])
# With size 2, a chunk begins between the special tokens. With 7, a chunk ends with the last item. 2**16 is one chunk.
with_chunks = pytest.mark.parametrize("chunk", [2, 7, 11, 2**16])


def reference_lists(model, ids, mask, candidate_ids, exclude_ids) -> list[list[tuple[int, float]]]:
    """Items and scores, best first, from a full matrix of scores that is sorted."""
    matrix = model.user_vectors(ids, mask).double().numpy() @ model.item_vectors().double().numpy().T
    matrix += history_scores_by_loops(model, [row[row >= FIRST].tolist() for row in ids])[:, FIRST:].numpy()
    lists = []
    for row, scores in enumerate(matrix):
        allowed = set(range(FIRST, VOCAB))
        if candidate_ids is not None:
            allowed &= set(candidate_ids.expand(len(ids), -1)[row].tolist())
        if exclude_ids is not None:
            allowed -= set(exclude_ids[row].tolist())
        lists.append(sorted(((item, scores[item - FIRST]) for item in allowed), key=lambda pair: -pair[1]))
    return lists


@with_chunks
@with_candidates
@with_exclusion
def test_recommend_and_rank_agree_with_sorting_the_full_matrix(model, candidate_ids, exclude_ids, chunk, monkeypatch):
    monkeypatch.setattr(recommendation, "CATALOGUE_CHUNK_SIZE", chunk)
    monkeypatch.setattr(recommendation, "MAX_GATHERED_VALUES", chunk * len(HISTORIES) * model.config.hidden_size)
    ids, mask = pad(HISTORIES)
    options = {"candidate_ids": candidate_ids, "exclude_ids": exclude_ids}
    expected = reference_lists(model, ids, mask, **options)
    scores, items = model.recommend(ids, mask, top_k=VOCAB, **options)
    for row, best in enumerate(expected):
        assert items[row].tolist() == [item for item, _ in best] + [PAD] * (items.shape[1] - len(best))
        np.testing.assert_allclose(scores[row, : len(best)], [score for _, score in best], atol=1e-5)
        assert scores[row, len(best) :].isneginf().all()
    # The j-th item of a list has rank j. After the end of a list, the target is [PAD] and its rank is 0.
    for place in range(items.shape[1]):
        wanted = [place + 1 if place < len(best) else 0 for best in expected]
        assert model.rank(ids, items[:, place], mask, **options).tolist() == wanted
    # A shorter list is the beginning of the long one.
    assert torch.equal(model.recommend(ids, mask, top_k=4, **options)[1], items[:, :4])


@pytest.mark.parametrize("item_ids", [range(VOCAB), range(1, 9), range(FIRST, VOCAB), range(7, 7)])
def test_rows_that_are_viewed_and_rows_that_are_looked_up_have_the_same_scores(model, item_ids):
    states = model.mask_states(*pad(HISTORIES))
    expected = model._scores(states, torch.tensor(item_ids, dtype=torch.long))
    torch.testing.assert_close(model._scores(states, item_ids), expected, atol=1e-6, rtol=0)
    # A wrapper of the embeddings accepts token ids only.
    embeddings = model.get_input_embeddings()
    assert modeling.ItemEmbeddings.takes_ranges(embeddings)
    embeddings.forward = torch.nn.Embedding.forward.__get__(embeddings)
    assert not modeling.ItemEmbeddings.takes_ranges(embeddings)
    torch.testing.assert_close(model._scores(states, item_ids), expected, atol=1e-6, rtol=0)


def test_an_empty_batch_has_no_answers(model):
    ids = torch.zeros(0, 5, dtype=torch.long)
    scores, items = model.recommend(ids, top_k=4)
    assert scores.shape == items.shape == (0, 4)
    assert model.rank(ids, torch.zeros(0, dtype=torch.long)).tolist() == []
    assert model.user_vectors(ids).shape == (0, model.config.hidden_size + 1)


def test_scores_of_recommend_are_the_logits_at_the_mask(model):
    ids, mask = pad(HISTORIES)
    scores, items = model.recommend(ids, mask, top_k=5)
    torch.testing.assert_close(scores, mask_scores(model, ids, mask).gather(1, items))


def test_the_last_mask_is_the_one_that_is_read(model):
    several = torch.tensor([[5, MASK, 9, MASK]])
    with torch.no_grad():
        logits = model(input_ids=several).logits
    expected = logits[0, 3].clone()
    items, values = model.history_scores(several)
    expected[items[0]] += values[0]
    torch.testing.assert_close(model.recommend(several, top_k=5)[0][0], expected.topk(5).values)
    assert not torch.allclose(logits[0, 1], logits[0, 3], atol=0.01)
    # An item after the [MASK] is not part of the history.
    behind = model.recommend(torch.tensor([[5, MASK, 9]]), torch.tensor([[1, 1, 0]]), top_k=5)
    torch.testing.assert_close(behind, model.recommend(torch.tensor([[5, MASK]]), top_k=5))


def test_a_target_is_ranked_among_candidates_that_lack_it():
    model = make_popularity_model([5.0, 4.0, 3.0, 2.0, 1.0])
    candidates = torch.tensor([3, 4, 7])  # with scores 5, 4 and 1
    ids = torch.tensor([[MASK]] * 5)
    ranks = model.rank(ids, torch.arange(3, 8), candidate_ids=candidates)
    assert ranks.tolist() == [1, 2, 3, 3, 3]


def test_a_tie_counts_against_the_target():
    ids = torch.tensor([[MASK]] * 5)
    targets = torch.arange(3, 8)
    flat = make_popularity_model([0.0] * 5)
    assert flat.rank(ids, targets).tolist() == [5] * 5
    assert flat.rank(ids, targets, candidate_ids=targets).tolist() == [5] * 5
    assert flat.rank(ids, targets, exclude_ids=targets.roll(1).unsqueeze(1)).tolist() == [4] * 5
    steps = make_popularity_model([2.0, 3.0, 2.0, 1.0, 2.0])
    assert steps.rank(ids, targets).tolist() == [4, 1, 4, 5, 4]


def test_a_tie_counts_against_the_target_across_chunks(monkeypatch):
    monkeypatch.setattr(recommendation, "CATALOGUE_CHUNK_SIZE", 4)
    flat = make_popularity_model([0.0] * 9)
    assert flat.rank(torch.tensor([[MASK]] * 9), torch.arange(3, 12)).tolist() == [9] * 9


@with_candidates
def test_a_target_that_is_never_shown_has_rank_0(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    targets = torch.tensor([5, -100, 39, 12])  # excluded, not in the catalogue, excluded, shown
    ranks = model.rank(ids, targets, mask, candidate_ids=candidate_ids, exclude_ids=EXCLUDED)
    assert ranks[:3].tolist() == [0, 0, 0]
    assert ranks[3] > 0


def test_a_special_token_as_target_has_rank_0(model):
    assert model.rank(torch.tensor([[5, MASK]] * 3), torch.tensor([0, 1, 2])).tolist() == [0, 0, 0]


@with_candidates
def test_a_nan_score_is_an_error(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    with torch.no_grad():
        model.item_bias.weight[12] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(ids, mask, candidate_ids=candidate_ids)
    with pytest.raises(ValueError, match="NaN"):
        model.rank(ids, torch.tensor([5, 3, 39, 10]), mask, candidate_ids=candidate_ids)


@pytest.mark.parametrize("candidate_ids", [None, torch.tensor([0, 1, 2, 7, 8, 9])], ids=["catalogue", "candidates"])
def test_special_tokens_are_never_recommended_however_large_their_bias(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    with torch.no_grad():
        model.item_bias.weight[:FIRST] = 1e9
    scores, items = model.recommend(ids, mask, top_k=6, candidate_ids=candidate_ids)
    shown = 6 if candidate_ids is None else 3
    assert (items[:, :shown] >= FIRST).all()
    assert scores[:, :shown].isfinite().all()
    assert scores[:, :shown].max() < 1e3
    assert (items[:, shown:] == PAD).all()


def test_special_tokens_are_never_recommended_however_bad_the_items():
    # These scores are below the constant of special tokens in the logits.
    model = make_popularity_model([-1e6, -2e6])
    _, items = model.recommend(torch.tensor([[MASK]]), top_k=2)
    assert items.tolist() == [[3, 4]]


def test_a_top_k_above_the_catalogue_returns_every_item_once(model):
    scores, items = model.recommend(*pad(HISTORIES), top_k=1000)
    for row in range(len(HISTORIES)):
        assert sorted(items[row][scores[row].isfinite()].tolist()) == list(range(FIRST, VOCAB))


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_top_k_below_1_is_an_error(model, top_k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1; got {top_k}"):
        model.recommend(*pad(HISTORIES), top_k=top_k)


@with_candidates
def test_where_everything_is_excluded_ids_are_0_and_scores_minus_infinity(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    everything = torch.arange(FIRST, VOCAB).expand(len(ids), -1)
    scores, items = model.recommend(ids, mask, top_k=3, candidate_ids=candidate_ids, exclude_ids=everything)
    assert items.tolist() == [[PAD] * 3] * 4
    assert scores.isneginf().all()


def test_exclude_ids_without_columns_exclude_nothing(model):
    ids, mask = pad(HISTORIES)
    nothing = torch.empty((4, 0), dtype=torch.long)
    assert torch.equal(model.recommend(ids, mask, exclude_ids=nothing)[1], model.recommend(ids, mask)[1])
    candidates = CANDIDATES["candidates"]
    for one, other in zip(
        model.recommend(ids, mask, candidate_ids=candidates, exclude_ids=nothing),
        model.recommend(ids, mask, candidate_ids=candidates),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", WITH_HISTORY.values(), ids=WITH_HISTORY)
def test_a_history_adds_to_the_scores_wherever_items_are_ranked_and_not_in_training(options):
    plain, model = make_model(), make_model(**options)
    assert "history_scores.successor_ids" not in plain.state_dict()
    ids, mask = pad(HISTORIES)
    added = history_scores_by_loops(model, HISTORIES)
    scores, plain_scores = mask_scores(model, ids, mask), mask_scores(plain, ids, mask)
    torch.testing.assert_close(scores[:, FIRST:], (plain_scores + added)[:, FIRST:])
    assert added[:3].amax(dim=1).min() > 0.1
    products = model.user_vectors(ids, mask) @ model.item_vectors().T
    torch.testing.assert_close(products, plain_scores[:, FIRST:])
    # History scores are not learnt, so they change neither loss nor gradients.
    for one in (plain, model):
        one.train()(**training_batch()).loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(model)[name], gradient)
    losses = [one.eval()(**training_batch()).loss for one in (plain, model)]
    assert torch.equal(*losses)


def test_a_history_without_a_mask_is_an_error(model):
    ids = torch.tensor([[5, MASK], [5, 6]])
    with pytest.raises(ValueError, match=r"\[MASK\].*append_mask"):
        model.recommend(ids)
    with pytest.raises(ValueError, match=r"\[MASK\].*append_mask"):
        model.rank(ids, torch.tensor([5, 6]))


def test_recommending_in_training_mode_is_an_error(model):
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.recommend(torch.tensor([[MASK]]))
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.rank(torch.tensor([[MASK]]), torch.tensor([5]))


def test_autocast_does_not_tie_neighbours_in_the_ranking():
    # At 100, bfloat16 rounds these scores to one number.
    model = make_popularity_model([100.0, 100.01, 100.02, 100.03])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.recommend(torch.tensor([[MASK]]), top_k=4)[1].tolist() == [[6, 5, 4, 3]]
        assert model.rank(torch.tensor([[MASK]] * 4), torch.arange(3, 7)).tolist() == [4, 3, 2, 1]


def test_what_is_excluded_for_one_row_of_all_is_excluded_for_all(model):
    batch = torch.tensor([[5, 9, MASK], [17, 30, MASK]])
    excluded = model.recommend(batch, top_k=3)[1][1:2]
    for candidate_ids in (None, torch.arange(FIRST, VOCAB)):
        options = {"top_k": 3, "candidate_ids": candidate_ids}
        found = model.recommend(batch, exclude_ids=excluded, **options)
        expected = model.recommend(batch, exclude_ids=excluded.repeat(2, 1), **options)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert not torch.isin(found[1], excluded).any()


def test_targets_are_one_for_each_history(model):
    with pytest.raises(ValueError, match=r"target_ids must have shape \(2,\), one for each history; got \(1,\)"):
        model.rank(torch.tensor([[5, MASK], [17, MASK]]), torch.tensor([9]))
