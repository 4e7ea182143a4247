"""What an attacker does to every engine of ours: T4 to T9 of RELIABILITY.md. A test file gives two fixtures.

starred: a server whose probe blocks the token `*` in both phases; app: its ASGI application
"""

import asyncio
import contextlib
import http.client
import json
import random
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from .attacks import (
    ATTEMPTS,
    ELSEWHERE,
    EVERYTHING_ELSE,
    HARMFUL,
    HARMLESS,
    IDS,
    JUDGED,
    POSITIONS,
    SHAPES,
    TOO_MANY,
    UPGRADES,
    Attempt,
    Shape,
)
from .contract import (
    BOTH,
    CHAT,
    JSON,
    STREAM,
    TEXT,
    Reply,
    Server,
    asked,
    endless,
    expected,
    forced,
    prompt_reading,
    user,
)
from .star import FILLER, STAR, token


def sampled(every: int) -> pytest.MarkDecorator:
    """`every`: 1 for all cases in `make attack`, more for a sample in `make test`."""
    cases = [pytest.param(every, id="sample"), pytest.param(1, id="all", marks=pytest.mark.attack)]
    return pytest.mark.parametrize("every", cases)


def ms(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1e3:.1f} ms, p99 {ordered[int(len(ordered) * 0.99)] * 1e3:.1f} ms"


def scored(server: Server) -> float:
    """Steps that the engine has judged: still the same where nothing was asked of it."""
    return server.sink.metrics.registry.get_sample_value("midstream_score_seconds_count") or 0.0


def send(server: Server, method: str, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
    """The path as it is written: httpx would tidy it."""
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


def address(server: Server) -> tuple[str, int]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return url.host, url.port


def is_block(response: httpx.Response) -> bool:
    if response.status_code != 400:
        return False
    error = response.json().get("error", {})
    return isinstance(error, dict) and error.get("code") == "content_filter"


class Blocks:
    """T4."""

    @sampled(19)
    def test_no_character_from_the_trigger_on(self, starred, every):
        """64 positions x streamed or not x n of 1 to 4: 512 cases."""
        cases = POSITIONS[::every]
        others = dict.fromkeys(map(str, range(len(starred.model.tokenizer))), EVERYTHING_ELSE)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda case: self.blocked(starred, others, *case), cases))
        past = {more for _, after in found for more in after}
        assert starred.idle() and max(past) <= 2, past
        ends = ms([seconds for seconds, _ in found])
        print(f"T4: {len(cases)} cases, 0 characters from the trigger on, sampled after it {past}; end after {ends}")

    def blocked(self, server: Server, bias: dict[str, float], p: int, stream: bool, n: int) -> tuple[float, list[int]]:
        """(seconds from the verdict to the end of the answer, tokens of each choice sampled after the trigger)"""
        path = (CHAT, TEXT)[(p + n) % 2]
        body = forced(server, p) | {"max_tokens": 80, "stream": stream, "n": n}
        body["logit_bias"] = bias | body["logit_bias"]
        reply = server.ask(path, body | {"logprobs": True if path == CHAT else 1})
        done = time.monotonic()
        assert reply.texts == dict.fromkeys(range(n), "a" * (p - 1)), (p, stream, n)
        assert reply.finishes == {i: ["content_filter"] for i in range(n)}
        assert {len(t) for t in reply.tokens.values()} == {p - 1}
        assert len(reply.ids) == 1 and reply.done is stream
        records = server.records(reply.id, n)
        for record in records:
            assert (record.verdict, record.finish, record.released_tokens) == ("block", "content_filter", p - 1)
        return done - server.sink.at[reply.id], [r.coverage.response_tokens - p for r in records]


