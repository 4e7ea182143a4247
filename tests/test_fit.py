"""Training without a model: fits and their folding, splits that keep groups together, exact figures, strict files."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from monitor.aggregate import Aggregation
from monitor.errors import ConfigInvalid
from monitor.probe import ProbeBank, ProbeWeights
from training import data, fit
from training.data import PAIRS, Row, read_jsonl, sample, split, text_hash, unique
from training.evaluate import auroc, auroc_interval, clopper_pearson, rate, separation
from training.recipe import Recipe, Source, default_recipe, gather, read_recipe

EPOCHS = 100


def blobs(n=200, d=8, apart=4.0, seed=0):
    """Two classes along the first feature; one constant feature, one of a massive activation, one dead."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = random.normal(size=(n, d))
    x[:, 0] += apart * y
    x[:, 1] = 7.0
    x[:, 2] = 24_874.0 + random.normal(size=n)
    x[:, 3] = 0.0
    return x, y.astype(np.int64)


def adam(x, y, weights, epochs=EPOCHS, **kwargs):
    return fit.fit_torch(x, y, weights, epochs, range(epochs), **kwargs)


def logistic(x, y, weights):
    return fit.fit_logistic(x, y, weights, c=0.1)


# --- fits -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(4, 12), st.integers(-6, 6))
def test_folding_changes_no_logit(seed, n, d, exponent):
    random = np.random.default_rng(seed)
    x, _ = blobs(n, d, seed=seed)
    x[:, 4:] *= 10.0**exponent
    scaler, weight, bias = fit.Scaler.fit(x), random.normal(size=d), float(random.normal())
    folded, folded_bias = scaler.fold(weight, bias)
    fresh = np.concatenate([x, x[::-1] * 1.01])  # rows it was not fitted on, too; constants that changed
    assert x @ folded + folded_bias == pytest.approx(scaler(x) @ weight + bias, abs=1e-4)
    assert fresh @ folded + folded_bias == pytest.approx(scaler(fresh) @ weight + bias, rel=1e-6, abs=1e-4)


def test_folded_weights_give_the_same_logits_when_served():
    x, y = blobs()
    fitted = logistic(x, y, np.ones(len(y)))
    bank = ProbeBank([ProbeWeights("p", {0: torch.from_numpy(fitted.weight).float()}, fitted.bias)], x.shape[1])
    served = bank.combine(torch.from_numpy(x).float()[None] @ bank.weight)[:, 0].numpy()
    assert served == pytest.approx(fitted.logits(x), abs=0.02)  # float32 beside an activation of 24,874


def test_constant_features_are_not_amplified():
    x, _ = blobs()
    scaler = fit.Scaler.fit(x)
    assert (scaler.scale[1], scaler.scale[3]) == (1.0, 1.0)
    x[:, 1] += np.random.default_rng(1).normal(size=len(x)) * 1e-10  # rounding, not signal
    assert fit.Scaler.fit(x).scale[1] == 1.0
    assert np.isfinite(fit.Scaler.fit(np.zeros((3, 4)))(np.zeros((3, 4)))).all()


@pytest.mark.parametrize("solve", [adam, logistic])
def test_both_fits_separate_an_easy_problem(solve):
    x, y = blobs()
    fitted = solve(x, y, np.ones(len(y)))
    new, labels = blobs(seed=1)
    logits = fitted.logits(new)
    assert auroc(logits[labels == 1], logits[labels == 0]) > 0.95
    assert np.mean((logits > 0) == (labels == 1)) > 0.9  # 0 is between the classes: > 0 leans harmful
    assert np.isfinite(fitted.weight).all()


@pytest.mark.parametrize("solve", [adam, logistic])
def test_fits_are_reproducible_and_rank_noise_at_chance(solve):
    x, y = blobs(apart=0.0)
    first, second = (solve(x, y, np.ones(len(y))) for _ in range(2))
    assert first.weight.tolist() == second.weight.tolist()
    assert (first.bias, first.details, first.method) == (second.bias, second.details, second.method)
    new, labels = blobs(400, apart=0.0, seed=1)
    logits = first.logits(new)
    assert 0.4 < auroc(logits[labels == 1], logits[labels == 0]) < 0.6


@pytest.mark.parametrize("solve", [adam, logistic])
def test_classes_and_rows_are_weighted(solve):
    x, y = blobs()
    few = np.flatnonzero(y == 1)[:10]
    keep = np.concatenate([np.flatnonzero(y == 0), few])
    rare = solve(x[keep], y[keep], np.ones(len(keep)))
    assert np.mean(rare.logits(x[y == 1]) > 0) > 0.7  # ten to one against it
    flipped, weights = np.concatenate([y, 1 - y]), np.concatenate([np.ones(len(y)), np.full(len(y), 1e-3)])
    twice = solve(np.concatenate([x, x]), flipped, weights)
    logits = twice.logits(x)
    assert auroc(logits[y == 1], logits[y == 0]) > 0.95  # the wrong labels weigh nothing


