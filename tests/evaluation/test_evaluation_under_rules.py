"""`evaluate` under rules: the places of the targets in the lists that the pipeline serves."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_runs import fail, succeed
from log_and_model import write_log_and_model
from transformers import pipeline

from bert4rec_hf import ItemTable, Rules, evaluate_prepared, ranking_metrics, ranking_rows, read_prepared
from bert4rec_hf.data.rows import target_ids_of
from bert4rec_hf.runs import evaluate as evaluate_module
from bert4rec_hf.training import trainer as trainer_module

RULES = {
    "where": {"where": "price < 12"},
    "boosts": {"boosts": {"category = 'a'": 1.0}},
    "quotas": {"max_per": "category:2"},
    "diversity": {"diversity": 0.5},
    "all": {"where": "price < 18", "boosts": {"price < 4": 0.5}, "max_per": "category:3", "diversity": 0.2},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The prepared folder, the model folder with an item table, and the item table."""
    folder = tmp_path_factory.mktemp("workplace")
    data, start, _ = write_log_and_model(folder)
    _, tokenizer, _ = read_prepared(data)
    number = range(tokenizer.num_items)
    columns = {"item_id": tokenizer.items, "price": list(number), "category": ["abcd"[place % 4] for place in number]}
    pq.write_table(pa.table(columns), start / "items.parquet")
    return data, start, ItemTable.read(start / "items.parquet", tokenizer)


def ranks_in_lists(data, start, rules, top_k):
    """For each test user, the place of the target in the list of the pipeline, and the lists."""
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    pipe = pipeline("sequential-recommendation", model=start, device="cpu", filter_seen_items=False)
    targets = tokenizer.token_ids_to_item_ids(target_ids_of(rows).tolist())
    answers = pipe([tokenizer.token_ids_to_item_ids(row) for row in rows["history_ids"]], rules=rules, top_k=top_k)
    lists = [[entry["item_id"] for entry in answer] for answer in answers]
    return [1 + items.index(item) if item in items else 0 for item, items in zip(targets, lists, strict=True)], lists


@pytest.mark.parametrize("name", RULES)
def test_ranks_are_the_places_in_served_lists(workplace, name, monkeypatch):
    data, start, items = workplace
    for module in (trainer_module, evaluate_module):
        monkeypatch.setattr(module, "SERVED_LIST_LENGTH", 7)
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    rules = Rules(items, **RULES[name])
    record = evaluate_prepared(start, data, use_cpu=True, rules=rules)
    ranks, lists = ranks_in_lists(data, start, rules, top_k=7 if rules.reorders else 21)
    shown = {item for items in lists for item in items[:10]}
    assert record["metrics"] == pytest.approx(ranking_metrics(ranks) | {"coverage@10": len(shown) / 21})
    assert 0 < record["metrics"]["HR@10"] < 1
    assert record["baselines"] == {}
    # Rules are not the model's, so its folder stays as it was.
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before
    assert evaluate_prepared(start, data, use_cpu=True)["metrics"]["MRR"] != record["metrics"]["MRR"]
    (start / "evaluation.json").unlink()
    (start / "README.md").unlink()


def test_the_protocol_says_what_the_rules_are_and_what_is_a_miss(workplace):
    data, start, items = workplace

    def protocol(**options):
        return evaluate_prepared(start, data, use_cpu=True, rules=Rules(items, **options))["protocol"]["candidates"]

    histories, tokenizer, _ = read_prepared(data)
    targets = target_ids_of(ranking_rows(histories, tokenizer, "test", filter_seen_items=False)) - 3
    share = f"{(targets >= 12).mean():.1%}"
    assert protocol(where="price < 12") == (
        f"12 of 21 items (where price < 12; {share} of the targets do not meet this and are misses)"
    )
    assert protocol(max_per="category:2", diversity=0.3) == (
        "all 21 items in served lists of 100 (max_per category:2, diversity 0.3; targets beyond the list are misses)"
    )
    assert protocol(where="price < 12", boosts={"price < 4": 0.5}) == (
        f"12 of 21 items (where price < 12; {share} of the targets do not meet this and are misses) in served lists of "
        "100 (boost 0.5: price < 4; targets beyond the list are misses)"
    )


def test_the_command_line_evaluates_under_rules(workplace, tmp_path):
    data, start, items = workplace
    command = ["evaluate", start, "--data", data, "--use_cpu", "true"]
    lines = succeed(*command, "--where", "price < 12", "--boost", "1: category = 'a'", "--targets", "all")
    record = evaluate_prepared(
        start, data, use_cpu=True, rules=Rules(items, where="price < 12", boosts={"category = 'a'": 1.0})
    )
    assert record["protocol"]["candidates"] in lines[0]
    assert f"{record['metrics']['HR@10']:.4f}" in lines[2]
    assert lines[-1].startswith("next: ")
    assert sum(line.startswith("model ") for line in lines) == 2
    assert not any(line.startswith("popularity") for line in lines)
    for words, message in (
        (["--report", tmp_path / "report"], "--report knows no rules; got where price < 12: leave out one of the two"),
        (["--protocol", "paper"], "--protocol paper knows no rules; got where price < 12"),
        (["--items", "nothing.csv"], "there is no file nothing.csv"),
    ):
        assert message in fail(*command, "--where", "price < 12", *words)
