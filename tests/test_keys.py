"""Keys of the data routes: the file, the command, the lookup, and who a request counts for."""

import hashlib
import json
import os
import stat
import subprocess
import sys

import anthropic
import httpx
import openai
import pytest

from monitor.cli import main
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.keys import Keys, create_key, read_keys, revoke_key

from .web import ROOT, official, web

DIGEST = hashlib.sha256(b"something").hexdigest()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


def write(file, text):
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_a_key_is_made_found_and_revoked(file):
    key, other = create_key(file, "team-a"), create_key(file, "team-b")
    assert key.startswith("ms-") and len(key) >= 46 and key != other
    assert key not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = Keys("the-one-of-the-settings", file)
    assert keys.names == ("default", "team-a", "team-b") and keys.required
    assert [keys.find(k.encode()) for k in (key, other, "the-one-of-the-settings")] == ["team-a", "team-b", "default"]
    assert [keys.find(k) for k in (b"", b"ms-", key[:-1].encode(), key.encode() + b"x", DIGEST.encode())] == [None] * 5
    revoke_key(file, "team-a")
    assert keys.find(key.encode()) == "team-a", "until it reads the file again"
    assert keys.reload() == 2 and keys.find(key.encode()) is None
    assert [p.name for p in file.parent.iterdir()] == ["keys.yaml"], "nothing is left behind"


def test_no_key_at_all_is_open_and_an_empty_file_is_shut(file):
    assert not Keys().required
    shut = Keys(None, write(file, ""))
    assert shut.required and shut.find(b"") is None and shut.names == ()


BAD = [
    ("name: a", "must be a list"),
    ("- a", "entry 1"),
    (f"- {{name: a, sha256: '{DIGEST}', scope: all}}", "nothing else"),
    (f"- {{name: A, sha256: '{DIGEST}'}}", "key name 'A'"),
    (f"- {{name: -a, sha256: '{DIGEST}'}}", "key name '-a'"),
    (f"- {{name: {'a' * 65}, sha256: '{DIGEST}'}}", "1 to 64"),
    (f'- {{name: "a\\n", sha256: "{DIGEST}"}}', "key name"),
    (f"- {{name: 7, sha256: '{DIGEST}'}}", "key name '7'"),
    ("- {name: a, sha256: ms-secret-itself}", "64 hex digits"),
    (f"- {{name: a, sha256: '{DIGEST.upper()}'}}", "lower case"),
    (f"- {{name: a, sha256: '{DIGEST}'}}\n" * 2, "twice"),
    ("- {name: a", "not YAML"),
    (f"- {{name: a, sha256: '{DIGEST}', name: b}}", "'name' is given twice"),
    ("- {name: 2024-13-45}", "not YAML: month must be"),
    ("\n".join(f"- {{name: k{i}, sha256: '{DIGEST}'}}" for i in range(1001)), "at most 1000"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_a_bad_file_is_refused_with_what_is_wrong_and_keeps_the_old_keys(file, text, says):
    key = create_key(file, "old")
    keys = Keys(None, file)
    write(file, text)
    with pytest.raises(ConfigInvalid, match=says) as caught:
        keys.reload()
    assert str(file) in str(caught.value) or "key name" in str(caught.value)
    assert "secret-itself" not in str(caught.value)
    assert keys.find(key.encode()) == "old"
    with pytest.raises(ConfigInvalid):
        Keys(None, file)


def test_more_mistakes(file, tmp_path):
    with pytest.raises(ConfigInvalid, match="midstream key create"):
        Keys(None, file)
    with pytest.raises(ConfigInvalid, match="can't be read"):
        Keys(None, tmp_path)
    with pytest.raises(ConfigInvalid, match="rename it"):
        Keys("correct-horse", write(file, f"- {{name: default, sha256: '{DIGEST}'}}"))
    with pytest.raises(ConfigInvalid, match="make it first"):
        create_key(tmp_path / "none" / "keys.yaml", "a")
    for name in ("default", "A b", ""):
        with pytest.raises(ConfigInvalid):
            create_key(file, name)


def test_a_file_that_others_may_read_is_said_on_stderr(file, capsys):
    create_key(file, "a")
    read_keys(file)
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    read_keys(file)
    assert "chmod 600" in capsys.readouterr().err


def test_two_commands_at_once_lose_no_key(file):
    code = "import pathlib, sys, monitor.keys as k; k.create_key(pathlib.Path(sys.argv[1]), sys.argv[2])"
    running = [subprocess.Popen([sys.executable, "-c", code, str(file), f"k{i}"], cwd=ROOT) for i in range(4)]
    assert [p.wait(60) for p in running] == [0] * 4
    assert sorted(read_keys(file)) == ["k0", "k1", "k2", "k3"]


@pytest.fixture
def run(monkeypatch, capfd):
    for name in [k for k in os.environ if k.startswith("MIDSTREAM_")]:
        monkeypatch.delenv(name)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "key", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        return caught.value.code, out, err

    return go


def test_the_command(run, file, monkeypatch):
    code, key, said = run("create", "team-a", "--keys", file)
    assert code == 0 and Keys(None, file).find(key.strip().encode()) == "team-a" and key.strip() not in said
    monkeypatch.setenv("MIDSTREAM_KEYS", str(file))
    assert run("create", "team-b")[0] == 0
    assert run("list")[1].split() == ["team-a", "team-b"]
    assert json.loads(run("list", "--json")[1]) == ["team-a", "team-b"]
    assert run("revoke", "team-a")[0] == 0 and list(read_keys(file)) == ["team-b"]
    for arguments, says in ((("revoke", "team-a"), "team-b"), (("create", "team-b"), "already")):
        code, out, said = run(*arguments)
        assert code == 2 and out == "" and says in said
    monkeypatch.delenv("MIDSTREAM_KEYS")
    code, _, said = run("list")
    assert code == 2 and "--keys FILE" in said
    assert load_settings(keys=file).keys == file


# --- over the wire


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    made = {name: create_key(file, name) for name in ("team-a", "team-b")}
    with web(keys=str(file), api_key="correct-horse") as server:
        yield server, made


def test_who_a_request_counts_for(guarded):
    server, made = guarded
    for name, key in (*made.items(), ("default", "correct-horse")):
        for headers in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"X-Api-Key": key}):
            answer = server.post({}, headers=headers).json()
            assert answer["key"] == name
            plain = server.post({}, headers=headers | {"Cookie": "a=b"}).json()
            assert plain["headers"] == answer["headers"], "neither key nor cookie goes any further"


