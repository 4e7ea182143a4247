"""The admin port over a real socket: nothing without its key, one audit row for each action (RELIABILITY: T18)."""

import json
import threading

import pytest

from monitor.errors import ConfigInvalid
from monitor.types import Action

from .admin_port import DATA_KEY, FORGED, HELLO, ID, KEY, OTHER_VERBS, PREFLIGHT, ROUTES, TOKEN, AdminPort
from .admin_port import port as port
from .test_records import record


def ask_route(port, method, path, **kwargs):
    return port.ask(method, path, body=HELLO if path == "/admin/scores" else None, **kwargs)


# --- T18: 20 paths x 7 attempts ---------------------------------------------------------------------------------------

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
