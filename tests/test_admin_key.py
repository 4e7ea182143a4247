"""The admin port's key: who bears it, how often one may be wrong, and for which host it is good."""

import contextlib
import socket

import pytest

from monitor.api.admin.guard import ALL_ROWS_PER_MINUTE, ROWS_PER_MINUTE, WRONG_PER_MINUTE

from .admin_port import ADDRESSES, BEARER, KEY, AdminPort
from .admin_port import port as port


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
