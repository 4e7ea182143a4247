"""`midstream gate` on the tiny model and a store: what passes, what is stale or worse, and what is refused."""

import json
import random
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from monitor.cli.gate import gate
from monitor.errors import ConfigInvalid, ProbeMismatch
from monitor.probe import ProbeWeights
from probes_store.store import Store
from training.checks import EXIT_CODE
from training.data import read_jsonl
from training.recipe import Recipe

from .conftest import calibrated, make_card

WORDS = ["sea", "oak", "tea", "sun", "ink", "fig", "elm", "owl"]


def write_rows(path, n, seed, harmful=0.3, starred=0.05):
    """Harmful rows hold the star that the probe looks for, and so do a few harmless ones; no word tells them apart."""
    chance, lines = random.Random(seed), []
    for i in range(n):
        label = int(i < harmful * n)
        words = [*chance.choices(WORDS, k=6), f"no{chance.randrange(10**9)}"]
        if label or (i - harmful * n) % round(1 / starred) == 0:
            words.insert(3, "*")
        lines.append(json.dumps({"text": " ".join(words), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def shelf(quiet, star_probe, tiny_folder, tmp_path_factory):
    """A store: v1 and v2 find the star, v3 its absence, v4 was made on another model; v1 is live."""
    folder = tmp_path_factory.mktemp("gate")
    _, described = read_jsonl(write_rows(folder / "train.jsonl", 300, seed=1))
    recipe = Recipe(sources=({"file": "train.jsonl", "calibrate": 0.2, "test": 0.2},))
    probe, threshold = star_probe
    negative = ProbeWeights("star", {k: -w for k, w in probe.weight.items()}, -probe.bias)
    same = {"calibration": calibrated(threshold), "data": (described,)}
    same["fit"] = {"recipe": recipe.model_dump(mode="json")}
    store = Store(folder / "store", shipped=folder / "none")
    for weights in (probe, probe, negative):
        store.publish(make_card(quiet, weights, **same), weights.weight, weights.bias)
    card = make_card(quiet, probe, **same)
    elsewhere = card.model.model_copy(update={"fingerprint": "another model"})
    store.publish(card.model_copy(update={"model": elsewhere}), probe.weight, probe.bias)
    (folder / "store" / "live.json").write_text('{"tiny-llama/star": "v1"}')
    write_rows(folder / "frozen.jsonl", 500, seed=2)
    return folder


@pytest.fixture
def run(shelf, tiny_folder):
    """`midstream gate ...` with the tiny model and this store."""
    app = typer.Typer()
    app.command()(gate)

    def invoke(candidate, *arguments, data=("frozen.jsonl",), rows=True, target="0.05"):
        given = [a for name in data for a in ("--data", str(shelf / name))] + (["--rows", str(shelf)] if rows else [])
        settings = ["--model", str(tiny_folder), "--store", str(shelf / "store"), "--target-fpr", target]
        return CliRunner(env={"COLUMNS": "140"}).invoke(app, [candidate, *given, *settings, *arguments])

    return invoke


def refused(result):
    assert isinstance(result.exception, (ConfigInvalid, ProbeMismatch)), result.output
    return str(result.exception)


def test_a_probe_as_good_as_the_live_one_passes(run, shelf):
    result = run("star@v2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["verdict"], found["candidate"], found["against"]) == ("PASS", "star@v2", "star@v1")
    checks = {c["name"]: c for c in found["checks"]}
    assert checks["AUROC - live's"]["figure"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 500}
    assert checks["AUROC - text floor's"]["figure"]["low"] > 0.2
    assert 0.05 <= checks["false-positive rate"]["figure"]["value"] < 0.08  # the starred ones, and a few
    assert found["sets"]["frozen"]["recall"]["value"] == 1.0 and found["data"][0]["rows"] == 500
    assert found["noise"] < 1e-3 and found["canaries"] < 1e-3


def test_the_table_says_the_same(run):
    result = run("star@v2")
    assert result.exit_code == 0 and result.stdout.rstrip().endswith("PASS")
    assert "star@v2 against star@v1" in result.stdout and "2.50% to 10.00%" in result.stdout


def test_a_probe_that_points_the_other_way_is_degraded(run):
    result = run("star@v3", "--json")
    assert result.exit_code == 11 and json.loads(result.stdout)["verdict"] == "DEGRADED"


def test_the_live_probe_is_compared_with_the_floor_alone(run):
    found = json.loads(run("star@v1", "--json").stdout)
    assert found["against"] is None and [c["name"] for c in found["checks"]][1:] == ["AUROC - text floor's"]


def test_traffic_that_is_unlike_the_calibration_is_stale(run, shelf):
    write_rows(shelf / "lookalikes.jsonl", 400, seed=3, starred=0.5)
    result = run("star@v2", data=("lookalikes.jsonl",))
    assert result.exit_code == 10 and "THRESHOLD STALE" in result.stdout


def test_too_few_rows_are_inconclusive_and_it_says_how_many_more(run, shelf):
    write_rows(shelf / "few.jsonl", 60, seed=4)
    result = run("star@v2", data=("few.jsonl",))
    assert result.exit_code == 12 and "more benign rows needed" in result.stdout


def test_without_the_training_rows_there_is_no_pass(run):
    result = run("star@v2", rows=False)
    assert result.exit_code == 12 and "trained on are needed" in result.stdout


def test_another_model_or_dtype_is_refused(run):
    assert "made with model 'another model'" in refused(run("star@v4"))
    assert "made with model" in refused(run("star@v2", "--against", "star@v4"))
    assert "dtype 'float32', here it is 'bfloat16'" in refused(run("star@v2", "--dtype", "bfloat16"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template_hash": "0" * 64}, "chat template"),
        ({"position_rule": "all/1"}, "position rule 'all/1'"),
        ({"canaries": ({"text": "a canary", "scores": (0.0,) * 9},)}, "a canary is off by"),
    ],
)
def test_what_does_not_fit_is_refused(run, shelf, star_probe, quiet, change, message):
    probe, threshold = star_probe
    other = ProbeWeights("odd", probe.weight, probe.bias)
    card = make_card(quiet, other, calibration=calibrated(threshold))
    changed = type(card).model_validate(card.model_dump() | change)
    folder = Store(shelf / "store").publish(changed, probe.weight, probe.bias)
    assert message in refused(run(f"odd@{folder.name}", rows=False))


def test_rows_that_the_candidate_has_seen_are_refused(run):
    assert "fitted or calibrated on" in refused(run("star@v2", data=("frozen.jsonl", "train.jsonl")))


def publish(shelf, quiet, star_probe, name, **changes):
    """A probe of this name that finds the star."""
    probe, threshold = star_probe
    named = ProbeWeights(name, probe.weight, probe.bias)
    card = make_card(quiet, named, calibration=calibrated(threshold), **changes)
    Store(shelf / "store", shipped=shelf / "none").publish(card, named.weight, named.bias)


def test_a_file_that_a_retrained_candidate_was_fitted_on_is_refused(run, shelf, quiet, star_probe):
    """Its rows are in no part of the recipe, which is all that --rows can read."""
    _, own = read_jsonl(shelf / "train.jsonl")
    _, later = read_jsonl(write_rows(shelf / "later.jsonl", 500, seed=11))
    recipe = Recipe(sources=({"file": "train.jsonl", "calibrate": 0.2, "test": 0.2},))
    publish(shelf, quiet, star_probe, "again", data=(own, later), fit={"recipe": recipe.model_dump(mode="json")})
    assert "again@v1 was fitted on later.jsonl" in refused(run("again", data=("later.jsonl",)))
    (shelf / "renamed.jsonl").write_bytes((shelf / "later.jsonl").read_bytes())
    assert "was fitted on renamed.jsonl" in refused(run("again", data=("frozen.jsonl", "renamed.jsonl"), rows=False))
    assert run("again").exit_code == 0


def test_rows_of_a_recipes_file_that_were_held_back_may_be_judged_on(run, shelf, quiet, star_probe):
    _, own = read_jsonl(shelf / "train.jsonl")
    _, held = read_jsonl(write_rows(shelf / "held.jsonl", 500, seed=12))
    sources = ({"file": "train.jsonl"}, {"file": "held.jsonl", "test": 0.9999, "calibrate": 0})
    recipe = Recipe(sources=sources).model_dump(mode="json")
    publish(shelf, quiet, star_probe, "held", data=(own, held), fit={"recipe": recipe})
    assert run("held", data=("held.jsonl",)).exit_code in EXIT_CODE.values()


def test_a_concept_is_judged_on_both_rows_of_a_pair_of_capitals(run, shelf, quiet, star_probe):
    publish(shelf, quiet, star_probe, "caps", kind="concept")
    pairs = [{"text": t, "label": y} for i in range(60) for t, y in ((f"Row {i}", 0), (f"ROW {i}", 1))]
    (shelf / "capitals.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    found = json.loads(run("caps", "--json", data=("capitals.jsonl",), rows=False).stdout)["sets"]["capitals"]
    assert (found["harmful"], found["harmless"]) == (60, 60)


def test_rows_about_an_answer_are_not_judged_as_prompts(run, shelf, capfd):
    lines = (shelf / "frozen.jsonl").read_text().splitlines()
    answers = [json.dumps({"text": f"harmless {i}", "response": "a bad *", "label": 1}) for i in range(40)]
    (shelf / "mixed.jsonl").write_text("\n".join([*lines, *answers]) + "\n")
    result = run("star@v2", "--json", data=("mixed.jsonl",))
    found = json.loads(result.stdout)
    assert found["sets"]["mixed"]["harmful"] == 150 and found["sets"]["mixed"]["recall"]["value"] == 1.0
    assert "40 rows label a `response`" in " ".join(result.stderr.split())
    (shelf / "answers.jsonl").write_text("\n".join(answers))
    assert "every row labels a `response`" in refused(run("star@v2", data=("frozen.jsonl", "answers.jsonl")))


def test_another_training_file_under_the_same_name_is_refused(run, shelf, tmp_path):
    write_rows(tmp_path / "train.jsonl", 300, seed=9)
    assert "is not the file" in refused(run("star@v2", "--rows", str(tmp_path), rows=False))


@pytest.mark.parametrize(
    ("candidate", "options", "message"),
    [
        ("moon", {}, "there is no probe 'moon'"),
        ("star@v9", {}, "there is no probe"),
        ("star@v2", {"target": "0.001"}, "2395 more are needed"),
        ("star@v2", {"data": ("harmless.jsonl",)}, "no harmful rows"),
    ],
)
def test_what_can_be_mended_is_said_in_a_line(run, shelf, candidate, options, message):
    write_rows(shelf / "harmless.jsonl", 50, seed=5, harmful=0)
    said = refused(run(candidate, **options))
    assert message in said and "\n" not in said


def test_help_waits_for_no_model():
    code = "import sys, monitor.cli.gate; print({'torch', 'sklearn', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
