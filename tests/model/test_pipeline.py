"""The pipeline, loaded from a folder as a user loads it."""

import logging
import multiprocessing
import re

import datasets
import numpy as np
import pandas
import pytest
import torch
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from bert4rec_hf import Bert4RecConfig, Bert4RecForMaskedItemPrediction, Bert4RecTokenizer, ItemIndex

# Ids that a careless program would read as numbers, split, strip or take for a special token.
ODD = ["007", "a b", "[MASK]", "ünï"]
ITEMS = [*ODD, *map(str, range(100, 126))]
TITLES = {"007": "Goldfinger", "a b": "Two words", "100": "Hundred"}
LENGTH = 8


def save_model(folder, titles=TITLES, **options):
    torch.manual_seed(0)
    tokenizer = Bert4RecTokenizer.from_items(ITEMS, titles=titles, model_max_length=LENGTH)
    # Weights are large so that the history matters. Biases are set so that a test notices if they are left out.
    config = Bert4RecConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
        **options,
    )
    model = Bert4RecForMaskedItemPrediction(config)
    torch.nn.init.normal_(model.item_bias.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, **options):
    return pipeline("sequential-recommendation", model=folder, **({"device": "cpu"} | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), filter_seen_items=True)


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@pytest.fixture(scope="module")
def histories():
    random = np.random.default_rng(1)
    return [[], *(random.choice(ITEMS, size=random.integers(1, 15)).tolist() for _ in range(9))]


def ids(answer):
    return [entry["item_id"] for entry in answer]


def assert_equal_answers(answers, expected):
    """Compare answers, whose scores differ in the last digits if weights lie elsewhere in memory or batches differ."""
    assert len(answers) == len(expected)
    for answer, other in zip(answers, expected, strict=True):
        assert [entry | {"score": 0} for entry in answer] == [entry | {"score": 0} for entry in other]
        assert [entry["score"] for entry in answer] == pytest.approx([entry["score"] for entry in other], abs=1e-5)


def test_a_flat_list_is_one_history_and_gives_items_titles_and_descending_scores(pipe):
    answer = pipe(["100", "101", "007"], top_k=20)
    assert len(answer) == 20
    assert all(set(entry) == {"item_id", "title", "score"} for entry in answer)
    scores = [entry["score"] for entry in answer]
    assert scores == sorted(scores, reverse=True)
    assert len(set(ids(answer))) == 20
    assert all(entry["title"] == TITLES.get(entry["item_id"]) for entry in answer)
    assert any(entry["title"] for entry in answer)


def test_ten_items_come_back_unless_told_otherwise(pipe):
    assert len(pipe(["100"])) == 10


def test_without_titles_there_is_no_title_key(tmp_path):
    assert set(load(save_model(tmp_path, titles=None))(["100"])[0]) == {"item_id", "score"}


def test_the_score_is_the_models_logit_at_the_mask(pipe):
    history = ["007", "[MASK]", "110"]
    row = pipe.tokenizer.append_mask(pipe.tokenizer.item_ids_to_token_ids(history))
    with torch.no_grad():
        logits = pipe.model(torch.tensor([row])).logits[0, -1]
    for entry in pipe(history, top_k=30):
        token_id = pipe.tokenizer.item_ids_to_token_ids([entry["item_id"]])[0]
        assert entry["score"] == pytest.approx(logits[token_id].item(), abs=1e-5)


def test_all_odd_ids_come_back_as_they_were(pipe):
    assert sorted(ids(pipe([], top_k=len(ITEMS)))) == sorted(ITEMS)
    assert sorted(ids(pipe(["100"], candidates=ODD))) == sorted(ODD)


def test_a_list_of_lists_gives_a_list_with_the_answer_of_each(pipe, histories):
    answers = pipe(histories)
    assert isinstance(answers, list)
    assert_equal_answers(answers, [pipe(history) for history in histories])


def test_generators_and_datasets_give_a_stream_with_the_same_answers(pipe, histories):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(histories)

        def __getitem__(self, index):
            if index >= len(histories):
                raise IndexError(index)
            return histories[index]

    expected = pipe(histories)
    columns = {"user_id": list(map(str, range(len(histories)))), "item_id": histories}
    for stream in (iter(histories), Rows(), datasets.Dataset.from_dict(columns)):
        answers = pipe(stream)
        assert not isinstance(answers, list)
        assert_equal_answers([next(answers)], expected[:1])
        assert_equal_answers(list(answers), expected[1:])


def test_a_generator_is_not_read_to_its_end_before_the_first_answer(pipe):
    def forever():
        while True:
            yield ["100"]

    assert len(next(pipe(forever(), batch_size=4))) == 10


def test_a_stream_of_nothing_gives_nothing(pipe):
    empty = datasets.Dataset.from_dict({"item_id": []})
    assert list(pipe(iter([]))) == []
    assert list(pipe(empty)) == []


def test_arrays_tuples_and_integers_are_histories_too(pipe):
    expected = pipe(["100", "101", "102"])
    for history in (
        [100, 101, 102],
        ("100", "101", "102"),
        np.array([100, 101, 102]),
        np.array(["100", "101", "102"]),
        torch.tensor([100, 101, 102]),
    ):
        assert pipe(history) == expected
    assert_equal_answers(list(pipe(np.array([[100, 101, 102]] * 2))), [expected] * 2)


