"""T13, overload, for both engines: more clients than are let in, what each of them gets, and that all is judged."""

import time

from .load import load
from .shapes import CHAT
from .web import percentile

EOS_OFF = {"logit_bias": {"256": -100}}


def overloaded(server, limit, clients, seconds):
    """Streams of `clients` clients that ask again and again, of which `limit` are let in at once."""

    def streams(clients, **how):
        return load(port=server.port, body=CHAT | {"stream": True, "max_tokens": 24} | EOS_OFF, clients=clients, **how)

    def p99_ms(found):
        return percentile([gap for one in found if one["status"] == 200 for gap in one["gaps_s"]], 0.99) * 1e3

    alone, full = streams(1, rounds=5), streams(limit, rounds=1)
    assert {one["status"] for one in alone + full} == {200}
    assert server.idle()
    n_before = len(server.sink.records)
    found = streams(clients, seconds=seconds)
    start = time.perf_counter()
    assert server.post("/v1/chat/completions", CHAT).status_code == 200
    normal_s = time.perf_counter() - start
    refused = [one for one in found if one["status"] != 200]
    accepted = {one["headers"]["x-midstream-request-id"] for one in found if one["status"] == 200}
    records = server.sink.wait(n_before + len(accepted) + 1)[n_before:]
    assert refused and accepted
    assert {(one["status"], int(one["headers"]["retry-after"]) > 0) for one in refused} == {(429, True)}
    assert accepted <= {r.request_id for r in records} and len(records) == len(accepted) + 1
    seen = [r.coverage for r in records]  # an answer of one token has none that was fed
    assert [c for c in seen if c.unmonitored or (c.response_tokens > 1 and not c.response_scored)] == []
    limited = server.metric("midstream_limited_total", limit="concurrency")
    assert limited == server.metric("midstream_rejected_total", status="429") == len(refused)
    print(
        f"\nT13: limit {limit}, {clients} clients, {seconds} s: {len(accepted)} answered, {len(refused)} refused, "
        f"refusals p99 {percentile([one['answered_s'] for one in refused], 0.99) * 1e3:.0f} ms; per token p99 "
        f"{p99_ms(found):.0f} ms, {p99_ms(full):.0f} ms at the limit without overload, {p99_ms(alone):.0f} ms alone; "
        f"normal again after {normal_s:.2f} s"
    )
