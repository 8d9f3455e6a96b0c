"""Conversion of RecBole's and hopwise's checkpoints: equal scores and losses, and pickles that execute nothing."""

import contextlib
import copyreg
import enum
import functools
import io
import json
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear
from transformers import pipeline, set_seed

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer
from bert4rec_hf.cli import main
from bert4rec_hf.convert.recbole import convert_from_recbole, convert_to_recbole, read_checkpoint, read_items
from bert4rec_hf.convert.safe_pickle import read_pickle
from bert4rec_hf.model.configuration_bert4rec import FIRST_ITEM_ID, MASK_TOKEN_ID

FIXTURES = Path(__file__).parent.parent.parent.parent / "shared" / "fixtures"
CHECKPOINTS = sorted(FIXTURES.glob("*/*.pth"))
with_fixtures = pytest.mark.skipif(not CHECKPOINTS, reason="needs checkpoints of RecBole and hopwise")
each_fixture = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=[path.parent.name for path in CHECKPOINTS])
ITEMS = [f"film {number}" for number in (3, 1, 2, 7, 5, 4, 6)]
ACTIVATIONS = {
    "gelu": gelu, "relu": torch.relu, "swish": torch.nn.functional.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid
}  # fmt: skip


def settings(**changes) -> dict:
    return {
        "model": "BERT4Rec", "n_layers": 2, "n_heads": 2, "hidden_size": 8, "inner_size": 12, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2, "layer_norm_eps": 1e-12, "initializer_range": 0.02,
        "loss_type": "CE",
    } | changes  # fmt: skip


