"""What leaves the log: the oldest records, those that are too old, a tenant's or a request's. Their bytes too."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, delete, func, select, text

from monitor.errors import ConfigInvalid
from monitor.traffic.database import FAILURES, Where, engine_of, opened, reason, told
from monitor.traffic.tables import labels, meta, readings, records, said

CHUNK = 1000
DAY_S = 86_400.0


class Newest:
    """Of all records the newest `keep` stay, and up to a 64th more for a while; `trim` after every batch. What somebody
    has labelled stays, until it is too old: a training may not have seen it yet.

    By rank: numbers have gaps, where records were erased, or lost while PostgreSQL counted on. Ranks are counted, which
    looks at an index of all records: so once for every 64th part of them, and for each batch where they are few.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._added, self._bound = keep, 0  # at first it is looked at once

    def trim(self, connection: Connection, added: int) -> None:
        """At most two CHUNKs go: more than a batch has. added: records of the batch"""
        self._added += added
        if self._added > self._keep // 64:
            self._added, self._bound = 0, self._last_beyond(connection)
        labelled = select(labels.c.id).where(labels.c.record == records.c.id).exists()
        if self._bound:
            _delete(connection, (records.c.id <= self._bound) & ~labelled, 2 * CHUNK)

    def forget(self) -> None:
        """The transaction of the newest `trim` was lost, and what it had counted."""
        self._added, self._bound = self._keep, 0

    def _last_beyond(self, connection: Connection) -> int:
        beyond = (connection.scalar(select(func.count()).select_from(records)) or 0) - self._keep
        if beyond <= 0:
            return 0
        oldest = select(records.c.id).order_by(records.c.id).offset(beyond - 1).limit(1)
        return connection.scalar(oldest) or 0


def drop_older(connection: Connection, created: float) -> int:
    """At most CHUNK of the records from before `created` (seconds since the epoch) go; returns how many."""
    return _delete(connection, records.c.created < created, CHUNK)


def _delete(connection: Connection, which: ColumnElement[bool], at_most: int = CHUNK) -> int:
    """Readings, labels and texts go with their record."""
    some = select(records.c.id).where(which).limit(at_most)
    return connection.execute(delete(records).where(records.c.id.in_(some))).rowcount


def erase(engine: Engine, key: str | None = None, request_id: str | None = None) -> int:
    """Every record of an API key's name ("" for requests without one) or of a request, by pieces; how many there were.

    raises: ConfigInvalid, with the number of those that are erased, if it fails, or their bytes may still be in the
    file because somebody reads it
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
    try:
        with engine.begin() as connection:  # what comes from now on is another's to erase: it must not go on for ever
            which &= records.c.id <= (connection.scalar(select(func.max(records.c.id))) or 0)
        # How many went does not say whether some are left: of PostgreSQL's rows others may delete some meanwhile.
        while _is_any(engine, which):
            with engine.begin() as connection:
                gone = _delete(connection, which)
            total += gone
    except FAILURES as error:  # whoever asked has to know how far it came
        raise ConfigInvalid(f"{total} records are erased, then it failed ({reason(error)}); run it again") from error
    _scrubbed(engine, f"{total} records")
    return total


def _is_any(engine: Engine, which: ColumnElement[bool]) -> bool:
    with engine.begin() as connection:
        return connection.scalar(select(records.c.id).where(which).limit(1)) is not None


def erase_texts(engine: Engine) -> int:
    """Every kept text, and the memory of the key that they were sealed with. raises: as `erase`; SQLAlchemyError"""
    with engine.begin() as connection:
        gone = connection.execute(delete(said)).rowcount
        connection.execute(delete(meta).where(meta.c.name == "key"))
    _scrubbed(engine, f"{gone} texts")
    return gone


def _scrubbed(engine: Engine, what: str) -> None:
    try:
        trouble = "" if scrub(engine) else "somebody reads the log"
    except FAILURES as error:
        trouble = reason(error)
    if trouble:
        raise ConfigInvalid(f"{what} are erased, but {trouble}, so their bytes may still be in its files; run it again")


def erase_each(acts: Mapping[str, Callable[[], int]]) -> dict[str, int]:
    """Name -> how many went: of records, and then of their features. What fails with one keeps none of the others.

    raises: ConfigInvalid at the end, with how many went and what failed
    """
    gone, failed = {}, []
    for name, act in acts.items():
        try:
            gone[name] = act()
        except (ConfigInvalid, OSError) as error:
            failed.append(str(error))
    if failed:
        raise ConfigInvalid("; ".join([*(f"{n} {name} are erased" for name, n in gone.items()), *failed]))
    return gone


def scrub(engine: Engine) -> bool:
    """What was deleted is overwritten; see that no copy of it is left beside. False if a reader is in the way.

    SQLite: `secure_delete` has zeroed it in the pages, and the write-ahead log is emptied. PostgreSQL: the tables are
    written anew, which locks them for as long; its own write-ahead log and backups are the operator's.
    """
    if engine.dialect.name == "sqlite":
        return scrub_lightly(engine)
    kept: list[int] = []
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        wire: Any = connection.connection.driver_connection
        count = partial(_count_dead, kept)
        wire.add_notice_handler(count)
        try:
            for table in (records, readings, labels, said):
                connection.execute(text(f"VACUUM (FULL, VERBOSE) {table.name}"))
        finally:
            wire.remove_notice_handler(count)
    return not any(kept)


def _count_dead(kept: list[int], notice: Any) -> None:
    """Of VACUUM's words: deleted rows that it wrote anew, because a transaction from before may still read them. They
    come in the server's language; what they are of does not."""
    if notice.source_function == "copy_table_data" and (found := re.search(r"\d+", notice.message_detail or "")):
        kept.append(int(found[0]))


def scrub_lightly(engine: Engine) -> bool:
    """For what ages out, every minute: as `scrub`, but of PostgreSQL nothing, whose own autovacuum frees the rows."""
    if engine.dialect.name != "sqlite":
        return True
    with contextlib.closing(engine.raw_connection()) as raw:
        busy: int = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    return not busy


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
