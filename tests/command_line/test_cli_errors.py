"""Errors of the command line: one line on standard error, exit status 2."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from command_runs import fail, flags, random_rows, run, succeed, train_flags, write_log

from bert4rec_hf.cli import COMMANDS
from bert4rec_hf.serving.bulk import recommend_file


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


HEADER = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("user,item_id,timestamp\n1,2,3\n", [], r"no column 'user_id'.*user, item_id, timestamp.*--user_column"),
        (HEADER + "1,2,3\n2,3,4\n", ["--min_rating", 3], r"no column 'rating'.*--rating_column"),
        (HEADER + "1,2,soon\n2,3,later\n", [], r"'timestamp' .* has 'soon' in row 1; expected numbers such as"),
        (
            HEADER + "1,2,24/04/22\n2,3,25/04/22\n",
            [],
            r"'timestamp' .* has '24/04/22' in row 1",
        ),
        (HEADER + "1,2,15/03/22 08:00\n2,3,16/03/22 09:00\n", [], r"'timestamp' .* has '15/03/22 08:00' in row 1"),
        (HEADER + "1,2,01/02/2024\n2,3,02/02/2024\n", [], r"'timestamp' .* has '01/02/2024' in row 1"),
        ("user_id,item_id,item_id,timestamp\n1,2,2,3\n", [], r"has the column 'item_id' twice; rename one of them"),
        (HEADER + "1,2,3\n,3,4\n2,3,5\n", [], r"'user_id' is null or empty in 1 of 3 rows"),
        (HEADER + "1,2,3\n2,,4\n2,3,5\n", [], r"'item_id' is null or empty in 1 of 3 rows"),
        (HEADER + "1,2,3\n2,3,\n2,3,5\n", [], r"'timestamp' is null or empty in 1 of 3 rows"),
        (HEADER + "1,2,3\n1,3,4\n1,4,5\n", [], r"one user only.*--user_column"),
        (HEADER + "1,2,3\n2,3,4\n", ["--min_user_events", 5], r"no user is left of 2.*loosen --min_user_events"),
        (HEADER + "1,2,3\n2,3,4\n", [], r"none of the 2 users has a target.*needs 3 events"),
        ("", [], r"is empty; expected CSV with a header"),
        (HEADER, [], r"columns but no events"),
        (HEADER + "1,2,3\n2,3,4,5\n", [], r"CSV Error on Line: 3 Original Line: 2,3,4,5 Expected Number of Columns: 3"),
        ("\0\1\2", [], r"neither UTF-8 CSV, nor JSON lines, nor Parquet"),
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


def test_a_pattern_that_the_shell_has_expanded_is_to_be_quoted(tmp_path):
    line = fail("prepare", "events-0.parquet", "events-1.parquet", "--output", tmp_path / "data")
    assert line == (
        "bert4rec prepare: expected one log; got events-1.parquet as well: quote a pattern of files, "
        "as in 'events-*.parquet'"
    )
    line = fail("calibrate", "model", "another", "--data", "data")
    assert line == "bert4rec calibrate: unexpected argument another; see bert4rec calibrate --help"


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
        ({"mask_ratio": 0}, r"mask_ratio must lie above 0 and at most 1; got 0"),
        ({"mask_ratio": 1, "causal_attention": "false"}, r"mask_ratio must lie between 0 and 1, both excluded; got 1"),
        ({"mask_ratio": -1}, r"mask_ratio must lie above 0 and at most 1; got -1"),
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
    assert re.search(r"keeps its architecture; .* does not have hidden_size=32: leave these options out$", line)
    # The recipe of the model names its architecture, so these options are no error.
    succeed("train", *arguments, "--config", model / "recipe.yaml", "--num_train_epochs", 1)


def test_a_folder_that_is_no_model_is_named_by_every_command(data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    changes = {"hidden_size": None, "num_attention_heads": None}
    train = ["train", "--data", data, "--output_dir", tmp_path / "new"]
    # A prepared folder has a tokenizer, but is not a model.
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
        (["101", "--batch_size", 8], r"--batch_size is for --histories; leave it out for one history"),
        (["101", "--batch-size=8"], r"--batch_size is for --histories; leave it out for one history"),
        (
            ["101", "--exclude_file", "none.txt"],
            r"there is no file none\.txt; expected item ids: text with one id per line",
        ),
        (["101", "--candidates_file", "."], r"there is no file \.; expected item ids"),
        (["101", "--excludefile", "x"], r"unknown option --excludefile; did you mean --exclude_file\?"),
        (
            ["--histories", ".", "--output", "out"],
            r"there is no file \.; expected histories: Parquet, JSON lines, or a folder",
        ),
        (["zzz", "yyy"], r"has none of the items of the history \('zzz', 'yyy'\); expected ids such as '101', '102'"),
    ],
)
def test_a_bad_request_for_recommendations_is_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fail("recommend", model, *arguments))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--histories", "IN", "--output", "out.parquet"],
            r"2 processes write a folder, .* choose a name without \.parquet",
        ),
        (["101", "102"], r"2 processes divide the files of --histories; got one history: start one process"),
        ([], r"2 processes divide the files of --histories; got one history: start one process"),
    ],
)
def test_what_several_processes_cannot_do_is_an_error(model, data, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    arguments = [data / "histories.parquet" if word == "IN" else word for word in arguments]
    assert re.search(message, fail("recommend", model, *arguments))
    line = fail("recommend", model, "--histories", data, "--output", "out")
    assert re.search("cannot join the 2 processes of this launch: .*; start them with one torchrun or accelerate", line)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"exclud": [["101"]] * 2}, r"in\.parquet: unknown key 'exclud' beside a history: did you mean exclude\?"),
        (
            {"exclude": [[], "101"]},
            r"in\.jsonl, column exclude, line 2: expected a list of item ids; got '101' of type str",
        ),
        ({"candidates": [[{"id": "1"}], []]}, r"in\.parquet, column candidates, row 0 .*got a list with {'id': '1'}"),
        ({"item_id": [["101"], None]}, r"in\.parquet, column item_id, row 1 .*got null"),
        ({"item_id": [["101"], ["102", None]]}, r"in\.parquet, column item_id, row 1 .*got a list with a null"),
        ({"candidates": [["9998"], ["9999"]]}, r"none of the candidates of the first 2 histories of .*such as '9998'"),
        ({"item_id": [["9998"], ["9999"]]}, r"none of the items of the first 2 histories of .*such as '9998'"),
    ],
)
def test_wrong_histories_are_one_line_that_names_file_column_and_row(model, tmp_path, column, message):
    columns = {"user_id": ["a", "b"], "item_id": [["101"], ["102"]]} | column
    if "jsonl" in message:
        source = tmp_path / "in.jsonl"
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        source.write_text("\n".join(map(json.dumps, rows)))
    else:
        source = tmp_path / "in.parquet"
        pq.write_table(pa.table(columns), source)
    for output in ("out", "out.parquet"):
        assert re.search(message, fail("recommend", model, "--histories", source, "--output", tmp_path / output))
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_candidates_of_an_empty_file_are_an_error_and_exclusions_of_one_are_none(model, tmp_path):
    (tmp_path / "none.txt").write_text("\n\n")
    line = fail("recommend", model, 101, "--candidates_file", tmp_path / "none.txt")
    assert line.endswith("none.txt has no item ids; expected at least one")
    assert run("recommend", model, 101, "--exclude_file", tmp_path / "none.txt") == run("recommend", model, 101)


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
    assert re.search(r"log\.csv is neither a Parquet file nor JSON lines", line)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_rato: 0.3\n", r"unknown key 'mask_rato' in .*recipe\.yaml; did you mean mask_ratio\?"),
        ("hidden-size: 3\n", r"did you mean hidden.size\?|hidden_size must be a multiple"),
        ("- mask_ratio\n", r"must be a mapping of names to values; got \['mask_ratio'\]"),
        ("mask_ratio: [\n", r"the recipe .*recipe\.yaml is no YAML that can be read"),
        ("mask_ratio: much\n", r"--mask_ratio.*invalid float value: 'much'"),
        ("config: other.yaml\n", r"config in .*recipe\.yaml is for the command line only"),
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
    assert "recipe.yaml is no YAML that can be read" in fail("train", "--config", tmp_path / "recipe.yaml")
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


def test_similar_items_need_items_of_the_catalogue(model):
    assert fail("similar", model) == "bert4rec similar: expected at least one item id; got none"
    assert re.search(r"lacks the item '1011'; expected one of its \d+ ids, such as '101'", fail("similar", model, 1011))
    assert "top_k must be a whole number of at least 1; got 0" in fail("similar", model, 101, "--top_k", 0)
    assert "did you mean --top_k?" in fail("similar", model, 101, "--topk", 3)


@pytest.mark.parametrize("flag", ["--explain", "--filter_seen_items"])
def test_an_item_after_a_flag_is_not_its_value(flag):
    line = fail("recommend", "model", flag, 1, 50)
    assert f"argument {flag}" in line
    assert line.endswith("expected true, false or nothing; got '1': write item ids before this option")


def test_files_of_histories_have_no_explanations(model, data, tmp_path):
    line = fail("recommend", model, "--histories", data, "--output", tmp_path / "out", "--explain")
    assert line == "bert4rec recommend: --explain is for one history; leave it out with --histories"
    pipe = transformers.pipeline("sequential-recommendation", model=str(model), device="cpu", explain=True)
    with pytest.raises(ValueError, match="the output has only user_id, item_id, rank, score: leave explain=True out"):
        recommend_file(pipe, data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_command_names_the_nearest_and_all_known_ones():
    status, out, err = run("recomend", "model")
    assert (status, out) == (2, "")
    assert err == (
        "bert4rec: unknown command 'recomend'; did you mean recommend? "
        "Expected one of prepare, train, tune, evaluate, compare, calibrate, update-items, recommend, similar, serve, "
        "demo, export, "
        "export-vectors, convert, convert-config\n"
    )
    assert run("xyz")[2] == f"bert4rec: unknown command 'xyz'. Expected one of {', '.join(COMMANDS)}\n"


def test_an_evaluation_that_cannot_be_kept_is_printed_all_the_same(model, data, tmp_path, monkeypatch, caplog):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "evaluation.json").write_text("[{")
    assert "evaluation.json is damaged" in fail("evaluate", copy, "--data", data, "--use_cpu", "true")
    (copy / "evaluation.json").unlink()

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("bert4rec_hf.hub.model_card.write_file", full)
    out = "\n".join(succeed("evaluate", copy, "--data", data, "--use_cpu", "true"))
    assert "NDCG@10" in out
    assert "wrote" not in out
    assert f"the metrics could not be written into {copy}: No space left on device" in caplog.text


@contextmanager
def files_of_at_most(size):
    """A limit on the size of files, which is met like the end of a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_is_an_error_and_what_was_there_stays(tmp_path):
    log = write_log(tmp_path / "log.csv", random_rows([f"u{number}" for number in range(40)], "abcdefgh"))
    succeed("prepare", log, "--output", tmp_path / "data")
    before = contents(tmp_path)
    with files_of_at_most(100):
        message = fail("prepare", log, "--output", tmp_path / "data")
    assert re.fullmatch(r"bert4rec prepare: cannot write .*histories.parquet: .*File too large.*", message)
    assert contents(tmp_path) == before
    with files_of_at_most(5000):
        status, _, error = run("train", "--data", tmp_path / "data", *train_flags(output_dir=tmp_path / "model"))
    assert status == 2
    assert "File too large" in error.splitlines()[-1]
    assert contents(tmp_path) == before


