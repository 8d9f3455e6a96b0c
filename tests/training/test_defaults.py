"""Defaults that are chosen from the log and the model."""

import numpy as np
import pytest
import torch
from chain_runs import SMALL, arguments
from datasets import Dataset

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    read_prepared,
    train_prepared,
)
from bert4rec_hf.data.counting import cooccurrence_vectors
from bert4rec_hf.defaults import (
    default_architecture,
    default_batch_size,
    default_mask_ratio,
    default_num_train_epochs,
    default_transition_weight,
)
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID


def test_a_new_model_starts_from_co_occurrences_unless_it_is_told(chain, tmp_path):
    data, _ = chain
    histories, tokenizer, _ = read_prepared(data)
    tables = {}
    for name in ("cooccurrence", "random"):
        options = {"max_steps": 1, "learning_rate": 0.0, "seed": 7, "item_initialization": name}
        trainer = train_prepared(data, arguments(tmp_path / name, **options), **SMALL)
        tables[name] = trainer.model.get_input_embeddings().weight.detach()
        assert trainer.recipe()["item_initialization"] == name
    vectors = cooccurrence_vectors(histories, tokenizer.num_items, SMALL["hidden_size"], seed=7)
    assert torch.equal(tables["cooccurrence"][FIRST_ITEM_ID:], vectors)
    assert torch.equal(tables["cooccurrence"][:FIRST_ITEM_ID], tables["random"][:FIRST_ITEM_ID])
    assert not torch.equal(tables["random"][FIRST_ITEM_ID:], vectors)


def test_the_rarer_items_are_the_more_their_transitions_count():
    weights = [default_transition_weight(num_events, 1000) for num_events in (0, 5_000, 20_000, 40_000, 300_000)]
    assert weights == [1.5, 1.5, 1.0, 0.5, 0.25]
    assert default_transition_weight(20_000, 1000, filter_seen_items=False) == 0.25


@pytest.mark.parametrize(("rare_below", "wide_from"), [(0, 10**6), (10**6, 10**6), (0, 1)])
def test_a_new_model_starts_with_the_mean_of_a_history_where_the_log_is_small_and_no_item_rare(
    chain, tmp_path, monkeypatch, rare_below, wide_from
):
    monkeypatch.setattr("bert4rec_hf.defaults.RARE_BELOW_EVENTS_PER_ITEM", rare_below)
    monkeypatch.setattr("bert4rec_hf.defaults.WIDE_FROM_EVENTS", wide_from)
    options = {"max_steps": 1, "learning_rate": 0.0}
    trainer = train_prepared(chain[0], arguments(tmp_path / "model", **options), **SMALL)
    attention = trainer.model.model.layers[0].attention
    assert torch.equal(attention.output.weight, attention.value.weight.T) == (rare_below < wide_from == 10**6)


def test_rare_items_have_fewer_epochs_unless_it_is_told(chain, tmp_path, monkeypatch):
    assert [default_num_train_epochs(number, 1000) for number in (29_999, 30_000)] == [10, 20]
    monkeypatch.setattr("bert4rec_hf.defaults.RARE_BELOW_EVENTS_PER_ITEM", 10**6)
    given = Bert4RecTrainingArguments(str(tmp_path / "model"), max_steps=1, use_cpu=True)
    trainer = train_prepared(chain[0], given, **SMALL)
    assert trainer.args.num_train_epochs == trainer.recipe()["num_train_epochs"] == 10
    assert given.num_train_epochs == 20
    given = Bert4RecTrainingArguments(str(tmp_path / "other"), max_steps=1, use_cpu=True, num_train_epochs=30)
    assert train_prepared(chain[0], given, **SMALL).args.num_train_epochs == 30