class Routes:
    """T5."""

    def test_every_route_that_reads_a_text_leaves_a_verdict(self, starred, app):
        while not hasattr(app, "routes"):
            app = app.app  # what stands in front
        paths = {route.path for route in app.routes}
        assert paths <= JUDGED.keys() | HARMLESS, "a new route: put it into one of the two tables"
        assert {CHAT, TEXT} <= paths
        for path in sorted(paths & JUDGED.keys()):
            response = starred.post(path, JUDGED[path])
            assert response.status_code == 200, (path, response.text)
            (record,) = starred.records(response.headers["x-midstream-request-id"])
            assert record.coverage.unmonitored == 0 and prompt_reading(record).value is not None
            assert record.coverage.prompt_scored == record.coverage.prompt_tokens
        assert starred.idle()
        print(f"T5: {len(paths & JUDGED.keys())} routes of {len(paths)} read a text, each left a verdict")

    def test_what_no_text_goes_into_asks_nothing_of_the_engine(self, starred, app):
        before = scored(starred), len(starred.sink.records)
        while not hasattr(app, "routes"):
            app = app.app
        for path in sorted({route.path for route in app.routes} & HARMLESS):
            for method in ("GET", "POST"):
                assert send(starred, method, path, json.dumps(self.body(starred)).encode(), JSON).status_code < 500, (
                    path
                )
        assert starred.idle() and (scored(starred), len(starred.sink.records)) == before

    def test_every_other_path_leads_nowhere(self, starred):
        assert len(ELSEWHERE) >= 60
        before = scored(starred), len(starred.sink.records)
        raw = json.dumps(self.body(starred)).encode()
        statuses: dict[int, int] = {}
        for method, path in ELSEWHERE:
            response = send(starred, method, path, raw, JSON)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            # 307: the spelling without the last slash; an answer is asked for there, if at all.
            assert 400 <= response.status_code < 500 or response.status_code == 307, (method, path, response.text)
            assert "aaaa" not in response.text
        for path in (CHAT, TEXT, "/v1/responses", "/v1/realtime", "/"):
            assert 400 <= send(starred, "GET", path, b"", UPGRADES).status_code < 500, path
        assert starred.idle() and (scored(starred), len(starred.sink.records)) == before
        print(f"T5: {len(ELSEWHERE)} other paths, 5 upgrades: statuses {statuses}, engine calls 0")

    def body(self, server: Server) -> dict[str, Any]:
        """Whatever a route might want."""
        more = {"input": "go on", "text": "go on", "message": "go on", "query": "go on", "token_ids": [70, 71]}
        more |= {"model": server.model.name, "max_tokens": 8, "sampling_params": {"max_tokens": 8}, "method": "x"}
        return more | asked(CHAT) | asked(TEXT) | endless(server)


class Switches:
    """T6."""

    @BOTH
    def test_no_client_switches_the_monitor_off(self, starred, path):
        """The verdict is that of the plain request or the request is refused, for a prompt and for an answer."""
        assert len(ATTEMPTS) >= 40
        plain = self.records(starred, Attempt("plain"), path)
        outcomes = {attempt.name: self.records(starred, attempt, path) for attempt in ATTEMPTS}
        for name, found in outcomes.items():
            for mine, theirs in zip(plain, found, strict=True):
                if theirs is None:
                    continue
                assert theirs.verdict == mine.verdict == "block", name
                assert theirs.released_tokens == mine.released_tokens, name
                assert theirs.coverage.unmonitored == 0, name
                for reading, other in zip(mine.readings, theirs.readings, strict=True):
                    assert (reading.action, reading.crossed_at) == (other.action, other.crossed_at), name
                    assert reading.value == pytest.approx(other.value, abs=1e-3), name
        assert None not in plain and starred.idle()
        refused = sum(record is None for found in outcomes.values() for record in found)
        print(f"T6 {path}: {len(ATTEMPTS)} attempts, {refused} of {2 * len(ATTEMPTS)} requests refused, 0 unwatched")

    def records(self, server: Server, attempt: Attempt, path: str) -> list[Any]:
        """[record of a harmful prompt, record of a harmful answer]; None: refused, and not computed"""
        found: list[Any] = []
        before = len(server.sink.records)
        response = self.sent(server, attempt, path, HARMFUL[path] | {"max_tokens": 5})
        if is_block(response):
            found += server.records(response.headers["x-midstream-request-id"])
        else:
            assert 400 <= response.status_code < 500, (attempt.name, response.text)
            found.append(None)
        response = self.sent(server, attempt, path, asked(path) | forced(server, 3) | {"max_tokens": 9})
        if response.status_code == 200:
            reply = Reply(response)
            assert (reply.texts, reply.finishes) == ({0: "aa"}, {0: ["content_filter"]}), attempt.name
            assert "*" not in reply.raw
            found += server.records(reply.id)
        else:
            assert 400 <= response.status_code < 500 and not is_block(response), (attempt.name, response.text)
            found.append(None)
        assert len(server.sink.records) == before + sum(r is not None for r in found), attempt.name
        return found

    def sent(self, server: Server, attempt: Attempt, path: str, body: dict[str, Any]) -> httpx.Response:
        raw = json.dumps({"model": server.model.name} | body | attempt.fields).encode()
        return send(server, "POST", attempt.target(path), attempt.rewrite(raw), JSON | attempt.headers)


