"""The release gate: each verdict by value, without a model; then the command on the tiny model and a store."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from monitor.cli.gate import gate
from monitor.errors import ConfigInvalid, ProbeMismatch
from monitor.probe import ProbeWeights
from probes_store.calibration import clopper_pearson
from probes_store.store import Store
from training.checks import EXIT_CODE, Evidence, Verdict
from training.data import read_jsonl
from training.gate import benign_rows_needed, decide
from training.recipe import Recipe

from .conftest import calibrated, make_card

TARGET = 0.05
THRESHOLD = 3.0


def evidence(hits=30, harmless=600, harmful=300, **changes):
    """Harmful values around 3.5, harmless ones below 2.5 but for `hits` of them; the floor knows nothing."""
    chance = np.random.default_rng(0)
    low = np.minimum(chance.normal(0, 1, harmless), 2.5)
    low[:hits] = 4 + chance.random(hits)
    values = np.concatenate([chance.normal(3.5, 1, harmful), low])
    labels = np.repeat([1, 0], [harmful, harmless])
    fields = {
        "labels": labels,
        "groups": [str(i) for i in range(len(labels))],
        "candidate": values,
        "threshold": THRESHOLD,
        "target_fpr": TARGET,
        "floor": chance.normal(0, 1, len(labels)),
    }
    return Evidence(**(fields | changes))


def check(decision, name):
    return next(c for c in decision.checks if name in c.name)


def beside(e, noise, seed=1):
    """Another judge of the same rows: as good, and then `noise` worse."""
    return e.candidate + np.random.default_rng(seed).normal(0, noise, len(e.candidate))


def test_exit_codes():
    assert {str(v): code for v, code in EXIT_CODE.items()} == {
        "PASS": 0,
        "THRESHOLD STALE": 10,
        "DEGRADED": 11,
        "INCONCLUSIVE": 12,
    }


def test_pass_without_a_live_probe_and_with_one():
    e = evidence(harmful=900)
    assert decide(e).verdict is Verdict.PASS
    decision = decide(replace(e, live=beside(e, 0.1), live_threshold=THRESHOLD))
    assert (decision.verdict, decision.exit_code, len(decision.checks)) == (Verdict.PASS, 0, 4)
    rate = check(decision, "false-positive").figure
    assert (rate.value, rate.n) == (0.05, 600) and 0.025 <= rate.low < rate.high <= 0.1


@pytest.mark.parametrize(("hits", "wanted"), [(90, "certified for"), (2, "higher than it needs")])
def test_stale_thresholds(hits, wanted):
    decision = decide(evidence(hits))
    assert (decision.verdict, decision.exit_code) == (Verdict.STALE, 10)
    assert wanted in check(decision, "false-positive").note


def test_a_rate_on_the_way_out_is_not_stale_yet():
    """55 of 600 is 1.8 times the target, but its interval goes on to either side of twice."""
    decision = decide(evidence(55))
    assert decision.verdict is Verdict.INCONCLUSIVE and "more benign rows needed" in decision.checks[0].note


def test_degraded_against_live():
    e = evidence()
    worse = replace(e, candidate=beside(e, 3.0), live=e.candidate, threshold=9.0)
    decision = decide(worse)
    assert (decision.verdict, decision.exit_code) == (Verdict.DEGRADED, 11)
    found = check(decision, "live's")
    assert found.verdict is Verdict.DEGRADED and found.figure.high < -0.02
    better = decide(replace(worse, candidate=e.candidate, live=worse.candidate, threshold=THRESHOLD))
    assert check(better, "live's").verdict is Verdict.PASS


def test_a_little_worse_is_allowed_and_about_the_margin_is_open():
    e = evidence()
    a_little = check(decide(replace(e, live=e.candidate, candidate=beside(e, 0.5))), "live's")
    assert a_little.verdict is Verdict.PASS and a_little.figure.value < 0
    few = evidence(harmless=100, hits=1, harmful=60)
    open_yet = check(decide(replace(few, live=few.candidate, candidate=beside(few, 0.9))), "live's")
    assert open_yet.verdict is Verdict.INCONCLUSIVE and "more rows needed" in open_yet.note


def test_words_that_do_as_well_degrade_or_leave_it_open():
    e = evidence()
    decision = decide(replace(e, candidate=beside(e, 3.0), floor=e.candidate))
    assert check(decision, "floor's").verdict is Verdict.DEGRADED and decision.exit_code == 11
    same = check(decide(replace(e, floor=e.candidate)), "floor's")
    assert same.verdict is Verdict.INCONCLUSIVE and "on the edge" in same.note


def test_without_the_floor_there_is_no_pass():
    decision = decide(evidence(floor=None))
    assert (decision.verdict, decision.exit_code) == (Verdict.INCONCLUSIVE, 12)
    assert check(decision, "floor's").figure is None


def test_lost_recall_degrades_although_the_order_is_the_same():
    e = evidence()
    decision = decide(replace(e, live=e.candidate, live_threshold=2.6))
    lost = check(decision, "recall")
    assert check(decision, "live's").verdict is Verdict.PASS
    assert lost.verdict is Verdict.DEGRADED and "0 rows won" in lost.note and decision.exit_code == 11


def test_a_stricter_threshold_is_no_loss_where_the_probe_catches_more_at_one_rate():
    """The live one flags 20 % of harmless rows where 5 % were asked for, and so catches more than a better probe."""
    e = evidence(10, harmful=900)
    live, cut = beside(e, 2.0), 1.5
    assert (live[e.labels == 1] > cut).mean() > (e.candidate[e.labels == 1] > THRESHOLD).mean() + 0.05
    found = check(decide(replace(e, live=live, live_threshold=cut)), "recall")
    assert found.verdict is Verdict.PASS and found.figure.low > 0.2 and "both at 5.00%" in found.name
    assert "harmless ones, live" in found.note and "each at its threshold" in found.note


def test_a_stricter_threshold_does_not_hide_a_worse_probe():
    e = evidence(10, harmful=900)
    worse = replace(e, candidate=beside(e, 2.0), threshold=6.0, live=e.candidate, live_threshold=1.5)
    found = check(decide(worse), "recall")
    assert found.verdict is Verdict.DEGRADED and "both at" in found.name and found.figure.high < -0.2


def test_where_live_certifies_no_such_rate_one_rate_of_the_rows_compares_them():
    e = evidence(10, harmful=900)
    found = check(decide(replace(e, live=beside(e, 2.0))), "recall")
    assert found.verdict is Verdict.PASS and "both at" in found.name
    assert check(decide(replace(e, live=e.candidate)), "recall").note == "the same judge of every row"
    few = check(decide(replace(e, target_fpr=0.001, live=beside(e, 2.0))), "recall")
    assert few.verdict is Verdict.INCONCLUSIVE and "400 more are needed" in few.note


def test_a_few_lost_rows_leave_it_open():
    e = evidence(harmful=30)
    live = e.candidate.copy()
    live[np.argsort(live[:30])[:3]] = 5.0  # 10 % of recall, on three rows: p = 0.25
    found = check(decide(replace(e, live=live, live_threshold=THRESHOLD)), "recall")
    assert found.verdict is Verdict.INCONCLUSIVE and "3 lost" in found.note
    assert "more harmful rows needed" in found.note and found.figure.value == -0.1


def test_few_harmful_rows_of_which_none_is_lost_are_no_proof():
    """Of 60 rows a loss of 3 % shows in none every sixth time."""
    few, many = (evidence(harmful=n) for n in (60, 300))
    shaken = check(decide(replace(few, live=few.candidate + 1e-6, live_threshold=THRESHOLD)), "recall")
    assert shaken.verdict is Verdict.INCONCLUSIVE and "0 rows won, 0 lost" in shaken.note
    assert "about 129 more harmful rows needed" in shaken.note and shaken.figure.low < -0.02
    shaken = check(decide(replace(many, live=many.candidate + 1e-6, live_threshold=THRESHOLD)), "recall")
    assert shaken.verdict is Verdict.PASS and shaken.figure.low > -0.02


def test_the_same_judge_loses_nothing_however_few_the_rows():
    few = evidence(harmful=20)
    assert check(decide(replace(few, live=few.candidate, live_threshold=THRESHOLD)), "recall").verdict is Verdict.PASS


def test_harmful_rows_of_few_groups_leave_the_recall_open():
    e = evidence()
    groups = [*(f"h{i // 60}" for i in range(300)), *map(str, range(600))]
    decision = decide(replace(e, groups=groups, live=beside(e, 0.1), live_threshold=THRESHOLD))
    found = check(decision, "recall")
    assert found.verdict is Verdict.INCONCLUSIVE and found.figure is None
    assert "5 groups of rows can't support" in found.note and decision.exit_code == 12


def test_the_worst_check_stands():
    e = evidence(hits=200)
    decision = decide(replace(e, candidate=beside(e, 3.0), live=e.candidate))
    assert check(decision, "false-positive").verdict is Verdict.STALE
    assert decision.verdict is Verdict.DEGRADED  # a new threshold does not mend it
    assert decide(evidence(hits=200, floor=None)).verdict is Verdict.STALE


def test_noise_of_a_second_run_widens_the_rate():
    e = evidence()
    near = e.candidate.copy()
    near[300 + 30 : 300 + 90] = THRESHOLD - 1e-3
    assert decide(replace(e, candidate=near)).checks[0].verdict is Verdict.PASS
    noisy = decide(replace(e, candidate=near, noise=2e-3)).checks[0]
    assert noisy.verdict is Verdict.INCONCLUSIVE and noisy.figure.high > 0.15 and noisy.figure.value == 0.05
    assert "within the noise" in noisy.note


def test_hits_within_the_noise_may_be_none():
    e = evidence()
    near = e.candidate.copy()
    near[300:330] = THRESHOLD + 1e-3
    noisy = decide(replace(e, candidate=near, noise=2e-3)).checks[0]
    assert noisy.verdict is Verdict.INCONCLUSIVE and noisy.figure.low == 0 and noisy.figure.high < 0.1


def test_rows_of_one_group_are_one_witness():
    e = evidence()
    groups = [*map(str, range(300)), *(f"g{i // 30}" for i in range(600))]  # the 30 hits are one group
    found = decide(replace(e, groups=groups)).checks[0]
    assert found.verdict is Verdict.INCONCLUSIVE and found.figure.low == 0 and "share groups" in found.note


def test_too_few_groups_are_inconclusive_and_say_so():
    decision = decide(evidence(hits=0, harmless=8, harmful=5, live=np.zeros(13)))
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "5 groups of harmful rows can't support" in check(decision, "live's").note


def test_a_missing_value_is_no_evidence():
    e = evidence()
    broken = e.candidate.copy()
    broken[5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decide(replace(e, candidate=broken))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 800), st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.3, 3.0]), st.sampled_from([0.005, 0.01, 0.05]))
def test_as_many_rows_as_it_asks_for_settle_the_rate(n, times, target):
    hits = round(times * target * n)
    more = benign_rows_needed(hits / n, n, target)
    if more is None:
        return
    low, high = clopper_pearson(round(hits / n * (n + more)), n + more)
    assert low > 2 * target or high < target / 2 or (target / 2 <= low and high <= 2 * target)


def test_the_number_of_rows_that_no_hits_ask_for():
    """The first n with a 97.5 % upper end below half of 1 %: ln(0.025) / ln(1 - 0.005), up to the grid's 0.2 %."""
    assert 736 <= 300 + benign_rows_needed(0.0, 300, 0.01) <= 740
    assert benign_rows_needed(0.02, 1000, 0.01) is None


# --- the command --------------------------------------------------------------------------------------------------

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