# Python forks workers on Linux up to version 3.13. From 3.14 on, it uses a fork server, and pickles what they get.
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_workers_answer_as_one_process_does(pipe, histories, caplog, monkeypatch, start_method):
    expected = pipe(histories, batch_size=4)
    # A lambda cannot be pickled, so workers that get the model are an error.
    monkeypatch.setattr(pipe.model, "not_for_workers", lambda: None, raising=False)
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(start_method, force=True)
    try:
        with caplog.at_level(logging.WARNING):
            assert_equal_answers(pipe(histories, batch_size=4, num_workers=2), expected)
        assert "num_workers" not in caplog.text
        assert_equal_answers(pipe([[]], num_workers=1), expected[:1])
        stream = pipe(datasets.Dataset.from_dict({"item_id": histories}), batch_size=4, num_workers=1)
        assert_equal_answers(list(stream), expected)
    finally:
        multiprocessing.set_start_method(usual, force=True)


def test_the_task_is_no_multimodal_one():
    assert PIPELINE_REGISTRY.check_task("sequential-recommendation")[1]["type"] == "text"


def test_a_mapping_brings_its_own_exclusions_and_candidates(pipe):
    best = ids(pipe(["100"], top_k=3))
    assert ids(pipe({"history": ["100"]}, top_k=3)) == best
    assert ids(pipe({"history": ["100"], "exclude": best[:1]}, top_k=2)) == best[1:]
    assert ids(pipe({"history": ["100"], "candidates": best[::-1]})) == best
    assert ids(pipe({"item_id": ["100"], "exclude": best[:1], "candidates": best})) == best[1:]
    # The exclusions of a row add to those of the call.
    rows = [{"history": ["100"], "exclude": []}, {"history": ["100"], "exclude": best[1:2]}]
    assert [ids(answer) for answer in pipe(rows, exclude=best[:1], top_k=2)] == [
        best[1:], [best[2], ids(pipe(["100"], top_k=4))[3]],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("excludes", "did you mean exclude"), ("candidate", "did you mean candidates"),
        ("age", "a history may have history, item_id, exclude, candidates"), ("top_k", "top_k is for all histories"),
    ],
)  # fmt: skip
def test_an_unknown_key_of_a_request_is_an_error(pipe, key, hint):
    with pytest.raises(ValueError, match=hint):
        pipe({"history": ["100"], key: ["101"]})
    # Other columns of histories.parquet are allowed.
    assert pipe({"item_id": ["100"], "user_id": "u", "train_end": 1}) == pipe(["100"])


def test_candidates_of_the_call_are_looked_up_once_for_all_histories(pipe, monkeypatch):
    best, given, recommend = ids(pipe(["100"], top_k=4)), [], pipe.model.recommend
    monkeypatch.setattr(
        pipe.model, "recommend", lambda **inputs: given.append(inputs["candidate_ids"]) or recommend(**inputs)
    )
    histories = [["100"], {"history": ["100"], "candidates": None}]
    assert [ids(answer) for answer in pipe(histories, candidates=best, batch_size=2)] == [best] * 2
    assert [candidates.shape for candidates in given] == [(4,)]
    histories = [{"history": ["100"], "candidates": best[:2]}, {"history": ["100"], "candidates": best[2:]}]
    assert [ids(answer) for answer in pipe(histories, batch_size=2)] == [best[:2], best[2:]]


def test_a_mapping_without_a_history_is_an_error(pipe):
    with pytest.raises(ValueError, match=r"needs the key history.*got the keys items"):
        pipe({"items": ["100"]})


def test_exclusions_and_candidates_of_the_call_hold_for_every_history(pipe):
    best = ids(pipe(["100"], top_k=4))
    for exclude in (best[:2], (item for item in best[:2])):  # the first history must not exhaust a generator
        assert [ids(answer) for answer in pipe([["100"]] * 3, exclude=exclude, top_k=2)] == [best[2:]] * 3
    for candidates in (best[1:], (item for item in best[1:])):
        assert [ids(answer) for answer in pipe([["100"]] * 3, candidates=candidates)] == [best[1:]] * 3


def test_excluding_an_unknown_item_changes_nothing(pipe):
    assert pipe(["100"], exclude=["no such item"]) == pipe(["100"])


def test_a_candidate_named_twice_is_recommended_once(pipe):
    assert sorted(ids(pipe(["100"], candidates=["101", 101, "102", "102"]))) == ["101", "102"]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_batches_give_what_single_histories_give(folder, histories, padding_side):
    pipe = load(folder)
    pipe.tokenizer.padding_side = padding_side
    rows = [{"history": history} for history in histories]
    rows[1]["candidates"] = ["105", "106", "107"]
    rows[4]["candidates"] = ["105"]
    rows[5]["exclude"] = ["100", "101"]
    expected = [pipe(row) for row in rows]
    assert len(expected[1]) <= 3
    assert len(expected[4]) <= 1
    for batch_size in (2, 3, len(rows)):
        assert_equal_answers(pipe(rows, batch_size=batch_size), expected)


