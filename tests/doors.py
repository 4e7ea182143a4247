"""Routes without a model: an ASGI app on a real socket, a Scorer and an Engine whose values are planted by words."""

import asyncio
import contextlib
import json
import math
import re
import socket
import threading

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from monitor.api.errors import ApiError, validation
from monitor.api.judging import Judging
from monitor.api.refusal import Refusal, refuse
from monitor.config import load_settings
from monitor.errors import Overloaded, RequestInvalid
from monitor.template import ChatTemplate
from monitor.types import Action, Caller, Coverage, Delta, Mode, Opening, Phase, ProbeReading, Record, Terms

from .conftest import tiny_tokenizer

ID = "0123456789abcdef0123456789abcdef"
MODEL = "org/tiny"
THRESHOLD = 1.0
DOES = {Mode.SHADOW: Action.ALLOW, Mode.FLAG: Action.FLAG, Mode.BLOCK: Action.BLOCK}


@contextlib.contextmanager
def listening(app):
    """The app on a free port; gives its URL. Connections wait in the backlog until it is up."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


class FakeScorer:
    """A word in a text plants a value: {word: {probe: logit}}; what has no value is at -4, and NaN is a missing score.

    modes: probe -> mode, in both phases; calls: (request id, prompt's text, answer's text, caller) in order
    """

    def __init__(self, planted, modes, max_tokens=400):
        self.template = ChatTemplate(tiny_tokenizer())
        self.planted, self._modes, self.max_tokens = planted, modes, max_tokens
        self.reset()

    def reset(self):
        """As it was made: one server serves all tests of a file."""
        self.modes, self.calls = dict(self._modes), []
        self.fail_mode = "closed"
        self.full = self.hang = False
        self.at_once = self.most_at_once = 0
        self.wait_for = 0  # calls that must be under way before any returns
        self._enough = asyncio.Event()
        self.cancelled, self.entered = threading.Event(), threading.Event()

    async def judge(self, request_id, prompt, answer, caller):
        texts = {Phase.PROMPT: self._text(prompt.token_ids), Phase.RESPONSE: self._text(answer)}
        self.calls.append((request_id, texts[Phase.PROMPT], texts[Phase.RESPONSE], caller))
        if self.full:
            raise Overloaded("the queue is full; try again later")
        if len(prompt.token_ids) + len(answer) > self.max_tokens:
            raise RequestInvalid(f"{len(prompt.token_ids) + len(answer)} tokens do not fit; shorten the text")
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.set()
        try:
            if self.at_once >= self.wait_for:
                self._enough.set()
            await asyncio.wait_for(self._enough.wait(), 30)  # only guards against hanging
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.at_once -= 1
        return self.record(request_id, texts, caller, len(prompt.token_ids), len(answer))

    def _text(self, ids):
        return self.template.tokenizer.decode(list(ids))

    def record(self, request_id, texts, caller, n_prompt, n_answer):
        readings = tuple(
            self._reading(probe, mode, phase, text)
            for phase, text in texts.items()
            for probe, mode in self.modes.items()
            if phase is Phase.PROMPT or n_answer
        )
        actions = {r.action for r in readings}
        closed = Action.UNMONITORED in actions and self.fail_mode == "closed"
        blocked = Action.BLOCK in actions
        return Record(
            request_id=request_id,
            index=0,
            created=0.0,
            model=MODEL,
            route=caller.route,
            format="chat",
            verdict=Action.BLOCK if blocked else Action.UNMONITORED if closed else Action.ALLOW,
            finish="content_filter" if blocked else "unmonitored" if closed else "stop",
            released_tokens=n_answer,
            held_tokens=0,
            coverage=Coverage(n_prompt, n_answer, n_prompt, n_answer, 0, 0, 0, {}),
            readings=readings,
            counted=(),
            token_scores={},
            key=caller.key,
        )

    def _reading(self, probe, mode, phase, text):
        values = [values[probe] for word, values in self.planted.items() if word in text and probe in values]
        value = max(values, default=-4.0, key=lambda v: math.inf if math.isnan(v) else v)
        missing, above = math.isnan(value), value > THRESHOLD
        return ProbeReading(
            probe=probe,
            version="v3",
            phase=phase,
            mode=mode,
            threshold=THRESHOLD,
            value=None if missing else value,
            newest=None if missing else value,
            peak_position=None,
            peak_score=None,
            crossed_at=0 if above else None,
            action=Action.UNMONITORED if missing else DOES[mode] if above else Action.ALLOW,
            would_block=above and mode is not Mode.BLOCK,
        )


class FakeEngine:
    """An Engine that says `answers[word]` to a prompt that holds the word, piece by piece, as its Scorer judges it.

    terms: what the caller's policy says
    """

    model_name, max_model_len = MODEL, 400

    def __init__(self, scorer, answers):
        self.scorer, self.answers, self.terms = scorer, answers, Terms()

    def submit(self, request, deliver):
        for prompt_index, prompt in enumerate(request.prompts):
            for i in range(request.n):
                self._answer(request, prompt_index * request.n + i, prompt, deliver)

    def _answer(self, request, index, prompt, deliver):
        asked = self.scorer.template.tokenizer.decode(list(prompt.token_ids))

        def judged(said):
            texts = {Phase.PROMPT: asked, Phase.RESPONSE: "".join(said)}
            caller = Caller(request.caller.key, request.caller.route, MODEL)
            return self.scorer.record(request.id, texts, caller, len(prompt.token_ids), len(said))

        record = judged([])
        opening = Opening(self.terms, record.readings)
        if record.finish != "stop":
            deliver(Delta(index, "", (), 0, record.finish, record, opening))
            return
        deliver(Delta(index, "", (), 0, None, opening=opening))
        pieces = next((said for word, said in self.answers.items() if word in asked), ["Fine", "."])
        for end, piece in enumerate(pieces, 1):
            record = judged(pieces[:end])
            if record.finish != "stop":
                break
            deliver(Delta(index, piece, (), 1, None))
        deliver(Delta(index, "", (), 0, record.finish, record))

    def abort(self, request_id):
        pass

    def readiness(self):
        return None

    def describe(self):
        return {"active": 0, "waiting": 0}


def refusing(text, paths):
    """An app that refuses everything. paths: path -> name of the route, as in monitor.api.refusal.ROUTES"""

    async def app(scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        refusal = Refusal(
            ID,
            asked["model"],
            text,
            created=7,
            n=asked.get("n") or 1,
            stream=bool(asked.get("stream")),
            include_usage=bool((asked.get("stream_options") or {}).get("include_usage")),
            prompt_tokens=12,
            extra={"prompt_filter_results": []} if asked.get("user") == "annotated" else {},
        )
        await refuse(paths[scope["path"]], refusal)(scope, receive, send)

    return app


def judging(scorer, **settings):
    return Judging(scorer, scorer.template, load_settings(**settings), MODEL)


def door(routes, key="tenant-1"):
    """An app with these routes, behind what stands for the Front: our id and the key's name."""
    app = FastAPI()
    app.include_router(routes)

    @app.exception_handler(ApiError)
    async def api_error(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        return validation(error.errors()).response()

    async def front(scope, receive, send):
        scope.setdefault("state", {}).update(midstream_id=ID, midstream_key=key)
        await app(scope, receive, send)

    return front


def turns(text):
    """(role, content) of a prompt in the tiny model's template."""
    return re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
