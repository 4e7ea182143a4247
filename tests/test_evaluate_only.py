"""Sets that are for evaluation only are opened by the report alone: by an audit of every open(), and by who names them.

Whoever names such a file on a command line (`gate --data`, `lint --against`, `harvest --data`) reads it at their own
wish; no code of ours does by itself.
"""

import ast
import json
import random
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from monitor.cli import app
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from training import pairs_made
from training.data import EVALUATE_ONLY
from training.experiment import residual_stream
from training.recipe import Recipe, gather
from training.report.run import Options, evaluate
from training.report.sets import ANSWER_SETS, PROMPT_SETS

ROOT = Path(__file__).parent.parent
FILES = {f"{name}.jsonl" for name in EVALUATE_ONLY}
# module -> functions that may open one. The experiment's page shows its probes off their distribution, when all are
# fitted; `_evaluate` is where training hands over to the report.
READERS = {
    "training.report.sets": {"read_set", "read_exchanges"},
    "training.experiment": {"_public"},
}
opened: list[tuple[str, bool]] = []
"""(file, whether a reader was on the stack)"""
watching: list[bool] = []


def hook(event, arguments):
    """An audit hook can't be taken away again: it looks only while a test watches."""
    if event != "open" or not watching or not isinstance(arguments[0], str | Path):
        return
    name = Path(arguments[0]).name
    if name in FILES:
        frame, allowed = sys._getframe(1), False
        while frame is not None and not allowed:
            allowed = frame.f_code.co_name in READERS.get(frame.f_globals.get("__name__", ""), ())
            frame = frame.f_back
        opened.append((name, allowed))
        if not allowed:
            raise AssertionError(f"{name} is for evaluation only")


@pytest.fixture(scope="module", autouse=True)
def hooked():
    sys.addaudithook(hook)


