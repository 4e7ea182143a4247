"""Selection by data sets left out: no row is judged by a fit that saw its data set; the command, end to end."""

import json
import random

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from typer.testing import CliRunner

from monitor.cli import app
from training.families import PENALTIES
from training.fit import balanced, fit_logistic
from training.left_out import Ranked, best, folds, left_out, ranked, told
from training.metrics import Unsupported
from training.recipe import Recipe
from training.select import Candidate, fits, select
from training.solve import Rows, candidates, choose_penalty, left_out_closed, refitted

D, PER_SET = 6, 60
KEYS = ["harm a", "harm b", "mild a", "mild b", "both"]


@pytest.fixture(scope="module")
def rows():
    """Five data sets, each with a place of its own; the label moves feature 0 alone."""
    random = np.random.default_rng(0)
    keys = np.repeat(KEYS, PER_SET)
    labels = np.array([1 if k.startswith("harm") else 0 if k.startswith("mild") else i % 2 for i, k in enumerate(keys)])
    place = {k: np.append(0.0, random.normal(size=D - 1)) for k in KEYS}
    x = random.normal(size=(len(keys), D)) + np.stack([place[k] for k in keys])
    x[:, 0] += 2.5 * labels
    weights = np.where(keys == "harm a", 0.5, 1.0) * np.where(labels == 1, 2.0, 1.0)
    return Rows(x, labels, weights, keys.tolist())


# --- leaving out ------------------------------------------------------------------------------------------------------


def test_every_data_set_is_left_out_once_and_whole(rows):
    seen = []

    def fit(out):
        seen.append(out)
        assert len({rows.keys[i] for i in np.flatnonzero(out)}) == 1
        return np.ones((out.sum(), 1))

    values = left_out(rows.keys, rows.labels, fit)
    assert np.stack(seen).sum(0).tolist() == [1] * len(rows.keys) and (values == 1).all()


def test_a_data_set_without_which_a_label_is_missing_has_no_values(rows):
    keys = ["harm" if label else key for key, label in zip(rows.keys, rows.labels, strict=True)]
    assert [k for k, _ in folds(keys, rows.labels)] == ["both", "mild a", "mild b"]
    values = left_out(keys, rows.labels, lambda out: np.zeros((out.sum(), 2)))
    assert np.isnan(values[rows.labels == 1]).all() and np.isfinite(values[rows.labels == 0]).all()
    with pytest.raises(Unsupported, match="two of a label"):
        left_out(["a"] * 4, np.array([0, 1, 0, 1]), lambda out: np.zeros((out.sum(), 1)))


@pytest.mark.parametrize("penalty", [0, 25, 49])
def test_ridge_is_exactly_a_fit_without_the_rows_at_every_penalty(rows, penalty):
    values = left_out_closed("ridge", rows)
    assert values.shape == (len(rows.keys), len(PENALTIES))
    for _, out in folds(rows.keys, rows.labels):
        x, y, share = rows.x[~out], rows.labels[~out], balanced(rows.labels[~out], rows.weights[~out])
        share = share / share.sum()
        mean = share @ x
        deviation = np.sqrt(share @ (x - mean) ** 2)
        scale = np.sqrt(deviation**2 + (0.01 * np.median(deviation)) ** 2)
        model = Ridge(alpha=PENALTIES[penalty], solver="cholesky")
        model.fit((x - mean) / scale, 2.0 * y - 1, sample_weight=share)
        assert values[out, penalty] == pytest.approx(model.predict((rows.x[out] - mean) / scale), abs=1e-9)


@pytest.mark.parametrize("solver", ["lda", "difference_of_means"])
def test_changed_labels_of_a_data_set_change_no_value_of_its_own_rows(rows, solver):
    """What it is judged by has not seen it."""
    spoilt = rows.labels.copy()
    mine = np.array([k == "both" for k in rows.keys])
    spoilt[mine] = 1 - spoilt[mine]
    other = Rows(rows.x, spoilt, rows.weights, rows.keys)
    one, two = left_out_closed(solver, rows), left_out_closed(solver, other)
    assert one[mine] == pytest.approx(two[mine], abs=1e-9)
    assert np.abs(one[~mine] - two[~mine]).max() > 1e-3


