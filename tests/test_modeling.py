"""The model: tensors in, tensors out, on catalogues small enough to check every score."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bert4rec_hf.modeling_bert4rec as modeling
from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
)
from bert4rec_hf.losses import softmax_loss
from bert4rec_hf.modeling_bert4rec import NEWEST_ITEMS

PAD, MASK, FIRST = 0, 1, 3
NUM_ITEMS = 37
VOCAB = FIRST + NUM_ITEMS
ARCHITECTURES = {
    "rotary-pre": {"position_embedding_type": "rotary", "normalization": "pre", "hidden_act": "gelu"},
    "from_start-post-head": {
        "position_embedding_type": "learned_from_start",
        "normalization": "post",
        "prediction_head": True,
        "hidden_act": "relu",
    },
    "from_end-pre-gated": {
        "position_embedding_type": "learned_from_end",
        "normalization": "pre",
        "hidden_act": "silu",
        "gated_feed_forward": True,
    },
}
HISTORIES = [[5, 9, 17, 30, 4, 22, 8], [11, 3], [39, 38, 37, 39], []]


def make_model(seed: int = 0, **options) -> Bert4RecForMaskedItemPrediction:
    """Weights and biases so large that scores differ by far more than the tolerances here."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
    }
    config = Bert4RecConfig(**(sizes | {"hidden_dropout_prob": 0.0, "initializer_range": 0.3} | options))
    model = Bert4RecForMaskedItemPrediction(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    if model.decoder.next_ids is not None:
        # Some other items, each once, and from some items on nothing.
        decoder, (_, number) = model.decoder, model.decoder.next_ids.shape
        for item in (PAD, *range(FIRST, config.vocab_size)):
            count = int(torch.randint(number + 1, ()))
            decoder.next_ids[item, :count] = FIRST + torch.randperm(config.vocab_size - FIRST)[:count].int()
            decoder.next_scores[item, :count] = torch.rand(count) * 3
    return model.eval()


def make_popularity_model(scores: list[float]) -> Bert4RecForMaskedItemPrediction:
    """A model whose scores are known: all weights 0, the biases of the items as given."""
    model = make_model(vocab_size=FIRST + len(scores))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder.bias[FIRST:] = torch.tensor(scores)
    return model


WITH_HISTORY = {
    "transitions": {"num_transitions": 5},
    "repeats": {"repeat_weight": 0.8},
    "both": {"num_transitions": 5, "repeat_weight": 0.8},
}


@pytest.fixture(params=[*ARCHITECTURES.values(), *WITH_HISTORY.values()], ids=[*ARCHITECTURES, *WITH_HISTORY])
def model(request) -> Bert4RecForMaskedItemPrediction:
    return make_model(**request.param)


# Of that fixture, those whose scores are the Transformer's alone.
PLAIN = pytest.mark.parametrize("model", [*ARCHITECTURES.values()], ids=[*ARCHITECTURES], indirect=True)


def pad(rows: list[list[int]], side: str = "right", length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Histories with a [MASK] behind them, and the attention mask."""
    rows = [[*row, MASK] for row in rows]
    length = length or max(map(len, rows))
    fill = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([p + row if side == "left" else row + p for row, p in zip(rows, fill, strict=True)])
    return ids, (ids != PAD).long()


@torch.no_grad()
def mask_scores(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, vocabulary) at the [MASK]s, from the plain forward."""
    return model(input_ids=input_ids, attention_mask=attention_mask).logits[input_ids == MASK]


def of_histories(model, histories) -> torch.Tensor:
    """(histories, vocabulary): what transitions and repeats of a model add to the scores, one by one."""
    added = torch.zeros(len(histories), VOCAB)
    for row, history in zip(added, histories, strict=True):
        for item in set(history):
            row[item] += model.config.repeat_weight * math.log(1 + history.count(item))
        newest = history[::-1][:NEWEST_ITEMS]
        for age, item in enumerate((newest or [PAD]) if model.config.num_transitions else []):
            share = 0.5**age / sum(0.5**age for age in range(max(1, len(newest))))
            for next_id, score in zip(model.decoder.next_ids[item], model.decoder.next_scores[item], strict=True):
                row[next_id] += share * score
    return added


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def training_batch() -> dict[str, torch.Tensor]:
    """Two rows with three labels between them, the second row padded."""
    return {
        "input_ids": torch.tensor([[9, MASK, MASK, 30], [MASK, 11, PAD, PAD]]),
        "labels": torch.tensor([[-100, 5, 17, -100], [3, -100, -100, -100]]),
    }


# The second row's label is the first of its row, lest a padded position, read as 0, find nothing there.
LABEL_POSITIONS = torch.tensor([[1, 2], [0, -1]])


def test_padding_on_either_side_gives_the_same_scores(model):
    right = mask_scores(model, *pad(HISTORIES, "right", 11))
    left = mask_scores(model, *pad(HISTORIES, "left", 11))
    assert (right - left).abs().max() < 1e-5
    # Histories differ, so that equality above says something.
    assert (right[0] - right[1])[FIRST:].abs().max() > 0.1


def test_the_attention_mask_defaults_to_everything_but_pad(model):
    ids, mask = pad(HISTORIES, "left")
    assert torch.equal(mask_scores(model, ids), mask_scores(model, ids, mask))


def test_scores_do_not_depend_on_the_rest_of_the_batch(model):
    together = mask_scores(model, *pad(HISTORIES))
    alone = torch.cat([mask_scores(model, *pad([history])) for history in HISTORIES])
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("histories", [HISTORIES, [HISTORIES[0], HISTORIES[0][::-1]]], ids=["padded", "unpadded"])
def test_eager_attention_gives_the_scores_of_sdpa(model, histories):
    model.set_attn_implementation("sdpa")
    fast = mask_scores(model, *pad(histories))
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert (fast - mask_scores(model, *pad(histories))).abs().max() < 1e-5


def test_a_shuffled_history_gives_other_scores(model):
    scores = mask_scores(model, *pad([[5, 9, 17, 30], [30, 5, 17, 9]]))
    assert (scores[0] - scores[1]).abs().max() > 0.05


def test_an_item_that_is_not_attended_to_changes_the_scores(model):
    ids, mask = pad([[5, 9, 17, 30]])
    hidden = mask.clone()
    hidden[0, 1] = 0
    assert (mask_scores(model, ids, mask) - mask_scores(model, ids, hidden)).abs().max() > 0.05


def test_an_item_that_is_not_attended_to_counts_for_nothing(model):
    ids, mask = pad([[5, 9, 17, 30], [5, 21, 17, 30]])
    mask[:, 1] = 0
    scores = mask_scores(model, ids, mask)
    assert (scores[0] - scores[1]).abs().max() < 1e-5


def test_later_items_influence_an_earlier_mask(model):
    scores = mask_scores(model, torch.tensor([[MASK, 9, 17], [MASK, 9, 30]]))
    assert (scores[0] - scores[1]).abs().max() > 0.05


def test_positions_of_all_rows_may_be_given_once(model):
    ids = torch.tensor([[9, 17, MASK], [17, 30, MASK]])
    options = {"prediction_positions": torch.tensor([[2], [2]])}
    shared = model(input_ids=ids, position_ids=torch.tensor([[0, 2, 5]]), **options).logits
    each = model(input_ids=ids, position_ids=torch.tensor([[0, 2, 5]] * 2), **options).logits
    assert torch.equal(shared, each)
    assert not torch.equal(shared, model(input_ids=ids, **options).logits)


@PLAIN
def test_inputs_embeds_stand_in_for_input_ids(model):
    ids, mask = pad(HISTORIES)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits[ids == MASK]
    assert torch.equal(embedded, mask_scores(model, ids, mask))
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_hidden_states_and_attentions_come_on_request(model):
    model.set_attn_implementation("eager")
    ids, mask = pad(HISTORIES)
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(4, 8, 16)] * 3
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(4, 2, 8, 8)] * 2
    # Nothing attends to the padding of the lone [MASK].
    assert torch.equal(outputs.attentions[0][3, :, 0], torch.eye(8)[:1].expand(2, -1))


