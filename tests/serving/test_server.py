"""`bert4rec serve`: real processes, and the application in this process where time or faults have to be arranged."""

import json
import os
import queue
import random
import shutil
import signal
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest
import torch
from chain_runs import free_port
from command_runs import fail
from log_and_model import write_log_and_model
from running_server import serving

from bert4rec_hf import Bert4RecTokenizer

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from transformers import pipeline

from bert4rec_hf.model.modeling_bert4rec import Bert4RecForMaskedItemPrediction
from bert4rec_hf.serving.event_store import EventStore
from bert4rec_hf.serving.item_table import ItemTable
from bert4rec_hf.serving.messages import MAX_ITEMS
from bert4rec_hf.serving.model_thread import ModelThread
from bert4rec_hf.serving.rules import Rules
from bert4rec_hf.serving.served_log import SCHEMA
from bert4rec_hf.serving.served_model import ServedModel
from bert4rec_hf.serving.server import MAX_BODY_BYTES, Server, ServerSettings, create_app


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A prepared folder and a model folder."""
    data, model, _ = write_log_and_model(tmp_path_factory.mktemp("model"))
    return data, model


@pytest.fixture(scope="module")
def pipe(folders):
    return pipeline("sequential-recommendation", model=str(folders[1]))


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    """A server process with the histories of the log in its store."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folders[1], folder, "--histories", folders[0], "--served_log", folder / "served") as running:
        running.folder = folder
        yield running
    assert running.process.returncode == 0, running.log.read_text()
    table = pq.read_table(folder / "served")
    assert table.schema.equals(SCHEMA)
    assert table.num_rows >= 400  # every answer of the tests below, written when the server stopped
    ranks = {}
    for request, rank in zip(table["request_id"].to_pylist(), table["rank"].to_pylist(), strict=True):
        ranks.setdefault(request, []).append(rank)
    assert all(found == list(range(1, len(found) + 1)) for found in ranks.values())


@pytest.fixture
def local(folders, tmp_path):
    """A client of the application in this process, and its server. Nothing is loaded twice."""
    settings = ServerSettings(
        str(folders[1]), store=f"sqlite:///{tmp_path / 'events.db'}", max_waiting=2, timeout=0.5, device="cpu"
    )
    server = Server(settings)
    with TestClient(create_app(server)) as client:
        client.server = server
        yield client


def random_requests(tokenizer, number, seed=0):
    chance = random.Random(seed)
    for _ in range(number):
        request = {"history": chance.choices([*tokenizer.items, "unknown"], k=chance.randrange(0, 70))}
        request["top_k"] = chance.randrange(1, 15)
        if chance.random() < 0.4:
            request["candidates"] = chance.sample(tokenizer.items, 8)
        if chance.random() < 0.4:
            request["exclude"] = chance.sample(tokenizer.items, 5)
        if chance.random() < 0.4:
            request["filter_seen_items"] = chance.random() < 0.5
        yield request


def test_many_clients_at_once_get_what_the_pipeline_answers(server, pipe):
    requests = list(random_requests(pipe.tokenizer, 120))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda request: server.ask("/recommend", request), requests))
    for request, (status, answer) in zip(requests, answers, strict=True):
        assert status == 200, answer
        options = {name: request[name] for name in ("top_k", "filter_seen_items") if name in request}
        limits = {name: request[name] for name in ("history", "candidates", "exclude") if name in request}
        expected = pipe(limits, **options)
        assert [entry["item_id"] for entry in answer["items"]] == [entry["item_id"] for entry in expected]
        scores = [entry["score"] for entry in answer["items"]], [entry["score"] for entry in expected]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)
        assert answer["num_unknown_items"] == request["history"].count("unknown")
    batches = [line for line in server.ask("/metrics")[1].splitlines() if line.startswith("bert4rec_batch_size_count")]
    assert float(batches[0].split()[1]) < len(requests)  # some requests were computed together


