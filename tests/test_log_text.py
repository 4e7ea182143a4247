"""T19, T20: by default no text is kept; where it is, it is redacted and encrypted, and only its key opens it."""

import base64
import contextlib
import json
import secrets
import socket
import sqlite3
import stat
import sys

import pytest

from monitor.cli import main
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.traffic import Cipher, Said, TrafficLog, erase_texts, erased_from, find_said
from monitor.traffic.redact import PATTERNS, iban, luhn, redact, redacted

from .scripted import scripted
from .test_records import record, until
from .web import whole as whole_body

KEY = base64.b64encode(bytes(range(32))).decode()
OTHER = base64.b64encode(bytes(range(1, 33))).decode()


def with_check_digit(digits):
    return next(digits + str(d) for d in range(10) if luhn(digits + str(d)))


def planted(n=200):
    """Secrets of every kind, each with a part that is nowhere else."""
    kinds = [
        lambda u: f"sk-proj-{u}{u}",
        lambda u: f"AKIA{u.upper()[:16]}",
        lambda u: f"ghp_{u}{u}abcd",
        lambda u: f"xoxb-1234-{u}",
        lambda u: f"AIza{(u * 3)[:35]}",
        lambda u: f"eyJhbGciOi{u}.eyJzdWIi{u}.{u}",
        lambda u: f"{u}@example.com",
        lambda u: with_check_digit("4" + str(int(u, 16))[:14]),
        lambda u: f"+49 30 {str(int(u, 16))[:8]}",
        lambda u: f"password: {u}",
        lambda u: f"postgresql://me:{u}@host/db",
        lambda u: f"-----BEGIN RSA PRIVATE KEY-----\n{u}\n{u}\n-----END RSA PRIVATE KEY-----",
        lambda u: f"Authorization: Bearer {u}",
    ]
    return [kinds[i % len(kinds)](f"{i:04x}" + secrets.token_hex(8)) for i in range(n)]


def unique_part(secret):
    """What of a secret must be nowhere: its longest run of letters and digits."""
    return max("".join(c if c.isalnum() else " " for c in secret).split(), key=len)


def test_every_kind_of_secret_is_redacted():
    for secret in planted():
        for text in (secret, f"my secret is {secret}", f"({secret})", json.dumps({"a": secret})):
            found = redact(text)
            assert unique_part(secret) not in found, (secret, found)
            assert "[" in found


def test_what_is_no_secret_stays():
    for text in (
        "The meeting is on 2024-05-17 at 14:30, room 4711.",
        "Order 1234 5678 9012 3456 is on its way.",  # no card: its check digit is wrong
        "Send version 3.11.4 to 12 people; it costs 1,299.00 EUR.",
        "def key(x): return tokens[x]  # a token of the answer",
        "The secret of good bread is patience.",
        "Section 10.2.3 of RFC 9110; see https://example.com/a/b?c=d",
        "",
    ):
        assert redact(text) == text


def test_the_table_of_patterns():
    assert luhn("4111 1111 1111 1111") and not luhn("4111 1111 1111 1112") and not luhn("0")
    assert iban("DE89 3704 0044 0532 0130 00") and not iban("DE89 3704 0044 0532 0130 01")
    assert redact("pay DE89370400440532013000 now") == "pay [account] now"
    assert redact("call +1 415 555 2671 or (415) 555-2671") == "call [phone] or [phone]"
    assert redact("SSN 078-05-1120 from 192.168.1.77") == "SSN [social security number] from [address]"
    assert redacted({"a@b.example": ["x", 1, None, {"y": "me@b.example"}]}) == {
        "[mail]": ["x", 1, None, {"y": "[mail]"}]
    }
    assert {p.name for p in PATTERNS} >= {"private key", "token", "key", "mail", "card", "phone", "account", "password"}


@pytest.mark.parametrize("text", ["a" * 100_000, "1 " * 50_000, "a@" * 50_000, "eyJ" * 30_000, "-----BEGIN " * 9_000,
                                  "password " * 10_000, "AA00" * 20_000, "://a:" * 20_000, "1." * 50_000])  # fmt: skip
