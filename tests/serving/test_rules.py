"""Rules: filters, boosts, quotas and diversity, against loops, and the same from every way to serve."""

import json
import logging
import pickle

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import fail, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ARCHITECTURES, FIRST, HISTORIES, NUM_ITEMS, VOCAB, WITH_HISTORY, make_model, pad
from transformers import pipeline

import bert4rec_hf.serving.history_files
from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    ItemIndex,
    ItemTable,
    Rules,
)
from bert4rec_hf.model import recommendation
from bert4rec_hf.serving import rules as rules_module
from bert4rec_hf.serving.bulk import recommend_batches, recommend_file

MODELS = {name: make_model(**options) for name, options in (ARCHITECTURES | WITH_HISTORY).items()}
IDS, MASK = pad(HISTORIES)


def item_table(seed: int = 0, num_items: int = NUM_ITEMS) -> ItemTable:
    """Random values, some of which are null."""
    random = np.random.default_rng(seed)

    def some(values):
        return [None if random.random() < 0.1 else value for value in values]

    columns = {
        "item_id": [str(number) for number in range(num_items)],
        "price": some(random.integers(0, 100, num_items).tolist()),
        "category": some(random.choice(list("abcd"), num_items).tolist()),
        "genres": some([random.choice(list("vwxyz"), random.integers(4)).tolist() for _ in range(num_items)]),
        "on_sale": some((random.random(num_items) < 0.3).tolist()),
    }
    return ItemTable(pa.table(columns), "items.parquet")


ITEMS = item_table()
VALUES = ITEMS.table.to_pylist()


def check_answer(answer, scores, rules, vectors, top_k):
    """Check an answer step by step with loops.

    Args:
        answer: Token ids of the answer.
        scores: The scores of the eligible items of the history, by token id.
        rules: The rules.
        vectors: (vocab size, hidden size) item vectors.
        top_k: Number of items that were asked for.
    """
    tolerance = 1e-4
    boosts = dict.fromkeys(scores, 0.0)
    deviation = np.std(list(scores.values())) if scores else 0
    for condition, weight in (rules.boosts or {}).items():
        mask = ITEMS.mask(condition)
        for item in boosts:
            boosts[item] += weight * mask[item - FIRST]
    keys = {item: score + deviation * boosts[item] for item, score in scores.items()}
    pool = sorted(keys, key=lambda item: -keys[item])
    pool = pool[: (rules_module.POOL_FACTOR if rules.quotas or rules.diversity else 1) * top_k]
    mean, spread = (np.mean([keys[item] for item in pool]), np.std([keys[item] for item in pool])) if pool else (0, 1)
    chosen = []

    def values(column, item):
        value = VALUES[item - FIRST][column]
        return set(value if isinstance(value, list) else [value]) - {None}

    def is_free(item):
        return item not in chosen and all(
            sum(value in values(column, other) for other in chosen) < limit
            for column, limit in [(quota.column, quota.limit) for quota in rules.quotas]
            for value in values(column, item)
        )

    def gain(item):
        standardised = (keys[item] - mean) / (spread or 1)
        if not rules.diversity:
            return standardised
        cosines = [torch.cosine_similarity(vectors[item], vectors[other], dim=0).item() for other in chosen]
        return (1 - rules.diversity) * standardised - rules.diversity * max(cosines, default=0)

    for item in answer:
        assert item in pool
        assert is_free(item)
        assert gain(item) >= max(gain(other) for other in pool if is_free(other)) - tolerance
        chosen.append(item)
    assert len(chosen) == top_k or not any(is_free(item) for item in pool)


