"""The residual-stream experiment: pairs that don't leak, curves that change nothing, the same bytes again."""

import html
import json

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from monitor.cli import lens as cli_lens
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from training import pairs_made
from training.curves import EPOCHS, features, train
from training.data import same_text
from training.experiment import Experiment, residual_stream
from training.experiment_report import report_page
from training.fit import fit_torch
from training.pairs_made import ELSEWHERE, FIT, VALIDATION, concepts

from .page import Reader
from .reference import chat, reference
from .rows import blobs

NAMES = ["caps", "html", "harmful", "harmful-twins"]
PUBLIC = ("concept_caps", "concept_html", "jailbreakbench", "xstest", "strongreject", "mitre_frr")


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_pairs_are_as_many_as_said_and_balanced(seed):
    found = concepts(seed)
    assert [c.name for c in found] == NAMES
    for c in found:
        assert (len(c.fit), len(c.validation)) == (2 * FIT, 2 * VALIDATION)
        for rows in (c.fit, c.validation, *c.elsewhere.values()):
            groups = {}
            for row in rows:
                groups.setdefault(row.group, []).append(row.label)
            assert all(labels == [1, 0] for labels in groups.values())
        assert all(len(rows) == 2 * ELSEWHERE for rows in c.elsewhere.values())
        assert len(c.elsewhere) >= 2


@pytest.mark.parametrize("seed", range(5))
def test_no_text_that_was_fitted_on_is_looked_at_later(seed):
    for c in concepts(seed):
        fitted = {same_text(r.text) for r in c.fit}
        assert not fitted & {same_text(r.text) for r in c.validation}
        for rows in c.elsewhere.values():
            assert not fitted & {same_text(r.text) for r in rows}


def test_the_seed_decides_the_pairs():
    assert concepts(1) == concepts(1)
    assert concepts(1)[0].fit != concepts(2)[0].fit


def by_pair(rows):
    return [(rows[i].text, rows[i + 1].text) for i in range(0, len(rows), 2)]


def test_each_concept_is_what_it_says():
    caps, tags, harmful, twins = concepts()
    assert all(there == plain.upper() != plain for there, plain in by_pair(caps.fit))
    for there, plain in by_pair(tags.fit):
        seen = Reader(there)
        assert "".join(seen.text) == plain and seen.tags
    assert all("<" in a and b == html.escape(a) for a, b in by_pair(tags.elsewhere["HTML against the same, escaped"]))
    assert [h for h, _ in by_pair(harmful.fit)] == [h for h, _ in by_pair(twins.fit)]
    assert {e for _, e in by_pair(harmful.fit)}.isdisjoint(e for _, e in by_pair(twins.fit))


def test_too_few_pairs_are_refused(tmp_path, monkeypatch):
    few = tmp_path / "pairs.jsonl"
    few.write_text('{"text": "a", "label": 1, "group": "1"}\n{"text": "b", "label": 0, "group": "1"}\n')
    monkeypatch.setattr(pairs_made, "PAIRS", few)
    with pytest.raises(ConfigInvalid, match=r"has 1 pairs, \d+ are needed"):
        concepts()


# --- training -------------------------------------------------------------------------------------------------------


def test_looking_at_every_epoch_changes_nothing():
    x, y = blobs(n=60)
    other, other_y = blobs(n=40, seed=1)
    trained = train(x, y, other, other_y, epochs=50, seed=3)
    plain = fit_torch(x, y, np.ones(len(y)), 50, range(50), seed=3)
    assert trained.fitted.weight.tobytes() == plain.weight.tobytes() and trained.fitted.bias == plain.bias
    again = train(x, y, -other, 1 - other_y, epochs=50, seed=3)
    assert again.fitted.weight.tobytes() == plain.weight.tobytes()


def test_the_curves_are_what_the_probe_does():
    x, y = blobs(n=100)
    other, other_y = blobs(n=60, seed=1)
    trained = train(x, y, other, other_y)
    assert {len(c) for c in trained.curves.values()} == {EPOCHS}
    loss = trained.curves["training_loss"]
    assert loss[-1] < loss[20] < loss[0]
    for name, features_, labels in (("training", x, y), ("validation", other, other_y)):
        right = ((trained.fitted.logits(features_) > 0) == labels).mean()
        assert trained.curves[f"{name}_accuracy"][-1] == pytest.approx(right, abs=1e-6)


def test_features_are_the_mean_over_the_counted_positions(tiny):
    texts = ["one text", "another, longer text", "x"]
    ticked = []
    found = features(tiny, texts, [1, 3], ticked.append)
    assert sum(ticked) == 3
    for row, text in enumerate(texts):
        prompt = chat(tiny, text)
        hidden, _ = reference(tiny, prompt)
        turn = prompt.turns[-1]
        wanted = hidden[2][0, turn.start : turn.end].mean(0).numpy()
        assert found[0, row] == pytest.approx(wanted, abs=1e-4)


