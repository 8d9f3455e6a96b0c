"""The item losses against slow references, known values and limits, and a small training run with each."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from chain_runs import arguments, write_chain
from small_models import NoSynchronization, at_masks, gradients, make_model, training_batch
from torch.utils.flop_counter import FlopCounterMode

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
    evaluate_prepared,
    prepare,
    train_prepared,
)
from bert4rec_hf.cli import main
from bert4rec_hf.model import losses
from bert4rec_hf.model.losses import ITEM_LOSSES, bpr_loss, gbce_loss, sampled_softmax_loss, softmax_loss

NUM_ITEMS, IGNORED = 11, -100
LABELS = torch.tensor([3, 0, IGNORED, 10, 5, 3, IGNORED])
# These negatives contain the labels 3 and 5, and 7 twice.
SHARED = torch.tensor([7, 3, 1, 7, 5, 9])
OPTIONS = {"sampled_softmax": {}, "bpr": {}, "gbce": {"calibration": 0.6}}
SAMPLED = list(OPTIONS)


def make_case(seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Seven positions in double precision. Two of them have no label."""
    random = torch.Generator().manual_seed(seed)
    tensors = {"hidden_states": (7, 4), "item_weight": (NUM_ITEMS, 4), "item_bias": (NUM_ITEMS,)}
    case = {name: scale * torch.randn(shape, generator=random, dtype=torch.double) for name, shape in tensors.items()}
    return case | {"labels": LABELS}


def own_negatives(num_negatives: int = 6) -> torch.Tensor:
    return torch.randint(NUM_ITEMS, (7, num_negatives), generator=torch.Generator().manual_seed(1))


def log_probabilities(negative_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    logs = torch.randn(NUM_ITEMS, generator=torch.Generator().manual_seed(2), dtype=torch.double).log_softmax(0)
    return {
        "negative_log_probabilities": logs[negative_ids],
        "positive_log_probabilities": logs[LABELS.clamp(min=0)] / 2,
    }


def reference(
    name: str,
    case: dict[str, torch.Tensor],
    negative_ids: torch.Tensor,
    excluded_ids: torch.Tensor | None = None,
    **options,
) -> float:
    """Compute a loss for one position and one negative at a time, as in the papers."""
    all_negatives = negative_ids.expand(7, -1).tolist()
    all_logs = options.get("negative_log_probabilities", torch.zeros(())).expand(7, len(all_negatives[0])).tolist()
    total, count = 0.0, 0
    for position, label in enumerate(case["labels"].tolist()):
        if label == IGNORED:
            continue
        count += 1

        def score(item: int, position=position) -> float:
            products = zip(case["hidden_states"][position].tolist(), case["item_weight"][item].tolist(), strict=True)
            return sum(one * other for one, other in products) + float(case["item_bias"][item])

        pairs = zip(all_negatives[position], all_logs[position], strict=True)
        excluded = {label} if excluded_ids is None else {label, *excluded_ids[position].tolist()}
        negatives = [(score(item), log) for item, log in pairs if item not in excluded]
        positive = score(label)
        k = len(negatives)
        if not k:
            continue
        if name == "sampled_softmax":
            corrected = "negative_log_probabilities" in options
            draws = len(all_negatives[position]) if corrected else 1
            own = math.exp(positive) / (math.exp(options["positive_log_probabilities"][position]) if corrected else 1)
            others = sum(math.exp(negative) / (draws * math.exp(log)) for negative, log in negatives)
            total += -math.log(own / (own + others))
        elif name == "bpr":
            total += sum(-math.log(1 / (1 + math.exp(negative - positive))) for negative, _ in negatives) / k
        else:
            alpha = min(k / (NUM_ITEMS - 1), 1)
            beta = alpha * (options["calibration"] * (1 - 1 / alpha) + 1 / alpha)
            total -= beta * math.log(1 / (1 + math.exp(-positive))) / (k + 1)
            total -= sum(math.log(1 - 1 / (1 + math.exp(-negative))) for negative, _ in negatives) / (k + 1)
    return total / count


# The shared negatives contain 7 twice. Ids below 0 exclude nothing.
EXCLUDED = torch.tensor([[7, 1, -1], [4, 7, 7], [0, 1, 2], [9, -3, 1], [-1, -2, -3], [10, 8, 6], [5, 5, 5]])
NEGATIVES = {"shared": SHARED, "own": own_negatives(), "one": own_negatives(1), "more than items": own_negatives(15)}


@pytest.mark.parametrize("excluded_ids", [None, EXCLUDED], ids=["all-items", "some-excluded"])
@pytest.mark.parametrize("negative_ids", NEGATIVES.values(), ids=NEGATIVES.keys())
@pytest.mark.parametrize("name", SAMPLED)
def test_a_loss_is_that_of_a_loop_over_positions_and_negatives(name, negative_ids, excluded_ids):
    case = make_case()
    expected = reference(name, case, negative_ids, excluded_ids, **OPTIONS[name])
    assert expected > 0.1
    loss = ITEM_LOSSES[name](**case, negative_ids=negative_ids, excluded_ids=excluded_ids, **OPTIONS[name])
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SAMPLED)
def test_nothing_to_exclude_changes_nothing(name):
    case = make_case()
    without = ITEM_LOSSES[name](**case, negative_ids=SHARED, **OPTIONS[name])
    for excluded_ids in (torch.empty(7, 0, dtype=torch.long), torch.full((7, 2), -1), LABELS.unsqueeze(1)):
        loss = ITEM_LOSSES[name](**case, negative_ids=SHARED, excluded_ids=excluded_ids, **OPTIONS[name])
        assert torch.equal(loss, without)


