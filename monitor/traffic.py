"""The traffic log: finished records -> SQLite, by one writer thread behind a bounded queue. Holds no text."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monitor.errors import ConfigInvalid
from monitor.types import Record

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL,
    choice INTEGER NOT NULL,
    created REAL NOT NULL,
    verdict TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS records_request ON records (request_id);
"""
_BATCH = 256


def record_json(record: Record) -> dict[str, Any]:
    return dataclasses.asdict(record)


class TrafficLog:
    """`put` never blocks: a full queue drops the record and counts it. `close` writes what is queued.

    dropped: called with the number of records lost, from any thread
    raises: ConfigInvalid if the file can't be opened
    """

    def __init__(self, path: Path, keep: int, queue_size: int, dropped: Callable[[int], None]) -> None:
        self._keep = keep
        self._dropped = dropped
        self._queue: queue.Queue[Record | None] = queue.Queue(queue_size)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False)
            os.chmod(path, 0o600)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigInvalid(f"records {str(path)!r} can't be opened ({error}); set MIDSTREAM_RECORDS") from error
        self._thread = threading.Thread(target=self._write, name="midstream-traffic", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped(1)

    @property
    def depth(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._db.close()

    def _write(self) -> None:
        done = False
        while not done:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            done = None in batch
            records = [r for r in batch if r is not None]
            rows = [(r.request_id, r.index, r.created, str(r.verdict), json.dumps(record_json(r))) for r in records]
            try:
                with self._db:
                    self._db.executemany(
                        "INSERT INTO records (request_id, choice, created, verdict, body) VALUES (?, ?, ?, ?, ?)",
                        rows,
                    )
                    self._db.execute("DELETE FROM records WHERE id <= (SELECT max(id) FROM records) - ?", (self._keep,))
            except sqlite3.Error:  # a full or failing disk must not stop traffic; the loss is counted
                self._dropped(len(rows))


def find_records(path: Path, request_id: str) -> list[dict[str, Any]]:
    """The records of one request, by choice. raises: ConfigInvalid if there is no such log"""
    if not path.exists():
        raise ConfigInvalid(f"there are no records at {str(path)!r}; set MIDSTREAM_RECORDS to the server's file")
    database = sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True)
    try:
        rows = database.execute("SELECT body FROM records WHERE request_id = ? ORDER BY choice", (request_id,))
        return [json.loads(body) for (body,) in rows]
    except sqlite3.Error as error:
        raise ConfigInvalid(f"{str(path)!r} is not a log of records ({error}); set MIDSTREAM_RECORDS") from error
    finally:
        database.close()