def test_everything_else_is_401_in_the_shape_of_the_route(guarded):
    server, made = guarded
    key, calls = made["team-a"], server.measured()["calls"]
    refused = 'midstream_rejected_total{status="401"}'
    before = server.count(refused)
    tries = [
        {},
        {"headers": {"Authorization": key}},
        {"headers": {"Authorization": f"Basic {key}"}},
        {"headers": {"Authorization": f"Bearer {key}x"}},
        {"headers": {"Authorization": "Bearer"}},
        {"headers": {"X-Api-Key": ""}},
        {"headers": [("X-Api-Key", "guess"), ("X-Api-Key", "again"), ("X-Api-Key", key)]},
        {"headers": {"Cookie": f"api_key={key}"}},
        {"headers": {"X-Midstream-Key": "team-a"}},
        {"params": {"api_key": key}},
        {"params": {"key": key, "authorization": f"Bearer {key}"}},
    ]
    for path in ("/v1/chat/completions", "/v1/messages", "/nothing", "//health", "/HEALTH", "/health/"):
        for how in tries:
            response = server.post({}, path, **how)
            assert response.status_code == 401 and response.headers["www-authenticate"].startswith("Bearer")
            assert response.headers["x-midstream-request-id"]
            shape = {"type", "message"} if path == "/v1/messages" else {"type", "message", "param", "code"}
            assert set(response.json()["error"]) == shape
    assert server.measured()["calls"] == calls
    assert server.count(refused) == before + 6 * len(tries)


def test_the_official_clients_get_in(guarded):
    server, made = guarded
    key = made["team-b"]
    with official(server, key) as (api, claude):
        assert api.post("/chat/completions", cast_to=object, body={})["key"] == "team-b"
        assert claude.post("/v1/messages", cast_to=object, body={})["key"] == "team-b"
    with official(server, "wrong") as (api, claude):
        with pytest.raises(openai.AuthenticationError):
            api.models.list()
        with pytest.raises(anthropic.AuthenticationError):
            claude.models.list()


def test_health_and_metrics_need_no_key(guarded):
    server, _ = guarded
    for path in ("/health", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200