def eligible_scores(model, rules, exclude_ids=None, candidate_ids=None):
    """For each history, the scores of the items that all filters leave, by token id."""
    scores, items = model.recommend(IDS, MASK, top_k=VOCAB)
    found = []
    for row in range(len(IDS)):
        left = {item: score for item, score in zip(items[row].tolist(), scores[row].tolist(), strict=True) if item}
        if exclude_ids is not None:
            left = {item: score for item, score in left.items() if item not in exclude_ids[row].tolist()}
        if candidate_ids is not None:
            of_row = candidate_ids.expand(len(IDS), -1)[row].tolist()
            left = {item: score for item, score in left.items() if item in of_row}
        if rules.where is not None:
            mask = rules.items.mask(rules.where)
            left = {item: score for item, score in left.items() if mask[item - FIRST]}
        found.append(left)
    return found


ALL_RULES = st.fixed_dictionaries(
    {
        "where": st.sampled_from([None, "price < 60", "price < 5", "category IN ('a', 'b')", "on_sale", "FALSE"]),
        "boosts": st.dictionaries(
            st.sampled_from(["on_sale", "price < 30", "'x' IN genres"]), st.floats(-2, 2, width=16), max_size=2
        ),
        "max_per": st.lists(
            st.sampled_from(["category:1", "category:3", "genres:1", "genres:2", "price:1"]),
            max_size=2,
            unique_by=lambda text: text.split(":")[0],
        ),
        "diversity": st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    }
)
EXCLUDED = torch.tensor([[5, 9, 17, 30, 4], [11, 3, 0, 0, 0], [39, 38, 37, 36, 0], [0, 0, 0, 0, 0]])
CANDIDATES = [
    None, torch.arange(5, 35), torch.tensor([39, 5, 12]), torch.tensor([[*range(5, 25)], [3, 4, 11, *[0] * 17]] * 2),
]  # fmt: skip