def test_no_text_makes_redaction_hang(text):
    assert redact(text)


# --- the database ---------------------------------------------------------------------------------------------------


def everything(folder):
    """Every byte of every file, as `strings` would look at it."""
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def ask(server, text, path="/v1/chat/completions", **more):
    body = {"model": "scripted", "messages": [{"role": "user", "content": text}], "max_tokens": 4} | more
    response = server.client.post(path, json=body)
    assert response.status_code == 200
    return response.headers["x-midstream-request-id"]


@pytest.mark.parametrize("text", [False, True])
def test_t19_t20_no_planted_secret_is_anywhere(tmp_path, capfd, text):
    folder, secrets_ = tmp_path / "state", planted()
    more = {"log_text": True, "log_key": KEY} if text else {}
    settings = load_settings(records=folder / "records.sqlite3", access_log=True, **more)
    with scripted(settings) as server:
        for i in range(0, 200, 10):
            named = " and ".join(secrets_[i : i + 10])
            ask(server, named, stream=bool(i % 20))
            server.client.post("/v1/x", json={"prompt": named})
        until(lambda: server.log.depth == 0)
        kept = everything(folder) + server.client.get("/metrics").content  # with the -wal file
    kept += everything(folder) + "".join(capfd.readouterr()).encode()
    assert [s for s in secrets_ if unique_part(s).encode() in kept] == []
    assert b"user" not in everything(folder)  # no message at all is readable


def test_the_same_prompt_has_the_same_digest_in_one_log_only(tmp_path):
    digests = []
    for folder in ("a", "b"):
        settings = load_settings(records=tmp_path / folder / "records.sqlite3")
        with scripted(settings) as server:
            names = [ask(server, text) for text in ("hello", "hello", "hello!")]
            names.append(ask(server, "hello", max_tokens=2))
        database = sqlite3.connect(settings.records)
        found = dict(database.execute("SELECT request_id, digest FROM records"))
        database.close()
        digests.append([found[name] for name in names])
    first, second = digests
    assert first[0] == first[1] == first[3] != first[2]
    assert len(first[0]) == 32 and not set(first) & set(second)


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_kept_by_choice_and_read_with_its_key(tmp_path, stream):
    settings = load_settings(records=tmp_path / "records.sqlite3", log_text=True, log_key=KEY)
    with scripted(settings) as server:
        name = ask(server, "write to me@example.com", n=2, stream=stream)
        plain = server.client.post(
            "/v1/completions",
            json={"model": "scripted", "prompt": "go on", "max_tokens": 3, "stream": stream},
        ).headers["x-midstream-request-id"]
    said = {"prompt": {"messages": [{"role": "user", "content": "write to [mail]"}], "n": 2}, "answer": "abcd"}
    assert find_said(settings.log, name, Cipher(KEY)) == {0: said, 1: said}
    assert find_said(settings.log, plain, Cipher(KEY)) == {0: {"prompt": {"prompt": "go on"}, "answer": "abc"}}
    assert find_said(settings.log, "other", Cipher(KEY)) == {}
    with pytest.raises(ConfigInvalid, match="is not the key"):
        find_said(settings.log, name, Cipher(OTHER))
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {0o600}


@pytest.mark.parametrize("stream", [False, True])
def test_the_record_of_a_client_that_hung_up_has_its_digest_and_text(tmp_path, stream):
    """The engine sees later than the server that nobody listens, and only then writes its record."""
    settings = load_settings(records=tmp_path / "records.sqlite3", log_text=True, log_key=KEY)
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}], "stream": stream, "n": 2}
    with scripted(settings) as server:
        whole = ask(server, "hello", n=2)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as raw:
            raw.sendall(whole_body(body | {"max_tokens": 90_000}))
            until(lambda: server.engine.submitted == 2)
            seen = b""
            while stream and b'"content":"a"' not in seen:
                seen += raw.recv(4096)
        until(lambda: len(find_all(settings.records)) == 4)
    digests = find_all(settings.records)
    (gone,) = {name for name, _ in digests} - {whole}
    assert len(set(digests.values())) == 1 and None not in digests.values()
    said = find_said(settings.log, gone, Cipher(KEY))
    assert sorted(said) == [0, 1] and {s["prompt"]["messages"][0]["content"] for s in said.values()} == {"hello"}
    assert stream == any("a" in s["answer"] for s in said.values())


