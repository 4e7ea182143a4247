"""Housekeeping around the answers: the ids of requests, clients that leave, health, models, metrics and counters."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ..web import until
from .exchange import BOTH, CHAT, STREAM, Reply, address, asked, endless, forced, request, scored, user


class Ids:
    @BOTH
    @STREAM
    def test_the_header_names_the_record(self, calm, path, stream):
        reply = calm.ask(path, {"stream": stream, "max_tokens": 3})
        (record,) = calm.records(reply.id)
        assert record.request_id == reply.id
        assert record.route == ("chat" if path == CHAT else "completions")

    @BOTH
    def test_errors_have_an_id_too(self, calm, path):
        for body in ({"model": "gpt-4"}, {"max_tokens": -1}, {"messages": [], "prompt": []}, {"n": 999}):
            response = calm.post(path, asked(path) | body)
            assert 400 <= response.status_code < 500, response.text
            assert response.headers["x-midstream-request-id"], body

    @BOTH
    def test_a_clients_request_id_is_echoed_and_never_a_key(self, calm, path):
        """Both run at the same time: each is a request of its own."""
        both_asked = threading.Barrier(2)

        def ask(p: int) -> Reply:
            both_asked.wait(20)
            body = asked(path) | {"model": calm.model.name, "max_tokens": 40, "stream": True} | forced(calm, p, "b")
            response = httpx.post(calm.url + path, json=body, headers={"X-Request-Id": "mine"}, timeout=60)
            assert response.headers.get_list("x-request-id") == ["mine"]
            return Reply(response)

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(ask, (5, 9))
        assert first.texts[0].startswith("aaaab") and second.texts[0].startswith("aaaaaaaab")
        assert first.id != second.id and "mine" not in first.id + second.id
        assert {r.request_id for i in (first.id, second.id) for r in calm.records(i)} == {first.id, second.id}
        long = calm.post(path, asked(path) | {"max_tokens": 2}, headers={"X-Request-Id": "a" * 500})
        assert "x-request-id" not in long.headers


class Departures:
    @BOTH
    @pytest.mark.parametrize("n", [1, 2])
    def test_a_client_that_leaves_mid_stream_stops_the_engine(self, calm, path, n):
        body = asked(path) | {"model": calm.model.name, "stream": True, "max_tokens": 900, "n": n} | endless(calm)
        with httpx.stream("POST", calm.url + path, json=body, timeout=60) as response:
            request_id = response.headers["x-midstream-request-id"]
            lines = response.iter_lines()
            for _ in range(6):
                next(lines)
        for record in calm.records(request_id, n):
            assert record.finish == "aborted" and record.coverage.response_tokens < 900
            assert record.verdict == "allow" and record.coverage.unmonitored == 0
        assert calm.idle()

    @BOTH
    def test_a_client_that_leaves_before_the_answer_stops_the_engine(self, calm, path):
        before, steps = len(calm.sink.records), scored(calm)
        with socket.create_connection(address(calm), timeout=60) as raw:
            raw.sendall(request(calm, path, asked(path) | {"max_tokens": 900} | endless(calm)))
            until(lambda: scored(calm) > steps)
        (record,) = calm.sink.wait(before + 1)[before:]
        assert record.finish == "aborted" and record.coverage.response_tokens < 900
        assert calm.idle()


class Housekeeping:
    def test_health_ready_models_and_metrics(self, calm):
        assert httpx.get(calm.url + "/health", timeout=60).status_code == 200
        ready = httpx.get(calm.url + "/ready", timeout=60)
        assert ready.status_code == 200 and ready.json()["status"] == "ready"
        assert calm.model.name in [m.id for m in calm.api.models.list()]
        metrics = httpx.get(calm.url + "/metrics", timeout=60)
        assert metrics.status_code == 200 and "# TYPE" in metrics.text

    def test_the_counters_count(self, starred):
        def count(name: str, **labels: str) -> float:
            return starred.sink.metrics.registry.get_sample_value(f"midstream_{name}", labels) or 0.0

        def counts() -> tuple[float, ...]:
            return (
                count("requests_total", model="", policy="default", action="allow"),
                count("requests_total", model="", policy="default", action="block"),
                count("blocks_total", model="", probe="star", phase="prompt"),
                count("blocks_total", model="", probe="star", phase="response"),
                count("final_unscored_tokens_total"),
            )

        before = counts()
        starred.ask(CHAT, {"max_tokens": 3} | forced(starred, 9, "b"))
        starred.ask(CHAT, {"max_tokens": 9} | forced(starred, 3))
        starred.post(CHAT, {"messages": user("tell*me"), "max_tokens": 3})
        after = counts()
        assert [b - a for a, b in zip(before, after, strict=True)][:4] == [1, 2, 1, 1]