def test_batches_of_a_list_are_of_like_length_and_answers_in_its_order(pipe, histories, monkeypatch):
    mixed = [[*history][:length] for history in histories for length in (4, 1, 3)]
    mixed[1] = {"history": mixed[1]}
    alone = [pipe(history) for history in mixed]
    widths = []
    recommend = pipe.model.recommend
    monkeypatch.setattr(
        pipe.model, "recommend", lambda **inputs: widths.append(inputs["input_ids"].shape[1]) or recommend(**inputs)
    )
    together = pipe(mixed, batch_size=len(histories))
    assert_equal_answers(together, alone)
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_the_folders_policy_filters_and_the_argument_overrides_it(pipe, tmp_path):
    history = ["100", "101", "102"]
    everything = len(ITEMS)
    assert sorted(ids(pipe(history, top_k=everything))) == sorted(set(ITEMS) - set(history))
    assert sorted(ids(pipe(history, top_k=everything, filter_seen_items=False))) == sorted(ITEMS)
    unfiltered = load(save_model(tmp_path, filter_seen_items=False))
    assert sorted(ids(unfiltered(history, top_k=everything))) == sorted(ITEMS)
    assert sorted(ids(unfiltered(history, top_k=everything, filter_seen_items=True))) == sorted(
        set(ITEMS) - set(history)
    )


def test_the_whole_history_is_filtered_also_before_the_models_window(pipe):
    history = ITEMS[:20]  # the model reads 7 of them
    assert sorted(ids(pipe(history, top_k=len(ITEMS)))) == sorted(ITEMS[20:])


def test_a_history_longer_than_the_model_scores_as_its_newest_items(pipe):
    options = {"top_k": 5, "filter_seen_items": False}
    assert pipe(ITEMS[:20], **options) == pipe(ITEMS[20 - LENGTH + 1 : 20], **options)
    assert pipe(ITEMS[:20], **options) != pipe(ITEMS[20 - LENGTH + 2 : 20], **options)


def test_a_user_who_has_had_everything_gets_nothing(pipe):
    assert pipe(ITEMS) == []
    assert pipe([["100"], ITEMS], batch_size=2)[1] == []


def test_an_empty_list_is_the_empty_history_and_gets_the_models_prior(pipe):
    mask = torch.tensor([[pipe.tokenizer.mask_token_id]])
    scores, token_ids = pipe.model.recommend(mask, top_k=10)
    answer = pipe([])
    assert ids(answer) == pipe.tokenizer.token_ids_to_item_ids(token_ids[0].tolist())
    assert [entry["score"] for entry in answer] == pytest.approx(scores[0].tolist(), abs=1e-5)
    assert pipe([[]]) == [answer]


def test_only_unknown_items_are_as_good_as_none(pipe):
    assert pipe(["nobody", "knows"]) == pipe([])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_unknown_items_are_left_out_with_one_warning_that_names_how_many(pipe, caplog, batch_size):
    with caplog.at_level(logging.WARNING, logger="bert4rec_hf"):
        answers = pipe([["100", "x", "101"], ["y", "z"], ["102"]], batch_size=batch_size)
    assert [record.getMessage() for record in caplog.records] == [
        "left out 3 items that the catalogue lacks, such as 'y', 'z', 'x'"  # the shortest history comes first
    ]
    assert_equal_answers(answers, pipe([["100", "101"], [], ["102"]]))


def test_known_items_give_no_warning(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="bert4rec_hf"):
        pipe([["100"], []])
        pipe(["100"])
    assert caplog.records == []


def test_one_history_with_unknown_items_warns_too(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="bert4rec_hf"):
        pipe(["100", "x"])
    assert len(caplog.records) == 1
    assert "left out 1 items that the catalogue lacks, such as 'x'" in caplog.text


def test_the_warning_names_the_first_three_unknown_items_of_its_own_call(pipe, caplog):
    with caplog.at_level(logging.WARNING, logger="bert4rec_hf"):
        list(pipe(history for history in (["u", "u", "100"], ["v", "w", "x"])))
        pipe({"history": ["y"]})
    assert [record.getMessage().removeprefix("left out ") for record in caplog.records] == [
        "5 items that the catalogue lacks, such as 'u', 'v', 'w'",
        "1 items that the catalogue lacks, such as 'y'",
    ]


def test_top_k_above_the_catalogue_gives_the_catalogue(pipe):
    assert len(pipe([], top_k=1000)) == len(ITEMS)


@pytest.mark.parametrize("top_k", [0, -1, 2.5, "3"])
def test_a_top_k_that_is_no_positive_whole_number_is_an_error(pipe, top_k):
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1"):
        pipe(["100"], top_k=top_k)


def test_unknown_candidates_are_left_out_with_a_warning(pipe, caplog):
    expected = pipe(["100"], candidates=["101", "102"])
    rows = [
        {"history": ["100"], "candidates": ["101", "x", "102"]},
        {"history": ["100", "z"], "candidates": ["y", "101"]},
    ]
    with caplog.at_level(logging.WARNING, logger="bert4rec_hf"):
        assert pipe(["100"], candidates=["101", "x", "102", "y"]) == expected
        answers = pipe(rows)
    assert_equal_answers(answers, [expected, pipe(["100"], candidates=["101"])])
    assert [record.getMessage().removeprefix("left out ") for record in caplog.records] == [
        "2 items that the catalogue lacks, such as 'x', 'y'",
        "3 items that the catalogue lacks, such as 'x', 'y', 'z'",
    ]


