"""Metrics, baselines and the protocol, on cases worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import EvalPrediction

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    DataCollatorForMaskedItemPrediction,
    compute_metrics,
    keep_transitions,
    ranking_metrics,
    target_ranks,
)
from bert4rec_hf.data.histories import tokenize_histories
from bert4rec_hf.data.rows import ranking_rows
from bert4rec_hf.evaluation.baselines import baseline_ranks, transition_ranks
from bert4rec_hf.evaluation.protocol import Protocol


def test_metrics_of_known_ranks():
    metrics = ranking_metrics(np.array([1, 2, 11, 0]))
    assert metrics["HR@1"] == 0.25
    assert metrics["HR@10"] == 0.5
    assert metrics["HR@20"] == 0.75
    assert metrics["NDCG@10"] == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert metrics["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 11) / 4)


def test_a_target_that_is_never_shown_is_a_miss_at_every_cutoff():
    assert set(ranking_metrics(np.zeros(5, int)).values()) == {0.0}


def test_no_users_give_zeros_and_no_warning():
    assert set(ranking_metrics(np.zeros(0, int)).values()) == {0.0}


def test_target_ranks_count_ties_against_the_target_and_leave_out_special_tokens():
    # The items are token ids 3 to 7. The special tokens have the highest scores and must not count.
    scores = torch.tensor([[9.0, 9, 9, 1, 2, 2, 0, 5]]).expand(4, -1).unsqueeze(1)
    labels = torch.tensor([[4], [7], [6], [-100]])
    # Item 4 ties with 5 and ranks below 7. A target that the catalogue lacks is a miss.
    assert target_ranks((scores,), labels).tolist() == [3, 1, 5, 0]


def test_target_ranks_find_the_target_position_in_full_logits():
    scores = torch.zeros(1, 3, 6)
    scores[0, 1] = torch.tensor([0.0, 0, 0, 1, 3, 2])
    assert target_ranks(scores, torch.tensor([[-100, 5, -100]])).tolist() == [2]
    with pytest.raises(ValueError, match=r"labels of shape \(1, 3\).*got \(1, 2\)"):
        target_ranks(scores, torch.tensor([[-100, 5]]))


def test_compute_metrics_reads_ranks():
    class Prediction:
        predictions = np.array([1, 0])

    assert compute_metrics(Prediction())["HR@1"] == 0.5


def table(rows: dict[str, tuple[list[str], int, int | None, int | None]], timestamps=None) -> pa.Table:
    columns = {
        "user_id": list(rows),
        "item_id": [row[0] for row in rows.values()],
        "train_end": pa.array([row[1] for row in rows.values()], pa.int32()),
        "validation_position": pa.array([row[2] for row in rows.values()], pa.int32()),
        "test_position": pa.array([row[3] for row in rows.values()], pa.int32()),
    }
    if timestamps is not None:
        columns["timestamp"] = timestamps
    return pa.table(columns)


def test_baselines_by_hand():
    tokenizer = Bert4RecTokenizer.from_items(list("abcd"), model_max_length=5)
    histories = tokenize_histories(
        table(
            {
                "u": (["a", "b", "a", "b", "c", "d"], 4, 4, 5),
                "v": (["a", "c", "a", "b", "d", "c"], 4, 4, 5),
            },
            timestamps=[[1, 2, 3, 4, 8, 9], [1, 2, 3, 5, 8, 9]],
        ),
        tokenizer,
    )
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    found = baseline_ranks(rows, histories, 4)
    # The training counts are 4 for a, 3 for b, 1 for c and 0 for d. The targets are d for u and c for v.
    assert found["popularity"].tolist() == [4, 3]
    # The newest tenth of the eight training events is the b at time 5. The other items tie, without a recent event.
    assert found["recent popularity"].tolist() == [4, 4]
    # The last item of u is c, which a follows once and d never. Nothing follows d in v, so popularity decides.
    assert found["last-item co-occurrence"].tolist() == [4, 3]
    # u has had a and b twice and c once. v has had a twice, and b, c and d once. Popularity orders equal counts.
    assert found["personal popularity"].tolist() == [4, 3]
    # Users without events, which other programs may write, change nothing.
    nothing = ([], 0, None, None)
    around = {"before": nothing, "u": (["a", "b", "a", "b", "c", "d"], 4, 4, 5), "w": (list("acabdc"), 4, 4, 5)}
    around = tokenize_histories(table(around | {"behind": nothing}), tokenizer)
    with_empty_users = baseline_ranks(ranking_rows(around, tokenizer, "test", filter_seen_items=False), around, 4)
    assert with_empty_users["last-item co-occurrence"].tolist() == [4, 3]
    # Without times, the last tenth of each training part is recent, at least one event: b in both histories.
    assert histories.item_ids[replace(histories, timestamps=None).is_recent()].tolist() == [4, 4]
    filtered = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    # u has had a, b and c, so only d is left. v has had its target, so the target is never shown.
    assert baseline_ranks(filtered, histories, 4)["popularity"].tolist() == [1, 0]
    assert "personal popularity" not in baseline_ranks(filtered, histories, 4)


def test_personal_popularity_counts_the_users_own_events():
    tokenizer = Bert4RecTokenizer.from_items(list("abcd"), model_max_length=9)
    histories = tokenize_histories(
        table({"u": (["x", "d", "c", "d", "b", "d", "c"], 5, 5, 6), "v": (["a", "a", "a"], 3, None, None)}), tokenizer
    )
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    # Before the target c, u has had d three times, and b and c once. These two tie. The catalogue lacks x.
    assert baseline_ranks(rows, histories, 4)["personal popularity"].tolist() == [3]
    assert baseline_ranks(rows, histories, 4)["popularity"].tolist() == [4]


def test_where_nothing_trains_all_baselines_are_ties():
    tokenizer = Bert4RecTokenizer.from_items(list("ab"), model_max_length=5)
    histories = tokenize_histories(table({"u": (["x", "a"], 1, None, 1)}, timestamps=[[1, 2]]), tokenizer)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    found = baseline_ranks(rows, histories, 2)
    assert list(found) == [
        "popularity", "recent popularity", "last-item co-occurrence", "transitions", "personal popularity",
        "session kNN", "item kNN", "EASE",
    ]  # fmt: skip
    assert [ranks.tolist() for ranks in found.values()] == [[2]] * 8


def test_co_occurrence_knows_what_follows_what():
    tokenizer = Bert4RecTokenizer.from_items(list("abcd"), model_max_length=5)
    histories = tokenize_histories(
        table({"u": (["a", "d", "a", "d", "b", "a", "d"], 5, 5, 6), "v": (["b", "b", "b"], 3, None, None)}), tokenizer
    )
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    # b is the most popular item, but d follows a. The start of v does not count as a successor of the end of u.
    assert baseline_ranks(rows, histories, 4)["last-item co-occurrence"].tolist() == [1]
    assert baseline_ranks(rows, histories, 4)["popularity"].tolist() == [3]


@pytest.mark.parametrize("seen", [True, False])
def test_transitions_alone_are_a_model_whose_own_scores_are_popularity(seen):
    chance = np.random.default_rng(0)
    tokenizer = Bert4RecTokenizer.from_items([f"i{number}" for number in range(200)], model_max_length=20)
    rows = {}
    for user in range(60):
        # A random walk around a circle of items, so that some items often follow others. The catalogue lacks some of
        # the items.
        walk = np.cumsum(chance.choice([1, 1, 2, 5, 60], size=chance.integers(2, 15))) % 220
        rows[str(user)] = ([f"i{number}" for number in walk], len(walk) - 1, None, len(walk) - 1)
    rows |= {"new": (["i7"], 0, None, 0)}
    histories = tokenize_histories(table(rows), tokenizer)
    found = ranking_rows(histories, tokenizer, "test", filter_seen_items=seen)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=4, num_attention_heads=1, num_transitions=64)
    model = Bert4RecForMaskedItemPrediction(config).eval()
    keep_transitions(model, histories, 200, weight=1.0)
    counts = np.bincount(histories.item_ids[histories.is_trained()], minlength=len(tokenizer))
    model.get_input_embeddings().weight.data.zero_()
    model.item_bias.weight.data.copy_(torch.from_numpy(1e-5 * counts))
    collator = DataCollatorForMaskedItemPrediction(tokenizer)
    batch = collator([{name: row[name] for name in ("input_ids", "labels", "exclude_ids")} for row in found])
    expected = model.rank(
        batch["input_ids"], batch["labels"].amax(dim=1), batch["attention_mask"], exclude_ids=batch["exclude_ids"]
    )
    ranks = transition_ranks(found, histories, 200)
    assert ranks.tolist() == expected.tolist()
    assert (ranks == 0).any()
    assert (ranks == 1).sum() > 5
    assert baseline_ranks(found, histories, 200)["transitions"].tolist() == ranks.tolist()


def test_the_protocol_counts_users_without_a_past_and_targets_seen_or_unknown():
    tokenizer = Bert4RecTokenizer.from_items(list("abc"), model_max_length=5)
    histories = tokenize_histories(
        table(
            {
                "fresh": (["a", "b"], 0, None, 0),
                "again": (["a", "b", "a"], 2, None, 2),
                "cold": (["a", "x"], 1, None, 1),
                "no target": (["a"], 1, None, None),
            }
        ),
        tokenizer,
    )
    preparation = {"split": {"name": "temporal", "validation_cut": 5, "test_cut": 7}}
    protocol = Protocol.of(histories, preparation, "test", 3, True)
    assert protocol.num_users == 3
    assert protocol.num_users_without_past == 1
    assert protocol.share_seen_targets == pytest.approx(1 / 3)
    assert protocol.share_unknown_targets == pytest.approx(1 / 3)
    assert str(protocol) == (
        "temporal (validation from 5, test from 7), test; all 3 items ranked, seen items filtered; 3 users"
    )


def test_scores_in_the_place_of_ranks_are_an_error():
    with pytest.raises(ValueError, match="give the plain Trainer preprocess_logits_for_metrics=target_ranks"):
        compute_metrics(EvalPrediction(np.zeros((2, 5, 30)), np.zeros((2, 5))))
