"""A folder with published code loads without this package; with the package, it needs no trust_remote_code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import without_package
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import bert4rec_hf
from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecModel, Bert4RecTokenizer
from bert4rec_hf.cli import main
from bert4rec_hf.hub.publish_code import CODE_FILES, PUBLISHED_TASK, publish_code

# Ids that a careless program would read as numbers, split, strip or take for a special token.
ODD = ["007", " a b ", "[MASK]", "\\[PAD]", "ünï", '"quoted"', ""]
ITEMS = [*ODD, *map(str, range(100, 120))]
TITLES = {"007": "Goldfinger", "[MASK]": "A mask, “quoted”", "100": "Hundred"}
COUNTS = {"007": 3, "100": 9}
LENGTH = 8
ARCHITECTURES = {
    "rotary": {"filter_seen_items": True},
    "paper": {
        "position_embedding_type": "learned_from_start",
        "normalization": "post",
        "prediction_head": True,
        "attn_implementation": "eager",
    },
}


def save_model(folder, **options):
    torch.manual_seed(0)
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, titles=TITLES, counts=COUNTS, model_max_length=LENGTH)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
        hidden_dropout_prob=0.0,
        **options,
    )
    model = Bert4RecForMaskedItemPrediction(config)
    torch.nn.init.normal_(model.item_bias.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def read(path):
    return json.loads(path.read_text("utf-8"))


def own_answers(folder):
    return without_package.answers(str(folder), "sequential-recommendation")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folders without code, one per architecture."""
    folder = tmp_path_factory.mktemp("plain")
    return [save_model(folder / name, **options) for name, options in ARCHITECTURES.items()]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    folders = [save_model(folder / f"{name} v1.0", **options) for name, options in ARCHITECTURES.items()]
    for path in folders:
        publish_code(path)
    return folders


@pytest.fixture(scope="module")
def stranger(published, tmp_path_factory):
    """The answers of a process that has Transformers but not this package."""
    output = tmp_path_factory.mktemp("stranger") / "found.json"
    package = Path(bert4rec_hf.__file__).parent
    subprocess.run(
        [sys.executable, "-I", without_package.__file__, PUBLISHED_TASK, output, package, *published],
        check=True,
        cwd=output.parent,
        stdin=subprocess.DEVNULL,  # nobody can answer whether to trust the code
        env=os.environ | {"HF_MODULES_CACHE": str(output.with_name("modules")), "OMP_NUM_THREADS": "1"},
    )
    return read(output)


def assert_equal(found, expected):
    """Check that answers are equal to the bit, from classes of the same names in the folder's code."""
    assert {**found, "modules": None} == {**expected, "modules": None}
    assert all(module.startswith("transformers_modules.") for module in found["modules"])


