"""The admin port over a real socket: nothing without its key, one audit row for each action (RELIABILITY: T18)."""

import asyncio
import contextlib
import json
import socket
import threading

import pytest

from monitor.api.admin.app import MAX_TRACES
from monitor.api.admin.guard import ALL_ROWS_PER_MINUTE, MAX_BODY_BYTES, ROWS_PER_MINUTE, WRONG_PER_MINUTE
from monitor.errors import ConfigInvalid, Overloaded, RequestInvalid
from monitor.types import Action

from .admin_port import BEARER, DATA_KEY, HELLO, ID, KEY, ROUTES, AdminPort, events
from .test_records import record


@pytest.fixture
def port(tmp_path):
    one = AdminPort(tmp_path)
    yield one
    one.stop()


def ask_route(port, method, path, **kwargs):
    return port.ask(method, path, body=HELLO if path == "/admin/scores" else None, **kwargs)


# --- T18: 20 paths x 7 attempts -------------------------------------------------------------------------------------

PATHS = [path for _, path in ROUTES] + [
    "/",
    "/admin",
    "/admin/",
    "/docs",
    "/redoc",
    "/metrics",
    "//admin/status",
    "/admin/%2e%2e/admin/status",
    "/ADMIN/STATUS",
]
TOKEN = "&".join(f"{name}={KEY}" for name in ("token", "key", "api_key", "access_token", "admin_key", "authorization"))
ADDRESSES = ("X-Forwarded-For", "X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP")
FORGED = dict.fromkeys(ADDRESSES, "127.0.0.1") | {
    "Forwarded": "for=127.0.0.1;host=localhost",
    "X-Forwarded-Host": "localhost",
    "X-Original-URL": "/health",
}
PREFLIGHT = {
    "Origin": "https://evil.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}
OTHER_VERBS = ("PUT", "DELETE", "PATCH", "HEAD", "TRACE", "PROPFIND")


def attempts():
    """(name, method, path, headers) of the 140."""
    methods = {path: method for method, path in ROUTES}
    for i, path in enumerate(PATHS):
        method = methods.get(path, "GET")
        query = path + ("&" if "?" in path else "?") + TOKEN
        yield "none", method, path, {}
        yield "wrong", method, path, {"Authorization": "Bearer " + KEY[:-1] + "x"}
        yield "data key", method, path, {"Authorization": f"Bearer {DATA_KEY}", "X-Api-Key": KEY}
        yield "query token", method, query, {"Cookie": f"token={KEY}"}
        yield "forged", method, path, FORGED
        yield "OPTIONS", "OPTIONS", path, PREFLIGHT
        yield "other verb", OTHER_VERBS[i % len(OTHER_VERBS)], path, {}


def test_t18_nothing_succeeds_without_the_key(port):
    """Each from a peer of its own, so that none hides behind the 429 of another."""
    cases, seen = list(attempts()), []
    for i, (name, method, path, headers) in enumerate(cases):
        status, body, answered = ask_route(port, method, path, headers=headers, peer=f"127.0.1.{i + 1}")
        seen.append((name, status))
        assert not [h for h in answered if h.lower().startswith("access-control")], (name, method, path)
        assert KEY not in str(body) and DATA_KEY not in str(body)
    rows = port.rows()
    print(f"\nT18: {len(cases)} attempts, {sum(s < 400 for _, s in seen)} succeeded, {len(rows)} audit rows")
    assert (len(PATHS), len(cases), {s for _, s in seen}) == (20, 140, {401})
    assert port.calls == []
    assert [(r["method"], r["path"], r["peer"]) for r in rows] == [
        (method, path.partition("?")[0].replace("%2e", "."), f"127.0.1.{i + 1}")
        for i, (_, method, path, _) in enumerate(cases)
    ]
    assert {(r["actor"], r["result"], r["unwritten"]) for r in rows} == {("unknown", None, 0)}
    reasons = [r["refused"] for r in rows]
    assert (reasons.count("wrong_key"), reasons.count("no_key")) == (40, 100)
    assert KEY not in json.dumps(rows) and DATA_KEY not in json.dumps(rows)


def test_t18_one_audit_row_per_action(port):
    port.offenders.note(record(verdict=Action.BLOCK, key="alice"))
    answers = [(method, path, ask_route(port, method, path)[0]) for method, path in ROUTES]
    assert {status for _, _, status in answers} == {200}
    rows = port.rows()
    assert [(r["method"], r["path"], r["result"]) for r in rows] == [
        (method, path.partition("?")[0], "200") for method, path, _ in answers
    ]
    assert {(r["actor"], r["peer"], r["refused"]) for r in rows} == {("admin", "127.0.0.1", None)}
    print(f"\nT18: {len(answers)} actions, {len(rows)} audit rows, {port.outcomes('admitted'):.0f} counted")
    assert port.outcomes("admitted") == len(ROUTES)


def test_what_an_operator_sees(port):
    port.offenders.note(record(verdict=Action.FLAG, key="alice"))
    status, body, headers = port.ask("GET", "/admin/status")
    assert (status, body["engine"], body["policy"]) == (
        200, {"engine": "fake"}, {"policy": "strict", "threshold": None},
    )  # fmt: skip
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert port.ask("GET", "/admin/policy")[1]["policy"] == "strict"
    assert port.ask("POST", "/admin/policy/reload")[1] == {"policy": "strict"}
    assert port.ask("POST", "/admin/keys/reload")[1] == port.ask("GET", "/admin/keys")[1] == {"keys": ["alice"]}
    assert port.ask("GET", f"/admin/records/{ID}")[1] == {"records": [{"request_id": ID, "scores": [None, 1.5]}]}
    one = {"key": "alice", "flags": 1, "blocks": 0, "refused_for_s": 0.0}
    assert port.ask("GET", "/admin/offenders")[1] == {"offenders": [one]}
    assert port.ask("POST", "/admin/offenders/alice/clear")[1] == {"cleared": "alice"}
    assert port.ask("GET", "/admin/offenders")[1] == {"offenders": []}
    newest = port.ask("GET", "/admin/audit?limit=2")[1]["rows"]
    assert [(r["path"], r["result"]) for r in newest] == [("/admin/audit", None), ("/admin/offenders", "200")]


class Noted(dict):
    """Notes who reads it."""

    def __init__(self, *args):
        super().__init__(*args)
        self.threads = set()

    def items(self):
        self.threads.add(threading.current_thread())
        return super().items()


def test_large_records_are_written_out_off_the_event_loop(tmp_path):
    """It is the loop that the data routes' tokens go through."""
    one = Noted({"request_id": ID, "scores": [1.5]})

    class Large(AdminPort):
        def records(self, request_id):
            return [one, one]

    port = Large(tmp_path)
    try:
        assert port.ask("GET", f"/admin/records/{ID}")[1] == {"records": [one, one]}
        assert one.threads and port._thread not in one.threads
    finally:
        port.stop()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/admin/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
        ("GET", "/admin/status/", 404),
        ("GET", "/admin/records/" + "0" * 32, 404),
        ("GET", "/admin/records/a%20b", 400),
        ("POST", "/admin/offenders/eve/clear", 404),
        ("GET", "/admin/audit?limit=0", 400),
        ("GET", "/admin/audit?limit=1001", 400),
        ("OPTIONS", "/admin/status", 405),
        ("DELETE", "/admin/audit", 405),
        ("GET", "/admin/policy/reload", 405),
    ],
)
def test_with_the_key_what_is_wrong_is_said(port, method, path, status):
    got, body, headers = port.ask(method, path)
    assert got == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert not [h for h in headers if h.lower().startswith("access-control")]
    assert [r["result"] for r in port.rows()] == [str(status)]