EXCLUDED = torch.tensor([[5, 9, 17, 30, 4], [11, 3, 0, 0, 0], [39, 38, 37, 36, 0], [0, 0, 0, 0, 0]])
CANDIDATES = {
    "catalogue": None,
    "candidates": torch.tensor([39, 5, 12, 3, 28, 11, 20]),
    "candidates-by-row": torch.tensor([[5, 39, 12, 0], [3, 4, 11, 12], [39, 0, 0, 0], [10, 20, 30, 0]]),
}
with_candidates = pytest.mark.parametrize("candidate_ids", CANDIDATES.values(), ids=CANDIDATES.keys())
with_exclusion = pytest.mark.parametrize("exclude_ids", [None, EXCLUDED], ids=["nothing-excluded", "excluded"])
# 2: a chunk that begins between the special tokens; 7: one that ends with the last item; 2**16: one chunk.
with_chunks = pytest.mark.parametrize("chunk", [2, 7, 11, 2**16])


def reference_lists(model, ids, mask, candidate_ids, exclude_ids) -> list[list[tuple[int, float]]]:
    """Items and scores, best first, by sorting the full matrix in numpy."""
    matrix = model.user_vectors(ids, mask).double().numpy() @ model.item_vectors().double().numpy().T
    matrix += of_histories(model, [row[row >= FIRST].tolist() for row in ids])[:, FIRST:].numpy()
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
    monkeypatch.setattr(modeling, "ITEMS_PER_CHUNK", chunk)
    monkeypatch.setattr(modeling, "FLOATS_AT_ONCE", chunk * len(HISTORIES) * model.config.hidden_size)
    ids, mask = pad(HISTORIES)
    options = {"candidate_ids": candidate_ids, "exclude_ids": exclude_ids}
    expected = reference_lists(model, ids, mask, **options)
    scores, items = model.recommend(ids, mask, top_k=VOCAB, **options)
    for row, best in enumerate(expected):
        assert items[row].tolist() == [item for item, _ in best] + [PAD] * (items.shape[1] - len(best))
        np.testing.assert_allclose(scores[row, : len(best)], [score for _, score in best], atol=1e-5)
        assert scores[row, len(best) :].isneginf().all()
    # The j-th of the list has rank j; where a row's list has ended, the target is [PAD] and the rank 0.
    for place in range(items.shape[1]):
        wanted = [place + 1 if place < len(best) else 0 for best in expected]
        assert model.rank(ids, items[:, place], mask, **options).tolist() == wanted
    # A shorter list is the beginning of the long one.
    assert torch.equal(model.recommend(ids, mask, top_k=4, **options)[1], items[:, :4])


