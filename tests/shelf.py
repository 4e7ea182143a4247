"""A store with two versions of one probe, and `midstream probe ...` on it: what was told, and what was refused."""

import sys

import pytest
import yaml

from monitor.cli import main
from probes_store.store import Store

from .stored import LAYER, make_card, weights

NAME = "org/Tiny"


@pytest.fixture
def store(tmp_path):
    """demo v1 and v2, v2 live for being the newest."""
    store = Store(tmp_path / "overlay", shipped=tmp_path / "shipped")
    store.publish(make_card(), weights(), 0.25)
    store.publish(make_card(), {LAYER: -weights()[LAYER]}, 0.5)
    return store


@pytest.fixture
def run(store, tmp_path, monkeypatch, capfd):
    """run(*arguments) -> (exit code, stdout, stderr) of `midstream probe ...` on that store, in this process."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MIDSTREAM_STORE", str(store.overlay))
    monkeypatch.setenv("MIDSTREAM_MODEL", NAME)
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["midstream", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capfd.readouterr()

    return go


def told(result):
    code, out, err = result
    assert (code, err) == (0, ""), err
    return out


def refused(result, *says):
    code, out, err = result
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("midstream: ")]
    assert (code, out, len(lines)) == (2, "", 1) and "Traceback" not in err
    for part in says:
        assert part in lines[0]


def header_of(text):
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body
