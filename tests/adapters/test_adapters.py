"""LoRA from PEFT, torchao's quantised weights and Accelerate's offloading on our models.

Item vectors are read in one place, so a wrapper or replacement of them applies to every score. `make test-adapters`
has an environment with all three libraries. Elsewhere, tests of missing libraries are skipped.
"""

import pytest
import torch
from log_and_model import answers, histories_in_tokens, trainer_inputs, write_log_and_model
from small_models import make_model, mask_scores, training_batch
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import is_accelerate_available

from bert4rec_hf import (
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
)

TARGETS = {
    "attention": ["query", "value"],
    "items": ["item_embeddings"],
    "both": ["query", "value", "item_embeddings"],
}
OF_EACH_TARGET = pytest.mark.parametrize("targets", [*TARGETS.values()], ids=[*TARGETS])
# Other ways of PEFT to train item vectors or biases. The second entry is a part of the names of what they train.
OTHER_ADAPTERS = {
    "biases": ({"target_modules": ["query"], "modules_to_save": ["item_bias"]}, "item_bias"),
    "all item vectors": ({"target_modules": ["query"], "modules_to_save": ["item_embeddings"]}, "item_embeddings"),
    "some item vectors": (
        {"target_modules": ["query"], "trainable_token_indices": {"item_embeddings": [5, 17, 52]}},
        "trainable_tokens_delta",
    ),
    "DoRA": ({"target_modules": ["query", "item_embeddings"], "use_dora": True}, "lora_magnitude_vector"),
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def peft_of_add_adapter():
    """PEFT for `model.add_adapter`, whose required version may be newer than any released one."""
    return pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)


@pytest.fixture
def quantization():
    return pytest.importorskip("torchao.quantization")


def new_model() -> Bert4RecForMaskedItemPrediction:
    return make_model(vocab_size=53, num_hidden_layers=2, num_transitions=4, repeat_weight=1.0)


@torch.no_grad()
def move_adapter(model: nn.Module) -> None:
    """Set the adapter's weights as training would, since a new adapter changes nothing."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.2)


def train(model: nn.Module, num_steps: int = 20) -> list[float]:
    """The losses of a few steps on one batch."""
    model.train()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(**training_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_answers_go_by_the_logits(model: nn.Module) -> None:
    """Check that `recommend`, `rank` and the vectors agree with the logits of `forward` plus the history's scores."""
    histories, found = histories_in_tokens(model), answers(model)
    products = found["user_vectors"] @ found["item_vectors"].T
    torch.testing.assert_close(products, found["logits"][:, 3:], atol=1e-5, rtol=0)
    scores = mask_scores(model, histories)
    torch.testing.assert_close(found["scores"], scores[:, 3:].topk(10).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["scores"], scores.gather(1, found["item_ids"]), atol=1e-5, rtol=0)
    fifth = scores.gather(1, found["item_ids"][:, 4:5])
    expected = (scores[:, 3:] >= fifth).sum(dim=1)
    assert torch.equal(model.rank(histories, found["item_ids"][:, 4]), expected)