@pytest.mark.parametrize("item_ids", [range(VOCAB), range(1, 9), range(FIRST, VOCAB), range(7, 7)])
def test_a_range_of_items_has_the_scores_of_its_ids(model, item_ids):
    ids, mask = pad(HISTORIES)
    expected = model(ids, mask, item_ids=torch.tensor(item_ids, dtype=torch.long)).logits
    assert torch.allclose(model(ids, mask, item_ids=item_ids).logits, expected, atol=1e-6)


def test_scores_of_recommend_are_the_logits_at_the_mask(model):
    ids, mask = pad(HISTORIES)
    scores, items = model.recommend(ids, mask, top_k=5)
    torch.testing.assert_close(scores, mask_scores(model, ids, mask).gather(1, items))


def test_the_last_mask_is_the_one_that_is_read(model):
    several = torch.tensor([[5, MASK, 9, MASK]])
    with torch.no_grad():
        logits = model(input_ids=several).logits
    torch.testing.assert_close(model.recommend(several, top_k=5)[0][0], logits[0, 3].topk(5).values)
    assert not torch.allclose(logits[0, 1], logits[0, 3], atol=0.01)


def test_a_target_is_ranked_among_candidates_that_lack_it():
    model = make_popularity_model([5.0, 4.0, 3.0, 2.0, 1.0])
    candidates = torch.tensor([3, 4, 7])  # Scores 5, 4, 1.
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
    monkeypatch.setattr(modeling, "ITEMS_PER_CHUNK", 4)
    flat = make_popularity_model([0.0] * 9)
    assert flat.rank(torch.tensor([[MASK]] * 9), torch.arange(3, 12)).tolist() == [9] * 9