def test_a_refused_file_is_said_and_the_old_one_stays(port):
    port.policies.error = port.keys.error = ConfigInvalid("policy 'x' is not YAML")
    for path in ("/admin/policy/reload", "/admin/keys/reload"):
        status, body, _ = port.ask("POST", path)
        assert (status, body["error"]["message"]) == (422, "policy 'x' is not YAML")
    assert [r["result"] for r in port.rows()] == ["422", "422"]


# --- the key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer  {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY.upper()}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-Api-Key": KEY},
        {"Proxy-Authorization": f"Bearer {KEY}"},
        {"Cookie": f"Authorization=Bearer {KEY}"},
    ],
)
def test_only_the_bearer_of_the_admin_key_is_let_in(port, headers):
    status, body, answered = port.ask("GET", "/admin/status", headers=headers)
    assert (status, body["error"]["code"], answered["WWW-Authenticate"]) == (401, "invalid_admin_key", "Bearer")
    assert port.calls == []


def raw(port, request):
    with socket.create_connection((port.host, port.port), timeout=20) as connection:
        connection.sendall(request)
        with contextlib.suppress(ConnectionResetError):
            return connection.makefile("rb").readline()
    return b""


def test_two_keys_are_none(port):
    line = f"Authorization: Bearer {KEY}\r\n"
    head = f"GET /admin/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{line}"
    assert raw(port, (head + "\r\n").encode()).split()[1] == b"200"
    assert raw(port, (head + line + "\r\n").encode()).split()[1] == b"401"
    assert raw(port, (head + "Authorization: Bearer x\r\n\r\n").encode()).split()[1] == b"401"


