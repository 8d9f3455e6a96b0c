"""Similar items agree with loops over the catalogue, and with vectors whose angles are known."""

import math

import pytest
import torch
from small_models import FIRST, PAD, VOCAB, make_model
from torch.nn.functional import cosine_similarity

from bert4rec_hf import Bert4RecTokenizer
from bert4rec_hf.model import explanation, recommendation

CANDIDATES = {
    "catalogue": None,
    "candidates": torch.tensor([39, 5, 12, 3, 28, 11, 20, 0]),
    "candidates-by-row": torch.tensor([[5, 39, 12, 0], [3, 4, 11, 12], [39, 0, 0, 0]]),
}
EXCLUDED = {"nothing": None, "one-row": torch.tensor([[28, 12]]), "by-row": torch.tensor([[6, 7], [12, 0], [0, 0]])}
ITEMS = torch.tensor([5, 12, 39])


def reference(model, item: int) -> list[float]:
    """The similarity of each token id to an item, by loops."""
    vectors = model.item_vectors()[:, :-1].double()
    centred = torch.cat((torch.zeros(FIRST, vectors.shape[1]), vectors - vectors.mean(dim=0)))
    scores = [float(cosine_similarity(centred[item], centred[other], dim=0)) for other in range(VOCAB)]
    if model.config.num_transitions:
        counted = model.history_scores
        highest = max(max(row) for row in counted.successor_scores[FIRST:].tolist())
        for successor, score in zip(
            counted.successor_ids[item].tolist(), counted.successor_scores[item].tolist(), strict=True
        ):
            scores[successor] += score / highest
    return scores


@pytest.mark.parametrize("chunk", [2, 7, 2**16])
@pytest.mark.parametrize("candidate_ids", CANDIDATES.values(), ids=CANDIDATES)
@pytest.mark.parametrize("exclude_ids", EXCLUDED.values(), ids=EXCLUDED)
@pytest.mark.parametrize("num_transitions", [0, 5])
def test_similar_items_agree_with_loops(num_transitions, candidate_ids, exclude_ids, chunk, monkeypatch):
    model = make_model(num_transitions=num_transitions)
    for module in (explanation, recommendation):
        monkeypatch.setattr(module, "CATALOGUE_CHUNK_SIZE", chunk)
    monkeypatch.setattr(recommendation, "MAX_GATHERED_VALUES", chunk * len(ITEMS) * model.config.hidden_size)
    scores, found = model.similar_items(ITEMS, top_k=VOCAB, candidate_ids=candidate_ids, exclude_ids=exclude_ids)
    for row, item in enumerate(ITEMS.tolist()):
        expected = reference(model, item)
        allowed = set(range(FIRST, VOCAB)) - {item}
        if candidate_ids is not None:
            allowed &= set(candidate_ids.expand(3, -1)[row].tolist())
        if exclude_ids is not None:
            allowed -= set(exclude_ids.expand(3, -1)[row].tolist())
        best = sorted(allowed, key=lambda other: -expected[other])
        assert found[row].tolist() == best + [PAD] * (found.shape[1] - len(best))
        assert scores[row, : len(best)].tolist() == pytest.approx([expected[other] for other in best], abs=1e-5)
        assert scores[row, len(best) :].isneginf().all()


def with_angles(degrees: list[float], length: float = 1.0, shift: float = 0.0):
    """A model whose items have vectors of these angles, in the first two dimensions, and a common shift."""
    model = make_model(vocab_size=FIRST + len(degrees), num_transitions=2)
    model.history_scores.successor_ids.zero_()
    model.history_scores.successor_scores.zero_()
    vectors = torch.zeros(len(degrees), model.config.hidden_size)
    for row, angle in zip(vectors, degrees, strict=True):
        row[:2] = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
    with torch.no_grad():
        model.get_input_embeddings().weight[FIRST:] = vectors * length + shift
    return model


# The mean of these vectors is 0, since each has its opposite.
ANGLES = [0.0, 10.0, 30.0, 70.0, 180.0, 190.0, 210.0, 250.0]