# --- the whole run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few():
    """Fewer pairs: the tiny model reads bytes, and nothing here depends on how many."""
    with pytest.MonkeyPatch.context() as patch:
        for name, n in (("FIT", 12), ("VALIDATION", 6), ("ELSEWHERE", 4)):
            patch.setattr(pairs_made, name, n)
        yield


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Sets of the names that the report looks for: one with both labels, one all harmful, one all harmless."""
    folder = tmp_path_factory.mktemp("public")
    for number, stem in enumerate(PUBLIC):
        labels = {"strongreject": [1] * 6, "mitre_frr": [0] * 6}.get(stem, [1, 0] * 3)
        rows = [json.dumps({"text": f"{stem} {number} row {i}", "label": label}) for i, label in enumerate(labels)]
        (folder / f"{stem}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(few, tiny_folder, tmp_path_factory, public):
    """(folder with public sets, folder without, their results), 5 epochs."""
    settings = load_settings(model=str(tiny_folder))
    with_sets, without = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("without") / "new"
    results = residual_stream(settings, with_sets, public, epochs=5)
    return with_sets, without, results, residual_stream(settings, without, epochs=5)


def test_the_report_has_everything(made):
    folder, _, results, _ = made
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["block"] == 2 and list(results["concepts"]) == NAMES
    for c in results["concepts"].values():
        assert len(c["layers"]) == 4 and c["layers"][2] == c["validation_accuracy"]
        assert c["low"] <= c["validation_accuracy"] <= c["high"]
        assert set(c["floors"]) == {"words", "length", "shuffled"}
        assert {len(curve) for curve in c["curves"].values()} == {5}
    harmful = results["concepts"]["harmful"]["elsewhere"]
    assert harmful["xstest"]["n_positive"] == 3 and 0 <= harmful["xstest"]["auroc"] <= 1
    assert harmful["strongreject"]["auroc"] is None and harmful["strongreject"]["false_alarms"] is None
    assert harmful["mitre_frr"]["found"] is None and harmful["mitre_frr"]["false_alarms"]["n"] == 6
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_public_sets_are_looked_at_and_change_nothing(made):
    with_sets, without, results, plain = made
    assert (with_sets / "probes.safetensors").read_bytes() == (without / "probes.safetensors").read_bytes()
    for name, c in results["concepts"].items():
        other = plain["concepts"][name]
        assert {k: v for k, v in c.items() if k != "elsewhere"} == {k: v for k, v in other.items() if k != "elsewhere"}
        assert set(c["elsewhere"]) - set(other["elsewhere"]) <= set(PUBLIC)


def test_the_same_seed_gives_the_same_bytes(made, tiny_folder, tmp_path):
    _, without, _, _ = made
    residual_stream(load_settings(model=str(tiny_folder)), tmp_path, epochs=5)
    for name in ("results.json", "probes.safetensors", "index.html", "curves.png"):
        assert (tmp_path / name).read_bytes() == (without / name).read_bytes(), name


def test_the_stored_probes_are_the_ones_that_were_measured(few, tiny):
    run = Experiment(tiny, 0, Console(quiet=True), epochs=5)
    results = run.run(None)
    for c in run.concepts:
        x = features(tiny, [r.text for r in c.validation], [run.block], lambda n: None)[0].astype(np.float64)
        right = (run.fitted[c.name].logits(x) > 0) == [r.label == 1 for r in c.validation]
        assert results["concepts"][c.name]["validation_accuracy"] == pytest.approx(right.mean(), abs=1e-6)


def test_the_page_is_sound_and_needs_no_network(made):
    folder, _, results, _ = made
    document = (folder / "index.html").read_text()
    seen = Reader(document)
    text = " ".join("".join(seen.text).split())
    assert "script" not in seen.tags and "http://" not in document and "https://" not in document
    assert all(name in text for name in (*NAMES, "mitre_frr", "capitals against Title Case"))
    hostile = results | {"model": "<script>alert(1)</script>"}
    assert "script" not in Reader(report_page(hostile)).tags


def test_mistakes_are_one_line(tiny_folder, tmp_path):
    settings = load_settings(model=str(tiny_folder))
    with pytest.raises(ConfigInvalid, match=r"has no concept_caps\.jsonl"):
        residual_stream(settings, tmp_path, tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="can't be made"):
        residual_stream(settings, tmp_path / "file" / "out")


def test_the_command_takes_a_folder(few, tiny_folder, tmp_path):
    app = typer.Typer()
    app.add_typer(cli_lens.experiment, name="experiment")
    out = tmp_path / "out"
    arguments = ["experiment", "residual-stream", "--model", tiny_folder, "--out", out, "--epochs", 3]
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})
    assert done.exit_code == 0, done.output
    assert "validation accuracy after 3 epochs, block 2" in done.stdout
    assert f"wrote curves.png, index.html, probes.safetensors, results.json to {out}" in done.stdout.replace("\n", "")
