"""Models of event types: what the types change, and what they must not change."""

import math

import pytest
import torch
from small_models import ARCHITECTURES, FIRST, MASK, NUM_ITEMS, PAD, make_model

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
)
from bert4rec_hf.model.history_scores import NUM_NEWEST_EVENTS
from bert4rec_hf.model.losses import mask_seen

BUY, CART, VIEW = 1, 2, 3
TYPES = {"num_event_types": 3, "target_event_type_ids": [BUY]}
IDS = torch.tensor([[5, 9, 17, 9, MASK], [11, 3, MASK, PAD, PAD]])
KINDS = torch.tensor([[VIEW, VIEW, BUY, CART, BUY], [BUY, VIEW, BUY, 0, 0]])


def by_item(pairs) -> dict[int, float]:
    """The values that are not 0 of the first row, by item."""
    return {item: value for item, value in zip(*(part[0].tolist() for part in pairs), strict=True) if value}


def make_tokenizer() -> Bert4RecTokenizer:
    items = [f"{number:02}" for number in range(NUM_ITEMS)]
    return Bert4RecTokenizer.from_items(
        items, model_max_length=12, event_types=["buy", "cart", "view"], target_event_types=["buy"]
    )


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=[*ARCHITECTURES])
def test_the_types_of_events_change_the_scores(options):
    model = make_model(**options, **TYPES)
    logits = model(input_ids=IDS, event_type_ids=KINDS).logits[0, -1]
    for place in range(5):
        changed = KINDS.clone()
        changed[0, place] = CART if changed[0, place] != CART else VIEW
        assert not torch.allclose(model(input_ids=IDS, event_type_ids=changed).logits[0, -1], logits, atol=1e-3)
    plain = model(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS, event_type_ids=torch.zeros_like(KINDS)).logits, plain)


def test_padding_of_types_has_no_effect():
    model = make_model(**TYPES)
    alone = model(input_ids=IDS[1:, :3], event_type_ids=KINDS[1:, :3]).logits[0, 2]
    torch.testing.assert_close(model(input_ids=IDS, event_type_ids=KINDS).logits[1, 2], alone)


def test_a_model_without_types_has_no_embedding_of_them_and_refuses_types():
    model = make_model()
    assert not any("event_type" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="the model has no event types"):
        model(input_ids=IDS, event_type_ids=KINDS)
    with pytest.raises(ValueError, match=r"shape of the input, \(2, 5\); got \(2, 4\)"):
        make_model(**TYPES)(input_ids=IDS, event_type_ids=KINDS[:, :4])
    with pytest.raises(ValueError, match="between 1 and num_event_types"):
        Bert4RecConfig(num_event_types=1, target_event_type_ids=[2])


def test_types_survive_saving_and_loading(tmp_path):
    model, tokenizer = make_model(**TYPES), make_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path)
    assert (loaded.config.num_event_types, loaded.config.target_event_type_ids) == (3, [BUY])
    expected = model(input_ids=IDS, event_type_ids=KINDS).logits
    assert torch.equal(loaded(input_ids=IDS, event_type_ids=KINDS).logits, expected)
    again = Bert4RecTokenizer.from_pretrained(tmp_path)
    assert (again.event_types, again.target_event_types) == (["buy", "cart", "view"], ["buy"])
    assert make_model().eval() is not None


def test_unknown_types_are_errors_that_name_those_known():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"'sale' of item 1 .*buy, cart, view"):
        tokenizer.event_type_ids(["buy", "sale"])
    with pytest.raises(ValueError, match="'view' is not recommended for; expected one of buy"):
        tokenizer.target_event_type_id("view")
    with pytest.raises(ValueError, match="trained with event types"):
        Bert4RecTokenizer.from_items(["1"]).event_type_ids(["buy"])
    with pytest.raises(ValueError, match="must be among the event types a; got b"):
        Bert4RecTokenizer.from_items(["1"], event_types=["a"], target_event_types=["b"])


