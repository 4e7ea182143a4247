"""Sessions at the admin port: what a cookie opens, what it does not, and that no other page can use it."""

import json

import pytest

from monitor.api.admin.console import HOME, PATHS
from monitor.api.admin.guard import WRONG_PER_MINUTE
from monitor.api.admin.session import COOKIE, LIFE_S, MAX_SESSIONS, Sessions

from .admin_port import BEARER, DATA_KEY, FORGED, ID, KEY, OTHER_VERBS, PREFLIGHT, TOKEN
from .console_port import ConsolePort
from .test_offenders import Clock

LABEL = {"id": ID, "choice": 0, "label": "harmful"}
NEW = [
    ("GET", "/admin/session"),
    ("DELETE", "/admin/session"),
    ("POST", "/admin/session"),
    ("GET", "/admin/queue"),
    ("GET", "/admin/queue/counts"),
    ("GET", f"/admin/requests/{ID}"),
    ("POST", "/admin/labels"),
    ("POST", "/admin/lens"),
    ("GET", "/admin/live"),
    ("GET", "/admin/probes"),
    ("POST", "/admin/probes/demo/promote"),
    ("POST", "/admin/probes/demo/rollback"),
    ("GET", f"{HOME}/../status"),
    ("GET", f"{HOME}/admin.py"),
    ("POST", HOME),
]
OURS = {"X-Midstream-Console": "1", "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def port(tmp_path):
    one = ConsolePort(tmp_path)
    one.say(ID, "hello")
    one.written()
    yield one
    one.stop()


def sign_in(port, name="ann", **headers):
    status, body, answered = port.ask("POST", "/admin/session", BEARER | headers, {"name": name} if name else {})
    assert status == 200
    return answered["Set-Cookie"], body


def cookie(port, name="ann"):
    return {"Cookie": sign_in(port, name)[0].partition(";")[0]}


def test_t18_nothing_of_the_console_succeeds_without_the_key(port):
    """As T18, with the console's routes and its own ways in: a made-up cookie, another page."""
    mine = cookie(port)
    seen, rows = [], len(port.rows())
    guess = {"Cookie": f"{COOKIE}={'A' * 43}"}
    evil = mine | {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "X-Midstream-Console": "1"}
    for i, (method, path) in enumerate(NEW):
        query = path + ("&" if "?" in path else "?") + TOKEN
        cases = [
            (method, path, {}),
            (method, path, {"Authorization": "Bearer " + KEY[:-1] + "x"}),
            (method, path, {"Authorization": f"Bearer {DATA_KEY}", "X-Api-Key": KEY}),
            (method, query, {"Cookie": f"token={KEY}"}),
            (method, path, FORGED),
            ("OPTIONS", path, PREFLIGHT),
            (OTHER_VERBS[i % len(OTHER_VERBS) - 1], path, {}),
            (method, path, guess | OURS),
            (method, path, {"Cookie": f"{COOKIE}={KEY}"} | OURS),
            (method, path, evil),
            (method, path, mine | {"Authorization": "Bearer x"} | OURS),
            (method, path, {"Cookie": f"{mine['Cookie']}; {mine['Cookie']}"} | OURS),
        ]
        for n, (verb, where, headers) in enumerate(cases):
            body = LABEL if verb == "POST" else None
            status, answer, _ = port.ask(verb, where, headers, body, peer=f"127.0.2.{(i * len(cases) + n) % 250 + 1}")
            seen.append(status)
            assert KEY not in str(answer) and "hello" not in str(answer)
    print(f"\nT18, the console: {len(seen)} attempts, {sum(s < 400 for s in seen)} succeeded")
    assert (len(seen), set(seen)) == (len(NEW) * 12, {401, 403})
    assert port.probes.asked == []
    assert len(port.rows()) - rows == len(seen)


def test_the_shell_needs_no_key_and_holds_no_data(port):
    assert len(PATHS) > 15
    for path in sorted(PATHS):
        status, body, headers = port.ask("GET", path, {})
        assert (status, headers["Cache-Control"], headers["X-Content-Type-Options"]) == (200, "no-store", "nosniff")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert (headers["Referrer-Policy"], headers["Cross-Origin-Resource-Policy"]) == ("no-referrer", "same-origin")
        text = body.decode()
        # No markup from strings, no code from strings, nothing from elsewhere.
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "https://"):
            assert word not in text, (path, word)
        assert "style=" not in text and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert (port.outcomes("shell"), port.rows()) == (len(PATHS), [])
    assert port.status("GET", HOME, {"Host": "evil.example"}) == 421
    assert port.status("POST", HOME, {}) == 401


def test_a_session_may_what_the_key_may_and_signs_what_it_does(port):
    line, body = sign_in(port)
    assert body == {"name": "ann", "idle_s": 1800.0}
    parts = [part.strip() for part in line.split(";")]
    assert {"HttpOnly", "Path=/admin", "SameSite=strict"} <= set(parts) and "Secure" not in parts
    assert len(parts[0].partition("=")[2]) == 43 and KEY not in line
    mine = {"Cookie": parts[0]}
    assert port.ask("GET", "/admin/session", mine)[1]["name"] == "ann"
    assert port.status("GET", "/admin/status", mine) == 200
    status, body, _ = port.ask("POST", "/admin/labels", mine | OURS, LABEL)
    assert (status, body["by"]) == (200, "ann")
    assert port.ask("POST", "/admin/labels", mine | OURS, LABEL | {"by": "ben"})[0] == 400
    assert port.ask("POST", "/admin/labels", BEARER, LABEL | {"by": "ben"})[1]["before"] == "harmful"
    assert port.ask("POST", "/admin/session", mine | OURS, {})[0] == 400
    actors = [(r["actor"], r["path"].rpartition("/")[2]) for r in port.rows()]
    assert actors == [("admin", "session"), ("admin:ann", "session"), ("admin:ann", "status"), ("admin:ann", "labels"),
                      ("admin:ann", "labels"), ("admin", "labels"), ("admin:ann", "session")]  # fmt: skip
    assert parts[0].partition("=")[2] not in json.dumps(port.rows())