def test_an_upgrade_is_a_request_like_any_other(port):
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    assert port.status("GET", "/admin/status", headers=upgrade) == 401
    assert port.calls == []


def test_more_than_five_wrong_keys_a_minute(port):
    wrong = {"Authorization": "Bearer wrong"}
    assert [port.status("GET", "/admin/status", headers=wrong) for _ in range(WRONG_PER_MINUTE)] == [401] * 5
    assert port.status("GET", "/admin/status") == 200  # five may be a typing error
    status, body, headers = port.ask("GET", "/admin/status", headers=wrong)
    assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "too_many_wrong_keys", "60")
    calls = len(port.calls)
    port.clock.now += 59.5
    for right in (BEARER, BEARER | {"X-Forwarded-For": "10.1.2.3"}):  # the right key too, whoever it says it is from
        status, _, headers = port.ask("POST", "/admin/policy/reload", headers=right)
        assert (status, headers["Retry-After"]) == (429, "1")
    assert len(port.calls) == calls
    assert port.status("GET", "/admin/status", peer="127.0.0.2") == 200  # another peer is not held for it
    port.clock.now += 0.5
    assert port.status("GET", "/admin/status") == 200


def test_forged_addresses_do_not_share_out_the_wrong_keys(port):
    statuses = [
        port.status(
            "GET", "/admin/keys", headers={"Authorization": "Bearer x"} | dict.fromkeys(ADDRESSES, f"10.0.0.{i}")
        )
        for i in range(10)
    ]
    assert statuses == [401] * 5 + [429] * 5
    assert {r["peer"] for r in port.rows()} == {"127.0.0.1"}


def test_a_missing_key_is_not_a_wrong_one(port):
    assert {port.status("GET", "/admin/status", headers={}) for _ in range(20)} == {401}
    assert port.status("GET", "/admin/status") == 200


def test_a_flood_of_refusals_is_counted_and_not_written(port):
    n = 200
    for _ in range(n):
        port.status("GET", "/admin/status", headers={"Authorization": "Bearer x"})
    assert len(port.rows()) == ROWS_PER_MINUTE
    assert (port.outcomes("wrong_key"), port.outcomes("throttled")) == (6, n - 6)
    port.clock.now += 60
    port.status("GET", "/admin/keys")
    assert [(r["actor"], r["unwritten"]) for r in port.rows()][-1] == ("admin", n - ROWS_PER_MINUTE)
    print(f"\n{n} wrong keys of one peer: {ROWS_PER_MINUTE} rows, {n - ROWS_PER_MINUTE} counted in the next row")


def test_a_flood_from_everywhere_is_bounded_too(port):
    n = 2 * ALL_ROWS_PER_MINUTE
    for i in range(n):
        port.status("GET", "/", headers={}, peer=f"127.0.{i // 250 + 1}.{i % 250 + 1}")
    assert len(port.rows()) == ALL_ROWS_PER_MINUTE
    port.status("GET", "/admin/keys")
    assert port.rows()[-1]["unwritten"] == n - ALL_ROWS_PER_MINUTE


def test_the_key_in_a_path_is_not_written_down(port):
    port.status("GET", f"/admin/{KEY}", headers={})
    port.status("GET", f"/admin/{KEY}")
    assert [r["path"] for r in port.rows()] == ["/admin/[key]"] * 2


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:9000", 200),  # a tunnel has its own port
        ("127.0.0.1:8001", 200),
        ("127.0.0.9", 200),
        ("[::1]:8001", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:8001", 421),
        ("localhost@evil.example", 421),
        ("10.0.0.1", 421),
        ("0.0.0.0:8001", 421),
        ("[::1", 421),
        ("[::1]x", 421),
        ("", 421),
    ],
)
def test_another_host_is_refused_even_with_the_key(port, host, status):
    """A page whose name was pointed at 127.0.0.1 (DNS rebinding) sends its own name."""
    assert port.status("GET", "/admin/status", headers=BEARER | {"Host": host}) == status
    assert bool(port.calls) == (status == 200)
    assert [r["refused"] for r in port.rows()] == [None if status == 200 else "host"]


def test_no_host_or_two_are_refused(port):
    rest = f"Authorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    for start in (
        "GET /admin/status HTTP/1.0\r\n",
        "GET /admin/status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n",
    ):
        assert raw(port, (start + rest).encode()).split()[1] == b"421"
    assert port.calls == []


def test_the_address_that_is_bound_is_a_host(tmp_path):
    """Bound to every address, the one that the connection came in on counts."""
    one = AdminPort(tmp_path, admin_host="0.0.0.0")
    try:
        assert one.status("GET", "/admin/status", headers=BEARER | {"Host": "127.0.0.1"}) == 200
        assert one.status("GET", "/admin/status", headers=BEARER | {"Host": "10.9.9.9"}) == 421
    finally:
        one.stop()


