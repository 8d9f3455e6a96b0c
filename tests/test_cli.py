"""The command, from a raw log to recommendations, and what it says when something is wrong."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import pipeline

from bert4rec_hf import Bert4RecTokenizer, read_prepared
from bert4rec_hf.cli import COMMANDS, main

NUM_USERS, NUM_ITEMS = 60, 30
# None of these is a default, so that a recipe that is not read would show.
OPTIONS = {
    "num_train_epochs": 1,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "mask_ratio": 0.3,
    "learning_rate": 0.01,
    "seed": 5,
    "use_cpu": "true",
}
MODEL_FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "items.json",
    "recipe.yaml",
    "evaluation.json",
    "preparation.json",
    "README.md",
}
# What tqdm draws on standard error.
PROGRESS = re.compile(r"\d+%\||\bit/s|\bs/it|^\W*\[A$")


def run(*arguments):
    """Status, standard output and standard error of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(*arguments):
    """Lines of standard output of a command that works."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return out.splitlines()


def fail(*arguments):
    """The one line that a user's mistake gives."""
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip() and not PROGRESS.search(line)]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"bert4rec {arguments[0]}: ")
    return lines[0]


def flags(**options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def train_flags(**changes):
    return flags(**{name: value for name, value in (OPTIONS | changes).items() if value is not None})


def write_log(path, rows, header=("user_id", "item_id", "timestamp")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def random_rows(users, items, seed=0):
    """Events in the order of time, 4 to 12 a user."""
    chance = random.Random(seed)
    return [
        (user, chance.choice(items), 1000 * number + event)
        for number, user in enumerate(users)
        for event in range(chance.randint(4, 12))
    ]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def rows():
    return random_rows(range(1, NUM_USERS + 1), range(101, 101 + NUM_ITEMS))


@pytest.fixture(scope="module")
def log(folder, rows):
    return write_log(folder / "log.csv", rows)


@pytest.fixture(scope="module")
def prepared(folder, log):
    """A prepared folder and what the command printed."""
    return folder / "data", succeed("prepare", log, "--output", folder / "data")


@pytest.fixture(scope="module")
def data(prepared):
    return prepared[0]


@pytest.fixture(scope="module")
def trained(folder, data):
    """A model folder and what the command printed."""
    model = folder / "model"
    return model, succeed("train", "--data", data, "--output_dir", model, *train_flags())


@pytest.fixture(scope="module")
def model(trained):
    return trained[0]


def test_prepare_prints_the_numbers_of_the_log_what_it_wrote_and_the_next_command(prepared, rows):
    data, lines = prepared
    assert lines[0].startswith(f"{NUM_USERS} users, {NUM_ITEMS} items, {len(rows)} events;")
    assert f"leave-one-out: {NUM_USERS} validation and {NUM_USERS} test targets" in lines
    assert lines[-1] == f"wrote {data}; next: bert4rec train --data {data} --output_dir MODEL"
    assert {"histories.parquet", "preparation.json", "tokenizer.json", "items.json"} <= {
        path.name for path in data.iterdir()
    }


def test_train_prepares_a_raw_log_beside_the_model(folder, log, model, data, tmp_path):
    output = tmp_path / "model"
    arguments = ["train", "--data", log, "--output_dir", output, *train_flags()]
    lines = succeed(*arguments)
    assert f"wrote {output}-data" in lines
    assert lines[-1] == f"wrote {output}; next: bert4rec evaluate {output} --data {output}-data"
    assert not list(output.glob("*.parquet"))  # the model folder is pushed, the histories are not
    assert read_prepared(f"{output}-data")[0].item_ids.tolist() == read_prepared(data)[0].item_ids.tolist()
    weights = [load_file(path / "model.safetensors") for path in (output, model)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    assert "model is not empty" in fail(*arguments)
    arguments[4] = f"{output}-"
    (tmp_path / "model--data").mkdir()
    line = fail(*arguments)
    assert f"{output}--data, where {log} would be prepared, is there already: train on it, --data" in line
    line = fail("train", "--data", tmp_path / "missing.csv", "--output_dir", tmp_path / "new", *train_flags())
    assert "no such file" in line
    other = write_log(tmp_path / "model-data" / "other.csv", [("a", "x", 1)], ("uid", "item_id", "timestamp"))
    line = fail("train", "--data", other, "--output_dir", tmp_path / "new", *train_flags())
    assert "with --user_column (options are those of bert4rec prepare, to be run first)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model--data", "model-data"]


def test_train_writes_a_whole_model_folder_and_prints_the_next_command(trained, data):
    model, lines = trained
    assert {path.name for path in model.iterdir()} >= MODEL_FILES
    assert lines[-1] == f"wrote {model}; next: bert4rec evaluate {model} --data {data}"


def test_the_recipe_in_the_folder_says_what_was_used(model):
    recipe = yaml.safe_load((model / "recipe.yaml").read_text("utf-8"))
    machine = {"use_cpu"}
    assert {name: recipe[name] for name in OPTIONS.keys() - machine} == {
        name: value for name, value in OPTIONS.items() if name not in machine
    }
    assert not machine & recipe.keys()
    # Defaults and what follows from the data stand there as well; this run's place does not.
    assert recipe["train_windows"] == "proportional"
    assert recipe["max_position_embeddings"] == 50
    assert "output_dir" not in recipe


def test_every_checkpoint_is_a_whole_model_folder_too(model):
    checkpoints = list(model.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.iterdir()} >= MODEL_FILES
        assert len(succeed("recommend", checkpoint, 101, "--top_k", 3, "--device", "cpu")) == 3


def test_evaluate_prints_metrics_beside_floors_and_stores_them_in_the_model_folder(model, data):
    lines = succeed("evaluate", model, "--data", data, "--use_cpu", "true")
    assert "leave-one-out, test" in lines[0]
    assert f"{NUM_USERS} users" in lines[0]
    assert "NDCG@10" in lines[1]
    assert lines[2].startswith("model")
    assert {"popularity", "recent popularity", "last-item co-occurrence"} <= {
        re.split(r"\s{2,}", line)[0] for line in lines[3:]
    }
    assert lines[-1] == (
        f"wrote {model / 'evaluation.json'} and the model card; next: bert4rec recommend {model} ITEM_ID ITEM_ID …"
    )
    records = {
        record["protocol"]["part"]: record for record in json.loads((model / "evaluation.json").read_text("utf-8"))
    }
    assert set(records) == {"validation", "test"}
    ndcg = f"{records['test']['metrics']['NDCG@10']:.4f}"
    assert ndcg in lines[2]
    assert ndcg in (model / "README.md").read_text("utf-8")


def test_the_papers_protocol_says_that_it_is_sampled_and_stands_beside_the_full_one(model, data):
    succeed("evaluate", model, "--data", data, "--use_cpu", "true")
    lines = succeed("evaluate", model, "--data", data, "--use_cpu", "true", "--protocol", "paper")
    assert "the target and 19 to 26 items drawn by popularity ranked" in lines[0]  # all that a user never had
    names = [f"sampled_{name}" for name in ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")]
    assert lines[1].split() == names
    tested = [record for record in json.loads((model / "evaluation.json").read_text("utf-8")) if
              record["protocol"]["part"] == "test"]  # fmt: skip
    full, sampled = sorted(tested, key=lambda record: "sampled_MRR" in record["metrics"])
    assert list(sampled["metrics"]) == names
    assert not [name for name in full["metrics"] if name.startswith("sampled")]
    # Among fewer items nobody's rank is worse.
    assert sampled["metrics"]["sampled_HR@10"] >= full["metrics"]["HR@10"]
    assert "sampled_NDCG@10" in (model / "README.md").read_text("utf-8")


def test_evaluating_twice_stores_one_record(model, data):
    for _ in range(2):
        succeed("evaluate", model, "--data", data, "--use_cpu", "true", "--part", "validation")
    parts = [record["protocol"]["part"] for record in json.loads((model / "evaluation.json").read_text("utf-8"))]
    assert parts.count("validation") == 1


def test_recommend_prints_what_the_pipeline_answers(model):
    lines = succeed("recommend", model, 101, "102", "--top_k", 4, "--exclude", 103, 104, "--device", "cpu")
    answer = pipeline("sequential-recommendation", model=model, device="cpu")(
        ["101", "102"], top_k=4, exclude=["103", "104"]
    )
    assert [line.split() for line in lines] == [
        [str(rank), entry["item_id"], f"{entry['score']:.3f}"] for rank, entry in enumerate(answer, start=1)
    ]


def test_recommend_takes_candidates_and_a_policy(model):
    lines = succeed("recommend", model, 101, "--candidates", 101, 105, "--filter_seen_items", "true")
    assert [line.split()[1] for line in lines] == ["105"]
    lines = succeed("recommend", model, 101, "--candidates", 101, 105, "--filter_seen_items", "false")
    assert sorted(line.split()[1] for line in lines) == ["101", "105"]


def test_excluded_items_may_be_named_one_by_one(model):
    best = [line.split()[1] for line in succeed("recommend", model, 103, "--top_k", 2)]
    lines = succeed("recommend", model, 103, "--top_k", 50, *(f"--exclude={item}" for item in best))
    assert lines
    assert not {line.split()[1] for line in lines} & set(best)
    assert succeed("recommend", model, 103, "--candidates", best[0], "--exclude", best[0]) == [
        "nothing is left to recommend: candidates, exclusions and seen items leave none"
    ]


def test_recommend_without_items_answers_with_the_models_prior(model):
    assert len(succeed("recommend", model)) == 10


def test_recommend_writes_a_file_for_the_prepared_histories(model, data, tmp_path):
    output = tmp_path / "out.parquet"
    lines = succeed("recommend", model, "--histories", data / "histories.parquet", "--output", output, "--top_k", 2)
    assert lines == [f"wrote {output}: user_id, item_id, rank and score for {NUM_USERS} histories"]
    table = pq.read_table(output)
    users = pq.read_table(data / "histories.parquet")["user_id"].to_pylist()
    assert table["user_id"].to_pylist() == [user for user in users for _ in range(2)]
    assert table["rank"].to_pylist() == [1, 2] * NUM_USERS


def test_titles_go_from_prepare_to_recommend(log, tmp_path):
    titles = write_log(
        tmp_path / "titles.csv",
        [(item, f"Title of {item}") for item in range(101, 101 + NUM_ITEMS)],
        header=("item_id", "title"),
    )
    succeed("prepare", log, "--output", tmp_path / "data", "--item_titles", titles)
    succeed("train", "--data", tmp_path / "data", "--output_dir", tmp_path / "model", *train_flags())
    had, first = succeed("recommend", tmp_path / "model", 101, "--top_k", 1)
    assert had.split(maxsplit=2) == ["had", "101", "Title of 101"]
    assert first.endswith(f"Title of {first.split()[1]}")


def test_the_recipe_of_a_model_trains_an_equal_one(model, data, tmp_path):
    config = model / "recipe.yaml"
    succeed("train", "--config", config, "--data", data, "--output_dir", tmp_path / "again")
    old, new = weights(model), weights(tmp_path / "again")
    assert old.keys() == new.keys()
    assert all(old[name].equal(new[name]) for name in old)
    again = tmp_path / "again" / "recipe.yaml"
    assert yaml.safe_load(again.read_text("utf-8")) == yaml.safe_load(config.read_text("utf-8"))


def test_the_command_line_overrides_the_recipe(model, data, tmp_path):
    config = model / "recipe.yaml"
    output = tmp_path / "model"
    # Before or behind --config makes no difference.
    succeed("train", "--mask_ratio", 0.5, "--config", config, "--data", data, "--output_dir", output, "--seed", 6)
    recipe = yaml.safe_load((output / "recipe.yaml").read_text("utf-8"))
    assert recipe == yaml.safe_load(config.read_text("utf-8")) | {"mask_ratio": 0.5, "seed": 6}
    assert not all(value.equal(weights(output)[name]) for name, value in weights(model).items())


def test_a_recipe_may_write_numbers_as_1e_3_and_name_the_folders(data, tmp_path):
    recipe = OPTIONS | {"data": str(data), "output_dir": str(tmp_path / "model"), "use_cpu": True}
    text = yaml.safe_dump({name: value for name, value in recipe.items() if name != "learning_rate"})
    (tmp_path / "recipe.yaml").write_text(text + "learning_rate: 1e-3\nmax_steps: 1\n")
    assert yaml.safe_load("1e-3") == "1e-3"  # why this needs a test
    succeed("train", "--config", tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "model" / "recipe.yaml").read_text("utf-8"))["learning_rate"] == 0.001


def test_recipes_serve_the_other_commands_as_well(model, tmp_path):
    # A list at the end must not swallow the model that follows.
    (tmp_path / "recipe.yaml").write_text("top_k: 1\ncandidates: [101, 105, 107]\n")
    assert len(succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml")) == 1
    lines = succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml", "--top_k", 5)
    assert sorted(line.split()[1] for line in lines) == ["101", "105", "107"]
    lines = succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml", "--top_k", 5, "--candidates", 106)
    assert [line.split()[1] for line in lines] == ["106"]


def test_options_may_stand_anywhere_between_the_item_ids(model):
    expected = succeed("recommend", model, 101, 102, 103, "--top_k", 3)
    for arguments in (
        ["--top_k", 3, model, 101, 102, 103],
        [model, "--top_k", 3, 101, 102, 103],
        [model, "--top_k", 3, "--", 101, 102, 103],
        [model, 101, 102, 103, "--top_k", 3],
    ):
        assert succeed("recommend", *arguments) == expected


def test_a_warm_start_keeps_old_token_ids_and_weights_and_appends_new_items(model, data, tmp_path):
    # "0new" would come first, were the catalogue sorted anew; 101 has left the log.
    items = [*range(102, 101 + NUM_ITEMS), "999", "0new"]
    log = write_log(tmp_path / "log.csv", random_rows(range(NUM_USERS), items, seed=1))
    succeed("prepare", log, "--output", tmp_path / "data")
    changes = {"hidden_size": None, "num_attention_heads": None, "seed": 6, "learning_rate": 0}
    succeed(
        "train", "--model_name_or_path", model, "--data", tmp_path / "data", "--output_dir", tmp_path / "model",
        *train_flags(**changes),
    )  # fmt: skip
    old, new = (Bert4RecTokenizer.from_pretrained(path) for path in (model, tmp_path / "model"))
    assert new.items == [*old.items, "0new", "999"]
    catalogue = Bert4RecTokenizer.from_pretrained(tmp_path / "data")
    counts = dict(zip(catalogue.items, catalogue.counts, strict=True))
    assert new.counts == [counts.get(item, 0) for item in new.items]
    assert new.counts[old.items.index("101")] == 0
    # With a learning rate of 0, whatever differs was not taken over.
    before, after = weights(model), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.startswith("decoder.next_"):
            continue  # those of the new log
        if name.endswith("item_embeddings.weight") or name == "decoder.bias":
            assert len(after[name]) == len(value) + 2
            assert after[name].isfinite().all()
        assert after[name][: len(value)].equal(value)
    lines = succeed("recommend", tmp_path / "model", "0new", "--candidates", "101", "999", "0new")
    assert sorted(line.split()[1] for line in lines) == ["0new", "101", "999"]


ODD_IDS = [
    "a b", " led by a space", 'quo"te', "it's", "ünï ☃", "line\nbreak", "comma,and;tab\t", "007", "7", "1.0", "[MASK]",
    "[PAD]", "[UNK]", "\\[MASK]", "NULL", "nan", "true", "-x", str(2**63 - 1), str(2**53 + 1), str(10**30),
]  # fmt: skip


def pass_through(log, folder):
    """Items and users of a log after prepare, train and recommend."""
    data, model, output = folder / "data", folder / "model", folder / "out.parquet"
    succeed("prepare", log, "--output", data)
    succeed("train", "--data", data, "--output_dir", model, *train_flags())
    succeed(
        "recommend", model, "--histories", data / "histories.parquet", "--output", output, "--top_k", 1000,
        "--filter_seen_items", "false",
    )  # fmt: skip
    table = pq.read_table(output)
    return set(table["item_id"].to_pylist()), set(table["user_id"].to_pylist()), model


def test_odd_ids_of_a_csv_file_come_back_exactly(tmp_path):
    rows = random_rows(ODD_IDS, ODD_IDS)
    # Every item at least once.
    rows += [("everything", item, 10**6 + number) for number, item in enumerate(ODD_IDS)]
    items, users, model = pass_through(write_log(tmp_path / "log.csv", rows), tmp_path)
    assert items == set(ODD_IDS)
    assert users == {*ODD_IDS, "everything"}
    for item in ("[MASK]", "007", "-x", "a b", "\\[MASK]"):
        status, out, err = run("recommend", model, f"--candidates={item}", "--filter_seen_items=false", "--", "7", item)
        assert status == 0, err
        assert "lacks" not in err
        assert re.fullmatch(rf" +1 +{re.escape(item)} +-?\d+\.\d+\n", out)


def test_64_bit_integers_of_a_parquet_file_come_back_exactly(tmp_path):
    # Neighbours that a float64 cannot tell apart, and both ends of the range.
    numbers = [2**63 - 1, 2**63 - 2, -(2**63), 2**53, 2**53 + 1, 0, -1]
    users, items, times = zip(*random_rows(numbers, numbers), strict=True)
    table = pa.table({"user_id": pa.array(users, pa.int64()), "item_id": pa.array(items, pa.int64())})
    pq.write_table(table.append_column("timestamp", pa.array(times, pa.int64())), tmp_path / "log.parquet")
    found_items, found_users, _ = pass_through(tmp_path / "log.parquet", tmp_path)
    assert found_items == set(map(str, items)) == set(map(str, numbers))
    assert found_users == set(map(str, numbers))


HEADER = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("user,item_id,timestamp\n1,2,3\n", [], r"no column 'user_id'.*user, item_id, timestamp.*--user_column"),
        (HEADER + "1,2,3\n2,3,4\n", ["--min_rating", 3], r"no column 'rating'.*--rating_column"),
        (HEADER + "1,2,soon\n2,3,later\n", [], r"'timestamp'.*must hold numbers or timestamps; it is string"),
        (HEADER + "1,2,24/04/22\n2,3,25/04/22\n", [], r"'timestamp'.*it is string.*ISO timestamps such as 2024-01-31"),
        (HEADER + "1,2,15/03/22 08:00\n2,3,16/03/22 09:00\n", [], r"'timestamp'.*it is string: convert it"),
        (HEADER + "1,2,01/02/2024\n2,3,02/02/2024\n", [], r"'timestamp'.*it is string: convert it"),
        ("user_id,item_id,item_id,timestamp\n1,2,2,3\n", [], r"has the column 'item_id' twice; rename one of them"),
        (HEADER + "1,2,3\n,3,4\n2,3,5\n", [], r"'user_id' is null or empty in 1 of 3 rows"),
        (HEADER + "1,2,3\n2,,4\n2,3,5\n", [], r"'item_id' is null or empty in 1 of 3 rows"),
        (HEADER + "1,2,3\n2,3,\n2,3,5\n", [], r"'timestamp' is null or empty in 1 of 3 rows"),
        (HEADER + "1,2,3\n1,3,4\n1,4,5\n", [], r"one user only.*--user_column"),
        (HEADER + "1,2,3\n2,3,4\n", ["--min_user_events", 5], r"no user is left of 2.*loosen --min_user_events"),
        (HEADER + "1,2,3\n2,3,4\n", [], r"none of the 2 users has a target.*needs 3 events"),
        ("", [], r"is empty; expected a CSV file with a header"),
        (HEADER, [], r"columns but no events"),
        (HEADER + "1,2,3\n2,3,4,5\n", [], r"CSV Error on Line: 3 Original Line: 2,3,4,5 Expected Number of Columns: 3"),
        ("\0\1\2", [], r"neither UTF-8 CSV nor Parquet"),
        (HEADER + "1,2,3\n2,3,4\n", ["--split", "random"], r"--split.*'random'.*leave-one-out.*temporal"),
        (HEADER + "1,2,3\n2,3,4\n", ["--validation_cut", 0.7], r"validation_cut is for --split temporal; got 0.7"),
        (HEADER + "1,2,3\n2,3,4\n", ["--user_column", "item_id"], r"--user_column and --item_column must be different"),
        (HEADER + "1,2,3\n2,3,4\n", ["--min_user_events", -3], r"min_user_events must be at least 1.*got -3"),
        (HEADER + "1,2,3\n2,3,4\n", ["--rating_column", "foo"], r"--rating_column is for --min_rating; got foo alone"),
        (HEADER + "1,2,3\n2,3,4\n", ["--max_length", 1], r"max_length must be at least 2.*got 1"),
    ],
)
def test_a_bad_log_is_one_line_that_helps_and_nothing_is_written(tmp_path, text, options, message):
    (tmp_path / "log.csv").write_text(text)
    assert re.search(message, fail("prepare", tmp_path / "log.csv", "--output", tmp_path / "data", *options))
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_log_that_does_not_exist_is_named(tmp_path):
    line = fail("prepare", "nowhere.csv", "--output", tmp_path / "data")
    assert "no such file: nowhere.csv" in line
    assert "ml-100k" not in line
    line = fail("prepare", "ml-1m", "--output", tmp_path / "data")
    assert re.search(r"no such file: ml-1m;.* the name of a data set that prepare fetches: ml-100k$", line)
    line = fail("train", "--data", "nowhere", "--output_dir", tmp_path / "model")
    assert re.search(r"no such file: nowhere;.*, or a prepared folder$", line)
    assert not list(tmp_path.iterdir())


def test_a_model_folder_is_not_prepared_over(model, log):
    before = contents(model)
    for folder in (model, next(model.glob("checkpoint-*"))):
        assert fail("prepare", log, "--output", folder).endswith(f"{folder} is a model folder; choose another --output")
    assert contents(model) == before


@pytest.mark.parametrize(
    ("length", "line"),
    [
        (60, "history length 100 (the shortest of 50, 100, 200 that holds three quarters)"),
        (250, "history length 200 (the longest of 50, 100, 200; more than a quarter are longer)"),
    ],
)
def test_prepare_says_why_it_chose_a_length(tmp_path, length, line):
    log = write_log(tmp_path / "log.csv", [(user, time % 7, time) for user in "ab" for time in range(length)])
    assert line in succeed("prepare", log, "--output", tmp_path / "data")


def test_a_pattern_that_the_shell_has_expanded_is_to_be_quoted(tmp_path):
    line = fail("prepare", "events-0.parquet", "events-1.parquet", "--output", tmp_path / "data")
    assert line == (
        "bert4rec prepare: expected one log, got events-1.parquet as well: quote a pattern of files, "
        "as in 'events-*.parquet'"
    )
    line = fail("evaluate", "model", "another", "--data", "data")
    assert line == "bert4rec evaluate: another is an argument too much; see bert4rec evaluate --help"


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    def lacks(_):
        """A command."""
        raise PackageNotFoundError("onnx")

    monkeypatch.setitem(COMMANDS, "export", lacks)
    assert fail("export") == "bert4rec export: No package metadata was found for onnx"


def test_an_output_folder_with_something_else_in_it_stays_untouched(log, data, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    line = fail("prepare", log, "--output", tmp_path)
    assert re.search(r"holds something else \(thesis\.tex\); choose another --output", line)
    line = fail("train", "--data", data, "--output_dir", tmp_path, *train_flags())
    assert re.search(r"is not empty \(thesis\.tex\); choose another --output_dir", line)
    assert contents(tmp_path) == {tmp_path / "thesis.tex": b"ten years of work"}


def test_a_finished_model_is_not_trained_over(model, data):
    before = contents(model)
    line = fail("train", "--data", data, "--output_dir", model, *train_flags())
    assert re.search(r"is not empty.*choose another --output_dir.*--resume_from_checkpoint last", line)
    assert contents(model) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0}, r"mask_ratio must lie between 0 and 1, both excluded; got 0"),
        ({"mask_ratio": 1}, r"mask_ratio must lie between 0 and 1, both excluded; got 1"),
        ({"mask_ratio": -1}, r"mask_ratio must lie between 0 and 1, both excluded; got -1"),
        ({"mask_ratio": "much"}, r"--mask_ratio.*invalid float value: 'much'"),
        ({"num_attention_heads": 3}, r"hidden_size must be a multiple of num_attention_heads; got 16 and 3"),
        ({"num_attention_heads": 16}, r"rotary positions need heads of an even width"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1; got 0"),
        ({"hidden_size": 0}, r"hidden_size must be at least 1; got 0"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be at least 1; got 0"),
        ({"hidden_act": "step"}, r"hidden_act.*'step'"),
        ({"metric_for_best_model": "NDCG"}, r"metric_for_best_model.*NDCG@10.*'NDCG'"),
        ({"hidden_size": "16.5"}, r"--hidden_size.*invalid int value"),
        ({"max_position_embeddings": 1}, r"max_length must be at least 2.*got 1"),
        ({"normalization": "batch"}, r"--normalization.*'batch'.*'pre', 'post'\)"),
        ({"train_windows": "all"}, r"--train_windows.*'all'.*'newest', 'random', 'proportional'"),
        ({"resume_from_checkpoint": "last"}, r"[Nn]o .*checkpoint"),
    ],
)
def test_a_bad_training_option_is_one_line_that_names_it(data, tmp_path, changes, message):
    line = fail("train", "--data", data, "--output_dir", tmp_path / "model", *train_flags(**changes))
    assert re.search(message, line)
    assert contents(tmp_path) == {}