@pytest.mark.parametrize("negative_ids", [SHARED, own_negatives()], ids=["shared", "own"])
def test_log_probabilities_are_taken_off_the_scores(negative_ids):
    case, logs = make_case(), log_probabilities(negative_ids)
    expected = reference("sampled_softmax", case, negative_ids, **logs)
    assert expected != pytest.approx(reference("sampled_softmax", case, negative_ids), rel=1e-3)
    loss = sampled_softmax_loss(**case, negative_ids=negative_ids, **logs)
    assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("negative_ids", [None, SHARED, own_negatives()], ids=["no-hits", "shared", "own"])
@pytest.mark.parametrize("name", [*SAMPLED, "log probabilities", "softmax"])
def test_gradients_are_those_of_finite_differences(name, negative_ids):
    negative_ids = torch.tensor([1, 8, 2]) if negative_ids is None else negative_ids
    options = {"negative_ids": negative_ids} | OPTIONS.get(name, {})
    if name == "softmax":
        options = {}
    elif name == "log probabilities":
        options |= log_probabilities(negative_ids)
        name = "sampled_softmax"
    *tensors, labels = make_case().values()
    tensors = [values.requires_grad_() for values in tensors]
    assert torch.autograd.gradcheck(lambda *inputs: ITEM_LOSSES[name](*inputs, labels, **options), tensors)


@pytest.mark.parametrize("excluded_ids", [None, EXCLUDED], ids=["all-items", "some-excluded"])
@pytest.mark.parametrize("name", [*SAMPLED, "softmax", "softmax in chunks"])
def test_a_compiled_loss_has_the_same_gradients(name, excluded_ids, monkeypatch):
    if name == "softmax in chunks":
        monkeypatch.setattr(losses, "MAX_LOGITS_PER_CHUNK", 3 * NUM_ITEMS)
    options = {"excluded_ids": excluded_ids} | ({"negative_ids": SHARED} | OPTIONS[name] if name in OPTIONS else {})
    *tensors, labels = make_case().values()
    tensors = [values.requires_grad_() for values in tensors]
    item_loss = ITEM_LOSSES[name.partition(" ")[0]]
    torch.compiler.reset()
    # This backend captures the graphs of the loss and of its gradients, but needs no C++ compiler.
    compiled = torch.compile(item_loss, backend="aot_eager", fullgraph=True)
    one, other = (loss(*tensors, labels, **options) for loss in (item_loss, compiled))
    torch.testing.assert_close(other, one)
    torch.testing.assert_close(torch.autograd.grad(other, tensors), torch.autograd.grad(one, tensors))


