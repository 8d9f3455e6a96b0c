"""How positions are counted, attention without a mask, and the bias of new items."""

import pytest
import torch
from small_models import ARCHITECTURES, MASK, make_model, make_popularity_model

from bert4rec_hf import Bert4RecTokenizer

IDS = torch.tensor([[5, 9, 17, 30, MASK]])


@torch.no_grad()
def scores(model, **inputs) -> torch.Tensor:
    return model(**inputs).logits[..., 3:]


@pytest.mark.parametrize(
    ("kind", "positions"),
    [("rotary", [0, 1, 2, 3, 4]), ("learned_from_start", [0, 1, 2, 3, 4]), ("learned_from_end", [4, 3, 2, 1, 0])],
)
def test_positions_are_counted_from_the_side_that_the_config_names(kind, positions):
    model, position_ids = make_model(position_embedding_type=kind), torch.tensor([positions])
    assert torch.equal(scores(model, input_ids=IDS), scores(model, input_ids=IDS, position_ids=position_ids))
    other = scores(model, input_ids=IDS, position_ids=position_ids.flip(1))
    assert (scores(model, input_ids=IDS) - other).abs().max() > 0.05


def test_rotary_scores_depend_on_distances_alone():
    model, position_ids = make_model(position_embedding_type="rotary"), torch.arange(5).unsqueeze(0)
    near = scores(model, input_ids=IDS, position_ids=position_ids)
    assert (scores(model, input_ids=IDS, position_ids=position_ids + 20) - near).abs().max() < 1e-4
    assert (scores(model, input_ids=IDS, position_ids=position_ids * 2) - near).abs().max() > 0.05


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_embeddings_without_a_mask_are_attended_to_on_both_sides(options, attention):
    model = make_model(**options)
    model.set_attn_implementation(attention)
    embeddings = model.get_input_embeddings()(IDS)
    found = scores(model, inputs_embeds=embeddings)
    torch.testing.assert_close(found, scores(model, input_ids=IDS), atol=1e-5, rtol=0)


def test_a_new_item_starts_with_the_mean_bias():
    model, tokenizer = (
        make_popularity_model([2.0, 5.0, 5.0]),
        Bert4RecTokenizer.from_items(list("abc"), model_max_length=12),
    )
    assert model.add_items(tokenizer, ["d"]) == 1
    found, items = model.recommend(torch.tensor([[MASK]]), top_k=4)
    assert found.tolist() == [[5.0, 5.0, 4.0, 2.0]]
    assert items[0, 2:].tolist() == [6, 3]