@with_candidates
def test_a_target_that_is_never_shown_has_rank_0(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    targets = torch.tensor([5, -100, 39, 12])  # Excluded, not in the catalogue, excluded, shown.
    ranks = model.rank(ids, targets, mask, candidate_ids=candidate_ids, exclude_ids=EXCLUDED)
    assert ranks[:3].tolist() == [0, 0, 0]
    assert ranks[3] > 0


def test_a_special_token_as_target_has_rank_0(model):
    assert model.rank(torch.tensor([[5, MASK]] * 3), torch.tensor([0, 1, 2])).tolist() == [0, 0, 0]


@with_candidates
def test_a_nan_score_is_an_error(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    with torch.no_grad():
        model.decoder.bias[12] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.recommend(ids, mask, candidate_ids=candidate_ids)
    with pytest.raises(ValueError, match="NaN"):
        model.rank(ids, torch.tensor([5, 3, 39, 10]), mask, candidate_ids=candidate_ids)


@pytest.mark.parametrize("candidate_ids", [None, torch.tensor([0, 1, 2, 7, 8, 9])], ids=["catalogue", "candidates"])
def test_special_tokens_are_never_recommended_however_large_their_bias(model, candidate_ids):
    ids, mask = pad(HISTORIES)
    with torch.no_grad():
        model.decoder.bias[:FIRST] = 1e9
    scores, items = model.recommend(ids, mask, top_k=6, candidate_ids=candidate_ids)
    shown = 6 if candidate_ids is None else 3
    assert (items[:, :shown] >= FIRST).all()
    assert scores[:, :shown].isfinite().all()
    assert scores[:, :shown].max() < 1e3
    assert (items[:, shown:] == PAD).all()


def test_special_tokens_are_never_recommended_however_bad_the_items():
    # Worse than the constant that stands for special tokens in the logits.
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


def test_label_positions_change_neither_loss_nor_gradients(model):
    model.train()
    batch = training_batch()
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss_at_positions = model(**batch, label_positions=LABEL_POSITIONS).loss
    loss_at_positions.backward()
    torch.testing.assert_close(loss_at_positions, loss, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    assert loss > 0.5
    assert expected["model.layers.0.attention.query.weight"].abs().max() > 1e-4


def test_no_logits_are_made_in_training_with_labels(model):
    model.train()
    assert model(**training_batch()).logits is None
    assert model(**training_batch(), label_positions=LABEL_POSITIONS).logits is None


@PLAIN
def test_evaluation_returns_the_logits_and_the_loss_of_training(model):
    trained = model.train()(**training_batch()).loss
    model.eval()
    outputs = model(**training_batch())
    assert outputs.logits.shape == (2, 4, VOCAB)
    torch.testing.assert_close(outputs.loss, trained)
    at_positions = model(**training_batch(), label_positions=LABEL_POSITIONS)
    torch.testing.assert_close(at_positions.loss, trained)
    assert at_positions.logits.shape == (2, 2, VOCAB)
    torch.testing.assert_close(at_positions.logits[0, 1], outputs.logits[0, 2])


def test_logits_without_labels_cover_all_positions_and_special_tokens_have_minus_10000(model):
    outputs = model(input_ids=training_batch()["input_ids"])
    assert outputs.loss is None
    assert outputs.logits.shape == (2, 4, VOCAB)
    assert (outputs.logits[..., :FIRST] == -1e4).all()
    assert outputs.logits[..., FIRST:].abs().max() < 1e3
    some = model(input_ids=training_batch()["input_ids"], item_ids=torch.tensor([2, 7, 3]))
    torch.testing.assert_close(some.logits, outputs.logits[..., [2, 7, 3]])


@pytest.mark.parametrize(
    "label_positions",
    [None, torch.empty((2, 0), dtype=torch.long), torch.full((2, 3), -1)],
    ids=["labels-only", "no-positions", "padded-positions"],
)
@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0)], ids=["counted", "int", "tensor"])
def test_a_batch_with_nothing_to_predict_has_loss_0_and_zero_gradients(model, label_positions, num_items_in_batch):
    model.train()
    input_ids = torch.tensor([[5, 9, 17], [11, PAD, PAD]])
    loss = model(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, -100),
        label_positions=label_positions,
        num_items_in_batch=num_items_in_batch,
    ).loss
    assert loss == 0
    loss.backward()
    # count_nonzero counts NaN.
    assert {name: int(gradient.count_nonzero()) for name, gradient in gradients(model).items()} == dict.fromkeys(
        gradients(model), 0
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_empty_row_leaves_loss_and_gradients_as_they_are(model, attention):
    model.set_attn_implementation(attention)
    model.train()
    batch = training_batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    longer = {
        "input_ids": torch.cat((batch["input_ids"], torch.full((1, 4), PAD))),
        "labels": torch.cat((batch["labels"], torch.full((1, 4), -100))),
        "label_positions": torch.cat((LABEL_POSITIONS, torch.full((1, 2), -1))),
    }
    model(**longer).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)


def test_a_batch_of_empty_histories_has_loss_0(model):
    model.train()
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    batch = DataCollatorForMaskedItemPrediction(tokenizer)([{"input_ids": []}, {"input_ids": []}])
    assert batch["input_ids"].tolist() == [[PAD], [PAD]]
    loss = model(**batch).loss
    assert loss == 0
    loss.backward()
    assert not any(gradient.count_nonzero() for gradient in gradients(model).values())


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_losses_of_two_halves_add_up_to_that_of_the_whole(model, as_tensor):
    model.train()
    batch = training_batch()
    count = torch.tensor(3) if as_tensor else 3
    halves = [
        model(**{name: values[row : row + 1] for name, values in batch.items()}, num_items_in_batch=count).loss
        for row in range(2)
    ]
    torch.testing.assert_close(sum(halves), model(**batch).loss)
    assert halves[0] > 0.1
    assert halves[1] > 0.1


@PLAIN
def test_the_loss_is_the_cross_entropy_over_items_alone(model):
    batch = training_batch()
    outputs = model(**batch)
    states = outputs.prediction_states[[0, 0, 1], [1, 2, 0]]
    items = model.get_input_embeddings().weight[FIRST:]
    logits = states @ items.T + model.decoder.bias[FIRST:]
    by_hand = logits.exp().sum(dim=1).log() - logits[range(3), [5 - FIRST, 17 - FIRST, 3 - FIRST]]
    torch.testing.assert_close(outputs.loss, by_hand.mean())
    # The PAD row, were it in the softmax, would show.
    with torch.no_grad():
        model.decoder.bias[:FIRST] = 50.0
    torch.testing.assert_close(model(**batch).loss, outputs.loss)


