"""One exchange with a running engine: bodies that force what is sampled, and the answer and its records taken apart."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import torch

from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.engines.embedded.model import LoadedModel
from monitor.live import LiveProbes
from monitor.sequence import Watch
from monitor.types import Caller, Record, Scorer

from ..conftest import Sink
from ..star import FILLER, token

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
# One for all clients, never collected with a socket open: a warning about that is an error here.
HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
BOTH = pytest.mark.parametrize("path", [CHAT, TEXT])
STREAM = pytest.mark.parametrize("stream", [False, True])


@dataclasses.dataclass
class Server:
    """What the contract needs of a running engine. idle: waits until nothing runs any more; False if it goes on"""

    url: str
    model: LoadedModel
    live: LiveProbes
    sink: Sink
    idle: Callable[[], bool]
    scorer: Scorer | None = None
    run: Callable[[Any], Any] = asyncio.run
    """Runs a coroutine where the scorer may be awaited."""
    behind: Sink | None = None
    """Of the engine that answers, if that is another one."""

    def judge(self, *text: Any) -> Record:
        return self.run(self.scorer.judge(*text))

    @property
    def api(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="unused", max_retries=0, http_client=HTTP)

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": self.model.name} | body, timeout=60, **kwargs)

    def ask(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> "Reply":
        """An answer in full, streamed or not, read without a client library."""
        return Reply(self.post(path, asked(path) | body, headers=headers))

    def records(self, request_id: str, n: int = 1) -> list[Record]:
        """The request's records, no more than n; each token of them is in exactly one place."""
        deadline = time.monotonic() + 20
        while len(found := self.sink.of(request_id)) < n and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [r.index for r in found] == list(range(n))
        for record in found:
            c = record.coverage
            places = (c.prompt_scored, c.response_scored, c.unmonitored, c.final_unscored, c.not_computed)
            assert min(places) >= 0 and sum(places) == c.prompt_tokens + c.response_tokens
            assert record.released_tokens <= c.response_scored + c.final_unscored
        return found


def scored(server: Server) -> float:
    """Steps of the engine that answers: still the same where nothing was asked of it."""
    return (server.behind or server.sink).metrics.registry.get_sample_value("midstream_score_seconds_count") or 0.0


def address(server: Server) -> tuple[str, int]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return url.host, url.port


def request(server: Server, path: str, body: dict[str, Any], *headers: bytes) -> bytes:
    """A POST as its bytes, so that a header may hold what no client library sends."""
    raw = json.dumps({"model": server.model.name} | body).encode()
    lines = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(raw), b"", raw])


class Reply:
    """A 200 taken apart. Per choice: text, every finish reason, the tokens with logprobs."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200, response.text
        self.raw, self.id = response.text, response.headers["x-midstream-request-id"]
        streamed = response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in self.raw.splitlines() if line.startswith("data: ")]
        self.done = streamed and lines[-1] == "[DONE]" and lines.count("[DONE]") == 1
        self.bodies = [json.loads(line) for line in lines[:-1]] if streamed else [response.json()]
        self.ids = {body["id"] for body in self.bodies}
        self.usages = [body["usage"] for body in self.bodies if body.get("usage")]
        self.texts: dict[int, str] = {}
        self.finishes: dict[int, list[str]] = {}
        self.tokens: dict[int, list[str]] = {}
        for body in self.bodies:
            for choice in body["choices"]:
                self._take(choice)

    def _take(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        part = choice.get("delta", choice.get("message", {"content": choice.get("text")}))
        finish = choice.get("finish_reason")  # an upstream of another make may leave out what is null
        assert not (self.finishes.get(index) and (part.get("content") or finish)), "after its finish"
        self.texts[index] = self.texts.get(index, "") + (part.get("content") or "")
        self.finishes.setdefault(index, []).extend([finish] if finish else [])
        logprobs = choice.get("logprobs") or {}
        spelled = [t["token"] for t in logprobs.get("content") or ()] + list(logprobs.get("tokens") or ())
        self.tokens.setdefault(index, []).extend(spelled)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def asked(path: str, text: str = "go on") -> dict[str, Any]:
    return {"messages": user(text)} if path == CHAT else {"prompt": text}


def forced(server: Server, p: int, character: str = "*") -> dict[str, Any]:
    """Fields that make the answer "a" before position p (from 1 on) and the character there. See tests/star.py."""
    bias = {token(server.model, FILLER): 98, token(server.model, ord(character)): 101 - 2 * p}
    # Not 0: vLLM takes no n > 1 with it. Biases are steps of 1 at least, so nothing is left to chance.
    return {"logit_bias": {str(i): b for i, b in bias.items()}, "frequency_penalty": 2, "temperature": 0.01}


def endless(server: Server) -> dict[str, Any]:
    return {"logit_bias": {str(token(server.model, FILLER)): 98}, "temperature": 0.01}


def logprobs(path: str) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}


def expected(server: Server, messages: list[dict[str, str]]) -> Record:
    """The record of a conversation's prompt, from transformers' forward pass and our Watch alone."""
    prompt = server.model.template.encode(messages)
    bank = server.live.bank
    ((_, streams),) = residual_streams(server.model, [prompt], bank.layers)
    watch = Watch(prompt, server.live.rules["chat"])
    watch.advance(0, score_streams(bank, streams))
    return watch.record("expected", 0, server.model.name, Caller(route="chat"))


def prompt_reading(record: Record) -> Any:
    (reading,) = [r for r in record.readings if r.phase == "prompt"]
    return reading


def zero_probe(model: LoadedModel, layer: int) -> dict[int, torch.Tensor]:
    """Weights that read nothing: only the bias speaks."""
    return {layer: torch.zeros(model.d_model)}
