"""The second judge at an endpoint: a conversation in, a logit back, within a deadline and without blocking anybody."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from monitor.policy.file import SecondPolicy

Answered = Callable[[float | None], None]
_WORKERS, _WAITING = 8, 64
_CHARS = 32_000  # of the conversation; of a longer one both ends
_CLIP = 0.01  # an endpoint's probability says no more than this
_TOP = 10


class Asker:
    """Asks endpoints from threads of its own. More than 64 open questions: the next is answered None at once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="midstream-second")
        self._clients: dict[SecondPolicy, httpx.Client] = {}
        self._lock = threading.Lock()
        self._open = 0

    def ask(self, how: SecondPolicy, conversation: Callable[[], str], answered: Answered) -> None:
        """`answered` is called once, from another thread: with a logit, or with None after an error or the deadline.

        conversation: called in a worker, gives the text to judge
        """
        once = _Once(answered, self._closed_one)
        with self._lock:
            self._open += 1
            full = self._open > _WORKERS + _WAITING
        if full:
            once(None)
            return
        timer = threading.Timer(how.deadline_s, once, (None,))
        timer.daemon = True
        timer.start()

        def work() -> None:
            try:
                if not once.done:  # the deadline may have passed before a worker was free
                    once(self._logit(how, conversation()))
            except Exception:  # whatever an endpoint can make fail: a `failed` escalation in the record
                once(None)
            finally:
                timer.cancel()

        self._pool.submit(work)

    def close(self) -> None:
        """Waits for what is being asked, at most its deadline: a connection in use can't be closed."""
        self._pool.shutdown(cancel_futures=True)
        for client in self._clients.values():
            client.close()

    def _closed_one(self) -> None:
        with self._lock:
            self._open -= 1

    def _client(self, how: SecondPolicy) -> httpx.Client:
        with self._lock:
            if how not in self._clients:
                headers = {} if how.api_key is None else {"Authorization": f"Bearer {how.api_key}"}
                self._clients[how] = httpx.Client(base_url=how.url or "", headers=headers, timeout=how.deadline_s)
            return self._clients[how]

    def _logit(self, how: SecondPolicy, conversation: str) -> float:
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
        answer = self._client(how).post("chat/completions", json=body)
        answer.raise_for_status()
        return logit(probability(answer.json()["choices"][0]))


class _Once:
    """Answer or deadline, whichever is first."""

    def __init__(self, answered: Answered, closed: Callable[[], None]) -> None:
        self._answered, self._closed = answered, closed
        self._first = threading.Lock()

    @property
    def done(self) -> bool:
        return self._first.locked()

    def __call__(self, logit: float | None) -> None:
        if self._first.acquire(blocking=False):
            self._closed()
            self._answered(logit)


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