def test_a_model_to_go_on_from_keeps_its_architecture(model, data, tmp_path):
    arguments = ["--data", data, "--output_dir", tmp_path / "new", "--model_name_or_path", model]
    line = fail("train", *arguments, *train_flags(hidden_size=32))
    assert re.search(r"keeps its architecture; .* has not hidden_size=32: leave that out$", line)
    # Its own recipe names the architecture it has.
    succeed("train", *arguments, "--config", model / "recipe.yaml", "--num_train_epochs", 1)


def test_a_folder_that_is_no_model_is_named_by_every_command(data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    changes = {"hidden_size": None, "num_attention_heads": None}
    train = ["train", "--data", data, "--output_dir", tmp_path / "new"]
    # A prepared folder has a tokenizer, and is no model either.
    for folder, found in ((tmp_path / "empty", "no config.json"), (tmp_path / "bert", "'bert'"), (data, "no config")):
        for arguments in (
            ["evaluate", folder, "--data", data],
            ["recommend", folder, 101],
            [*train, "--model_name_or_path", folder, *train_flags(**changes)],
        ):
            line = fail(*arguments)
            assert f"{folder} is not a BERT4Rec model folder" in line
            assert found in line
            assert "bert4rec train" in line
    assert not (tmp_path / "new").exists()


def test_a_data_folder_that_is_not_prepared_is_named_with_the_command_that_makes_one(model, tmp_path):
    (tmp_path / "raw").mkdir()
    changes = {"hidden_size": None, "num_attention_heads": None}
    train = ["train", "--data", tmp_path / "raw", "--output_dir", tmp_path / "new"]
    for arguments in (
        [*train, *train_flags()],
        [*train, *train_flags(**changes), "--model_name_or_path", model],
        ["evaluate", model, "--data", tmp_path / "raw"],
    ):
        line = fail(*arguments)
        assert re.search(r"raw is not a prepared folder \(it lacks histories\.parquet and preparation\.json\)", line)
        assert "bert4rec prepare LOG --output" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["101", "--top_k", 0], r"top_k must be a whole number of at least 1; got 0"),
        (["101", "--candidates", 9998, 9999], r"the catalogue has none of the 2 candidates, the first is '9998'"),
        (["--histories", "in.parquet"], r"--histories and --output belong together"),
        (["--output", "out.parquet"], r"--histories and --output belong together"),
        (["101", "--histories", "in.parquet", "--output", "out.parquet"], r"item ids or --histories, not both"),
        (["--histories", "nowhere.parquet", "--output", "out.parquet"], r"nowhere\.parquet"),
        (["101", "--device", "abacus"], r"cannot use the device 'abacus'"),
        (["101", "--topk", 3], r"unknown option --topk; did you mean --top_k\?"),
        (["101", "--batch_size", 0], r"--batch_size must be at least 1; got 0"),
        (["zzz", "yyy"], r"has none of the items of the history \('zzz', 'yyy'\); expected ids such as '101', '102'"),
    ],
)
def test_a_bad_request_for_recommendations_is_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fail("recommend", model, *arguments))
    assert contents(tmp_path) == {}