def test_a_new_models_width_and_dropout_follow_from_the_log_and_the_rest_from_them():
    small = default_architecture(90_000, 1_000, {})
    assert small == {
        "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 160, "gated_feed_forward": True,
        "hidden_act": "silu", "hidden_dropout_prob": 0.1, "num_transitions": 64, "transition_weight": 0.0625,
        "next_item_weight": 1.0, "repeat_weight": 1.0, "causal_attention": True, "filter_share": 0.0,
    }  # fmt: skip
    large = default_architecture(600_000, 20_000, {})
    assert (large["hidden_size"], large["num_attention_heads"], large["intermediate_size"]) == (128, 4, 320)
    assert large["hidden_dropout_prob"] == 0.1
    rare = default_architecture(599_999, 20_000, {})
    assert (rare["hidden_size"], rare["num_attention_heads"], rare["intermediate_size"]) == (256, 8, 672)
    assert (rare["hidden_dropout_prob"], rare["num_transitions"]) == (0.5, 64)
    many = default_architecture(499_999, 100_001, {})
    assert (many["hidden_size"], many["hidden_dropout_prob"], many["num_transitions"]) == (64, 0.5, 0)
    filtered = default_architecture(90_000, 1_000, {"filter_seen_items": True})
    weights = [filtered[name] for name in ("transition_weight", "next_item_weight", "repeat_weight")]
    assert weights == [0.25, 0.0, 0.0]
    # The filter is for causal models of logs whose seen items are filtered.
    assert filtered["filter_share"] == 0.3
    for given in ({"causal_attention": False}, {"position_embedding_type": "learned_from_end"}):
        model = default_architecture(90_000, 1_000, {"filter_seen_items": True} | given)
        assert (model["causal_attention"], model["filter_share"]) == (False, 0.0)
    plain = default_architecture(
        500_000, 20_000, {"hidden_size": 48, "gated_feed_forward": False, "hidden_act": "relu"}
    )
    assert plain == {
        "hidden_size": 48, "intermediate_size": 192, "gated_feed_forward": False, "hidden_act": "relu",
        "hidden_dropout_prob": 0.5, "num_transitions": 64, "transition_weight": 0.2,
        "next_item_weight": 1.0, "repeat_weight": 1.0, "causal_attention": True, "filter_share": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(("hidden_size", "given", "expected"), [(64, None, 2e-3), (256, None, 1e-3), (256, 0.1, 0.1)])
def test_wide_models_learn_more_slowly_unless_it_is_told(tmp_path, hidden_size, given, expected):
    tokenizer = Bert4RecTokenizer.from_items(range(30), model_max_length=100)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=8)
    model = Bert4RecForMaskedItemPrediction(config)
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4})
    options = {"learning_rate": given, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path / "model", **options, num_train_epochs=2, warmup_steps=0),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert trainer.recipe()["learning_rate"] == expected
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates) == expected


def test_large_logs_are_trained_in_larger_batches_shared_by_the_processes():
    sizes = [default_batch_size(rows) for rows in (0, 943, 16_000, 16_001, 40_000, 10**9)]
    assert sizes == [32, 32, 32, 64, 128, 1024]


def test_a_causal_model_predicts_all_items_of_a_small_log_and_a_quarter_of_a_large_one():
    assert default_mask_ratio(100, 1_200, True) == 1.0
    assert default_mask_ratio(100, 2_400, True) == 0.5
    assert default_mask_ratio(100, 10_000, True) == 0.25
    assert default_mask_ratio(np.inf, 1, True) == 0.25  # a stream
    assert default_mask_ratio(0, 0, True) == 1.0


@pytest.mark.parametrize(
    ("rows", "given", "expected"),
    [
        ([[3, 4, 5]] * 3 + [[3] * 60], None, 0.4),
        ([[3, 4, 5]] * 3 + [[3] * 90], None, 0.2),
        ([[3, 4, 5]] * 15 + [[3] * 300], None, 0.4),  # the model reads 200 of 300
        ([[3, 4, 5]], 0.3, 0.3),
        ([], None, 0.2),
    ],
)
def test_short_histories_have_more_masks_unless_it_is_told(tmp_path, rows, given, expected):
    tokenizer = Bert4RecTokenizer.from_items(range(30), model_max_length=100)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **SMALL))
    trainer = Bert4RecTrainer(
        model,
        arguments(tmp_path / "model", mask_ratio=given),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
    )
    assert trainer.data_collator.mask_ratio == trainer.args.mask_ratio == trainer.recipe()["mask_ratio"] == expected
