"""Losses, labels, and the computation of a training step."""

import pytest
import torch
from small_models import (
    ARCHITECTURES,
    FIRST,
    MASK,
    NUM_ITEMS,
    PAD,
    VOCAB,
    HostWaitsForDeviceError,
    NoSynchronization,
    at_masks,
    gradients,
    make_model,
    training_batch,
    without_history_scores,
)
from transformers.trainer_pt_utils import LabelSmoother

import bert4rec_hf.model.layers as layers
import bert4rec_hf.model.modeling_bert4rec as modeling
from bert4rec_hf import Bert4RecTokenizer, DataCollatorForMaskedItemPrediction
from bert4rec_hf.model.losses import mask_seen, softmax_loss


def test_masked_positions_change_neither_loss_nor_gradients(model):
    model.train()
    batch = training_batch()
    loss = model(**batch).loss
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    loss_at_positions = model(**at_masks(batch)).loss
    loss_at_positions.backward()
    torch.testing.assert_close(loss_at_positions, loss, atol=1e-6, rtol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    assert loss > 0.5
    assert expected["model.layers.0.attention.query.weight"].abs().max() > 1e-4


def test_no_logits_are_made_in_training_with_labels(model):
    model.train()
    assert model(**training_batch()).logits is None
    assert model(**at_masks(training_batch())).logits is None


@without_history_scores
def test_evaluation_returns_the_logits_and_the_loss_of_training(model):
    trained = model.train()(**training_batch()).loss
    model.eval()
    outputs = model(**training_batch())
    assert outputs.logits.shape == (2, 4, VOCAB)
    torch.testing.assert_close(outputs.loss, trained)
    at_positions = model(**at_masks(training_batch()))
    torch.testing.assert_close(at_positions.loss, trained)
    assert at_positions.logits.shape == (2, 2, VOCAB)
    torch.testing.assert_close(at_positions.logits[0, 1], outputs.logits[0, 2])


def test_logits_without_labels_cover_all_positions_and_special_tokens_have_minus_10000(model):
    outputs = model(input_ids=training_batch()["input_ids"])
    assert outputs.loss is None
    assert outputs.logits.shape == (2, 4, VOCAB)
    assert (outputs.logits[..., :FIRST] == -1e4).all()
    assert outputs.logits[..., FIRST:].abs().max() < 1e3


def test_logits_are_equal_in_training_and_evaluation(model):
    inputs = {"input_ids": training_batch()["input_ids"]}
    expected = model.eval()(**inputs).logits
    for positions in (None, torch.tensor([[1, 2], [0, -1]])):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                pair = [model.train(mode)(**inputs, masked_positions=positions).logits for mode in (True, False)]
            assert torch.equal(*pair)
            assert pair[0].dtype == torch.float32
        if positions is None:
            assert torch.equal(model.eval()(**inputs).logits, expected)


def test_a_misspelled_argument_and_labels_of_another_shape_are_errors(model):
    batch = training_batch()
    with pytest.raises(TypeError, match="label_positions"):
        model(**batch, label_positions=batch["labels"])
    with pytest.raises(ValueError, match=r"labels must have the shape of the input, \(2, 4\); got \(2, 3\)"):
        model(input_ids=batch["input_ids"], labels=batch["labels"][:, :3])
    with pytest.raises(ValueError, match=r"shape of the masked_positions, \(2, 2\); got \(2, 4\)"):
        model(**batch, masked_positions=torch.tensor([[1, 2], [0, -1]]))


def test_the_gradient_of_the_loss_is_that_of_a_function(model):
    model.train()
    batch, weights = at_masks(training_batch()), dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, kwargs=batch).loss

    model(**batch).loss.backward()
    for name, gradient in torch.func.grad(loss)(weights).items():
        torch.testing.assert_close(gradient, weights[name].grad)


@without_history_scores
def test_a_loss_that_reads_special_tokens_is_refused(model):
    model.train()
    batch = at_masks(training_batch())
    labels = batch.pop("labels")
    logits = model(**batch).logits
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(cross_entropy, model(**batch, labels=labels).loss)
    cross_entropy.backward()
    smoothed = LabelSmoother(0.1)(model(**batch), labels)
    with pytest.raises(ValueError, match="label_smoothing_factor use Bert4RecTrainer"):
        smoothed.backward()


@pytest.mark.parametrize("filter_seen_items", [False, True])
@pytest.mark.parametrize("pad_in_softmax", [False, True])
@without_history_scores
def test_the_loss_is_that_of_the_logits(model, filter_seen_items, pad_in_softmax):
    model.config.filter_seen_items, model.config.pad_in_softmax = filter_seen_items, pad_in_softmax
    # Item 9 is both seen and a label.
    input_ids = torch.tensor([[9, MASK, MASK, 11], [MASK, 9, 12, PAD]])
    batch = at_masks({"input_ids": input_ids, "labels": torch.tensor([[-100, 5, 17, -100], [9, -100, -100, -100]])})
    outputs = model(**batch)
    logits = mask_seen(outputs.logits, input_ids, batch["labels"]) if filter_seen_items else outputs.logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(model.train()(**batch).loss, expected)
    unmasked = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    assert filter_seen_items == bool((unmasked - expected).abs() > 1e-3)


