"""The admin port beside a data server: its start, its end, its peers, and one real server with both ports."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from monitor.api.admin.port import check_admin_key
from monitor.api.door import admin_door
from monitor.api.edge import Edge
from monitor.api.peers import PerMinute, peer_name
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.keys import Keys
from monitor.metrics import Metrics

from .admin_port import HELLO, KEY, AdminPort, events, port  # noqa: F401
from .both_ports import Both, policy
from .test_offenders import Clock
from .test_records import Receiver

# --- start, stop ------------------------------------------------------------------------------------------------------


def test_loopback_by_default_and_no_port_without_a_key():
    settings = load_settings()
    assert (settings.admin_host, settings.admin_port, settings.admin_key) == ("127.0.0.1", 8001, None)
    with pytest.raises(ConfigInvalid, match="admin_key"):
        load_settings(admin_key="x" * 15)


def test_a_data_key_is_no_admin_key(port):
    settings = load_settings(admin_key=KEY)
    check_admin_key(settings, Keys("another-key"))
    check_admin_key(load_settings(), Keys())
    with pytest.raises(ConfigInvalid, match="'default'") as refused:
        check_admin_key(settings, Keys(KEY))
    assert KEY not in str(refused.value)
    port.keys.keys = {"alice": KEY}  # a keys file that was changed under a running server
    status, body, _ = port.ask("GET", "/admin/status")
    assert (status, port.calls, [r["refused"] for r in port.rows()]) == (401, [], ["shared_key"])
    assert "key of its own" in body["error"]["message"]


def test_it_stops_with_the_server_and_cuts_what_still_runs(tmp_path):
    one = AdminPort(tmp_path)
    one.tracer.let = asyncio.Semaphore(0)
    answer = one.open("POST", "/admin/scores", body=HELLO)
    assert next(events(answer))["position"] == 0
    one.stop()
    assert one.tracer.closed.wait(20)
    answer.close()
    with pytest.raises(ConnectionRefusedError):
        one.open("GET", "/admin/status")


def test_what_is_wrong_of_the_admin_port_is_said_before_the_model_is_loaded(tmp_path):
    def opened(**settings):
        edge = Edge.of(load_settings(**({"audit": tmp_path / "audit.sqlite3"} | settings)), Metrics())
        with admin_door(edge) as door:
            return door.listener and door.listener.getsockname()

    assert opened() is None
    host, free = opened(admin_key=KEY, admin_port=0)
    assert (host, free > 0) == ("127.0.0.1", True)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigInvalid, match="choose another MIDSTREAM_ADMIN_PORT"),
    ):
        opened(admin_key=KEY, admin_port=taken.getsockname()[1])
    with pytest.raises(ConfigInvalid, match="key of its own"):
        opened(admin_key=KEY, admin_port=0, api_key=KEY)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="set MIDSTREAM_AUDIT"):
        opened(audit=tmp_path / "file/audit.sqlite3")


# --- peers ------------------------------------------------------------------------------------------------------------


def test_a_peer_is_an_address_or_a_network_of_ipv6():
    assert [peer_name(p and (p, 1)) for p in (
        "127.0.0.1", "::ffff:10.0.0.1", "::1", "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::9", "fe80::1%eth0", None, "x",
    )] == ["127.0.0.1", "10.0.0.1", "::1", "2001:db8:1:2::/64", "2001:db8:1:2::/64", "fe80::/64", "unknown",
           "unknown"]  # fmt: skip


def test_the_table_of_peers_is_bounded():
    clock = Clock()
    table = PerMinute(100, clock)
    for i in range(10_000):
        clock.now += 0.001
        table.count(str(i))
    assert (len(table), table.so_far("0"), table.so_far("9999")[0]) == (100, (0, 0.0), 1)
    assert [table.count("one") for _ in range(3)] == [1, 2, 3]
    clock.now += 59
    assert table.so_far("one") == (3, pytest.approx(1.0))
    clock.now += 1
    assert (table.so_far("one"), table.count("one")) == ((0, 0.0), 1)


# --- beside a real server ---------------------------------------------------------------------------------------------


@pytest.fixture
def both(tiny, tmp_path):
    one = Both(tiny, tmp_path)
    yield one
    one.stop()


def test_a_policy_is_reloaded_without_a_restart_and_a_bad_one_is_not(both):
    def limit():
        return both.metrics.registry.get_sample_value(
            "midstream_threshold_logit", {"probe": "hair", "phase": "prompt", "format": "chat"}
        )

    def reloads(result):
        return both.metrics.registry.get_sample_value("midstream_policy_reloads_total", {"result": result})

    assert (both.ask().status_code, both.admin("GET", "policy").json()["name"], limit()) == (400, "blocks", 0.0)
    file = policy(both.settings.policy, "flag", 1.5)
    assert both.admin("POST", "policy/reload").json() == {"policy": "flags"}
    assert (both.ask().status_code, limit()) == (200, 1.5)
    for bad in ("probes: [", "probes:\n  nobody: {}\n", "target_fpr: 7\n"):
        file.write_text(bad)
        refused = both.admin("POST", "policy/reload")
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "refused")
        assert both.admin("GET", "status").json()["policy"]["name"] == "flags"
    assert (both.ask().status_code, reloads("loaded"), reloads("refused")) == (200, 1, 3)


def test_the_scores_of_a_request_are_those_of_its_record(both, tiny):
    body = HELLO | {"max_tokens": 5}
    policy(both.settings.policy, "flag")
    both.admin("POST", "policy/reload")
    answer = both.admin("POST", "scores", json=body)
    *rows, last = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    n_prompt = len(tiny.template.encode(body["messages"]).token_ids)
    assert [r["position"] for r in rows] == list(range(n_prompt + 4))  # the last token of an answer has no score
    assert [r["phase"] for r in rows] == ["prompt"] * n_prompt + ["response"] * 4
    assert {r["scores"]["hair"] for r in rows} == {5.0}
    assert "".join(r["token"] for r in rows).count("hi") == 1
    assert (last["verdict"], last["finish"], last["readings"][0]["value"]) == ("flag", "length", 5.0)


def test_an_offender_is_refused_told_of_and_cleared(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hook = Receiver()
    both = Both(tiny, tmp_path, offender_limit=3, offender_block_s=600, webhook_url=hook.url)
    deadline = time.monotonic() + 20
    try:
        blocked = [both.ask() for _ in range(3)]
        refused = both.ask()
        offenders = both.admin("GET", "offenders").json()["offenders"]
        cleared = both.admin("POST", "offenders/default/clear")
        again = both.ask()
        status = both.admin("GET", "status").json()
        request_id = blocked[0].headers["x-midstream-request-id"]
        while (found := both.admin("GET", f"records/{request_id}")).status_code == 404:  # the writer has its own thread
            assert time.monotonic() < deadline
        rows = both.admin("GET", "audit").json()["rows"]
    finally:
        both.stop()
        hook.stop()
    assert [r.status_code for r in (*blocked, refused, cleared, again)] == [400, 400, 400, 429, 200, 400]
    assert (refused.json()["error"]["code"], int(refused.headers["Retry-After"]) > 590) == ("key_suspended", True)
    assert (offenders[0] | {"refused_for_s": 0}) == {"key": "default", "flags": 0, "blocks": 3, "refused_for_s": 0}
    assert (status["engine"]["engine"], found.json()["records"][0]["key"]) == ("embedded", "default")
    assert {r["path"].rpartition("/")[2]: r["result"] for r in rows} == {
        "offenders": "200", "clear": "200", "status": "200", request_id: "200", "audit": None,
    }  # fmt: skip
    events = ["midstream.block"] * 3 + ["midstream.repeat_offender", "midstream.block"]
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [e["event"] for e in lines] == [e["event"] for e in hook.bodies()] == events
    assert lines[3] == hook.bodies()[3]
    for url in (both.data, both.admin_url):
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
    print(f"\n3 blocks: 429, {refused.headers['Retry-After']} s; cleared: answered again; notice {lines[3]}")