def test_behind_tls_the_cookie_is_secure(port):
    line, _ = sign_in(port, None, Origin="https://admin.example.org")
    assert "Secure" in line
    assert port.ask("GET", "/admin/session", {"Cookie": line.partition(";")[0]})[1]["name"] == "console"


@pytest.mark.parametrize("name", ["a\nb", "x" * 65, "\u202eeve"])
def test_a_name_that_can_not_sign_is_refused(port, name):
    assert port.status("POST", "/admin/session", BEARER, {"name": name}) == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (OURS, 200),
        ({"X-Midstream-Console": "1", "Origin": "http://127.0.0.1:{port}"}, 200),
        ({"X-Midstream-Console": "1"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 403),
        (OURS | {"Sec-Fetch-Site": "same-site"}, 403),
        (OURS | {"Sec-Fetch-Site": "cross-site"}, 403),
        (OURS | {"Sec-Fetch-Site": "none"}, 403),
        (OURS | {"Origin": "null"}, 403),
        (OURS | {"Origin": "http://127.0.0.1:1"}, 403),
        (OURS | {"Origin": "http://localhost:{port}"}, 403),
        (OURS | {"Origin": "http://127.0.0.1:{port}.evil.example"}, 403),
        (OURS | {"Origin": "http://127.0.0.1:{port}@evil.example"}, 403),
        (OURS | {"X-Midstream-Console": "0"}, 403),
    ],
)
def test_only_our_own_page_changes_anything(port, headers, status):
    mine = cookie(port)
    given = {name: value.replace("{port}", str(port.port)) for name, value in headers.items()}
    assert port.status("POST", "/admin/labels", mine | given, LABEL) == status
    assert port.status("POST", "/admin/probes/demo/promote", mine | given, {"version": "v2"}) == status
    assert bool(port.probes.asked) == (status == 200)


def test_a_form_of_another_page_does_nothing(port):
    """What a page elsewhere can send without being asked first: a form, with our cookie if the browser let it."""
    mine = cookie(port) | {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert port.status("POST", "/admin/labels", mine, json.dumps(LABEL)) == 403


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)]
)
def test_another_page_reads_nothing(port, site, status):
    assert port.status("GET", "/admin/queue", cookie(port) | {"Sec-Fetch-Site": site}) == status


def test_a_session_ends_when_it_is_idle_old_or_left(port):
    mine = cookie(port)
    port.clock.now += 1799
    assert port.status("GET", "/admin/status", mine) == 200
    port.clock.now += 1799
    assert port.status("GET", "/admin/status", mine) == 200
    port.clock.now += 1800
    status, body, _ = port.ask("GET", "/admin/status", mine)
    assert (status, body["error"]["code"]) == (401, "no_session")
    mine = cookie(port)
    status, _, headers = port.ask("DELETE", "/admin/session", mine | OURS)
    assert status == 200 and f"{COOKIE}=" in headers["Set-Cookie"] and "Max-Age=0" in headers["Set-Cookie"]
    assert port.status("GET", "/admin/status", mine) == 401
    assert port.outcomes("no_session") == 2


def test_wrong_keys_at_the_form_are_counted_and_a_session_is_not_locked_out(port):
    mine = cookie(port)
    for _ in range(WRONG_PER_MINUTE + 1):
        port.status("POST", "/admin/session", {"Authorization": "Bearer x"}, {})
    assert port.status("POST", "/admin/session", BEARER, {}) == 429
    assert port.status("GET", "/admin/status", mine) == 200  # a cookie of 256 bits is not guessed
    port.keys.keys = {"alice": KEY}
    assert port.status("GET", "/admin/status", mine) == 401  # the key opens nothing any more, nor does what it opened


def test_the_table_of_sessions_is_bounded():
    clock = Clock()
    sessions = Sessions(60.0, clock)
    first, kept = sessions.open("first"), sessions.open("kept")
    for i in range(MAX_SESSIONS):
        clock.now += 1
        assert sessions.find(kept) == "kept"
        sessions.open(str(i))
    assert (len(sessions), sessions.find(first), sessions.find(kept)) == (MAX_SESSIONS, None, "kept")
    long = Sessions(LIFE_S * 2, clock)
    token = long.open("x")
    clock.now += LIFE_S - 1
    assert long.find(token) == "x"
    clock.now += 1
    assert (long.find(token), len(long)) == (None, 0)


def test_the_live_view_ends_with_its_session(port):
    mine = cookie(port)
    with port.open("GET", "/admin/live", mine) as answer:
        assert (answer.readline(), b"began" in answer.readline()) == (b"id: 0\n", True)
        port.status("DELETE", "/admin/session", mine | OURS)
        rest = answer.read().decode()  # it comes to an end
    assert "the session has ended" in rest and ID in rest
