"""The tokenizer: every raw id survives the conversion to token ids and back."""

import copy
import logging
import pickle
import unicodedata

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoTokenizer

from bert4rec_hf import Bert4RecConfig, Bert4RecTokenizer

PAD, MASK, UNK, FIRST = 0, 1, 2, 3
AWKWARD = [
    "",
    " ",
    "  two  spaces ",
    "[MASK]",
    "[PAD]",
    "[UNK]",
    "\\[PAD]",
    "\\\\[MASK]",
    "\\[UNK",
    "[PAD]\n",
    "[mask]",
    " [MASK]",
    "\\",
    "\\\\",
    "</s>",
    "<s>",
    "<unk>",
    "##ing",
    'say "hello"',
    "it's",
    "a\nb",
    "a\r\nb",
    "a\tb",
    "null\x00byte",
    "caf\u00e9",
    unicodedata.normalize("NFD", "caf\u00e9"),
    "\u6771\u4eac",
    "\U0001f600",
    "\u200b",
    "\u00a0",
    "ABC",
    "abc",
    "007",
    "07",
    "7",
    "7.0",
    "-1",
    str(2**63 - 1),
    str(-(2**63)),
    "x" * 5000,
]


def save_next_to_a_config(tokenizer: Bert4RecTokenizer, folder) -> Bert4RecTokenizer:
    """Save a tokenizer beside a config, and load it as users do."""
    Bert4RecConfig(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is Bert4RecTokenizer
    return loaded


def through_pickle(tokenizer: Bert4RecTokenizer) -> Bert4RecTokenizer:
    return pickle.loads(pickle.dumps(tokenizer))


@pytest.fixture
def tokenizer() -> Bert4RecTokenizer:
    """The token ids are 3 for "10", 4 for "2", 5 for "30" and 6 for "b"."""
    return Bert4RecTokenizer.from_items(["b", "2", "30", "10"], model_max_length=4)


def test_items_are_numbered_from_3_sorted_by_raw_id(tokenizer):
    assert tokenizer.items == ["10", "2", "30", "b"]
    assert tokenizer.item_ids_to_token_ids(["10", "2", "30", "b"]) == [3, 4, 5, 6]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (PAD, MASK, UNK)
    assert (tokenizer.num_items, len(tokenizer)) == (4, 7)


def test_the_order_of_the_items_given_does_not_matter():
    forward, backward = Bert4RecTokenizer.from_items(list("abc")), Bert4RecTokenizer.from_items(list("cba"))
    assert forward.get_vocab() == backward.get_vocab()


@pytest.mark.parametrize("item", ["30", 30, np.int64(30), np.uint8(30), np.str_("30")], ids=lambda item: repr(item))
def test_integers_and_strings_are_the_same_item(tokenizer, item):
    assert tokenizer.item_ids_to_token_ids([item]) == [5]
    assert tokenizer([item], add_special_tokens=False)["input_ids"] == [5]
    assert Bert4RecTokenizer.from_items([item, 4]).items == ["30", "4"]
    assert Bert4RecTokenizer.from_items(["30"], titles={item: "Thirty"}).title(item) == "Thirty"
    assert Bert4RecTokenizer.from_items(["30"], counts={item: 9}).counts == [9]


NO_IDS = [
    3.0, np.float32(3), True, np.True_, None, ("3",), b"3", np.array(3.0), torch.tensor(3.0), np.array([3]),
    torch.tensor([3]), torch.tensor(True),
]  # fmt: skip


@pytest.mark.parametrize("item", NO_IDS, ids=lambda item: repr(item))
def test_an_id_of_another_type_is_an_error(tokenizer, item):
    with pytest.raises(TypeError, match="a string or an integer; got"):
        tokenizer.item_ids_to_token_ids(["10", item])
    with pytest.raises(TypeError, match="a string or an integer; got"):
        Bert4RecTokenizer.from_items(["10", item])
    with pytest.raises(TypeError, match="a string or an integer; got"):
        tokenizer(["10", item])


def test_awkward_raw_ids_are_kept_exactly():
    tokenizer = Bert4RecTokenizer.from_items(AWKWARD)
    assert tokenizer.items == sorted(AWKWARD)
    token_ids = tokenizer.item_ids_to_token_ids(AWKWARD)
    assert sorted(token_ids) == list(range(FIRST, FIRST + len(AWKWARD)))
    assert tokenizer.token_ids_to_item_ids(token_ids) == AWKWARD
    assert tokenizer(AWKWARD, add_special_tokens=False)["input_ids"] == token_ids


@pytest.mark.parametrize("copied", ["saved", "deepcopy", "pickle"])
def test_awkward_raw_ids_survive_saving_and_copying(tmp_path, copied):
    tokenizer = Bert4RecTokenizer.from_items(AWKWARD, model_max_length=77)
    copies = {"deepcopy": copy.deepcopy, "pickle": through_pickle}
    again = save_next_to_a_config(tokenizer, tmp_path) if copied == "saved" else copies[copied](tokenizer)
    assert again is not tokenizer
    assert again.items == tokenizer.items
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(AWKWARD)["input_ids"] == tokenizer(AWKWARD)["input_ids"]
    assert again(AWKWARD)["input_ids"][-1] == MASK
    assert len(again) == len(tokenizer) == FIRST + len(AWKWARD)
    assert again.model_max_length == 77
    assert (again.truncation_side, again.padding_side) == ("left", "right")
    assert (again.pad_token_id, again.mask_token_id, again.unk_token_id) == (PAD, MASK, UNK)
    assert (again.bos_token, again.eos_token) == (None, None)


def test_an_item_spelled_like_a_special_token_is_not_that_token():
    tokenizer = Bert4RecTokenizer.from_items(["[MASK]", "[PAD]", "[UNK]"])
    encoding = tokenizer(["[PAD]", "[UNK]", "[MASK]"])
    assert encoding["input_ids"] == [4, 5, 3, MASK]
    assert encoding["attention_mask"] == [1, 1, 1, 1]
    assert Bert4RecTokenizer.from_items(["a"]).item_ids_to_token_ids(["[MASK]", "\\[MASK]"]) == [UNK, UNK]


def test_titles_and_counts_survive_saving_and_copying(tmp_path):
    titles = {"10": "Caf\u00e9 \u6771\u4eac", "b": 'Say "b"\n'}
    tokenizer = Bert4RecTokenizer.from_items(["b", 2, 10], titles=titles, counts={10: 7, "b": np.int64(2)})
    for again in (save_next_to_a_config(tokenizer, tmp_path), through_pickle(tokenizer), copy.deepcopy(tokenizer)):
        assert again.titles == ["Caf\u00e9 \u6771\u4eac", None, 'Say "b"\n']
        assert again.counts == [7, 0, 2]
        assert again.title(10) == "Caf\u00e9 \u6771\u4eac"
        assert again.title("2") is None
        assert again.title("nowhere") is None


def test_a_catalogue_without_titles_and_counts_has_none(tokenizer, tmp_path):
    again = save_next_to_a_config(tokenizer, tmp_path)
    assert (again.titles, again.counts, again.title("b")) == (None, None, None)
    again.set_counts({"b": 3})
    assert again.counts == [0, 0, 0, 3]


def test_added_items_are_appended_and_nothing_is_renumbered(tmp_path):
    tokenizer = Bert4RecTokenizer.from_items(["m", "k"], titles={"k": "K"}, counts={"k": 5, "m": 6})
    assert tokenizer.add_items(["a", "[MASK]", "k", 9, "a"], titles={"a": "A", "m": "M"}) == 3
    saved = save_next_to_a_config(tokenizer, tmp_path)
    for grown in (tokenizer, saved, through_pickle(tokenizer)):
        assert grown.items == ["k", "m", "9", "[MASK]", "a"]
        assert grown.item_ids_to_token_ids(["k", "m", 9, "[MASK]", "a", "z"]) == [3, 4, 5, 6, 7, UNK]
        assert grown(["a", "[MASK]"])["input_ids"] == [7, 6, MASK]
        assert grown.counts == [5, 6, 0, 0, 0]
        assert grown.titles == ["K", "M", None, None, "A"]
        assert len(grown) == 8
    # Items can be added again after loading.
    assert saved.add_items(["0"]) == 1
    assert saved.items == ["k", "m", "9", "[MASK]", "a", "0"]
    assert tokenizer.add_items(["k", "a"]) == 0


@pytest.mark.parametrize("items", [["a", "b", "a"], ["7", 7], [1, np.int64(1)]], ids=["strings", "both", "integers"])
def test_a_duplicate_is_an_error_that_names_it(items):
    with pytest.raises(ValueError, match=f"item '{items[0]}' occurs twice"):
        Bert4RecTokenizer.from_items(items)


def test_an_empty_catalogue_is_an_error():
    with pytest.raises(ValueError, match="at least one item"):
        Bert4RecTokenizer.from_items([])


def test_token_ids_of_no_item_are_an_error_on_the_way_back(tokenizer):
    assert tokenizer.token_ids_to_item_ids(torch.tensor([6, 3])) == ["b", "10"]
    for token_id in (PAD, MASK, UNK, 7, -1):
        with pytest.raises(ValueError, match=f"token id {token_id} is no item; items have token ids 3 to 6"):
            tokenizer.token_ids_to_item_ids([3, token_id])


def test_append_mask_keeps_the_newest_items(tokenizer):
    assert tokenizer.append_mask([3, 4, 5, 6]) == [4, 5, 6, MASK]
    assert tokenizer.append_mask([3, 4, 5]) == [3, 4, 5, MASK]
    assert tokenizer.append_mask([3, 4, 5], max_length=2) == [5, MASK]
    assert tokenizer.append_mask([]) == [MASK]
    assert tokenizer.append_mask(np.array([3, 4, 5, 6, 3])) == [5, 6, 3, MASK]
    with pytest.raises(ValueError, match=r"max_length must be at least 2, .*; got 1"):
        tokenizer.append_mask([3], max_length=1)


def test_append_mask_leaves_its_argument_alone(tokenizer):
    history = [3, 4, 5, 6]
    tokenizer.append_mask(history)
    assert history == [3, 4, 5, 6]


def test_a_long_history_loses_its_oldest_items(tokenizer):
    history = ["10", "2", "30", "b", "10"]
    assert tokenizer(history)["input_ids"] == [5, 6, 3, MASK]
    assert tokenizer(history, max_length=3)["input_ids"] == [6, 3, MASK]
    plain = tokenizer(history, add_special_tokens=False, truncation=True, max_length=3)
    assert plain["input_ids"] == [5, 6, 3]
    assert tokenizer(history, add_special_tokens=False, truncation=True)["input_ids"] == [4, 5, 6, 3]
    assert tokenizer(history, add_special_tokens=False)["input_ids"] == [3, 4, 5, 6, 3]


def test_unknown_items_are_left_out_before_the_history_is_cut(tokenizer):
    assert tokenizer(["10", "2", "30", "x", "y", "z"])["input_ids"] == [3, 4, 5, MASK]


def test_unknown_items_are_left_out_with_one_warning_that_counts_them(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encoding = tokenizer([["10", "x", "2"], ["y"], ["b"], ["z", "z"]])
    assert encoding["input_ids"] == [[3, 4, MASK], [MASK], [6, MASK], [MASK]]
    assert [record.getMessage() for record in caplog.records] == [
        "left out 4 items of histories that the catalogue lacks"
    ]


def test_known_items_bring_no_warning(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer([["10", "2"], []])
        tokenizer([])
    assert caplog.records == []


def test_a_flat_list_is_one_history_and_a_list_of_lists_a_batch(tokenizer):
    assert tokenizer(["10", "2"]) == {"input_ids": [3, 4, MASK], "attention_mask": [1, 1, 1]}
    assert tokenizer([["10", "2"]])["input_ids"] == [[3, 4, MASK]]
    assert tokenizer([[10, 2], [30]])["input_ids"] == [[3, 4, MASK], [5, MASK]]
    assert tokenizer([]) == {"input_ids": [MASK], "attention_mask": [1]}
    assert tokenizer([[]])["input_ids"] == [[MASK]]
    assert tokenizer([[], ["b"]])["input_ids"] == [[MASK], [6, MASK]]
    assert tokenizer(("10", "2"))["input_ids"] == [3, 4, MASK]
    assert tokenizer(np.array([10, 2]))["input_ids"] == [3, 4, MASK]
    assert tokenizer(np.array([[10, 2], [30, 2]]))["input_ids"] == [[3, 4, MASK], [5, 4, MASK]]
    assert tokenizer(torch.tensor([10, 2]))["input_ids"] == [3, 4, MASK]
    assert tokenizer([torch.tensor(10), torch.tensor(2)])["input_ids"] == [3, 4, MASK]
    assert tokenizer(torch.tensor([[10, 2], [30, 2]]))["input_ids"] == [[3, 4, MASK], [5, 4, MASK]]


@pytest.mark.parametrize("history", ["10", [["10"], "30"], [["10"], 30]], ids=["text", "mixed-str", "mixed-int"])
def test_a_lone_id_where_a_history_belongs_is_an_error(tokenizer, history):
    with pytest.raises(TypeError, match=r"expected a .*list of histories.*; got '?[13]0"):
        tokenizer(history)


@pytest.mark.parametrize("history", [[b"10"], [["2"], b"10"], [["2"], [b"10"]]], ids=["flat", "mixed", "nested"])
def test_bytes_are_no_item_id(tokenizer, history):
    with pytest.raises(TypeError, match="got b'10'"):
        tokenizer(history)


def test_padding_gives_tensors(tokenizer):
    batch = tokenizer([["10", "2"], [], ["b"]], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[3, 4, MASK], [MASK, PAD, PAD], [6, MASK, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["input_ids"].dtype == torch.long
    left = tokenizer([["10", "2"], []], padding=True, padding_side="left", return_tensors="pt")
    assert left["input_ids"].tolist() == [[3, 4, MASK], [PAD, PAD, MASK]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    longest = tokenizer([["10"]], padding="max_length", max_length=4, return_tensors="pt")
    assert longest["input_ids"].tolist() == [[3, MASK, PAD, PAD]]
    assert tokenizer(["10", "2"], return_tensors="pt")["input_ids"].tolist() == [[3, 4, MASK]]
    assert "attention_mask" not in tokenizer(["10"], return_attention_mask=False)


def test_a_string_is_no_list_of_items():
    tokenizer = Bert4RecTokenizer.from_items(["50", "172"])
    for call in (Bert4RecTokenizer.from_items, tokenizer.add_items, tokenizer.item_ids_to_token_ids):
        with pytest.raises(TypeError, match=r"got '50': did you mean \['50'\]"):
            call("50")
    assert len(tokenizer) == 5


def test_items_are_not_added_as_tokens_that_nobody_would_know():
    tokenizer = Bert4RecTokenizer.from_items(["a"])
    for tokens in ("new", ["new"]):
        with pytest.raises(ValueError, match=r"got 'new': model.add_items\(tokenizer, items\)"):
            tokenizer.add_tokens(tokens)
    with pytest.raises(ValueError, match=r"but \[PAD\], \[MASK\], \[UNK\]; got '\[CLS\]'"):
        tokenizer.add_special_tokens({"additional_special_tokens": ["[CLS]"]})
    assert len(tokenizer) == 4


def test_titles_that_are_none_are_left_out():
    tokenizer = Bert4RecTokenizer.from_items(["a", "b"], titles={"a": float("nan"), "b": "Bee"})
    assert tokenizer.titles == [None, "Bee"]


@pytest.mark.parametrize("convert", [tuple, lambda rows: pandas.Series(rows, index=[7, 9])])
def test_a_history_may_be_anything_with_items_in_order(convert):
    tokenizer = Bert4RecTokenizer.from_items(["a", "b", "c"])
    assert tokenizer(convert(["c", "a"]))["input_ids"] == [5, 3, MASK]
    assert tokenizer(convert([["c", "a"], ["b"]]))["input_ids"] == [[5, 3, MASK], [4, MASK]]


def test_a_folder_without_a_catalogue_says_so(tmp_path):
    Bert4RecConfig(vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a catalogue; .*tokenizer.save_pretrained\(folder\) wrote"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_histories_are_not_cut_on_the_right():
    tokenizer = Bert4RecTokenizer.from_items(["a", "b"])
    tokenizer.truncation_side = "right"
    with pytest.raises(ValueError, match="histories lose their oldest items; got truncation_side 'right'"):
        tokenizer(["a", "b"], truncation=True, max_length=1, add_special_tokens=False)


def test_the_usual_options_of_a_tokenizer_do_what_they_say(tokenizer):
    items = tokenizer.items
    history = (items * 20)[:30]
    length = tokenizer.model_max_length
    assert length < 30
    assert len(tokenizer(history)["input_ids"]) == len(tokenizer.encode(history)) == length
    assert (
        len(tokenizer(history, truncation=False)["input_ids"]) == len(tokenizer.encode(history, truncation=False)) == 31
    )
    assert len(tokenizer(history, truncation=True, max_length=4)["input_ids"]) == 4
    assert len(tokenizer(history, add_special_tokens=False)["input_ids"]) == 30
    assert len(tokenizer(history, add_special_tokens=False, truncation=True)["input_ids"]) == length
    assert tokenizer.num_special_tokens_to_add() == 1
    assert tokenizer.max_len_single_sentence == length - 1
    found = tokenizer([items[:2], items[:1]], padding=True, return_special_tokens_mask=True, return_length=True)
    assert found["input_ids"] == [[3, 4, MASK], [3, MASK, PAD]]
    assert found["special_tokens_mask"] == [[0, 0, 1], [0, 1, 1]]
    assert found["length"] == [3, 2]
    for name in ("return_offsets_mapping", "return_overflowing_tokens", "return_token_type_ids"):
        with pytest.raises(ValueError, match=f"{name} is for text"):
            tokenizer(history, **{name: True})


def test_decode_shows_raw_ids():
    tokenizer = Bert4RecTokenizer.from_items(["[MASK]", "a b", "\\[PAD]"])
    ids = tokenizer(["[MASK]", "a b", "\\[PAD]"])["input_ids"]
    assert tokenizer.decode(ids) == "[MASK] a b \\[PAD] [MASK]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "[MASK] a b \\[PAD]"
    assert tokenizer.decode(torch.tensor(ids[:1])) == tokenizer.decode(ids[0]) == "[MASK]"
    assert tokenizer.batch_decode([ids[:1], ids[1:2]]) == ["[MASK]", "a b"]


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").mkdir()  # the library raises Exception itself
    with pytest.raises(OSError, match=r"cannot write the tokenizer into .*Is a directory"):
        tokenizer.save_pretrained(tmp_path)