def test_histories_are_not_replaced_by_their_recommendations(model, data):
    histories = data / "histories.parquet"
    before = contents(data)
    line = fail("recommend", model, "--histories", histories, "--output", histories)
    assert line.endswith(f"{histories} holds the histories themselves; choose another --output")
    line = fail("recommend", model, "--histories", histories, "--output", data / "items.json")
    assert "items.json exists and is no Parquet file of user_id, item_id, rank, score" in line
    line = fail("recommend", model, "--histories", histories, "--output", data / "new.csv")
    assert "are a Parquet file; got the name" in line
    assert contents(data) == before


def test_a_file_of_histories_that_is_no_parquet_leaves_nothing_behind(model, log, tmp_path):
    line = fail("recommend", model, "--histories", log, "--output", tmp_path / "out.parquet")
    assert re.search(r"log\.csv is not a Parquet file", line)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_rato: 0.3\n", r"unknown key 'mask_rato' in .*recipe\.yaml; did you mean mask_ratio\?"),
        ("hidden-size: 3\n", r"did you mean hidden.size\?|hidden_size must be a multiple"),
        ("- mask_ratio\n", r"must be a mapping of options to values; got \['mask_ratio'\]"),
        ("mask_ratio: [\n", r"cannot read the recipe .*recipe\.yaml"),
        ("mask_ratio: much\n", r"--mask_ratio.*invalid float value: 'much'"),
        ("config: other.yaml\n", r"config in .*recipe\.yaml is for the command line alone"),
    ],
)
def test_a_bad_recipe_is_one_line_that_names_the_nearest_known_key(data, tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    output = tmp_path / "model"
    line = fail("train", "--config", tmp_path / "recipe.yaml", "--data", data, "--output_dir", output, *flags(seed=1))
    assert re.search(message, line)
    assert not output.exists()


def test_a_recipe_that_is_missing_or_no_text_is_named(tmp_path):
    assert "cannot read the recipe nowhere.yaml" in fail("train", "--config", "nowhere.yaml")
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\xfd")
    assert "cannot read the recipe" in fail("train", "--config", tmp_path / "recipe.yaml")
    assert "--config: expected one argument" in fail("train", "--config")


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "recommend"])
def test_unknown_options_name_the_nearest_known_one_and_missing_ones_are_named(command):
    option = {"prepare": "split", "train": "mask_ratio", "evaluate": "part", "recommend": "exclude"}[command]
    required = {
        "prepare": ["log", "--output", "x"],
        "train": ["--data", "x", "--output_dir", "y"],
        "evaluate": ["model", "--data", "x"],
        "recommend": ["model"],
    }[command]
    line = fail(command, *required, f"--{option}x=1")
    assert f"unknown option --{option}x; did you mean --{option}?" in line
    assert "are required" in fail(command)


