"""Routes of vLLM behind the gate, played: what a client asks, what the judge does meanwhile, what comes back."""

import asyncio
import json

import numpy as np

from monitor.aggregate import Aggregation
from monitor.api.vllm.gate import Gate
from monitor.api.vllm.wire import sse
from monitor.config import load_settings
from monitor.engines.vllm.call import CALL
from monitor.metrics import Metrics
from monitor.policy.rule import Rule
from monitor.sequence import Watch
from monitor.types import Caller, Mode, Opening, Phase, Prompt, Terms, Turn

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
BATCH = "/v1/chat/completions/batch"
ID = b"x-midstream-request-id"


class Inner:
    """vLLM's route, played: sends its messages, and between them does to the call what the judge would."""

    def __init__(self, *script):
        self.script, self.call, self.body, self.out = script, None, None, []

    async def __call__(self, scope, receive, send):
        self.call = CALL.get()
        self.body = (await receive())["body"]
        for step in self.script:
            if callable(step):
                step(self)
            else:
                await send(step)


class Answer:
    """What the client got."""

    def __init__(self, sent):
        starts = [m for m in sent if m["type"] == "http.response.start"]
        bodies = [m for m in sent if m["type"] == "http.response.body"]
        assert len(starts) == 1 and sent[0] is starts[0], "one start, and nothing before it"
        assert [m.get("more_body", False) for m in bodies] == [True] * (len(bodies) - 1) + [False], (
            "one end, at the end"
        )
        self.status, self.headers = starts[0]["status"], dict(starts[0]["headers"])
        assert len(self.headers) == len(starts[0]["headers"]), "no header twice"
        self.parts = [m["body"] for m in bodies]
        self.body = b"".join(self.parts)
        assert self.headers[ID]
        if b"content-length" in self.headers:
            assert int(self.headers[b"content-length"]) == len(self.body)

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        """The data of every event; [DONE] as None."""
        found = [e.split(b"data: ")[1] for e in self.body.split(b"\n\n") if e]
        return [None if data == b"[DONE]" else json.loads(data) for data in found]


def ask(model, inner, body, path=CHAT, chunks=None, out=None, metrics=None, **bounds):
    """Send a body through the gate; the messages that came back. body: an object, or bytes as they are"""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    incoming = [{"type": "http.request", "body": c, "more_body": True} for c in chunks or []]
    incoming += [{"type": "http.request", "body": b"" if chunks else raw, "more_body": False}]
    sent = inner.out if out is None else out

    async def receive():
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    gate = Gate(inner, path, model.template, load_settings(**bounds), metrics or Metrics())
    asyncio.run(gate({"type": "http", "path": path}, receive, send))
    return sent


def start(kind=b"application/json", status=200, *more):
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *more]}


def stream():
    return start(b"text/event-stream; charset=utf-8")


def part(body, more=True):
    return {"type": "http.response.body", "body": body, "more_body": more}


END = part(b"", more=False)


def whole(data, status=200):
    raw = json.dumps(data).encode()
    return [start(b"application/json", status, (b"content-length", str(len(raw)).encode())), part(raw, more=False)]


def judge(n=1, terms=None, readings=()):
    """n more prompts have their verdict."""

    def step(inner):
        call = inner.call
        call.terms = terms or Terms()
        first = len(call.openings)
        call.openings |= {first + i: Opening(call.terms, readings) for i in range(n)}

    return step


def block(*indices):
    def step(inner):
        inner.call.blocked |= dict.fromkeys(indices, 0)

    return step


def fail(record):
    def step(inner):
        inner.call.failed = record

    return step


def nothing_yet(inner):
    assert inner.out == []


def chunk(index=0, content="", finish=None):
    choice = {"index": index, "delta": {"content": content}, "finish_reason": finish}
    return sse(None, {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


DONE = b"data: [DONE]\n\n"


def record_of(scores, fail_mode="closed", index=0):
    """The record of a sequence of three prompt tokens with these scores."""
    rules = [Rule("p0", "v1", 0, phase, Mode.BLOCK, 5.0, Aggregation("max"), fail_mode) for phase in Phase]
    watch = Watch(Prompt((0, 1, 2), (Turn(1, 3),), 0, "chat"), rules)
    watch.advance(0, np.array(scores, np.float32).reshape(3, 1), 1)
    watch.end("aborted")
    return watch.record("r1", index, "m", Caller(route="chat"))


HARMFUL, UNSCORED, ABORTED = record_of([0, 9, 0]), record_of([0, np.nan, 0]), record_of([0, 0, 0])


def user(text="hi"):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def call_of(model, body, path=CHAT, **bounds):
    """The call that vLLM's route sees for this body; it must see the body as it was sent."""
    inner = Inner(*whole({}))
    ask(model, inner, body, path, **bounds)
    assert inner.call is not None, inner.out
    assert inner.body == (body if isinstance(body, bytes) else json.dumps(body).encode())
    return inner.call