def assert_same_answers(model: nn.Module, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    torch.testing.assert_close(answers(model), expected, atol=tolerance, rtol=0)


@OF_EACH_TARGET
def test_training_with_lora_lowers_the_loss_and_changes_the_adapter_alone(peft, targets):
    model = peft.get_peft_model(new_model(), peft.LoraConfig(r=4, target_modules=targets))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < 0.6 * losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


@OF_EACH_TARGET
def test_every_answer_sees_the_adapter(peft, targets):
    plain = answers(new_model())
    model = peft.get_peft_model(new_model(), peft.LoraConfig(r=4, target_modules=targets)).eval()
    assert_same_answers(model, plain, tolerance=1e-6)
    move_adapter(model)
    found = answers(model)
    for name in ("logits", "scores", "user_vectors"):
        assert (found[name] - plain[name]).abs().max() > 0.1, name
    is_changed = not torch.equal(found["item_vectors"], plain["item_vectors"])
    assert is_changed == ("item_embeddings" in targets)
    assert_answers_go_by_the_logits(model)


@OF_EACH_TARGET
def test_a_merged_adapter_gives_the_same_answers(peft, targets):
    model = peft.get_peft_model(new_model(), peft.LoraConfig(r=4, target_modules=targets)).eval()
    move_adapter(model)
    expected = answers(model)
    merged = model.merge_and_unload()
    assert type(merged) is Bert4RecForMaskedItemPrediction
    assert_same_answers(merged, expected, tolerance=1e-5)


@OF_EACH_TARGET
def test_a_saved_adapter_gives_the_same_answers_on_the_base_model(peft, targets, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    new_model().save_pretrained(base)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(base).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    move_adapter(model)
    expected = answers(model)
    model.save_pretrained(adapter)
    loaded = peft.PeftModel.from_pretrained(Bert4RecForMaskedItemPrediction.from_pretrained(base), adapter)
    assert_same_answers(loaded.eval(), expected, tolerance=0)
    # Transformers loads the base model that the adapter's config names.
    assert_same_answers(Bert4RecForMaskedItemPrediction.from_pretrained(adapter).eval(), expected, tolerance=0)


@pytest.mark.parametrize(("options", "trained"), [*OTHER_ADAPTERS.values()], ids=[*OTHER_ADAPTERS])
def test_item_vectors_and_biases_can_be_trained_in_other_ways_than_lora(peft, options, trained, tmp_path):
    model = peft.get_peft_model(new_model(), peft.LoraConfig(r=4, **options))
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert any(trained in name for name, parameter in model.named_parameters() if parameter.grad is not None)
    assert_answers_go_by_the_logits(model)
    expected = answers(model)
    model.save_pretrained(tmp_path)
    assert_same_answers(peft.PeftModel.from_pretrained(new_model(), tmp_path).eval(), expected, tolerance=0)
    assert_same_answers(model.merge_and_unload(), expected, tolerance=1e-5)


# The test uses the old name, since the oldest supported version of transformers lacks the new one.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@OF_EACH_TARGET
def test_layers_that_are_computed_again_in_the_backward_pass_give_the_adapter_the_same_gradients(
    peft_of_add_adapter, targets
):
    model = new_model()
    model.add_adapter(peft_of_add_adapter.LoraConfig(r=4, target_modules=targets))
    move_adapter(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(**training_batch()).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), expected, atol=1e-6, rtol=0)
    assert_answers_go_by_the_logits(model.eval())


def training_arguments(folder, **options) -> Bert4RecTrainingArguments:
    """Arguments for three training steps, unless `options` change them."""
    three = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    return Bert4RecTrainingArguments(
        str(folder), learning_rate=0.01, warmup_steps=0, per_device_train_batch_size=16, use_cpu=True,
        disable_tqdm=True, **(three | options),
    )  # fmt: skip


@pytest.mark.parametrize("by", ["get_peft_model", "add_adapter"])
def test_our_trainer_trains_evaluates_and_keeps_an_adapter(request, by, tmp_path):
    peft = request.getfixturevalue("peft_of_add_adapter" if by == "add_adapter" else "peft")
    data, base, _ = write_log_and_model(tmp_path)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(base)
    plain, untrained = answers(model.eval()), {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = peft.LoraConfig(r=4, target_modules=TARGETS["both"])
    if by == "add_adapter":
        model.add_adapter(adapter)
    else:
        model = peft.get_peft_model(model, adapter)
    # The trainer evaluates and saves in each epoch and loads the best one, if it can save this kind of model.
    each_epoch = {
        "max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch",
        "load_best_model_at_end": True,
    }  # fmt: skip
    options = each_epoch if by == "get_peft_model" else {}
    trainer = Bert4RecTrainer(model, training_arguments(tmp_path / "adapter", **options), **trainer_inputs(data))
    trainer.train()
    metrics = trainer.evaluate()
    expected = answers(model.eval())
    assert (expected["logits"] - plain["logits"]).abs().max() > 0.01
    for name, weight in model.state_dict().items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert "lora_" in name or torch.equal(weight, untrained[name]), name
    if by == "get_peft_model":
        trainer.save_model()
        assert metrics["eval_NDCG@10"] == trainer.state.best_metric
    else:
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "adapter")
    assert_same_answers(loaded.eval(), expected, tolerance=0)
    again = Bert4RecTrainer(loaded, training_arguments(tmp_path / "again"), **trainer_inputs(data)).evaluate()
    assert again["eval_NDCG@10"] == pytest.approx(metrics["eval_NDCG@10"], abs=1e-9)
    recommend = pipeline("sequential-recommendation", model=str(tmp_path / "adapter"), device="cpu")
    assert_same_answers(recommend.model, expected, tolerance=0)
    assert len(recommend(["item 3", "item 4"], top_k=5)) == 5


def test_our_trainer_saves_the_adapter_that_a_model_was_given(peft_of_add_adapter, tmp_path):
    data, base, _ = write_log_and_model(tmp_path)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(base)
    model.add_adapter(peft_of_add_adapter.LoraConfig(r=4, target_modules=TARGETS["both"]))
    trainer = Bert4RecTrainer(model, training_arguments(tmp_path / "adapter"), **trainer_inputs(data))
    trainer.train()
    trainer.save_model()
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "adapter")
    assert_same_answers(loaded.eval(), answers(model.eval()), tolerance=0)


