"""Rows for a probe that looks past the form: our look-alikes, copies in other forms, and a probe of mean and last."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from monitor.aggregate import Aggregation
from monitor.config import load_settings
from monitor.engines.embedded.harvest import prompt_values, residual_streams
from monitor.errors import ConfigInvalid
from monitor.live import load_live
from monitor.probe import ProbeWeights
from monitor.types import Phase
from probes_store.base import load_base
from probes_store.calibration import Calibration
from probes_store.store import Store
from training.data import CONTRASTS, LOOKALIKES, PAIRS, TWINS, Row, read_jsonl, unique
from training.forms import LONGEST, reformed
from training.lint import lint
from training.recipe import Recipe, gather
from training.report.scores import Judge, score_prompts
from training.retrain.candidate import start_of
from training.run import train
from training.transforms import TRANSFORMS, transformed


@pytest.mark.parametrize("file", [LOOKALIKES, TWINS, CONTRASTS])
def test_our_look_alikes_are_pairs_that_words_and_length_tell_little_of(file):
    rows, _ = read_jsonl(file)
    assert Counter(Counter(r.group for r in rows).values()) == {2: len(rows) // 2} and len(rows) >= 700
    assert {tuple(sorted(r.label for r in rows if r.group == g)) for g in {r.group for r in rows}} == {(0, 1)}
    report = lint([file])
    assert report.findings == ()
    assert report.figures["tfidf_auroc"] < 0.8 and report.figures["length_auroc"] < 0.6


def test_no_text_of_ours_is_in_two_files():
    files = [read_jsonl(file)[0] for file in (PAIRS, LOOKALIKES, TWINS, CONTRASTS)]
    assert len(unique([row for rows in files for row in rows])) == sum(map(len, files))


def test_a_copy_has_another_form_and_all_else_of_its_row():
    rows = [Row(f"How do I mend fence number {i}?", i % 2, "s", f"g{i}", 2.0, "k") for i in range(200)]
    copies = reformed(rows, 2, 0.25)
    assert copies == reformed(rows, 2, 0.25) != reformed(rows, 2, 0.25, seed=1)
    assert len({r.text for r in copies}) == 400 and not {r.text for r in copies} & {r.text for r in rows}
    assert {(r.weight, r.source, r.key) for r in copies} == {(0.5, "s", "k")}
    assert Counter((r.group, r.label) for r in copies) == {(r.group, r.label): 2 for r in rows}
    kinds = Counter("caps" if r.text.isupper() else "frame" if len(r.text) > 45 else "typos" for r in copies)
    assert min(kinds.values()) > 50, "of each some"


def test_long_texts_and_answers_get_no_copy():
    long, answer = Row("a" * (LONGEST + 1), 1, "s", "g"), Row("Why?", 1, "s", "g", answer="Because.")
    assert reformed([long, answer], 2, 0.5) == []


def test_the_frames_are_not_those_that_measure():
    asked = "What is a tram?"
    measured = {transformed(name, asked, seed)[-1]["content"] for name in TRANSFORMS for seed in range(20)}
    measured -= {asked.upper()} | {transformed("typos", asked, seed)[-1]["content"] for seed in range(20)}
    frames = {r.text for seed in range(60) for r in reformed([Row(asked, 0, "s", "g")], 3, 1.0, seed)}
    assert len(frames) > 12 and not frames & measured


def test_copies_are_fitted_and_nothing_else(tmp_path):
    """Those of a key weigh together what the recipe says, however many; held-out rows have none."""
    rows = [{"text": f"Is {i} a prime number?", "label": i % 2} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"file": "a.jsonl", "calibrate": 0.2, "test": 0.2, "forms": 2, "form_weight": 0.5, "weight": 3}
    parts, _ = gather(Recipe.model_validate({"sources": [source], "balance": True}), tmp_path)
    texts = {r["text"] for r in rows}
    assert [len([r for r in parts[p] if r.text not in texts]) for p in ("fit", "calibrate", "test")] == [240, 0, 0]
    for label in (0, 1):
        copies = sum(r.weight for r in parts["fit"] if r.text not in texts and r.label == label)
        assert copies == pytest.approx(1.5)
        assert sum(r.weight for r in parts["fit"] if r.text in texts and r.label == label) == pytest.approx(3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": {"kind": "multimax"}}, "multimax is a head's way"),
        ({"response": {"kind": "attention"}}, "attention is a head's way"),
    ],
)
def test_a_recipe_that_no_probe_can_be_made_of_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({"sources": [{"file": "a"}]} | given)


def test_a_probe_of_mean_and_last_is_served_as_it_was_fitted(tiny, tiny_folder, tmp_path):
    """Labels that only the last word tells: what is fitted on (mean, last) is what the served statistic is made of."""
    chance = random.Random(0)
    words = ["sea", "oak", "tea", "sun", "ink"]
    rows = [
        {"text": " ".join([*chance.choices(words, k=5), "#" if i % 2 else "."]) + f" {i:03d}", "label": i % 2}
        for i in range(300)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(
        "sources: [{file: rows.jsonl, calibrate: 0.3, test: 0.3}]\nlayers: [1, 2]\nsolver: logistic\nphases: [prompt]\n"
        "prompt: {kind: mean_last}\nresponse: {kind: ema}\n"
    )
    settings = load_settings(model=str(tiny_folder), store=tmp_path / "store")
    train(settings, "end", [tmp_path], None, 1, 0, tmp_path / "recipe.yaml")
    stored = Store(settings.store).load("tiny-llama", "end", "v1")
    assert stored.card.projections == 2 and {w.shape for w in stored.weight.values()} == {(2, tiny.d_model)}
    base = load_base(stored)
    assert base.layers == (1, 2), "the base is of the means alone"
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("mean_last", "mean"))
    train(settings, "means", [tmp_path], None, 1, 0, tmp_path / "recipe.yaml")
    means = Store(settings.store).load("tiny-llama", "means", "v1")
    # What retraining goes on from, as features of traffic are means: the plane that is fitted to these alone.
    start = start_of(stored, np.zeros((0, 2 * tiny.d_model)))
    np.testing.assert_allclose(start.weight, np.concatenate([means.weight[layer] for layer in (1, 2)]), rtol=1e-5)
    assert start.known and start.bias == pytest.approx(means.bias, rel=1e-5) and load_base(means).plane is None
    # A raw text has no closing tokens: its last one is any token, and only the mean's projection is served.
    live = load_live(tiny.served(), Store(settings.store), settings)
    kinds = {form: rules[0].aggregation.kind for form, rules in live.rules.items()}
    assert kinds == {"chat": "mean_last", "raw": "mean"} == {f: stored.card.how(f, "prompt").kind for f in kinds}
    parts, _ = gather(Recipe.model_validate(stored.card.fit["recipe"]), tmp_path)
    firsts = ProbeWeights("end", {layer: w[0] for layer, w in stored.weight.items()}, stored.bias[0])
    raw = [tiny.template.raw(r.text) for r in parts["calibrate"]]
    means = prompt_values(tiny, firsts, {Phase.PROMPT: Aggregation("mean"), Phase.RESPONSE: Aggregation("ema")}, raw)
    wanted = Calibration.fit(means, "").threshold(0.1)
    assert stored.card.calibration["raw"]["prompt"].threshold(0.1) == pytest.approx(wanted, abs=1e-4)
    how = stored.card.aggregation
    judge = Judge(tiny, ProbeWeights("end", stored.weight, stored.bias), how["prompt"], how["response"])
    texts = [r["text"] for r in rows[:20]]
    values = score_prompts(judge, judge.prompts(texts), (), lambda n: None).values
    for index, streams in residual_streams(tiny, judge.prompts(texts), (1, 2)):
        turn = judge.prompts(texts)[index].turns[-1]
        wanted = stored.bias[0]
        for layer, weight in stored.weight.items():
            x = streams[layer][turn.start : turn.end].numpy()
            wanted += float(x.mean(0) @ weight[0].numpy() + x[-1] @ weight[1].numpy())
        assert values[index] == pytest.approx(wanted, abs=1e-3)
    assert np.isfinite(stored.card.calibration["chat"][Phase.PROMPT.value].tail).all()


def test_our_files_are_named_in_a_recipe(tmp_path):
    _, files = gather(Recipe.model_validate({"sources": [{"file": "pairs"}, {"file": "lookalikes"}]}), tmp_path)
    assert [f.file for f in files] == ["pairs.jsonl", "lookalikes.jsonl"]
    with pytest.raises(ConfigInvalid, match="lookalike"):
        gather(Recipe.model_validate({"sources": [{"file": "lookalike"}]}), tmp_path)