@pytest.mark.parametrize("name", SAMPLED)
def test_shared_negatives_are_each_positions_own_repeated(name):
    case = make_case()
    shared = ITEM_LOSSES[name](**case, negative_ids=SHARED, **OPTIONS[name])
    own = ITEM_LOSSES[name](**case, negative_ids=SHARED.expand(7, -1), **OPTIONS[name])
    torch.testing.assert_close(shared, own, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_negative_that_is_the_label_or_below_0_is_as_if_it_were_not_there(name):
    case = make_case() | {"labels": torch.tensor([3, 3, IGNORED, 3, IGNORED, 3, 3])}
    loss = ITEM_LOSSES[name](**case, negative_ids=torch.tensor([3, 7, -1, 3, 1, -3, 3]), **OPTIONS[name])
    torch.testing.assert_close(loss, ITEM_LOSSES[name](**case, negative_ids=torch.tensor([7, 1]), **OPTIONS[name]))
    assert not torch.isclose(loss, ITEM_LOSSES[name](**case, negative_ids=torch.tensor([7, 1, 1]), **OPTIONS[name]))


@pytest.mark.parametrize("name", SAMPLED)
def test_a_position_that_keeps_no_negative_adds_0_and_is_counted(name):
    case = make_case() | {"labels": torch.tensor([3, 4, IGNORED, 4, IGNORED, IGNORED, IGNORED])}
    loss = ITEM_LOSSES[name](**case, negative_ids=torch.tensor([4]), **OPTIONS[name])
    alone = case | {"labels": torch.tensor([3, *[IGNORED] * 6])}
    torch.testing.assert_close(3 * loss, ITEM_LOSSES[name](**alone, negative_ids=torch.tensor([4]), **OPTIONS[name]))
    assert loss > 1e-3


@pytest.mark.parametrize("negative_ids", [SHARED, own_negatives(), SHARED[:0], own_negatives(0)])
@pytest.mark.parametrize("num_items_in_batch", [None, 0, torch.tensor(0)], ids=["counted", "int", "tensor"])
@pytest.mark.parametrize("name", SAMPLED)
def test_nothing_to_predict_is_loss_0_with_zero_gradients(name, num_items_in_batch, negative_ids):
    labels = LABELS if negative_ids.shape[-1] == 0 else torch.full((7,), IGNORED)  # no negative, or no label
    case = make_case() | {"labels": labels, "num_items_in_batch": num_items_in_batch}
    tensors = [case[tensor].requires_grad_() for tensor in ("hidden_states", "item_weight", "item_bias")]
    loss = ITEM_LOSSES[name](**case, negative_ids=negative_ids, **OPTIONS[name])
    loss.backward()
    assert loss == 0
    assert [int(tensor.grad.count_nonzero()) for tensor in tensors] == [0, 0, 0]


@pytest.mark.parametrize("num_items", [1, 2])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_catalogue_of_one_or_two_items_has_a_finite_loss(name, num_items):
    tokenizer = Bert4RecTokenizer.from_items(range(num_items))
    torch.manual_seed(0)
    batch = DataCollatorForMaskedItemPrediction(tokenizer, num_negatives=100)([{"input_ids": [3, 2 + num_items]}] * 4)
    assert sorted(batch["negative_ids"].tolist()) == list(range(3, 3 + num_items))
    model = make_model(vocab_size=3 + num_items, item_loss=name).train()
    loss = model(**batch).loss
    loss.backward()
    assert (loss == 0) == (num_items == 1)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", SAMPLED)
def test_the_sum_is_divided_by_the_labels_of_the_step(name):
    case = make_case()
    loss = ITEM_LOSSES[name](**case, negative_ids=SHARED)
    for number in (20, torch.tensor(20)):
        whole = ITEM_LOSSES[name](**case, negative_ids=SHARED, num_items_in_batch=number)
        torch.testing.assert_close(whole, loss * 5 / 20)


@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16, torch.double])
@pytest.mark.parametrize("scale", [30.0, 1e4, 1e8])
@pytest.mark.parametrize("name", SAMPLED)
def test_large_scores_have_finite_losses_and_gradients(name, scale, dtype):
    case = make_case(scale=scale)
    case = {key: values if key == "labels" else values.to(dtype) for key, values in case.items()}
    tensors = [case[tensor].requires_grad_() for tensor in ("hidden_states", "item_weight", "item_bias")]
    loss = ITEM_LOSSES[name](**case, negative_ids=SHARED, **OPTIONS[name])
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float)
    assert 1 < loss < torch.inf
    assert all(tensor.grad.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("negative_ids", [torch.arange(NUM_ITEMS), torch.arange(NUM_ITEMS).expand(7, -1)])
def test_with_all_items_as_negatives_the_sampled_softmax_is_the_full_one(negative_ids):
    case = make_case()
    sampled = sampled_softmax_loss(**case, negative_ids=negative_ids)
    assert float(sampled) == pytest.approx(float(softmax_loss(**case)), rel=1e-12)


@pytest.mark.parametrize(("calibration", "negative_ids"), [(0.0, SHARED), (0.7, torch.arange(NUM_ITEMS))])
def test_gbce_without_calibration_or_with_all_items_is_binary_cross_entropy(calibration, negative_ids):
    case = make_case()
    loss = gbce_loss(**case, negative_ids=negative_ids, calibration=calibration)
    assert loss != gbce_loss(**case, negative_ids=SHARED, calibration=0.5)
    scores = case["hidden_states"] @ case["item_weight"].T + case["item_bias"]
    by_position = []
    for position in (LABELS != IGNORED).nonzero().flatten().tolist():
        label = int(LABELS[position])
        items = torch.tensor([label] + [item for item in negative_ids.tolist() if item != label])
        targets = torch.eye(len(items), dtype=torch.double)[0]
        by_position.append(torch.nn.functional.binary_cross_entropy_with_logits(scores[position, items], targets))
    torch.testing.assert_close(loss, torch.stack(by_position).mean(), rtol=1e-12, atol=0)


def test_bpr_with_one_negative_is_that_of_recbole():
    case, negative_ids = make_case(), own_negatives(1)
    is_label = (LABELS != IGNORED) & (negative_ids[:, 0] != LABELS)
    scores = case["hidden_states"] @ case["item_weight"].T + case["item_bias"]
    positive = scores.gather(1, LABELS.clamp(min=0).unsqueeze(1)).squeeze(1)
    negative = scores.gather(1, negative_ids).squeeze(1)
    theirs = -torch.sum(torch.log(1e-14 + torch.sigmoid(positive - negative)) * is_label) / is_label.sum()
    assert is_label.sum() == 5
    torch.testing.assert_close(bpr_loss(**case, negative_ids=negative_ids), theirs, rtol=1e-11, atol=0)


def test_the_sampled_losses_have_known_values():
    # Of five items, the label has score ln 3 and the negatives have ln 2 and 0.
    case = {
        "hidden_states": torch.ones(1, 1, dtype=torch.double),
        "item_weight": torch.tensor([[3.0], [2.0], [1.0], [9.0], [9.0]], dtype=torch.double).log(),
        "item_bias": torch.zeros(5, dtype=torch.double),
        "labels": torch.tensor([0]),
        "negative_ids": torch.tensor([1, 2]),
    }
    assert float(sampled_softmax_loss(**case)) == pytest.approx(math.log(2))  # 3 / (3 + 2 + 1)
    # With two draws, the label counts 3 / (1/2) = 6, and the negatives 2 / (2 * 1/4) = 4 and 1 / (2 * 1/8) = 4.
    probabilities = {
        "negative_log_probabilities": torch.tensor([1 / 4, 1 / 8]).log(),
        "positive_log_probabilities": torch.tensor([1 / 2]).log(),
    }
    assert float(sampled_softmax_loss(**case, **probabilities)) == pytest.approx(math.log(14 / 6), rel=1e-6)
    # The label is preferred to the negatives with probability 3/5 and 3/4.
    assert float(bpr_loss(**case)) == pytest.approx((math.log(5 / 3) + math.log(4 / 3)) / 2)
    # The sigmoids of the scores are 3/4, 2/3 and 1/2. alpha = 2/4 and beta = 1 - .8 (1 - 1/2) = .6.
    expected = (0.6 * math.log(4 / 3) + math.log(3) + math.log(2)) / 3
    assert float(gbce_loss(**case, calibration=0.8)) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(), (6, 3), (7, 3, 1), (1, 3)])
