"""The network: attention, positions, precision, configuration, a growing catalogue."""

import subprocess
import sys

import pytest
import torch
from small_models import (
    ARCHITECTURES,
    FIRST,
    HISTORIES,
    MASK,
    NUM_ITEMS,
    VOCAB,
    WITH_HISTORY,
    make_model,
    mask_scores,
    pad,
    without_history_scores,
)
from transformers import AutoModelForMaskedLM, AutoTokenizer

import bert4rec_hf.model.layers as layers
from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer


def test_padding_on_either_side_gives_the_same_scores(model):
    right = mask_scores(model, *pad(HISTORIES, "right", 11))
    left = mask_scores(model, *pad(HISTORIES, "left", 11))
    assert (right - left).abs().max() < 1e-5
    # Different histories have different scores, so the equality above is not trivial.
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_scores_of_sdpa(model):
    if model.config.causal_attention:
        pytest.skip("causal attention is for sdpa and eager")
    inputs = pad(HISTORIES, "left")
    model.set_attn_implementation("sdpa")
    expected = mask_scores(model, *inputs)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiling takes half a minute
        assert (mask_scores(model, *inputs) - expected).abs().max() < 1e-5


def test_autocast_on_a_device_gives_attention_its_inputs_in_one_dtype(model, monkeypatch):
    dtypes, eager = [], layers.eager_attention_forward

    def attention(module, query, key, value, *args, **kwargs):
        dtypes.append([query.dtype, key.dtype, value.dtype])
        return eager(module, query, key, value, *args, **kwargs)

    monkeypatch.setattr(layers, "eager_attention_forward", attention)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # what a CPU does otherwise is left out
    model.set_attn_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        model(*pad(HISTORIES))
    assert dtypes == [[torch.bfloat16] * 3] * 2


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
    if model.config.causal_attention:
        pytest.skip("causal attention reads earlier items only; see test_causal_attention.py")
    scores = mask_scores(model, torch.tensor([[MASK, 9, 17], [MASK, 9, 30]]))
    assert (scores[0] - scores[1]).abs().max() > 0.05


def test_positions_of_all_rows_may_be_given_once(model):
    ids = torch.tensor([[9, 17, MASK], [17, 30, MASK]])
    options = {"masked_positions": torch.tensor([[2], [2]])}
    shared = model(input_ids=ids, position_ids=torch.tensor([[0, 2, 5]]), **options).logits
    each = model(input_ids=ids, position_ids=torch.tensor([[0, 2, 5]] * 2), **options).logits
    assert torch.equal(shared, each)
    assert not torch.equal(shared, model(input_ids=ids, **options).logits)


@without_history_scores
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
    # In the row with [MASK] alone, all attention is on it and none on padding.
    assert torch.equal(outputs.attentions[0][3, :, 0], torch.eye(8)[:1].expand(2, -1))


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
    # One process loads all architectures, since starting a process takes most of the time.
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
    signed = angles.sin() * torch.tensor([-1.0] * 4 + [1.0] * 4)  # the signs that `rotate` expects
    torch.testing.assert_close(sines[0, 0].double(), signed, atol=1e-4, rtol=0)


def test_a_bfloat16_model_scores_in_float32(model):
    exact, _ = model.recommend(*pad(HISTORIES), top_k=5)
    scores, _ = model.to(torch.bfloat16).recommend(*pad(HISTORIES), top_k=5)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert (scores - exact).abs().max() < 0.3
    # The scores have more digits than bfloat16.
    assert not torch.equal(scores, scores.bfloat16().float())


def test_autocast_scores_in_float32(model):
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = model.recommend(*pad(HISTORIES), top_k=5)
        candidate_scores, _ = model.recommend(*pad(HISTORIES), candidate_ids=torch.tensor([5, 6, 7]))
    assert scores.dtype == candidate_scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert candidate_scores.isfinite()[:, :3].all()


def test_a_grown_catalogue_keeps_the_old_scores_and_the_tied_table(model):
    ids, mask = pad(HISTORIES)
    before = mask_scores(model, ids, mask)
    model.resize_token_embeddings(VOCAB + 4)
    assert model.config.vocab_size == VOCAB + 4
    assert model.get_input_embeddings().weight.shape == (VOCAB + 4, model.config.hidden_size)
    assert model.item_bias.weight.shape == (VOCAB + 4,)
    after = mask_scores(model, ids, mask)
    torch.testing.assert_close(after[:, :VOCAB], before)
    assert after[:, VOCAB:].isfinite().all()
    # A history may contain a new item.
    assert model.recommend(torch.tensor([[VOCAB + 3, MASK]]), top_k=VOCAB + 4)[0][0, VOCAB].isfinite()


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
    # A new row is the mean of the old rows, so its score is the mean of the old scores.
    mean = before[..., 3:].mean(dim=-1)
    torch.testing.assert_close(after[..., -1], mean, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, after)
    assert AutoTokenizer.from_pretrained(tmp_path).items == tokenizer.items
    assert loaded.get_input_embeddings().weight is loaded.get_input_embeddings().weight
    assert model.add_items(tokenizer, ["new"]) == 0


def test_growing_with_the_tokenizer_of_another_model_is_an_error():
    tokenizer = Bert4RecTokenizer.from_items(list("abc"), model_max_length=12)
    with pytest.raises(ValueError, match="the tokenizer has 6 token ids"):
        make_model().add_items(tokenizer, ["new"])
    assert tokenizer.num_items == 3


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