def test_balanced_row_weights():
    labels, weights = np.array([0, 0, 0, 1]), np.array([1.0, 1.0, 2.0, 5.0])
    assert fit.balanced(labels, weights).tolist() == [0.5, 0.5, 1.0, 2.0]
    assert weights.tolist() == [1.0, 1.0, 2.0, 5.0]
    for label in (0, 1):
        with pytest.raises(ValueError, match=f"no training row has label {1 - label}"):
            fit.balanced(np.full(3, label), np.ones(3))


def test_one_tick_per_epoch():
    x, y = blobs(20)
    ticks = []
    fitted = fit.fit_torch(x, y, np.ones(20), 7, (ticks.append(i) for i in range(7)))
    assert (ticks, fitted.details["epochs"]) == (list(range(7)), 7)


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path):
    def write(*items, name="rows.jsonl"):
        lines = [i if isinstance(i, bytes) else json.dumps(i).encode() for i in items]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


def rows(n, label=0, source="s", prefix="t", per_group=1):
    return [Row(f"{prefix}{i}", label, source, f"{prefix}g{i // per_group}") for i in range(n)]


def test_rows_are_read_and_the_file_is_described(jsonl):
    path = jsonl({"text": "a", "label": 1}, b"", {"text": "b", "label": 0, "source": "x", "group": "g"}, b"  ")
    got, described = read_jsonl(path)
    assert got == [Row("a", 1, "rows", text_hash("a")), Row("b", 0, "x", "rows:g")]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (described.file, described.sha256, described.rows, described.positive) == ("rows.jsonl", digest, 2, 1)


@pytest.mark.parametrize("group", [0, "0", 7])
def test_any_group_keeps_its_rows_together(jsonl, group):
    got, _ = read_jsonl(jsonl(*({"text": t, "label": 0, "group": group} for t in "ab")))
    assert got[0].group == got[1].group


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"text": "a", "label": 1', "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, ""),
        (b"[]", "`text` must be a non-empty string"),
        (b"null", "`text`"),
        (b'"text"', "`text`"),
        (b'{"label": 1}', "`text`"),
        (b'{"text": 5, "label": 1}', "`text`"),
        (b'{"text": " \\n", "label": 1}', "`text`"),
        (json.dumps({"text": "x" * data.MAX_ROW_BYTES, "label": 1}).encode(), "1 MiB"),
        (b'{"text": "a"}', "`label` is None"),
        (b'{"text": "a", "label": 2}', "`label` is 2"),
        (b'{"text": "a", "label": "1"}', "`label` is '1'"),
        (b'{"text": "a", "label": [1]}', "`label`"),
        (b'{"text": "\\ud800", "label": 1}', ""),
    ],
    ids=lambda v: str(v[:30]),
)
def test_a_bad_line_names_file_and_line(jsonl, line, message):
    path = jsonl({"text": "fine", "label": 0}, line)
    with pytest.raises(ConfigInvalid, match=rf"rows\.jsonl, line 2: .*{message}"):
        read_jsonl(path)


def test_a_missing_and_an_empty_file_are_named(jsonl, tmp_path):
    with pytest.raises(ConfigInvalid, match=r"none\.jsonl' can't be read"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ConfigInvalid, match=r"rows\.jsonl' is empty"):
        read_jsonl(jsonl(b"", b" "))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(0, 1), st.sampled_from("xyz")), min_size=1, max_size=60),
    st.integers(0, 99),
)
def test_splits_keep_groups_together_and_lose_nothing(drawn, seed):
    all_rows = [Row(f"t{i}", label, source, f"g{group}") for i, (group, label, source) in enumerate(drawn)]
    shares = {"test": 0.2, "calibrate": 0.3, "fit": 0.5}
    parts = split(all_rows, shares, seed)
    assert sorted(r.text for part in parts.values() for r in part) == sorted(r.text for r in all_rows)
    homes = [{r.group for r in part} for part in parts.values()]
    assert sum(map(len, homes)) == len(set().union(*homes))
    assert split(all_rows, shares, seed) == parts
    assert {p: sorted(r.text for r in part) for p, part in split(all_rows[::-1], shares, seed).items()} == {
        p: sorted(r.text for r in part) for p, part in parts.items()
    }