@pytest.mark.parametrize("name", SAMPLED)
def test_negatives_of_another_shape_are_an_error(name, shape):
    with pytest.raises(ValueError, match=r"negative_ids must have shape \(K,\) or \(7, K\)"):
        ITEM_LOSSES[name](**make_case(), negative_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("which", ["negative_log_probabilities", "positive_log_probabilities"])
def test_one_of_the_log_probabilities_without_the_other_is_an_error(which):
    logs = log_probabilities(SHARED)
    with pytest.raises(ValueError, match=r"both .* or neither"):
        sampled_softmax_loss(**make_case(), negative_ids=SHARED, **{which: logs[which]})


# Training counts of the token ids from 3 on. The third item never occurs.
COUNTS = [40, 25, 0, 15, 10, 5, 3, 2]


def popularity_collator(num_negatives: int) -> DataCollatorForMaskedItemPrediction:
    tokenizer = Bert4RecTokenizer.from_items(range(8), counts=dict(enumerate(COUNTS)))
    return DataCollatorForMaskedItemPrediction(tokenizer, num_negatives=num_negatives, negative_sampling="popularity")


def popularity_loss(collator: DataCollatorForMaskedItemPrediction, label: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled softmax loss of one draw, and the scores, which differ much and have the gradient of the loss."""
    batch = collator([{"input_ids": [3 + label]}])
    scores = torch.tensor([0.5, -1.0, 0.3, 1.2, 0.0, -0.4, 2.0, -2.0], dtype=torch.double, requires_grad=True)
    loss = sampled_softmax_loss(
        torch.zeros(1, 1, dtype=torch.double),
        torch.zeros(8, 1, dtype=torch.double),
        scores,
        torch.tensor([label]),
        negative_ids=batch["negative_ids"] - 3,
        negative_log_probabilities=batch["negative_log_probabilities"],
        positive_log_probabilities=batch["positive_log_probabilities"].flatten(),
    )
    loss.backward()
    return loss.detach(), scores


def test_the_sum_over_items_that_popular_negatives_stand_for_is_unbiased():
    torch.manual_seed(0)
    label, collator = 1, popularity_collator(20)
    log_p = math.log(1 - (1 - COUNTS[label] / 100) ** 20)
    estimates = []
    for _ in range(3000):
        loss, scores = popularity_loss(collator, label)
        own = math.exp(float(scores.detach()[label]) - log_p)
        estimates.append(own * (math.exp(loss) - 1))  # from loss = log((own + others) / own)
    others = [item for item in range(8) if item != label and COUNTS[item]]
    error = np.std(estimates) / len(estimates) ** 0.5
    assert error < 0.02 * np.mean(estimates)
    assert abs(np.mean(estimates) - float(scores.detach()[others].exp().sum())) < 4 * error


@pytest.mark.parametrize("label", [0, 4, 7])
def test_with_ever_more_popular_negatives_loss_and_gradient_become_the_full_softmaxs(label):
    torch.manual_seed(0)
    loss, scores = popularity_loss(popularity_collator(400_000), label)
    possible = [item for item in range(8) if COUNTS[item]]
    full = scores.detach().clone().requires_grad_()
    expected = full[possible].logsumexp(0) - full[label]
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), abs=0.01)
    torch.testing.assert_close(scores.grad, full.grad, atol=0.005, rtol=0)


def test_under_popular_negatives_the_true_probabilities_are_learnt():
    # There is one context, whose labels have these probabilities, in another order than popularity.
    truth = torch.tensor([5, 60, 10, 10, 15], dtype=torch.double) / 100
    popularity = torch.tensor([50, 10, 20, 15, 5], dtype=torch.double) / 100
    num_negatives = 30
    random = torch.Generator().manual_seed(0)
    bias = torch.zeros(5, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.SGD([bias], lr=1.0)
    mean = torch.zeros(5, dtype=torch.double)
    for step in range(800):
        labels = torch.multinomial(truth, 256, replacement=True, generator=random)
        negative_ids = torch.multinomial(popularity, 256 * num_negatives, replacement=True, generator=random)
        loss = sampled_softmax_loss(
            torch.zeros(256, 1, dtype=torch.double),
            torch.zeros(5, 1, dtype=torch.double),
            bias,
            labels,
            negative_ids=negative_ids.view(256, -1),
            negative_log_probabilities=popularity.log()[negative_ids].view(256, -1),
            positive_log_probabilities=(1 - (1 - popularity[labels]) ** num_negatives).log(),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean += bias.detach().softmax(0) / 600 if step >= 200 else 0
    # If the label were corrected by log(K q) too, the second share would be .75.
    torch.testing.assert_close(mean, truth, atol=0.02, rtol=0)


def collated(name: str, **options) -> tuple[Bert4RecForMaskedItemPrediction, dict[str, torch.Tensor]]:
    """A model in training mode, and `training_batch` with negatives."""
    batch = at_masks(training_batch()) | {"negative_ids": torch.tensor([3, 17, 30, 8, 9])}
    return make_model(item_loss=name, **options).train(), batch


def at_labels(model, batch) -> dict[str, torch.Tensor]:
    """Arguments of the loss functions, from the states of the model. Without dropout, training has equal states."""
    model.eval()
    states = model(input_ids=batch["input_ids"]).prediction_states[[0, 0, 1], [1, 2, 0]]
    model.train()
    items = {"item_weight": model.get_input_embeddings().weight[3:], "item_bias": model.item_bias.weight[3:]}
    return {"hidden_states": states, "labels": torch.tensor([2, 14, 0]), **items}


@pytest.mark.parametrize("filter_seen_items", [False, True])
@pytest.mark.parametrize("name", SAMPLED)
def test_the_model_computes_the_loss_of_its_config_in_training(name, filter_seen_items):
    options = {"gbce_calibration": 0.6} if name == "gbce" else {}
    model, batch = collated(name, filter_seen_items=filter_seen_items, **options)
    # The first row has two labels, and the second has one.
    case, seen = at_labels(model, batch), batch["input_ids"][[0, 0, 1]] - 3
    negatives = {"negative_ids": batch["negative_ids"] - 3} | OPTIONS[name]
    expected = ITEM_LOSSES[name](**case, excluded_ids=seen, **negatives)
    assert not torch.isclose(expected, ITEM_LOSSES[name](**case, **negatives), rtol=1e-4)
    if not filter_seen_items:
        expected = ITEM_LOSSES[name](**case, **negatives)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    with_positions = gradients(model)
    assert with_positions["model.layers.0.attention.query.weight"].abs().max() > 1e-5
    model.zero_grad()
    loss = model(**training_batch(), negative_ids=batch["negative_ids"]).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, with_positions[parameter], atol=1e-5, rtol=1e-4)


def test_positions_may_have_negatives_of_their_own_and_log_probabilities():
    model, batch = collated("sampled_softmax")
    own = torch.tensor([[[4, 17, 0], [6, 3, 9]], [[30, 31, 4], [5, 5, 5]]])  # the last position has no label
    logs = -torch.arange(1.0, 13).view(2, 2, 3)
    positive = torch.tensor([[-0.5, -1.5], [-2.5, 0.0]])
    expected = sampled_softmax_loss(
        **at_labels(model, batch),
        negative_ids=own.flatten(0, 1)[:3] - 3,
        negative_log_probabilities=logs.flatten(0, 1)[:3],
        positive_log_probabilities=positive.flatten()[:3],
    )
    batch |= {
        "negative_ids": own, "negative_log_probabilities": logs, "positive_log_probabilities": positive,
    }  # fmt: skip
    torch.testing.assert_close(model(**batch).loss, expected)
    # Without masked_positions, negatives are given for each position of the input.
    del batch["masked_positions"]
    batch |= training_batch()
    with pytest.raises(ValueError, match=r"without masked_positions.*\(2, 4\) positions.*masked_positions as well"):
        model(**batch)
    rows, columns = [0, 0, 1], [1, 2, 0]
    wide = {"negative_ids": own, "negative_log_probabilities": logs, "positive_log_probabilities": positive}
    for key, values in wide.items():
        batch[key] = values.new_full((2, 4, *values.shape[2:]), 7)
        batch[key][rows, columns] = values.flatten(0, 1)[:3]
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("name", SAMPLED)
def test_evaluation_keeps_the_full_softmax_with_and_without_negatives(name):
    model, batch = collated(name)
    model.eval()
    expected = make_model().train()(**training_batch()).loss
    torch.testing.assert_close(model(**batch).loss, expected)
    del batch["negative_ids"]
    torch.testing.assert_close(model(**batch).loss, expected)


def test_the_full_softmax_has_no_use_for_negatives():
    model, batch = collated("softmax")
    torch.testing.assert_close(model(**batch).loss, model(**training_batch()).loss)


@pytest.mark.parametrize("name", SAMPLED)
def test_training_without_negatives_is_an_error_that_says_where_to_ask_for_them(name):
    model, batch = collated(name)
    del batch["negative_ids"]
    with pytest.raises(ValueError, match=f"'{name}' needs negative_ids: give num_negatives to DataCollator"):
        model(**batch)


@pytest.mark.parametrize("item_loss", ["softmax", "gbce"])
def test_a_new_model_thinks_each_item_as_likely_as_any_other(item_loss):
    """With binary cross-entropies, the sigmoid of each bias is 1 divided by the number of items."""
    bias = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=103, item_loss=item_loss)).item_bias.weight
    likely = {"softmax": bias.softmax(0) * 103, "gbce": bias.sigmoid() * 101}[item_loss]
    assert torch.allclose(likely, torch.ones(103), atol=1e-4)


@pytest.mark.parametrize("calibration", [-0.1, 1.5, float("nan")])
def test_a_calibration_out_of_range_is_an_error(calibration):
    with pytest.raises(ValueError, match=f"gbce_calibration must lie between 0 and 1; got {calibration}"):
        Bert4RecConfig(gbce_calibration=calibration)


@pytest.mark.parametrize("negative_sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_training_step_with_negatives_never_waits_for_the_device(name, negative_sampling):
    model = make_model(item_loss=name).train()
    tokenizer = Bert4RecTokenizer.from_items(range(37), counts={number: 1 + number for number in range(37)})
    collator = DataCollatorForMaskedItemPrediction(tokenizer, num_negatives=9, negative_sampling=negative_sampling)
    torch.manual_seed(0)
    batch = collator([{"input_ids": [3, 4, 5, 6]}, {"input_ids": [7, 8]}, {"input_ids": []}])
    with NoSynchronization():
        loss = model(**batch, num_items_in_batch=torch.tensor(4)).loss
        loss.backward()
    assert loss > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_half_precision_comes_near(name):
    model, batch = collated(name)
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)


def test_excluded_items_are_out_of_the_softmax_but_not_the_label():
    # The scores are ln 1 to ln 4. Items 0 and 1 are excluded for label 1, and item 2 for label 3. -1 excludes nothing.
    loss = softmax_loss(
        hidden_states=torch.ones(3, 1),
        item_weight=torch.tensor([[1.0], [2.0], [3.0], [4.0]]).log(),
        item_bias=torch.zeros(4),
        labels=torch.tensor([1, 3, IGNORED]),
        excluded_ids=torch.tensor([[0, 1], [2, -1], [0, 0]]),
    )
    torch.testing.assert_close(loss, (torch.tensor(9 / 2).log() + torch.tensor(7 / 4).log()) / 2)


@pytest.mark.parametrize("exclude", [False, True], ids=["all-items", "some-excluded"])
@pytest.mark.parametrize("dtype", [torch.float, torch.double, torch.bfloat16])
def test_a_large_softmax_in_chunks_is_the_same(monkeypatch, dtype, exclude):
    torch.manual_seed(0)
    excluded_ids = torch.randint(-3, 50, (300, 20)) if exclude else None
    tensors = [(torch.randn(shape) / 3).to(dtype).requires_grad_() for shape in ((300, 8), (50, 8), (50,))]
    labels = torch.randint(50, (300,)).masked_fill(torch.arange(300) % 7 == 0, IGNORED)

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = softmax_loss(*tensors, labels, torch.tensor(200), excluded_ids=excluded_ids)
        return [loss, *torch.autograd.grad(loss, tensors)]

    whole = loss_and_gradients()
    monkeypatch.setattr(losses, "MAX_LOGITS_PER_CHUNK", 1000)
    chunked = loss_and_gradients()
    tolerance = {torch.float: 1e-6, torch.double: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    assert whole[0] > 1
    nothing = softmax_loss(*tensors, torch.full_like(labels, IGNORED))
    assert nothing == 0
    with torch.autocast("cpu", torch.bfloat16):
        half = tensors[0].bfloat16()
        in_half = softmax_loss(half, *tensors[1:], labels, torch.tensor(200), excluded_ids=excluded_ids)
    torch.testing.assert_close(in_half.double(), whole[0].double(), rtol=2e-2, atol=2e-2)
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing, tensors))


def test_without_gradients_the_softmax_is_one_multiplication():
    states, table, bias = torch.randn(5, 8), torch.nn.Parameter(torch.randn(53, 8)), torch.nn.Parameter(torch.randn(53))
    labels = torch.arange(5)
    one, flops = 2 * 5 * 50 * 8, []
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients), FlopCounterMode(display=False) as counter:
            softmax_loss(states, table[3:], bias[3:], labels)  # without special tokens, as in the model
        flops.append(counter.get_total_flops())
    assert flops == [one, 3 * one]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder / "log.csv", num_users=200, num_items=12, length=12, follow=0.9)
    prepare(folder / "log.csv", folder / "data")
    return folder / "data"


@pytest.mark.parametrize(
    ("name", "negative_sampling"),
    [("sampled_softmax", "uniform"), ("sampled_softmax", "popularity"), ("bpr", "uniform"), ("gbce", "uniform")],
)
def test_each_loss_learns_the_next_item_of_a_markov_chain(chain, tmp_path, name, negative_sampling):
    options = {"num_train_epochs": 40, "learning_rate": 3e-3, "num_negatives": 4, "eval_steps": 0.5}
    options["negative_sampling"] = negative_sampling
    # With the config's default, which is smaller, gBCE takes much longer.
    model = {"item_loss": name, "initializer_range": 0.1}
    trainer = train_prepared(chain, arguments(tmp_path / "model", **options, save_steps=0.5), **model)
    assert (trainer.data_collator.num_negatives, trainer.data_collator.negative_sampling) == (4, negative_sampling)
    baselines = evaluate_prepared(tmp_path / "model", chain, "validation", use_cpu=True)["baselines"]
    # In .9 of the steps, the next item is the successor.
    assert trainer.evaluation["metrics"]["HR@1"] > 0.6 > 0.2 > baselines["popularity"]["HR@1"]
    assert Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "model").config.item_loss == name


def test_the_command_line_takes_the_loss_and_its_options(chain, tmp_path):
    words = [
        "--data", chain, "--output_dir", tmp_path / "model", "--item_loss", "gbce", "--gbce_calibration", 0.5,
        "--num_negatives", 7, "--negative_sampling", "popularity", "--max_steps", 4, "--hidden_size", 32,
        "--use_cpu", True, "--disable_tqdm", True, "--eval_steps", 4, "--save_steps", 4,
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(["train", *map(str, words)])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["item_loss"], config["gbce_calibration"]) == ("gbce", 0.5)
    recipe = (tmp_path / "model" / "recipe.yaml").read_text()
    assert "num_negatives: 7\nnegative_sampling: popularity" in (tmp_path / "model" / "README.md").read_text()
    for line in ("item_loss: gbce", "gbce_calibration: 0.5", "num_negatives: 7", "negative_sampling: popularity"):
        assert line in recipe.splitlines()
