"""The log's database: SQLite by path, PostgreSQL by URL. Opened, brought up to date, its errors in our words."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

from monitor.errors import ConfigInvalid

Where = Path | str
"""A file of SQLite's, or a URL that begins with postgresql://"""
Mode = Literal["ro", "rw", "new"]
"""new: made if it is not there, and kept open"""
Connect = Callable[..., sqlite3.Connection]
FAILURES = (SQLAlchemyError, sqlite3.Error, OSError)
BUSY_S = 5.0
NEWEST = "v2"
_LOCK = 7_369_646  # of PostgreSQL's advisory locks: two servers that start don't migrate at once
_ALIVE = {"tcp_user_timeout": 10_000, "keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 2}
"""A server that is gone without a word is known to be in 10 to 15 s; Linux by itself asks for a quarter of an hour."""
_CACHE_KIB = 64 * 1024
_WAL_PAGES = 16 * 1024


def engine_of(where: Where, mode: Mode = "rw", connect: Connect = sqlite3.connect) -> Engine:
    """Of one connection at a time, opened when it is needed. raises: ConfigInvalid for a URL that is none"""
    if isinstance(where, Path):
        return _sqlite(where, mode, connect)
    try:
        url = make_url(where)
        if url.get_backend_name() != "postgresql":
            raise ConfigInvalid(f"log_url has the scheme {url.drivername!r}; write postgresql://USER@HOST/NAME")
        options = f"-c lock_timeout={int(BUSY_S * 1000)} -c client_encoding=UTF8"
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args={"connect_timeout": int(BUSY_S), "options": options} | _ALIVE,
            pool_pre_ping=True,
            # Whoever reads sees one state of it, as SQLite's do: records may go between two statements.
            isolation_level="REPEATABLE READ" if mode == "ro" else "READ COMMITTED",
            **_pool(mode),
        )
    except (SQLAlchemyError, ValueError) as error:
        raise ConfigInvalid("log_url is not a URL; write postgresql://USER@HOST/NAME") from error
    except ImportError as error:
        raise ConfigInvalid("log_url needs PostgreSQL's driver; pip install 'midstream[postgres]'") from error


def _pool(mode: Mode) -> dict[str, Any]:
    if mode == "new":
        return {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
    return {"poolclass": NullPool}


def _sqlite(path: Path, mode: Mode, connect: Connect) -> Engine:
    def connected() -> sqlite3.Connection:
        # By a URI, because only there a file can be opened to be read; SQLAlchemy's own URLs can't name every file.
        uri = f"{path.resolve().as_uri()}?mode={'rwc' if mode == 'new' else mode}"
        database = connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        if mode != "ro":
            database.execute("PRAGMA foreign_keys=ON")
            database.execute("PRAGMA secure_delete=ON")
            database.execute("PRAGMA synchronous=NORMAL")
        if mode == "new":
            database.execute("PRAGMA journal_mode=WAL")
            database.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            # Pages of an index change in any order: the more batches one copy into the file takes, the fewer copies.
            database.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        return database

    engine = create_engine("sqlite://", creator=connected, **_pool(mode))
    begin = "BEGIN" if mode == "ro" else "BEGIN IMMEDIATE"  # of two writers one waits, instead of failing halfway

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def make_file(path: Path) -> None:
    """By us and with its mode: SQLite's -wal and -shm take theirs from it. raises: OSError"""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    os.chmod(path, 0o600)


@contextlib.contextmanager
def told(where: Where, what: str = "used as a log of records") -> Iterator[None]:
    """The database's errors as ConfigInvalid, in one line without a password or a value."""
    try:
        yield
    except FAILURES as error:
        remedy = "MIDSTREAM_RECORDS" if isinstance(where, Path) else "MIDSTREAM_LOG_URL"
        raise ConfigInvalid(f"{name_of(where)} can't be {what} ({reason(error)}); set {remedy}") from error


def reason(error: BaseException) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def name_of(where: Where) -> str:
    return repr(str(where)) if isinstance(where, Path) else make_url(where).render_as_string(hide_password=True)


@contextlib.contextmanager
def opened(where: Where, mode: Literal["ro", "rw"] = "ro", update: bool = True) -> Iterator[Connection]:
    """A transaction on a log that exists. update: bring one of an older version up to date first

    raises: ConfigInvalid if there is no such log, it is somebody else's database, or can't be used
    """
    if isinstance(where, Path) and not where.exists():
        raise ConfigInvalid(f"there are no records at {str(where)!r}; set MIDSTREAM_RECORDS to the server's file")
    with told(where):
        if update:
            _update(where)
        engine = engine_of(where, mode)
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()


def _update(where: Where) -> None:
    """Only one that is old is opened to be written: reading must not wait for a writer."""
    for mode in ("ro", "rw"):
        engine = engine_of(where, mode)
        try:
            with engine.begin() as connection:
                if version_of(connection) == NEWEST:
                    return
            if mode == "rw":
                migrate(engine)
        finally:
            engine.dispose()


def version_of(connection: Connection) -> str | None:
    """None: a log from before there were versions. raises: ConfigInvalid if it is no log"""
    tables = inspect(connection).get_table_names()
    if "records" not in tables:
        raise ConfigInvalid("that is no log of records: no such table: records; set MIDSTREAM_RECORDS")
    if "alembic_version" not in tables:
        return None
    version: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return version


def migrate(engine: Engine, create: bool = False) -> None:
    """Up to the newest version, in one transaction. create: make the tables where there are none

    raises: SQLAlchemyError; ConfigInvalid if there is no log in it, or one of a newer version
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _LOCK})
        fresh = create and "records" not in inspect(connection).get_table_names()
        if fresh or version_of(connection) != NEWEST:
            _upgrade(connection)


def _upgrade(connection: Connection) -> None:
    from alembic import command  # here: most openings need nothing of it
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "monitor.traffic:migrations")
    try:
        command.upgrade(config, NEWEST)
    except CommandError as error:
        raise ConfigInvalid(f"the log was made by a newer midstream ({error}); update, or set another file") from error
