"""The audit log: one row for every admin action and every refused one, on disk before anything is answered."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitor.errors import ConfigInvalid, MidstreamError

# `audit` says who asked for what, before it is done; `outcome` how it ended. The triggers are for whoever opens the
# file with a tool: our own code only ever inserts. The index finds what is not only a look among very many looks, and
# is used where a query has the very same words.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    actor TEXT NOT NULL,
    peer TEXT NOT NULL,
    method TEXT NOT NULL,
    path TEXT NOT NULL,
    refused TEXT,
    unwritten INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS outcome (audit INTEGER PRIMARY KEY REFERENCES audit (id), result TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS audit_acts ON audit (id)
    WHERE method NOT IN ('GET', 'HEAD') OR refused IS NOT NULL OR unwritten > 0;
CREATE TRIGGER IF NOT EXISTS audit_stays BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS audit_as_is BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS outcome_stays BEFORE DELETE ON outcome BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS outcome_as_is BEFORE UPDATE ON outcome BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
_COLUMNS = ("id", "time", "actor", "peer", "method", "path", "refused", "unwritten", "result")
_ACTS = "a.method NOT IN ('GET', 'HEAD') OR a.refused IS NOT NULL OR a.unwritten > 0"
_NEWEST = 2**63 - 1
_BUSY_S = 2.0
_MAX_TEXT = 200


class AuditFailed(MidstreamError):
    """A row could not be written, so what it was about may not be done."""


class Audit:
    """Append-only, mode 0600. Every call writes or reads at once, so call it off the event loop; thread-safe.

    clock: seconds since the epoch
    raises: ConfigInvalid if the file can't be opened or written
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made by us with its mode: SQLite's -wal and -shm take theirs from it.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            os.chmod(path, 0o600)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise ConfigInvalid(f"audit log {str(path)!r} can't be opened ({error}); set MIDSTREAM_AUDIT") from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # few rows, and each must outlive the machine
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self._db.close()
            raise ConfigInvalid(f"audit log {str(path)!r} can't be written ({error}); set MIDSTREAM_AUDIT") from error

    def write(
        self, actor: str, peer: str, method: str, path: str, refused: str | None = None, unwritten: int = 0
    ) -> int:
        """The number of the new row. Texts are cut at 200 characters, what can't be printed becomes `?`.

        actor: admin, signal or unknown; peer: its address; refused: why, None: let in; unwritten: refused requests
        since the row before that were only counted
        raises: AuditFailed
        """
        row = (self._clock(), actor, peer, _printable(method), _printable(path), refused, unwritten)
        return self._insert(
            "INSERT INTO audit (time, actor, peer, method, path, refused, unwritten) VALUES (?, ?, ?, ?, ?, ?, ?)", row
        )

    def ended(self, row: int, result: str) -> None:
        """How the action of a row ended: a status or a sentence. raises: AuditFailed"""
        self._insert("INSERT INTO outcome (audit, result) VALUES (?, ?)", (row, _printable(result)))

    def _insert(self, statement: str, values: tuple[Any, ...]) -> int:
        try:
            with self._lock, self._db:
                return self._db.execute(statement, values).lastrowid or 0
        except sqlite3.Error as error:
            raise AuditFailed(
                f"audit log {str(self._path)!r} can't be written ({error}); make room or repair"
            ) from error

    def latest(self, limit: int, before: int | None = None, reads: bool = True) -> list[dict[str, Any]]:
        """The newest rows first, each with its outcome as `result`. raises: AuditFailed

        before: only rows older than the one of this number; reads: also what was let in and only looked
        """
        which, values = ("TRUE" if reads else f"({_ACTS})"), (_NEWEST if before is None else before, limit)
        join = "FROM audit a LEFT JOIN outcome o ON o.audit = a.id"
        query = f"SELECT a.*, o.result {join} WHERE a.id < ? AND {which} ORDER BY a.id DESC LIMIT ?"
        try:
            with self._lock:
                return [dict(zip(_COLUMNS, row, strict=True)) for row in self._db.execute(query, values)]
        except sqlite3.Error as error:
            raise AuditFailed(f"audit log {str(self._path)!r} can't be read ({error}); repair the file") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_TEXT])