def test_candidates_of_which_none_is_known_are_an_error(pipe):
    for call in (
        lambda: pipe(["100"], candidates=["x", "y"]),
        lambda: pipe({"history": ["100"], "candidates": ["x", "y"]}),
    ):
        with pytest.raises(
            ValueError, match="none of the 2 candidates, the first is 'x'; the ids of the catalogue look like '"
        ):
            call()


def test_no_candidates_are_an_error(pipe):
    with pytest.raises(ValueError, match="candidates is empty"):
        pipe(["100"], candidates=[])


def test_a_string_in_the_place_of_a_list_is_an_error_that_suggests_the_list(pipe):
    # Read letter by letter, "100" would be a history of three unknown items.
    for call in (
        lambda: pipe("100"),
        lambda: pipe([["100"], "101"]),
        lambda: pipe({"history": "100"}),
        lambda: pipe(["100"], exclude="101"),
        lambda: pipe(["100"], candidates="101"),
        lambda: pipe({"history": ["100"], "exclude": "101"}),
    ):
        with pytest.raises(ValueError, match=r"got the string '10.': did you mean \['10.'\]"):
            call()


def test_options_of_the_constructor_hold_until_the_call_says_otherwise(folder):
    pipe = load(folder, top_k=3, filter_seen_items=False, revision="main")
    assert len(pipe(["100"])) == 3
    assert len(pipe(["100"], top_k=4)) == 4
    assert len(pipe(["100"], top_k=len(ITEMS))) == len(ITEMS)


def test_half_precision_weights_load_and_answer_with_finite_scores(folder):
    pipe = load(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.model.parameters()} == {torch.bfloat16}
    answer = pipe(["100", "101"], top_k=len(ITEMS))
    assert len(answer) == len(ITEMS) - 2
    assert np.isfinite([entry["score"] for entry in answer]).all()


def test_a_saved_pipeline_loads_again_without_trusting_remote_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "items.json"}
    assert not [name for name in names if name.endswith(".py")]
    assert_equal_answers([load(tmp_path / "copy")(["100", "a b"])], [pipe(["100", "a b"])])


def test_the_jth_recommendation_has_rank_j_for_each_of_50_users(pipe):
    random = np.random.default_rng(2)
    for _ in range(50):
        history = random.choice(ITEMS, size=random.integers(0, 12)).tolist()
        token_ids = pipe.tokenizer.item_ids_to_token_ids(history)
        targets = torch.tensor(pipe.tokenizer.item_ids_to_token_ids(ids(pipe(history, top_k=len(ITEMS)))))
        row = torch.tensor([pipe.tokenizer.append_mask(token_ids)]).expand(len(targets), -1)
        seen = torch.tensor([token_ids or [0]]).expand(len(targets), -1)
        ranks = pipe.model.rank(row, targets, exclude_ids=seen)
        assert ranks.tolist() == list(range(1, len(targets) + 1))
        if token_ids:
            assert pipe.model.rank(row[:1], torch.tensor(token_ids[:1]), exclude_ids=seen[:1]).tolist() == [0]


def test_an_index_that_looks_at_everything_answers_as_the_exact_search(pipe, histories, tmp_path):
    ItemIndex.build(pipe.model).save(tmp_path / "items.faiss")
    index = ItemIndex.load(tmp_path / "items.faiss")
    rows = [*histories, {"history": ["007"], "exclude": ["100", "101"]}, {"history": ["100"], "candidates": ["007"]}]
    exact, near = pipe(rows, top_k=5), pipe(rows, top_k=5, index=index)
    assert [ids(answer) for answer in near] == [ids(answer) for answer in exact]
    assert all(len(answer) == 5 for answer in near[:-1])
    for one, other in zip(near, exact, strict=True):
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-5)
    batched = pipe(rows, top_k=5, index=index, batch_size=4)
    assert [ids(answer) for answer in batched] == [ids(answer) for answer in exact]
    # top_k may be larger than the catalogue.
    assert len(pipe(["007"], top_k=99, index=index)) == len(ITEMS) - 1


def test_what_follows_the_newest_items_is_found_beside_what_an_index_finds(histories, tmp_path):
    model = Bert4RecForMaskedItemPrediction.from_pretrained(save_model(tmp_path, num_transitions=2))
    model.history_scores.successor_ids[3:] = torch.stack([torch.randperm(len(ITEMS))[:2] + 3 for _ in ITEMS])
    model.history_scores.successor_scores[3:] = 30  # more than the network's scores differ by
    model.save_pretrained(tmp_path)
    pipe = load(tmp_path)
    rows = [*histories, {"history": ["007", "a b"], "exclude": ["100", "101"]}]
    exact, near = pipe(rows, top_k=2), pipe(rows, top_k=2, index=ItemIndex.build(model), batch_size=4)
    for one, other in zip(near, exact, strict=True):
        assert ids(one) == ids(other)
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-5)
    pipe.model.history_scores.successor_scores.zero_()
    assert ids(pipe(rows[-1], top_k=2)) != ids(exact[-1])