@given(
    model=st.sampled_from(list(MODELS)),
    options=ALL_RULES,
    exclude_ids=st.sampled_from([None, EXCLUDED]),
    candidate_ids=st.sampled_from(CANDIDATES),
    top_k=st.sampled_from([1, 3, 10]),
    pool_factor=st.sampled_from([2, 20]),
    chunk=st.sampled_from([7, 2**16]),
    gathered=st.sampled_from([200, 2**26]),
    long_list=st.sampled_from([0.0, 1 / 8, 2.0]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_answers_under_rules_are_those_of_loops(
    model, options, exclude_ids, candidate_ids, top_k, pool_factor, chunk, gathered, long_list
):
    model, rules = MODELS[model], Rules(ITEMS, **options)
    vectors = model.get_input_embeddings().weight.detach()
    limits = {"exclude_ids": exclude_ids, "candidate_ids": candidate_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules_module, "POOL_FACTOR", pool_factor)
        patch.setattr(recommendation, "CATALOGUE_CHUNK_SIZE", chunk)
        patch.setattr(recommendation, "MAX_GATHERED_VALUES", gathered)
        patch.setattr(recommendation, "LEAST_SHARE_OF_A_LONG_LIST", long_list)
        scores, items = model.recommend(IDS, MASK, top_k=top_k, rules=rules, **limits)
        states = model.mask_states(IDS, MASK)
        found = model.search_by_rules(states, IDS * (IDS >= FIRST), rules=rules, top_k=top_k, **limits)
        assert torch.equal(found[0], scores)
        assert torch.equal(found[1], items)
        for row, left in enumerate(eligible_scores(model, rules, **limits)):
            answer = [item for item in items[row].tolist() if item]
            assert items[row, len(answer) :].eq(0).all()
            assert scores[row, len(answer) :].isneginf().all()
            # The scores are those of the model, without boosts.
            np.testing.assert_allclose(scores[row, : len(answer)], [left[item] for item in answer], atol=1e-5)
            assert found[2][row] == min(len(left), rules.pool_size(top_k))
            check_answer(answer, left, rules, vectors, top_k)


def test_rules_that_change_nothing_give_the_same_bits():
    for model in MODELS.values():
        expected = model.recommend(IDS, MASK, top_k=5, exclude_ids=EXCLUDED)
        for rules in (Rules(), Rules(ITEMS), Rules(ITEMS, where="TRUE"), Rules(ITEMS, boosts={"FALSE": 3.0})):
            found = model.recommend(IDS, MASK, top_k=5, exclude_ids=EXCLUDED, rules=rules)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def known_model(scores, vectors=None):
    """A model whose scores are the biases; `vectors` are those of its items."""
    model = make_model(vocab_size=FIRST + len(scores), hidden_size=2, num_attention_heads=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.item_bias.weight[FIRST:] = torch.tensor(scores)[:, None].reshape(model.item_bias.weight[FIRST:].shape)
        if vectors is not None:
            model.get_input_embeddings().weight[FIRST:] = torch.tensor(vectors)
    return model


def answer_of(model, top_k, rules, **limits):
    _, items = model.recommend(torch.tensor([[1]]), top_k=top_k, rules=rules, **limits)
    return [item - FIRST for item in items[0].tolist() if item]


def table_of(**columns):
    size = len(next(iter(columns.values())))
    return ItemTable(pa.table({"item_id": [str(number) for number in range(size)]} | columns), "items.parquet")


def test_quotas_count_each_value_of_a_list_and_no_null():
    model = known_model([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    items = table_of(
        brand=["x", "x", None, "x", None, "y"],
        genres=[["a", "b"], ["b"], ["b", "a", "b"], [], None, ["a"]],
    )
    assert answer_of(model, 6, Rules(items, max_per="brand:1")) == [0, 2, 4, 5]
    assert answer_of(model, 3, Rules(items, max_per="brand:2")) == [0, 1, 2]
    assert answer_of(model, 6, Rules(items, max_per="genres:1")) == [0, 3, 4]
    assert answer_of(model, 6, Rules(items, max_per="genres:2")) == [0, 1, 3, 4, 5]
    assert answer_of(model, 6, Rules(items, max_per=["genres:2", "brand:1"])) == [0, 2, 4]


def test_a_boost_is_a_number_of_standard_deviations_of_the_eligible_items():
    model = known_model([3.0, 1.0, -1.0, -3.0])  # their standard deviation is √5
    items = table_of(new=[False, False, True, None], old=[True, True, True, False])
    below, above = 1.99 / 5**0.5, 2.01 / 5**0.5
    assert answer_of(model, 4, Rules(items, boosts={"new": below})) == [0, 1, 2, 3]
    assert answer_of(model, 4, Rules(items, boosts={"new": above})) == [0, 2, 1, 3]
    # Without the last item, the deviation is √(8/3), and a larger boost is needed.
    assert answer_of(model, 4, Rules(items, where="old", boosts={"new": above})) == [0, 1, 2]
    assert answer_of(model, 4, Rules(items, where="old", boosts={"new": 2.01 / (8 / 3) ** 0.5})) == [0, 2, 1]
    assert answer_of(model, 4, Rules(items, boosts={"new": 1.0, "old": -5.0})) == [3, 0, 2, 1]
    scores, _ = model.recommend(torch.tensor([[1]]), top_k=4, rules=Rules(items, boosts={"new": above}))
    assert scores[0].tolist() == [3.0, -1.0, 1.0, -3.0]


def test_diversity_prefers_items_that_are_unlike_those_above_them():
    vectors = [[1.0, 0.0], [2.0, 0.01], [0.0, 1.0], [0.5, 0.5]]
    model = known_model([4.0, 3.0, 2.0, 1.0], vectors)
    assert answer_of(model, 4, Rules(diversity=0.0)) == [0, 1, 2, 3]
    assert answer_of(model, 4, Rules(diversity=0.01)) == [0, 1, 2, 3]
    assert answer_of(model, 2, Rules(diversity=0.5)) == [0, 2]
    assert answer_of(model, 4, Rules(diversity=1.0)) == [0, 2, 3, 1]
    # Equal scores, and items without a vector, are no error.
    assert sorted(answer_of(known_model([1.0, 1.0, 1.0]), 3, Rules(diversity=0.5))) == [0, 1, 2]


def test_quotas_and_diversity_choose_from_a_pool(monkeypatch):
    monkeypatch.setattr(rules_module, "POOL_FACTOR", 2)
    model = known_model([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    items = table_of(brand=["x", "x", "x", "x", "y", "z"])
    assert answer_of(model, 2, Rules(items, max_per="brand:1")) == [0]  # the pool has the first four items
    assert answer_of(model, 3, Rules(items, max_per="brand:1")) == [0, 4, 5]


def test_what_is_no_rule_is_an_error_that_says_what_was_expected():
    for options, message in (
        ({"where": "prise < 3"}, r"unknown column 'prise'; did you mean price\?"),
        ({"where": ["price < 3"]}, "a condition must be a text"),
        ({"boosts": {"price": 1.0}}, "expected a value that is true or false"),
        ({"boosts": {"on_sale": float("nan")}}, r"standard deviations, at most 1e\+06; got nan for 'on_sale'"),
        ({"boosts": {"on_sale": 1e39}}, r"standard deviations, at most 1e\+06; got 1e\+39 for 'on_sale'"),
        ({"boosts": {"on_sale": "1"}}, r"a boost must be a number of standard deviations, at most 1e\+06; got '1'"),
        ({"boosts": "on_sale"}, 'boosts must be a mapping such as {"on_sale": 0.5}; got \'on_sale\''),
        ({"max_per": "category"}, 'max_per must be "COLUMN:N" with N of at least 1, such as "category:2"; got'),
        ({"max_per": "category:0"}, "max_per must be"), ({"max_per": "category:x"}, "max_per must be"),
        ({"max_per": [2]}, "max_per must be"), ({"max_per": ":2"}, "max_per must be"),
        ({"max_per": "categories:2"}, r"has no column 'categories'; did you mean category\?"),
        ({"diversity": 1.5}, "diversity must be a number from 0 to 1; got 1.5"),
        ({"diversity": "0.3"}, "diversity must be a number"), ({"diversity": float("nan")}, "diversity must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Rules(ITEMS, **options)
    for options in ({"where": "TRUE"}, {"boosts": {"TRUE": 1.0}}, {"max_per": "category:2"}):
        with pytest.raises(ValueError, match="where, boosts and max_per read columns of an item table; got none"):
            Rules(**options)
    with pytest.raises(ValueError, match=r"expected an item table, ItemTable\.read"):
        Rules("items.parquet", where="TRUE")
    with pytest.raises(ValueError, match="the rules are for 5 items, the catalogue has 37"):
        MODELS["all"].recommend(IDS, MASK, rules=Rules(item_table(num_items=5), where="TRUE"))


class CountedIndex:
    """An index that counts its searches, and finds at most `most` items."""

    def __init__(self, index, most=10**6):
        self.index, self.most, self.asked = index, most, []

    def __len__(self):
        return len(self.index)

    def search(self, vectors, count):
        self.asked.append(count)
        return self.index.search(vectors, min(count, self.most))


@pytest.fixture(scope="module", params=["rotary-pre", "all"])
def model_and_index(request):
    return MODELS[request.param], ItemIndex.build(MODELS[request.param])


@pytest.mark.parametrize(
    ("options", "is_used"),
    [
        ({"where": "price < 60"}, True), ({"max_per": "category:1"}, True), ({"diversity": 0.4}, True),
        ({"where": "price < 80", "max_per": "category:2", "diversity": 0.2}, True),
        ({"where": "price < 5"}, False), ({"boosts": {"on_sale": 1.0}}, False), ({"where": "FALSE"}, False),
    ],
)  # fmt: skip
def test_an_index_gives_what_exact_search_gives(model_and_index, options, is_used, monkeypatch):
    model, index = model_and_index
    monkeypatch.setattr(rules_module, "POOL_FACTOR", 4)
    rules = Rules(ITEMS, **options)
    counted = CountedIndex(index)
    given = {"top_k": 3, "exclude_ids": EXCLUDED, "rules": rules}
    scores, items = model.recommend(IDS, MASK, index=counted, **given)
    expected_scores, expected = model.recommend(IDS, MASK, **given)
    assert torch.equal(items, expected)
    torch.testing.assert_close(scores, expected_scores)
    assert bool(counted.asked) == is_used
    if is_used:  # as many more as the filter leaves out
        share = 1 if rules.num_allowed is None else rules.num_allowed / NUM_ITEMS
        assert counted.asked == [int(np.ceil(rules.pool_size(3) / share)) + EXCLUDED.shape[1]]
    # Candidates are searched exactly.
    counted.asked.clear()
    model.recommend(IDS, MASK, index=counted, candidate_ids=torch.arange(5, 30), **given)
    assert counted.asked == []


def test_where_an_index_finds_too_few_items_that_meet_a_condition_the_search_is_exact(model_and_index):
    model, index = model_and_index
    rules = Rules(ITEMS, where="price < 60")
    counted = CountedIndex(index, most=2)
    expected = model.recommend(IDS, MASK, top_k=5, rules=rules)
    found = model.recommend(IDS, MASK, top_k=5, rules=rules, index=counted)
    assert counted.asked
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


RAW = [str(number) for number in range(NUM_ITEMS)]
RULES = [
    ["--where", "price < 60"],
    ["--boost", "1.5: on_sale", "-1: category = 'a'"],
    ["--max_per", "category:2", "genres:1"],
    ["--diversity", "0.4"],
    ["--where", "price < 80", "--boost", "0.5: on_sale", "--max_per", "category:2", "--diversity", "0.3"],
]
KEYWORDS = [
    {"where": "price < 60"},
    {"boosts": {"on_sale": 1.5, "category = 'a'": -1}},
    {"max_per": ["category:2", "genres:1"]},
    {"diversity": 0.4},
    {"where": "price < 80", "boosts": {"on_sale": 0.5}, "max_per": "category:2", "diversity": 0.3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with an item table."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = Bert4RecTokenizer.from_items(RAW, model_max_length=8, sort=False)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), hidden_size=16, max_position_embeddings=8, initializer_range=0.5,
        filter_seen_items=True,
    )  # fmt: skip
    Bert4RecForMaskedItemPrediction(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pq.write_table(ITEMS.table, folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("sequential-recommendation", model=folder, device="cpu")


@pytest.fixture(scope="module")
def items(folder, pipe):
    return ItemTable.read(folder / "items.parquet", pipe.tokenizer)


USERS = [["1", "2", "3"], [], ["4"], ["30", "31", "5", "6"], ["7"]]


@pytest.mark.parametrize(
    ("words", "options"), zip(RULES, KEYWORDS, strict=True), ids=[" ".join(words) for words in RULES]
)
def test_pipeline_command_line_and_files_answer_alike(folder, pipe, items, words, options, tmp_path):
    rules = Rules(items, **options)
    expected = pipe(USERS, rules=rules, top_k=5)
    assert expected != pipe(USERS, top_k=5)
    batched = pipe(USERS, rules=rules, top_k=5, batch_size=3)
    at_once = pipeline("sequential-recommendation", model=folder, device="cpu", rules=rules, top_k=5)
    rows = [{"user_id": str(number), "item_id": history} for number, history in enumerate(USERS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recommend_file(at_once, tmp_path / "in.jsonl", tmp_path / "python.parquet")
    command = ["recommend", folder, "--top_k", 5, "--device", "cpu", *words]
    succeed(*command, "--histories", tmp_path / "in.jsonl", "--output", tmp_path / "shell.parquet")
    for answers in (
        batched,
        at_once(USERS),
        _answers(tmp_path / "python.parquet"),
        _answers(tmp_path / "shell.parquet"),
    ):
        assert [_ids(answer) for answer in answers] == [_ids(answer) for answer in expected]
        for answer, other in zip(answers, expected, strict=True):
            assert [row["score"] for row in answer] == pytest.approx([row["score"] for row in other], abs=1e-5)
    for history, answer in zip(USERS, expected, strict=True):
        lines = succeed("recommend", folder, *history, "--top_k", 5, "--device", "cpu", *words)
        assert [line.split()[1:] for line in lines] == [[row["item_id"], f"{row['score']:.3f}"] for row in answer]


def _ids(answer):
    return [row["item_id"] for row in answer]


def _answers(path):
    rows = pq.read_table(path).to_pylist()
    return [[row for row in rows if row["user_id"] == str(number)] for number in range(len(USERS))]


def test_exclusions_and_candidates_of_call_and_row_hold_under_rules_too(pipe, items):
    rules = Rules(items, where="price < 80", max_per="category:3")
    best = _ids(pipe(["1"], rules=rules, top_k=4))
    assert _ids(pipe(["1"], rules=rules, exclude=best[:1], top_k=1)) == best[1:2]
    rows = [{"history": ["1"], "candidates": best[1:]}, {"history": ["1"], "exclude": best[:2]}, ["1"]]
    answers = pipe(rows, rules=rules, batch_size=3, top_k=1)
    assert [_ids(answer) for answer in answers] == [best[1:2], best[2:3], best[:1]]
    assert _ids(pipe(["1"], rules=rules, candidates=best[2:], top_k=1)) == best[2:3]
    few = Rules(items, where="price < 30")
    for row in ({"history": ["1"], "candidates": RAW}, {"history": ["1"], "candidates": RAW, "exclude": []}):
        assert pipe(row, rules=few) == pipe(["1"], rules=few)
    # In one batch, two rows have lists of their own.
    rows = [{"history": ["1"], "candidates": RAW}, {"history": ["2"], "candidates": RAW[::-1][1:]}]
    answers = pipe(rows, rules=few, batch_size=2)
    assert [_ids(answer) for answer in answers] == [_ids(pipe(["1"], rules=few)), _ids(pipe(rows[1], rules=few))]
    prices = dict(zip(RAW, ITEMS.table["price"].to_pylist(), strict=True))
    assert all(prices[item] < 30 for answer in answers for item in _ids(answer))


def test_one_warning_says_which_rule_leaves_how_many(folder, pipe, items, tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        pipe(USERS, rules=Rules(items, where="price < 60", boosts={"on_sale": 1.0}, diversity=0.3), top_k=5)
    assert caplog.records == []
    few, quota = Rules(items, where="item_id IN ('1', '2', '9')"), Rules(items, max_per="on_sale:1")
    num_null = ITEMS.table["on_sale"].null_count
    where = "where \"item_id IN ('1', '2', '9')\", which 3 of 37 items meet, and the other filters leave"
    limited = f"max_per on_sale:1 leaves {num_null + 2} of the best 740 on average for"
    expected = {
        few: f"5 of 5 histories get fewer than 5 items: {where} 2.6 on average for 5",
        quota: f"5 of 5 histories get fewer than 37 items: {limited} 5",
    }
    pipe(USERS, rules=few, top_k=5)
    list(pipe(iter(USERS), rules=few, top_k=5))
    pipe(["1", "2"], rules=few, top_k=2)
    assert [record.getMessage() for record in caplog.records] == [
        expected[few], expected[few], f"1 of 1 histories get fewer than 2 items: {where} 1 on average for 1",
    ]  # fmt: skip
    caplog.clear()
    pipe([[]] * 5, rules=quota, top_k=NUM_ITEMS)
    assert [record.getMessage() for record in caplog.records] == [expected[quota]]
    caplog.clear()
    # A file of histories has one warning, although it is read in parts.
    monkeypatch.setattr(bert4rec_hf.serving.history_files, "ROWS_PER_BATCH", 2)
    at_once = pipeline("sequential-recommendation", model=folder, device="cpu", rules=few, top_k=5)
    rows = [{"user_id": str(number), "item_id": history} for number, history in enumerate(USERS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recommend_file(at_once, tmp_path / "in.jsonl", tmp_path / "out.parquet")
    assert [record.getMessage() for record in caplog.records] == [expected[few]]
    caplog.clear()
    # Without rules, and with rules that are not to blame, there is no warning.
    pipe(RAW, top_k=5)
    pipe(RAW, rules=Rules(items, boosts={"on_sale": 1.0}), top_k=5)
    pipe(["1"], candidates=["2"], rules=Rules(diversity=0.2), top_k=5)
    assert caplog.records == []


def test_a_condition_that_no_item_meets_gives_empty_answers_and_a_warning(folder, pipe, items, caplog):
    rules = Rules(items, where="price > 1000", boosts={"on_sale": 1.0}, max_per="category:1", diversity=0.5)
    with caplog.at_level(logging.WARNING):
        assert pipe(["1"], rules=rules) == []
        assert pipe(USERS, rules=rules, batch_size=2) == [[]] * 5
    assert "0 of 37 items meet, and the other filters leave 0 on average for 5" in caplog.text
    lines = succeed("recommend", folder, "1", "--where", "price > 1000", "--device", "cpu")
    assert lines == [
        "no item is left to recommend: every item is excluded, seen, not a candidate or does not meet --where"
    ]


def test_a_function_for_spark_takes_rules_along(folder, pipe, items):
    rules = Rules(items, where="price < 60", max_per="category:1")
    answer = pickle.loads(pickle.dumps(recommend_batches(folder, top_k=3, rules=rules)))
    (found,) = answer(iter([pandas.DataFrame({"user_id": ["a"], "item_id": [["1"]]})]))
    assert found["item_id"].tolist() == _ids(pipe(["1"], rules=rules, top_k=3))


def test_a_wrong_option_of_the_command_line_is_one_line(folder, tmp_path):
    pq.write_table(ITEMS.table, tmp_path / "items.parquet")
    command = ["recommend", folder, "1"]
    for words, message in (
        (["--where", "prise < 3"], "unknown column 'prise'; did you mean price?"),
        (["--where", "read_csv('x') = 1"], "unknown function 'read_csv'"),
        (["--boost", "on_sale"], 'a boost must be "WEIGHT: CONDITION", such as "0.5: on_sale"; got \'on_sale\''),
        (["--boost", "1: on_sale", "172"], 'a boost must be "WEIGHT: CONDITION", such as "0.5: on_sale"; got \'172\''),
        (["--boost", "1: on_sale", "2: on_sale"], "the boost of 'on_sale' is there twice; leave one of them out"),
        (["--max_per", "category"], 'max_per must be "COLUMN:N"'),
        (["--diversity", "2"], "diversity must be a number from 0 to 1; got 2.0"),
        (["--items", "items.parquet"], "--items is for --where, --boost and --max_per; got items.parquet alone"),
        (["--where", "TRUE", "--items", "nothing.csv"], "there is no file nothing.csv; expected an item table"),
    ):
        assert message in fail(*command, *words)
    for words in (["recommend", tmp_path], ["evaluate", tmp_path, "--data", tmp_path]):
        assert "is not a BERT4Rec model folder" in fail(*words, "--where", "TRUE")
    (folder / "items.parquet").rename(folder / "moved.parquet")
    try:
        message = fail(*command, "--where", "TRUE")
        assert f"--where, --boost and --max_per read an item table, and {folder} has no items.parquet" in message
        assert succeed(*command, "--where", "price < 3", "--items", tmp_path / "items.parquet", "--device", "cpu")
    finally:
        (folder / "moved.parquet").rename(folder / "items.parquet")


def test_what_are_no_rules_is_an_error(pipe):
    with pytest.raises(ValueError, match=r"rules must be Rules, for example Rules\(items, where=…\); got 'price < 3'"):
        pipe(["1"], rules="price < 3")
    with pytest.raises(TypeError, match="unknown argument 'rule': did you mean rules"):
        pipe(["1"], rule=Rules())