@pytest.mark.parametrize("solver", ["logistic", "adam", "lda", "difference_of_means", "ridge"])
def test_the_chosen_fit_again_without_each_data_set(rows, solver):
    recipe = Recipe(sources=({"file": "x"},), solver=solver, epochs=200, c=0.1, penalty=0.5)
    (fitted,) = candidates(recipe, rows)
    values = refitted(
        recipe.model_copy(update={"solver": "best"} if solver in ("logistic", "adam") else {}), fitted, rows
    )
    for _, out in folds(rows.keys, rows.labels):
        kept = [k for k, gone in zip(rows.keys, out, strict=True) if not gone]
        (again,) = candidates(recipe, Rows(rows.x[~out], rows.labels[~out], rows.weights[~out], kept))
        assert values[out, 0] == pytest.approx(again.logits(rows.x[out]), abs=1e-9)
    if solver in ("lda", "difference_of_means"):
        assert values == pytest.approx(left_out_closed(solver, rows), abs=1e-8), "by sums, or by the rows"
    found = told(values[:, 0], rows.labels, rows.keys, [str(i) for i in range(len(rows.keys))])
    assert found["pooled"]["auroc"] > 0.8 and found["data_sets"] == len(KEYS)


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_recall_is_a_mean_over_data_sets_at_one_value():
    values = np.concatenate([np.arange(200) / 200, [5.0] * 90, [-1.0] * 10, [0.5] * 10])
    labels = np.array([0] * 200 + [1] * 110)
    keys = ["mild"] * 200 + ["large"] * 100 + ["small"] * 10
    found = ranked(values, labels, keys)
    assert found.recalls == {"large": 0.9, "small": 0.0} and found.recall == pytest.approx(0.45)
    assert found.worst == "small" and found.log_auroc is None
    assert found.rates == {"mild": 0.01}, "2 of 200 lie above it"
    with pytest.raises(Unsupported, match="100 in all"):
        ranked(values[150:], labels[150:], keys[150:])


def test_rows_without_a_value_count_nowhere():
    values = np.concatenate([np.arange(200.0), [1e9, np.nan]])
    found = ranked(values, np.array([0] * 200 + [1, 1]), ["a"] * 200 + ["b", "c"])
    assert found.recalls == {"b": 1.0}


def test_log_auroc_decides_within_a_point_of_recall_and_nowhere_else():
    def one(recall, log_auroc, auroc=0.9):
        return Ranked(recall, "x", auroc, log_auroc, 0.0)

    assert best([one(0.80, 0.3), one(0.795, 0.4), one(0.70, 0.9)]) == 1
    assert best([one(0.80, None, 0.91), one(0.80, None, 0.92)]) == 1
    assert best([one(0.80, 0.3), one(0.80, 0.3)]) == 0


def test_the_penalty_is_the_one_that_holds_for_other_data_sets(rows):
    index, figures = choose_penalty(rows)
    values = left_out_closed("ridge", rows)
    assert figures == ranked(values[:, index], rows.labels, rows.keys)
    assert figures.recall >= ranked(values[:, -1], rows.labels, rows.keys).recall - 0.01


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_block_with_the_signal_is_chosen_and_its_values_are_those_of_fits_without_the_data_set(rows):
    random, n = np.random.default_rng(1), len(rows.keys)
    features = np.stack([random.normal(size=(n, D)), rows.x, random.normal(size=(n, D))], axis=1).astype(np.float32)
    sets = [(3,), (4,), (7,), (3, 4)]
    done = []
    groups = [str(i) for i in range(n)]
    solvers = ["logistic", "ridge", "lda", "difference_of_means"]
    found = select(features, [3, 4, 7], rows, groups, sets, solvers, [0.1, 1.0], done.append)
    assert len(found.found) == 4 * 2 + 3 * 4 and sum(done) == fits(sets, solvers, [0.1, 1.0])
    assert 4 in found.found[0][0].blocks and 4 not in found.found[-1][0].blocks
    assert found.auroc["low"] < found.auroc["value"] < found.auroc["high"] and found.data_sets == tuple(sorted(KEYS))
    of = next(r for c, r in found.found if c == Candidate((4,), "logistic", 1.0))
    values = np.zeros(n)
    for _, out in folds(rows.keys, rows.labels):
        values[out] = fit_logistic(rows.x[~out], rows.labels[~out], rows.weights[~out], 1.0).logits(rows.x[out])
    assert of.auroc == pytest.approx(ranked(values, rows.labels, rows.keys).auroc, abs=2e-3)