@pytest.mark.parametrize("positions", [None, LABEL_POSITIONS], ids=["labels-only", "label-positions"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@PLAIN
def test_where_seen_items_are_filtered_a_row_shows_no_alternatives_to_its_labels(model, positions, training):
    model.config.filter_seen_items = True
    model.train(training)
    # Item 9 is seen in both rows; in the second it is a label as well.
    input_ids = torch.tensor([[9, MASK, MASK, 11], [MASK, 9, 12, PAD]])
    labels = torch.tensor([[-100, 5, 17, -100], [9, -100, -100, -100]])
    loss = model(input_ids=input_ids, labels=labels, label_positions=positions).loss
    model.eval()
    logits = model(input_ids=input_ids).logits[[0, 0, 1], [1, 2, 0]]
    alternatives = torch.ones(3, VOCAB, dtype=torch.bool)
    alternatives[:, :FIRST] = False
    alternatives[[[0, 0], [1, 1], [2, 2]], [[9, 11], [9, 11], [12, 12]]] = False
    sums = logits.masked_fill(~alternatives, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(loss, (sums - logits[range(3), [5, 17, 9]]).mean())


def test_of_the_newest_items_each_counts_half_as_much_as_the_one_after_it():
    decoder = make_model(num_transitions=1).decoder
    # [PAD], [UNK], what is not attended to and what comes later count for nothing.
    ids = torch.tensor([[5, 9, MASK, 0, 0], [0, 0, 0, 0, MASK], [9, 2, 5, MASK, 7], [8, 9, 5, MASK, 0]])
    mask = (ids != PAD).long()
    mask[3, 0] = 0
    expected = [{5: 1 / 3, 9: 2 / 3}, {PAD: 1.0}, {9: 1 / 5, 5: 4 / 5}, {9: 1 / 3, 5: 2 / 3}]
    positions = torch.tensor([[2], [4], [3], [3]])
    at_positions = decoder.newest_items(ids, mask, positions).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        everywhere = decoder.newest_items(ids, mask, None)[range(4), positions.flatten()]
    for newest in (at_positions, everywhere):
        for row, weights in zip(newest, expected, strict=True):
            found = zip(row[:NEWEST_ITEMS].tolist(), row[NEWEST_ITEMS:].tolist(), strict=True)
            assert {item: weight for item, weight in found if weight} == pytest.approx(weights)
    # As far as floats reach, and farther; of more than are looked at the newest.
    far = torch.tensor([[9, *[2] * 300, MASK]])
    assert decoder.newest_items(far, None, torch.tensor([[301]]))[0, 0, [0, NEWEST_ITEMS]].tolist() == [9, 1]
    many = decoder.newest_items(torch.arange(FIRST, 30).unsqueeze(0), None, torch.tensor([[20]]))[0, 0]
    assert many[:NEWEST_ITEMS].tolist() == [*range(FIRST + 19, FIRST + 19 - NEWEST_ITEMS, -1)]


def test_how_often_each_item_stands_before_a_position():
    decoder = make_model(repeat_weight=1.0).decoder
    # [PAD], [UNK], what is not attended to and what comes later count for nothing.
    ids = torch.tensor([[5, 9, 5, MASK, 5], [0, 0, 0, 0, MASK], [9, 2, 9, MASK, 7], [8, 9, 8, MASK, 0]])
    mask = (ids != PAD).long()
    mask[3, 0] = 0
    expected = [{5: 2, 9: 1}, {}, {9: 2}, {9: 1, 8: 1}]
    positions = torch.tensor([[3], [4], [3], [3]])
    at_positions = decoder.counts(ids, mask, positions).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        everywhere = decoder.counts(ids, mask, None)[range(4), positions.flatten()]
    for found in (at_positions, everywhere):
        for row, counts in zip(found, expected, strict=True):
            pairs = zip(row[:5].tolist(), row[5:].tolist(), strict=True)
            assert sorted((item, count) for item, count in pairs if count) == sorted(counts.items())
    # What is at a position does not stand before it.
    assert decoder.counts(ids, mask, torch.tensor([[2]] * 4))[0, 0, 5:].tolist() == [1, 1, 0, 0, 0]
    # More than half precision can count to.
    with torch.autocast("cpu", torch.bfloat16):
        many = decoder.counts(torch.tensor([[*[7] * 301, MASK]]), None, torch.tensor([[301]]))[0, 0]
    assert many[[0, 302]].tolist() == [7, 301]


@pytest.mark.parametrize("options", WITH_HISTORY.values(), ids=WITH_HISTORY)
def test_a_history_adds_to_the_scores_wherever_items_are_ranked_and_not_in_training(options):
    plain, model = make_model(), make_model(**options)
    assert "decoder.next_ids" not in plain.state_dict()
    ids, mask = pad(HISTORIES)
    added = of_histories(model, HISTORIES)
    scores, of_plain = mask_scores(model, ids, mask), mask_scores(plain, ids, mask)
    torch.testing.assert_close(scores[:, FIRST:], (of_plain + added)[:, FIRST:])
    assert added[:3].amax(dim=1).min() > 0.1
    products = model.user_vectors(ids, mask) @ model.item_vectors().T
    torch.testing.assert_close(products, of_plain[:, FIRST:])
    # What is not to be learnt changes no gradient and no loss.
    for one in (plain, model):
        one.train()(**training_batch()).loss.backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradients(model)[name], gradient)
    losses = [one.eval()(**training_batch()).loss for one in (plain, model)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="with num_transitions or repeat_weight, expected input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)


def test_transitions_have_room_for_token_ids_in_half_precision():
    model = make_model(num_transitions=2, vocab_size=2000).bfloat16()
    ids = torch.tensor([[1001, MASK]])
    model.decoder.next_ids[1001] = torch.tensor([1003, 1999])
    model.decoder.next_scores[1001] = torch.tensor([500.0, 400.0])
    assert model.recommend(ids, top_k=2)[1].tolist() == [[1003, 1999]]


def test_an_item_that_is_new_has_no_transitions():
    model = make_model(num_transitions=5)
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    before = model.decoder.next_ids.clone(), model.decoder.next_scores.clone()
    assert model.add_items(tokenizer, ["new"]) == 1
    for table, old in zip((model.decoder.next_ids, model.decoder.next_scores), before, strict=True):
        assert len(table) == VOCAB + 1
        assert torch.equal(table[:-1], old)
        assert not table[-1].any()


def test_a_config_that_lacks_its_transitions_starts_without_them(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = Bert4RecConfig.from_pretrained(tmp_path, num_transitions=4)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, config=config)
    assert torch.equal(loaded.decoder.next_ids, torch.zeros(VOCAB, 4, dtype=torch.int))
    assert torch.equal(loaded.decoder.next_scores, torch.zeros(VOCAB, 4))
    with pytest.raises(Exception, match="num_transitions must be at least 0; got -1"):
        Bert4RecConfig(num_transitions=-1)


def test_the_softmax_loss_has_a_known_value():
    # Two items, scores ln 3 and 0: probabilities 3/4 and 1/4.
    loss = softmax_loss(
        hidden_states=torch.tensor([[1.0], [1.0], [1.0]]),
        item_weight=torch.tensor([[3.0], [1.0]]).log(),
        item_bias=torch.zeros(2),
        labels=torch.tensor([0, 1, -100]),
    )
    torch.testing.assert_close(loss, (torch.tensor(4 / 3).log() + torch.tensor(4.0).log()) / 2)


LOAD_AND_RECOMMEND = """
import sys, torch
torch.set_num_threads(1)
import bert4rec_hf
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
answers = []
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder)
    inputs = tokenizer([["0", "36", "5"], ["7"]], padding=True, return_tensors="pt")
    scores, items = model.recommend(**inputs, top_k=20)
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state
    answers.append({
        "config": AutoConfig.from_pretrained(folder).to_dict(), "training": model.training, "scores": scores,
        "items": items, "hidden": hidden, "names": [type(part).__name__ for part in (tokenizer, model, encoder)],
    })
torch.save(answers, sys.argv[1])
"""


def test_a_saved_folder_gives_the_same_scores_in_a_new_process(tmp_path):
    # One process for all architectures, since starting it takes longer than all else here.
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    inputs = tokenizer([["0", "36", "5"], ["7"]], padding=True, return_tensors="pt")
    architectures = ARCHITECTURES | WITH_HISTORY
    models = [make_model(seed, **options) for seed, options in enumerate(architectures.values())]
    folders = [tmp_path / name for name in architectures]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    subprocess.run([sys.executable, "-c", LOAD_AND_RECOMMEND, tmp_path / "answers.pt", *folders], check=True)
    answers = torch.load(tmp_path / "answers.pt")
    for model, answer in zip(models, answers, strict=True):
        scores, items = model.recommend(**inputs, top_k=20)
        assert torch.equal(answer["scores"], scores)
        assert torch.equal(answer["items"], items)
        with torch.no_grad():
            assert torch.equal(answer["hidden"], model.model(**inputs).last_hidden_state)
        assert not answer["training"]
        assert answer["names"] == ["Bert4RecTokenizer", "Bert4RecForMaskedItemPrediction", "Bert4RecModel"]
        for name in ("position_embedding_type", "normalization", "prediction_head", "hidden_act", "vocab_size"):
            assert answer["config"][name] == getattr(model.config, name)
    assert not torch.equal(answers[0]["scores"], answers[1]["scores"])


class HostWaitsForDeviceError(RuntimeError):
    pass


class NoSynchronization(TorchDispatchMode):
    """Raises where a GPU would have to finish before Python can go on."""

    waiting = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(modeling, "_is_eager_on_cpu", lambda states: False)  # as on a device
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.waiting or by_mask:
            raise HostWaitsForDeviceError(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [[[3, 4, 5, 6], [7, 8], []], [[3, 4, 5], [8, 7, 6]]], ids=["padded", "unpadded"])
def test_a_training_step_never_waits_for_the_device(model, rows):
    model.config.hidden_dropout_prob = 0.1
    model.train()
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    batch = DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=0.5)([{"input_ids": row} for row in rows])
    with NoSynchronization():
        loss = model(**batch, num_items_in_batch=torch.tensor(4)).loss
        loss.backward()
    assert loss > 0
    # Labels alone are found by a boolean index: the guard above does notice such things.
    del batch["label_positions"]
    with NoSynchronization(), pytest.raises(HostWaitsForDeviceError):
        model(**batch)


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_ids_outside_the_vocabulary_are_errors_that_name_its_size(model, wrong):
    ids = torch.tensor([[5, MASK]])
    beyond = torch.tensor([[wrong, MASK]])
    message = rf"vocab_size - 1 = {VOCAB - 1}; got .*{wrong}"
    with pytest.raises(ValueError, match=message):
        model.recommend(beyond)
    with pytest.raises(ValueError, match=message):
        model.rank(beyond, torch.tensor([5]))
    with pytest.raises(ValueError, match=message):
        model.rank(ids, torch.tensor([wrong]))
    with pytest.raises(ValueError, match=message):
        model.recommend(ids, exclude_ids=torch.tensor([[wrong]]))
    with pytest.raises(ValueError, match=message):
        model.recommend(ids, candidate_ids=torch.tensor([wrong]))


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


def test_an_input_longer_than_the_model_takes_is_an_error(model):
    longest, _ = pad([[5] * 11])
    assert model.recommend(longest)[1].shape == (1, 10)
    too_long, _ = pad([[5] * 12])
    with pytest.raises(ValueError, match="length 13, the model takes at most 12"):
        model.recommend(too_long)


def test_a_width_that_the_heads_do_not_divide_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"hidden_size .* num_attention_heads; got 30 and 4: .*hidden_size=32"):
        Bert4RecConfig(hidden_size=30, num_attention_heads=4)


def test_rotary_heads_of_odd_width_are_an_error_and_learned_positions_are_none():
    with pytest.raises(ValueError, match="even width; got hidden_size / num_attention_heads = 6 / 2"):
        Bert4RecConfig(hidden_size=6, num_attention_heads=2)
    model = make_model(hidden_size=6, position_embedding_type="learned_from_start")
    assert model.recommend(torch.tensor([[5, MASK]]), top_k=3)[1].shape == (1, 3)


def test_an_unknown_architecture_switch_is_an_error_that_names_the_choices():
    with pytest.raises(Exception, match=r"normalization.*\n.*'pre', 'post'.*got mid"):
        Bert4RecConfig(normalization="mid")
    with pytest.raises(Exception, match=r"(?s)position_embedding_type.*'learned_from_end'.*got relative"):
        Bert4RecConfig(position_embedding_type="relative")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_a_model_in_half_precision_keeps_the_angles_of_its_positions(dtype):
    rotary = make_model().to(dtype).model.rotary_embedding
    positions = torch.arange(200).unsqueeze(0)
    cosines, sines = rotary(positions, torch.float)
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.double) / 8)  # two heads of 8
    angles = torch.outer(positions[0].double(), frequencies).repeat(1, 2)
    torch.testing.assert_close(cosines[0, 0].double(), angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sines[0, 0].double(), angles.sin(), atol=1e-4, rtol=0)


