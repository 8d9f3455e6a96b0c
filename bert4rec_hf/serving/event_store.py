"""The histories of users in a database, for the server: SQLite, or any database that SQLAlchemy connects to."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    event,
    exc,
    insert,
    select,
)
from sqlalchemy.engine import make_url

from ..data.histories import check_prepared, histories_files

# Number of events that are written at once when a store is filled.
EVENTS_PER_INSERT = 50_000
# Seconds that a writer waits for another one.
LONGEST_WAIT = 30

_METADATA = MetaData()
# The order of the ids is the order of the events of a user. SQLite numbers only a column of this very type by itself.
_EVENTS = Table(
    "bert4rec_events",
    _METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("user_id", String, nullable=False),
    Column("item_id", String, nullable=False),
    Index("bert4rec_events_of_user", "user_id", "id"),
)
_FILLED = Table("bert4rec_filled_from", _METADATA, Column("source", String, primary_key=True))


class EventStore:
    """Events of users in a database. An event is stored durably when `add` returns.

    The order of a user's events is the order in which they were added. Calls from several threads are safe.

    Args:
        url: A URL of SQLAlchemy, such as sqlite:///events.db or postgresql+psycopg://user:password@host/name. SQLite
            writes ahead (WAL), and waits at each commit until the disk has the events.

    Raises:
        ImportError: If the driver of the database is not installed.
        ValueError: If the URL is none, or the database cannot be opened or has other tables of these names.
    """

    def __init__(self, url: str):
        try:
            parsed = make_url(url)
        except exc.ArgumentError as error:
            raise ValueError(
                f"expected the URL of a database, such as sqlite:///events.db or "
                f"postgresql+psycopg://user:password@host/name; got {url!r}"
            ) from error
        self.name = parsed.render_as_string(hide_password=True)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        if is_sqlite and parsed.database in (None, "", ":memory:"):
            raise ValueError(f"events in memory would be lost; got {url}: name a file, as in sqlite:///events.db")
        options: dict[str, Any] = {"connect_args": {"timeout": LONGEST_WAIT}} if is_sqlite else {"pool_pre_ping": True}
        try:
            self.engine = create_engine(parsed, **options)
        except (exc.NoSuchModuleError, exc.ArgumentError) as error:
            raise ValueError(f"cannot use the database {self.name}: {error}") from error
        except ImportError as error:
            raise ImportError(f"{error}: install the driver of {self.name}") from error
        if is_sqlite:
            event.listen(self.engine, "connect", _durable_sqlite)
        try:
            _METADATA.create_all(self.engine)
            with self.engine.begin() as connection:  # this fails if the database cannot be read or written
                connection.execute(select(_EVENTS).limit(1)).all()
                connection.execute(delete(_FILLED).where(_FILLED.c.source == ""))
        except exc.SQLAlchemyError as error:
            raise ValueError(f"cannot use the database {self.name}: {_reason(error)}") from error

    def add(self, user_id: str, item_ids: Sequence[str]) -> None:
        """Append events to the history of a user.

        Args:
            user_id: The user, who may be new.
            item_ids: The items, oldest first. The catalogue of the model may lack some.

        Raises:
            OSError: If the database does not take them.
        """
        rows = [{"user_id": user_id, "item_id": item_id} for item_id in item_ids]
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(_EVENTS), rows)
        except exc.SQLAlchemyError as error:
            raise OSError(f"the database does not take events: {_reason(error)}") from error

    def history(self, user_id: str, max_events: int) -> list[str]:
        """The newest items of a user, oldest first. An unknown user has none.

        Args:
            user_id: The user.
            max_events: Largest number of items.

        Raises:
            OSError: If the database does not answer.
        """
        query = select(_EVENTS.c.item_id).where(_EVENTS.c.user_id == user_id)
        try:
            with self.engine.connect() as connection:
                found = connection.execute(query.order_by(_EVENTS.c.id.desc()).limit(max_events)).scalars().all()
        except exc.SQLAlchemyError as error:
            raise OSError(f"the database does not answer: {_reason(error)}") from error
        return list(reversed(found))

    def fill(self, data: str | os.PathLike) -> int:
        """Add all histories of a prepared folder, held-out targets included, to an empty store.

        Either all histories are added, or none. A store that has events stays as it is.

        Args:
            data: The prepared folder.

        Returns:
            The number of events that were added; 0 if the store has events already.

        Raises:
            OSError: If the database does not take them.
            ValueError: If this is no prepared folder.
        """
        check_prepared(data)
        number = 0
        try:
            with self.engine.begin() as connection:
                if connection.execute(select(_EVENTS.c.id).limit(1)).first() is not None:
                    return 0
                # If two servers start at the same time, the second one waits here for the first one, and then fails.
                connection.execute(insert(_FILLED), [{"source": "histories"}])
                for rows in _batches(histories_files(Path(data))):
                    connection.execute(insert(_EVENTS), rows)
                    number += len(rows)
        except exc.IntegrityError:
            return 0
        except exc.SQLAlchemyError as error:
            raise OSError(f"cannot fill the database {self.name}: {_reason(error)}") from error
        return number

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _durable_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # At each commit, SQLite waits until the disk has the events, so that they also survive a power failure.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _batches(paths: Iterable[Path]) -> Iterator[list[dict[str, str]]]:
    rows: list[dict[str, str]] = []
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=["user_id", "item_id"]):
            for user, items in zip(batch["user_id"].to_pylist(), batch["item_id"].to_pylist(), strict=True):
                rows += [{"user_id": str(user), "item_id": item} for item in items]
                if len(rows) >= EVENTS_PER_INSERT:
                    yield rows
                    rows = []
    if rows:
        yield rows


def _reason(error: exc.SQLAlchemyError) -> str:
    """The database's own message in one line, without the statement and its values, which SQLAlchemy appends."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
