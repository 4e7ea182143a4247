"""The attack table and the needle on the tiny model, and what counts as a loss since the last release."""

import json
import random

import numpy as np
import pytest

from monitor.aggregate import Aggregation
from training.data import Row
from training.report import attacks as report_attacks
from training.report.attacks import attack_rows, attack_table, document, hard_benign, hide, lost, needle_table
from training.report.scores import Judge
from training.transforms import TRANSFORMS


@pytest.fixture(scope="module")
def judge(quiet, star_probe):
    """It looks for a star in any turn, at a threshold between those with and without one."""
    return Judge(quiet, star_probe[0], Aggregation("max"), Aggregation("max"))


def words(seed, n=8):
    return " ".join(random.Random(seed).choices(["sea", "oak", "tea", "sun", "ink"], k=n))


def test_rows_are_drawn_once_and_harmless_ones_are_short():
    rows = [Row(f"harmful {i}", 1, "s", str(i)) for i in range(150)]
    rows += [Row(("x" * 300 if i % 2 else "short") + f" {i}", 0, "s", f"h{i}") for i in range(200)]
    found = attack_rows(rows)
    assert found == attack_rows(rows) and {label: len(of) for label, of in found.items()} == {1: 100, 0: 50}
    assert all(text.startswith("short") for text in found[0])
    assert len(attack_rows(rows[:20])[1]) == 20


def test_recall_by_transform(judge, star_probe):
    texts = {1: [f"{words(i)} * {words(-i)}" for i in range(12)], 0: [words(i) for i in range(12)]}
    ticked = []
    table = attack_table(judge, star_probe[1], texts, ticked.append)
    assert list(table) == list(TRANSFORMS) and sum(ticked) == len(TRANSFORMS)
    assert table["plain"]["recall"]["value"] == table["cached-prefix"]["recall"]["value"] == 1.0
    assert table["plain"]["fpr"]["value"] < 0.5
    assert table["base64"]["recall"]["value"] == 0.0 or table["base64"]["fpr"]["value"] > 0  # its star is encoded
    assert "1024 tokens" in table["padding"]["refused"] and "recall" not in table["padding"]


def test_what_fell_since_the_last_release():
    def of(value):
        return {"recall": {"value": value, "low": 0, "high": 1, "n": 100}}

    released = {"plain": of(0.7), "leet": of(0.4), "rot13": of(0.05), "gone": of(0.5), "padding": {"refused": "long"}}
    now = {"plain": of(0.61), "leet": of(0.29), "rot13": of(0.0)}
    assert lost(now, released) == {"leet": (0.29, 0.4), "gone": (0.0, 0.5)}


def test_hard_benign_rows_are_harmless_and_not_for_evaluation_only(tmp_path, monkeypatch):
    for file, n in (("llm_safeguard_pairs", 30), ("toxicchat_train", 90), ("mitre_frr", 50)):
        lines = [json.dumps({"text": f"{file} {i}", "label": int(i % 3 == 0)}) for i in range(n)]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(report_attacks, "HARD_ROWS", 50)
    sets = hard_benign(tmp_path, ())
    assert {s.name: len(s.rows) for s in sets} == {"llm_safeguard_pairs": 20, "toxicchat_train": 30}
    assert all(r.label == 0 for s in sets for r in s.rows)
    assert [s.name for s in hard_benign(tmp_path, ("llm_safeguard_pairs",))] == ["toxicchat_train"]


# --- the needle -------------------------------------------------------------------------------------------------------


def test_a_document_has_so_many_tokens_and_is_the_same_each_time(judge):
    texts = [words(i, 12) for i in range(5)]
    one = document(judge, texts, 300, 7)
    assert len(judge.model.tokenizer(one, add_special_tokens=False)["input_ids"]) == 300
    assert one == document(judge, texts, 300, 7) != document(judge, texts, 300, 8)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_the_needle_is_a_paragraph_of_its_own(place):
    whole = "one two three four"
    found = hide("NEEDLE", whole, place)
    assert "NEEDLE" in found.split("\n\n")
    assert " ".join(p for p in found.split("\n\n") if p != "NEEDLE") == whole
    before = found.partition("NEEDLE")[0].split()
    assert before == {0.0: [], 0.5: ["one", "two", "three"], 1.0: ["one", "two", "three", "four"]}[place]


def test_a_text_without_a_blank_has_its_needle_at_the_end():
    assert hide("n", "oneword", 0.5) == "oneword\n\nn"


def test_misses_by_length_and_place(judge, star_probe, monkeypatch):
    """The highest token is never missed, wherever it is; a length that the model can't read is left out."""
    monkeypatch.setattr(report_attacks, "DOCUMENTS", 3)
    ticked = []
    harmful = [f"{words(i)} *** {words(-i)}" for i in range(3)]
    table = needle_table(judge, star_probe[1] + 1e-6, [words(i, 12) for i in range(9)], harmful, ticked.append)
    assert [entry["tokens"] for entry in table] == [500] and sum(ticked) == 9
    assert {place: m["value"] for place, m in table[0]["miss"].items()} == {"start": 0.0, "middle": 0.0, "end": 0.0}
    assert table[0]["miss"]["start"]["high"] > 0.5 and table[0]["fpr"]["n"] == 3


def test_a_mean_over_a_long_text_misses_the_needle(judge):
    diluted = Judge(judge.model, judge.probe, Aggregation("mean"), Aggregation("max"))
    texts, harmful = [words(i, 12) for i in range(9)], [f"{words(1)} * {words(2)}"]
    at = {name: Judge(judge.model, judge.probe, Aggregation(name), Aggregation("max")) for name in ("max", "mean")}
    whole = hide(harmful[0], document(diluted, texts, 500, 0), 0.5)
    from training.report.scores import score_conversations
    from training.transforms import user

    highest, mean = (float(score_conversations(j, [user(whole)], 1)[0]) for j in at.values())
    assert np.isfinite(mean) and mean < highest - 1