@pytest.mark.parametrize("options", [{"num_transitions": 3}, {"repeat_weight": 30.0}], ids=["next", "repeats"])
def test_what_a_history_adds_to_is_found_for_each_of_a_batch_and_for_an_empty_one(tmp_path, options):
    items = [f"item {number}" for number in range(500)]
    tokenizer = Bert4RecTokenizer.from_items(items, model_max_length=12)
    sizes = {"max_position_embeddings": 12, "hidden_size": 16, "num_attention_heads": 1}
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(tokenizer), **sizes, **options)).eval()
    if "num_transitions" in options:
        model.history_scores.successor_ids[:] = torch.stack(
            [torch.randperm(len(items))[:3] + 3 for _ in range(len(tokenizer))]
        )
        model.history_scores.successor_scores[:] = 30  # more than the network's scores differ by
    pipe = pipeline("sequential-recommendation", model=model, tokenizer=tokenizer, device="cpu")
    rows = [[], items[:1], items[5:9], [*items[20:40], items[39]]]
    exact, near = pipe(rows, top_k=3), pipe(rows, top_k=3, index=ItemIndex.build(model), batch_size=4)
    assert [ids(answer) for answer in near] == [ids(answer) for answer in exact]


def test_an_index_of_another_model_is_an_error(pipe, tmp_path):
    other = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=len(pipe.tokenizer), hidden_size=8))
    with pytest.raises(ValueError, match="the index has vectors of width 9, the model of width 17: build it from"):
        pipe(["007"], index=ItemIndex.build(other))
    smaller = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=13, hidden_size=16))
    with pytest.raises(ValueError, match="the index has 10 items, the catalogue 30: build it from this model"):
        pipe(["007"], index=ItemIndex.build(smaller))


def test_a_data_frames_columns_are_histories(pipe, histories):
    frame = pandas.DataFrame({"user": [7, 7, 9], "item": ["100", "101", "102"]}, index=[3, 4, 8])
    assert pipe(frame.item) == pipe(["100", "101", "102"])
    grouped = frame.groupby("user").item.apply(list)
    assert list(pipe(grouped)) == pipe([["100", "101"], ["102"]])


def test_what_is_for_the_call_is_not_lost_in_a_history(pipe):
    with pytest.raises(ValueError, match="top_k is for all histories of a call"):
        pipe({"history": ["100"], "top_k": 1})
    with pytest.raises(ValueError, match="filter_seen_items is for all histories"):
        pipe([{"history": ["100"], "filter_seen_items": False}])


def test_top_k_is_any_whole_number(pipe):
    assert pipe(["100"], top_k=np.int64(3)) == pipe(["100"], top_k=3)
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1; got True"):
        pipe(["100"], top_k=True)


def test_a_model_that_has_just_been_trained_answers_without_dropout(folder, pipe):
    model = Bert4RecForMaskedItemPrediction.from_pretrained(folder).train()
    fresh = pipeline("sequential-recommendation", model=model, tokenizer=pipe.tokenizer, device="cpu")
    assert_equal_answers([fresh(["100", "007"])], [pipe(["100", "007"])])


def test_an_index_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="missing is no index, or a damaged one"):
        ItemIndex.load(tmp_path / "missing")


def test_a_model_that_is_larger_than_its_catalogue_is_an_error(folder, pipe):
    model = Bert4RecForMaskedItemPrediction.from_pretrained(folder)
    model.resize_token_embeddings(64)
    with pytest.raises(ValueError, match=r"the tokenizer has 33 token ids, the model 64: give the tokenizer of"):
        pipeline("sequential-recommendation", model=model, tokenizer=pipe.tokenizer, device="cpu")


def test_a_loaded_index_looks_as_far_as_the_one_that_was_saved(tmp_path):
    torch.manual_seed(0)
    model = Bert4RecForMaskedItemPrediction(Bert4RecConfig(vocab_size=4003, hidden_size=64, initializer_range=1.0))
    built = ItemIndex.build(model)
    built.save(tmp_path / "items.faiss")
    loaded = ItemIndex.load(tmp_path / "items.faiss")
    vectors = torch.randn(20, 65)
    assert torch.equal(loaded.search(vectors, 10)[1], built.search(vectors, 10)[1])
    narrow = ItemIndex.load(tmp_path / "items.faiss", num_probes=1)
    assert not torch.equal(narrow.search(vectors, 10)[1], built.search(vectors, 10)[1])
    exact = model.item_vectors().matmul(vectors.T).topk(10, dim=0).indices.T + 3
    all_lists = ItemIndex.load(tmp_path / "items.faiss", num_probes=10**6)
    assert torch.equal(all_lists.search(vectors, 10)[1], exact)
    # One list has too few items, so all are read.
    scores, token_ids = narrow.search(vectors, 4005)
    assert torch.equal(token_ids[:, :10], exact)
    assert torch.equal(token_ids.sort(dim=1).values, torch.tensor([0, 0, 0, 0, 0, *range(3, 4003)]).expand(20, -1))
    assert scores[:, 4000:].isneginf().all()
    for content in ((tmp_path / "items.faiss").read_bytes()[:5000], b"", b"no index"):
        (tmp_path / "items.faiss").write_bytes(content)
        with pytest.raises(ValueError, match="is no index, or a damaged one"):
            ItemIndex.load(tmp_path / "items.faiss")
    for build in (lambda: ItemIndex.build(model, num_lists=5000), lambda: ItemIndex.build(model, num_probes=0)):
        with pytest.raises(ValueError, match=r"num_(lists|probes) must"):
            build()


