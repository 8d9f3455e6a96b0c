"""The commands, from a log to recommendations."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import NUM_ITEMS, NUM_USERS, fail, random_rows, run, succeed, train_flags, weights, write_log
from safetensors.torch import load_file
from transformers import pipeline

from bert4rec_hf import Bert4RecTokenizer, read_prepared

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
    assert not list(output.glob("*.parquet"))  # histories would be pushed with the model folder
    assert read_prepared(f"{output}-data")[0].item_ids.tolist() == read_prepared(data)[0].item_ids.tolist()
    weights = [load_file(path / "model.safetensors") for path in (output, model)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    assert "model is not empty" in fail(*arguments)
    arguments[4] = f"{output}-"
    (tmp_path / "model--data").mkdir()
    line = fail(*arguments)
    assert f"{output}--data, where {log} would be prepared, exists: train on it with --data" in line
    line = fail("train", "--data", tmp_path / "missing.csv", "--output_dir", tmp_path / "new", *train_flags())
    assert "no such file" in line
    other = write_log(tmp_path / "model-data" / "other.csv", [("a", "x", 1)], ("uid", "item_id", "timestamp"))
    line = fail("train", "--data", other, "--output_dir", tmp_path / "new", *train_flags())
    assert "with --user_column (for options of bert4rec prepare, run that first)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model--data", "model-data"]


def test_train_writes_a_whole_model_folder_and_prints_the_next_command(trained, data):
    model, lines = trained
    assert {path.name for path in model.iterdir()} >= MODEL_FILES
    assert lines[-1] == f"wrote {model}; next: bert4rec evaluate {model} --data {data}"


def test_every_checkpoint_is_a_whole_model_folder_too(model):
    checkpoints = list(model.glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.iterdir()} >= MODEL_FILES
        assert len(succeed("recommend", checkpoint, 101, "--top_k", 3, "--device", "cpu")) == 3


def test_progress_bars_are_drawn_on_a_terminal_alone(folder, data, model):
    commands = [
        ("train", "--data", data, "--output_dir", folder / "logged", *train_flags()),
        ("evaluate", model, "--data", data),
        ("evaluate", model, "--data", data, "--disable_tqdm", "true"),
        ("recommend", model, "--histories", data / "histories.parquet", "--output", folder / "bars.parquet"),
    ]
    for command in commands:
        status, out, err = run(*command)
        assert status == 0
        assert not re.search(r"\d+%\||it/s|\r", out + err), err
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "bert4rec_hf", "evaluate", str(model), "--data", str(data)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    drawn = b""
    with contextlib.suppress(OSError):  # raised when the child closes its side
        while part := os.read(terminal, 2**16):
            drawn += part
    assert os.waitpid(child, 0)[1] == 0
    assert b"%|" in drawn


def test_evaluate_prints_metrics_beside_baselines_and_stores_them_in_the_model_folder(model, data):
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
    assert "the target and 19 to 26 items drawn by popularity ranked" in lines[0]  # all items that the user has not had
    names = [f"sampled_{name}" for name in ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")]
    assert lines[1].split() == names
    tested = [record for record in json.loads((model / "evaluation.json").read_text("utf-8")) if
              record["protocol"]["part"] == "test"]  # fmt: skip
    full, sampled = sorted(tested, key=lambda record: "sampled_MRR" in record["metrics"])
    assert list(sampled["metrics"]) == names
    assert not [name for name in full["metrics"] if name.startswith("sampled")]
    # Fewer candidates cannot make a rank worse.
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


def test_recommend_prints_below_each_item_what_carries_it(model):
    pipe = pipeline("sequential-recommendation", model=model, device="cpu")
    expected = []
    for rank, entry in enumerate(pipe(["101", "102", "103"], top_k=4, explain=True), start=1):
        expected.append([str(rank), entry["item_id"], f"{entry['score']:.3f}"])
        if entry["because"]:
            expected.append(f"because you had {', '.join(item['item_id'] for item in entry['because'])}".split())
    assert len(expected) > 4
    for explain in (["--explain"], ["--explain", "true"]):
        lines = succeed("recommend", model, 101, 102, 103, "--top_k", 4, *explain, "--device", "cpu")
        assert [line.split() for line in lines] == expected


def test_similar_prints_what_the_pipeline_finds_for_each_item(model):
    pipe = pipeline("sequential-recommendation", model=model, device="cpu")
    expected = []
    for item in ("102", "101"):
        expected.append(["like", item])
        for rank, entry in enumerate(pipe.similar(item, top_k=3), start=1):
            expected.append([str(rank), entry["item_id"], f"{entry['score']:.3f}"])
    for arguments in ([model, 102, 101, "--top_k", 3], ["--top_k", 3, model, 102, 101], [model, "--top_k=3", 102, 101]):
        assert [line.split() for line in succeed("similar", *arguments)] == expected


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
        "no item is left to recommend: every item is excluded, seen or not a candidate"
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


def test_recommend_writes_a_folder_for_a_prepared_folder_and_an_earlier_one_is_replaced(model, data, tmp_path):
    expected = tmp_path / "out.parquet"
    succeed("recommend", model, "--histories", data / "histories.parquet", "--output", expected, "--top_k", 2)
    for _ in range(2):
        lines = succeed("recommend", model, "--histories", data, "--output", tmp_path / "out", "--top_k", 2)
        assert lines == [f"wrote {tmp_path / 'out'}: user_id, item_id, rank and score for {NUM_USERS} histories"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000-of-00001.parquet"]
        assert pq.read_table(tmp_path / "out").equals(pq.read_table(expected))


def test_exclusions_and_candidates_come_from_options_files_and_columns(model, tmp_path, caplog):
    best = [line.split()[1] for line in succeed("recommend", model, 103, "--top_k", 6)]
    (tmp_path / "exclude.txt").write_text(f"{best[1]}\nnew 1\nnew 2\n")
    (tmp_path / "exclude.csv").write_text(f"item_id\n{best[1]}\nnew 1\nnew 2\n")
    pq.write_table(pa.table({"item_id": [best[1], "new 1", "new 2"]}), tmp_path / "exclude.parquet")
    for name in ("exclude.txt", "exclude.csv", "exclude.parquet"):
        caplog.clear()
        arguments = ["--exclude", best[0], "--exclude_file", tmp_path / name, "--top_k", 4]
        assert [line.split()[1] for line in succeed("recommend", model, 103, *arguments)] == best[2:]
        assert [record.getMessage() for record in caplog.records] == [
            "the catalogue lacks 2 of the 4 excluded items: 'new 1', 'new 2'"
        ]
    caplog.clear()
    (tmp_path / "candidates.txt").write_text("\n".join([*best[:4], "new"]))
    arguments = [*arguments, "--candidates", best[4], "--candidates_file", tmp_path / "candidates.txt"]
    assert [line.split()[1] for line in succeed("recommend", model, 103, *arguments)] == best[2:5]
    columns = {"user_id": [1, 2, 3], "item_id": [["103"]] * 3, "exclude": [None, best[2:3], None]}
    columns |= {"candidates": [None, None, best[:3]]}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    succeed(
        "recommend", model, "--histories", tmp_path / "in.parquet", "--output", tmp_path / "out.parquet", *arguments
    )
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [[row["item_id"] for row in found if row["user_id"] == user] for user in (1, 2, 3)] == [
        best[2:5], best[3:5], best[2:3],
    ]  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        "left out 1 items that the catalogue lacks, such as 'new'",
        "the catalogue lacks 2 of the 4 excluded items: 'new 1', 'new 2'",
    ] * 2


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
    lines = succeed("recommend", tmp_path / "model", 101, 102, "--top_k", 3, "--explain")[2:]
    explained = [line for line in lines if line.strip().startswith("because")]
    assert explained
    assert all(re.fullmatch(r" +because you had Title of 10[12](, Title of 10[12])?", line) for line in explained)
    like, first = succeed("similar", tmp_path / "model", 101, "--top_k", 1)
    assert like.split(maxsplit=2) == ["like", "101", "Title of 101"]
    assert first.endswith(f"Title of {first.split()[1]}")


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
    # "0new" would come first if the catalogue were sorted again. The new log lacks 101.
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
    # The learning rate is 0, so a difference shows that a weight was not taken over.
    before, after = weights(model), weights(tmp_path / "model")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.startswith("history_scores."):
            continue  # counted in the new log
        if name.endswith("item_embeddings.weight") or name == "item_bias.weight":
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
    """Return the items and users of a log after prepare, train and recommend."""
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
    # One user has every item, so that each occurs at least once.
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
    # Adjacent numbers that are equal as float64, and both ends of the range.
    numbers = [2**63 - 1, 2**63 - 2, -(2**63), 2**53, 2**53 + 1, 0, -1]
    users, items, times = zip(*random_rows(numbers, numbers), strict=True)
    table = pa.table({"user_id": pa.array(users, pa.int64()), "item_id": pa.array(items, pa.int64())})
    pq.write_table(table.append_column("timestamp", pa.array(times, pa.int64())), tmp_path / "log.parquet")
    found_items, found_users, _ = pass_through(tmp_path / "log.parquet", tmp_path)
    assert found_items == set(map(str, items)) == set(map(str, numbers))
    assert found_users == set(map(str, numbers))


@pytest.mark.parametrize(
    ("length", "line"),
    [
        (60, "history length 100 (the shortest of 50, 100, 200 that three quarters of the histories fit into)"),
        (250, "history length 200 (the longest of 50, 100, 200; more than a quarter of the histories are longer)"),
    ],
)
def test_prepare_says_why_it_chose_a_length(tmp_path, length, line):
    log = write_log(tmp_path / "log.csv", [(user, time % 7, time) for user in "ab" for time in range(length)])
    assert line in succeed("prepare", log, "--output", tmp_path / "data")


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
    counted = ("num_transitions", "transition_weight", "next_item_weight", "repeat_weight")
    feed_forward = ("gated_feed_forward", "hidden_act", "intermediate_size")
    for name in (
        "hidden_size",
        "causal_attention",
        "filter_share",
        "hidden_dropout_prob",
        "num_attention_heads",
        *counted,
        *feed_forward,
    ):
        assert re.search(rf"--{name} \w+ Architecture\. .{{1,400}}?; {chosen} --", text), name
    assert text.count(chosen) == 12
    assert re.search(r"--num_hidden_layers \w+ Architecture\. Number of Transformer layers; default 2\. --", text)
    assert "--no_load_best_model_at_end The same as --load_best_model_at_end false." in text
    assert "--position_embedding_type {rotary,learned_from_start,learned_from_end} " in text
    assert 'The folder of a checkpoint, or "last".' in text


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
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | environment,
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


def test_hints_are_commands_that_can_be_pasted(log, tmp_path):
    assert f"--data '{tmp_path / 'my data'}'" in succeed("prepare", log, "--output", tmp_path / "my data")[-1]
