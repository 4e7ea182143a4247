"""The logit lens: what it shows is the model's, what it writes is safe to open, and mistakes are one line."""

import dataclasses
import html
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from monitor.cli import lens as cli_lens
from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid, ModelUnsupported
from monitor.probe import ProbeBank, ProbeWeights
from monitor.scoring import score_text
from training import lens as lens_module
from training.lens import logit_lens
from training.lens_view import lens_page, lens_png, visible
from training.page import element, line_chart, page, table

from .conftest import LAYER, publish, reference_logits, save_tiny, tiny_config

HOSTILE = """<script>alert(1)</script>"><img src=x onerror='alert(2)'>&lt;\x1b[2J\u202e$\\frac{1}{$"""


def chat(model, text):
    return model.template.encode([{"role": "user", "content": text}])


def reference(model, prompt):
    """transformers alone: (hidden_states, logits) of every position."""
    model.module.set_attn_implementation("sdpa")
    with torch.inference_mode():
        out = model.module(input_ids=torch.tensor([prompt.token_ids]), output_hidden_states=True)
    return out.hidden_states, out.logits[0].float()


def log_probabilities(lens, layer):
    """(n_shown, vocabulary) of a lens with every word, in the order of ids."""
    out = np.empty(lens.ids.shape[1:])
    np.put_along_axis(out, lens.ids[layer], lens.probability[layer].astype(np.float64), axis=1)
    return np.log(out)


# --- the lens -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "granite", "qwen3"])
def model(request, tiny, tmp_path_factory):
    """Also one that scales its logits after the unembedding, and one with another attention."""
    if request.param == "llama":
        return tiny
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("lens") / request.param
    if request.param == "granite":
        module = GraniteForCausalLM(tiny_config(GraniteConfig, logits_scaling=8.0))
    else:
        module = Qwen3ForCausalLM(tiny_config(Qwen3Config, head_dim=16))
    return load_model(str(save_tiny(folder, module)), cache=cache_dir())


def test_the_last_block_is_what_the_model_says(model):
    prompt = chat(model, "what is a residual stream?")
    lens = logit_lens(model, prompt, last=12, k=len(model.tokenizer))
    _, logits = reference(model, prompt)
    assert log_probabilities(lens, model.n_layers - 1) == pytest.approx(
        logits[-12:].log_softmax(-1).numpy().astype(np.float64), abs=1e-4
    )


def test_every_block_is_norm_and_unembedding_of_its_stream(tiny):
    prompt = chat(tiny, "block by block")
    lens = logit_lens(tiny, prompt, last=9, k=len(tiny.tokenizer))
    hidden, _ = reference(tiny, prompt)
    for layer in range(tiny.n_layers - 1):
        with torch.inference_mode():
            wanted = tiny.module.lm_head(tiny.module.model.norm(hidden[layer + 1][0, -9:])).log_softmax(-1)
        assert log_probabilities(lens, layer) == pytest.approx(wanted.numpy().astype(np.float64), abs=1e-4)


def test_the_most_probable_come_first_and_add_up(tiny):
    lens = logit_lens(tiny, chat(tiny, "order"), last=5, k=len(tiny.tokenizer))
    assert (np.diff(lens.probability, axis=-1) <= 0).all()
    assert lens.probability.sum(-1) == pytest.approx(1.0, abs=1e-4)
    word, p = lens.top(0, 0)[0]
    assert word == tiny.tokenizer.decode([int(lens.ids[0, 0, 0])]) and p == lens.probability[0, 0, 0]


def test_which_positions_are_shown_and_which_count(tiny):
    prompt = chat(tiny, "hello")
    lens = logit_lens(tiny, prompt, last=10_000)
    counted = {p for turn in prompt.turns for p in range(turn.start, turn.end)}
    assert lens.positions == tuple(range(len(prompt.token_ids)))
    assert {p for p, c in zip(lens.positions, lens.counts, strict=True) if c} == counted
    assert "".join(lens.tokens) == tiny.tokenizer.decode(prompt.token_ids)
    short = logit_lens(tiny, prompt, last=3)
    assert short.positions == lens.positions[-3:] and short.tokens == lens.tokens[-3:]
    assert (short.ids == lens.ids[:, -3:]).all()


def test_memory_is_bounded_by_rows_at_a_time(tiny, monkeypatch):
    prompt = chat(tiny, "chunk by chunk")
    whole = logit_lens(tiny, prompt)
    monkeypatch.setattr(lens_module, "_CHUNK_LOGITS", 1)
    rows = []
    handle = tiny.module.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    try:
        one = logit_lens(tiny, prompt)
    finally:
        handle.remove()
    assert max(rows) == 1 and len(rows) > tiny.n_layers
    assert (one.ids == whole.ids).all()
    assert one.probability == pytest.approx(whole.probability, abs=1e-6)


def test_a_model_that_does_something_else_to_its_logits_is_refused(tiny):
    def halve(_module, _args, output):
        output.logits = output.logits / 2
        return output

    handle = tiny.module.register_forward_hook(halve)
    try:
        with pytest.raises(ModelUnsupported, match=r"LlamaForCausalLM: .* off by"):
            logit_lens(tiny, chat(tiny, "anything"))
    finally:
        handle.remove()
    assert logit_lens(tiny, chat(tiny, "anything")).n_layers == 4


def test_a_text_that_is_too_long_is_refused(tiny):
    short = dataclasses.replace(tiny, max_model_len=8)
    with pytest.raises(ConfigInvalid, match="this model reads 8; shorten it"):
        logit_lens(short, chat(tiny, "more than eight bytes"))


# --- the probes -----------------------------------------------------------------------------------------------------


def test_a_probe_of_one_block_is_read_as_it_is_served(tiny, random_probe):
    prompt = chat(tiny, "why was this flagged?")
    lens = logit_lens(tiny, prompt, ProbeBank([random_probe], tiny.d_model), last=7)
    wanted = reference_logits(tiny.module, list(prompt.token_ids), random_probe.weight, random_probe.bias)
    assert lens.scores[:, 0] == pytest.approx(wanted, abs=1e-4)
    (trace,) = lens.probes
    assert trace.reads == (LAYER,)
    assert trace.values[LAYER] == pytest.approx(wanted[-7:], abs=1e-4)
    hidden, _ = reference(tiny, prompt)
    elsewhere = (hidden[2][0, -7:] @ random_probe.weight[LAYER] + random_probe.bias).numpy()
    assert trace.values[1] == pytest.approx(elsewhere, abs=1e-4)


def test_a_probe_of_several_blocks_shows_what_each_adds(tiny):
    torch.manual_seed(2)
    several = ProbeWeights("several", {0: torch.randn(64), 3: torch.randn(64)}, -0.5)
    single = ProbeWeights("single", {1: torch.randn(64)}, 1.0)
    lens = logit_lens(tiny, chat(tiny, "two probes"), ProbeBank([several, single], 64), last=6)
    values = lens.probes[0].values
    assert lens.probes[0].reads == (0, 3)
    assert np.isnan(values[[1, 2]]).all()
    assert values[[0, 3]].sum(0) - 0.5 == pytest.approx(lens.scores[-6:, 0], abs=1e-4)
    assert lens.probes[1].values[1] == pytest.approx(lens.scores[-6:, 1], abs=1e-4)
    assert lens.as_dict()["probes"]["several"]["values"][1] == [None] * 6


# --- page and picture -----------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a browser would see: tags, attributes, text; every tag closed where it was opened."""

    def __init__(self, document):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = set(), [], [], []
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("img", "meta", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


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


# --- the command ----------------------------------------------------------------------------------------------------


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
