"""README.md of a model folder. test_push.py tests the card on the Hub."""

import json
import random
import re
import shlex

import pytest
import yaml
from folder_files import preparation_of
from huggingface_hub import ModelCard

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, prepare
from bert4rec_hf.cli import main
from bert4rec_hf.hub.model_card import MARK, add_evaluation, read_evaluations, write_model_card

PROTOCOL = {
    "split": "temporal (validation from 1, test from 2)", "part": "test", "candidates": "all 3 items",
    "filter_seen_items": True, "num_users": 9, "num_users_without_past": 4, "share_seen_targets": 0.25,
    "share_unknown_targets": 0.5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    titles = {'say "hi"': "Two\nlines", "a\n```b": "B"}
    counts = {'say "hi"': 9, "a\n```b": 5}
    tokenizer = Bert4RecTokenizer.from_items([*titles, "rare"], titles=titles, counts=counts)
    config = Bert4RecConfig(vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1)
    Bert4RecForMaskedItemPrediction(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def read(folder) -> ModelCard:
    return ModelCard((folder / "README.md").read_text("utf-8"))


def test_the_snippet_is_python_whatever_the_item_ids_are(folder):
    write_model_card(folder, "me/model")
    snippet = re.search(r"```python\n(.*?)\n```", read(folder).text, re.DOTALL)[1]
    history = {}
    exec(next(line for line in snippet.splitlines() if line.startswith("history")), history)
    assert history["history"] == ['say "hi"', "a\n```b"]
    assert snippet.count("# Two lines; B") == 1
    compile(snippet, "snippet", "exec")


def test_a_card_names_our_library_as_the_hub_names_libraries_also_where_it_named_another(folder):
    write_model_card(folder, "me/model")
    assert read(folder).data.library_name == "bert4rec-hf"
    assert {"bert4rec", "bert4rec_hf", "sequential-recommendation"} <= set(read(folder).data.tags)
    card = read(folder)
    card.data.library_name = "transformers"  # as in cards of earlier versions
    card.save(folder / "README.md")
    write_model_card(folder)
    assert read(folder).data.library_name == "bert4rec-hf"


def test_a_card_says_what_a_score_is_made_of(folder):
    write_model_card(folder, "me/model")
    assert "Transformer's" not in read(folder).text
    config = Bert4RecConfig.from_pretrained(folder, num_transitions=7, repeat_weight=1.0)
    Bert4RecForMaskedItemPrediction(config).save_pretrained(folder)
    write_model_card(folder, "me/model")
    assert (
        "scores that were counted in the log: 1 times the association with the newest items; 1 times ln(1 + n) for an "
        "item that the history has n times."
    ) in read(folder).text


def test_metadata_and_repo_id_stay_when_the_card_is_written_again(folder):
    write_model_card(folder, "me/model", license="mit", model_name="mine")
    card = read(folder)
    card.data["language"] = "eo"
    card.data["tags"] = [*card.data["tags"], "by-hand"]
    card.save(folder / "README.md")
    add_evaluation(
        folder, {"protocol": PROTOCOL, "metrics": {"HR@10": 0.5}, "baselines": {"popularity": {"HR@10": 0.25}}}
    )
    write_model_card(folder)
    data = read(folder).data
    assert (data.license, data.get("language"), data.get("model_name"), data.tags[-1]) == (
        "mit",
        "eo",
        "mine",
        "by-hand",
    )
    assert data.tags.count("bert4rec") == 1
    assert 'model="me/model"' in read(folder).text
    assert "| popularity | 0.2500 |" in read(folder).text


def test_a_card_without_the_mark_is_left_alone(folder):
    (folder / "README.md").write_text("mine")
    write_model_card(folder, "me/model")
    assert (folder / "README.md").read_text() == "mine"


def test_groups_of_users_stand_in_the_table_and_in_the_metadata(folder):
    groups = {"4 users without a past": {"model": {"HR@10": 0.125}, "popularity": {"HR@10": 0.0}}}
    add_evaluation(folder, {"protocol": PROTOCOL, "metrics": {"HR@10": 0.5}, "baselines": {}, "groups": groups})
    write_model_card(folder)
    assert "| model, 4 users without a past | 0.1250 |" in read(folder).text
    values = {result.dataset_config[-22:]: result.metric_value for result in read(folder).data.eval_results}
    assert values["4 users without a past"] == 0.125
    assert len(values) == 2


@pytest.mark.parametrize(
    ("source", "datasets", "kind"), [("ml-100k", ["ml-100k"], "ml-100k"), ("my lög (1).csv", None, "my-l-g-1")]
)
def test_only_a_named_dataset_is_in_the_metadata(folder, source, datasets, kind):
    (folder / "preparation.json").write_text(json.dumps(preparation_of(source)))
    add_evaluation(folder, {"protocol": PROTOCOL, "metrics": {"HR@10": 0.5}})
    write_model_card(folder)
    data = read(folder).data
    assert data.get("datasets") == datasets
    assert data.eval_results[0].dataset_type == kind
    assert ("GroupLens" in read(folder).text) == (datasets is not None)
    assert MARK in read(folder).text
    assert data.license is None


@pytest.mark.parametrize(
    "options",
    [
        {"split": "temporal", "validation_cut": 0.6, "test_cut": "2024-02-19", "min_rating": 2.0, "duplicates": "drop"},
        {"min_item_events": 2, "event_columns": ["shop", "rating"], "sequence_column": "place"},
        {"split": "none", "min_user_events": 2},
        {"validation": False},
    ],
)
def test_the_printed_command_prepares_the_same_data(folder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    chance = random.Random(0)
    lines = ["user_id,item,timestamp,rating,shop,place"]
    for event in range(300):
        time = f"2024-0{1 + event // 150}-{1 + event % 150 // 6:02} 12:00:00"
        lines.append(f"{chance.randrange(12)},{chance.randrange(20)},{time},{chance.randint(1, 5)},s,{event}")
    (tmp_path / "a log.csv").write_text("\n".join(lines) + "\n")
    preparation = prepare("a log.csv", "first", item_column="item", **options)
    (folder / "preparation.json").write_text(json.dumps(preparation))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": 1}))
    write_model_card(folder)
    command = next(line for line in read(folder).text.splitlines() if line.startswith("bert4rec prepare"))
    assert command.endswith(" --item_titles TITLES")  # the catalogue has titles
    assert main(shlex.split(command.removesuffix(" --item_titles TITLES"))[1:]) == 0
    assert json.loads((tmp_path / "data" / "preparation.json").read_text()) == preparation
    assert (tmp_path / "data" / "histories.parquet").read_bytes() == (
        tmp_path / "first" / "histories.parquet"
    ).read_bytes()


def test_numbers_of_another_log_stand_under_its_name(folder):
    record = {"source": "old.csv", "protocol": PROTOCOL, "metrics": {"HR@10": 0.5}}
    (folder / "preparation.json").write_text(json.dumps(preparation_of("old.csv")))
    add_evaluation(folder, record)
    add_evaluation(folder, record | {"source": "newer.parquet"})
    add_evaluation(folder, record | {"source": "newer.parquet", "metrics": record["metrics"] | {"HR@10": 0.125}})
    assert len(read_evaluations(folder)) == 2
    write_model_card(folder)
    card = read(folder)
    found = {(result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert found == {("old", 0.5), ("newer", 0.125)}
    assert "Evaluated on `newer.parquet`: " in card.text
    assert card.text.count("| **this model** |") == 2