@pytest.mark.parametrize("number", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_without_our_package_every_answer_is_the_same_to_the_bit(plain, stranger, number):
    expected = own_answers(plain[number])
    assert len(expected["recommended"]) == 3
    assert len({entry["score"] for entry in expected["one"]}) == 7
    assert any(entry["because"] for answer in expected["explained"] for entry in answer)
    assert [len(answer) for answer in expected["similar"]] == [7, 7]
    assert_equal(stranger["answers"][number], expected)
    assert stranger["ours"] == []


def test_without_our_package_odd_ids_titles_and_counts_are_as_they_were(stranger):
    found = stranger["answers"][0]
    assert found["items"] == sorted(ITEMS)
    assert dict(zip(found["items"], found["titles"], strict=True)) == {item: TITLES.get(item) for item in ITEMS}
    assert dict(zip(found["items"], found["counts"], strict=True)) == {item: COUNTS.get(item, 0) for item in ITEMS}
    assert {entry["item_id"] for entry in found["chosen"]} == {"ünï", "", "\\[PAD]", "119"}


def test_without_our_package_the_task_need_not_be_named(stranger):
    assert stranger["task"] == PUBLISHED_TASK
    assert stranger["recommended"] == stranger["answers"][0]["recommended"]


def test_without_our_package_nothing_loads_unless_the_code_is_trusted(stranger):
    assert set(stranger["refusals"]) == {"config", "model", "tokenizer", "pipeline"}
    for message in stranger["refusals"].values():
        assert "custom code" in message
        assert "trust_remote_code=True" in message


def test_a_pipeline_that_is_saved_without_our_package_is_a_published_folder_again(stranger):
    assert_equal(stranger["copy"], stranger["answers"][0])


@pytest.mark.parametrize("number", range(len(ARCHITECTURES)), ids=ARCHITECTURES)
def test_we_need_no_flag_and_get_our_classes(plain, published, number):
    found = own_answers(published[number])
    assert found == own_answers(plain[number])
    assert {module.split(".")[0] for module in found["modules"]} == {"bert4rec_hf"}


def test_our_model_and_encoder_ignore_the_published_code_also_when_it_is_trusted(published):
    folder, trust = published[0], {"trust_remote_code": True}
    assert type(AutoConfig.from_pretrained(folder, **trust)) is Bert4RecConfig
    assert type(AutoModel.from_pretrained(folder, **trust)) is Bert4RecModel
    assert type(AutoModelForMaskedLM.from_pretrained(folder, **trust)) is Bert4RecForMaskedItemPrediction


def test_the_published_code_is_ours_and_imports_only_itself_and_the_stack(published):
    package = Path(bert4rec_hf.__file__).parent / "model"
    assert {path.name for path in package.glob("*.py")} == {*CODE_FILES, "__init__.py"}
    for name in CODE_FILES:
        code = (published[0] / name).read_text("utf-8")
        assert code == (package / name).read_text("utf-8")
        assert "Apache License" in code.splitlines()[0]
        stack = {"torch", "transformers", "tokenizers", "huggingface_hub", "safetensors"}
        assert set(get_imports(package / name)) <= stack | sys.stdlib_module_names
        assert {f"{module}.py" for module in get_relative_imports(package / name)} < set(CODE_FILES)
    plain_names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "items.json"}
    assert set(contents(published[0])) == {*CODE_FILES, *plain_names}


def test_publishing_changes_nothing_but_the_entries_and_keeps_other_keys(tmp_path):
    folder = save_model(tmp_path / "model")
    config = read(folder / "config.json") | {"auto_map": {"AutoModel": "old.Old"}, "ours": "ü"}
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)
    publish_code(folder)
    for name, content in before.items():
        if name.endswith("config.json"):
            now = read(folder / name)
            assert "old.Old" not in now.pop("auto_map").values()
            assert list(now.pop("custom_pipelines", {})) == ["bert4rec-recommendation"] * (name == "config.json")
            assert now == {key: value for key, value in json.loads(content).items() if key != "auto_map"}
        else:
            assert (folder / name).read_bytes() == content


def test_publishing_twice_is_publishing_once_and_replaces_old_code(published, tmp_path):
    folder = save_model(tmp_path / "model", **ARCHITECTURES["rotary"])
    publish_code(folder)
    first = contents(folder)
    publish_code(folder)
    assert contents(folder) == first
    (folder / "modeling_bert4rec.py").write_text("of an older version")
    publish_code(str(folder))
    assert contents(folder) == first