def test_a_mask_does_not_depend_on_later_occurrences_of_its_item():
    """Whether and how often an item comes again after a masked event must not be seen."""
    model = make_model(**TYPES)
    collator = DataCollatorForMaskedItemPrediction(make_tokenizer(), mask_ratio=0.9)
    found = []
    for item in (5, 8):  # the second occurrence is of the label, and of the label of the other row
        row = {"input_ids": [7, item, 9, item, 6], "event_type_ids": [VIEW, BUY, VIEW, CART, VIEW]}
        batch = collator([row])
        assert batch["labels"].tolist() == [[item]]
        del batch["labels"]
        found.append(model(**batch).logits)
    assert torch.equal(*found)


def test_a_causal_query_sees_only_earlier_events():
    model = make_model(causal_attention=True, **TYPES)
    collator = DataCollatorForMaskedItemPrediction(make_tokenizer(), mask_ratio=1.0, causal=True)
    found = []
    for last, kind in ((5, CART), (8, VIEW)):
        row = {"input_ids": [7, 5, last], "event_type_ids": [VIEW, BUY, kind]}
        batch = collator([row])
        del batch["labels"]
        found.append(model(**batch).logits)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("causal", [False, True])
def test_the_loss_excludes_only_seen_items_of_the_type_of_the_label(causal):
    model = make_model(filter_seen_items=True, causal_attention=causal, **TYPES).train()
    torch.manual_seed(0)
    collator = DataCollatorForMaskedItemPrediction(make_tokenizer(), mask_ratio=0.5, causal=causal)
    row = {"input_ids": [7, 5, 9, 5, 6, 4], "event_type_ids": [VIEW, BUY, CART, BUY, BUY, BUY]}
    batch = collator([row])
    logits = model(**batch, skip_logits=False).logits
    is_bought = batch["event_type_ids"] == BUY
    logits = mask_seen(logits, batch["input_ids"].where(is_bought, 0), batch["labels"])
    expected = torch.nn.functional.cross_entropy(logits[0, :, FIRST:], batch["labels"][0] - FIRST)
    torch.testing.assert_close(model(**batch).loss, expected)
    assert torch.isfinite(logits[..., [7, 9]]).all()


@pytest.mark.parametrize("name", ["softmax", "sampled_softmax", "bpr", "gbce"])
def test_weights_scale_the_losses_of_labels(name):
    model = make_model(item_loss=name).train()
    batch = {"input_ids": torch.tensor([[5, MASK, MASK, 7]]), "masked_positions": torch.tensor([[1, 2]])}
    batch |= {} if name == "softmax" else {"negative_ids": torch.tensor([20, 21, 22])}

    def loss(labels, weights=None):
        given = {} if weights is None else {"loss_weights": torch.tensor([weights])}
        return model(**batch, labels=torch.tensor([labels]), **given).loss

    both, first, second = loss([8, 9]), loss([8, -100]), loss([-100, 9])
    assert torch.equal(loss([8, 9], [1.0, 1.0]), both)
    torch.testing.assert_close(loss([8, 9], [3.0, 0.5]), (3 * first + 0.5 * second) / 2)
    model.zero_grad()
    loss([8, 9], [0.0, 0.0]).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_repeats_count_events_of_the_target_type_and_recency_says_what_was_last_done_with_an_item():
    scores = make_model(repeat_weight=2.0, recency_weight=3.0, **TYPES).history_scores
    table = torch.arange(4.0 * 2 * 4 * NUM_NEWEST_EVENTS).view(4, 2, 4, NUM_NEWEST_EVENTS)
    scores.conversion_scores.copy_(table)
    # 5 is bought and then viewed, 9 bought after it was in the cart, 7 viewed twice, 6 put into the cart.
    history = torch.tensor([[5, 9, 9, 7, 6, 7, 5, 0]])
    kinds = torch.tensor([[BUY, CART, BUY, VIEW, CART, VIEW, VIEW, 0]])
    recency = {
        5: table[BUY, 1, VIEW, 0],
        9: table[BUY, 1, BUY, 0],
        7: table[BUY, 0, VIEW, 1],
        6: table[BUY, 0, CART, 0],
    }
    repeats = {5: math.log(2), 9: math.log(2)}
    features = scores.features(history, None, kinds, torch.tensor([BUY]))
    assert by_item(features["recency"]) == {item: value.item() for item, value in recency.items()}
    assert by_item(features["repeats"]) == pytest.approx(repeats)
    expected = {item: 3 * value.item() + 2 * repeats.get(item, 0) for item, value in recency.items()}
    assert by_item(scores(history, None, kinds, torch.tensor([BUY]))) == pytest.approx(expected)
    assert by_item(scores(history.flip(1), torch.ones(1, 8), kinds.flip(1))) != pytest.approx(expected)
    padded = torch.nn.functional.pad(history, (3, 2)), torch.nn.functional.pad(kinds, (3, 2))
    assert by_item(scores(padded[0], None, padded[1])) == pytest.approx(expected)  # BUY is the first target type
    parts = scores.contributions(history, torch.tensor([[6, 5]]), torch.tensor([[5, 7, 6]]), kinds)
    torch.testing.assert_close(parts, torch.tensor([[[0, 0, expected[6]], [expected[5], 0, 0]]]))
    # For another target type, the same history has other repeats and other scores. Without types, all are targets.
    of_carts = scores.features(history, None, kinds, torch.tensor([CART]))
    assert by_item(of_carts["repeats"]) == pytest.approx({9: math.log(2), 6: math.log(2)})
    assert by_item(of_carts["recency"])[6] == table[CART, 1, CART, 0]
    assert by_item(scores.features(history)["recency"])[9] == table[BUY, 1, BUY, 4]


