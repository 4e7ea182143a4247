"""What leaves the log: the oldest records, those that are too old, a tenant's or a request's. Their bytes too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, select, text

from monitor.errors import ConfigInvalid
from monitor.traffic.database import Where, engine_of, opened, told
from monitor.traffic.tables import labels, meta, readings, records, said

CHUNK = 1000
DAY_S = 86_400.0


def keep_newest(connection: Connection, keep: int) -> None:
    """At most CHUNK of the records beyond `keep` go; called with every batch, which is smaller. What somebody has
    labelled stays, until it is too old: a training may not have seen it yet."""
    newest = select(func.max(records.c.id)).scalar_subquery()
    labelled = select(labels.c.id).where(labels.c.record == records.c.id).exists()
    _delete(connection, (records.c.id <= newest - keep) & ~labelled)


def drop_older(connection: Connection, created: float) -> int:
    """At most CHUNK of the records from before `created` (seconds since the epoch) go; returns how many."""
    return _delete(connection, records.c.created < created)


def _delete(connection: Connection, which: ColumnElement[bool]) -> int:
    """Readings, labels and texts go with their record."""
    some = select(records.c.id).where(which).limit(CHUNK)
    return connection.execute(delete(records).where(records.c.id.in_(some))).rowcount


def erase(engine: Engine, key: str | None = None, request_id: str | None = None) -> int:
    """Every record of an API key's name ("" for requests without one) or of a request, by pieces; how many there were.

    raises: SQLAlchemyError; ConfigInvalid if their bytes may still be in the file because somebody reads it
    """
    if (key is None) == (request_id is None):
        raise ConfigInvalid("say whose records: a key or an id")
    if key is not None:
        which = records.c.key == key
    else:
        # A request that judges several texts names them ID, ID-1, ID-2, ...
        which = (records.c.request_id == request_id) | records.c.request_id.startswith(
            f"{request_id}-", autoescape=True
        )
    total = 0
    while True:
        with engine.begin() as connection:
            gone = _delete(connection, which)
        total += gone
        if gone < CHUNK:
            break
    if not scrub(engine):
        raise ConfigInvalid(
            f"{total} records are erased, but somebody reads the log, so their bytes may still be in its -wal file; "
            "run it again"
        )
    return total


def erase_texts(engine: Engine) -> int:
    """Every kept text, and the memory of the key that they were sealed with. raises: as `erase`"""
    with engine.begin() as connection:
        gone = connection.execute(delete(said)).rowcount
        connection.execute(delete(meta).where(meta.c.name == "key"))
    if not scrub(engine):
        raise ConfigInvalid(f"{gone} texts are erased, but somebody reads the log; run it again")
    return gone


def scrub(engine: Engine) -> bool:
    """What was deleted is overwritten; see that no copy of it is left beside. False if a reader is in the way.

    SQLite: `secure_delete` has zeroed it in the pages, and the write-ahead log is emptied. PostgreSQL: the tables are
    written anew, which locks them for as long; its own write-ahead log and backups are the operator's.
    """
    if engine.dialect.name == "sqlite":
        with contextlib.closing(engine.raw_connection()) as raw:
            busy: int = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return not busy
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for table in (records, readings, said):
            connection.execute(text(f"VACUUM FULL {table.name}"))
    return True


def erased_from(where: Where, act: Callable[[Engine], int]) -> int:
    """`erase` or `erase_texts` on a log that no server of this process has open. raises: ConfigInvalid"""
    with opened(where):
        pass  # it is there, a log, and up to date
    with told(where, "erased from"):
        engine = engine_of(where, "rw")
        try:
            return act(engine)
        finally:
            engine.dispose()