@pytest.fixture
def watch():
    opened.clear()
    watching.append(True)
    yield opened
    watching.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training files beside all six sets, and a recipe without and one with an `evaluate`."""
    made = tmp_path_factory.mktemp("data")
    for name in ["train", *EVALUATE_ONLY]:
        chance = random.Random(name)
        rows = [
            {
                "text": f"{name} {chance.choice(['sea', 'oak'])} {'###' if i % 3 == 0 else '...'} {i}",
                "label": int(i % 3 == 0),
                "source": f"s{i % 2}",
            }
            for i in range(300 if name == "train" else 40)
        ]
        rows = [r | {"response": r["text"]} for r in rows] if name.startswith("resp") else rows
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    sources = "sources: [{file: train.jsonl, calibrate: 0.7, test: 0.2}]\nlayer: 1\nsolver: logistic\n"
    (made / "plain.yaml").write_text(sources)
    (made / "recipe.yaml").write_text(f"{sources}evaluate: [jailbreakbench.jsonl]\n")
    choice = (
        "sources: [{file: train.jsonl, by_source: true, test: 0, calibrate: 0}]\nevaluate: [jailbreakbench.jsonl]\n"
    )
    (made / "choice.yaml").write_text(choice)
    (made / "settings.yaml").write_text("target_fpr: 0.06\n")  # what so few rows can certify
    return made


@pytest.fixture(scope="module")
def command(folder, tiny_folder):
    """`midstream ...`, with the tiny model and a store beside the data."""

    def invoke(*arguments, model=True, store=True):
        given = ["--model", str(tiny_folder)] * model + ["--store", str(folder / "store")] * store
        result = CliRunner().invoke(app, [*arguments, *given])
        assert result.exit_code in (0, 1, 10, 11, 12), (result.output, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture(scope="module")
def trained(command, folder):
    command("train", "--recipe", str(folder / "plain.yaml"), "--data", str(folder), "--name", "probe")
    return "probe"


def test_the_hook_sees_what_it_should(watch, folder):
    with pytest.raises(AssertionError, match="for evaluation only"):
        (folder / "xstest.jsonl").read_text()
    assert watch == [("xstest.jsonl", False)] and (folder / "train.jsonl").read_bytes()


def test_training_opens_none(watch, command, folder):
    command("train", "--recipe", str(folder / "plain.yaml"), "--data", str(folder), "--name", "other")
    command("train", "--data", str(folder / "train.jsonl"), "--name", "files", "--epochs", "2")
    assert watch == []


def test_a_recipe_that_evaluates_opens_what_it_names_when_all_is_fixed(watch, command, folder):
    settings = ("--config", str(folder / "settings.yaml"))
    command("train", "--recipe", str(folder / "recipe.yaml"), "--data", str(folder), "--name", "other", *settings)
    assert watch == [("jailbreakbench.jsonl", True)]


def test_no_other_command_opens_any(watch, command, trained, folder):
    train = str(folder / "train.jsonl")
    command("lint", train, model=False, store=False)
    command("harvest", "--data", train, "--out", str(folder / "shards"), "--layers", "all", "--statistics", store=False)
    recipe = ("--recipe", str(folder / "choice.yaml"), "--data", str(folder))
    assert "s0" in command("select", *recipe, "--blocks", "all", "--json", store=False).output
    command("gate", f"{trained}@v1", "--data", train, "--target-fpr", "0.03")
    command("probe", "show", trained)
    command("score", "a text")
    assert watch == []


def test_the_experiment_reads_public_sets_for_its_page_alone(watch, folder, tiny_folder, monkeypatch, tmp_path):
    """After all is fitted: test_experiment compares its probes with those of a run without any."""
    for name, n in (("FIT", 12), ("VALIDATION", 6), ("ELSEWHERE", 4)):
        monkeypatch.setattr(pairs_made, name, n)
    for name in ("concept_caps", "concept_html"):
        (folder / f"{name}.jsonl").write_bytes((folder / "train.jsonl").read_bytes()[:1000].rpartition(b"\n")[0])
    residual_stream(load_settings(model=str(tiny_folder)), tmp_path, folder, epochs=2)
    assert {name for name, _ in watch} == {
        "jailbreakbench.jsonl",
        "xstest.jsonl",
        "strongreject.jsonl",
        "mitre_frr.jsonl",
    }
    assert all(allowed for _, allowed in watch)


def test_the_report_opens_all_of_them(watch, folder, tiny_folder, trained, tmp_path):
    settings = load_settings(model=str(tiny_folder), store=folder / "store")
    evaluate(settings, f"{trained}@v1", folder, tmp_path, Options(target_fpr=0.03, attacks=False))
    prompts = {f"{name}.jsonl" for name in EVALUATE_ONLY if name not in ANSWER_SETS}
    assert {name for name, _ in watch} >= prompts and all(allowed for _, allowed in watch)


# --- by name ----------------------------------------------------------------------------------------------------------


def test_the_list_is_that_of_the_data_sheet():
    """The shared folder's README marks them; here it may be missing."""
    sheet = ROOT.parent / "shared" / "data" / "README.md"
    if not sheet.is_file():
        pytest.skip("the data folder is not beside the repository")
    rows = [line.split("|") for line in sheet.read_text().splitlines() if line.startswith("| ") and ".jsonl" in line]
    marked = {cells[1].strip().removesuffix(".jsonl") for cells in rows if cells[6].strip() == "evaluate only"}
    assert marked == EVALUATE_ONLY
    assert {*PROMPT_SETS, *ANSWER_SETS} >= EVALUATE_ONLY


def test_no_other_module_names_them():
    """A file's name as a string in the code; the report's bars name sets, not files."""
    named = set()
    for package in ("monitor", "training", "probes_store"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and node.value in {*FILES, *EVALUATE_ONLY}:
                    named.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert named == {
        "training.data",
        "training.report.sets",
        "training.report.figures",
        "training.report.charts",
        "training.experiment",
    }


@pytest.mark.parametrize("name", sorted(EVALUATE_ONLY))
def test_a_recipe_that_trains_on_one_is_refused(tmp_path, name):
    recipe = Recipe.model_validate({"sources": [{"file": f"{name}.jsonl"}]})
    with pytest.raises(ConfigInvalid, match=rf"{name}\.jsonl: for evaluation only"):
        gather(recipe, tmp_path)  # before it is opened: it is not even there


def test_no_recipe_of_ours_trains_on_one():
    recipes = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        used = {Path(str(source["file"])).name for source in yaml.safe_load(path.read_text())["sources"]}
        assert used.isdisjoint(FILES), path.name
