"""Routes under siege: T5, every path that there is or is not, and T6, every way to switch the monitor off."""

import json
from typing import Any

import httpx
import pytest

from ..attacks import ATTEMPTS, ELSEWHERE, HARMFUL, HARMLESS, JUDGED, UPGRADES, Attempt
from ..contract import BOTH, CHAT, JSON, TEXT, Reply, Server, asked, endless, forced, prompt_reading, scored
from .sending import is_block, send


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