def test_the_plain_trainer_trains_an_adapter(peft, tmp_path):
    data, base, _ = write_log_and_model(tmp_path)
    model = Bert4RecForMaskedItemPrediction.from_pretrained(base)
    plain = answers(model.eval())
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS["both"]))
    tokenizer = Bert4RecTokenizer.from_pretrained(data)
    arguments = TrainingArguments(
        str(tmp_path / "adapter"), max_steps=3, learning_rate=0.01, per_device_train_batch_size=16, save_strategy="no",
        logging_steps=1, use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, DataCollatorForMaskedItemPrediction(tokenizer), trainer_inputs(data)["train_dataset"]
    )
    trainer.train()
    assert all(0 < record["loss"] < 10 for record in trainer.state.log_history if "loss" in record)
    trainer.save_model()
    expected = answers(model.eval())
    assert (expected["logits"] - plain["logits"]).abs().max() > 0.01
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "adapter")
    assert_same_answers(loaded.eval(), expected, tolerance=0)


def eight_bits(quantization):
    return quantization.Int8WeightOnlyConfig()


def four_bits(quantization):
    from torchao.quantization.granularity import PerGroup

    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))


def eight_bits_for_states_too(quantization):
    return quantization.Int8DynamicActivationInt8WeightConfig()


QUANTIZED = {
    "layers": (eight_bits, nn.Linear),
    "items": (eight_bits, nn.Embedding),
    "both": (eight_bits, (nn.Linear, nn.Embedding)),
    "layers and states": (eight_bits_for_states_too, nn.Linear),
    "items in 4 bits": (four_bits, nn.Embedding),
}


def assert_scores_stay_near(model: nn.Module, plain: dict[str, torch.Tensor]) -> None:
    scores = torch.stack((answers(model)["logits"][:, 3:].flatten(), plain["logits"][:, 3:].flatten()))
    correlation = torch.corrcoef(scores)[0, 1]
    assert correlation > 0.99
    assert not torch.equal(scores[0], scores[1])  # something was rounded


@pytest.mark.parametrize(("config", "kinds"), [*QUANTIZED.values()], ids=[*QUANTIZED])
def test_quantised_weights_give_nearly_the_same_scores(quantization, config, kinds):
    model = new_model()
    plain, embeddings = answers(model), model.get_input_embeddings()
    assert embeddings.takes_ranges(embeddings)
    quantization.quantize_(model, config(quantization), filter_fn=lambda module, name: isinstance(module, kinds))
    assert_scores_stay_near(model, plain)
    assert_answers_go_by_the_logits(model)
    # Rows of a quantised table are looked up, since a slice of it is not a float32 tensor.
    assert embeddings.takes_ranges(embeddings) == (kinds is nn.Linear)
    assert {type(values) for values in answers(model).values()} == {torch.Tensor}
    assert answers(model)["item_vectors"].dtype == torch.float32