def test_a_user_has_the_history_of_the_log_and_the_events_that_were_added(server, folders, pipe):
    histories = pq.read_table(folders[0] / "histories.parquet", columns=["user_id", "item_id"]).to_pylist()
    user, items = histories[3]["user_id"], histories[3]["item_id"]
    answer = server.ask("/recommend", {"user_id": user})[1]
    assert answer["num_events"] == len(items)
    assert [entry["item_id"] for entry in answer["items"]] == [entry["item_id"] for entry in pipe(items)]
    added = [pipe.tokenizer.items[0], "not in the catalogue", pipe.tokenizer.items[5]]
    assert server.ask("/events", {"user_id": user, "item_ids": added}) == (
        201, {"num_events": 3, "num_unknown_items": 1}
    )  # fmt: skip
    answer = server.ask("/recommend", {"user_id": user})[1]
    assert (answer["num_events"], answer["num_unknown_items"]) == (len(items) + 3, 1)
    expected = pipe([*items, added[0], added[2]])
    assert [entry["item_id"] for entry in answer["items"]] == [entry["item_id"] for entry in expected]
    unknown = server.ask("/recommend", {"user_id": "nobody's id"})[1]
    assert [entry["item_id"] for entry in unknown["items"]] == [entry["item_id"] for entry in pipe([])]


def test_similar_items_and_explanations_are_those_of_the_pipeline(server, pipe):
    history = pipe.tokenizer.items[:5]
    requests = [{"history": history, "explain": number % 2 == 0, "top_k": 3} for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: server.ask("/recommend", request)[1]["items"], requests))
    for request, items in zip(requests, answers, strict=True):
        expected = pipe(history, top_k=3, explain=request["explain"])
        for found, entry in zip(items, expected, strict=True):
            assert found.keys() == entry.keys()
            assert found["item_id"] == entry["item_id"]
            because, expected_because = found.get("because", []), entry.get("because", [])
            assert [source["item_id"] for source in because] == [source["item_id"] for source in expected_because]
            assert [source["contribution"] for source in because] == pytest.approx(
                [source["contribution"] for source in expected_because], rel=1e-3, abs=1e-4
            )
    item = history[2]
    status, answer = server.ask(f"/similar?item_id={item.replace(' ', '%20')}&top_k=4")
    expected = pipe.similar(item, top_k=4)
    assert (status, [entry["item_id"] for entry in answer["items"]]) == (200, [entry["item_id"] for entry in expected])
    assert server.ask("/similar?item_id=nothing")[0] == 404
    assert server.ask("/similar")[0] == 422
    status, answer = server.ask("/similar?item_id=a&top_k=0")
    assert (status, answer["detail"]) == (422, "top_k: input should be greater than or equal to 1; got '0'")


def test_items_health_and_openapi(server, pipe):
    item = pipe.tokenizer.items[0]
    assert server.ask(f"/items/{item.replace(' ', '%20')}")[1]["item_id"] == item
    assert server.ask("/items/a%2Fb%20c") == (404, {"detail": "the catalogue lacks the item 'a/b c'"})
    status, ready = server.ask("/readyz")
    assert (status, ready["status"], ready["reload_errors"]) == (200, "ready", {})
    paths = server.ask("/openapi.json")[1]
    assert {"/recommend", "/events", "/items/{item_id}", "/healthz", "/readyz", "/metrics"} <= set(paths["paths"])
    assert paths["components"]["schemas"]["RecommendRequest"]["examples"]
    server.ask("/made/up/by/anyone")
    assert "made" not in server.ask("/metrics")[1]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"history": [], "topk": 3}, 422, "unknown key 'topk': did you mean top_k?"),
        ({"history": "50"}, 422, "history: input should be a valid list; got '50'"),
        ({"history": [True]}, 422, "history.0: an item id should be text or an integer; got True"),
        ({"history": [None]}, 422, "history.0: an item id should be text or an integer; got None"),
        ({"history": [1.5]}, 422, "history.0: an item id should be text or an integer; got 1.5"),
        ({"history": {"a": 1}}, 422, "history: input should be a valid list; got {'a': 1}"),
        ({"history": [], "top_k": 0}, 422, "top_k: input should be greater than or equal to 1; got 0"),
        ({"history": [], "top_k": "5"}, 422, "top_k: input should be a valid integer; got '5'"),
        ({"history": [], "top_k": 1001}, 422, "top_k: input should be less than or equal to 1000; got 1001"),
        ({"user_id": 7}, 422, "user_id: input should be a valid string; got 7"),
        ({}, 400, "expected user_id or history, one of them; got neither"),
        ({"history": [], "user_id": "a"}, 400, "expected user_id or history, one of them; got both"),
        ({"history": [], "candidates": []}, 400, "candidates is empty"),
        ({"history": [], "candidates": ["no such item"]}, 400, "the catalogue has none of the 1 candidates"),
        (b"[1", 422, "the body is no JSON: "),
        (b"\xff\xfe", 422, "the body is no JSON: "),
        (b"[]", 422, "the body: input should be a valid dictionary"),
        (b"", 422, "the body: field required"),
        (b'{"history": ' + b"[" * 100_000, 400, "There was an error parsing the body"),
        ({"history": ["a"] * (MAX_ITEMS + 1)}, 422, "history: list should have at most 10000 items"),
        ({"history": ["x" * 1001]}, 422, "history.0: string should have at most 1000 characters"),
        (b'{"history": ["' + b"x" * MAX_BODY_BYTES + b'"]}', 413, "the body has more than 1,048,576 bytes"),
    ],
)
def test_wrong_requests_are_told_what_was_expected_and_what_came(server, body, status, message):
    found, answer = server.ask("/recommend", body)
    assert (found, message in answer["detail"]) == (status, True), answer