class Shapes:
    """T7. The trigger falls at random, at another place in every choice, and in some nowhere."""

    shapes = SHAPES

    def refuses(self, shape: Shape) -> bool:
        """Whether the engine answers it with a 400."""
        return False

    @sampled(4)
    def test_the_trigger_is_found_in_the_right_choice(self, starred, every):
        """stream x n of 1, 2, 8 x echo x logprobs x tools x response_format x stop x max_tokens 1: all of them."""
        shapes, count = self.shapes[::every], {"refused": 0, "blocked prompts": 0, "cut": 0, "whole": 0, "mixed": 0}
        for shape in shapes:
            given = HARMFUL[shape.path] if shape.last else asked(shape.path)
            bias = {str(token(starred.model, FILLER)): 98, str(token(starred.model, STAR)): 96}
            response = starred.post(shape.path, given | {"logit_bias": bias, "temperature": 1.0} | shape.fields())
            if self.refuses(shape):
                assert response.status_code == 400 and not is_block(response), (shape, response.text)
                count["refused"] += 1
                continue
            if shape.last:
                assert is_block(response), (shape, response.text)
                assert response.json().keys() == {"error"} and "logprob" not in response.text
                count["blocked prompts"] += 1
                continue
            cut = self.check(starred, shape, Reply(response))
            count["cut"] += cut
            count["whole"] += shape.n - cut
            count["mixed"] += 0 < cut < shape.n
        assert starred.idle() and count["cut"] and count["whole"] and count["mixed"]
        print(f"T7: {len(shapes)} shapes, {count}, 0 leaks")

    def check(self, server: Server, shape: Shape, reply: Reply) -> int:
        """How many choices of an answer were cut, each at its own trigger."""
        prompt = "go on" if shape.echo else ""
        records = server.records(reply.id, shape.n)
        for i, record in enumerate(records):
            text, released = reply.texts[i].removeprefix(prompt), record.released_tokens
            (response,) = [r for r in record.readings if r.phase == "response"]
            assert record.coverage.unmonitored == 0 and reply.texts[i].startswith(prompt)
            if record.verdict == "block":
                assert reply.finishes[i] == [record.finish] == ["content_filter"], shape
                assert response.crossed_at == record.coverage.prompt_tokens + released
                assert "*" not in text and "*" not in reply.tokens[i], shape
            else:
                assert reply.finishes[i] == ["length"] and released == 8 and response.crossed_at is None
                assert "*" not in text[:-1], "only the last token has no score, and is counted as such"
                assert record.coverage.final_unscored == 1
            assert len(text) == released and set(text) <= set('a*"'), (shape, text)
            if shape.form != "json":
                assert text[:-1] == "a" * (released - 1) if released else text == "", (shape, text)
            if shape.logprobs:
                assert len(reply.tokens[i]) == released + len(prompt), (shape, reply.tokens[i])
        (usage,) = reply.usages
        assert usage["completion_tokens"] == sum(r.released_tokens for r in records), shape
        return sum(r.verdict == "block" for r in records)

    @STREAM
    def test_at_once_each_has_as_many_logprobs_as_it_asked_for(self, starred, stream):
        """An engine that works in batches finds as many for all of a step as one of them wants."""

        def ask(k: int) -> None:
            reply = starred.ask(CHAT, forced(starred, 40) | {"logprobs": True, "top_logprobs": k, "stream": stream})
            parts = [c["logprobs"] for body in reply.bodies for c in body["choices"] if c.get("logprobs")]
            assert [len(t["top_logprobs"]) for part in parts for t in part["content"]] == [k] * 39
            assert (reply.texts, reply.finishes) == ({0: "a" * 39}, {0: ["content_filter"]})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, [0, 5, 1, 4, 2, 3] * 4))

    @BOTH
    @STREAM
    def test_more_choices_than_allowed_are_refused(self, starred, path, stream):
        before = scored(starred), len(starred.sink.records)
        for n in TOO_MANY:
            response = starred.post(path, asked(path) | {"n": n, "max_tokens": 3, "stream": stream})
            assert response.status_code == 400 and not is_block(response), (n, response.text)
        assert starred.idle() and (scored(starred), len(starred.sink.records)) == before


