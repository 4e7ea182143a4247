"""`midstream evaluate` on the tiny model and a store: what it writes and refuses, and for which probes it works."""

import json
import random
import re
from html.parser import HTMLParser

import pytest
import typer
from typer.testing import CliRunner

from monitor.aggregate import Aggregation
from monitor.cli.evaluate import evaluate
from monitor.errors import ConfigInvalid, ProbeMismatch
from monitor.probe import ProbeWeights
from probes_store.store import Store
from training.data import read_jsonl
from training.metrics import share_above
from training.recipe import Recipe, gather
from training.report import attacks as report_attacks
from training.report.card import evaluate_sets
from training.report.scores import Judge, score_prompts

from .conftest import calibrated, make_card

WORDS = ["sea", "oak", "tea", "sun", "ink", "fig", "elm", "owl"]
SETS = {"jailbreakbench": 0.5, "xstest": 0.5, "strongreject": 1.0, "mitre_frr": 0.0, "tense_reformulations": 1.0}


def text(chance, harmful):
    words = [*chance.choices(WORDS, k=6), f"no{chance.randrange(10**9)}"]
    if harmful:
        words.insert(3, "*")
    return " ".join(words)


def write(path, n, seed, share, response=False):
    """Harmful rows hold the star that the probe looks for, and one harmless row of 20 does."""
    chance, lines = random.Random(seed), []
    for i in range(n):
        label = int(i < share * n)
        said = text(chance, label or i % 20 == 19)
        row = {"text": text(chance, False), "response": said} if response else {"text": said}
        lines.append(json.dumps(row | {"label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def shelf(quiet, star_probe, tmp_path_factory):
    """Sets, training rows, and a store of probes: two has two blocks, alone no recipe, bare no calibration."""
    folder = tmp_path_factory.mktemp("report")
    _, described = read_jsonl(write(folder / "train.jsonl", 600, 1, 0.3))
    for seed, (name, share) in enumerate(SETS.items(), 2):
        write(folder / f"{name}.jsonl", 60, seed, share)
    write(folder / "resp_xstest.jsonl", 60, 20, 0.4, response=True)
    write(folder / "own.jsonl", 60, 21, 0.5)
    recipe = Recipe(
        sources=({"file": "train.jsonl", "calibrate": 0.2, "test": 0.3},),
        evaluate=("jailbreakbench.jsonl",),
        max_text_tokens=192,
    )
    probe, threshold = star_probe
    fit = {"data": (described,), "fit": {"recipe": recipe.model_dump(mode="json")}}
    whole = fit | {"calibration": calibrated(threshold)}
    layer = next(iter(probe.weight))
    two = ProbeWeights("two", {layer: probe.weight[layer], layer + 1: 0 * probe.weight[layer]}, probe.bias)
    store = Store(folder / "store", shipped=folder / "none")
    prompt_only = {f: {"prompt": c["prompt"]} for f, c in calibrated(threshold).items()}
    answer_only = {"chat": {"response": calibrated(threshold)["chat"]["response"]}}
    for name, weights, changes in (
        ("star", probe, whole),
        ("two", two, whole),
        ("concept", probe, fit | {"kind": "concept", "calibration": prompt_only}),
        ("answers", probe, fit | {"calibration": answer_only}),
        ("alone", probe, {"calibration": calibrated(threshold)}),
        ("bare", probe, fit),
    ):
        named = ProbeWeights(name, weights.weight, weights.bias)
        store.publish(make_card(quiet, named, **changes), named.weight, named.bias)
    card = make_card(quiet, ProbeWeights("other", probe.weight, probe.bias), **whole)
    elsewhere = card.model.model_copy(update={"fingerprint": "another model"})
    store.publish(card.model_copy(update={"model": elsewhere}), probe.weight, probe.bias)
    return folder


@pytest.fixture(scope="module")
def run(shelf, tiny_folder):
    app = typer.Typer()
    app.command()(evaluate)

    def invoke(*arguments, out="out", data=shelf):
        given = ["--data", str(data), "--out", str(shelf / out), "--model", str(tiny_folder)]
        runner = CliRunner(env={"COLUMNS": "140"})
        result = runner.invoke(app, [*arguments, *given, "--store", str(shelf / "store")])
        return result, shelf / out

    return invoke


@pytest.fixture(scope="module")
def made(run):
    """(report, page, what was printed) of the star probe, with everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_attacks, "DOCUMENTS", 2)
        result, out = run("star@v1", "--requests-per-day", "5000")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text(), result.stdout


def test_every_set_is_there_at_one_threshold(made, star_probe):
    report, _, printed = made
    assert set(report["sets"]) == {*SETS, "everyday", "unseen harmful"}
    assert {e["threshold"] for e in report["sets"].values()} == {star_probe[1]}
    jailbreaks = report["sets"]["jailbreakbench"]
    assert (jailbreaks["harmful"], jailbreaks["harmless"], jailbreaks["against"]) == (30, 30, "own")
    assert jailbreaks["recall"]["value"] == 1.0 and jailbreaks["auroc"]["value"] > 0.9
    assert report["sets"]["strongreject"]["against"] == "everyday"
    assert report["sets"]["strongreject"]["beats"]["words"]["low"] > 0
    day = report["sets"]["everyday"]["false_alarms_a_day"]
    assert day["value"] == pytest.approx(5000 * report["sets"]["everyday"]["fpr"]["value"])
    assert report["macro"]["auroc"]["sets"] == 4 and report["look_alikes"]["sets"]["mitre_frr"] == 60
    assert "jailbreakbench" in printed and "JailbreakBench, AUROC" in printed


def test_floors_answers_attacks_and_needles(made):
    report = made[0]
    floors = report["sets"]["jailbreakbench"]
    assert set(floors["floors"]) == {"words", "length"} and floors["controls"]["same_blocks"] > 0.9
    assert 0.3 < report["controls"]["shuffled"] < 0.7
    assert len(report["sweep"]["rows"]) == report["probe"]["n_layers"]
    answers = report["answers"]["resp_xstest"]
    assert answers["recall"]["value"] == 1.0 and answers["by_tokens"]["recall"][-1] == 1.0
    assert (
        answers["by_tokens"]["recall"][0] == 0.0 and answers["auroc"]["value"] > answers["floors"]["request"]["value"]
    )
    assert report["attacks"]["plain"]["recall"]["value"] == 1.0 and report["needles"][0]["tokens"] == 500


def test_the_attack_table_stands_beside_the_report(made, shelf):
    evasion = json.loads((shelf / "out" / "evasion.json").read_text())
    assert evasion == {name: made[0][name] for name in ("probe", "thresholds", "attacks")}


class Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.open, self.headings, self.links, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "br", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_whole_and_asks_for_nothing(made):
    report, page, _ = made
    reader = Reader(page)
    assert (
        reader.open == [] and reader.links == [] and "<script" not in page and "http" not in page.split("</style>")[1]
    )
    assert reader.headings == [
        "Bars set beforehand",
        "Requests",
        "Everyday requests, and those that only look harmful",
        "Curves",
        "What a probe must beat",
        "Answers",
        "Attacks",
        "How it was made",
    ]
    shown = " ".join(reader.text)
    assert all(name in shown for name in [*report["sets"], "resp_xstest", "mixed-case"])
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan", "", shown.lower()) and "None" not in shown
    assert page.count("<svg") >= 5 and "prefers-color-scheme" not in page and "light-dark(" in page


def test_a_row_that_the_probe_was_fitted_on_is_left_out(run, shelf, made):
    """Half of this set are training rows; a set whose file was trained on is left out whole."""
    known = [r.text for r in gather(Recipe(sources=({"file": "train.jsonl", "test": 0.3},)), shelf)[0]["fit"]][:30]
    lines = [json.dumps({"text": t, "label": int("*" in t)}) for t in known]
    (shelf / "mixed.jsonl").write_text((shelf / "own.jsonl").read_text() + "\n".join(lines))
    result, out = run(
        "star", "--set", str(shelf / "mixed.jsonl"), "--set", str(shelf / "train.jsonl"), "--no-attacks", out="a"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["sets"]["mixed"]["seen"] <= 30 and "train" not in report["sets"]
    assert "train is left out: the probe was trained on it" in report["notes"]
    assert report["attacks"] == {} and not (out / "evasion.json").exists()


def figures(run, name, *more):
    result, out = run(name, "--no-attacks", *more, out=name)
    assert result.exit_code == 0, (result.output, result.exception)
    page = (out / "report.html").read_text()
    assert Reader(page).open == []
    return json.loads((out / "report.json").read_text())


def test_a_probe_of_several_blocks(run, made):
    report = figures(run, "two")
    assert report["probe"]["layers"] == [1, 2]
    for name, entry in made[0]["sets"].items():
        assert report["sets"][name].get("recall") == entry.get("recall")


def test_a_probe_that_is_calibrated_for_answers_alone(run):
    report = figures(run, "answers")
    assert "sets" not in report and report["answers"]["resp_xstest"]["recall"]["value"] == 1.0
    assert report["thresholds"]["prompt"] is None and "no calibration of the prompt" in report["notes"][0]


def test_a_concept_is_measured_on_its_own_rows_and_given_sets(run, shelf):
    report = figures(run, "concept", "--set", str(shelf / "own.jsonl"))
    assert set(report["sets"]) == {"own", "everyday", "unseen harmful"} and report["answers"] == {}


def test_a_set_of_capitals_keeps_both_rows_of_each_pair(run, shelf):
    pairs = [{"text": t, "label": y} for i in range(20) for t, y in ((f"Row {i}", 0), (f"ROW {i}", 1))]
    (shelf / "capitals.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    found = figures(run, "concept", "--set", str(shelf / "capitals.jsonl"))["sets"]["capitals"]
    assert (found["harmful"], found["harmless"]) == (20, 20)


def test_without_a_recipe_there_are_no_floors(run, shelf):
    report = figures(run, "alone")
    assert set(report["sets"]) == set(SETS) and report["sweep"] == {} and report["controls"] == {}
    assert report["sets"]["strongreject"]["against"] is None and "auroc" not in report["sets"]["strongreject"]
    assert any("its card has no recipe" in note for note in report["notes"])
    assert "the card does not say where the calibration rows were" in (shelf / "alone" / "report.html").read_text()


def test_with_a_training_file_missing_texts_are_cut_as_its_recipe_says(run, shelf, tmp_path):
    (tmp_path / "xstest.jsonl").write_bytes((shelf / "xstest.jsonl").read_bytes())
    result, out = run("star", "--no-attacks", data=tmp_path, out="missing")
    assert result.exit_code == 0, (result.output, result.exception)
    report, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    assert report["max_text_tokens"] == 192 and "cut after 192 tokens, as the calibration rows were" in page
    (note,) = [n for n in report["notes"] if "train.jsonl" in n]
    assert "rows that the probe has seen are not told from others" in note


@pytest.mark.parametrize(
    ("files", "sets"),
    [
        (("train.jsonl",), {"everyday", "unseen harmful"}),
        (("tense_reformulations.jsonl",), {"tense_reformulations"}),
        ((), None),
    ],
)
def test_without_a_new_set_there_is_a_report_all_the_same(run, shelf, tmp_path, files, sets):
    for name in files:
        (tmp_path / name).write_bytes((shelf / name).read_bytes())
    result, out = run("star", "--no-attacks", data=tmp_path, out=f"few{len(files)}")
    assert result.exit_code == 0, (result.output, result.exception)
    report, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    assert Reader(page).open == [] and (set(report["sets"]) if "sets" in report else None) == sets
    assert not report.get("calibration") and "all sets" not in page
    assert any("nothing about requests" in note for note in report["notes"]) == (sets is None)


@pytest.mark.parametrize("name", ["xstest", "everyday"])
def test_two_sets_of_one_name_are_refused(run, shelf, tmp_path, name):
    """One would stand in the place of the other, or both figures be of one file's rows twice."""
    path = write(tmp_path / f"{name}.jsonl", 20, 30, 0.5)
    result, _ = run("star", "--set", str(path), "--no-attacks")
    assert isinstance(result.exception, ConfigInvalid) and f"a set {name!r} already" in str(result.exception)


def test_rows_about_an_answer_are_not_shown_as_prompts(run, shelf):
    both = (shelf / "own.jsonl").read_text() + (shelf / "resp_xstest.jsonl").read_text()
    (shelf / "both.jsonl").write_text(both)
    report = figures(run, "concept", "--set", str(shelf / "both.jsonl"))
    assert report["sets"]["both"]["rows"] == 60
    assert "both: 60 rows that label a `response` are left out, for prompts are judged" in report["notes"]


def test_fewer_rows_of_each_set(run):
    report = figures(run, "star", "--rows", "25")
    assert report["sets"]["xstest"]["rows"] == 25 and "xstest: 25 of 60 rows, drawn by chance" in report["notes"]


@pytest.mark.parametrize(
    ("name", "message", "kind"),
    [
        ("moon", "there is no probe 'moon'", ConfigInvalid),
        ("star@v9", "there is no probe", ConfigInvalid),
        ("bare", "is not calibrated", ConfigInvalid),
        ("other", "made with model 'another model'", ProbeMismatch),
        (None, "name a probe; the store has", ConfigInvalid),
    ],
)
def test_what_it_refuses(run, name, message, kind):
    result, _ = run(*([name] if name else []))
    assert isinstance(result.exception, kind) and message in str(result.exception)


def test_a_rate_that_the_card_cannot_certify_is_refused(run):
    result, _ = run("star", "--target-fpr", "0.001")
    assert isinstance(result.exception, ConfigInvalid) and "is not calibrated" in str(result.exception)


def test_folders_that_are_not_there(run, shelf, tmp_path):
    result, _ = run("star", data=tmp_path / "none")
    assert "is not a folder" in str(result.exception)
    result, _ = run("star", out="train.jsonl")
    assert "can't be made" in str(result.exception)


def test_another_training_file_under_the_same_name_is_refused(run, tmp_path):
    write(tmp_path / "train.jsonl", 600, 99, 0.3)
    result, _ = run("star", data=tmp_path)
    assert "is not the file that the probe was trained on" in str(result.exception)


# --- what training calls ----------------------------------------------------------------------------------------------


def test_the_cards_figures_are_those_of_the_served_probe(shelf, quiet, star_probe):
    probe, threshold = star_probe
    recipe = Recipe(
        sources=({"file": "train.jsonl", "test": 0.3},), evaluate=("jailbreakbench.jsonl", "mitre_frr.jsonl")
    )
    parts, _ = gather(recipe, shelf)
    judge = Judge(quiet, probe, Aggregation("max"), Aggregation("max"))
    tested = score_prompts(judge, judge.prompts([r.text for r in parts["test"]]), (), lambda n: None).values
    found = evaluate_sets(judge, recipe, parts, tested.tolist(), shelf, threshold)
    sets = found["sets"]
    assert found["prompt_threshold"] == threshold
    assert list(sets) == ["jailbreakbench", "mitre_frr", "unseen_harmful", "harmless_train", "harmless_test"]
    rows, _ = read_jsonl(shelf / "mitre_frr.jsonl")
    values = score_prompts(judge, judge.prompts([r.text for r in rows]), (), lambda n: None).values
    assert sets["mitre_frr"]["fpr"]["rate"] == pytest.approx(share_above(values, threshold).value, abs=1e-4)
    assert sets["harmless_test"] == {"fpr": sets["harmless_train"]["fpr"]}
    assert sets["jailbreakbench"]["auroc"]["auroc"] > sets["jailbreakbench"]["tfidf"]["auroc"]
    assert sets["unseen_harmful"]["recall"]["n"] == sum(r.label for r in parts["test"])
