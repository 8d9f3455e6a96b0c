"""The projection from item features, trained together with the item vectors."""

import numpy as np
import pytest
import torch
from torch.func import functional_call
from transformers import TrainerState

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID
from bert4rec_hf.model.item_features import ItemFeatures
from bert4rec_hf.training.item_feature_training import ItemFeatureTraining, fit_item_projection

NUM_ITEMS = 30
TABLES = "model.embeddings.item_embeddings.weight", "item_bias.weight"


@pytest.fixture
def given():
    """A model with a fitted projection, its tokenizer, and the item table. The last five items have not trained."""
    items = [f"item {number:02}" for number in range(NUM_ITEMS)]
    table = {"item_id": items, "brand": [f"b{number % 4}" for number in range(NUM_ITEMS)], "price": [*range(NUM_ITEMS)]}
    counts = dict.fromkeys(items[:-5], 3) | dict.fromkeys(items[-5:], 0)
    tokenizer = Bert4RecTokenizer.from_items(items, counts=counts)
    columns = [{"name": "brand", "kind": "category"}, {"name": "price", "kind": "number"}]
    tokenizer.item_features = ItemFeatures.fit(columns, table)
    torch.manual_seed(0)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, hidden_dropout_prob=0.0)
    model = Bert4RecForMaskedItemPrediction(config)
    torch.nn.init.normal_(model.item_bias.weight)
    fit_item_projection(model, tokenizer, table)
    return model.train(), tokenizer, table


def batch(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    input_ids = torch.randint(FIRST_ITEM_ID, NUM_ITEMS + FIRST_ITEM_ID, (8, 6), generator=chance)
    labels = torch.full_like(input_ids, -100)
    labels[:, 3], input_ids[:, 3] = input_ids[:, 3], 1
    return {"input_ids": input_ids, "labels": labels}


def dense(rows, num_numbers: int) -> torch.Tensor:
    places, values, starts = rows
    matrix = torch.zeros(len(starts) - 1, num_numbers)
    matrix[torch.arange(len(starts) - 1).repeat_interleave(starts.diff()), places] = values
    return matrix


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_steps_are_those_of_two_tables_whose_sum_the_network_reads(given, share):
    model, tokenizer, table = given
    weight = model.item_projection.weight.clone().requires_grad_()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    numbers = dense(tokenizer.feature_rows(table, tokenizer.items), len(weight))
    is_trained = torch.arange(NUM_ITEMS) < NUM_ITEMS - 5

    def projected(weight):
        whole = numbers @ weight
        whole = torch.where(is_trained.unsqueeze(1), whole, whole.detach())  # items without events train no weight
        return torch.nn.functional.pad(whole, (0, 0, FIRST_ITEM_ID, 0))

    # The reference: autograd through the sum of a table of the items' own and the projection.
    own = {name: value.clone().requires_grad_() for name, value in before.items()}
    with torch.no_grad():
        own[TABLES[0]] -= projected(weight)[:, :-1]
        own[TABLES[1]] -= projected(weight)[:, -1]
    # Not Adam, which would make steps of the noise in gradients that are 0.
    reference = torch.optim.SGD([*own.values(), weight], lr=0.3, momentum=0.9)
    for step in range(4):
        draws = np.random.default_rng((7, step)).random(NUM_ITEMS)
        is_kept = torch.from_numpy(~((draws < share) & is_trained.numpy()))
        is_kept = torch.nn.functional.pad(is_kept, (FIRST_ITEM_ID, 0), value=True)
        made = projected(weight)
        sums = dict(own)
        sums[TABLES[0]] = own[TABLES[0]] * is_kept.unsqueeze(1) + made[:, :-1]
        sums[TABLES[1]] = own[TABLES[1]] * is_kept + made[:, -1]
        reference.zero_grad()
        functional_call(model, sums, kwargs=batch(step)).loss.backward()
        reference.step()
    with torch.no_grad():
        expected = own[TABLES[0]] + projected(weight)[:, :-1], own[TABLES[1]] + projected(weight)[:, -1]

    training = ItemFeatureTraining(tokenizer, table, share=share, seed=7)
    optimizer = torch.optim.SGD([*model.parameters(), model.item_projection.weight], lr=0.3, momentum=0.9)
    state = TrainerState()
    training.on_train_begin(None, state, None, model=model)
    for state.global_step in range(4):
        training.on_step_begin(None, state, None, model=model)
        optimizer.zero_grad()
        model(**batch(state.global_step)).loss.backward()
        training.on_pre_optimizer_step(None, state, None, model=model)
        optimizer.step()
        training.on_optimizer_step(None, state, None, model=model)
    found = dict(model.named_parameters())
    for name, table in zip(TABLES, expected, strict=True):
        torch.testing.assert_close(found[name], table, atol=2e-5, rtol=0)
        assert (found[name] - before[name]).abs().max() > 0.01
    torch.testing.assert_close(model.item_projection.weight, weight.detach(), atol=2e-5, rtol=0)


def test_the_share_is_of_items_that_train_and_differs_from_step_to_step(given):
    model, tokenizer, table = given
    training = ItemFeatureTraining(tokenizer, table, share=0.3, seed=1)
    state, chosen = TrainerState(), []
    training.on_train_begin(None, state, None, model=model)
    for state.global_step in (0, 1, 0):
        training.on_step_begin(None, state, None, model=model)
        chosen.append(training.chosen.tolist())
        vectors = model.get_input_embeddings().weight[FIRST_ITEM_ID:]
        made, _ = model.item_projection(tokenizer.feature_rows(table, tokenizer.items))
        assert torch.allclose(vectors[chosen[-1]], made[chosen[-1]], atol=1e-6)
        for parameter in (*model.parameters(), model.item_projection.weight):
            parameter.grad = torch.zeros_like(parameter)
        training.on_optimizer_step(None, state, None, model=model)
    assert chosen[0] == chosen[2] != chosen[1]
    assert all(0 < len(places) < 18 and max(places) < NUM_ITEMS - 5 for places in chosen)