def request(server: Server, path: str, body: dict[str, Any], *headers: bytes) -> bytes:
    """A POST as its bytes, so that a header may hold what no client library sends."""
    raw = json.dumps({"model": server.model.name} | body).encode()
    lines = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(raw), b"", raw])


_OUR_ID = re.compile(rb"\r\nx-midstream-request-id: ([0-9a-f]{32})\r\n", re.IGNORECASE)


class Identities:
    """T8."""

    def test_500_at_once_with_hostile_ids_and_none_is_crossed(self, starred):
        """Every request has a prompt, and so a score, of its own; what its client calls it is somebody else's name."""
        n = 500
        texts = [f"request {i} " + chr(97 + i % 26) * (i % 37) for i in range(n)]
        taken = starred.ask(CHAT, {"max_tokens": 2}).id.encode()
        names = [*IDS, taken]
        before = len(starred.sink.records)

        async def one(i: int) -> bytes:
            reader, writer = await asyncio.open_connection(*address(starred))
            header = b"X-Request-Id: " + names[i % len(names)]
            writer.write(
                request(starred, CHAT, asked(CHAT, texts[i]) | {"max_tokens": 2}, header, b"Connection: close")
            )
            raw = await reader.read()
            writer.close()
            await writer.wait_closed()
            return raw

        async def everything() -> list[bytes]:
            return await asyncio.wait_for(asyncio.gather(*map(one, range(n))), 300)

        answers = asyncio.run(everything())
        found = [_OUR_ID.findall(raw) for raw in answers]
        assert all(len(ids) == 1 for ids in found), [
            a[:300] for a, ids in zip(answers, found, strict=True) if len(ids) != 1
        ]
        ids = [one_id.decode() for (one_id,) in found]
        assert len(set(ids)) == n and taken.decode() not in ids
        crossed, values = 0, set()
        for text, own, raw in zip(texts, ids, answers, strict=True):
            want, (record,) = expected(starred, user(text)), starred.records(own)
            reading, reference = prompt_reading(record), prompt_reading(want)
            values.add(round(reference.value, 3))
            crossed += abs(reading.value - reference.value) > 1e-3 or record.counted != want.counted
            assert int(raw.split(b" ", 2)[1]) == (400 if reference.action == "block" else 200), raw[:300]
        assert starred.idle() and len(starred.sink.records) == before + n
        print(f"T8: {n} at once, {len(values)} different scores, {crossed} crossed")
        assert crossed == 0 and len(values) > n / 5


class Disconnects:
    """T9."""

    @sampled(8)
    def test_a_cut_stream_is_aborted_and_recorded(self, starred, every):
        """200 streams cut at random tokens, half with FIN and half with RST."""
        chance = random.Random(9)
        cuts = [(chance.randrange(1, 60), i % 2 == 1) for i in range(200 // every)]
        before = len(starred.sink.records)
        with ThreadPoolExecutor(8) as pool:
            left = list(pool.map(lambda c: cut(starred, *c), cuts))
        records = [starred.records(own)[0] for own, _ in left]
        assert [r.finish for r in records] == ["aborted"] * len(cuts)
        assert all(r.coverage.response_tokens < 900 and r.coverage.unmonitored == 0 for r in records)
        assert starred.idle() and len(starred.sink.records) == before + len(cuts)
        began = time.monotonic()
        assert starred.ask(CHAT, {"max_tokens": 3} | forced(starred, 9)).finishes == {0: ["length"]}
        after = time.monotonic() - began
        latencies = [starred.sink.at[own] - at for own, at in left]
        print(f"T9: {len(cuts)} streams cut, {len(records)} aborts, {ms(latencies)}; next request {after * 1e3:.0f} ms")


def cut(server: Server, events: int, reset: bool) -> tuple[str, float]:
    """Read so many events of a long stream, then leave. (its id, when it was left)"""
    body = asked(CHAT) | endless(server) | {"stream": True, "max_tokens": 900}
    with socket.create_connection(address(server), timeout=60) as connection:
        connection.sendall(request(server, CHAT, body))
        seen = b""
        while seen.count(b"data: ") < events:
            part = connection.recv(65536)
            assert part, seen
            seen += part
        at = time.monotonic()
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                continue  # closing with bytes unread would be an RST: read until the server closes its side
    found = _OUR_ID.search(seen)
    assert found is not None, seen
    return found[1].decode(), at


class Siege(Blocks, Routes, Switches, Shapes, Identities, Disconnects):
    """All of it: subclass this as Test… in a file with the two fixtures."""