def test_a_history_of_ten_thousand_items_is_answered(server, pipe):
    history = random.Random(1).choices(pipe.tokenizer.items, k=MAX_ITEMS)
    answer = server.ask("/recommend", {"history": history})[1]
    assert [entry["item_id"] for entry in answer["items"]] == [entry["item_id"] for entry in pipe(history)]


def test_no_history_is_in_the_output_of_the_process(server):
    secret = "a very private item"
    server.ask("/recommend", {"history": [secret], "top_k": 1})
    server.ask("/events", {"user_id": "private user", "item_ids": [secret]})
    server.ask("/recommend", {"history": [secret], "candidates": [secret]})
    assert "private" not in server.log.read_text()
    assert not any(b"private" in path.read_bytes() for path in (server.folder / "served").rglob("*") if path.is_file())


def test_hostile_text_is_json_in_answers_and_not_in_the_output_of_the_process(server):
    hostile = "<script>alert(1)</script>\x1b[2J\u202e\r\nforged"
    bodies = [
        ("/recommend", {"history": [hostile], "candidates": [hostile]}),
        ("/recommend", {hostile: 1}),
        ("/recommend", {"history": [], "rules": hostile}),
        ("/events", {"user_id": hostile, "item_ids": [hostile]}),
        ("/" + urllib.parse.quote(hostile), {}),
    ]
    for path, body in bodies:
        request = urllib.request.Request(server.url + path, json.dumps(body).encode())
        request.add_header("content-type", "application/json")
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read()
        assert answer.headers["content-type"] == "application/json", (path, body)
        json.loads(content)
        assert b"\x1b" not in content
    output = server.log.read_text("utf-8")
    assert not [part for part in ("\x1b", "\u202e", "<script>", "forged") if part in output]


