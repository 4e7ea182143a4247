"""The second judge at an endpoint: a conversation in, a logit back, within a deadline and without blocking anybody."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from monitor.policy.file import SecondPolicy

Answered = Callable[[float | None], None]
_AT_ONCE, _WAITING = 8, 64
_CHARS = 32_000  # of the conversation; of a longer one both ends
_CLIP = 0.01  # an endpoint's probability says no more than this
_TOP = 10


class Asker:
    """Asks endpoints from a thread of its own, 8 at once. With 72 questions open, the next is answered None at once.

    On an event loop, where a deadline ends whatever it waits for: httpx's own time-outs are each of one read, and an
    endpoint that sends a byte now and then keeps none of them.
    """

    def __init__(self) -> None:
        self._clients: dict[SecondPolicy, httpx.AsyncClient] = {}
        self._lock = threading.Lock()
        self._open = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # with the first question: most servers ask none
        self._thread: threading.Thread | None = None
        self._closed = False
        self._asking: set[asyncio.Task[None]] = set()
        self._few = asyncio.Semaphore(_AT_ONCE)

    def ask(self, how: SecondPolicy, conversation: Callable[[], str], answered: Answered) -> None:
        """`answered` is called once, from another thread: with a logit, or with None after an error or the deadline.

        conversation: called in that thread, gives the text to judge
        """
        until = time.monotonic() + how.deadline_s  # an event loop's clock is the monotonic one
        with self._lock:
            if not self._closed and self._open < _AT_ONCE + _WAITING:
                self._open += 1
                self._running().call_soon_threadsafe(self._begin, how, conversation, answered, until)
                return
        answered(None)

    def close(self) -> None:
        """Who still waits is answered None; nothing here waits for an endpoint."""
        with self._lock:
            self._closed, loop = True, self._loop
        if loop is None or self._thread is None or loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="midstream-second", daemon=True)
            self._thread.start()
        return self._loop

    # --- its own thread ---------------------------------------------------------------------------------------------

    def _begin(self, how: SecondPolicy, conversation: Callable[[], str], answered: Answered, until: float) -> None:
        task = asyncio.ensure_future(self._answer(how, conversation, answered, until))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _answer(
        self, how: SecondPolicy, conversation: Callable[[], str], answered: Answered, until: float
    ) -> None:
        second = None
        try:
            with contextlib.suppress(Exception):  # whatever an endpoint can make fail: a `failed` escalation
                async with asyncio.timeout_at(until), self._few:
                    second = await self._logit(how, conversation())
        finally:
            with self._lock:
                self._open -= 1
            answered(second)

    async def _end(self) -> None:
        asking = list(self._asking)  # not what these have begun in turn: they end that themselves
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    def _client(self, how: SecondPolicy) -> httpx.AsyncClient:
        if how not in self._clients:
            headers = {} if how.api_key is None else {"Authorization": f"Bearer {how.api_key}"}
            self._clients[how] = httpx.AsyncClient(base_url=how.url or "", headers=headers, timeout=None)  # noqa: S113 - `until`
        return self._clients[how]

    async def _logit(self, how: SecondPolicy, conversation: str) -> float:
        if len(conversation) > _CHARS:
            conversation = conversation[: _CHARS // 2] + "\n[...]\n" + conversation[-_CHARS // 2 :]
        body = {
            "model": how.model,
            "messages": [{"role": "user", "content": how.prompt.replace("{conversation}", conversation)}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": _TOP,
        }
        answer = await self._client(how).post("chat/completions", json=body)
        answer.raise_for_status()
        return logit(probability(answer.json()["choices"][0]))


def probability(choice: dict[str, Any]) -> float:
    """Of "yes", out of a chat choice: from its first token's logprobs, or without them from its text.

    raises: ValueError if it says neither yes nor no
    """
    tokens = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
    mass = {"yes": 0.0, "no": 0.0}
    for token in tokens:
        word = token["token"].strip().lower()
        if word in mass:
            if not token["logprob"] <= 0:  # NaN neither
                raise ValueError(f"the second judge gave {word!r} the logprob {token['logprob']!r}")
            mass[word] += math.exp(token["logprob"])
    if total := sum(mass.values()):
        return mass["yes"] / total
    word = (choice["message"]["content"] or "").strip().lower()
    if word.startswith(("yes", "no")):
        return 1.0 if word.startswith("yes") else 0.0
    raise ValueError(f"the second judge said {word[:32]!r}, neither yes nor no")


def logit(p: float) -> float:
    p = min(1 - _CLIP, max(_CLIP, p))
    return math.log(p / (1 - p))