def test_splits_are_stratified_and_another_seed_is_another_split():
    all_rows = rows(200, 0, "a", "p") + rows(100, 1, "a", "q") + rows(100, 0, "b", "r")
    shares = {"test": 0.1, "calibrate": 0.3, "fit": 0.6}
    parts = split(all_rows, shares, 0)
    counts = {part: Counter((r.source, r.label) for r in of_part) for part, of_part in parts.items()}
    for part, share in shares.items():
        for key, total in {("a", 0): 200, ("a", 1): 100, ("b", 0): 100}.items():
            assert counts[part][key] == pytest.approx(share * total, abs=1)
    assert split(all_rows, shares, 1) != parts


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 50), st.integers(0, 9))
def test_samples_are_whole_groups_within_the_limit(n, per_group, limit, seed):
    all_rows = rows(n, per_group=per_group)
    taken = sample(all_rows, limit, seed)
    assert len(taken) <= limit
    assert len(taken) > min(n, limit) - per_group
    assert taken == sample(all_rows, limit, seed)
    whole = Counter(r.group for r in all_rows)
    assert all(count == whole[group] for group, count in Counter(r.group for r in taken).items())
    assert sample(all_rows, None, seed) == all_rows


def test_unique_ignores_case_and_space():
    first = Row("How  are\nYOU", 0, "s", "g1")
    assert unique([first, Row("how are you ", 1, "s", "g2"), *rows(1)]) == [first, *rows(1)]


def test_two_answers_to_one_question_are_two_rows():
    asked, one, other = (Row("Why?", 0, "s", "g", answer=a) for a in ("", "Because.", "So."))
    assert unique([asked, one, Row("why?", 1, "s", "g", answer=" because. "), other]) == [asked, one, other]


def test_balanced_keys():
    three, one = rows(3), [Row("b", 1, "s", "g", 2.0, "k")]
    assert [r.weight for r in data.balanced(three + one)] == [1 / 3] * 3 + [2.0]


def test_our_pairs():
    got, described = read_jsonl(PAIRS)
    groups = {}
    for row in got:
        groups.setdefault(row.group, []).append(row.label)
    assert {tuple(sorted(labels)) for labels in groups.values()} == {(0, 1)}
    assert len(groups) >= 300
    assert len(unique(got)) == len(got) == described.rows
    assert all(row.text == row.text.strip() and len(row.text) > 10 for row in got)


# --- recipes --------------------------------------------------------------------------------------------------------


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


# --- figures --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    st.lists(st.integers(-3, 3), min_size=1, max_size=30),
)
def test_auroc_equals_sklearn_ties_included(positive, negative):
    got = auroc(np.array(positive, dtype=float), np.array(negative, dtype=float))
    labels = [1] * len(positive) + [0] * len(negative)
    assert got == pytest.approx(roc_auc_score(labels, positive + negative))


def test_auroc_interval_holds_the_value_and_is_reproducible():
    random = np.random.default_rng(0)
    positive, negative = random.normal(1, 1, 60), random.normal(0, 1, 80)
    value, low, high = auroc_interval(positive, negative, rounds=200)
    assert low < value < high
    assert high - low < 0.25
    assert auroc_interval(positive, negative, rounds=200) == (value, low, high)
    assert auroc_interval(positive, negative, rounds=200, seed=1) != (value, low, high)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.3085), (10, 10, 0.6915, 1.0), (5, 10, 0.1871, 0.8129), (1, 100, 0.0003, 0.0545)],
)
def test_clopper_pearson_known_values(hits, n, low, high):
    assert clopper_pearson(hits, n) == pytest.approx((low, high), abs=5e-5)
    exact = stats.binomtest(hits, n).proportion_ci(method="exact")
    assert clopper_pearson(hits, n) == pytest.approx((exact.low, exact.high))


def test_rate_counts_strictly_above_and_leaves_out_what_is_missing():
    got = rate([1.0, 2.0, 3.0, math.nan, math.inf], 2.0)
    assert (got["n"], got["hits"], got["rate"]) == (3, 1, 0.3333)
    assert got["low"] < got["rate"] < got["high"]


def test_separation():
    got = separation([3.0, 4.0, 5.0], [0.0, 1.0])
    assert (got["n_harmful"], got["n_harmless"], got["auroc"], got["low"], got["high"]) == (3, 2, 1.0, 1.0, 1.0)


def test_platt_finds_the_slope_that_made_the_labels():
    random = np.random.default_rng(0)
    values = random.normal(0, 3, 20_000)
    labels = (random.random(20_000) < 1 / (1 + np.exp(-(0.8 * values - 0.5)))).astype(np.int64)
    slope, intercept = fit.fit_platt(values, labels)
    assert (slope, intercept) == (pytest.approx(0.8, abs=0.05), pytest.approx(-0.5, abs=0.05))


def test_platt_stays_finite_on_rows_that_a_line_separates():
    slope, intercept = fit.fit_platt(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert 0 < slope < 10 and abs(intercept) < 1