@pytest.mark.parametrize(
    "masked_positions",
    [None, torch.empty((2, 0), dtype=torch.long), torch.full((2, 3), -1)],
    ids=["labels-only", "no-positions", "padded-positions"],
)
@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0)], ids=["counted", "int", "tensor"])
def test_a_batch_with_nothing_to_predict_has_loss_0_and_zero_gradients(model, masked_positions, num_items_in_batch):
    model.train()
    input_ids = torch.tensor([[5, 9, 17], [11, PAD, PAD]])
    loss = model(
        input_ids=input_ids,
        labels=torch.full_like(input_ids if masked_positions is None else masked_positions, -100),
        masked_positions=masked_positions,
        num_items_in_batch=num_items_in_batch,
    ).loss
    assert loss == 0
    loss.backward()
    # count_nonzero counts NaN too.
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
    }
    model(**at_masks(longer)).loss.backward()
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


@without_history_scores
def test_the_loss_is_the_cross_entropy_over_items_alone(model):
    batch = training_batch()
    outputs = model(**batch)
    states = outputs.prediction_states[[0, 0, 1], [1, 2, 0]]
    items = model.get_input_embeddings().weight[FIRST:]
    logits = states @ items.T + model.item_bias.weight[FIRST:]
    by_hand = logits.exp().sum(dim=1).log() - logits[range(3), [5 - FIRST, 17 - FIRST, 3 - FIRST]]
    torch.testing.assert_close(outputs.loss, by_hand.mean())
    # Large biases of special tokens would change the loss if they were in the softmax.
    with torch.no_grad():
        model.item_bias.weight[:FIRST] = 50.0
    torch.testing.assert_close(model(**batch).loss, outputs.loss)


@pytest.mark.parametrize("positions", [False, True], ids=["labels-only", "masked-positions"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@without_history_scores
def test_where_seen_items_are_filtered_a_row_shows_no_alternatives_to_its_labels(model, positions, training):
    model.config.filter_seen_items = True
    model.train(training)
    # Item 9 is seen in both rows, and it is a label in the second.
    input_ids = torch.tensor([[9, MASK, MASK, 11], [MASK, 9, 12, PAD]])
    labels = torch.tensor([[-100, 5, 17, -100], [9, -100, -100, -100]])
    batch = {"input_ids": input_ids, "labels": labels}
    loss = model(**(at_masks(batch) if positions else batch)).loss
    model.eval()
    logits = model(input_ids=input_ids).logits[[0, 0, 1], [1, 2, 0]]
    alternatives = torch.ones(3, VOCAB, dtype=torch.bool)
    alternatives[:, :FIRST] = False
    alternatives[[[0, 0], [1, 1], [2, 2]], [[9, 11], [9, 11], [12, 12]]] = False
    sums = logits.masked_fill(~alternatives, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(loss, (sums - logits[range(3), [5, 17, 9]]).mean())


def test_the_softmax_loss_has_a_known_value():
    # Two items with scores ln 3 and 0 have probabilities 3/4 and 1/4.
    loss = softmax_loss(
        hidden_states=torch.tensor([[1.0], [1.0], [1.0]]),
        item_weight=torch.tensor([[3.0], [1.0]]).log(),
        item_bias=torch.zeros(2),
        labels=torch.tensor([0, 1, -100]),
    )
    torch.testing.assert_close(loss, (torch.tensor(4 / 3).log() + torch.tensor(4.0).log()) / 2)


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
    # Without masked_positions, a boolean index finds the labels. The guard notices that it waits.
    positions = batch.pop("masked_positions")
    spread = torch.full(batch["input_ids"].shape, -100)
    batch["labels"] = spread.scatter(1, positions.clamp(min=0), batch["labels"])
    with NoSynchronization(), pytest.raises(HostWaitsForDeviceError):
        model(**batch)


# The test uses the old name, since the oldest supported version of transformers lacks the new one.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    # Dropout must have the same random numbers in the second forward pass.
    for options in ARCHITECTURES.values():
        model = make_model(**options, **{"hidden_dropout_prob": 0.2}).train()
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing == checkpointing
            model.zero_grad()
            torch.manual_seed(3)
            model(**at_masks(training_batch())).loss.backward()
            found.append(gradients(model))
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
        assert found[0]["model.layers.0.feed_forward.inner.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout = layers.Bert4RecDropout(p)
    states = torch.full((1001, 999), 2.0, requires_grad=True)  # the size is not a multiple of four
    dropped = dropout(states)
    kept = dropped != 0
    error = (p * (1 - p) / states.numel()) ** 0.5
    assert (~kept).double().mean().item() == pytest.approx(p, abs=5 * error + 2**-17)
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 2 / (1 - p)), rtol=2e-2, atol=0)
    # Adjacent values are dropped independently, although they use one random number.
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
    assert (batch["masked_positions"] < 0).any()
    found = []
    for eager_on_cpu in (True, False):
        for module in (modeling, layers):
            monkeypatch.setattr(module, "is_eager_on_cpu", lambda states, answer=eager_on_cpu: answer)
        loss = model(**batch).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert found[0][0] > 0


def test_special_tokens_are_no_labels(model):
    input_ids = torch.tensor([[MASK, MASK, MASK, MASK]])
    with torch.no_grad():
        special_loss, ignored_loss = (
            model(input_ids=input_ids, labels=torch.tensor([[*labels, 9]])).loss
            for labels in ((0, 1, 2), (-100, -100, -100))
        )
    assert torch.equal(special_loss, ignored_loss)