def test_weights_that_are_not_finite_are_an_error_for_an_index_too(folder, pipe):
    model = Bert4RecForMaskedItemPrediction.from_pretrained(folder)
    index = ItemIndex.build(model)
    torch.nn.init.constant_(model.model.norm.bias, torch.nan)
    diverged = pipeline("sequential-recommendation", model=model, tokenizer=pipe.tokenizer, device="cpu", index=index)
    with pytest.raises(ValueError, match="a user vector is NaN"):
        diverged(["100"])
    torch.nn.init.constant_(model.item_bias.weight, torch.nan)
    with pytest.raises(ValueError, match="an item vector is NaN"):
        ItemIndex.build(model)


def test_a_table_is_no_history(pipe):
    frame = pandas.DataFrame({"user_id": [1, 2], "item_id": [["100"], ["101"]]})
    with pytest.raises(ValueError, match=r"got a table: give its column of item ids, as in frame\['item_id'\]"):
        pipe(frame)


LIST = "must be a list of item ids; got "
ITEM = "an item id is a string or an integer; got "


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, LIST + "None"), (7, LIST + "7 of type int"), (b"100", LIST + "b'100' of type bytes"),
        (bytearray(b"ab"), LIST + "bytearray"), (3.5, LIST + "3.5"), (True, LIST + "True of type bool"),
        ("100", r"got the string '100': did you mean \['100'\]"), (np.array(100), LIST + r"array\(100\)"),
        ({"100", "101"}, "must be a list, oldest item first; got .* of type set, which has no order"),
        (frozenset(["100"]), "of type frozenset, which has no order"),
        ([["100"]], rf"item 0 of the history \(the first is 0\): {ITEM}\['100'\] of type list"),
        (["100", None], rf"item 1 of the history \(the first is 0\): {ITEM}None"),
        (["100", 1.0], f"item 1 of the history .*{ITEM}1.0"), ([True], f"item 0 of the history .*{ITEM}True"),
        ([b"100"], f"item 0 of the history .*{ITEM}b'100'"), (np.array([100.0]), f"item 0 of the history .*{ITEM}"),
        (np.array([["100"]]), f"item 0 of the history .*{ITEM}"), ([{"item_id": "100"}], f"item 0 of .*{ITEM}"),
        (pandas.DataFrame({"item_id": ["100"]}), LIST + ".*DataFrame"),
        ({}, r"needs the key history.*got the keys \(none\)"), ({"exclude": ["100"]}, "got the keys exclude"),
        ({5: ["100"]}, "got the keys 5"), ({"history": None}, f"the history {LIST}None"),
        ({"history": {"100": 1}}, f"the history {LIST}{{'100': 1}}"), ({"history": 5}, f"the history {LIST}5"),
        ({"history": ["100"], "item_id": ["101"]}, "the keys history and item_id, which mean the same"),
        ({"history": [], "exclude": 5}, f"exclude {LIST}5"), ({"history": [], "exclude": b"1"}, f"exclude {LIST}b'1'"),
        ({"history": [], "exclude": [None]}, rf"item 0 of exclude \(the first is 0\): {ITEM}None"),
        ({"history": [], "candidates": "100"}, r"candidates must be a list.*did you mean \['100'\]"),
        ({"history": [], "candidates": 5}, f"candidates {LIST}5"),
        ({"history": [], "candidates": {"100": 1}}, f"candidates {LIST}"),
        ({"history": [], "candidates": ["100", ["101"]]}, f"item 1 of candidates .*{ITEM}"),
        ({"history": [], "canddates": ["100"]}, "unknown key 'canddates' beside a history: did you mean candidates"),
    ],
)  # fmt: skip
def test_a_wrong_request_among_others_is_an_error_that_says_which_and_what_was_expected(pipe, wrong, message):
    element = rf"element 2 of the input \(the first is 0\): .*{message}"
    for batch_size in (1, 4):
        with pytest.raises(ValueError, match=element):
            pipe([["100"], ["101"], wrong, ["102"]], batch_size=batch_size)
    answers = pipe(history for history in ([["100"], {"history": ["101"]}, wrong]))
    with pytest.raises(ValueError, match=element):
        list(answers)
    if isinstance(wrong, dict):
        with pytest.raises(ValueError, match=message):
            pipe(wrong)


@pytest.mark.parametrize("wrong", [None, 7, 3.5, b"100", {"100"}, frozenset(), np.array(7), torch.tensor(7), object()])
def test_an_input_that_is_no_list_is_an_error_at_once(pipe, wrong):
    with pytest.raises(
        ValueError, match="expected a history, a list of item ids, oldest first, or many histories; got"
    ):
        pipe(wrong)


