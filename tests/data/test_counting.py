"""Counts of the training part: item vectors from co-occurrence, and transitions."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
import torch

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, tokenize_histories
from bert4rec_hf.data import counting
from bert4rec_hf.data.counting import (
    NEIGHBOUR_POWER,
    NEIGHBOUR_WINDOW,
    SUCCESSOR_WINDOW,
    UNCONVERTED_CASES,
    VECTOR_RMS,
    conversion_scores,
    cooccurrence_vectors,
)
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID, PAD_TOKEN_ID
from bert4rec_hf.model.history_scores import NUM_NEWEST_EVENTS
from bert4rec_hf.training.initialization import (
    keep_conversion_scores,
    keep_transitions,
    start_from_cooccurrence,
    start_new_items,
)


def histories_of(rows: list[str], held_out: int = 0):
    """Histories of one-letter items and the number of items. The last `held_out` items of each are not for training."""
    tokenizer = Bert4RecTokenizer.from_items(sorted(set("".join(rows))), model_max_length=10)
    table = pa.table({
        "user_id": [str(number) for number in range(len(rows))],
        "item_id": [list(row) for row in rows],
        "train_end": pa.array([len(row) - held_out for row in rows], pa.int32()),
        "validation_position": pa.array([None] * len(rows), pa.int32()),
        "test_position": pa.array([None] * len(rows), pa.int32()),
    })  # fmt: skip
    return tokenize_histories(table, tokenizer), tokenizer.num_items


def mutual_information(rows: list[str]) -> np.ndarray:
    """The positive mutual information (items, items), computed with a loop over pairs."""
    names = sorted(set("".join(rows)))
    counts = np.zeros((len(names), len(names)))
    for row in rows:
        for (i, first), (j, second) in combinations(enumerate(row), 2):
            if j - i <= NEIGHBOUR_WINDOW and first != second:
                counts[names.index(first), names.index(second)] += 1
                counts[names.index(second), names.index(first)] += 1
    powers = counts.sum(axis=1) ** NEIGHBOUR_POWER
    expected = np.outer(counts.sum(axis=1), powers / powers.sum())
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(counts / expected), 0)


def test_products_are_the_positive_mutual_information():
    rows = ["abcabdhgijk", "badcba", "efefgh", "ghfe", "abefcc", "ijkij"]
    histories, num_items = histories_of(rows)
    information = mutual_information(rows)
    vectors = cooccurrence_vectors(histories, num_items, num_items).double().numpy()
    # The item vectors are the left singular vectors times the roots of the singular values.
    left, singular, _ = np.linalg.svd(information)
    expected = (left * singular) @ left.T
    scale = np.sqrt((left**2 * singular).mean()) / VECTOR_RMS
    assert vectors @ vectors.T * scale**2 == pytest.approx(expected, abs=1e-4)
    assert np.sqrt((vectors**2).mean()) == pytest.approx(VECTOR_RMS)


def test_items_that_stand_together_have_like_vectors_whatever_the_width():
    chance = np.random.default_rng(0)
    rows = ["".join(chance.choice(list(group), 8)) for group in ("abcde", "fghij") for _ in range(50)]
    histories, num_items = histories_of(rows)
    for hidden_size in (4, 64):
        vectors = torch.nn.functional.normalize(cooccurrence_vectors(histories, num_items, hidden_size))
        products = vectors @ vectors.T
        assert vectors.shape == (10, hidden_size)
        assert products[:5, :5].min() > products[:5, 5:].max() + 0.2


def test_a_new_model_recommends_what_stands_near_the_items_of_a_history():
    chance = np.random.default_rng(0)
    rows = ["".join(chance.choice(list(group), 8)) for group in ("abcde", "fghij") for _ in range(50)]
    histories, num_items = histories_of([*rows, "k"])
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID)).eval()
    alone = model.get_input_embeddings().weight[-1].clone()
    start_from_cooccurrence(model, histories, num_items)
    assert torch.equal(model.get_input_embeddings().weight[-1], alone)
    assert torch.equal(
        model.get_input_embeddings().weight[FIRST_ITEM_ID:-1], cooccurrence_vectors(histories, num_items, 64)[:-1]
    )
    past = torch.tensor([[0, 1, 2], [7, 6, 5]]) + FIRST_ITEM_ID
    input_ids = torch.cat((past, torch.full((2, 1), MASK_TOKEN_ID)), dim=1)
    _, best = model.recommend(input_ids, top_k=2, exclude_ids=past)
    assert [set(row) for row in (best - FIRST_ITEM_ID).tolist()] == [{3, 4}, {8, 9}]


def test_a_model_in_half_precision_gets_the_vectors_too():
    histories, num_items = histories_of(["abcabd", "badcba"])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID)).bfloat16()
    start_from_cooccurrence(model, histories, num_items, with_mean=False)
    expected = cooccurrence_vectors(histories, num_items, 64).bfloat16()
    assert torch.equal(model.get_input_embeddings().weight[FIRST_ITEM_ID:], expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_new_item_starts_among_its_neighbours(kind):
    # "y" stands beside "a" and "b" in the rows, "z" beside "y" alone, and nothing is known of "x".
    rows = [*["abcd"] * 4, *["cdab"] * 4, "ayb", "ayb", "ya", "zy"]
    tokenizer = Bert4RecTokenizer.from_items(list("abcdxyz"), model_max_length=10)
    histories, _ = histories_of(rows)
    known = np.array([3, 4, 5, 6, 8, 9], np.int32)  # token ids of a, b, c, d, y, z in the larger catalogue
    histories = replace(histories, item_ids=known[histories.item_ids - FIRST_ITEM_ID])
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer))).to(kind)
    counts = torch.tensor([11.0, 10, 8, 8])
    with torch.no_grad():
        model.item_bias.weight[3:7] = 2 * counts.log1p() - 3
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    start_new_items(model, histories, 7, 3)
    information = mutual_information(rows)[4]  # of y
    weights = torch.tensor([information[0] * math.log1p(3), information[1] * math.log1p(2)]).float()
    vectors = before["model.embeddings.item_embeddings.weight"][3:5].float()
    expected = (weights / weights.sum()) @ vectors
    after = model.state_dict()
    tolerance = {"atol": 1e-5 if kind == torch.float32 else 1e-2, "rtol": 0}
    torch.testing.assert_close(after["model.embeddings.item_embeddings.weight"][8].float(), expected, **tolerance)
    # The line through the biases of the old items, at the four events of y.
    of_old = before["item_bias.weight"][3:7].float().numpy()
    slope, start = np.polyfit(counts.log1p().numpy(), of_old, 1)
    assert float(after["item_bias.weight"][8]) == pytest.approx(slope * math.log1p(4) + start, abs=0.02)
    for name, weights in before.items():
        changed = [
            row for row, (old, new) in enumerate(zip(weights, after[name], strict=True)) if not torch.equal(old, new)
        ]
        is_of_items = name in ("model.embeddings.item_embeddings.weight", "item_bias.weight")
        assert changed == ([8] if is_of_items else []), name


def test_the_first_layer_hands_on_the_mean_of_a_history():
    histories, num_items = histories_of(["abcabd", "badcba", "efefgh"])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID)).eval()
    start_from_cooccurrence(model, histories, num_items)
    attention = model.model.layers[0].attention
    torch.nn.init.zeros_(attention.query.weight)
    states = torch.randn(2, 5, 64)
    handed_on, _ = attention(states)
    assert torch.allclose(handed_on, states.mean(dim=1, keepdim=True).expand_as(states), atol=1e-5)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    start_from_cooccurrence(model, histories, num_items, with_mean=False, seed=1)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"model.embeddings.item_embeddings.weight"}


def stored_transitions(model: Bert4RecForMaskedItemPrediction) -> list[dict[int, tuple[float, float]]]:
    """For each item, the stored successors, as indices from 0, with their two scores."""
    scores = model.history_scores
    tables = (scores.successor_ids, scores.successor_scores, scores.next_item_scores)
    return [
        {item - FIRST_ITEM_ID: values for item, *values in zip(*row, strict=True) if item}
        for row in zip(*(table[FIRST_ITEM_ID:].tolist() for table in tables), strict=True)
    ]


@pytest.mark.parametrize("filter_seen_items", [True, False])
def test_transitions_are_the_strongest_of_what_followed_an_item(filter_seen_items):
    rows = ["abcabdhgijk", "badcba", "efefgh", "ghfe", "abefcc", "ijkij", "abab", "aab", "z"]
    histories, num_items = histories_of([row + "xy" for row in rows], held_out=2)
    names = sorted(set("".join(rows) + "xy"))
    counts: Counter = Counter()
    next_counts: Counter = Counter()
    for row in rows:
        for (i, first), (j, second) in combinations(enumerate(row), 2):
            pair = names.index(first), names.index(second)
            if j - i <= SUCCESSOR_WINDOW and first != second:
                counts[pair] += 0.5 ** (j - i - 1)
            if j - i == 1 and (first != second or not filter_seen_items):
                next_counts[pair] += 1
    first_counts, second_counts, totals = Counter(), Counter(), Counter()
    for (first, second), count in counts.items():
        first_counts[first] += count
        second_counts[second] += count
    for (first, _), count in next_counts.items():
        totals[first] += count
    powers = {item: count**NEIGHBOUR_POWER for item, count in second_counts.items()}
    expected: list[dict[int, tuple[float, float]]] = [{} for _ in names]
    for first, second in {*counts, *next_counts}:
        count = counts[first, second]
        information = math.log(count / first_counts[first] / powers[second] * sum(powers.values())) if count else 0
        followed = next_counts[first, second] / max(1, totals[first])
        expected[first][second] = max(0.0, information) * math.log(1 + count), math.log(1 + 20 * followed)
    for number in (4, 48):
        config = Bert4RecConfig(
            vocab_size=num_items + FIRST_ITEM_ID, num_transitions=number, filter_seen_items=filter_seen_items
        )
        model = Bert4RecForMaskedItemPrediction(config)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        for _ in range(2):  # the second call replaces the transitions of the first
            keep_transitions(model, histories, num_items, weight=0.3)
        assert model.config.transition_weight == 0.3
        for row, scores in zip(stored_transitions(model), expected, strict=True):
            assert all(scores[item] == pytest.approx(values, rel=1e-4) for item, values in row.items())
            # A quarter of the places are for the most frequent next items, the others for the highest first scores.
            frequent, strong = (
                sorted((values[kind] for values in scores.values() if values[kind]), reverse=True)[:places]
                for kind, places in ((1, number // 4), (0, number - number // 4))
            )
            kept_strong, kept_frequent = (
                sorted((values[kind] for values in row.values()), reverse=True) for kind in (0, 1)
            )
            assert kept_frequent[: len(frequent)] == pytest.approx(frequent, rel=1e-4)
            assert kept_strong[: len(strong)] == pytest.approx(strong, rel=1e-4)
            assert len(row) <= number
        changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        assert changed == {
            f"history_scores.{name}" for name in ("successor_ids", "successor_scores", "next_item_scores")
        }
    assert max(map(len, expected)) > 4
    a = names.index("a")
    assert (a in expected[a]) is not filter_seen_items
    assert not model.history_scores.successor_ids[1:FIRST_ITEM_ID].any()
    assert not model.history_scores.next_item_scores[:FIRST_ITEM_ID].any()


def test_a_history_without_items_gets_what_is_popular_both_of_late_and_at_all_times():
    rows = ["abcdefghij", "jihgfedcba", *["jklmnopqra"] * 3, *["jklmnopqrb"] * 2, "c"]
    histories, num_items = histories_of(rows)
    config = Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, num_transitions=5)
    model = Bert4RecForMaskedItemPrediction(config).eval()
    keep_transitions(model, histories, num_items)
    names = sorted(set("".join(rows)))
    # Without times, the last tenth of each history is recent, at least one event: 8 of the 71 events.
    recent, at_all_times = Counter(row[-1] for row in rows), Counter("".join(rows))
    popularity = {name: recent[name] + at_all_times[name] * 8 / 71 for name in names}
    expected = sorted(names, key=lambda name: -popularity[name])[:3]
    _, best = model.recommend(torch.tensor([[MASK_TOKEN_ID]]), top_k=3)
    assert [names[item - FIRST_ITEM_ID] for item in best[0].tolist()] == expected == ["a", "b", "j"]
    scores = model.history_scores.successor_scores[PAD_TOKEN_ID]
    assert scores[0].item() == pytest.approx(math.log(1 + popularity["a"]))


def test_a_log_of_single_events_has_no_transitions():
    histories, num_items = histories_of(["a", "b", "cc"])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, num_transitions=2))
    keep_transitions(model, histories, num_items)
    c = 2
    assert stored_transitions(model) == [{}, {}, {c: [0.0, pytest.approx(math.log(21))]}]


def test_no_vector_is_longer_than_so_many_times_the_others(monkeypatch):
    histories, num_items = histories_of(["abcabdhgijk", "badcba", "efefgh", "ghfe", "abefcc", "ijkij"])
    free = cooccurrence_vectors(histories, num_items, 8)
    monkeypatch.setattr(counting, "MAX_NORM_RATIO", 1.0)
    cut = cooccurrence_vectors(histories, num_items, 8)
    lengths, longest = free.norm(dim=1), VECTOR_RMS * 8**0.5
    assert lengths.max() > longest * 1.2
    assert torch.allclose(cut.norm(dim=1), lengths.clamp(max=longest))
    assert torch.equal(cut[lengths < longest], free[lengths < longest])


def test_items_of_different_users_have_nothing_in_common():
    histories, num_items = histories_of(["ab"] * 3 + ["cd"] * 3)
    products = cooccurrence_vectors(histories, num_items, 8) @ cooccurrence_vectors(histories, num_items, 8).T
    assert products[:2, 2:].abs().max() < 1e-6


def test_only_the_training_part_counts():
    histories, num_items = histories_of(["abx", "bay"], held_out=1)
    vectors = cooccurrence_vectors(histories, num_items, 8)
    assert vectors[:2].any(dim=1).all()
    assert not vectors[2:].any()


def test_an_item_beside_nothing_but_itself_has_no_vector():
    histories, num_items = histories_of(["aaa", "b"])
    assert not cooccurrence_vectors(histories, num_items, 8).any()


def test_equal_seeds_give_equal_vectors_and_leave_other_random_numbers_alone(monkeypatch):
    device_seeds = []
    histories, num_items = histories_of(["abcabd", "badcba", "efefgh"])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", device_seeds.append)
    vectors = [cooccurrence_vectors(histories, num_items, 8, seed=seed) for seed in (1, 1, 2)]
    assert torch.rand(1) == expected
    assert not device_seeds
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2])
    products = [found @ found.T for found in vectors]
    assert torch.allclose(products[0], products[2], atol=1e-5)


def test_of_a_large_log_whole_histories_are_drawn(monkeypatch):
    monkeypatch.setattr(counting, "MAX_COUNTED_EVENTS", 200)
    rows = [chr(97 + number % 20) + chr(117 + number % 5) for number in range(400)]
    histories, num_items = histories_of(rows)
    vectors = cooccurrence_vectors(histories, num_items, 8)
    assert vectors.any()
    assert not torch.equal(vectors, cooccurrence_vectors(histories, num_items, 8, seed=1))
    assert math.isfinite(vectors.sum())


def test_a_model_that_goes_on_keeps_the_transitions_of_items_that_its_new_log_lacks():
    histories, num_items = histories_of(["abcd", "bacd", "abdc"])
    config = Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID, num_transitions=8)
    model = Bert4RecForMaskedItemPrediction(config)
    keep_transitions(model, histories, num_items)
    assert int(model.history_scores.successor_ids.max()) < config.vocab_size  # there are fewer than eight items
    assert model.history_scores.successor_ids[PAD_TOKEN_ID].count_nonzero() <= num_items
    before = model.history_scores.successor_ids.clone(), model.history_scores.successor_scores.clone()
    histories = replace(histories, train_end=np.full(3, 2))  # only a and b
    keep_transitions(model, histories, num_items)
    a, b, c, d = range(FIRST_ITEM_ID, FIRST_ITEM_ID + 4)
    for old, new in zip(
        before, (model.history_scores.successor_ids, model.history_scores.successor_scores), strict=True
    ):
        assert torch.equal(old[[c, d]], new[[c, d]])
        assert not torch.equal(old[[a, b]], new[[a, b]])
    assert sorted(model.history_scores.successor_ids[a].tolist()) == [0] * 7 + [b]


def test_a_model_without_room_for_transitions_is_told_so():
    histories, num_items = histories_of(["abc", "abd"])
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=num_items + FIRST_ITEM_ID))
    with pytest.raises(ValueError, match=r"Bert4RecConfig\(num_transitions=64\)"):
        keep_transitions(model, histories, num_items)


def test_many_items_are_factorised_another_way_to_the_same_products(monkeypatch, caplog):
    chance = np.random.default_rng(0)
    histories, num_items = histories_of(["".join(map(chr, chance.integers(97, 137, 12))) for _ in range(80)])
    expected = cooccurrence_vectors(histories, num_items, 16, seed=1)
    monkeypatch.setattr(counting, "SPARSE_FACTORISATION_FROM_ITEMS", num_items - 1)
    found = cooccurrence_vectors(histories, num_items, 16, seed=1)
    assert "takes about a minute" in caplog.text
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-5, rtol=1e-3)
    assert torch.equal(found, cooccurrence_vectors(histories, num_items, 16, seed=1))


def typed_histories(rows: list[str], targets: str):
    """Histories of events such as "av", item a viewed. The last event of each is not for training."""
    events = [row.split() for row in rows]
    types = sorted({kind for row in events for _, kind in row})
    tokenizer = Bert4RecTokenizer.from_items(
        sorted({item for row in events for item, _ in row}), event_types=types, target_event_types=[*targets]
    )
    table = pa.table({
        "user_id": [str(number) for number in range(len(rows))],
        "item_id": [[item for item, _ in row] for row in events],
        "event_type": [[kind for _, kind in row] for row in events],
        "train_end": pa.array([len(row) - 1 for row in events], pa.int32()),
        "validation_position": pa.array([None] * len(rows), pa.int32()),
        "test_position": pa.array([None] * len(rows), pa.int32()),
    })  # fmt: skip
    return tokenize_histories(table, tokenizer), tokenizer


def test_conversion_scores_are_the_shares_of_items_in_a_state_that_are_the_next_target():
    random = np.random.default_rng(0)
    rows = [
        " ".join(f"{'abcdefgh'[item]}{'bcv'[kind]}" for item, kind in random.integers([8, 3], size=(length, 2)))
        for length in (1, 2, 30, 40, 50, 90)
    ]
    histories, tokenizer = typed_histories(rows, "bc")
    cases, hits = Counter(), Counter()
    for row in rows:
        events = row.split()[:-1]
        for place, (item, target) in enumerate(events):
            if target not in "bc":
                continue
            past = events[:place]
            for other in {name for name, _ in past}:
                newest = max(number for number, (name, _) in enumerate(past) if name == other)
                kind = past[newest][1]
                state = other + target in past, kind, sum(type_ == kind for _, type_ in past[newest + 1 :])
                cases[target, *state] += 1
                hits[target, *state] += other == item
    expected = torch.zeros(4, 2, 4, NUM_NEWEST_EVENTS)
    for (target, had, kind, age), number in cases.items():
        if age < NUM_NEWEST_EVENTS:
            share = hits[target, had, kind, age] / (number + UNCONVERTED_CASES)
            expected["?bcv".index(target), int(had), "?bcv".index(kind), age] = math.log1p(20 * share)
    found = conversion_scores(histories, 3)
    torch.testing.assert_close(found, expected)
    assert (found > 0).sum() > 50
    config = Bert4RecConfig(vocab_size=len(tokenizer), num_event_types=3, target_event_type_ids=[1, 2])
    model = Bert4RecForMaskedItemPrediction(config)
    keep_conversion_scores(model, histories)
    assert torch.equal(model.history_scores.conversion_scores, found)
    # A target type that a later log lacks keeps its scores.
    later, _ = typed_histories(["ab ab ab ac", "cv cb"], "bc")
    assert not conversion_scores(later, 3)[2].any()
    keep_conversion_scores(model, later)
    assert torch.equal(model.history_scores.conversion_scores[2], found[2])
    assert not torch.equal(model.history_scores.conversion_scores[1], found[1])
