"""Which rows are one row: case tells none apart, but of a concept, whose pairs may differ in nothing else."""

import json

import numpy as np

from training.data import Row, unique
from training.recipe import Recipe, gather
from training.report import card
from training.report.sets import read_set

PAIR = [("a b", 0), ("A B", 1)]


def rows(*pairs):
    return [Row(text, label, "s", text) for text, label in pairs]


def texts(found):
    return [(r.text, r.label) for r in found]


def test_a_pair_that_differs_in_case_and_label_is_two_rows():
    assert texts(unique(rows(*PAIR), concept=True)) == PAIR
    assert texts(unique(rows(*PAIR, ("A  b", 1), ("a B", 0)), concept=True)) == PAIR


def test_what_is_harmful_is_so_in_capitals():
    """A text that leaked in another case, under another label, must not lie on both sides of a split."""
    assert texts(unique(rows(*PAIR))) == PAIR[:1]
    assert unique(rows(PAIR[1]), before=rows(PAIR[0])) == []


def test_case_and_space_make_no_other_row_of_one_label():
    assert texts(unique(rows(("a b", 0), ("A  B", 0)), concept=True)) == [("a b", 0)]


def test_the_same_letters_under_both_labels_are_the_first_row():
    assert texts(unique(rows(("a b", 0), ("a  b", 1)), concept=True)) == [("a b", 0)]
    assert texts(unique(rows(("A b", 1)), rows(("A B", 1)), concept=True)) == []


def test_an_answer_makes_another_row():
    one, other = (Row("q", 1, "s", "g", answer=a) for a in ("yes", "YES"))
    assert unique([Row("q", 1, "s", "g"), one, other]) == [Row("q", 1, "s", "g"), one]


def write(path, pairs):
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in pairs))
    return path


def test_a_set_and_a_recipe_keep_the_capitals(tmp_path):
    words = [f"row {i}" for i in range(40)]
    path = write(tmp_path / "caps.jsonl", [(t, y) for w in words for t, y in ((w, 0), (w.upper(), 1))])
    assert sum(r.label for r in read_set(path, concept=True)[0]) == 40
    parts, _ = gather(Recipe(sources=({"file": "caps.jsonl"},), kind="concept"), tmp_path)
    assert sum(r.label for of in parts.values() for r in of) == 40


def test_a_card_gives_each_row_of_a_pair_its_own_value(monkeypatch):
    """By identity the last of a pair would stand for both."""
    monkeypatch.setattr(card, "score_prompts", lambda *_: type("S", (), {"values": np.zeros(0)}))
    monkeypatch.setattr(card, "tfidf_scores", lambda _, of: [0.0] * len(of))
    judge = type("J", (), {"prompts": lambda self, of: []})()
    test = rows(*((t, y) for i in range(20) for t, y in ((f"T {i}", 1), (f"t {i}", 0))))
    answer = Row("q", 1, "s", "g", answer="not about a prompt")
    tested = [9.0, *(float(r.label) for r in test)]
    recipe = Recipe(sources=({"file": "x"},))
    found = card.evaluate_sets(judge, recipe, {"fit": [], "calibrate": [], "test": [answer, *test]}, tested, None, 0.5)
    sets = found["sets"]
    assert sets["unseen_harmful"]["recall"]["hits"] == 20 and sets["harmless_test"]["fpr"]["hits"] == 0