def test_a_bfloat16_model_scores_in_float32(model):
    exact, _ = model.recommend(*pad(HISTORIES), top_k=5)
    scores, _ = model.to(torch.bfloat16).recommend(*pad(HISTORIES), top_k=5)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert (scores - exact).abs().max() < 0.3
    # More digits than bfloat16 has.
    assert not torch.equal(scores, scores.bfloat16().float())


def test_autocast_scores_in_float32(model):
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = model.recommend(*pad(HISTORIES), top_k=5)
        candidate_scores, _ = model.recommend(*pad(HISTORIES), candidate_ids=torch.tensor([5, 6, 7]))
    assert scores.dtype == candidate_scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert candidate_scores.isfinite()[:, :3].all()


def test_autocast_does_not_tie_neighbours_in_the_ranking():
    # Apart by less than bfloat16 can tell at 100.
    model = make_popularity_model([100.0, 100.01, 100.02, 100.03])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.recommend(torch.tensor([[MASK]]), top_k=4)[1].tolist() == [[6, 5, 4, 3]]
        assert model.rank(torch.tensor([[MASK]] * 4), torch.arange(3, 7)).tolist() == [4, 3, 2, 1]


def test_a_grown_catalogue_keeps_the_old_scores_and_the_tied_table(model):
    ids, mask = pad(HISTORIES)
    before = mask_scores(model, ids, mask)
    model.resize_token_embeddings(VOCAB + 4)
    assert model.config.vocab_size == VOCAB + 4
    assert model.decoder.weight is model.get_input_embeddings().weight
    assert model.decoder.bias.shape == (VOCAB + 4,)
    after = mask_scores(model, ids, mask)
    torch.testing.assert_close(after[:, :VOCAB], before)
    assert after[:, VOCAB:].isfinite().all()
    # A new item can be read as well.
    assert model.recommend(torch.tensor([[VOCAB + 3, MASK]]), top_k=VOCAB + 4)[0][0, VOCAB].isfinite()


