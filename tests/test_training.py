"""`midstream train` end to end on the tiny model: what it publishes is what is served, and starts in shadow."""

import json
import random

import numpy as np
import pytest

from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.live import counted, load_live
from monitor.types import Mode
from probes_store.base import load_base
from probes_store.store import Store
from training.run import train

from .conftest import reference_logits


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """An easy task with enough harmless rows to certify 1 % in the prompt phase."""
    folder = tmp_path_factory.mktemp("train")
    chance = random.Random(0)
    rows = []
    for i in range(1500):
        words = " ".join(chance.choices(["sea", "oak", "tea", "sun", "ink"], k=chance.randint(1, 4)))
        harmful = i % 10 == 0
        rows.append({"text": f"{words} {'###' if harmful else '...'} {i}", "label": int(harmful)})
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "sources: [{file: rows.jsonl, calibrate: 0.5, test: 0.2}]\nlayer: 1\nepochs: 60\n"
        "answers: 12\nanswer_tokens: 4\nevaluate: [rows.jsonl]\n"
    )
    settings = load_settings(model=str(tiny_folder), store=folder / "store")
    path = train(settings, "hashes", [folder], None, 1, 0, recipe)
    return settings, path


def test_the_card_says_what_was_done(trained, tiny):
    settings, path = trained
    card = Store(settings.store).load("tiny-llama", "hashes", "v1").card
    assert path == settings.store / "tiny-llama" / "hashes" / "v1"
    assert card.layers == (1,) and card.model.fingerprint == tiny.fingerprint
    assert set(card.metrics["held_out"]) == {"logistic_regression", "linear_probe_adam"}
    assert card.metrics["held_out"][card.metrics["chosen"]]["auroc"] > 0.95
    assert card.data[0].rows == 1500 and card.data[0].positive == 150
    base = load_base(Store(settings.store).load("tiny-llama", "hashes", "v1"))
    assert base.layers == (1,) and base.rows(0) > 5 * base.rows(1) > 0
    assert card.calibration["chat"]["prompt"].n > 600 and card.calibration["chat"]["response"].n == 12
    assert "response" not in card.calibration["raw"]
    rates = {(t.phase, t.target_fpr): t for t in card.thresholds if t.format == "chat"}
    assert ("prompt", 0.01) in rates and ("prompt", 0.001) not in rates and ("response", 0.05) not in rates
    seen = rates["prompt", 0.01]
    assert seen.fpr_low <= seen.observed_fpr <= seen.fpr_high and seen.test_rows > 200
    assert card.metrics["evaluation"]["sets"]["rows"]["tfidf"]["auroc"] > 0.5


def test_it_starts_in_shadow_and_passes_its_canaries_in_the_engine(trained, tiny):
    from monitor.engines.embedded.engine import EmbeddedEngine

    from .conftest import Sink

    settings, _ = trained
    live = load_live(tiny.served(), Store(settings.store), settings)
    assert {r.mode for rules in live.rules.values() for r in rules} == {Mode.SHADOW}
    engine = EmbeddedEngine(tiny, live, settings, Sink())
    assert live.check_canaries(tiny.template, engine.prefill) < 1e-3
    engine.stop(0.0)


def test_what_is_published_scores_like_transformers(trained, tiny):
    settings, _ = trained
    stored = Store(settings.store).load("tiny-llama", "hashes", "v1")
    prompt = tiny.template.encode([{"role": "user", "content": stored.card.canaries[0].text}])
    expected = reference_logits(tiny.module, list(prompt.token_ids), stored.weight, stored.bias)
    assert np.abs(np.array(stored.card.canaries[0].scores) - expected[counted(prompt)]).max() <= 1e-4


def test_too_few_harmless_rows_can_flag_nothing_at_1_percent(trained):
    """12 answers can't certify anything: the response phase may not block, and says how many more are needed."""
    settings, _ = trained
    blocking = load_settings(
        model=settings.model, store=settings.store, modes={"hashes": {"prompt": "block", "response": "block"}}
    )
    from monitor.engines.embedded.model import load_model

    model = load_model(settings.model, cache=settings.cache)
    with pytest.raises(ConfigInvalid, match="586 more are needed"):
        load_live(model.served(), Store(settings.store), blocking)


def test_one_class_is_refused(tiny_folder, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "only harmless", "label": 0}\n')
    with pytest.raises(ConfigInvalid, match="no harmful rows"):
        train(load_settings(model=str(tiny_folder), store=tmp_path), "x", [tmp_path / "one.jsonl"], None, 5, 0, None)
