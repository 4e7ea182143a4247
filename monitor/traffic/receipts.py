"""Receipts: whether the records of a request are in the log yet, for whoever is about to end its answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict

from monitor.traffic.text import Said

_LEFT = 256
_LEFT_CHARACTERS = 2**24


class Receipt:
    """Of one request. digest: of its prompt, for its records; choices: those that have a record of its own name; whole:
    its answer went out to the end; left: what was said, for records that come after its client has gone

    Records are counted in by `expect` and out by `settle`, from any thread; `wait` is awaited in an event loop.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self.digest: str | None = None
        self.choices: list[int] = []
        self.whole = False
        self.left: Said | None = None
        self._lock = lock
        self._open = self._lost = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def expect(self) -> None:
        self._open += 1

    def settle(self, lost: bool) -> None:
        with self._lock:
            self._open -= 1
            self._lost += lost
            waiting, self._waiting = ([], self._waiting) if self._open else (self._waiting, [])
        for loop, future in waiting:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_done, future)

    async def wait(self, seconds: float) -> bool | None:
        """True: every record so far is in the log; False: one is lost; None: not known within so many seconds"""
        with self._lock:
            if not self._open:
                return not self._lost
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._waiting.append((loop, future))
        try:
            async with asyncio.timeout(seconds):
                await future
        except TimeoutError:
            return None
        return not self._lost


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Receipts:
    """Of the requests that are being answered, by request id; as many as the server answers at once.

    An engine notices a moment later than the server that a client has gone, and then hands its record over: the newest
    of those requests are remembered, a bounded number of them, so that their records have a digest and texts too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, Receipt] = {}
        self._gone: OrderedDict[str, Receipt] = OrderedDict()
        self._gone_characters = 0

    def open(self, request_id: str) -> Receipt:
        receipt = Receipt(self._lock)
        with self._lock:
            self._of[request_id] = receipt
        return receipt

    def close(self, request_id: str, said: Said | None = None) -> list[int]:
        """Its client has its answer, or has gone. said: what went both ways; returns the choices that have a record"""
        with self._lock:
            receipt = self._of.pop(request_id, None)
            if receipt is None:
                return []
            if not receipt.whole and receipt.digest is not None:
                receipt.left = said
                self._gone[request_id] = receipt
                self._gone_characters += _size(receipt)
                while len(self._gone) > _LEFT or self._gone_characters > _LEFT_CHARACTERS:
                    self._gone_characters -= _size(self._gone.popitem(last=False)[1])
            return list(receipt.choices)

    def expect(self, request_id: str, choice: int) -> tuple[Receipt | None, Said | None]:
        """The receipt that waits for this record, and the text that its client has left for it.

        A request that judges several texts names them ID, ID-1, ID-2, ...; its own text goes with ID alone. Whether it
        is this record's or is said by `close` is settled under the lock: never both, never neither.
        """
        with self._lock:
            name = request_id.partition("-")[0]
            receipt = self._of.get(name) or self._gone.get(name)
            if receipt is None:
                return None, None
            receipt.expect()
            if name != request_id:
                return receipt, None
            receipt.choices.append(choice)
            return receipt, None if receipt.left is None else receipt.left.of([choice])


def _size(receipt: Receipt) -> int:
    return 0 if receipt.left is None else receipt.left.size