# The old name, which the oldest supported transformers knows.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    # With dropout, whose random numbers must be the same in the second forward.
    for options in ARCHITECTURES.values():
        model = make_model(**options, **{"hidden_dropout_prob": 0.2}).train()
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing == checkpointing
            model.zero_grad()
            torch.manual_seed(3)
            model(**training_batch(), label_positions=LABEL_POSITIONS).loss.backward()
            found.append(gradients(model))
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
        assert found[0]["model.layers.0.feed_forward.inner.weight"].abs().max() > 1e-4


def test_the_catalogue_grows_in_one_call_and_old_scores_stay_equal_to_the_bit(tmp_path):
    model, tokenizer = make_model(), Bert4RecTokenizer.from_items(range(100, 100 + NUM_ITEMS), model_max_length=12)
    input_ids = torch.tensor([[3, 4, 5, 1], [7, 6, 1, 0]])
    before = model(input_ids).logits
    items = tokenizer.items
    assert model.add_items(tokenizer, ["new", 100, "0"], titles={"new": "New"}) == 2
    assert tokenizer.items == [*items, "0", "new"]
    assert tokenizer.title("new") == "New"
    after = model(input_ids).logits
    assert torch.equal(after[..., : before.shape[-1]], before)
    # The mean of the old rows scores the mean of the old scores.
    mean = before[..., 3:].mean(dim=-1)
    torch.testing.assert_close(after[..., -1], mean, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, after)
    assert AutoTokenizer.from_pretrained(tmp_path).items == tokenizer.items
    assert loaded.decoder.weight is loaded.get_input_embeddings().weight
    assert model.add_items(tokenizer, ["new"]) == 0


