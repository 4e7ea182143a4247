"""`midstream show` and its like print what strangers chose: no markup, and nothing that a terminal acts on."""

import sys

import pytest

from monitor.cli import main
from monitor.cli.score import _coloured
from monitor.terminal import plain
from monitor.types import Action, Phase

from .test_records import reading, record
from .test_traffic import fill

HOSTILE = "[/] [bold red]x[/] :bomb: \x1b]52;c;aGk=\x07 \x9b2J \u202e end"
SHOWN = "[/] [bold red]x[/] :bomb: ?]52;c;aGk=? ?2J ? end"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """run(*arguments) -> stdout of `midstream ...`, in this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        assert (caught.value.code, err) == (0, "")
        return out

    return go


@pytest.fixture
def kept(tmp_path):
    """A record with hostile words wherever it has words."""
    one = reading(Action.BLOCK, probe=HOSTILE, version="v1[/]", crossed_at=2)
    more = {"model": HOSTILE, "key": "k[/]", "policy": "p[/]", "token_scores": {HOSTILE: [0.5, 1.5, 3.0, 2.0]}}
    fill(tmp_path / "state/midstream/records.sqlite3", record("r1", verdict=Action.BLOCK, readings=(one,), **more))


@pytest.mark.usefixtures("kept")
def test_a_record_is_shown_as_it_is_written(run):
    out = run("show", "r1")
    head = out.splitlines()[0]
    assert head == f"r1 choice 0 · chat · {SHOWN} · policy p[/], key k[/]"
    assert f"{SHOWN}: highest positions" in out and "v1[/]" in out
    assert all(c.isprintable() for c in out.replace("\n", ""))


def test_in_80_columns_nothing_is_cut(run, tmp_path, monkeypatch):
    one = reading(Action.BLOCK, probe="harmful-intent", phase=Phase.RESPONSE, crossed_at=2)
    fill(tmp_path / "state/midstream/records.sqlite3", record("r1", verdict=Action.BLOCK, readings=(one,)))
    monkeypatch.setenv("COLUMNS", "80")
    table = [line for line in run("show", "r1").splitlines() if "│" in line]
    assert "harmful-intent│v1" in table[0] and "│response│block│" in table[0]
    assert not any("…" in line for line in table) and all(len(line) <= 80 for line in table)


@pytest.mark.usefixtures("kept")
def test_a_list_moves_no_cursor(run):
    out = run("review")
    assert SHOWN in out and all(c.isprintable() for c in out.replace("\n", ""))


def test_tokens_are_shown_as_they_can_be():
    assert [text for text, _ in _coloured(["a\n", "\x1b[2J"], [None, None])] == ["a⏎", "?[2J"]


def test_plain():
    assert plain("é 漢 🙂 \t") == "é 漢 🙂 ?"