@pytest.mark.parametrize("parts", ["layers", "items"])
def test_weights_quantised_on_loading_are_saved_and_loaded_again(quantization, parts, tmp_path):
    from transformers import TorchAoConfig

    new_model().save_pretrained(tmp_path / "plain")
    config = eight_bits(quantization)
    if parts == "items":
        config = quantization.FqnToConfig({"model.embeddings.item_embeddings": config})
    model = Bert4RecForMaskedItemPrediction.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(config)
    ).eval()
    assert_scores_stay_near(model, answers(new_model()))
    assert_answers_go_by_the_logits(model)
    expected = answers(model)
    model.save_pretrained(tmp_path / "quantised")
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "quantised").eval()
    assert_same_answers(loaded, expected, tolerance=0)
    quantised = loaded.get_input_embeddings() if parts == "items" else loaded.model.layers[0].attention.query
    assert type(quantised.weight) is not nn.Parameter


@pytest.mark.parametrize(
    ("kinds", "targets"),
    # PEFT takes a quantised item table for a linear layer, so only an item table in float32 can have an adapter.
    [(nn.Linear, TARGETS["both"]), ((nn.Linear, nn.Embedding), TARGETS["attention"])],
    ids=["layers", "layers and items"],
)
def test_an_adapter_is_trained_on_quantised_weights(peft, quantization, kinds, targets):
    model = new_model()
    quantization.quantize_(model, eight_bits(quantization), filter_fn=lambda module, name: isinstance(module, kinds))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    losses = train(model)
    assert losses[-1] < 0.6 * losses[0]
    assert {"lora_" in name for name, parameter in model.named_parameters() if parameter.grad is not None} == {True}
    assert_answers_go_by_the_logits(model)


def offloaded_to_memory(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device="cpu", offload_buffers=True)


def offloaded_to_disk(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder / "offloaded", execution_device="cpu", offload_buffers=True)


def dispatched(model, folder):
    from accelerate import dispatch_model
    from accelerate.utils import offload_state_dict

    offload_state_dict(folder / "offloaded", model.state_dict())
    # Accelerate before version 1.15 needs `force_hooks` where a device map has one device.
    return dispatch_model(model, {"": "disk"}, main_device="cpu", offload_dir=folder / "offloaded", force_hooks=True)


def loaded_from(device_map):
    def load(model, folder):
        model.save_pretrained(folder / "model")
        return Bert4RecForMaskedItemPrediction.from_pretrained(
            folder / "model", device_map=device_map, offload_folder=folder / "offloaded"
        ).eval()

    return load


IN_PARTS = {"model.layers": "cpu", "model.norm": "cpu", "head": "cpu", "history_scores": "cpu", "item_bias": "disk"}
OFFLOADED = {
    "cpu_offload": offloaded_to_memory,
    "disk_offload": offloaded_to_disk,
    "dispatch_model": dispatched,
    "device_map": pytest.param(
        loaded_from({"": "disk"}),
        marks=pytest.mark.skipif(
            not is_accelerate_available("1.15"),
            reason="Accelerate before version 1.15 refuses a device map with the disk alone",
        ),
    ),
    "device_map of items": loaded_from(IN_PARTS | {"model.embeddings": "disk"}),
    "device_map of layers": loaded_from(IN_PARTS | {"model.embeddings": "cpu", "model.layers": "disk"}),
}


@pytest.mark.parametrize("offload", [*OFFLOADED.values()], ids=[*OFFLOADED])
def test_offloaded_weights_give_exactly_the_same_answers(offload, tmp_path):
    plain = new_model()
    expected = answers(plain)
    model = offload(new_model(), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert_same_answers(model, expected, tolerance=0)
    assert_answers_go_by_the_logits(model)
    histories, candidates = histories_in_tokens(plain), torch.tensor([[5, 6, 7, 9, 52]])
    for options in (
        {"candidate_ids": candidates[0], "exclude_ids": candidates[:, 1:3]},
        {"candidate_ids": candidates.expand(len(histories), -1)},
        {"exclude_ids": candidates},
    ):
        for ours, theirs in zip(
            plain.recommend(histories, **options), model.recommend(histories, **options), strict=True
        ):
            assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(plain(**training_batch()).loss, model(**training_batch()).loss)
