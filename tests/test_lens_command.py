"""`midstream lens`: what it writes and says is what the server would say, and mistakes are one line."""

import json

import pytest
import typer
from typer.testing import CliRunner

from monitor.cli import lens as cli_lens
from monitor.scoring import score_text

from .conftest import LAYER, publish
from .page import Reader


@pytest.fixture
def run(tiny_folder, tmp_path):
    """run(*arguments) -> the finished `midstream lens` on the tiny model, with the store at tmp_path / "store"."""
    app = typer.Typer()
    app.command("lens")(cli_lens.lens)
    app.command("other")(lambda: None)
    common = ["--model", str(tiny_folder), "--store", str(tmp_path / "store")]

    def go(*arguments, given=None):
        return CliRunner().invoke(app, ["lens", *map(str, arguments), *common], given, env={"COLUMNS": "120"})

    return go


def test_the_command_writes_what_it_was_asked_for(run, tmp_path):
    page_at, picture_at = tmp_path / "l.html", tmp_path / "l.png"
    done = run("good day", "--html", page_at, "--png", picture_at, "--last", 4)
    assert done.exit_code == 0, done.output
    assert f"wrote {page_at}" in done.stdout and f"wrote {picture_at}" in done.stdout
    assert "the logit lens alone" in done.stderr
    assert "the last 4 of " in done.stdout
    Reader(page_at.read_text())
    assert picture_at.stat().st_size > 5000


def test_the_command_says_what_the_server_would(run, tiny, random_probe, tmp_path):
    publish(tiny, [(random_probe, {})], tmp_path / "store")
    done = run("good day", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    shown = run("good day").stdout
    settings_ = cli_lens.load_settings(model=tiny.module.config._name_or_path, store=tmp_path / "store")
    (row,) = score_text(settings_, "good day").rows
    (verdict,) = said["verdicts"]
    assert verdict == f"random v1: value {row.value:.3f}, threshold -: {row.verdict}"
    assert verdict in shown and "* counts towards" in shown
    tokens = [t for t, c in zip(said["tokens"], said["counts"], strict=True) if c]
    assert "".join(tokens).startswith("good day")
    served = [s for s in row.token_scores if s is not None]
    seen = said["probes"]["random"]["values"][LAYER]
    assert [v for v, c in zip(seen, said["counts"], strict=True) if c] == pytest.approx(served, abs=1e-3)


def test_raw_text_has_no_template(run):
    said = json.loads(run("abc", "--raw", "--json").stdout)
    assert said["tokens"] == ["a", "b", "c"] and said["probes"] == {}


def test_a_conversation_comes_from_stdin(run):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    done = run("-", "--conversation", "--json", "--last", 100, given=json.dumps(messages))
    assert done.exit_code == 0, done.output
    text = "".join(json.loads(done.stdout)["tokens"])
    assert text.index("user\nHi") < text.index("assistant\nYo")
    raw = json.dumps([{"role": "", "content": "ab"}, {"role": "", "content": "cd"}])
    assert json.loads(run("-", "--conversation", "--json", given=raw).stdout)["tokens"] == ["a", "b", "c", "d"]
    assert json.loads(run("-", "--raw", "--json", given="abc").stdout)["tokens"] == ["a", "b", "c"]


@pytest.mark.parametrize("given", ["{", "7", "[7]", '[{"role": "user"}]', "[" * 100_000])
def test_what_is_no_conversation_is_said(run, given):
    assert "--conversation wants JSON like" in str(run("-", "--conversation", given=given).exception)


def test_mistakes_are_told_before_the_model_is_loaded(run, tmp_path):
    assert "the text is empty" in str(run("  ").exception)
    assert "exclude each other" in str(run("x", "--raw", "--conversation").exception)
    assert "there is no folder" in str(run("x", "--html", tmp_path / "none" / "a.html").exception)


def test_the_help_has_the_multilingual_example(run):
    shown = run("--help").stdout
    assert "One word in several languages" in " ".join(shown.split()) and "Español: flor." in shown