@pytest.mark.parametrize("history", [[None, ["100"]], ["100", ["101"]], ["100", {"history": ["101"]}]])
def test_a_history_with_another_inside_is_an_error_that_names_the_item(pipe, history):
    with pytest.raises(
        ValueError, match=r"item [01] of the history \(the first is 0\): an item id is a string or an int"
    ):
        pipe(history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": 5}, f"exclude {LIST}5"), ({"exclude": {"100": 1}}, f"exclude {LIST}"),
        ({"exclude": ["100", None]}, "item 1 of exclude"), ({"exclude": b"100"}, f"exclude {LIST}b'100'"),
        ({"candidates": 5}, f"candidates {LIST}5"), ({"candidates": [["100"]]}, "item 0 of candidates"),
        ({"filter_seen_items": "no"}, "filter_seen_items must be True, False or None; got 'no'"),
        ({"filter_seen_items": 2}, "filter_seen_items must be True, False or None; got 2"),
        ({"index": "items.faiss"}, r"index must be an ItemIndex, for example ItemIndex.load\(path\); got 'items"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        ({"batch_size": "8"}, "batch_size must be a whole number of at least 1; got '8'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_of_the_call_is_an_error(pipe, options, message):
    for inputs in (["100"], [["100"], ["101"]], iter([["100"]])):
        with pytest.raises(ValueError, match=message):
            pipe(inputs, **options)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("topk", "did you mean top_k?"), ("excludes", "did you mean exclude?"), ("age", "expected one of top_k, filter_")],
)
def test_an_unknown_argument_is_an_error_that_names_the_nearest(folder, pipe, name, hint):
    for call in (lambda: pipe(["100"], **{name: 3}), lambda: load(folder, **{name: 3})):
        with pytest.raises(TypeError, match=re.escape(f"unknown argument {name!r}: {hint}")):
            call()


def test_sets_are_exclusions_and_candidates_too(pipe):
    best = ids(pipe(["100"], top_k=3))
    assert ids(pipe(["100"], exclude={best[0]}, top_k=2)) == best[1:]
    assert ids(pipe({"history": ["100"], "candidates": set(best)})) == best


def test_exclusions_and_candidates_of_call_and_row_meet_in_one_batch(pipe):
    best = ids(pipe(["100"], top_k=6))
    rows = [
        ["100"], {"history": ["100"], "exclude": best[2:3]}, {"history": ["100"], "candidates": best[:4]},
        {"history": ["100"], "candidates": best[4:], "exclude": best[5:]},
    ]  # fmt: skip
    expected = [best[1:5], [best[1], *best[3:5]], best[1:4], best[4:5]]
    for batch_size in (1, 4):
        answers = pipe(rows, exclude=best[:1], candidates=best[:5], batch_size=batch_size)
        assert [ids(answer) for answer in answers] == expected


def without_because(answers):
    return [[{key: entry[key] for key in entry if key != "because"} for entry in answer] for answer in answers]


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A pipeline whose model has counted scores of every kind, and recommends seen items again."""
    folder = save_model(
        tmp_path_factory.mktemp("counting"), filter_seen_items=False, num_transitions=3, next_item_weight=1.0,
        repeat_weight=1.0, recency_weight=0.5,
    )  # fmt: skip
    model = Bert4RecForMaskedItemPrediction.from_pretrained(folder)
    scores = model.history_scores
    scores.successor_ids[3:] = torch.stack([torch.randperm(len(ITEMS))[:3] + 3 for _ in ITEMS])
    scores.successor_scores[3:] = torch.rand(len(ITEMS), 3)
    scores.next_item_scores[3:] = torch.rand(len(ITEMS), 3)
    model.save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_explaining_changes_no_recommendation(pipe, counting, histories, batch_size):
    rows = [
        *histories,
        {"history": ["007", "a b", "007"], "candidates": ["100", "101", "102", "103"]},
        {"history": ITEMS[:20], "exclude": ["120"]},
    ]
    for each in (pipe, counting):
        for options in ({"top_k": 4}, {"exclude": ["104"]}, {"candidates": ["105", "106", "107"]}):
            plain = each(rows, batch_size=batch_size, **options)
            explained = each(rows, batch_size=batch_size, explain=True, **options)
            assert without_because(explained) == plain
            assert all("because" in entry for answer in explained for entry in answer)
            assert any(len(entry["because"]) == 3 for answer in explained for entry in answer)


def test_an_explanation_names_the_strongest_items_of_the_history_with_titles(counting):
    history = ["007", "100", "110", "007", "111", "112"]
    tokenizer = counting.tokenizer
    answer = counting(history, top_k=5, explain=True)
    token_ids = torch.tensor([tokenizer.item_ids_to_token_ids(ids(answer))])
    history_ids = torch.tensor([tokenizer.item_ids_to_token_ids(history)])
    sources, contributions = counting.model.explain(tokenizer, history_ids, token_ids)
    names = tokenizer.token_ids_to_item_ids(sources[0].tolist())
    for entry, values in zip(answer, contributions[0].tolist(), strict=True):
        strongest = sorted(zip(values, names, strict=True), reverse=True)[:3]
        expected = [(item, value) for value, item in strongest if value > 0]
        assert [source["item_id"] for source in entry["because"]] == [item for item, _ in expected]
        found = [source["contribution"] for source in entry["because"]]
        assert found == pytest.approx([value for _, value in expected], abs=1e-5)
        for source in entry["because"]:
            assert set(source) == {"item_id", "title", "contribution"}
            assert source["title"] == TITLES.get(source["item_id"])
    assert {len(entry["because"]) for entry in answer} <= {1, 2, 3}


def test_explanations_have_no_title_where_there_are_none(tmp_path):
    answer = load(save_model(tmp_path, titles=None))(["100", "101"], explain=True)
    assert {key for entry in answer for source in entry["because"] for key in source} == {"item_id", "contribution"}


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_explanations_of_a_batch_are_those_of_single_histories(counting, histories, padding_side, monkeypatch):
    monkeypatch.setattr(counting.tokenizer, "padding_side", padding_side)
    alone = [counting(history, explain=True) for history in histories]
    together = counting(histories, explain=True, batch_size=4)
    assert_equal_answers(without_because(together), without_because(alone))
    for one, other in zip(alone, together, strict=True):
        for entry, same in zip(one, other, strict=True):
            assert ids(entry["because"]) == ids(same["because"])
            values = [source["contribution"] for source in entry["because"]]
            assert [source["contribution"] for source in same["because"]] == pytest.approx(values, abs=1e-5)


def test_an_index_can_be_explained_and_an_empty_history_has_no_cause(pipe):
    exact = pipe(["100", "007"], explain=True)
    near = pipe(["100", "007"], explain=True, index=ItemIndex.build(pipe.model))
    assert [ids(entry["because"]) for entry in near] == [ids(entry["because"]) for entry in exact]
    assert [entry["because"] for entry in pipe([], top_k=2, explain=True)] == [[], []]
    assert pipe(ITEMS, explain=True) == []


def test_explain_is_an_option_of_the_pipeline_that_a_call_can_turn_off(folder):
    explaining = load(folder, explain=True)
    assert "because" in explaining(["100"])[0]
    assert "because" not in explaining(["100"], explain=False)[0]
    with pytest.raises(ValueError, match="explain must be True, False or None; got 'yes'"):
        explaining(["100"], explain="yes")
    with pytest.raises(ValueError, match="explain is for all histories of a call"):
        explaining({"history": ["100"], "explain": True})


def test_similar_items_of_one_item_and_of_a_list(counting):
    one = counting.similar("007", top_k=4)
    assert [set(entry) for entry in one] == [{"item_id", "title", "score"}] * 4
    scores, token_ids = counting.model.similar_items(
        torch.tensor(counting.tokenizer.item_ids_to_token_ids(["007"])), top_k=4
    )
    assert ids(one) == counting.tokenizer.token_ids_to_item_ids(token_ids[0].tolist())
    assert [entry["score"] for entry in one] == pytest.approx(scores[0].tolist())
    assert "007" not in ids(counting.similar("007", top_k=100))
    assert len(counting.similar("007", top_k=100)) == len(ITEMS) - 1
    assert len(counting.similar("007")) == 10
    assert_equal_answers(counting.similar(["100", "007", "100"], top_k=4)[1:2], [one])
    assert counting.similar(np.array([100, 101]), top_k=1) == counting.similar(("100", "101"), top_k=1)
    assert counting.similar(100) == counting.similar(np.int64(100)) == counting.similar("100")
    assert counting.similar([]) == []


def test_similar_items_of_more_items_than_are_searched_at_once(counting, monkeypatch):
    expected = counting.similar(ITEMS, top_k=3)
    monkeypatch.setattr("bert4rec_hf.model.pipeline.SIMILAR_BATCH_SIZE", 4)
    assert_equal_answers(counting.similar(ITEMS, top_k=3), expected)


def test_similar_items_have_limits_and_those_of_the_pipeline_hold_until_the_call_says_otherwise(pipe, folder, caplog):
    best = ids(pipe.similar("100", top_k=5))
    assert ids(pipe.similar("100", top_k=3, exclude=best[:2])) == best[2:]
    assert ids(pipe.similar("100", candidates=[*best[3:], "x", "100"])) == best[3:]
    assert "left out 1 items that the catalogue lacks, such as 'x'" in caplog.text
    limited = load(folder, top_k=2, exclude=best[:1], explain=True)
    assert ids(limited.similar("100")) == best[1:3]
    assert ids(limited.similar("100", top_k=3, exclude=[])) == best[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1000"], r"the catalogue lacks the item '1000'; expected one of its 30 ids, such as '100'"),
        (["no such item at all"], r"lacks the item 'no such item at all'; expected one of its 30 ids, such as '007', "),
        ([["100", "x"]], "the catalogue lacks the item 'x'"), ([None], "item 0 of items .*got None"),
        ([1.5], "item 0 of items .*got 1.5"), ([[["100"]]], "item 0 of items"), ([{"100": 1}], "items must be a list"),
        ([{"100"}], "items must be a list; got .* of type set, which has no order"),
        (["100", 0], "top_k must be a whole number of at least 1; got 0"), (["100", 3, "1"], "exclude must be a list"),
        (["100", 3, None, ["x"]], "the catalogue has none of the 1 candidates"),
    ],
)  # fmt: skip
def test_a_wrong_request_for_similar_items_is_an_error(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.similar(*arguments)


def test_a_large_catalogue_is_not_searched_for_the_nearest_id(pipe, monkeypatch):
    monkeypatch.setattr("bert4rec_hf.model.pipeline.MAX_COMPARED_IDS", 29)
    with pytest.raises(
        ValueError, match=r"lacks the item '1000'; expected one of its 30 ids, such as '007', '100', '1"
    ):
        pipe.similar("1000")


def test_half_precision_models_explain_and_find_similar_items(counting, tmp_path):
    counting.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    answer = half(["100", "007", "110"], explain=True)
    assert any(entry["because"] for entry in answer)
    assert np.isfinite([source["contribution"] for entry in answer for source in entry["because"]]).all()
    assert ids(half.similar("100", top_k=3)) == ids(counting.similar("100", top_k=3))