def test_an_unknown_command_names_the_nearest_and_all_known_ones():
    status, out, err = run("recomend", "model")
    assert (status, out) == (2, "")
    assert err == (
        "bert4rec: unknown command 'recomend'; did you mean recommend? "
        "Expected one of prepare, train, evaluate, recommend, export, convert, convert-config\n"
    )
    assert run("xyz")[2] == f"bert4rec: unknown command 'xyz'. Expected one of {', '.join(COMMANDS)}\n"


def test_help_lists_the_commands_and_the_options_of_each():
    for arguments in ([], ["--help"], ["-h"]):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert all(f"  {command} " in out for command in ("prepare", "train", "evaluate", "recommend"))
    for command, option in (
        ("prepare", "--min_item_events"),
        ("train", "--mask_ratio"),
        ("train", "--hidden_size"),
        ("evaluate", "--part"),
        ("recommend", "--candidates"),
    ):
        status, out, err = run(command, "--help")
        assert (status, err) == (0, "")
        assert option in out
        assert f"bert4rec {command}" in out


def test_help_of_train_says_what_a_field_is_if_it_is_left_out():
    text = " ".join(run("train", "--help")[1].split())
    chosen = "chosen from the log if left out."
    fields = ("hidden_size", "hidden_dropout_prob", "num_attention_heads", "num_transitions", "repeat_weight")
    for name in (*fields, "gated_feed_forward", "hidden_act", "intermediate_size"):
        assert re.search(rf"--{name} \w+ Architecture\. .{{1,400}}?; {chosen} --", text), name
    assert text.count(chosen) == 8
    assert re.search(r"--num_hidden_layers \w+ Architecture\. Number of Transformer layers; default 2\. --", text)
    assert "--no_load_best_model_at_end The same as --load_best_model_at_end false." in text
    assert "--position_embedding_type {rotary,learned_from_start,learned_from_end} " in text
    assert 'A checkpoint\'s folder, or "last".' in text


