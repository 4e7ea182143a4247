"""Every family of probes from a recipe to what is served, by the same tap: closed forms, several blocks, heads."""

import json
import random

import pytest

from monitor.config import load_settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.harvest import prompt_values
from monitor.errors import ConfigInvalid
from monitor.live import load_live
from monitor.probe import ProbeWeights
from monitor.types import Phase
from probes_store.store import Store
from training.recipe import Recipe, read_recipe
from training.run import train

from .conftest import Sink

FAMILIES = {
    "difference_of_means": "solver: difference_of_means",
    "lda": "solver: lda",
    "ridge": "solver: ridge\npenalty: 0.1",
    "ridge_path": "solver: ridge",
    "two_blocks": "solver: lda\nlayers: [1, 2]",
    "attention": "head: {pooling: attention, heads: 2, steps: 60, batch: 32}",
    "rolling_attention": "head: {pooling: rolling_attention, heads: 2, window: 4, steps: 60, batch: 32}",
    "multimax": "head: {pooling: multimax, heads: 2, steps: 60, batch: 32}",
    "swim": "head: {pooling: swim, window: 4, steps: 60, batch: 32, low_fpr: 0.3}",
    "mean_last": "head: {pooling: mean_last, steps: 60, batch: 32}\nlayers: [1, 2]",
}
SERVED = {"attention": 4, "rolling_attention": 4, "multimax": 2, "mean_last": 2}
"""Projections a token, where it is not one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four data sets, of one label each, told apart by a word."""
    folder, chance = tmp_path_factory.mktemp("families"), random.Random(0)
    rows = []
    for i in range(400):
        words = " ".join(chance.choices(["sea", "oak", "tea", "sun", "ink"], k=chance.randint(1, 4)))
        label = i % 2
        rows.append({"text": f"{words} {'###' if label else '...'} {i}", "label": label, "source": f"s{i % 4}"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def trained(name, folder, tiny_folder, tmp_path):
    text = FAMILIES[name] + ("" if "layers" in FAMILIES[name] else "\nlayer: 1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{file: rows.jsonl, by_source: true, calibrate: 0.1, test: 0.2}}]\n{text}\n")
    settings = load_settings(model=str(tiny_folder), store=tmp_path / "store")
    train(settings, "p", [folder], None, 1, 0, recipe)
    return settings, Store(settings.store).load("tiny-llama", "p", "v1")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_fitted_is_what_is_served(name, folder, tiny, tiny_folder, tmp_path):
    settings, stored = trained(name, folder, tiny_folder, tmp_path)
    card = stored.card
    assert card.projections == SERVED.get(name, 1) and set(stored.weight) == set(card.layers)
    assert card.metrics["held_out"][card.metrics["chosen"]]["auroc"] > 0.9
    live = load_live(tiny.served(), Store(settings.store), settings)
    engine = EmbeddedEngine(tiny, live, settings, Sink())
    assert live.check_canaries(tiny.template, engine.prefill) < 1e-3
    engine.stop(0.0)
    prompts = [tiny.template.encode([{"role": "user", "content": f"oak tea {w} 7"}]) for w in ("###", "...")]
    how = {phase: card.aggregation[phase.value] for phase in Phase}
    high, low = prompt_values(tiny, ProbeWeights("p", stored.weight, stored.bias), how, prompts)
    assert high > low


def test_the_recipe_in_the_card_makes_the_same_bytes_again(folder, tiny_folder, tmp_path):
    for name in ("ridge_path", "attention"):
        (tmp_path / name).mkdir()
        settings, stored = trained(name, folder, tiny_folder, tmp_path / name)
        again = tmp_path / name / "again.yaml"
        again.write_text(json.dumps(stored.card.fit["recipe"]))
        assert read_recipe(again) == Recipe.model_validate(stored.card.fit["recipe"])
        train(settings, "p", [folder], None, 1, 0, again)
        second = Store(settings.store).load("tiny-llama", "p", "v2").card
        assert (second.sha256, second.fit) == (stored.card.sha256, stored.card.fit)


def test_ridge_says_how_its_penalty_was_chosen(folder, tiny_folder, tmp_path):
    _, stored = trained("ridge_path", folder, tiny_folder, tmp_path)
    fit = stored.card.fit
    assert fit["method"] == "ridge" and fit["penalty"] > 0 and 0.9 < fit["left_out_auroc"] <= 1


def test_the_card_says_how_it_holds_on_data_sets_that_were_left_out(folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "left_out", "solver: best\nepochs: 20\nleft_out: true")
    _, stored = trained("left_out", folder, tiny_folder, tmp_path)
    found = stored.card.metrics["left_out"]
    assert found["data_sets"] == 4 and set(found["recalls"]) == {"s1", "s3"} and set(found["rates"]) == {"s0", "s2"}
    assert 0.9 < found["pooled"]["low"] <= found["pooled"]["auroc"] <= 1 and found["pooled"]["n_harmful"] == 140
    assert found["lowest"] in found["recalls"] and found["recall"] == pytest.approx(sum(found["recalls"].values()) / 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("head: {pooling: swim}\nleft_out: true", "too long for a head"),
        ("head: {pooling: attention}\nsolver: lda", "leave out solver"),
        ("head: {pooling: attention}\nprompt: {kind: max}", "leave out prompt"),
        ("head: {pooling: median}", "pooling"),
        ("head: {pooling: multimax, heads: 0}", "at least 1"),
        ("head: {pooling: multimax, lr: 0}", "lr must be above 0"),
        ("solver: svm", "solver"),
        ("solver: lda\nshrinkage: 2", "shrinkage"),
        ("solver: ridge\npenalty: 0", "penalty"),
    ],
)
def test_a_recipe_that_cannot_be_fitted_names_the_key(text, named, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"sources: [{{file: rows.jsonl}}]\n{text}\n")
    with pytest.raises(ConfigInvalid, match=named):
        read_recipe(path)
