"""Training and evaluating models with `causal_attention`."""

import math

import pytest
from chain_runs import SMALL, arguments

from bert4rec_hf import Bert4RecForMaskedItemPrediction, evaluate_prepared, train_prepared


def test_a_causal_model_learns_a_chain_and_is_served_as_it_was_evaluated(chain, tmp_path):
    data, _ = chain
    causal = SMALL | {"causal_attention": True}
    trainer = train_prepared(data, arguments(tmp_path / "model", num_train_epochs=8), **causal)
    assert trainer.args.mask_ratio == 1.0
    ndcg = trainer.evaluation["metrics"]["NDCG@10"]
    assert ndcg > 0.6  # chance is below .15
    record = evaluate_prepared(tmp_path / "model", data, "validation", use_cpu=True)
    assert record["metrics"]["NDCG@10"] == pytest.approx(ndcg, abs=1e-6)
    loaded = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "model")
    assert loaded.config.causal_attention
    assert math.isfinite(record["metrics"]["loss"])
