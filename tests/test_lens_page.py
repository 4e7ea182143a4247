"""The lens as page and picture: safe to open whatever the text, all blocks and tokens, charts and tables."""

import dataclasses
import html

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.errors import ConfigInvalid
from monitor.probe import ProbeBank
from training.lens import logit_lens
from training.lens_view import lens_page, lens_png, visible
from training.page import element, line_chart, page, table

from .page import Reader
from .reference import chat

HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>&lt;\x1b[2J\u202e$\\frac{1}{$"""


@settings(deadline=None, max_examples=200)
@given(st.text(), st.text())
def test_no_text_becomes_markup(text, attribute):
    # Two kinds of characters that the parser itself rewrites, in data that is correct.
    text, attribute = (t.replace("\r", "").replace("\x00", "") for t in (text, attribute))
    seen = Reader(element("td", text, title=attribute, class_=None))
    assert seen.tags == {"td"}
    assert "".join(seen.text) == text
    assert seen.attributes == [("title", attribute)]


def test_the_page_of_a_hostile_text_holds_no_markup_of_it(tiny, random_probe):
    bank = ProbeBank([dataclasses.replace(random_probe, name="<b>p</b>")], tiny.d_model)
    lens = logit_lens(tiny, chat(tiny, HOSTILE), bank, last=200)
    document = lens_page(lens, "<i>model</i>", HOSTILE)
    seen = Reader(document)
    assert seen.tags == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "strong", "div", "table", "tr", "th", "td")
    }
    assert {name for name, _ in seen.attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "style", "data-top")
    }
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in seen.attributes
    text = "".join(seen.text)
    assert visible(HOSTILE) in text and "<b>p</b>" in text and "<i>model</i>" in text
    assert "http://" not in document and "https://" not in document and "url(" not in document
    assert "\x1b" not in document and "\u202e" not in document


def test_the_page_has_every_block_and_token_with_its_five_words(tiny, random_probe):
    lens = logit_lens(tiny, chat(tiny, "ab"), ProbeBank([random_probe], tiny.d_model), last=6)
    tops = [value for name, value in Reader(lens_page(lens, "m", "ab")).attributes if name == "data-top"]
    assert len(tops) == tiny.n_layers * 6
    assert all(len(top.splitlines()) == 6 for top in tops)
    assert tops[0].startswith("block 3, after ")  # the last block is on top
    assert tops[0].splitlines()[1].endswith("  " + visible(lens.top(3, 0)[0][0]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\t", "a⏎b⇥"),
        ("\x1b[31m", "□[31m"),
        ("\u202eabc", "□abc"),
        ("", "∅"),
        (" the", " the"),
        ("  ", "␣␣"),
        ("花", "花"),
    ],
)
def test_a_token_is_one_visible_line(text, shown):
    assert visible(text) == shown


def test_the_picture_is_the_same_bytes_again_whatever_the_text(tiny, tmp_path):
    lens = logit_lens(tiny, chat(tiny, HOSTILE + " 花 $x$"), last=12)
    for name in ("one.png", "two.png"):
        lens_png(lens, tmp_path / name, "$\\frac{ 花")
    one, two = (tmp_path / "one.png").read_bytes(), (tmp_path / "two.png").read_bytes()
    assert one.startswith(b"\x89PNG\r\n\x1a\n") and one == two


def test_without_matplotlib_the_remedy_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("training.lens_view.find_spec", lambda name: None)
    with pytest.raises(ConfigInvalid, match=r"--png needs matplotlib; pip install 'midstream\[report\]'"):
        lens_png(logit_lens(tiny, chat(tiny, "x"), last=2), tmp_path / "x.png", "x")


@pytest.mark.parametrize("top", [1e-3, 0.81, 0.95, 1.0, 3.0, 8.0, 8.5, 9.99, 10.0, 123.0])
def test_a_chart_has_some_ticks_whatever_its_range(top):
    for low in (0.0, -top):
        shown = [t for t in Reader(line_chart("", {"a": [(0, low), (1, top)]}, "", "")).text if t.strip()]
        assert 4 + 2 <= len(shown) <= 2 * 9 + 1, shown


def test_charts_and_tables_of_odd_numbers():
    series = {"a, validation": [(1, 0.5), (2, float("nan"))], "a, training": [(1, 2.0)], "<b>": []}
    chart = line_chart("curves <i>", series, "epoch", "loss")
    seen = Reader(chart)
    assert "i" not in seen.tags and "b" not in seen.tags and "<b>" in seen.text
    assert ("stroke-dasharray", "5 4") in seen.attributes and "nan" not in chart
    assert "1e-05" in line_chart("log", {"a": [(1e-5, 0), (1, 1)]}, "FPR", "TPR", log_x=True)
    shown = Reader(table(("name", "value"), [("<x>", 0.25), ("y", None), ("z", float("nan")), ("n", 12_000)]))
    assert [t for t in shown.text if t.strip()] == ["name", "value", "<x>", "0.250", "y", "–", "z", "–", "n", "12,000"]
    assert page("<t>", "<p>").count(html.escape("<t>")) == 2
