"""`midstream review`: what is listed, what is labelled, and every mistake in one line."""

import json
import sys

import pytest

from monitor.cli import main
from monitor.traffic import count_unlabelled
from monitor.types import Action, Mode, Phase

from .test_log_migrations import old_log
from .test_records import reading, record
from .test_traffic import fill


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state/midstream/records.sqlite3"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(*arguments) -> (exit code, stdout, stderr), in this process, with its records at `path`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("COLUMNS", raising=False)

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", "review", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return go


ID = "5195201b12261ffd95a249bdbca3e901"


def blocked(request_id=ID, index=0):
    readings = (
        reading(Action.ALLOW, Phase.PROMPT, value=0.5),
        reading(Action.BLOCK, Phase.RESPONSE, value=7.25, threshold=6.5),
        reading(Action.FLAG, Phase.RESPONSE, Mode.FLAG, value=9.0, probe="other"),
    )
    return record(request_id, index, Action.BLOCK, readings=readings, created=86400.0)


def missing(request_id):
    one = reading(Action.UNMONITORED, value=None, threshold=None)
    return record(request_id, 0, Action.UNMONITORED, readings=(one,), created=86401.0)


def test_the_newest_come_first_each_with_the_reading_that_decided(run, path):
    fill(path, blocked(), record("allowed"), missing("m1"))
    code, out, err = run("--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert listed["unlabelled"] == 2
    newest, oldest = listed["newest"]
    assert newest == {
        "request_id": "m1", "choice": 0, "verdict": "unmonitored", "time": 86401.0, "model": "tiny", "route": "chat",
        "probe": "demo", "phase": "prompt", "value": None, "threshold": None,
    }  # fmt: skip
    assert oldest == {
        "request_id": ID, "choice": 0, "verdict": "block", "time": 86400.0, "model": "tiny", "route": "chat",
        "probe": "demo", "phase": "response", "value": 7.25, "threshold": 6.5,
    }  # fmt: skip


def test_a_list_has_whole_ids_and_80_columns(run, path):
    fill(path, blocked(), missing("m1"), record("r3", verdict=Action.BLOCK, readings=()))
    code, out, err = run("--limit", 3)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2:] == [
        "m1  choice 0  unmonitored",
        "    demo prompt: -, threshold - · chat · " + lines[3].split("· ")[-1],
        f"{ID}  choice 0  block",
        "    demo response: 7.250, threshold 6.500 · chat · " + lines[5].split("· ")[-1],
        "3 of 3 unlabelled",
    ]
    assert lines[0] == "r3  choice 0  block" and lines[1].startswith("    - -: -, threshold - · chat")
    assert max(map(len, lines)) <= 80


def test_the_list_is_bounded_and_says_what_waits(run, path):
    fill(path, *(blocked(f"r{i}") for i in range(30)))
    assert run()[1].endswith("\n20 of 30 unlabelled\n")
    code, out, _ = run("--limit", 2)
    assert code == 0 and out.startswith("r29  choice 0") and out.endswith("\n2 of 30 unlabelled\n")


def test_a_label_takes_a_request_off_the_list(run, path):
    fill(path, blocked(), blocked("r2"))
    assert run(f"chatcmpl-{ID}", "--label", "harmful", "--by", "ann") == (0, f"{ID}  choice 0: harmful, by ann\n", "")
    assert json.loads(run("--json")[1])["unlabelled"] == 1
    code, out, _ = run(ID, "--label", "unsure", "--by", "ben", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"request_id": ID, "choice": 0, "label": "unsure", "by": "ben", "before": "harmful"},
    )
    assert run(ID, "--label", "harmless", "--by", "ann")[1].endswith("harmless, by ann (it was unsure)\n")
    assert run("r2", "--label", "harmless")[0] == 0
    assert run() == (0, "nothing waits for a label\n", "")


def test_of_several_choices_one_is_named(run, path):
    fill(path, blocked(index=0), blocked(index=2))
    said = f"midstream: request {ID!r} has choices 0, 2; say which with --choice\n"
    assert run(ID, "--label", "harmful") == (2, "", said)
    assert run(ID, "--label", "harmful", "--choice", 2, "--by", "ann")[0] == 0
    assert [e["choice"] for e in json.loads(run("--json")[1])["newest"]] == [0]
    fill(path, blocked("single", index=3))
    assert run("single", "--label", "harmful", "--by", "ann")[1] == "single  choice 3: harmful, by ann\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["r9", "--label", "harmful"], "there is no record of request 'r9', choice 0"),
        ([ID, "--label", "harmful", "--choice", "1"], f"there is no record of request {ID!r}, choice 1"),
        ([ID], "--label is missing; give one of harmful, harmless, unsure"),
        (["--label", "harmful"], "whose label? Name the request"),
        ([ID, "--label", "harmful", "--by", ""], "--by '' must be 1 to 64 characters"),
        ([ID, "--label", "harmful", "--by", "a\nb"], "must be 1 to 64 characters that can be printed"),
        ([ID, "--label", "harmful", "--by", "a" * 65], "must be 1 to 64 characters"),
    ],
)
def test_mistakes_are_one_line_and_label_nothing(run, path, arguments, says):
    fill(path, blocked())
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("midstream: ") and says in err
    assert count_unlabelled(path) == 1


def test_a_label_that_is_none_is_refused(run, path):
    fill(path, blocked())
    code, out, err = run(ID, "--label", "bad")
    assert (code, out) == (2, "") and "harmless" in err
    assert count_unlabelled(path) == 1


def test_without_a_log_the_remedy_is_told(run, path):
    for arguments in ([], ["r1", "--label", "harmful"]):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and "there are no records at" in err and "set MIDSTREAM_RECORDS" in err


def test_an_older_log_can_be_reviewed(run, path):
    old_log(path, [record("r1", verdict=Action.FLAG), record("r2", verdict=Action.BLOCK), record("r3")], labels=None)
    assert [e["request_id"] for e in json.loads(run("--json")[1])["newest"]] == ["r2", "r1"]
    assert run("r1", "--label", "harmful")[0] == 0
    assert count_unlabelled(path) == 1
