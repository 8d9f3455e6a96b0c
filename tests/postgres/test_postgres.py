"""A log in a PostgreSQL server: as an Ibis table, and as a query on the command line. `make test-postgres` runs it."""

from pathlib import Path

import ibis
import pytest
from chain_runs import free_port
from command_runs import fail, succeed
from logs_on_disk import items_of

from bert4rec_hf.data.logs import query

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []
TABLE = """
CREATE TABLE events (
    user_id numeric(38, 0), item_id text, code bytea, number uuid, timestamp timestamptz, event_type text, odd jsonb
);
INSERT INTO events VALUES
    (12345678901234567890123456789012345678, '0x10', 'a', '00000000-0000-0000-0000-000000000001',
     '2024-01-01 10:00:00.000002+02', 'view', '{"a": 1}'),
    (12345678901234567890123456789012345678, '-0', 'b', '00000000-0000-0000-0000-000000000002',
     '2024-01-01 08:00:00.000001+00', 'view', NULL),
    (7, '007', 'a', '00000000-0000-0000-0000-000000000001', '2024-01-01', 'purchase', NULL),
    (7, 'é, "x"', 'c', '00000000-0000-0000-0000-000000000003', '2024-01-02', 'view', NULL);
"""


@pytest.fixture(scope="module", autouse=True)
def table(server):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(server.replace("postgres://", "postgresql://")) as connection:
        connection.execute(TABLE)


LONG = "12345678901234567890123456789012345678"


def test_an_ibis_table_of_postgres_is_a_log(server):
    events = ibis.connect(server).table("events")
    assert items_of(events) == {LONG: ["-0", "0x10"], "7": ["007", 'é, "x"']}
    assert items_of(events, item_column="number")["7"] == [f"00000000-0000-0000-0000-00000000000{n}" for n in (1, 3)]
    assert items_of(events, item_column="code")["7"] == ["a", "c"]
    assert items_of(events, where="event_type = 'purchase' OR item_id = '-0'") == {LONG: ["-0"], "7": ["007"]}


def test_a_query_of_postgres_is_a_log(server, tmp_path):
    sql = "SELECT * FROM events WHERE event_type = 'view'"
    assert items_of(query(sql, server)) == {LONG: ["-0", "0x10"], "7": ['é, "x"']}
    words = ["--database", server, "--output", tmp_path / "data", "--split", "none"]
    assert succeed("prepare", "--sql", sql, *words)[0].startswith("2 users, 3 items, 3 events")
    assert "cannot read 'SELECT * FROM nothing' from postgres" in fail(
        "prepare", "--sql", "SELECT * FROM nothing", *words
    )
    unreachable = f"postgres://shop@127.0.0.1:{free_port()}/postgres"
    error = fail("prepare", "--sql", sql, "--database", unreachable, "--output", tmp_path / "other")
    assert "from postgres" in error
    assert not (tmp_path / "other").exists()
