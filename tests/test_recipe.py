"""Recipes: which rows go to which part, no text twice, no pair parted; every mistake named by its key."""

from collections import Counter

import pytest

from monitor.aggregate import Aggregation
from monitor.errors import ConfigInvalid
from training.data import PAIRS, read_jsonl, text_hash
from training.recipe import Recipe, Source, default_recipe, gather, read_recipe

from .rows import jsonl as jsonl


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_recipe(path)

    return write


def test_a_recipe_is_read(recipe):
    got = recipe("{layer: 3, solver: adam, prompt: {kind: max}, sources: [{file: a.jsonl, label: 1, limit: 5}]}")
    assert (got.layers, got.solver, got.prompt, got.response) == ((3,), "adam", Aggregation("max"), Aggregation("ema"))
    assert (got.sources[0].label, got.sources[0].limit, got.sources[0].calibrate) == (1, 5, 0.25)


def test_labels_of_answers(jsonl, tmp_path):
    """Where labels are about answers, the recipe says so; elsewhere an answer is left alone."""
    jsonl(*({"text": f"t {i}", "label": i % 2, "response": f"a {i}"} for i in range(40)))
    answers = Recipe.model_validate({"sources": [{"file": "rows.jsonl", "answers": True}]})
    parts, _ = gather(answers, tmp_path)
    assert {r.answer for part in parts.values() for r in part} == {f"a {i}" for i in range(40)}
    plain, _ = gather(Recipe.model_validate({"sources": [{"file": "rows.jsonl"}]}), tmp_path)
    assert {r.answer for part in plain.values() for r in part} == {""}
    jsonl({"text": "t", "label": 0, "response": "a"}, {"text": "no answer", "label": 1})
    with pytest.raises(ConfigInvalid, match=r"rows\.jsonl: no `response` beside 'no answer'"):
        gather(answers, tmp_path)
    with pytest.raises(ConfigInvalid, match="`response` must be a string"):
        read_jsonl(jsonl({"text": "t", "label": 0, "response": 3}))


@pytest.mark.parametrize(("concept", "changed"), [("caps", "T 3"), ("html", "<p>t 3</p>")])
def test_a_source_made_by_rule(jsonl, tmp_path, concept, changed):
    """Each text with the concept and without it, together in one part, whatever its own label."""
    jsonl(*({"text": f"t {i}", "label": i % 2} for i in range(40)), {"text": "12 + 30 = 42", "label": 0})
    source = {"file": "rows.jsonl", "made": concept, "limit": 40, "calibrate": 0.3, "test": 0.2}
    parts, _ = gather(Recipe.model_validate({"sources": [source]}), tmp_path)
    fit = {r.text: r.label for r in parts["fit"]}
    assert set(fit.values()) == {0, 1} and len(parts["fit"]) % 2 == 0
    assert all(r.label == 0 for r in parts["calibrate"])
    everything = {r.text: r.label for part in parts.values() for r in part}
    if concept == "caps":
        assert "12 + 30 = 42" not in everything, "capitals don't change it"
        assert everything.get("T 3", 1) == 1 and everything.get("t 3", 0) == 0
        assert {t.lower() for t, label in fit.items() if label} == {t for t, label in fit.items() if not label}
    else:
        assert all("<" in t for t, label in everything.items() if label)
    assert changed.lower().strip("<p/>") in {t.lower().strip("<p/>") for t in everything}


@pytest.mark.parametrize("name", sorted(p.name for p in (PAIRS.parent / "recipes").glob("*.yaml")))
def test_the_shipped_recipes_are_sound(name):
    got = read_recipe(PAIRS.parent / "recipes" / name)
    assert {str(s.file) for s in got.sources}.isdisjoint(map(str, got.evaluate))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "recipe.yaml"),
        ("- a", "recipe.yaml"),
        ("sources: [", "is not YAML"),
        ("sources: []", "sources"),
        ("layer: 3", "sources"),
        ("{sources: [{file: a}], laier: 3}", "laier"),
        ("{sources: [{file: a, wieght: 3}]}", "sources.0.wieght"),
        ("{sources: [{file: a, label: 2}]}", "sources.0.label"),
        ("{sources: [{file: a, weight: 0}]}", "sources.0.weight"),
        ("{sources: [{file: a, calibrate: 1}]}", "sources.0.calibrate"),
        ("{sources: [{file: a, calibrate: 0.6, test: 0.6}]}", "sources.0"),
        ("{sources: [{file: a}], solver: magic}", "solver"),
        ("{sources: [{file: a}], c: 0}", "c: "),
        ("{sources: [{file: a}], prompt: {kind: median}}", "prompt"),
        ("{sources: [{file: a}], prompt: {kind: ema, aplha: 0.5}}", "prompt"),
        ("{sources: [{file: a}], answer_tokens: 1}", "answer_tokens"),
        (b"sources: caf\xe9", "recipe.yaml"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_a_bad_recipe_names_the_key(recipe, text, named):
    with pytest.raises(ConfigInvalid, match=named):
        recipe(text)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigInvalid, match=r"none\.yaml' can't be read"):
        read_recipe(tmp_path / "none.yaml")