# --- the audit log fails ----------------------------------------------------------------------------------------------


def test_without_an_audit_row_nothing_is_done(port):
    port.audit._db.execute("PRAGMA query_only=ON")  # a file that has become read-only; chmod would not stop root
    for method, path in ROUTES:
        status, body, headers = ask_route(port, method, path)
        assert (status, body["error"]["code"]) == (503, "audit_failed")
        assert headers["Retry-After"]
    assert port.calls == []
    assert port.status("GET", "/admin/status", headers={}) == 401  # refused is refused
    assert port.outcomes("audit_failed") == len(ROUTES) + 1
    port.audit._db.execute("PRAGMA query_only=OFF")
    assert port.status("GET", "/admin/status") == 200
    assert [r["unwritten"] for r in port.rows()] == [1]


def test_what_can_not_be_put_on_record_is_not_answered(port):
    port.audit._db.execute("DROP TABLE outcome")
    for method, path in (("GET", "/admin/keys"), ("POST", "/admin/scores")):
        status, body, _ = ask_route(port, method, path)
        assert (status, body["error"]["code"]) == (503, "audit_failed")
        assert "alice" not in str(body)
    assert port.tracer.closed.wait(20)


def test_a_bug_of_ours_is_a_500_and_a_row(port, caplog):
    port.policies.error = RuntimeError("secret detail")
    status, body, _ = port.ask("GET", "/admin/policy")
    assert (status, "secret" in str(body)) == (500, False)
    assert [r["result"] for r in port.rows()] == ["500"]


# --- per-token scores -------------------------------------------------------------------------------------------------


def test_scores_come_as_they_are_judged(port):
    port.tracer.let = asyncio.Semaphore(0)
    ask = {"messages": [{"role": "system", "content": "Be kind."}, *HELLO["messages"]], "max_tokens": 3}
    got = []
    with port.open("POST", "/admin/scores", body=ask) as answer:
        assert (answer.status, answer.headers.get_content_type()) == (200, "text/event-stream")
        assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-store", "no")
        assert len(answer.headers["x-midstream-request-id"]) == 32
        for event in events(answer):
            got.append(event)
            port.let()  # the next one exists only now
    assert got == [port.tracer.events[0], port.tracer.events[1] | {"scores": {"demo": None}}, port.tracer.events[2]]
    assert port.calls == [("trace", ask["messages"], 3, 0.0)]


def test_a_reader_that_leaves_stops_the_work(port):
    port.tracer.let = asyncio.Semaphore(0)
    answer = port.open("POST", "/admin/scores", body=HELLO)
    assert next(events(answer))["position"] == 0
    answer.close()
    assert port.tracer.closed.wait(20)


@pytest.mark.parametrize(
    ("error", "status"),
    [(RequestInvalid("too long", "messages"), 400), (Overloaded("the queue is full"), 429)],
)
def test_what_can_not_be_scored_is_a_status_at_first_and_an_event_later(port, error, status):
    port.tracer.error = error
    got, body, _ = port.ask("POST", "/admin/scores", body=HELLO)
    assert (got, body["error"]["message"]) == (status, str(error))
    port.tracer.error, port.tracer.late = None, error
    with port.open("POST", "/admin/scores", body=HELLO) as answer:
        got = list(events(answer))
    assert [set(e) for e in got] == [{"position", "token", "phase", "scores"}, {"error"}]
    assert port.tracer.closed.wait(20)


def test_only_a_few_are_scored_at_once(port):
    port.tracer.let = asyncio.Semaphore(0)
    answers = [port.open("POST", "/admin/scores", body=HELLO) for _ in range(MAX_TRACES)]
    assert port.status("POST", "/admin/scores", body=HELLO) == 429
    port.let(100)
    for answer in answers:
        assert len(list(events(answer))) == 3
        answer.close()
    assert port.status("POST", "/admin/scores", body=HELLO) == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        HELLO | {"max_tokens": 0},
        HELLO | {"max_tokens": 10**9},
        HELLO | {"max_tokens": True},
        HELLO | {"temperature": -1},
        HELLO | {"stream": True},
        "{",
        "[" * 100_000,
    ],
)
def test_a_wrong_body_is_refused(port, body):
    status, answer, _ = port.ask("POST", "/admin/scores", body=body)
    assert (status, port.calls) == (400, [])
    assert answer["error"]["message"]


def test_a_large_body_is_refused(port):
    large = {"messages": [{"role": "user", "content": "x" * MAX_BODY_BYTES}]}
    assert port.status("POST", "/admin/scores", body=large) == 413
    assert port.calls == []