def test_where_pytorch_cannot_write_the_error_names_the_folder(tmp_path, monkeypatch):
    log = write_log(tmp_path / "log.csv", random_rows([f"u{number}" for number in range(40)], "abcdefgh"))
    succeed("prepare", log, "--output", tmp_path / "data")
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, path: save(content, "/dev/full"))
    status, _, error = run("train", "--data", tmp_path / "data", *train_flags(output_dir=tmp_path / "model"))
    assert status == 2
    assert error.splitlines()[-1].startswith(f"bert4rec train: cannot write {tmp_path / 'model'}")
    assert not list((tmp_path / "model").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 8 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     RuntimeError("can't start new thread"), MemoryError()],
)  # fmt: skip
def test_too_little_memory_is_an_error_in_one_line(monkeypatch, error):
    def raise_it(arguments):
        """A command."""
        raise error

    monkeypatch.setitem(COMMANDS, "prepare", raise_it)
    monkeypatch.setitem(sys.modules, "bert4rec_hf.training.resume", None)  # an import may fail for want of memory too
    shown = str(error) or "Python could not allocate any"
    assert fail("prepare") == f"bert4rec prepare: not enough memory: {shown}"


def test_an_error_of_the_program_itself_is_no_error_of_memory(monkeypatch):
    def raise_it(arguments):
        """A command."""
        raise RuntimeError("the shapes differ")

    monkeypatch.setitem(COMMANDS, "prepare", raise_it)
    with pytest.raises(RuntimeError, match="the shapes differ"):
        run("prepare")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM between processes")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_gives_status_130_though_it_comes_while_python_executes_text(tmp_path, name):
    # Python ends itself by SIGINT where a KeyboardInterrupt has passed through exec, though it was caught.
    code = f"""
import signal, sys
from bert4rec_hf import cli
def told(arguments):
    "A command."
    exec("signal.raise_signal(signal.{name})")
cli.COMMANDS["prepare"] = told
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets processes in the background ignore it
sys.exit(cli.main(["prepare"]))
"""
    (tmp_path / "told.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "told"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (130, "bert4rec prepare: interrupted\n")