def test_no_acknowledged_event_is_lost_by_a_kill_and_the_store_is_filled_once(folders, tmp_path):
    acknowledged: dict[str, list[str]] = {}

    def send(running, user):
        acknowledged[user] = []
        for number in range(10_000):
            items = [f"{number}-{place}" for place in range(3)]
            try:
                if running.ask("/events", {"user_id": user, "item_ids": items})[0] != 201:
                    return
            except OSError:
                return
            acknowledged[user] += items

    with serving(folders[1], tmp_path, "--histories", folders[0]) as running:
        threads = [threading.Thread(target=send, args=(running, f"u{number}")) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        os.kill(running.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    with sqlite3.connect(tmp_path / "events.db") as connection:
        num_filled = connection.execute("select count(*) from bert4rec_events where user_id not like 'u%'").fetchone()
        for user, items in acknowledged.items():
            assert len(items) > 10
            query = "select item_id from bert4rec_events where user_id = ? order by id"
            stored = [item for (item,) in connection.execute(query, (user,))]
            # An event may be stored and not acknowledged, but not the other way round, and never in part.
            assert stored[: len(items)] == items
            assert len(stored) - len(items) in (0, 3)
    with serving(folders[1], tmp_path, "--histories", folders[0]) as running:
        assert "has events; not filled" in running.log.read_text()
        assert running.ask("/recommend", {"user_id": "u1"})[1]["num_events"] >= len(acknowledged["u1"])
    with sqlite3.connect(tmp_path / "events.db") as connection:
        again = connection.execute("select count(*) from bert4rec_events where user_id not like 'u%'").fetchone()
    assert again == num_filled


def test_a_stopping_server_answers_what_it_has_begun(folders, tmp_path):
    answers = []
    with serving(folders[1], tmp_path) as running:

        def ask(_):
            try:
                answers.append(running.ask("/recommend", {"history": []})[0])
            except OSError as error:  # a connection that came after the stop
                answers.append(type(error).__name__)

        with ThreadPoolExecutor(8) as pool:
            done = pool.map(ask, range(200))
            time.sleep(0.1)
            running.process.send_signal(signal.SIGTERM)
            list(done)
        assert running.process.wait(timeout=60) == 0
    assert set(answers) <= {200, "URLError", "ConnectionResetError"}
    assert answers.count(200) > 8
    assert answers.count("ConnectionResetError") <= 8  # the number of clients
    assert "Traceback" not in running.log.read_text()


def copy_of(model, folder, change=None):
    shutil.copytree(model, folder)
    if change is not None:
        loaded = Bert4RecForMaskedItemPrediction.from_pretrained(folder)
        change(loaded)
        loaded.save_pretrained(folder)
    return folder


def test_a_new_folder_is_taken_over_under_load_and_a_broken_one_is_refused(folders, tmp_path):
    def change(model):
        with torch.no_grad():
            model.item_bias.weight[3:] += torch.linspace(0, 9, len(model.item_bias.weight) - 3)

    first = copy_of(folders[1], tmp_path / "monday")
    second = copy_of(folders[1], tmp_path / "tuesday", change)
    broken = copy_of(folders[1], tmp_path / "wednesday")
    (broken / "model.safetensors").write_bytes(b"half a file")
    link = tmp_path / "current"
    link.symlink_to(first)
    with serving(link, tmp_path, admin_port=free_port()) as running:
        versions, wrong, is_running = [], [], True

        def ask():
            while is_running:
                status, answer = running.ask("/recommend", {"history": []})
                (versions if status == 200 else wrong).append(answer.get("model_version", answer))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()

        def point_to(folder):
            (tmp_path / "new").symlink_to(folder)
            os.replace(tmp_path / "new", link)

        point_to(second)
        waited = time.monotonic() + 60
        while not running.ask("/readyz")[1]["models"]["model"].startswith("tuesday"):  # the link is watched
            assert time.monotonic() < waited
            time.sleep(0.1)
        point_to(broken)
        status, answer = running.ask("/reload", b"", url=running.admin_url)
        assert (status, "is refused, and tuesday-" in answer["detail"]) == (409, True)
        shutil.rmtree(broken)
        assert running.ask("/reload", b"", url=running.admin_url)[0] == 409  # a link to nothing
        assert "model" in running.ask("/readyz")[1]["reload_errors"]
        point_to(first)
        status, answer = running.ask("/reload", b"", url=running.admin_url)
        assert (status, answer["loaded"]["model"].split("-")[0]) == (200, "monday")
        assert running.ask("/readyz")[1]["reload_errors"] == {}
        time.sleep(0.2)
        is_running = False
        for thread in threads:
            thread.join()
        assert wrong == []
        names = [version.split("-")[0] for version in versions]
        assert set(names) == {"monday", "tuesday"}
        order = [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]
        assert order[0] == order[-1] == "monday"
        assert running.ask("/reload", b"")[0] == 404  # not on the public port


def test_a_folder_that_is_completed_or_replaced_in_place_is_loaded(folders, tmp_path):
    model = copy_of(folders[1], tmp_path / "model")
    server = Server(ServerSettings(str(model), store=f"sqlite:///{tmp_path / 'events.db'}", device="cpu"))
    first = server.models["model"].version
    weights = (model / "model.safetensors").read_bytes()
    copy_of(folders[1], tmp_path / "other", lambda loaded: loaded.item_bias.weight.data.add_(1.0))
    (model / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is refused"):
        server.reload(only_changed=True)
    assert server.reload(only_changed=True) == {}  # it is not tried again before it changes
    shutil.copyfile(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
    assert set(server.reload(only_changed=True)) == {"model"}
    assert server.models["model"].version != first
    assert server.reload_errors == {}
    (model / "model.safetensors").write_bytes(weights)
    assert server.reload(only_changed=True) == {"model": first}
    server.close()


def test_a_body_without_its_type_is_told_and_head_is_answered(server):
    status, answer = server.ask("/recommend", b'{"history": []}')
    assert status == 200, answer
    request = urllib.request.Request(f"{server.url}/recommend", b'{"history": []}', {"content-type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert json.loads(caught.value.read())["detail"] == "expected JSON with the header content-type: application/json"
    head = urllib.request.Request(f"{server.url}/healthz", method="HEAD")
    assert urllib.request.urlopen(head).status == 200
    detail = server.ask("/openapi.json")[1]["components"]["schemas"]["Problem"]["properties"]["detail"]
    assert detail["type"] == "string"


def test_another_catalogue_is_refused(folders, tmp_path):
    served = ServedModel.load(str(folders[1]), "cpu")
    other = copy_of(folders[1], tmp_path / "other")
    tokenizer = Bert4RecTokenizer.from_pretrained(folders[1])
    renamed = [f"other {item}" for item in tokenizer.items]
    Bert4RecTokenizer.from_items(renamed).save_pretrained(other)
    with pytest.raises(ValueError, match="has 0 of the 21 items that are served, which is another catalogue"):
        served.check_successor(ServedModel.load(str(other), "cpu"))


def test_the_challenger_gets_its_share_of_the_users_and_always_the_same(folders, tmp_path):
    challenger = copy_of(folders[1], tmp_path / "challenger")
    settings = ServerSettings(
        str(folders[1]),
        store=f"sqlite:///{tmp_path / 'events.db'}",
        challenger=str(challenger),
        share=0.3,
        device="cpu",
    )
    server = Server(settings)
    with TestClient(create_app(server)) as client:
        chosen = [server.model_of(str(user)) is server.models["challenger"] for user in range(2000)]
        assert 0.26 < sum(chosen) / 2000 < 0.34
        assert chosen == [server.model_of(str(user)) is server.models["challenger"] for user in range(2000)]
        assert server.model_of(None) is server.models["model"]
        user = str(chosen.index(True))
        answer = client.post("/recommend", json={"user_id": user}).json()
        assert answer["model_version"].startswith("challenger-")
        assert set(client.get("/readyz").json()["models"]) == {"model", "challenger"}


@pytest.fixture
def with_rules(folders, tmp_path):
    """Words of the command line for a server with rules, and the path of their file."""
    items = Bert4RecTokenizer.from_pretrained(folders[1]).items
    lines = [
        "item_id,category,price,added",
        *(f"{item},{'ab'[n % 2]},{n},2026-01-{n + 1:02}" for n, item in enumerate(items)),
    ]
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "rules.yaml"
    path.write_text(
        "cheap: {where: price < 5}\nvaried: {max_per: 'category:2', boost: '9: price = 7', diversity: 0.2}\n"
    )
    return ["--items", tmp_path / "items.csv", "--rules", path], path


def test_requests_name_rules_or_have_conditions_if_allowed(folders, tmp_path, pipe, with_rules):
    words, _ = with_rules
    table = ItemTable.read(tmp_path / "items.csv", pipe.tokenizer)
    rules = {
        "cheap": Rules(table, where="price < 5"),
        "varied": Rules(table, boosts={"price = 7": 9}, max_per="category:2", diversity=0.2),
    }
    model = copy_of(folders[1], tmp_path / "served")
    with serving(
        model, tmp_path, *words, "--allow_where", "true", "--served_log", tmp_path / "log", admin_port=free_port()
    ) as running:
        requests = [
            {"history": pipe.tokenizer.items[:number], "rules": name, "top_k": 3 + number % 4}
            for number in range(12) for name in rules
        ]  # fmt: skip
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda request: running.ask("/recommend", request), requests))
        for request, (status, answer) in zip(requests, answers, strict=True):
            assert status == 200, answer
            expected = pipe(request["history"], rules=rules[request["rules"]], top_k=request["top_k"])
            assert [entry["item_id"] for entry in answer["items"]] == [entry["item_id"] for entry in expected]
        answer = running.ask("/recommend", {"history": [], "where": "category = 'b' AND price > 10"})[1]
        expected = pipe([], rules=Rules(table, where="category = 'b' AND price > 10"))
        assert [entry["item_id"] for entry in answer["items"]] == [entry["item_id"] for entry in expected]
        for body, message in (
            ({"rules": "none"}, "there are no rules 'none'; there are cheap, varied"),
            ({"rules": "cheap", "where": "price < 1"}, "expected rules or where, one of them; got both"),
            ({"where": "read_csv('/etc/passwd')"}, "condition"),
            ({"where": "color = 'red'"}, "color"),
        ):
            status, answer = running.ask("/recommend", {"history": [], **body})
            assert (status, message in answer["detail"]) == (400, True), answer
        found = running.ask(f"/items/{pipe.tokenizer.items[3].replace(' ', '%20')}")[1]
        assert found["columns"] == {"category": "b", "price": 3, "added": "2026-01-04 00:00:00"}
        # A model whose catalogue the rules do not fit is refused.
        tokenizer = Bert4RecTokenizer.from_pretrained(model)
        names = [*tokenizer.items[:12], *(f"new {number}" for number in range(9))]
        (tmp_path / "items.csv").write_text("item_id,price\n" + "".join(f"{item},1\n" for item in names))
        status, answer = running.ask("/reload", b"", url=running.admin_url)
        assert (status, "rules 'varied'" in answer["detail"]) == (409, True), answer
        assert running.ask("/recommend", {"history": [], "rules": "varied"})[0] == 200
    logged = pq.read_table(tmp_path / "log").to_pydict()
    assert set(logged["rules"]) == {"cheap", "varied", None}


def test_conditions_of_requests_are_refused_unless_allowed(local):
    answer = local.post("/recommend", json={"history": [], "where": "price < 5"})
    message = "this server allows no where; name rules of its configuration instead"
    assert (answer.status_code, answer.json()["detail"]) == (400, message)


def test_wrong_rules_are_told_when_the_server_starts(folders, tmp_path, with_rules):
    words, path = with_rules
    start = ["serve", folders[1], "--port", "0", "--store", f"sqlite:///{tmp_path / 'events.db'}", *words]
    for text, message in (
        ("cheap: {wher: price < 5}", "rules 'cheap': expected a mapping with some of where, boost, max_per, diversity"),
        ("cheap: {where: prize < 5}", "rules 'cheap':"),
        ("cheap: 5", "rules 'cheap': expected a mapping"),
        ("cheap: {max_per: 12:30}", "rules 'cheap': max_per must be a text or a list of texts; got 750: quote it"),
        ("cheap: {boost: 0.5}", "rules 'cheap': boost must be a text"),
        ("cheap: {boost: '1e39: price < 5'}", "rules 'cheap': a boost must be a number of standard deviations"),
        ("[1]", "must be a mapping of names to values; got [1]"),
        ("a: {b: [", "is no YAML that can be read"),
    ):
        path.write_text(text)
        assert message in fail(*start)
    assert "rules.yaml" in fail(*start[:-1], tmp_path / "missing" / "rules.yaml")


def test_a_full_queue_is_503_and_a_slow_answer_504(local):
    release = threading.Event()
    blocked = local.server.thread.call(release.wait)
    while not blocked.running():
        time.sleep(0.01)
    assert local.post("/recommend", json={"history": []}).status_code == 504  # and it still waits in the queue
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: local.post("/recommend", json={"history": []}), range(4)))
    full = [answer for answer in answers if answer.status_code == 503]
    assert len(full) >= 2
    assert full[0].headers["retry-after"] == "1"
    assert full[0].json()["detail"] == "2 requests wait already; try again later"
    release.set()
    assert blocked.result(10)
    waited = time.monotonic() + 10
    while local.post("/recommend", json={"history": []}).status_code != 200:
        assert time.monotonic() < waited


def test_a_database_that_fails_is_503_and_readiness_tells_it(local, monkeypatch):
    def fails(*arguments):
        raise OSError("the database does not answer: gone")

    monkeypatch.setattr(local.server.store, "history", fails)
    for answer in (local.post("/recommend", json={"user_id": "a"}), local.get("/readyz")):
        assert (answer.status_code, answer.json()["detail"]) == (503, "the database does not answer: gone")
    assert local.get("/healthz").status_code == 200
    assert local.post("/recommend", json={"history": []}).status_code == 200


def test_one_request_that_fails_does_not_spoil_the_others_of_its_batch(pipe):
    thread = ModelThread(max_waiting=8)
    release = threading.Event()
    thread.call(release.wait)
    good = [thread.recommend(pipe, [item], 3) for item in pipe.tokenizer.items[:3]]
    bad = thread.recommend(pipe, [], 3)
    found = thread.waiting.queue[-1]
    found.inputs["input_ids"] = torch.tensor([[10**6]])
    given_up: Future = thread.recommend(pipe, [], 3)
    assert given_up.cancel()
    release.set()
    for item, future in zip(pipe.tokenizer.items[:3], good, strict=True):
        answer, num_unknown = future.result(10)
        assert [entry["item_id"] for entry in answer] == [entry["item_id"] for entry in pipe([item], top_k=3)]
        assert num_unknown == 0
    with pytest.raises(ValueError, match="token ids must lie between"):
        bad.result(10)
    thread.stop()
    for _ in range(8):  # nothing answers any more
        thread.recommend(pipe, [], 3)
    with pytest.raises(queue.Full):
        thread.recommend(pipe, [], 3)


def test_a_store_is_filled_with_all_histories_or_with_none(folders, tmp_path, monkeypatch):
    store = EventStore(f"sqlite:///{tmp_path / 'events.db'}")
    from bert4rec_hf.serving import event_store

    batches = event_store._batches

    def interrupted(paths):
        yield next(batches(paths))
        raise KeyboardInterrupt

    monkeypatch.setattr(event_store, "EVENTS_PER_INSERT", 100)
    monkeypatch.setattr(event_store, "_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.fill(folders[0])
    monkeypatch.setattr(event_store, "_batches", batches)
    total = sum(len(row["item_id"]) for row in pq.read_table(folders[0] / "histories.parquet").to_pylist())
    assert store.fill(folders[0]) == total
    assert store.fill(folders[0]) == 0
    store.close()


def test_bad_options_are_one_line(folders, tmp_path):
    model, store = folders[1], ["--store", f"sqlite:///{tmp_path / 'events.db'}"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in fail("serve", model, *store, "--port", port)
    assert "cannot listen on nowhere.invalid" in fail("serve", model, *store, "--host", "nowhere.invalid")
    assert "--share must be between 0 and 1" in fail("serve", model, *store, "--challenger", model, "--share", "1.5")
    assert "--share is for --challenger" in fail("serve", model, *store, "--share", "0.5")
    assert "--admin_port must be a port of your choice" in fail("serve", model, *store, "--admin_port", "0")
    port = str(free_port())
    assert "cannot listen" in fail("serve", model, *store, "--port", port, "--admin_port", port)
    assert "cannot use the device 'foo'" in fail("serve", model, *store, "--device", "foo")
    assert "--allow_where needs an item table" in fail("serve", model, *store, "--port", "0", "--allow_where", "true")
    assert "events in memory would be lost" in fail("serve", model, "--port", "0", "--store", "sqlite://")
    assert "--max_waiting must be above 0; got 0" in fail("serve", model, *store, "--max_waiting", "0")
    port = ["--port", "0"]
    assert "expected the URL of a database" in fail("serve", model, *port, "--store", "events")
    assert "cannot use the database" in fail("serve", model, *port, "--store", f"sqlite:///{tmp_path}/no/events.db")
    message = fail("serve", model, *port, "--store", "nosuch://user:secret@host/name")
    assert "cannot use the database nosuch://user:***@host/name" in message
    (tmp_path / "other.db").write_bytes(b"this is no database, " * 100)
    assert "file is not a database" in fail("serve", model, *port, "--store", f"sqlite:///{tmp_path / 'other.db'}")
    assert "is not a prepared folder" in fail("serve", model, *port, *store, "--histories", tmp_path)
