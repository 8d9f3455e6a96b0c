"""The events of `bert4rec serve` in PostgreSQL. `make test-postgres` runs it."""

import os
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest
from log_and_model import write_log_and_model
from running_server import serving

psycopg = pytest.importorskip("psycopg")

from bert4rec_hf.serving.event_store import EventStore  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    data, model, _ = write_log_and_model(tmp_path_factory.mktemp("model"))
    return data, model


@pytest.fixture
def url(server):
    """The URL of an empty store."""
    with psycopg.connect(server.replace("postgres://", "postgresql://")) as connection:
        connection.execute("drop table if exists bert4rec_events, bert4rec_filled_from")
    return server.replace("postgres://", "postgresql+psycopg://")


def test_two_servers_fill_a_store_once(folders, url):
    stores, numbers = [EventStore(url), EventStore(url)], []
    threads = [threading.Thread(target=lambda store=store: numbers.append(store.fill(folders[0]))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    histories = pq.read_table(folders[0] / "histories.parquet").to_pylist()
    assert sorted(numbers) == [0, sum(len(row["item_id"]) for row in histories)]
    for row in histories[:20]:
        assert stores[0].history(row["user_id"], 10_000) == [(item, None) for item in row["item_id"]]
        assert stores[0].history(row["user_id"], 3) == [(item, None) for item in row["item_id"][-3:]]


def test_two_servers_add_the_types_to_a_store_of_an_earlier_release(url):
    EventStore(url).close()
    with psycopg.connect(url.replace("postgresql+psycopg://", "postgresql://")) as connection:
        connection.execute("alter table bert4rec_events drop column event_type")
        connection.execute("insert into bert4rec_events (user_id, item_id) values ('u', 'a'), ('u', 'b')")
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(EventStore(url))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stores[0].add("u", ["c"], ["cart"])
    assert stores[1].history("u", 10) == [("a", None), ("b", None), ("c", "cart")]


def test_no_acknowledged_event_is_lost_by_a_kill(folders, url, tmp_path):
    acknowledged = {"a": [], "b": []}

    def send(running, user):
        for number in range(10_000):
            items = [f"{number}-{place}" for place in range(3)]
            try:
                if running.ask("/events", {"user_id": user, "item_ids": items})[0] != 201:
                    return
            except OSError:
                return
            acknowledged[user] += items

    with serving(folders[1], tmp_path, "--store", url) as running:
        threads = [threading.Thread(target=send, args=(running, user)) for user in acknowledged]
        for thread in threads:
            thread.start()
        time.sleep(2)
        os.kill(running.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    store = EventStore(url)
    for user, items in acknowledged.items():
        stored = [item for item, _ in store.history(user, 10**6)]
        assert len(items) > 10
        assert stored[: len(items)] == items
        assert len(stored) - len(items) in (0, 3)


def test_a_database_that_goes_away_is_503_and_comes_back(folders, url, server, tmp_path):
    with serving(folders[1], tmp_path, "--store", url) as running:
        assert running.ask("/events", {"user_id": "a", "item_ids": ["x"]})[0] == 201
        with psycopg.connect(server.replace("postgres://", "postgresql://"), autocommit=True) as connection:
            connection.execute("alter table bert4rec_events rename to elsewhere")
            status, answer = running.ask("/recommend", {"user_id": "a"})
            assert (status, answer["detail"].startswith("the database does not answer: relation")) == (503, True)
            assert running.ask("/readyz")[0] == 503
            assert running.ask("/recommend", {"history": []})[0] == 200
            connection.execute("alter table elsewhere rename to bert4rec_events")
            query = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
            connection.execute(query)  # as if the database had been started again
        assert running.ask("/recommend", {"user_id": "a"})[1]["num_events"] == 1
