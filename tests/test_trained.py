"""What a probe has seen: by its recipe's rows where the files are at hand, by its card's files where they are not."""

import json

import pytest
from pydantic import ValidationError

from monitor.errors import ConfigInvalid
from training.data import read_jsonl
from training.recipe import Recipe, gather
from training.report.sets import answer_sets
from training.trained import Trained, beyond_recipe

from .conftest import make_card


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_jsonl(path)[1]


def exchange(i, split="evaluate"):
    return {"text": f"Question {i}", "response": f"Answer {i}", "label": i % 2, "split": split}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "resp_gptfuzz.jsonl", [exchange(i) for i in range(40)])
    write(tmp_path / "resp_xstest.jsonl", [exchange(i) for i in range(100, 110)])
    return tmp_path


@pytest.fixture
def card(tiny, random_probe, folder):
    def made(described, *sources):
        fit = {"recipe": Recipe(sources=sources).model_dump(mode="json")} if sources else {}
        return make_card(tiny, random_probe, data=tuple(described), fit=fit)

    return made


def fuzz(folder):
    return read_jsonl(folder / "resp_gptfuzz.jsonl")[1]


def test_answers_that_the_probe_was_fitted_or_calibrated_on_are_left_out(folder, card):
    source = {"file": "resp_gptfuzz.jsonl", "answers": True, "calibrate": 0.2, "test": 0.3}
    trained = Trained.of(card([fuzz(folder)], source), folder)
    sets, notes = answer_sets(folder, trained)
    kept = {(e.text, e.response) for e in sets["resp_gptfuzz"]}
    assert kept == {(r.text, r.answer) for r in trained.parts["test"]} and 0 < len(kept) < 40
    assert notes == [f"resp_gptfuzz: {40 - len(kept)} of 40 answers left out, the probe was trained on them"]
    assert len(sets["resp_xstest"]) == 10


def test_the_same_answer_in_another_case_is_left_out_and_another_one_to_the_prompt_is_not(folder, card):
    mine = [
        {"text": "question 1", "response": "ANSWER  1", "label": 1},
        {"text": "Question 2", "response": "x", "label": 0},
    ]
    described = write(folder / "mine.jsonl", mine)
    source = {"file": "mine.jsonl", "answers": True, "calibrate": 0, "test": 0}
    sets, _ = answer_sets(folder, Trained.of(card([described], source), folder))
    assert {f"Question {i}" for i in range(40)} - {e.text for e in sets["resp_gptfuzz"]} == {"Question 1"}


def test_a_prompt_is_no_answer(folder, card):
    described = write(folder / "mine.jsonl", [exchange(i) for i in range(40)])
    sets, notes = answer_sets(folder, Trained.of(card([described], {"file": "mine.jsonl", "test": 0}), folder))
    assert len(sets["resp_gptfuzz"]) == 40 and notes == []


@pytest.mark.parametrize("sources", [(), ({"file": "missing.jsonl"}, {"file": "resp_gptfuzz.jsonl", "answers": True})])
def test_where_its_rows_are_not_known_a_file_of_the_card_is_left_out(folder, card, sources):
    trained = Trained.of(card([fuzz(folder)], *sources), folder)
    assert trained.missing and trained.parts == {"fit": [], "calibrate": [], "test": []}
    sets, notes = answer_sets(folder, trained)
    assert list(sets) == ["resp_xstest"]
    assert notes == ["resp_gptfuzz is left out: the probe was trained on it, and on which of its rows is not known"]


def test_a_set_of_which_every_answer_was_seen_is_none(folder, card):
    source = {"file": "resp_gptfuzz.jsonl", "answers": True, "calibrate": 0, "test": 0}
    sets, notes = answer_sets(folder, Trained.of(card([fuzz(folder)], source), folder))
    assert list(sets) == ["resp_xstest"] and "40 of 40 answers" in notes[0]


def test_a_recipe_is_known_though_a_file_is_missing(folder, card):
    trained = Trained.of(card([], {"file": "missing.jsonl"}), folder)
    assert trained.recipe.sources[0].file == "missing.jsonl" and "missing.jsonl" in trained.missing


def test_another_file_under_the_name_of_the_cards_is_refused(folder, card):
    described = fuzz(folder)
    write(folder / "resp_gptfuzz.jsonl", [exchange(i) for i in range(7)])
    with pytest.raises(ConfigInvalid, match="is not the file that the probe was trained on"):
        Trained.of(card([described], {"file": "resp_gptfuzz.jsonl"}), folder)


def test_two_files_of_one_name_in_a_recipe_are_refused(tmp_path):
    """They would be one file in the card, and one key to balance by."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "rows.jsonl", [exchange(i) | {"text": f"{place} {i}"} for i in range(30)])
    with pytest.raises(ConfigInvalid, match=r"b/rows\.jsonl: another source is called 'rows' too; rename one"):
        gather(Recipe(sources=({"file": "a/rows.jsonl"}, {"file": "b/rows.jsonl"})), tmp_path)
    halves = ({"file": "a/rows.jsonl", "label": 0}, {"file": "a/rows.jsonl", "label": 1})
    assert gather(Recipe(sources=halves), tmp_path)[1][0].rows == 30
    with pytest.raises(ValidationError, match="two sets are called 'rows'"):
        Recipe(sources=halves, evaluate=("a/rows.jsonl", "b/rows.csv"))


def test_files_beyond_the_recipe_are_those_that_came_later(folder, card):
    own, other = fuzz(folder), read_jsonl(folder / "resp_xstest.jsonl")[1]
    source = {"file": "resp_gptfuzz.jsonl", "answers": True}
    assert beyond_recipe(card([own], source)) == set()
    assert beyond_recipe(card([own, other], source)) == {other.sha256}
    same_name = other.model_copy(update={"file": own.file})
    assert beyond_recipe(card([own, same_name], source)) == {other.sha256}
    assert beyond_recipe(card([own, other.model_copy(update={"used": {"fit": 0}})], source)) == set()
    assert beyond_recipe(card([own, other])) == {own.sha256, other.sha256}