@pytest.mark.parametrize(("length", "shift"), [(1.0, 0.0), (3.0, 0.0), (1.0, 5.0)])
def test_the_angle_between_vectors_is_what_counts_whatever_their_lengths_and_their_mean(length, shift):
    scores, found = with_angles(ANGLES, length, shift).similar_items(torch.tensor([FIRST]), top_k=3)
    assert (found - FIRST).tolist() == [[1, 2, 3]]
    cosines = [math.cos(math.radians(angle)) for angle in (10, 30, 70)]
    assert scores[0].tolist() == pytest.approx(cosines, abs=1e-5)


def test_the_strongest_successor_of_the_catalogue_counts_as_much_as_an_equal_vector():
    model = with_angles(ANGLES)
    counted = model.history_scores
    counted.successor_ids[FIRST] = torch.tensor([FIRST + 7, FIRST + 2])  # at 250 and 30 degrees
    counted.successor_scores[FIRST] = torch.tensor([4.0, 1.0])
    counted.successor_scores[PAD] = 1000.0  # popularity is no similarity
    counted.successor_ids[PAD] = FIRST + 4
    scores, found = model.similar_items(torch.tensor([FIRST]), top_k=3)
    assert (found - FIRST).tolist() == [[2, 1, 7]]
    cosines = {angle: math.cos(math.radians(angle)) for angle in (10, 30, 250)}
    assert scores[0].tolist() == pytest.approx([cosines[30] + 0.25, cosines[10], cosines[250] + 1.0], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_items_with_the_mean_vector_are_like_nothing_not_like_one_another(dtype):
    model = make_model()
    tokenizer = Bert4RecTokenizer.from_items(map(str, range(VOCAB - FIRST)))
    model.add_items(tokenizer, ["new 1", "new 2", "new 3"])
    scores, _ = model.to(dtype).similar_items(torch.tensor([VOCAB, VOCAB + 1]), top_k=VOCAB)
    assert scores[scores.isfinite()].abs().max() < 0.2
    near, found = model.similar_items(torch.tensor([5]), top_k=1)
    assert near.item() > 0.2
    assert found.item() < VOCAB


def test_a_model_in_bfloat16_finds_the_same_items():
    model = make_model(num_transitions=5)
    scores, found = model.similar_items(ITEMS, top_k=3)
    half_scores, half_found = model.to(torch.bfloat16).similar_items(ITEMS, top_k=3)
    assert half_scores.dtype == torch.float32
    assert torch.equal(half_found, found)
    torch.testing.assert_close(half_scores, scores, atol=0.02, rtol=0)


def test_special_tokens_are_similar_to_nothing_however_their_vectors_point():
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[:FIRST] = 100 * model.get_input_embeddings().weight[5]
    for candidate_ids in (None, torch.arange(VOCAB)):
        _, found = model.similar_items(torch.tensor([5]), top_k=VOCAB, candidate_ids=candidate_ids)
        assert sorted(found[found > 0].tolist()) == [item for item in range(FIRST, VOCAB) if item != 5]


def test_no_items_have_no_similar_items():
    scores, found = make_model(num_transitions=5).similar_items(torch.zeros(0, dtype=torch.long), top_k=4)
    assert scores.shape == found.shape == (0, 4)


@pytest.mark.parametrize(
    ("item_ids", "options", "message"),
    [
        ([5], {"top_k": 0}, "top_k must be at least 1; got 0"),
        ([[5]], {}, r"item_ids must have shape \(batch,\), one item a row; got \(1, 1\)"),
        ([5, 2], {}, "item_ids must be items, whose token ids start at 3; got 2, a special token"),
        ([VOCAB], {}, f"token ids must lie between 0 and vocab_size - 1 = {VOCAB - 1}"),
        ([5], {"exclude_ids": torch.tensor([[VOCAB]])}, "token ids must lie between"),
        ([5], {"candidate_ids": torch.tensor([-1])}, "token ids must lie between"),
    ],
)
def test_wrong_arguments_are_errors(item_ids, options, message):
    with pytest.raises(ValueError, match=message):
        make_model().similar_items(torch.tensor(item_ids), **options)


def test_a_weight_that_is_not_finite_is_an_error():
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[12] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.similar_items(torch.tensor([5]))
