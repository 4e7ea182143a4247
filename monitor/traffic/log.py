"""The writer: finished records into the database, by one thread behind a bounded queue; and when they are there."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, select
from sqlalchemy.exc import DataError, IntegrityError

from monitor.errors import ConfigInvalid
from monitor.traffic.database import BUSY_S, FAILURES, Connect, Where, engine_of, make_file, migrate, reason, told
from monitor.traffic.erase import CHUNK, DAY_S, Newest, drop_older, erase, scrub_lightly
from monitor.traffic.receipts import Receipt, Receipts
from monitor.traffic.review import count_unlabelled
from monitor.traffic.rows import Mark, Row, mark_features, row_of, write
from monitor.traffic.tables import meta
from monitor.traffic.text import Cipher, Said, digest, write_said
from monitor.traffic.waiting import Entry, Job, Waiting
from monitor.types import Record

_RETRY_S = 0.25
_SWEEP_S = 60.0
_ERASE_S = 60.0


T = TypeVar("T")


class TrafficLog:
    """`put` never blocks: a full queue drops the record and counts it. `close` writes what is queued.

    where: a file, or PostgreSQL's URL; keep: newest records that stay, up to a 64th more for a while; days: those
    older than that go, None: never
    dropped: called with the number of records lost, from any thread
    required: no answer is ended before its record is written, and none begun while none can be; wait_s: seconds that
    the end of an answer waits for its record at most; cipher: keep texts, sealed with it
    texts_dropped: as `dropped`, of texts by choice
    connect: opens SQLite; clock: seconds since the epoch
    raises: ConfigInvalid if the log can't be opened, or the texts in it were sealed with another key
    """

    def __init__(
        self,
        where: Where,
        keep: int,
        queue_size: int,
        dropped: Callable[[int], None],
        *,
        days: float | None = None,
        required: bool = False,
        wait_s: float = 1.0,
        cipher: Cipher | None = None,
        texts_dropped: Callable[[int], None] = lambda n: None,
        connect: Connect = sqlite3.connect,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.required, self.keeps_texts = required, cipher is not None
        self._texts_dropped = texts_dropped
        self._where, self._newest, self._days, self._dropped = where, Newest(keep), days, dropped
        self._wait_s, self._cipher, self._clock = wait_s, cipher, clock
        self._waiting = Waiting(queue_size)
        self._receipts = Receipts()
        self._failing = False  # the newest attempt to write
        self._wrote = self._stalled = time.monotonic()  # newest batch written; since when somebody waited in vain
        self._closing = threading.Event()
        self._sweep_at = time.monotonic()
        self._swept = 0
        with told(where, "opened"):
            if isinstance(where, Path):
                make_file(where)
            self._engine = engine_of(where, "new", connect)
            try:
                migrate(self._engine, create=True)
                with self._engine.begin() as connection:
                    self._salt: bytes = connection.scalars(select(meta.c.value).where(meta.c.name == "salt")).one()
                    if cipher is not None:
                        cipher.check(connection)
            except BaseException:
                self._engine.dispose()
                raise
        self._thread = threading.Thread(target=self._run, name="midstream-traffic", daemon=True)
        self._thread.start()

    # --- any thread -----------------------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        receipt, left = self._receipts.expect(record.request_id, record.index)
        if not self._waiting.put(Entry(record, receipt)):
            self._drop([receipt])
            self._texts_dropped(left is not None)
        elif left is not None:
            self.say(left)

    def say(self, said: Said) -> None:
        """Texts of records that were put before. Dropped where there is no room, and counted."""
        if self._cipher is None or not self._waiting.say(said):
            self._texts_dropped(len(said.answers))

    @property
    def depth(self) -> int:
        return self._waiting.depth

    @property
    def refuses(self) -> bool:
        """A record that came now could not be written, and it has to be."""
        return self.required and (self._in_trouble or self._waiting.full)

    @property
    def _in_trouble(self) -> bool:
        return self._failing or self._stalled > self._wrote

    def backlog(self) -> int:
        """Kept records of flags, blocks and missing scores that nobody has labelled; reads the database.

        raises: ConfigInvalid if it can't be read
        """
        return count_unlabelled(self._where)

    def erase(self, key: str | None = None, request_id: str | None = None) -> int:
        """As `erase`, after all that was put before. Waits for the writer, but not for ever. raises: ConfigInvalid"""
        with told(self._where, "erased from"):
            return self._in_turn(lambda engine: erase(engine, key, request_id))

    def mark_features(self, file: str, marks: Sequence[Mark]) -> set[tuple[str, int]]:
        """As `mark_features`, after all that was put before; waits as `erase`. raises: ConfigInvalid"""
        with told(self._where):
            return self._in_turn(lambda engine: mark_features(engine, file, marks))

    def _in_turn(self, act: Callable[[Engine], T]) -> T:
        job = Job(act)
        if not self._waiting.ask(job, BUSY_S):
            raise ConfigInvalid("the log is busy with records that it can't write; try again later")
        result: T = job.done.result(_ERASE_S)
        return result

    def digest(self, prompt: Any) -> str:
        return digest(self._salt, prompt)

    def close(self) -> None:
        self._closing.set()
        self._waiting.ask(None, None)
        self._thread.join()
        self._engine.dispose()

    # --- who ends an answer ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def followed(self, request_id: str, said: Callable[[], Said]) -> Iterator[Receipt]:
        """A receipt of the request's records, inside of the block. said: asked at its end, if texts are kept"""
        receipt = self._receipts.open(request_id)
        try:
            yield receipt
        finally:  # without an await: none completes once the client has left
            if self.keeps_texts:
                whole = said()
                if choices := self._receipts.close(request_id, whole):
                    self.say(whole.of(choices))
            else:
                self._receipts.close(request_id)

    async def kept(self, receipt: Receipt) -> bool:
        """Whether what ends an answer may go out: its record is written, or the log need not have it.

        Of a log in trouble nobody waits for anything: then an answer goes out at once, or, if its record is required,
        not at all.
        """
        if self._in_trouble and not self.required:
            return True
        began = time.monotonic()
        written = await receipt.wait(self._wait_s)
        if written is None:
            self._stalled = max(self._stalled, began)
        return written is True or not self.required

    # --- the writer's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            timeout = None if self._days is None else max(0.001, self._sweep_at - time.monotonic())
            batch = self._waiting.take(timeout)
            self._write([e for e in batch if isinstance(e, Entry)], [e for e in batch if isinstance(e, Said)])
            for item in batch:
                if isinstance(item, Job):
                    item.run(self._engine)
            if None in batch:
                return
            self._sweep()

    def _write(self, entries: Sequence[Entry], texts: Sequence[Said]) -> None:
        prepared = [(row, e.receipt) for e in entries if (row := self._row(e)) is not None]
        receipts = [receipt for _, receipt in prepared]
        while prepared or texts:
            try:
                lost = self._commit([row for row, _ in prepared], texts)
            except FAILURES as error:  # a full or failing disk must not stop traffic; the loss is counted
                hopeless = isinstance(error, DataError | IntegrityError)  # it is the records, not the database
                self._failing = not hopeless
                self._newest.forget()
                if hopeless or not self.required or self._closing.wait(_RETRY_S):
                    self._drop(receipts)
                    self._texts_dropped(sum(len(t.answers) for t in texts))
                    break
            else:
                self._texts_dropped(lost)
                self._failing, self._wrote = False, time.monotonic()
                for receipt in receipts:
                    if receipt is not None:
                        receipt.settle(lost=False)
                break
        self._waiting.written(texts)

    def _commit(self, rows: Sequence[Row], texts: Sequence[Said]) -> int:
        """Returns how many texts are lost although the records are written."""
        with self._engine.begin() as connection:
            write(connection, rows)
            self._newest.trim(connection, len(rows))
            return write_said(connection, self._cipher, texts) if texts and self._cipher is not None else 0

    def _row(self, entry: Entry) -> Row | None:
        receipt = entry.receipt
        try:
            return row_of(entry.record, None if receipt is None else receipt.digest)
        except (TypeError, ValueError, RecursionError):  # one that JSON can't hold costs itself, not the thread
            self._drop([receipt])
            return None

    def _drop(self, receipts: Sequence[Receipt | None]) -> None:
        if receipts:
            self._dropped(len(receipts))
        for receipt in receipts:
            if receipt is not None:
                receipt.settle(lost=True)

    def _sweep(self) -> None:
        """What is too old, CHUNK at a time: records that wait are written in between."""
        if self._days is None or time.monotonic() < self._sweep_at:
            return
        try:
            with self._engine.begin() as connection:
                gone = drop_older(connection, self._clock() - self._days * DAY_S)
            self._swept += gone
            if gone == CHUNK:
                return
            if self._swept and scrub_lightly(self._engine):
                self._swept = 0
        except FAILURES as error:
            print(f"midstream: old records can't be dropped now ({reason(error)}); tried again soon", file=sys.stderr)
        self._sweep_at = time.monotonic() + _SWEEP_S
