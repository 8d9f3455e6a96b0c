"""The histories of users in a database, for the server: SQLite, or any database that SQLAlchemy connects to."""

import json
import os
from collections.abc import Iterator, Sequence
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
    inspect,
    select,
    text,
)
from sqlalchemy.engine import make_url

from ..data.histories import PREPARATION_FILE, check_prepared, histories_files

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
    Column("event_type", String),
    Index("bert4rec_events_of_user", "user_id", "id"),
)
_FILLED = Table("bert4rec_filled_from", _METADATA, Column("source", String, primary_key=True))


class EventStore:
    """Events of users in a database. An event is stored durably when `add` returns.

    The order of a user's events is the order in which they were added. Calls from several threads are safe. A store of
    an earlier release gets a column for the types of events; its events stay, without types.

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
            self._add_column_of_types()
            with self.engine.begin() as connection:  # this fails if the database cannot be read or written
                connection.execute(select(_EVENTS).limit(1)).all()
                connection.execute(delete(_FILLED).where(_FILLED.c.source == ""))
        except exc.SQLAlchemyError as error:
            raise ValueError(f"cannot use the database {self.name}: {_reason(error)}") from error

    def _add_column_of_types(self) -> None:
        """Add the column event_type to the table of an earlier release, which has none."""

        def is_missing() -> bool:
            names = {column["name"] for column in inspect(self.engine).get_columns(_EVENTS.name)}
            return {"user_id", "item_id"} <= names and "event_type" not in names  # otherwise the table is no store

        if not is_missing():
            return
        try:
            with self.engine.begin() as connection:
                connection.execute(text(f"ALTER TABLE {_EVENTS.name} ADD COLUMN event_type VARCHAR"))
        except exc.DBAPIError:
            if is_missing():  # another server may have added it in the meantime
                raise

    def add(self, user_id: str, item_ids: Sequence[str], event_types: Sequence[str | None] | None = None) -> None:
        """Append events to the history of a user.

        Args:
            user_id: The user, who may be new.
            item_ids: The items, oldest first. The catalogue of the model may lack some.
            event_types: The type of each event, None for an event without one. None: no event has a type.

        Raises:
            OSError: If the database does not take them.
        """
        types = [None] * len(item_ids) if event_types is None else event_types
        rows = [
            {"user_id": user_id, "item_id": item_id, "event_type": event_type}
            for item_id, event_type in zip(item_ids, types, strict=True)
        ]
        try:
            with self.engine.begin() as connection:
                connection.execute(insert(_EVENTS), rows)
        except exc.SQLAlchemyError as error:
            raise OSError(f"the database does not take events: {_reason(error)}") from error

    def history(self, user_id: str, max_events: int) -> list[tuple[str, str | None]]:
        """The newest items of a user with the types of the events, oldest first. An unknown user has none.

        Args:
            user_id: The user.
            max_events: Largest number of events.

        Raises:
            OSError: If the database does not answer.
        """
        query = select(_EVENTS.c.item_id, _EVENTS.c.event_type).where(_EVENTS.c.user_id == user_id)
        try:
            with self.engine.connect() as connection:
                found = connection.execute(query.order_by(_EVENTS.c.id.desc()).limit(max_events)).all()
        except exc.SQLAlchemyError as error:
            raise OSError(f"the database does not answer: {_reason(error)}") from error
        return [(item_id, event_type) for item_id, event_type in reversed(found)]

    def starts_without_types(self) -> bool:
        """Whether the oldest event has no type, as in a store of an earlier release."""
        with self.engine.connect() as connection:
            oldest = connection.execute(select(_EVENTS.c.event_type).order_by(_EVENTS.c.id).limit(1)).first()
        return oldest is not None and oldest[0] is None

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
                for rows in _batches(Path(data)):
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


def _batches(data: Path) -> Iterator[list[dict[str, str | None]]]:
    preparation = json.loads((data / PREPARATION_FILE).read_text("utf-8"))
    # Without event types, a column of this name is one that was only copied.
    has_types = preparation.get("columns", {}).get("event_type_column") is not None
    columns = ["user_id", "item_id", *["event_type"] * has_types]
    rows: list[dict[str, str | None]] = []
    for path in histories_files(data):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024, columns=columns):
            for user, items, *types in zip(*(batch[name].to_pylist() for name in columns), strict=True):
                rows += [
                    {"user_id": str(user), "item_id": item, "event_type": event_type}
                    for item, event_type in zip(items, types[0] if types else [None] * len(items), strict=True)
                ]
                if len(rows) >= EVENTS_PER_INSERT:
                    yield rows
                    rows = []
    if rows:
        yield rows


def _reason(error: exc.SQLAlchemyError) -> str:
    """The database's own message in one line, without the statement and its values, which SQLAlchemy appends."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
