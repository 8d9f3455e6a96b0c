"""A model folder from a stranger is data: nothing in it runs or leads out, and its numbers and texts are checked."""

import getpass
import gzip
import json
import os
import pickle
import re
import shutil
import socket
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import fail, run, succeed
from trained_folder import make_trained_folder
from transformers import pipeline

from bert4rec_hf import Bert4RecConfig, Bert4RecTokenizer
from bert4rec_hf.convert.safe_pickle import read_pickle
from bert4rec_hf.data import item_tables, log_files
from bert4rec_hf.data.item_tables import read_item_table
from bert4rec_hf.data.log_files import find_files
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.hub.model_card import MARK, write_model_card
from bert4rec_hf.reading import inert, read_yaml
from bert4rec_hf.serving.item_table import ItemTable

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_trained_folder(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def model(trained, tmp_path):
    return Path(shutil.copytree(trained[1], tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*")))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 2**40}, "vocab_size must be at most"),
        ({"hidden_size": 2**40}, "hidden_size must be at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most"),
        ({"vocab_size": 2**31 - 1}, "do not belong together"),
        ({"max_position_embeddings": 2**20, "hidden_size": 2**14}, "do not belong together"),
        ({"num_transitions": 2**16, "vocab_size": 2**31 - 1}, "do not belong together"),
        ({"num_event_types": 2**16, "hidden_size": 2**12}, "do not belong together"),
        ({"num_hidden_layers": 3}, "do not fit its config.json: .* are missing, such as model.layers.2"),
        ({"num_hidden_layers": 1}, "do not fit its config.json: .* are unexpected, such as model.layers.1"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"dtype": []}, "config.json of this package"),
        ({"quantization_config": 5}, "quantization_config must be a mapping"),
    ],
)
def test_numbers_of_a_config_are_checked_before_memory_is_taken(model, values, message):
    change(model / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        load_model(model)
    with pytest.raises(ValueError):  # noqa: PT011 - Transformers' pipeline has a message of its own
        pipeline("sequential-recommendation", model=str(model)) if "num_hidden" not in str(values) else load_model(
            model
        )


def test_a_config_names_no_code_to_fetch(model):
    change(model / "config.json", attn_implementation="owner/kernel", _attn_implementation="owner/kernel")
    assert Bert4RecConfig.from_pretrained(model)._attn_implementation is None
    assert load_model(model).config._attn_implementation == "sdpa"
    # What the caller asks for holds.
    assert load_model(model).from_pretrained(model, attn_implementation="eager").config._attn_implementation == "eager"


def test_weights_are_no_pickle_and_are_in_the_folder(model, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.move(model / "model.safetensors", tmp_path / "outside.safetensors")
    torch.save({"x": Hostile()}, model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load_model(model)
    assert not (tmp_path / "ran").exists()
    index = {"metadata": {}, "weight_map": {"item_bias.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must be in the folder; got .*outside\.safetensors"):
        load_model(model)
    for text in ("{}", DEEP, '{"weight_map": 5}'):
        (model / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"cannot be read|neither"):
            load_model(model)


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 10, 90 * 2**20, 0])
def test_lengths_in_safetensors_are_checked(model, length):
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read: SafetensorError"):
        load_model(model)


@pytest.mark.parametrize("name", ["items.json", "evaluation.json", "README.md", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(model, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "secret")
    line = fail("recommend", model, "i1")
    assert f"{model / name} is a link out of the folder, to {tmp_path / 'secret'}" in line
    for load in (
        Bert4RecTokenizer.from_pretrained,
        lambda folder: pipeline("sequential-recommendation", model=str(folder)),
    ):
        with pytest.raises(ValueError, match=r"is a link out of the folder|Could not load model"):
            load(model)


def test_links_of_the_hubs_cache_and_to_a_folder_are_no_links_out(model, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in model.iterdir() if path.is_file())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "current").symlink_to(model)
    for folder in (snapshot, tmp_path / "current"):
        assert succeed("recommend", folder, "i1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", DEEP, "config.json is damaged"),
        ("config.json", "[1]", "the content must be an object"),
        ("tokenizer.json", DEEP, "tokenizer of .* cannot be read: RecursionError"),
        ("tokenizer.json", "[]", "tokenizer of .* cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer of .* cannot be read"),
        ("items.json", DEEP, "tokenizer of .* cannot be read"),
        ("items.json", "[]", "tokenizer of .* cannot be read"),
        ("items.json", '{"counts": [1], "titles": null}', "counts of items.json must be a list of 24 values"),
        ("items.json", json.dumps({"titles": [[1]] * 24}), r"titles of items.json has \[1\]; expected text"),
        ("items.json", json.dumps({"counts": [None] * 24}), "counts of items.json has None; expected integers"),
        ("item_features.json", DEEP, "tokenizer of .* cannot be read"),
        ("item_features.json", '{"columns": [{"kind": "number", "name": "price"}]}', "no column of the kind number"),
        ("item_features.json", json.dumps({"columns": [{"name": "x", "kind": "vector", "width": 2**40, "scale": 1}]}),
         "no column of the kind vector"),
        ("preparation.json", "{}", "preparation.json is damaged .*lacks 'source'"),
        ("preparation.json", DEEP, "preparation.json is damaged"),
        ("evaluation.json", "[1]", "evaluation.json is damaged .*/0 must be an object"),
        ("evaluation.json", DEEP, "evaluation.json is damaged"),
        ("calibration.json", '{"adopted": 1}', "calibration.json is damaged"),
        ("training.json", "{}", "training.json is damaged"),
        ("recipe.yaml", "[1]", "recipe.yaml must be a mapping"),
        ("recipe.yaml", "x: !!python/object/apply:os.system [true]", "recipe.yaml is no YAML that can be read"),
        ("README.md", f"---\n{'[' * 5000}\n---\n{MARK}", "README.md is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(trained, model, name, content, message):
    (model / name).write_text(content)
    status, _, text = run("evaluate", model, "--data", trained[0], "--use_cpu", "true")
    assert (status, len(text.splitlines())) == (2, 1)
    assert re.search(message, text), text


def test_aliases_of_aliases_in_yaml_are_bounded(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="more than 100,000 values, also through aliases"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("a: &a [*a]")
    with pytest.raises(ValueError, match="more than 100,000 values"):
        read_yaml(tmp_path / "recipe.yaml")


def test_a_small_file_of_many_values_is_no_item_table(tmp_path, monkeypatch):
    monkeypatch.setattr(item_tables, "MORE_ROWS", 1000)
    monkeypatch.setattr(item_tables, "MORE_LENGTH", 1000)
    many = pa.table({"item_id": pa.array(["a"] * 1_000_000)})
    long = pa.table({"item_id": [str(item) for item in range(900)], "text": ["x" * 100_000] * 900})
    for table in (many, long):
        pq.write_table(table, tmp_path / "items.parquet", compression="zstd")
        with pytest.raises(ValueError, match="as no item table has"):
            read_item_table(tmp_path / "items.parquet")


def test_a_compressed_log_of_zeros_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "MAX_UNPACKED_BYTES", 2**20)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(bytes(2**26)))
    with pytest.raises(ValueError, match=r"log\.csv\.gz .* has more than 100 times its size in it"):
        find_files(tmp_path / "log.csv.gz")


def test_a_pickle_takes_no_memory_for_its_numbers(tmp_path):
    (tmp_path / "memo.pth").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="the place 2147483647 in a memo of at most"):
        read_pickle(tmp_path / "memo.pth")
    weight = torch.zeros(1000, 100)
    torch.save({"state_dict": {f"{number}": weight for number in range(20)}}, tmp_path / "many.pth")
    with pytest.raises(ValueError, match="its tensors are 16 times as large as the file"):
        read_pickle(tmp_path / "many.pth")
    content = pickle.dumps({"state_dict": {}})
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content + bytes(2**20))
    with pytest.raises(ValueError, match="it is compressed"):
        read_pickle(tmp_path / "packed.pth")


def test_titles_and_names_are_inert_in_a_terminal(model):
    hostile = "\x1b]0;owned\x07\x1b[2J\u202egnp\u2028<b>\u200d\r\n"
    titles = json.loads((model / "items.json").read_text())
    change(model / "items.json", titles=[hostile] * len(titles["titles"]))
    status, out, err = run("recommend", model, "i1", "--where", f"price < '{hostile}'")
    assert status == 2
    text = err + "\n".join(succeed("recommend", model, "i1"))
    assert r"\x1b]0;owned\x07\x1b[2J\u202egnp <b>" in text
    assert not {"\x1b", "\x07", "\u202e", "\u2028", "\r"} & set(text + out)
    assert inert("a\u200db\u200c") == "a\u200db\u200c"  # emoji and Persian need these


def test_titles_and_names_are_inert_in_the_model_card(model):
    hostile = "x`y```\n```\n<script>alert(1)</script>\n![i](http://x) \x1b[2J\u202e|"
    change(model / "preparation.json", source=hostile)
    titles = json.loads((model / "items.json").read_text())["titles"]
    change(model / "items.json", titles=[hostile] * len(titles))
    records = json.loads((model / "evaluation.json").read_text())
    records[0] |= {"source": f"other{hostile}", "groups": {hostile: {"model": records[0]["metrics"]}}}
    records[0]["protocol"]["split"] = hostile
    (model / "evaluation.json").write_text(json.dumps(records))
    recipe = {"learning_rate": f"1\n\n```\n\n{hostile}", "model_name_or_path": hostile}
    (model / "recipe.yaml").write_text(json.dumps(recipe))
    write_model_card(model)
    text = (model / "README.md").read_text("utf-8").partition("<!-- Rewritten")[2]
    assert not {"\x1b", "\u202e"} & set(text)
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text[text.index("-->") + 3 :])
    assert "<script" not in html
    assert html.count("<img") == 1  # the learning curve
    assert "http://x&quot;" not in html


def test_an_error_of_a_condition_has_no_advice_on_duckdb(tmp_path):
    items = ItemTable(pa.table({"item_id": ["a"], "price": [1], "category": ["x"]}), "items.parquet")
    for condition in ("price % 0 = 1", "category + 1 = 2", "lower(price) = 'a'"):
        with pytest.raises(ValueError, match=r"does not fit the columns of items\.parquet") as found:
            items.mask(condition)
        for advice in ("SET ", "TRY", "Candidate", "cast", "LINE", "SELECT"):
            assert advice not in str(found.value)


def test_no_file_of_a_model_folder_names_this_machine(trained, monkeypatch):
    data, model = trained
    secrets = [
        str(data.parent),
        str(Path.home()),
        os.getcwd(),
        os.environ.get("HF_TOKEN", ""),
        socket.gethostname(),
        getpass.getuser(),
    ]
    secrets = [secret for secret in secrets if len(secret) > 4]
    assert len(secrets) > 1
    for path in model.rglob("*"):
        if path.is_file() and path.name != "training_args.bin" and path.name != "trainer_state.json":
            content = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], path