def test_code_that_cannot_be_written_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model")
    before = contents(folder)
    write = Path.write_bytes

    def full_disk(path, content):
        if "pipeline.py" in path.name:
            write(path, content[:10])
            raise OSError("no space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        publish_code(folder)
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert "pipeline.py" not in after
    monkeypatch.undo()
    publish_code(folder)
    assert not [name for name in contents(folder) if name.endswith(".new")]


def test_a_copy_that_we_save_names_no_code_that_it_lacks(published, tmp_path):
    recommend = pipeline("sequential-recommendation", model=published[0], device="cpu")
    recommend.save_pretrained(tmp_path / "pipeline")
    Bert4RecForMaskedItemPrediction.from_pretrained(published[0]).save_pretrained(tmp_path / "parts")
    AutoTokenizer.from_pretrained(published[0]).save_pretrained(tmp_path / "parts")
    for folder in (tmp_path / "pipeline", tmp_path / "parts"):
        assert not [name for name in contents(folder) if name.endswith(".py")]
        for name in ("config.json", "tokenizer_config.json"):
            assert not {"auto_map", "custom_pipelines"} & set(read(folder / name))
        assert own_answers(folder) == own_answers(published[0])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("tokenizer_config.json", r"has no tokenizer_config\.json; write it with tokenizer\.save_pretrained"),
    ],
)
def test_a_folder_that_lacks_its_half_is_refused_and_left_alone(tmp_path, missing, message):
    folder = save_model(tmp_path / "model")
    (folder / missing).unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        publish_code(folder)
    assert contents(folder) == before


def test_a_folder_of_another_architecture_is_refused_and_left_alone(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    before = contents(folder)
    with pytest.raises(ValueError, match=r"no BERT4Rec model: .* got 'bert'"):
        publish_code(folder)
    assert contents(folder) == before


def test_train_publishes_on_demand_and_goes_on_from_a_published_folder(tmp_path, capfd):
    rows = [f"{user},{'ab c'[(user + time) % 4]},{time}" for user in range(12) for time in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    data, first, second = (str(tmp_path / name) for name in ("data", "first", "second"))
    small = ["--data", data, "--use_cpu", "true", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2"]
    architecture = ["--hidden_size", "16", "--intermediate_size", "16"]
    assert main(["prepare", str(tmp_path / "log.csv"), "--output", data]) == 0
    assert main(["train", *small, *architecture, "--output_dir", first, "--publish_code", "true"]) == 0
    folders = [Path(first), *Path(first).glob("checkpoint-*")]
    assert len(folders) > 1
    for folder in folders:
        assert set(CODE_FILES) < set(contents(folder))
        assert "auto_map" in read(folder / "config.json")
    assert main(["evaluate", first, "--data", data, "--use_cpu", "true"]) == 0
    assert main(["train", *small, "--output_dir", second, "--model_name_or_path", first]) == 0
    assert not set(CODE_FILES) & set(contents(second))
    assert not {"auto_map", "custom_pipelines"} & set(read(Path(second) / "config.json"))
    assert "auto_map" not in read(Path(second) / "tokenizer_config.json")
    capfd.readouterr()
    assert main(["recommend", second, "a"]) == 0
    assert len(capfd.readouterr().out.splitlines()) > 0


ENDPOINT = """
import importlib.util, json, sys
sys.modules["bert4rec_hf"] = None
folder, requests = sys.argv[1], json.loads(sys.argv[2])
# As huggingface_inference_toolkit.handler_utils loads a custom handler.
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
found = []
for request in requests:
    try:
        found.append(handler(request))
    except ValueError as error:
        found.append(str(error))
print("ANSWERS" + json.dumps(found))
"""


def test_an_inference_endpoint_serves_a_published_folder_without_our_package(published):
    history = {"history": ["007", " a b "], "exclude": ["100"]}
    requests = [
        {"inputs": history, "parameters": {"top_k": 3}},
        {"inputs": [["007"], []]},
        {"inputs": ["007"], "parameters": {"topk": 3}},
        {"inputs": 7},
        {"history": ["007"]},
        {},
    ]
    run = subprocess.run(
        [sys.executable, "-I", "-c", ENDPOINT, published[0], json.dumps(requests)],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("ANSWERS")[1])
    recommend = pipeline("sequential-recommendation", model=str(published[0]))
    assert found[:2] == [recommend(history, top_k=3), recommend([["007"], []])]
    assert found[2:] == [
        "unknown argument 'topk': did you mean top_k?",
        "expected a history, a list of item ids, oldest first, or many histories; got 7 of type int",
        "expected a body with inputs and, optionally, parameters; got history",
        "expected a body with inputs and, optionally, parameters; got none",
    ]
