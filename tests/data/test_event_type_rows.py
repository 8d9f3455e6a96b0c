"""Logs with event types: targets, rows and batches, with answers by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from bert4rec_hf import (
    Bert4RecConfig,
    Bert4RecForMaskedItemPrediction,
    Bert4RecTokenizer,
    Bert4RecTrainer,
    Bert4RecTrainingArguments,
    DataCollatorForMaskedItemPrediction,
    prepare,
    ranking_rows,
    read_prepared,
    training_rows,
)
from bert4rec_hf.data.counting import item_counts, transitions
from bert4rec_hf.data.histories import stream_prepared
from bert4rec_hf.data.preparation import histories
from bert4rec_hf.data.rows import StreamedTrainingRows, stream_training_rows
from bert4rec_hf.evaluation.baselines import baseline_ranks, personal_popularity_ranks

PAD, MASK, IGNORED = 0, 1, -100
# Of each user, the events in order, as pairs of an item and a type.
LOG = {
    "a": ["x view", "x buy", "y view", "z buy", "y cart", "y buy", "q view"],
    "b": ["x buy", "z buy"],
    "c": ["x view", "z view"],
    "d": ["x view", "z buy", "x buy"],
}
OPTIONS = {"event_type_column": "event_type", "target_event_types": ["buy"]}


def frame(log: dict[str, list[str]] = LOG) -> pd.DataFrame:
    rows = [(user, time, *event.split()) for user, events in log.items() for time, event in enumerate(events)]
    return pd.DataFrame(rows, columns=["user_id", "timestamp", "item_id", "event_type"])


def split_of(**options) -> dict[str, tuple]:
    table = histories(frame(), **OPTIONS, **options).to_pyarrow().to_pylist()
    return {row["user_id"]: (row["train_end"], row["validation_position"], row["test_position"]) for row in table}


@pytest.fixture
def data(tmp_path):
    prepare(frame(), tmp_path / "data", filter_seen_items=True, **OPTIONS)
    return tmp_path / "data"


def test_the_targets_are_the_last_events_of_a_target_type():
    assert split_of() == {"a": (3, 3, 5), "b": (2, None, None), "c": (2, None, None), "d": (1, 1, 2)}
    assert split_of(validation=False) == {"a": (5, None, 5), "b": (1, None, 1), "c": (2, None, None), "d": (2, None, 2)}
    assert split_of(split="none")["a"] == (7, None, None)


def test_the_targets_of_a_temporal_split_are_the_first_events_of_a_target_type_after_the_cuts():
    found = split_of(split="temporal", validation_cut=2, test_cut=4)
    assert found == {"a": (2, 3, 5), "b": (2, None, None), "c": (2, None, None), "d": (2, 2, None)}


def test_without_target_types_all_types_are_targets():
    table = histories(frame(), event_type_column="event_type").to_pyarrow().to_pylist()
    assert (table[0]["validation_position"], table[0]["test_position"]) == (5, 6)


@pytest.mark.parametrize(
    ("duplicates", "kept"),
    [("drop", ["x view", "x buy", "y view", "x view"]), ("drop_consecutive", ["x view", "x buy", "y view"])],
)
def test_events_of_another_type_are_no_duplicates(duplicates, kept):
    log = frame({"a": ["x view", "x view", "x buy", "x buy", "y view", "x view"], "b": ["x view"]})
    (row, _) = histories(log, duplicates=duplicates, **OPTIONS).to_pyarrow().to_pylist()
    expected = ["x view", "x buy", "y view"] + (["x view"] if duplicates == "drop_consecutive" else [])
    assert [f"{item} {kind}" for item, kind in zip(row["item_id"], row["event_type"], strict=True)] == expected


def test_the_folder_knows_types_and_their_numbers(data):
    histories, tokenizer, preparation = read_prepared(data)
    assert tokenizer.event_types == ["buy", "cart", "view"]
    assert tokenizer.target_event_types == ["buy"]
    assert tokenizer.target_event_type_ids == [1]
    assert preparation["statistics"]["events_per_type"] == {"buy": 7, "cart": 1, "view": 6}
    assert preparation["statistics"]["share_repeated_target_events"] == 0
    assert preparation["columns"]["event_type_column"] == "event_type"
    assert preparation["filters"]["target_event_types"] == ["buy"]
    assert histories.event_type_ids.tolist()[:7] == [3, 1, 3, 1, 2, 1, 3]


def test_seen_items_are_filtered_by_default_if_few_target_events_repeat(tmp_path):
    log = frame({user: ["x view", "x view", "x view", "x buy", "y buy", "z buy"] for user in "abc"})
    assert prepare(log, tmp_path / "typed", **OPTIONS)["filter_seen_items"]
    assert not prepare(log, tmp_path / "plain")["filter_seen_items"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"target_event_types": ["sale"]}, "no event has the target_event_type 'sale'.*buy, cart, view"),
        ({"event_type": None}, {}, "column 'event_type' is null or empty in 1 of 14 rows"),
        ({"event_type": ""}, {}, "column 'event_type' is null or empty in 1 of 14 rows"),
        ({}, {"event_type_column": None}, "target_event_types need an event_type_column"),
        ({}, {"event_type_column": "kind"}, "no column 'kind'.*--event_type_column"),
        ({}, {"target_event_types": ["buy", "buy"]}, "differ from each other"),
        ({"weight": -1.0}, {"weight_column": "weight"}, "'weight'.*has -1.0 in row 1, for item 'x' of user 'a'"),
        ({"weight": float("nan")}, {"weight_column": "weight"}, "not finite in 1 of 14 rows"),
    ],
)
def test_wrong_types_and_weights_are_errors(change, options, message):
    log = frame().assign(weight=1.0)
    for name, value in change.items():
        log.loc[0, name] = value
    with pytest.raises(ValueError, match=message):
        histories(log, **(OPTIONS | options)).execute()


def test_training_rows_without_a_target_are_left_out(data):
    histories, tokenizer, _ = read_prepared(data)
    rows = training_rows(histories)
    assert rows["user_id"][:] == ["a", "b"]  # c and d have no purchase in the training part
    assert rows["event_type_ids"][:] == [[3, 1, 3], [1, 1]]
    sliding = training_rows(histories, max_length=2, windows="sliding", window_step=1)
    assert [len(types) for types in sliding["event_type_ids"]] == [2, 2, 2]
    streamed = StreamedTrainingRows(stream_prepared(data)[0], max_length=10)
    assert [row["event_type_ids"].tolist() for row in streamed.__getitems__([0, 1])] == rows["event_type_ids"][:]
    lines = list(stream_training_rows(data / "histories.parquet", tokenizer))
    assert [line["event_type_ids"] for line in lines] == rows["event_type_ids"][:]


def test_weights_are_columns_of_the_rows(tmp_path):
    log = frame().assign(weight=np.arange(14) / 2)
    prepare(log, tmp_path, weight_column="weight", **OPTIONS)
    histories, tokenizer, _ = read_prepared(tmp_path)
    rows = training_rows(histories)
    assert rows["loss_weights"][0] == [0, 0.5, 1]
    batch = DataCollatorForMaskedItemPrediction(tokenizer, causal=True, mask_ratio=1.0)(list(rows))
    assert batch["loss_weights"].tolist() == [[0.5, 0], [3.5, 4]]


def test_ranking_rows_have_types_and_exclude_items_of_the_target_type(data):
    histories, tokenizer, _ = read_prepared(data)
    _, x, y, z = tokenizer.item_ids_to_token_ids([*"qxyz"])
    row = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)[0]
    assert row["input_ids"] == [x, x, y, z, y, MASK]
    assert row["event_type_ids"] == [3, 1, 3, 1, 2, 1]
    assert row["history_ids"] == [x, x, y, z, y]
    assert row["history_type_ids"] == [3, 1, 3, 1, 2]
    assert row["target_type_ids"] == 1
    assert row["exclude_ids"] == [x, z]  # y is in the cart, and can still be bought
    assert ranking_rows(histories, tokenizer, "test", filter_seen_items=False)[0]["exclude_ids"] == []


def make_collator(**options) -> DataCollatorForMaskedItemPrediction:
    tokenizer = Bert4RecTokenizer.from_items(
        [f"{number:02}" for number in range(20)],
        model_max_length=20,
        event_types=["buy", "cart", "view"],
        target_event_types=["buy"],
    )
    return DataCollatorForMaskedItemPrediction(tokenizer, **options)


ROW = {"input_ids": [5, 6, 5, 7, 5, 6], "event_type_ids": [3, 3, 1, 1, 2, 1]}


def test_only_events_of_a_target_type_are_labels():
    batch = make_collator(mask_ratio=0.7)([ROW] * 200)
    assert set(batch["masked_positions"].unique().tolist()) == {-1, 2, 3, 5}
    assert set(batch["labels"].unique().tolist()) == {IGNORED, 5, 6, 7}
    assert (batch["labels"] != IGNORED).any(dim=1).all()


def test_later_occurrences_of_a_masked_item_are_masked_without_a_type():
    batch = make_collator(mask_ratio=0.5)([ROW] * 100)
    seen = set()
    for row in range(100):
        ids, types = batch["input_ids"][row].tolist(), batch["event_type_ids"][row].tolist()
        chosen = set(batch["masked_positions"][row].tolist()) - {-1}
        hidden = {4} if 2 in chosen else set()
        for place, (item, kind) in enumerate(zip(ROW["input_ids"], ROW["event_type_ids"], strict=True)):
            assert ids[place] == (MASK if place in chosen | hidden else item)
            assert types[place] == (0 if place in hidden else kind)
        seen |= chosen
    assert seen == {2, 3, 5}


def test_a_row_for_its_last_target_ends_there():
    row = {"input_ids": [5, 6, 7], "event_type_ids": [1, 1, 3]}
    for causal in (False, True):
        batch = make_collator(last_item_ratio=1.0, causal=causal)([row])
        assert batch["labels"].tolist() == [[6]]
        assert batch["attention_mask"][0].tolist() == ([1, 1, 0, 1] if causal else [1, 1, 0])
        assert batch["event_type_ids"][0].tolist() == ([1, 1, 0, 1] if causal else [1, 1, 0])


def test_causal_queries_have_the_types_of_their_labels():
    batch = make_collator(mask_ratio=1.0, causal=True)([ROW])
    assert batch["input_ids"].tolist() == [[5, 6, 5, 7, 5, 6, MASK, MASK, MASK]]
    assert batch["event_type_ids"].tolist() == [[3, 3, 1, 1, 2, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 5]]
    assert batch["labels"].tolist() == [[5, 7, 6]]


def test_windows_of_items_and_types_are_the_same():
    row = {"input_ids": list(range(3, 23)), "event_type_ids": [1, 3] * 10}
    torch.manual_seed(0)
    batch = make_collator(mask_ratio=1.0, causal=True, max_length=5)([row] * 20)
    assert ((batch["input_ids"][:, :5] % 2 == 1) == (batch["event_type_ids"][:, :5] == 1)).all()


def test_counts_are_those_of_target_events(data):
    histories, tokenizer, _ = read_prepared(data)
    _, x, y, z = tokenizer.item_ids_to_token_ids([*"qxyz"])
    # The training part: a has x viewed, x bought, y viewed; b x bought, z bought; c x and z viewed; d x viewed.
    assert item_counts(histories, 4).tolist() == [0, 0, 0, 0, 2, 0, 1]
    assert tokenizer.counts == [0, 5, 1, 2]  # all events
    successors, _, next_scores = transitions(histories, 4, 8, with_self_pairs=True)
    assert set(successors[x].tolist()) == {0, x, z}
    assert not successors[[y, z]].any()
    of = dict(zip(successors[x].tolist(), next_scores[x].tolist(), strict=True))
    # Of the two events of x that a purchase follows directly, one is followed by x and one by z.
    assert of[x] == of[z] == pytest.approx(np.log1p(20 / 2))


def test_baselines_count_target_events(data):
    histories, tokenizer, _ = read_prepared(data)
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=False)
    # The targets: a buys y after buying x and z; d buys x after buying z. Popularity is x 2, z 1, y 0, q 0.
    assert personal_popularity_ranks(rows, histories, 4).tolist() == [4, 2]
    assert baseline_ranks(rows, histories, 4)["popularity"].tolist() == [4, 1]


def test_a_window_of_a_long_history_has_a_target():
    row = {"input_ids": list(range(3, 23)), "event_type_ids": [3] * 20}
    row["event_type_ids"][4] = row["event_type_ids"][15] = 1
    torch.manual_seed(0)
    batch = make_collator(mask_ratio=1.0, causal=True, max_length=5)([row] * 60)
    assert set(batch["labels"].flatten().tolist()) == {7, 18}
    assert set(batch["position_ids"][:, -1].tolist()) == {0, 1, 2, 3, 4}  # the target may be anywhere in the window
    newest = make_collator(mask_ratio=1.0, causal=True, max_length=5, random_windows=False)([row])
    assert newest["input_ids"].tolist() == [[14, 15, 16, 17, 18, MASK]]  # all that fits before the last target


def test_the_default_mask_ratio_counts_target_events(data, tmp_path):
    arguments = Bert4RecTrainingArguments(str(tmp_path / "run"), use_cpu=True, num_train_epochs=1, disable_tqdm=True)
    many = {f"u{number}": ["x view"] * 199 + ["z buy", "x buy", "z buy"] for number in range(1000)}
    prepare(frame(many), tmp_path / "many", max_length=200, **OPTIONS)
    histories, tokenizer, _ = read_prepared(tmp_path / "many")
    rows = training_rows(histories)
    config = Bert4RecConfig(
        vocab_size=len(tokenizer), hidden_size=16, causal_attention=True, num_event_types=2, target_event_type_ids=[1]
    )
    trainer = Bert4RecTrainer(
        Bert4RecForMaskedItemPrediction(config), arguments, train_dataset=rows, processing_class=tokenizer
    )
    # 1,000 labels in 200,000 events: all of them are predicted, where a quarter of the events would be.
    assert trainer.args.mask_ratio == 1.0