def find_all(path):
    """Digests by (request id, choice)."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT request_id, choice, digest FROM records").fetchall()
    return {(name, choice): digest for name, choice, digest in rows}


def kept_text(path, name="r1", cipher=None):
    log = TrafficLog(path, 100, 100, lambda n: None, cipher=cipher or Cipher(KEY))
    log.put(record(name))
    log.say(Said(name, {"prompt": "a question"}, {0: "an answer"}))
    log.close()


def test_a_text_can_not_be_moved_to_another_record(tmp_path):
    path = tmp_path / "records.sqlite3"
    for name in ("r1", "r2"):
        kept_text(path, name)
    database = sqlite3.connect(path)
    (sealed,) = database.execute("SELECT sealed FROM said WHERE record = 1").fetchone()
    database.execute("UPDATE said SET sealed = ? WHERE record = 2", (sealed,))
    database.commit()
    database.close()
    assert find_said(path, "r1", Cipher(KEY))[0]["answer"] == "an answer"
    with pytest.raises(ConfigInvalid):
        find_said(path, "r2", Cipher(KEY))


def test_a_wrong_key_refuses_the_start_and_giving_the_texts_up_allows_it(tmp_path):
    path = tmp_path / "records.sqlite3"
    kept_text(path)
    with pytest.raises(ConfigInvalid, match="log erase --texts"):
        TrafficLog(path, 100, 100, lambda n: None, cipher=Cipher(OTHER))
    kept_text(path, "r2")  # with its own it goes on
    assert erased_from(path, erase_texts) == 2
    kept_text(path, "r3", Cipher(OTHER))
    assert list(find_said(path, "r3", Cipher(OTHER))) == [0] and find_said(path, "r1", Cipher(OTHER)) == {}


@pytest.mark.parametrize("key", [None, "", "short", "!" * 44, base64.b64encode(b"x" * 31).decode(), KEY + KEY])
def test_a_key_that_is_none_is_refused_and_never_quoted(key):
    with pytest.raises(ConfigInvalid, match="openssl rand -base64 32") as caught:
        Cipher(key)
    assert not key or key not in str(caught.value)


def test_texts_beyond_the_bound_are_counted(tmp_path):
    lost = []
    log = TrafficLog(
        tmp_path / "records.sqlite3", 100, 100, lambda n: None, cipher=Cipher(KEY), texts_dropped=lost.append
    )
    log.put(record())
    log.say(Said("r1", "x" * (65 * 2**20), {0: "y"}))
    assert sum(lost) == 1
    log.say(Said("r1", "x", {0: "y"}))
    log.close()
    assert sum(lost) == 1 and find_said(tmp_path / "records.sqlite3", "r1", Cipher(KEY))[0]["answer"] == "y"


def test_the_command_shows_a_text_and_erases_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    kept_text(tmp_path / "state/midstream/records.sqlite3")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "log", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    code, out, err = run("text", "r1")
    assert (code, out, err.count("\n")) == (2, "", 1) and "MIDSTREAM_LOG_KEY" in err
    monkeypatch.setenv("MIDSTREAM_LOG_KEY", KEY)
    code, out, _ = run("text", "chatcmpl-r1")
    assert (code, json.loads(out)) == (0, {"0": {"prompt": {"prompt": "a question"}, "answer": "an answer"}})
    assert run("erase", "--texts")[:2] == (0, "erased 1 texts\n")
    assert run("text", "r1")[0] == 2