def recbole_state(config: dict, num_items: int, length: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of RecBole 1.2."""
    torch.manual_seed(0)
    width, inner = config["hidden_size"], config["inner_size"]
    shapes = {"item_embedding.weight": (num_items + 2, width), "position_embedding.weight": (length, width)}
    shapes |= {"output_bias": (num_items + 1,), "LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
    for name, rows, columns in [("output_ffn", width, width)] + [
        (f"trm_encoder.layer.{layer}.{name}", rows, columns)
        for layer in range(config["n_layers"])
        for name, rows, columns in [
            *((f"multi_head_attention.{part}", width, width) for part in ("query", "key", "value", "dense")),
            ("feed_forward.dense_1", inner, width),
            ("feed_forward.dense_2", width, inner),
        ]
    ]:
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ["output_ln"] + [
        f"trm_encoder.layer.{layer}.{part}.LayerNorm"
        for layer in range(config["n_layers"])
        for part in ("multi_head_attention", "feed_forward")
    ]:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}


def recbole_scores(state: dict, config: dict, history: list[int]) -> torch.Tensor:
    """The scores (number of items + 1,) that `full_sort_predict` of RecBole 1.2 computes for internal ids."""
    length, width = state["position_embedding.weight"].shape
    window = history[-length:]
    items = [*window, len(state["item_embedding.weight"]) - 1][1:]  # RecBole appends [MASK] and drops the oldest item

    def normed(name, states):
        return layer_norm(states, (width,), state[f"{name}.weight"], state[f"{name}.bias"], config["layer_norm_eps"])

    def dense(name, states):
        return linear(states, state[f"{name}.weight"], state[f"{name}.bias"])

    states = state["item_embedding.weight"][items] + state["position_embedding.weight"][: len(items)]
    states = normed("LayerNorm", states)
    for layer in range(config["n_layers"]):
        name = f"trm_encoder.layer.{layer}"
        query, key, value = (
            dense(f"{name}.multi_head_attention.{part}", states).view(len(items), config["n_heads"], -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        weights = (query @ key.transpose(1, 2) / (width / config["n_heads"]) ** 0.5).softmax(-1)
        context = (weights @ value).transpose(0, 1).reshape(len(items), width)
        states = normed(
            f"{name}.multi_head_attention.LayerNorm", dense(f"{name}.multi_head_attention.dense", context) + states
        )
        inner = ACTIVATIONS[config["hidden_act"]](dense(f"{name}.feed_forward.dense_1", states))
        states = normed(f"{name}.feed_forward.LayerNorm", dense(f"{name}.feed_forward.dense_2", inner) + states)
    output = normed("output_ln", gelu(dense("output_ffn", states[-1])))
    return linear(output, state["item_embedding.weight"][:-1], state["output_bias"])


@contextlib.contextmanager
def installed(library: str):
    """Provide the classes of RecBole or hopwise that a checkpoint names, as if the library were installed."""
    names = [
        library,
        f"{library}.config",
        f"{library}.config.configurator",
        f"{library}.utils",
        f"{library}.utils.enum_type",
    ]
    modules = {name: types.ModuleType(name) for name in names}
    config = type("Config", (), {"__module__": f"{library}.config.configurator"})
    kind = enum.Enum("ModelType", {"SEQUENTIAL": 3}, module=f"{library}.utils.enum_type")
    modules[f"{library}.config.configurator"].Config = config
    modules[f"{library}.utils.enum_type"].ModelType = kind
    sys.modules.update(modules)
    try:
        yield config, kind
    finally:
        for name in modules:
            del sys.modules[name]


def save_checkpoint(path: Path, state: dict, config: dict, library: str = "recbole") -> Path:
    with installed(library) as (config_class, kind):
        theirs = config_class()
        theirs.final_config_dict = config | {"MODEL_TYPE": kind.SEQUENTIAL, "device": torch.device("cpu")}
        content = {
            "config": theirs, "epoch": 3, "best_valid_score": np.float64(0.1), "state_dict": state, "optimizer": {}
        }  # fmt: skip
        torch.save(content, path, pickle_protocol=4)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "theirs.pth", recbole_state(settings(), len(ITEMS), 5), settings())


def scores_of(model, rows: list[list[int]]) -> torch.Tensor:
    """The logits at the [MASK] of each row."""
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    positions = torch.tensor([[row.index(MASK_TOKEN_ID)] for row in rows])
    with torch.no_grad():
        return model(input_ids=input_ids, masked_positions=positions).logits.squeeze(1)


@pytest.mark.parametrize("library", ["recbole", "hopwise"])
@pytest.mark.parametrize(
    "changes",
    [
        *({"hidden_act": name} for name in ACTIVATIONS),
        {"n_layers": 1, "n_heads": 4, "hidden_size": 16, "inner_size": 8, "layer_norm_eps": 1e-5},
    ],
    ids=[*ACTIVATIONS, "sizes"],
)
def test_scores_are_theirs_for_histories_of_every_length(tmp_path, library, changes):
    config = settings(**changes)
    state = recbole_state(config, len(ITEMS), 5)
    checkpoint = save_checkpoint(tmp_path / "theirs.pth", state, config, library)
    returned = convert_from_recbole(checkpoint, ITEMS, tmp_path / "ours")
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "ours").eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.items == ITEMS
    for length in range(1, 8):
        history = [1 + (3 * place + length) % 7 for place in range(length)]
        row = tokenizer([ITEMS[number - 1] for number in history])["input_ids"]
        ours = scores_of(model, [row])[0]
        expected = recbole_scores(state, config, history)
        torch.testing.assert_close(ours[[0, *range(FIRST_ITEM_ID, len(tokenizer))]], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores_of(returned, [row])[0], ours, atol=1e-6, rtol=1e-6)


@each_fixture
@with_fixtures
def test_scores_of_real_checkpoints_are_those_that_their_library_computes(checkpoint, tmp_path):
    expected, recorded = load_file(checkpoint.parent / "expected.safetensors"), json.loads(
        (checkpoint.parent / "expected.json").read_text()
    )  # fmt: skip
    convert_from_recbole(checkpoint, recorded["item_tokens"], tmp_path / "ours")
    model = Bert4RecForMaskedItemPrediction.from_pretrained(tmp_path / "ours").eval()
    tokenizer = Bert4RecTokenizer.from_pretrained(tmp_path / "ours")
    lengths = expected["history_len"].tolist()
    assert min(lengths) == 1
    assert max(lengths) > recorded["config"]["MAX_ITEM_LIST_LENGTH"]
    histories = [row[:length].tolist() for row, length in zip(expected["history"], lengths, strict=True)]
    rows = tokenizer([[recorded["item_tokens"][item] for item in history] for history in histories])["input_ids"]
    columns = [0, *range(FIRST_ITEM_ID, len(tokenizer))]
    difference = (scores_of(model, rows)[:, columns] - expected["full_sort_scores"]).abs().max()
    targets = tokenizer.item_ids_to_token_ids(recorded["item_tokens"][item] for item in expected["target"].tolist())
    with torch.no_grad():
        states = torch.cat([model.mask_states(torch.tensor([row])) for row in rows])
        chosen = model._scores(states, torch.tensor(targets).unsqueeze(1)).flatten()
    chosen_difference = (chosen - expected["predict_scores"]).abs().max()
    print(f"{checkpoint.parent.name}: scores {difference:.1e}, chosen candidates {chosen_difference:.1e}")
    assert difference < 1e-5
    assert chosen_difference < 1e-5


@each_fixture
@with_fixtures
@pytest.mark.parametrize("kind", ["train", "ft"])
def test_the_training_loss_of_real_checkpoints_is_theirs(checkpoint, tmp_path, kind):
    expected, recorded = load_file(checkpoint.parent / "expected.safetensors"), json.loads(
        (checkpoint.parent / "expected.json").read_text()
    )  # fmt: skip
    if f"{kind}_loss" not in expected:
        pytest.skip("this version has no batches whose only mask is the last item")
    convert_from_recbole(checkpoint, recorded["item_tokens"], tmp_path / "ours")
    model = Bert4RecForMaskedItemPrediction.from_pretrained(
        tmp_path / "ours", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()
    theirs = expected[f"{kind}_masked_seq"]
    input_ids = torch.where(theirs == recorded["mask_token_id"], MASK_TOKEN_ID, torch.where(theirs == 0, 0, theirs + 2))
    # The libraries pad the lists of masked positions with 0, so a mask at position 0 does not count.
    positions, counts = expected[f"{kind}_masked_index"], expected[f"{kind}_masked_index"] > 0
    labels = torch.where(counts, expected[f"{kind}_pos_items"] + 2, -100)
    options = {}
    if recorded["config"]["loss_type"] == "BPR":
        options["negative_ids"] = (expected[f"{kind}_neg_items"] + 2).unsqueeze(-1)
    masked_positions = positions.masked_fill(~counts, -1)
    loss = model(input_ids=input_ids, labels=labels, masked_positions=masked_positions, **options).loss
    print(f"{checkpoint.parent.name}, {kind}: loss {abs(loss.item() - expected[f'{kind}_loss'].item()):.1e}")
    torch.testing.assert_close(loss.detach(), expected[f"{kind}_loss"], atol=1e-5, rtol=0)


@each_fixture
@with_fixtures
def test_a_real_checkpoint_comes_back_to_the_bit(checkpoint, tmp_path):
    recorded = json.loads((checkpoint.parent / "expected.json").read_text())
    convert_from_recbole(checkpoint, recorded["item_tokens"], tmp_path / "ours")
    if recorded["version"] == "1.1.1":
        with pytest.raises(ValueError, match="prediction_head=False, which cannot be converted"):
            convert_to_recbole(tmp_path / "ours", tmp_path / "back.pth")
        return
    convert_to_recbole(tmp_path / "ours", tmp_path / "back.pth")
    theirs, back = read_pickle(checkpoint)["state_dict"], torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["state_dict"].keys() == theirs.keys()
    # Weights are compared, since scores do not depend on some of them, such as the bias of keys.
    assert all(torch.equal(back["state_dict"][name], value) for name, value in theirs.items())
    assert back["item_id"] == recorded["item_tokens"]
    names = ("n_layers", "n_heads", "hidden_size", "inner_size", "hidden_act", "loss_type", "layer_norm_eps")
    assert {name: back["config"][name] for name in names} == {name: recorded["config"][name] for name in names}


def test_a_model_of_ours_goes_over_and_its_softmax_leaves_pad_out(tmp_path, caplog):
    set_seed(0)
    config = settings()
    model = Bert4RecForMaskedItemPrediction(
        Bert4RecConfig(
            vocab_size=10, hidden_size=8, num_attention_heads=2, intermediate_size=12, max_position_embeddings=5,
            position_embedding_type="learned_from_start", normalization="post", prediction_head=True,
            initializer_range=0.5,
        )
    ).eval()  # fmt: skip
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, model_max_length=5)
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), "--to", "recbole", "--output", str(tmp_path / "theirs.pth")]) == 0
    assert "RecBole drops the oldest item of every history" in caplog.text
    assert read_items(tmp_path / "theirs.pth") == tokenizer.items
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)["state_dict"]
    # Both drop the oldest of five items, since our model reads five tokens with the [MASK].
    theirs = recbole_scores(state, config, [3, 1, 2, 7, 5])
    ours = scores_of(model, [tokenizer([tokenizer.items[number - 1] for number in (3, 1, 2, 7, 5)])["input_ids"]])[0]
    torch.testing.assert_close(ours[FIRST_ITEM_ID:], theirs[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        cross_entropy(ours[FIRST_ITEM_ID:], torch.tensor(4)), cross_entropy(theirs, torch.tensor(5)), atol=1e-5, rtol=0
    )


def test_a_converted_model_recommends_in_raw_ids_and_may_keep_the_oldest_item(checkpoint, tmp_path):
    state = read_pickle(checkpoint)["state_dict"]
    titles = {"film 1": "The first"}
    convert_from_recbole(checkpoint, ITEMS, tmp_path / "equal", titles=titles)
    convert_from_recbole(checkpoint, ITEMS, tmp_path / "right", drop_oldest_item=False)
    equal, right = (
        pipeline("sequential-recommendation", model=str(tmp_path / name), top_k=7) for name in ("equal", "right")
    )
    answer = equal(["film 1", "film 2"])
    expected = recbole_scores(state, settings(), [2, 3])[1:]
    assert [entry["item_id"] for entry in answer] == [ITEMS[place] for place in expected.argsort(descending=True)]
    assert {entry["title"] for entry in answer} == {None, "The first"}
    # RecBole drops the oldest item, so it does not change the answer. With drop_oldest_item=False it does.
    assert equal(["film 4", "film 2"]) == answer
    assert right(["film 4", "film 2"]) != right(["film 1", "film 2"])
    assert equal(["film 4"]) == equal([])
    # If the window is full, both drop the oldest item.
    full = ["film 1", "film 2", "film 3", "film 4", "film 5"]
    scores = [[entry["score"] for entry in pipe(full)] for pipe in (equal, right)]
    assert scores[0] == pytest.approx(scores[1])


def test_items_come_from_a_list_a_file_or_an_atomic_file(tmp_path):
    (tmp_path / "ids.txt").write_text("[PAD]\nb\na\n")
    (tmp_path / "ids.json").write_text('["b", "a"]')
    (tmp_path / "log.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n1\tb\t2\n1\ta\t1\n2\tb\t3\n")
    for name in ("ids.txt", "ids.json", "log.inter"):
        assert read_items(tmp_path / name) == ["b", "a"], name
    assert read_items(["[PAD]", "b", "a"]) == ["b", "a"]
    for separator in (" ", ",", ";", "::", "\x01", "||||", "é"):
        lines = (["user_id:token", "item_id:token"], ["1", "b"], ["1", "a"], ["2", "b"])
        (tmp_path / "other.inter").write_text("".join(f"{separator.join(line)}\n" for line in lines), "utf-8")
        assert read_items(tmp_path / "other.inter", delimiter=separator) == ["b", "a"], separator
    (tmp_path / "log.inter").write_text("user_id:token\tmovie_id:token\n1\tb\n1\ta\n")
    assert read_items(tmp_path / "log.inter", "movie_id") == ["b", "a"]
    with pytest.raises(ValueError, match="has no column item_id:token"):
        read_items(tmp_path / "log.inter")


# The default protocol of Python up to 3.13, and that of newer versions, in which NumPy names another function.
each_protocol = pytest.mark.parametrize("protocol", [4, 5])


@each_protocol
def test_items_come_from_a_saved_dataset(tmp_path, protocol):
    read_only = np.array(["[PAD]", "b", "a"])
    read_only.flags.writeable = False
    with installed("recbole") as (config_class, _):
        dataset = config_class()
        dataset.iid_field = "item_id"
        dataset.field2id_token = {"user_id": np.array(["[PAD]", "1"]), "item_id": np.array(["[PAD]", "b", "a"])}
        (tmp_path / "numpy-strings.pth").write_bytes(pickle.dumps(dataset, protocol))
        dataset.field2id_token = {"item_id": read_only}
        (tmp_path / "numpy-read-only.pth").write_bytes(pickle.dumps(dataset, protocol))
        dataset.field2id_token = {np.str_("item_id"): np.array(["[PAD]", "b", "a"], dtype=object)}
        (tmp_path / "numpy-objects.pth").write_bytes(pickle.dumps(dataset, protocol))
    assert (b"_frombuffer" in (tmp_path / "numpy-strings.pth").read_bytes()) == (protocol == 5)
    for path in tmp_path.glob("*.pth"):
        assert read_items(path) == ["b", "a"], path


@pytest.mark.parametrize("module", [b"numpy.core.numeric", b"numpy._core.numeric"])
def test_arrays_of_protocol_5_are_read_within_their_bytes(tmp_path, module):
    """Pickles of NumPy 1 and 2 are read, and shapes that exceed the bytes or have other dimensions are refused."""
    path = tmp_path / "data.pth"

    def write(letters: bytes, shape: bytes, further: bytes = b"") -> None:
        dtype = b"cnumpy\ndtype\n(S'U1'\nI00\nI01\ntR(I3\nS'<'\nNNNI4\nI4\nI8\ntb"
        buffer = b"\x96" + struct.pack("<Q", len(letters)) + letters
        array = b"c" + module + b"\n_frombuffer\n(" + buffer + dtype + shape + b"S'C'\n" + further + b"tR"
        dataset = b"crecbole.data.dataset\nDataset\n)R}S'field2id_token'\n}S'item_id'\n" + array + b"ssb."
        path.write_bytes(b"\x80\x05" + dataset)

    letters = "ba".encode("utf-32-le")
    write(letters, b"(I2\nt")
    assert read_items(path) == ["b", "a"]
    write(letters, b"(I2\nt", further=b"N")  # the order of the axes, in newer versions of NumPy
    assert read_items(path) == ["b", "a"]
    for shape in (b"(I3\nt", b"(I1000000000000\nt", b"(I-1\nt", b"(I1\nI2\nt", b"(t", b"S'2'\n", b"N"):
        write(letters, shape)
        with pytest.raises(ValueError, match="has no item ids that can be read"):
            read_items(path)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (ITEMS[:-1], r"has 7 items, the given list has 6: give the items of the training log"),
        ([*ITEMS[:-1], ITEMS[0]], "occurs twice"),
    ],
    ids=["too-few", "twice"],
)
def test_items_that_cannot_be_the_checkpoints_are_refused_and_nothing_is_written(checkpoint, tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        convert_from_recbole(checkpoint, items, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.pth"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (
            {"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[0,inf)", "val_interval": None},
            "user_inter",
        ),
        ({"benchmark_filename": ["train", "valid", "test"]}, "benchmark_filename"),
    ],
)
def test_an_atomic_file_does_not_tell_the_order_of_a_log_that_was_filtered_or_in_parts(tmp_path, changes, name):
    config = settings(**changes)
    checkpoint = save_checkpoint(tmp_path / "theirs.pth", recbole_state(config, len(ITEMS), 5), config)
    log = tmp_path / "log.inter"
    log.write_text("\n".join(["user_id:token\titem_id:token", *(f"1\t{item}" for item in ITEMS)]) + "\n")
    with pytest.raises(ValueError, match=rf"was trained with {name}.* give RecBole's saved dataset"):
        convert_from_recbole(checkpoint, log, tmp_path / "ours")
    words = ["convert", checkpoint, "--items", log, "--output", tmp_path / "ours"]
    assert main([str(word) for word in words]) == 2
    assert not (tmp_path / "ours").exists()
    convert_from_recbole(checkpoint, ITEMS, tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.inter", b"user_id:token\titem_id:token\n1\ta\n1\n", "short.inter as CSV: .*Line: 3"),
        ("latin.txt", b"caf\xe9\n", "cannot read .*latin.txt"),
        ("broken.json", b"[", "cannot read .*broken.json"),
        ("mapping.json", b"{}", "must hold a list of item ids; got dict"),
    ],
)
def test_an_item_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path / name)


@each_protocol
def test_odd_arrays_of_item_ids_are_refused(tmp_path, protocol):
    arrays = {
        "strings": np.array(["a", np.str_("b")], dtype=object), "numbers": np.arange(3), "bytes": np.array([b"a"]),
        "code point": np.frombuffer(b"\xff" * 4, "<U1"), "big-endian": np.array(["a"], dtype=">U1"),
    }  # fmt: skip
    for name, array in arrays.items():
        with installed("recbole") as (config_class, _):
            dataset = config_class()
            dataset.field2id_token = {"item_id": array}
            (tmp_path / "data.pth").write_bytes(pickle.dumps(dataset, protocol))
        if name == "strings":
            assert read_items(tmp_path / "data.pth") == ["a", "b"]
            continue
        with pytest.raises(ValueError, match="has no item ids that can be read"):
            read_items(tmp_path / "data.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": ["gelu"]}, {"n_heads": np.int64(2)}, {"inner_size": 10**11}, {"n_layers": 10**11},
        {"loss_type": ["CE"]}, {"layer_norm_eps": "small"}, {"inner_size": 13},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_model_are_refused(tmp_path, changes):
    state = recbole_state(settings(), len(ITEMS), 5)
    checkpoint = save_checkpoint(tmp_path / "theirs.pth", state, settings() | changes)
    with pytest.raises(ValueError, match=re.escape(str(checkpoint))):
        convert_from_recbole(checkpoint, ITEMS, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_output_that_holds_something_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "note").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_from_recbole(checkpoint, ITEMS, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["note"]


def test_an_empty_folder_and_a_link_to_one_are_filled(checkpoint, tmp_path):
    for name in ("empty", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    for name in ("empty", "link"):
        convert_from_recbole(checkpoint, ITEMS, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


def write(path: Path, kind: str, checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    state, config = recbole_state(settings(), len(ITEMS), 5), settings()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "damaged":
        with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name)[:-40] if name.endswith("data.pkl") else old.read(name))
    elif kind == "a-short-tensor":
        with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name)[:8] if "/data/" in name else old.read(name))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello\n")
    elif kind == "weights-alone":
        torch.save(state, path)
    elif kind == "another-model":
        save_checkpoint(path, state, config | {"model": "SASRec"})
    elif kind == "a-weight-missing":
        del state["trm_encoder.layer.1.feed_forward.dense_1.bias"]
        save_checkpoint(path, state, config)
    elif kind == "another-loss":
        save_checkpoint(path, state, config | {"loss_type": "XE"})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot read"),
        ("damaged", "cannot read"),
        ("a-short-tensor", "cannot read"),
        ("empty", "cannot read"),
        ("text", "cannot read"),
        ("weights-alone", "no state_dict with a Config"),
        ("another-model", "holds the model 'SASRec'; expected BERT4Rec"),
        ("a-weight-missing", "missing or unexpected weights are trm_encoder.layer.1.feed_forward.dense_1.bias"),
        ("another-loss", "loss_type in .* must be one of CE, BPR; got 'XE'"),
    ],
)
def test_a_wrong_file_is_one_line_and_leaves_nothing(checkpoint, tmp_path, kind, message, capsys):
    write(tmp_path / "odd.pth", kind, checkpoint)
    (tmp_path / "ids.json").write_text(json.dumps(ITEMS))
    with pytest.raises(ValueError, match=message):
        convert_from_recbole(tmp_path / "odd.pth", ITEMS, tmp_path / "ours")
    words = ["convert", tmp_path / "odd.pth", "--items", tmp_path / "ids.json", "--output", tmp_path / "ours"]
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bert4rec convert: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.json", "odd.pth", "theirs.pth"]


# Pickles that create a file named "ran", one for each opcode that calls a function or builds an object.
COMMAND = b"touch ran"
TEXT = b"X" + struct.pack("<I", len(COMMAND)) + COMMAND
SYSTEM = b"cos\nsystem\n"
STACKED = b"\x8c\x02os\x8c\x06system\x93"
HOSTILE = {
    "reduce": SYSTEM + b"(" + TEXT + b"tR.",
    "reduce-stack-global": b"\x80\x04" + STACKED + b"(" + TEXT + b"tR.",
    "inst": b"(" + TEXT + b"ios\nsystem\n.",
    "obj": b"(" + SYSTEM + TEXT + b"o.",
    "newobj": b"\x80\x02" + b"csubprocess\nPopen\n(" + TEXT + b"t\x81.",
    "newobj-ex": b"\x80\x04" + b"csubprocess\nPopen\n(" + TEXT + b"t}\x92.",
    "build": b"cbuiltins\nobject\n)\x81}X\x01\x00\x00\x00a" + SYSTEM + b"sb.",
    "eval": b"cbuiltins\neval\n(X\x1a\x00\x00\x00__import__('os').mkdir('ran')tR.",
    "getattr": b"cbuiltins\ngetattr\n(" + SYSTEM + TEXT + b"tR.",
    "attribute-of-a-known-name": b"\x80\x04\x8c\x05torch\x8c\x0bdevice.load\x93(" + TEXT + b"tR.",
    "torch-load": b"ctorch\nload\n(" + TEXT + b"tR.",
    "numpy-load": b"cnumpy\nload\n(" + TEXT + b"tR.",
    "numpy-attribute": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__class__\x93(" + TEXT + b"tR.",
    "partial": b"cfunctools\npartial\n(" + SYSTEM + TEXT + b"tR.",
    "copyreg": b"ccopyreg\n_reconstructor\n(" + SYSTEM + b"cbuiltins\nobject\nNtR.",
    "runpy": b"crunpy\n_run_code\n(" + TEXT + b"tR.",
    "persistent": b"P" + COMMAND + b"\n.",
    "extension": b"\x80\x02\x82\xf0(" + TEXT + b"tR.",
    "reduce-on-a-string": TEXT + b"(tR.",
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "as-torch-saves"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_is_run(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    # A program may have registered an extension code, which stands for a function in the pickle.
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("os", "system"))
    path = tmp_path / "hostile.pth"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", HOSTILE[name])
    else:
        path.write_bytes(HOSTILE[name])
    for read in (read_pickle, read_items, functools.partial(convert_from_recbole, items=ITEMS, output="ours")):
        with pytest.raises(ValueError, match="cannot read"):
            read(path)
    assert os.listdir() == ["hostile.pth"]


class Stored:
    """An object that is pickled as `torch.save` pickles a tensor over a storage of four numbers."""

    def __init__(self, offset, size, stride):
        self.args = ("the storage", offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


def write_tensor(path: Path, stored: Stored, compression: int = zipfile.ZIP_STORED) -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if value == "the storage" else None

    content = io.BytesIO()
    Pickler(content, protocol=4).dump({"state_dict": {"weight": stored}})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content.getvalue())
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))


def test_an_extension_code_that_has_been_used_is_refused_as_well(tmp_path):
    copyreg.add_extension("os", "getcwd", 0xF1)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf1)R.") == os.getcwd()  # pickle caches the function of the code
        (tmp_path / "odd.pth").write_bytes(b"\x80\x02\x82\xf1)R.")
        with pytest.raises(ValueError, match="it has an extension code"):
            read_pickle(tmp_path / "odd.pth")
    finally:
        copyreg.remove_extension("os", "getcwd", 0xF1)


def test_a_tensor_is_read_from_within_its_storage_only(tmp_path):
    write_tensor(tmp_path / "good.pth", Stored(1, (1, 3), (3, 1)))
    assert read_pickle(tmp_path / "good.pth")["state_dict"]["weight"].tolist() == [[2, 3, 4]]
    odd = [
        Stored(2**62 - 1024, (4,), (1,)), Stored(2, (4,), (1,)), Stored(-1, (2,), (1,)), Stored(0, (2**62 + 1,), (1,)),
        Stored(0, (10**11,), (0,)), Stored(0, (2**33, 2**33), (2**33, 1)), Stored(3, (4,), (-1,)),
        Stored(0, (-4,), (1,)), Stored(0, ("a",), (1,)), Stored(0, 4, 1),
    ]  # fmt: skip
    for stored in odd:
        write_tensor(tmp_path / "odd.pth", stored)
        with pytest.raises(ValueError, match="cannot read"):
            read_pickle(tmp_path / "odd.pth")
    write_tensor(tmp_path / "odd.pth", Stored(0, (4,), (1,)), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="it is compressed"):
        read_pickle(tmp_path / "odd.pth")


def test_the_hostile_pickles_are_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for name in ("reduce", "reduce-stack-global", "inst", "obj"):
        pickle.loads(HOSTILE[name])
        ran.append(os.path.exists("ran"))
        Path("ran").unlink()
    assert all(ran)


def test_a_class_of_theirs_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "recbole"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "odd.pth").write_bytes(b"crecbole.config\nConfig\n)R.")
    assert type(read_pickle(tmp_path / "odd.pth")).__name__ == "Config"
    assert "recbole" not in sys.modules


def test_half_of_a_checkpoint_is_not_whole(checkpoint):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="it is incomplete; download it again"):
        read_checkpoint(checkpoint)


def test_sizes_that_the_weights_do_not_have_are_refused_before_a_model_is_made(tmp_path):
    config = settings()
    large = save_checkpoint(
        tmp_path / "theirs.pth", recbole_state(config, len(ITEMS), 5), config | {"hidden_size": 2048}
    )
    with pytest.raises(ValueError, match=r"hidden_size in .* is 2048, its item vectors have 8"):
        read_checkpoint(large)