def test_growing_with_the_tokenizer_of_another_model_is_an_error():
    tokenizer = Bert4RecTokenizer.from_items(list("abc"), model_max_length=12)
    with pytest.raises(ValueError, match="the tokenizer has 6 token ids"):
        make_model().add_items(tokenizer, ["new"])
    assert tokenizer.num_items == 3


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout = modeling.Bert4RecDropout(p)
    states = torch.full((1001, 999), 2.0, requires_grad=True)  # no multiple of four
    dropped = dropout(states)
    kept = dropped != 0
    error = (p * (1 - p) / states.numel()) ** 0.5
    assert (~kept).double().mean().item() == pytest.approx(p, abs=5 * error + 2**-17)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 2 / (1 - p)), rtol=2e-2, atol=0)
    # Neighbours, which come from one random number, are dropped independently.
    both = (~kept[:, 1:] & ~kept[:, :-1]).double().mean().item()
    assert both == pytest.approx(p * p, abs=5 * error + 2**-16)
    (gradient,) = torch.autograd.grad(dropped.sum(), states)
    assert torch.equal(gradient, dropped / 2)
    torch.manual_seed(0)
    assert torch.equal(dropout(states), dropped)
    assert dropout(states.bfloat16()).dtype == torch.bfloat16
    assert dropout.eval()(states) is states


@pytest.mark.parametrize("item_loss", ["softmax", "sampled_softmax"])
def test_a_step_on_a_device_and_on_a_cpu_have_the_same_loss_and_gradients(monkeypatch, item_loss):
    model = make_model(item_loss=item_loss, filter_seen_items=True).train()
    tokenizer = Bert4RecTokenizer.from_items(range(NUM_ITEMS), model_max_length=12)
    negatives = {} if item_loss == "softmax" else {"num_negatives": 5}
    collator = DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=0.5, **negatives)
    batch = collator([{"input_ids": row} for row in ([3, 4, 5, 6, 7, 8, 9], [7, 8], [])])
    assert (batch["label_positions"] < 0).any()
    found = []
    for eager_on_cpu in (True, False):
        monkeypatch.setattr(modeling, "_is_eager_on_cpu", lambda states, answer=eager_on_cpu: answer)
        loss = model(**batch).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][0] > 0


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


def test_special_tokens_are_no_labels(model):
    input_ids = torch.tensor([[MASK, MASK, MASK, MASK]])
    with torch.no_grad():
        of_padded, of_ignored = (
            model(input_ids=input_ids, labels=torch.tensor([[*labels, 9]])).loss
            for labels in ((0, 1, 2), (-100, -100, -100))
        )
    assert torch.equal(of_padded, of_ignored)


def test_other_ids_of_special_tokens_are_an_error():
    with pytest.raises(ValueError, match="mask_token_id is 1 in every catalogue; got 7"):
        Bert4RecConfig(mask_token_id=7)


def test_a_config_without_return_dict_changes_no_answer(model, tmp_path):
    batch = torch.tensor([[5, 9, MASK]])
    expected = model.recommend(batch, top_k=3)
    model.save_pretrained(tmp_path)
    other = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path, return_dict=False).eval()
    torch.testing.assert_close(other.recommend(batch, top_k=3), expected)
    torch.testing.assert_close(other(batch, labels=batch)[0], model(batch, labels=batch).loss)


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").chmod(0o644)
    make_model().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == (tmp_path / "config.json").stat().st_mode & 0o777