def test_a_candidate_says_what_to_write_into_the_recipe():
    assert Candidate((4,), "logistic", 0.1).recipe() == {"layers": [4], "solver": "logistic", "c": 0.1}
    assert Candidate((4, 5), "ridge", 0.3).recipe() == {"layers": [4, 5], "solver": "ridge", "penalty": 0.3}
    assert Candidate((4,), "lda", None).recipe() == {"layers": [4], "solver": "lda"}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    chance, rows = random.Random(0), []
    for i in range(600):
        words = " ".join(chance.choices(["sea", "oak", "tea", "sun", "ink"], k=chance.randint(1, 4)))
        rows.append({"text": f"{words} {'###' if i % 2 else '...'} {i}", "label": i % 2, "source": f"s{i % 4}"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text(
        "sources: [{file: rows.jsonl, by_source: true, calibrate: 0.1, test: 0.2}]\nevaluate: [nowhere.jsonl]\n"
    )
    return tmp_path


def run(folder, tiny_folder, *options):
    recipe, data = str(folder / "recipe.yaml"), str(folder)
    return CliRunner().invoke(
        app, ["select", "--recipe", recipe, "--data", data, "--model", str(tiny_folder), *options]
    )


def test_the_command_ranks_and_says_what_to_write(folder, tiny_folder):
    out = folder / "select.json"
    result = run(folder, tiny_folder, "--blocks", "1-2", "--beside", "0-2", "--c", "0.1", "--out", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["left_out"] == ["s0", "s1", "s2", "s3"] and report["never_left_out"] == []
    assert len(report["tried"]) == 6 and report["rows"] == 420
    first = report["tried"][0]
    assert first["auroc"] > 0.9 and set(first["recalls"]) == {"s1", "s3"} and set(first["rates"]) == {"s0", "s2"}
    assert "put into the recipe: layers: " in result.output


def test_mean_and_last_token_lie_side_by_side_where_the_recipe_fits_both(folder, tiny_folder):
    """The word that tells is the last but one: the last token adds to the mean."""
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe + "prompt: {kind: mean_last}\nresponse: {kind: mean_last}\n")
    both = json.loads(run(folder, tiny_folder, "--blocks", "1", "--solver", "lda", "--json").stdout)
    (folder / "recipe.yaml").write_text(recipe)
    mean = json.loads(run(folder, tiny_folder, "--blocks", "1", "--solver", "lda", "--json").stdout)
    assert both["tried"][0]["threshold"] != mean["tried"][0]["threshold"] and both["tried"][0]["auroc"] > 0.9
    (folder / "recipe.yaml").write_text(recipe + "head: {pooling: attention}\n")
    result = run(folder, tiny_folder, "--blocks", "1")
    assert result.exit_code != 0 and "a head is no direction" in (result.output + str(result.exception))


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--blocks", "99"), "the model has blocks"), (("--solver", "svm"), "svm"), (("--blocks", "x"), "numbers and")],
)
def test_mistakes_are_named(folder, tiny_folder, options, said):
    result = run(folder, tiny_folder, *options)
    assert result.exit_code != 0 and said in (result.output + str(result.exception))


def test_one_data_set_of_a_label_is_too_few(folder, tiny_folder):
    (folder / "recipe.yaml").write_text("sources: [{file: rows.jsonl}]\n")
    result = run(folder, tiny_folder, "--blocks", "1")
    assert result.exit_code != 0 and "two of a label" in (result.output + str(result.exception))