def test_older_events_than_are_counted_have_no_conversion_score():
    scores = make_model(recency_weight=1.0, **TYPES).history_scores
    scores.conversion_scores.fill_(1.0)
    history = torch.arange(3, 3 + NUM_NEWEST_EVENTS + 1).unsqueeze(0)
    kinds = torch.full_like(history, VIEW)
    assert set(by_item(scores(history, None, kinds))) == set(range(4, 3 + NUM_NEWEST_EVENTS + 1))


def test_recommendations_rank_and_explanations_read_types():
    model, tokenizer = make_model(repeat_weight=0.5, recency_weight=2.0, num_transitions=4, **TYPES), make_tokenizer()
    history, kinds = [5, 9, 17, 9], [VIEW, VIEW, BUY, CART]
    of_history = {"history_type_ids": torch.tensor([kinds]), "target_type_ids": torch.tensor([BUY])}
    model.history_scores.conversion_scores.uniform_(generator=torch.Generator().manual_seed(0))
    ids, types = IDS[:1], KINDS[:1]
    scores, items = model.recommend(ids, event_type_ids=types, top_k=NUM_ITEMS)
    plain = model(input_ids=ids, event_type_ids=types).logits[0, -1]
    for item, value in zip(*model.history_scores(torch.tensor([history]), **of_history), strict=True):
        plain = plain.index_add(0, item[0] if item.dim() > 1 else item, value[0] if value.dim() > 1 else value)
    torch.testing.assert_close(scores[0], plain[items[0]])
    ranks = model.rank(ids, items[:, 2], event_type_ids=types)
    assert ranks.tolist() == [3]
    given = {"history_ids": torch.tensor([history]), "history_type_ids": torch.tensor([kinds])}
    assert torch.equal(model.recommend(ids, event_type_ids=types, top_k=NUM_ITEMS, **given)[0], scores)
    states = model.mask_states(ids, event_type_ids=types)
    assert torch.equal(model.search(states, given["history_ids"], top_k=NUM_ITEMS, **of_history)[1], scores)
    with pytest.raises(ValueError, match=r"shape of history_ids, \(1, 4\); got \(1, 3\)"):
        model.search(states, given["history_ids"], history_type_ids=torch.tensor([kinds[1:]]), top_k=1)
    sources, contributions = model.explain(
        tokenizer, torch.tensor([history]), items[:, :3], history_type_ids=torch.tensor([kinds]),
        target_type_ids=torch.tensor([BUY]),
    )  # fmt: skip
    assert sources.tolist() == [[9, 17, 5]]
    without = torch.tensor([[5, 17, MASK]]), torch.tensor([[VIEW, BUY, BUY]])
    change = model.mask_states(*(values for values in (ids,)), event_type_ids=types) - model.mask_states(
        without[0], event_type_ids=without[1]
    )
    vectors = model.get_input_embeddings().weight
    network = (vectors[items[0, :3]] - vectors[FIRST:].mean(0)) @ change[0, 0]
    counted = model.history_scores.contributions(torch.tensor([history]), items[:, :3], sources, **of_history)
    torch.testing.assert_close(contributions[0, :, 0], network + counted[0, :, 0])