def test_help_of_train_has_our_own_options_before_those_of_transformers():
    text = run("train", "--help")[1]
    ours, theirs = text.split("other training arguments, those of Transformers:")
    for option in ("data", "output_dir", "config", "mask_ratio", "num_train_epochs", "hidden_size"):
        assert f"  --{option} " in ours
        assert f"  --{option} " not in theirs
    for option in ("optim", "seed", "resume_from_checkpoint", "hub_model_id"):
        assert f"  --{option} " in theirs
        assert f"  --{option} " not in ours
    assert "(default: None)" not in text


def run_module(*arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, "-m", "bert4rec_hf", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_a_terminal_cannot_show_is_written_otherwise(tmp_path):
    done = run_module("xyz\N{SNOWMAN}", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr[:38]) == (2, r"bert4rec: unknown command 'xyz\u2603'.")


def test_the_module_is_the_command(model, tmp_path):
    done = run_module("recommend", model, 101, "--top_k", 2, "--device", "cpu", folder=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines() == succeed("recommend", model, 101, "--top_k", 2, "--device", "cpu")


def test_the_module_ends_with_status_2_and_one_line_on_standard_error(data, tmp_path):
    done = run_module("evaluate", tmp_path, "--data", data, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"bert4rec evaluate: {tmp_path} is not a BERT4Rec model folder")


def test_a_recipe_names_items_as_they_are_written(model, tmp_path, caplog):
    # To YAML 010 is 8, and 101 a number.
    (tmp_path / "recipe.yaml").write_text("top_k: 2\nexclude: [010, 101]\n")
    lines = succeed("recommend", model, 103, "--config", tmp_path / "recipe.yaml")
    assert "the catalogue has none of the excluded items '010'" in caplog.text
    assert "101" not in [line.split()[1] for line in lines]


def test_hints_are_commands_that_can_be_pasted(log, tmp_path):
    assert f"--data '{tmp_path / 'my data'}'" in succeed("prepare", log, "--output", tmp_path / "my data")[-1]


def test_an_evaluation_that_cannot_be_kept_is_printed_all_the_same(model, data, tmp_path, monkeypatch, caplog):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "evaluation.json").write_text("[{")
    assert "evaluation.json is damaged" in fail("evaluate", copy, "--data", data, "--use_cpu", "true")
    (copy / "evaluation.json").unlink()

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("bert4rec_hf.model_card.write_file", full)
    out = "\n".join(succeed("evaluate", copy, "--data", data, "--use_cpu", "true"))
    assert "NDCG@10" in out
    assert "wrote" not in out
    assert f"the numbers are not kept in {copy}: No space left on device" in caplog.text