def labelled(n, name="t"):
    return [{"text": f"{name} {i}", "label": i % 2, "source": f"s{i % 3}"} for i in range(n)]


def test_gather_shares_out_every_row_once(jsonl, tmp_path):
    jsonl(*labelled(600), name="a.jsonl")
    parts, files = gather(Recipe(sources=(Source(file="a.jsonl", calibrate=0.3, test=0.2),)), tmp_path)
    texts = [r.text for part in parts.values() for r in part]
    assert sorted(texts) == sorted(r["text"] for r in labelled(600))
    assert {part: len(of_part) for part, of_part in parts.items()} == {"fit": 300, "calibrate": 90, "test": 210}
    assert {r.label for r in parts["calibrate"]} == {0}  # harmful rows of that share are tested on
    assert [f.file for f in files] == ["a.jsonl"]


@pytest.mark.parametrize("again", ["t 1", "T  1"])
def test_gather_takes_no_text_twice(jsonl, tmp_path, again):
    """Also across files: a copy of a row that is fitted on must not be tested on."""
    jsonl(*labelled(20), name="a.jsonl")
    jsonl({"text": again, "label": 1}, *labelled(10, "u"), name="b.jsonl")
    parts, _ = gather(Recipe(sources=(Source(file="a.jsonl"), Source(file="b.jsonl"))), tmp_path)
    texts = Counter(" ".join(r.text.lower().split()) for part in parts.values() for r in part)
    assert texts["t 1"] == 1
    assert texts.total() == 30


def test_gather_never_parts_a_pair_that_two_sources_of_one_file_share(jsonl, tmp_path):
    pairs = [{"text": f"{label} {i}", "label": label, "group": f"g{i}"} for i in range(60) for label in (0, 1)]
    jsonl(*pairs, name="a.jsonl")
    sources = (Source(file="a.jsonl", label=1, calibrate=0, test=0.1), Source(file="a.jsonl", label=0, test=0.4))
    parts, _ = gather(Recipe(sources=sources), tmp_path)
    assert {r.group for r in parts["fit"]}.isdisjoint(r.group for r in parts["test"] + parts["calibrate"])


def test_gather_drops_limits_and_weighs(jsonl, tmp_path):
    jsonl(*labelled(60), name="a.jsonl")
    source = Source(file="a.jsonl", limit=30, weight=3.0, by_source=True, calibrate=0, test=0)
    dropped = tuple(text_hash(f"t {i}") for i in range(40))
    parts, _ = gather(Recipe(sources=(source,), drop=dropped), tmp_path)
    assert sorted(r.text for r in parts["fit"]) == sorted(f"t {i}" for i in range(40, 60))
    assert {(r.key, r.weight) for r in parts["fit"]} == {(f"s{i}", 3.0) for i in range(3)}
    parts, _ = gather(Recipe(sources=(source,), balance=True), tmp_path)
    sums = Counter()
    for row in parts["fit"]:
        sums[row.key, row.label] += row.weight
    assert list(sums.values()) == pytest.approx([3.0] * len(sums))
    assert len(parts["fit"]) == 30


def test_the_data_sheet_says_what_each_file_was_used_for(jsonl, tmp_path):
    jsonl(*labelled(60), name="a.jsonl")
    jsonl(*labelled(80), name="b.jsonl")  # whose first 60 texts are those of the other
    sources = (
        Source(file="a.jsonl", license="MIT", calibrate=0.2, test=0.2),
        Source(file="b.jsonl", label=0, calibrate=0, test=0),
    )
    parts, files = gather(Recipe(sources=sources), tmp_path)
    assert [(f.file, f.license, f.rows) for f in files] == [("a.jsonl", "MIT", 60), ("b.jsonl", "", 80)]
    assert sum(files[0].used.values()) == 60 and set(files[1].used) == {"fit"} and files[1].used["fit"] < 20
    for part, rows in parts.items():
        assert sum(f.used.get(part, 0) for f in files) == len(rows)


@pytest.mark.parametrize(("label", "missing"), [(0, "harmful"), (1, "harmless")])
def test_gather_needs_both_classes(jsonl, tmp_path, label, missing):
    jsonl(*labelled(20), name="a.jsonl")
    with pytest.raises(ConfigInvalid, match=f"no {missing} rows"):
        gather(Recipe(sources=(Source(file="a.jsonl", label=label),)), tmp_path)


def test_the_default_recipe_takes_our_pairs(tmp_path):
    parts, files = gather(default_recipe([], layer=None, epochs=5, answers=0), tmp_path)
    assert sum(map(len, parts.values())) == files[0].rows
    assert files[0].file == "pairs.jsonl"
    # A pair's harmful half may be tested on while its other half calibrates; neither is then fitted on.
    assert {r.group for r in parts["fit"]}.isdisjoint(r.group for r in parts["test"] + parts["calibrate"])
