"""A model of event types from the command line to its requests: pipeline, files, server, vectors and ONNX."""

import json
import random
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import fail, succeed
from transformers import pipeline

from bert4rec_hf import Bert4RecTokenizer, ranking_rows, read_prepared
from bert4rec_hf.hub.load import load_model
from bert4rec_hf.serving.bulk import recommend_file

NUM_USERS, NUM_ITEMS = 40, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A log in which users buy what they put into the cart, prepared and trained on the command line."""
    folder = tmp_path_factory.mktemp("types")
    chance = random.Random(0)
    lines = ["user_id,item_id,timestamp,event_type,stars"]
    for user in range(NUM_USERS):
        for visit in range(4):
            items = chance.sample(range(NUM_ITEMS), 3)
            events = [(item, "view") for item in items] + [(items[0], "cart"), (items[0], "purchase")]
            if user % 3 == 0:  # some buy what they have neither viewed nor put into the cart in this visit
                events = [*events[1:3], events[-1]]
            for number, (item, kind) in enumerate(events):
                lines.append(f"u{user},i{item:02},{10 * visit + number},{kind},{1 + number % 5}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    types = ("--event_type_column", "event_type", "--target_event_types", "purchase", "cart")
    printed = succeed(
        "prepare",
        folder / "log.csv",
        "--output",
        folder / "data",
        *types,
        "--weight_column",
        "stars",
        "--filter_seen_items",
        "true",
    )
    assert any(
        "events by type: cart 104, purchase 160, view 424; targets are of the types purchase, cart" in line
        for line in printed
    )
    succeed(
        "train",
        "--data",
        folder / "data",
        "--output_dir",
        folder / "model",
        "--num_train_epochs",
        2,
        "--hidden_size",
        16,
        "--num_attention_heads",
        2,
        "--use_cpu",
        "true",
    )
    return folder


@pytest.fixture(scope="module")
def recommend(folders):
    folder = str(folders / "model")
    return pipeline("sequential-recommendation", model=load_model(folder), tokenizer=folder, device="cpu")


EVENTS = [{"item_id": "i01", "event_type": "view"}, {"item_id": "i02", "event_type": "purchase"}]


def ids(answer) -> list[str]:
    return [entry["item_id"] for entry in answer]


def test_the_command_recommends_for_a_type(folders):
    events = [json.dumps(event) for event in EVENTS]
    for options in ((), ("--event_type", "cart"), ("--explain", "true")):
        lines = succeed(
            "recommend", folders / "model", "i05", *events, "--top_k", NUM_ITEMS, "--device", "cpu", *options
        )
        assert len(lines) >= NUM_ITEMS - 2
    message = fail("recommend", folders / "model", "i05", "--event_type", "view")
    assert "'view' is not recommended for; expected one of purchase, cart" in message


def test_the_evaluation_has_targets_with_and_without_an_earlier_event(folders):
    printed = "\n".join(succeed("evaluate", folders / "model", "--data", folders / "data", "--use_cpu", "true"))
    records = json.loads((folders / "model" / "evaluation.json").read_text())
    (record,) = [record for record in records if record["protocol"]["part"] == "test"]
    sizes = {int(heading.split()[0]): heading for heading in record["groups"]}
    assert sum(sizes) == record["protocol"]["num_users"]
    assert all(f"targets with{word} an earlier event of another type" in printed for word in ("", "out"))


def test_a_plain_item_is_an_event_of_the_first_target_type(recommend):
    plain = recommend(["i01", "i02"], top_k=NUM_ITEMS)
    bought = [{"item_id": item, "event_type": "purchase"} for item in ("i01", "i02")]
    assert recommend(bought, top_k=NUM_ITEMS) == plain
    assert recommend([bought[0], "i02"], top_k=NUM_ITEMS) == plain
    assert recommend({"history": ["i01", "i02"], "event_type": ["purchase", "purchase"]}, top_k=NUM_ITEMS) == plain


def test_one_history_of_events_and_many_are_told_apart(recommend):
    one = recommend(EVENTS)
    assert recommend([EVENTS, EVENTS]) == [one, one]
    assert recommend([{"item_id": ["i01", "i02"], "event_type": ["view", "purchase"]}]) == [one]
    assert len(recommend(iter([EVENTS])).__iter__().__next__()) == len(one)


def test_seen_items_are_those_of_the_type_that_is_asked_for(recommend):
    assert set(ids(recommend(EVENTS, top_k=NUM_ITEMS))) == {f"i{item:02}" for item in range(NUM_ITEMS)} - {"i02"}
    assert len(recommend(EVENTS, top_k=NUM_ITEMS, event_type="cart")) == NUM_ITEMS
    assert recommend(EVENTS, top_k=NUM_ITEMS, event_type="purchase") == recommend(EVENTS, top_k=NUM_ITEMS)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([{"item_id": "i01", "event_type": "sale"}], "'sale' of item 0 .*cart, purchase, view"),
        ([{"item_id": "i01", "kind": "view"}], "item 0 of the history.*got item_id, kind"),
        ({"history": ["i01"], "event_type": ["view", "view"]}, "2 types for 1 items"),
        ({"history": ["i01"], "event_type": "view"}, "must be a list"),
    ],
)
def test_wrong_events_are_errors(recommend, request_, message):
    with pytest.raises(ValueError, match=message):
        recommend(request_)


def test_the_input_of_serving_is_that_of_evaluation(folders, recommend):
    histories, tokenizer, _ = read_prepared(folders / "data", Bert4RecTokenizer.from_pretrained(folders / "model"))
    rows = ranking_rows(histories, tokenizer, "test", filter_seen_items=True)
    (users,) = np.nonzero(histories.target_positions["test"] >= 0)
    for number in range(5):
        start, position = histories.offsets[users[number]], histories.target_positions["test"][users[number]]
        past = slice(start, start + position)
        items = tokenizer.token_ids_to_item_ids(histories.item_ids[past].tolist())
        types = [tokenizer.event_types[kind - 1] for kind in histories.event_type_ids[past]]
        target = tokenizer.event_types[histories.event_type_ids[start + position] - 1]
        found = recommend.preprocess({"history": items, "event_type": types}, event_type=target)
        for name in ("input_ids", "event_type_ids", "history_ids", "history_type_ids", "exclude_ids"):
            assert found[name][0].tolist() == rows[number][name]
        assert found["target_type_ids"].tolist() == [rows[number]["target_type_ids"]]


def test_explanations_leave_out_events_with_their_types(recommend):
    answer = recommend(EVENTS, explain=True, top_k=3)
    assert ids(answer) == ids(recommend(EVENTS, top_k=3))
    assert {source["item_id"] for entry in answer for source in entry["because"]} <= {"i01", "i02"}


def test_files_have_types_in_a_column_or_in_the_items(recommend, tmp_path):
    request = {"user_id": ["a"], "item_id": [["i01", "unknown", "i02"]], "event_type": [["view", "cart", "purchase"]]}
    pq.write_table(pa.table(request), tmp_path / "column.parquet")
    events = [EVENTS[0], {"item_id": "unknown", "event_type": "cart"}, EVENTS[1]]
    (tmp_path / "events.jsonl").write_text(json.dumps({"user_id": "a", "history": events}) + "\n")
    found = []
    for name in ("column.parquet", "events.jsonl"):
        recommend_file(recommend, tmp_path / name, tmp_path / "out.parquet")
        found.append(pq.read_table(tmp_path / "out.parquet")["item_id"].to_pylist())
    assert found[0] == found[1] == ids(recommend(EVENTS))
    (tmp_path / "short.jsonl").write_text('{"user_id": "a", "history": ["i01", "i02"], "event_type": ["view"]}\n')
    with pytest.raises(ValueError, match=r"short.jsonl, column event_type, line 1: expected 2 types.*got 1 types"):
        recommend_file(recommend, tmp_path / "short.jsonl", tmp_path / "out.parquet")


def test_the_histories_of_the_prepared_folder_are_a_file_of_requests(folders, recommend, tmp_path):
    assert recommend_file(recommend, folders / "data", tmp_path / "out.parquet") == NUM_USERS
    succeed("export-vectors", folders / "model", "--output", tmp_path / "vectors", "--histories", folders / "data")
    vectors = pq.read_table(tmp_path / "vectors" / "users.parquet")["vector"].to_pylist()
    row = pq.read_table(folders / "data" / "histories.parquet").to_pylist()[0]
    inputs = recommend.preprocess({"history": row["item_id"], "event_type": row["event_type"]})
    names = ("input_ids", "attention_mask", "event_type_ids")
    torch.testing.assert_close(
        torch.tensor(vectors[0]), recommend.model.user_vectors(*(inputs[name] for name in names))[0]
    )


def test_a_model_without_types_refuses_them(folders, tmp_path):
    succeed("prepare", folders / "log.csv", "--output", tmp_path / "data")
    succeed(
        "train",
        "--data",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "model",
        "--max_steps",
        1,
        "--hidden_size",
        16,
        "--num_attention_heads",
        2,
        "--use_cpu",
        "true",
    )
    folder = str(tmp_path / "model")
    plain = pipeline("sequential-recommendation", model=load_model(folder), tokenizer=folder, device="cpu")
    with pytest.raises(ValueError, match=r"item 0 of the history .*an item id is a string or an integer"):
        plain([{"item_id": "i01"}])
    for call in (lambda: plain(EVENTS), lambda: plain(["i01"], event_type="view")):
        with pytest.raises(ValueError, match="for a model that was trained with event types"):
            call()
    assert "prepare the log with --event_type_column" in fail(
        "evaluate", folders / "model", "--data", tmp_path / "data", "--use_cpu", "true"
    )


def test_the_model_trains_further_and_its_streamed_evaluation_is_the_same(folders, tmp_path):
    succeed(
        "train",
        "--data",
        folders / "data",
        "--output_dir",
        tmp_path / "further",
        "--model_name_or_path",
        folders / "model",
        "--max_steps",
        1,
        "--use_cpu",
        "true",
        "--streaming",
        "true",
    )
    evaluated = [
        succeed("evaluate", tmp_path / "further", "--data", folders / "data", "--use_cpu", "true", *options)
        for options in ((), ("--streaming", "true"))
    ]
    assert [line for line in evaluated[0] if line.startswith("model")] == [
        line for line in evaluated[1] if line.startswith("model")
    ]


def test_the_graph_takes_types_and_answers_like_the_pipeline(recommend, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from bert4rec_hf.serving.onnx_export import export_onnx

    export_onnx(recommend.model, tmp_path / "model.onnx", top_k=5)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = recommend.preprocess(EVENTS)
    names = [found.name for found in session.get_inputs()]
    assert set(names) >= {"event_type_ids", "history_type_ids"}
    scores, item_ids = session.run(None, {name: inputs[name].numpy() for name in names})
    answer = recommend(EVENTS, top_k=5)
    assert recommend.tokenizer.token_ids_to_item_ids(item_ids[0].tolist()) == ids(answer)
    np.testing.assert_allclose(scores[0], [entry["score"] for entry in answer], rtol=1e-4, atol=1e-4)


def test_the_server_takes_events_and_a_target_type(folders, tmp_path):
    testclient = pytest.importorskip("fastapi.testclient")
    from bert4rec_hf.serving.server import Server, ServerSettings, create_app

    settings = ServerSettings(str(folders / "model"), store=f"sqlite:///{tmp_path}/events.db", device="cpu")
    with testclient.TestClient(create_app(Server(settings))) as client:
        found = client.post("/recommend", json={"history": EVENTS, "event_type": "cart", "top_k": 3})
        assert found.status_code == 200
        assert len(found.json()["items"]) == 3
        wrong = client.post("/recommend", json={"history": EVENTS, "event_type": "view"})
        assert wrong.status_code == 400
        assert "expected one of purchase, cart" in wrong.json()["detail"]


def test_the_server_stores_the_types_of_events(folders, recommend, tmp_path):
    testclient = pytest.importorskip("fastapi.testclient")
    from bert4rec_hf.serving.server import Server, ServerSettings, create_app

    url = f"sqlite:///{tmp_path}/events.db"
    settings = ServerSettings(str(folders / "model"), store=url, device="cpu", histories=str(folders / "data"))
    row = pq.read_table(folders / "data" / "histories.parquet").to_pylist()[0]
    with testclient.TestClient(create_app(Server(settings))) as client:

        def answer(**request):
            found = client.post("/recommend", json={"top_k": 5, **request})
            assert found.status_code == 200, found.text
            return found.json()["items"]

        filled = [
            {"item_id": item, "event_type": kind} for item, kind in zip(row["item_id"], row["event_type"], strict=True)
        ]
        assert answer(user_id=row["user_id"]) == answer(history=filled)
        events = [{"item_id": "i01", "event_type": "cart"}, "i02", {"item_id": "i03", "event_type": "view"}]
        assert client.post("/events", json={"user_id": "new", "item_ids": events[:2]}).status_code == 201
        assert client.post("/events", json={"user_id": "new", "item_ids": events[2:]}).status_code == 201
        assert answer(user_id="new") == answer(history=events)
        assert answer(user_id="new") != answer(history=["i01", "i02", "i03"])
        assert answer(user_id="new", event_type="cart") == answer(history=events, event_type="cart")
        wrong = client.post(
            "/events", json={"user_id": "new", "item_ids": ["i01", {"item_id": "i02", "event_type": "x"}]}
        )
        assert wrong.status_code == 400
        assert wrong.json()["detail"] == (
            "the model does not know the event type 'x' of event 1; expected one of cart, purchase, view"
        )
        assert client.post("/recommend", json={"user_id": "new"}).json()["num_events"] == 3


def test_a_store_of_an_earlier_release_keeps_its_events_and_gets_types(folders, tmp_path, caplog):
    testclient = pytest.importorskip("fastapi.testclient")
    from bert4rec_hf.serving.event_store import EventStore
    from bert4rec_hf.serving.server import Server, ServerSettings, create_app

    with sqlite3.connect(tmp_path / "events.db") as old:
        old.execute("create table bert4rec_events (id integer primary key, user_id varchar, item_id varchar)")
        old.execute("insert into bert4rec_events (user_id, item_id) values ('u', 'i01'), ('u', 'i02')")
    url = f"sqlite:///{tmp_path}/events.db"
    EventStore(url).add("u", ["i03", "i04"], ["view", "gone"])
    stored = [("i01", None), ("i02", None), ("i03", "view"), ("i04", "gone")]
    assert EventStore(url).history("u", 10) == stored
    assert EventStore(url).history("u", 2) == stored[2:]
    with testclient.TestClient(create_app(Server(ServerSettings(str(folders / "model"), store=url)))) as client:
        assert "has events without a type, which count as purchase" in caplog.text
        found = client.post("/recommend", json={"user_id": "u"})  # the model does not know the type of i04
        given = client.post("/recommend", json={"history": ["i01", "i02", {"item_id": "i03", "event_type": "view"}]})
        assert found.json()["items"] == given.json()["items"]
        assert found.json()["num_events"] == 4
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("create table bert4rec_events (name varchar)")
    with pytest.raises(ValueError, match="no such column"):
        EventStore(f"sqlite:///{tmp_path}/other.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        assert [row[1] for row in other.execute("pragma table_info(bert4rec_events)")] == ["name"]


def test_the_card_names_the_types(folders):
    card = (folders / "model" / "README.md").read_text()
    assert "reads events of the types `cart`, `purchase`, `view`, and recommends for `purchase`, `cart`." in card
