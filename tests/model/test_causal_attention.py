"""Models with `causal_attention`: training predicts every item of a history in one pass, as serving would."""

import pytest
import torch

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
)
from bert4rec_hf.convert.recbole import convert_to_recbole
from bert4rec_hf.model.configuration_bert4rec import MASK_TOKEN_ID

ITEMS = [f"item {number}" for number in range(20)]
IMPLEMENTATIONS = ["sdpa", "eager"]


def small_model(implementation="sdpa", **kwargs):
    torch.manual_seed(0)
    config = Bert4RecConfig(
        vocab_size=23, hidden_size=32, num_attention_heads=2, max_position_embeddings=12, initializer_range=0.3,
        causal_attention=True, attn_implementation=implementation, **({"filter_share": 0.3} | kwargs),
    )  # fmt: skip
    return Bert4RecForMaskedItemPrediction(config).eval()


def collator(**kwargs):
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, model_max_length=12)
    return DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=1.0, causal=True, **kwargs)


ROWS = [[5, 9, 4, 17, 9, 3], [8, 20], [11] * 12, [7]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("positions", ["rotary", "learned_from_start"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_one_training_pass_gives_the_scores_that_serving_gives_to_each_prefix(implementation, positions, share):
    model = small_model(implementation, position_embedding_type=positions, filter_share=share)
    batch = collator()([{"input_ids": row} for row in ROWS])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
        for number, row in enumerate(ROWS):
            assert labels[number, : len(row)].tolist() == row
            for length in range(len(row)):
                served = torch.tensor([[*row[:length], MASK_TOKEN_ID]])
                expected = model(input_ids=served, masked_positions=torch.tensor([[length]])).logits
                torch.testing.assert_close(logits[number, length], expected[0, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_and_later_items_change_nothing(implementation):
    model = small_model(implementation)
    row = [5, 9, 4, MASK_TOKEN_ID]
    rows = torch.tensor([[*row, 0, 0], [0, 0, *row]])
    with torch.no_grad():
        states = model.mask_states(rows)
        torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=0)
        hidden = [model.model(torch.tensor([[5, 9, 4, last]])).last_hidden_state for last in (7, 8)]
    torch.testing.assert_close(hidden[0][0, :3], hidden[1][0, :3], atol=1e-6, rtol=0)
    assert not torch.allclose(hidden[0][0, 3], hidden[1][0, 3])


def test_the_filter_is_an_average_and_what_the_newest_item_differs_from_it_by():
    torch.manual_seed(0)
    model = small_model(num_hidden_layers=1, filter_share=1.0)
    layer = model.model.layers[0]
    states, weight = torch.randn(1, 4, 32), layer.filter.weight
    one, two, _, _ = states[0]
    # Three items, and a [MASK] that is to predict what follows the second: it sees two of them.
    indices, at = torch.tensor([[0, 1, 2, -1]]), torch.tensor([[0, 1, 2, 2]])
    ids = torch.tensor([[5, 9, 4, MASK_TOKEN_ID]])
    seen = []
    with torch.no_grad():
        found = layer.filter(states, indices, at)[0]
        average = 0.25 * one + 0.5 * two
        torch.testing.assert_close(found[3], average + weight**2 * (two - average))
        assert torch.equal(found[2], found[3])
        torch.testing.assert_close(found[1], 0.5 * one + weight**2 * 0.5 * one)
        assert not found[0].any()
        layer.filter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
        model(input_ids=ids, position_ids=at)
        model.mask_states(torch.tensor([[0, 0, 5, 9, MASK_TOKEN_ID]]))
        model(input_ids=ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    at_all_positions = [0, 1, 2, *[-1] * 9]  # given positions may be up to max_position_embeddings
    assert [index.tolist() for index in seen] == [[at_all_positions], [[2, 3, -1, -1, -1]], [[0, 2, -1, -1]]]
    with pytest.raises(
        ValueError, match=r"filter_share needs an attention_mask of shape \(batch, length\); got \(1, 1"
    ):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_a_filter_of_share_1_leaves_no_attention_and_of_share_0_no_weights():
    ids = torch.tensor([[5, 9, 4, MASK_TOKEN_ID]])
    model = small_model(filter_share=1.0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for layer in model.model.layers:
            layer.attention.output.weight.mul_(2)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("filter" in name for name in small_model(filter_share=0.0).state_dict())


def test_a_bidirectional_model_looks_at_later_items():
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=23, hidden_size=32, initializer_range=0.3)).eval()
    with torch.no_grad():
        hidden = [model.model(torch.tensor([[5, 9, 4, last]])).last_hidden_state for last in (7, 8)]
    assert not torch.allclose(hidden[0][0, :3], hidden[1][0, :3], atol=1e-4)


def test_the_loss_is_the_mean_over_all_prefixes():
    model = small_model()
    batch = collator()([{"input_ids": row} for row in ROWS])
    losses = []
    with torch.no_grad():
        for row in ROWS:
            for length, label in enumerate(row):
                served = torch.tensor([[*row[:length], MASK_TOKEN_ID]])
                logits = model(input_ids=served, masked_positions=torch.tensor([[length]])).logits
                losses.append(-logits[0, 0, 3:].log_softmax(0)[label - 3])
        assert float(model(**batch).loss) == pytest.approx(float(sum(losses) / len(losses)), abs=1e-5)
        model.train()
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        assert float(model(**batch).loss) == pytest.approx(float(sum(losses) / len(losses)), abs=1e-5)


def test_a_share_of_the_items_can_be_predicted():
    torch.manual_seed(0)
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, model_max_length=12)
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12]}] * 500
    batch = DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=0.25, causal=True)(rows)
    number = (batch["labels"] >= 0).sum().item()
    assert abs(number / 4000 - 0.25) < 0.05
    places = batch["position_ids"].gather(1, batch["masked_positions"].clamp(min=0))
    is_label = batch["labels"] >= 0
    assert torch.equal(batch["labels"][is_label], places[is_label] + 5)
    assert torch.equal(batch["input_ids"][:, :8], torch.tensor(rows[0]["input_ids"]).expand(500, -1))
    batch = DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=1.0, causal=True, last_item_ratio=1.0)(rows)
    assert batch["labels"].tolist() == [[12]] * 500
    batch = DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=1.0, causal=True, max_predictions=3)(rows)
    assert ((batch["labels"] >= 0).sum(1) == 3).all()


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="causal_attention needs positions that do not depend on later items"):
        Bert4RecConfig(causal_attention=True, position_embedding_type="learned_from_end")
    with pytest.raises(ValueError, match=r"filter_share must lie between 0 and 1; got 1\.5"):
        Bert4RecConfig(causal_attention=True, filter_share=1.5)
    with pytest.raises(ValueError, match=r"filter_share 0\.3 needs causal_attention.*set causal_attention to true, or"):
        Bert4RecConfig(filter_share=0.3)
    tokenizer = Bert4RecTokenizer.from_items(ITEMS)
    with pytest.raises(ValueError, match="mask_ratio must lie between 0 and 1, both excluded; got 1"):
        DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=1.0)
    with pytest.raises(ValueError, match="mask_ratio must lie above 0 and at most 1; got 0"):
        DataCollatorForMaskedItemPrediction(tokenizer, mask_ratio=0.0, causal=True)
    with pytest.raises(ValueError, match="the input has length 13, the model takes at most 12"):
        small_model()(input_ids=torch.full((1, 13), 5))
    with pytest.raises(
        ValueError, match="causal_attention needs attn_implementation sdpa or eager; got flex_attention"
    ):
        small_model("flex_attention")(input_ids=torch.full((1, 5), 5))


def test_a_causal_model_has_no_counterpart_in_recbole(tmp_path):
    model = small_model(position_embedding_type="learned_from_start", normalization="post", prediction_head=True)
    model.save_pretrained(tmp_path / "model")
    Bert4RecTokenizer.from_items(ITEMS, model_max_length=12).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="causal_attention"):
        convert_to_recbole(tmp_path / "model", tmp_path / "theirs.pth")
