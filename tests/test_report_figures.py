"""The figures of a report by value, without a model: sets, curves, lengths, probabilities, and the bars."""

import json
import math

import numpy as np
import pytest

from probes_store.card import Platt
from training.data import Row
from training.metrics import Sample, auroc
from training.report import figures as figures
from training.report import overall as overall
from training.report import view_requests as view
from training.report.answers import by_tokens, compare_with_floors, lengths, words_here
from training.report.figures import At, Judged
from training.report.scores import Scored
from training.report.sets import Exchange, PromptSet, held_back


def judged(name, kind, harmful, harmless, words=True, tokens=20):
    """A set with these values of its harmful and harmless rows; its words are worth nothing."""
    values = np.array([*harmful, *harmless], dtype=float)
    labels = [1] * len(harmful) + [0] * len(harmless)
    rows = [Row("x" * (3 + i % 7), y, name, f"{name}{i}") for i, y in enumerate(labels)]
    scored = Scored(values, np.full(len(rows), tokens), {0: np.zeros((len(rows), 2), np.float32)})
    return Judged(PromptSet(name, kind, rows), scored, np.linspace(0, 1, len(rows)) if words else None)


@pytest.fixture
def three():
    """Everyday 0..99, a set that lies 50 higher, harmful ones alone."""
    return [
        judged("everyday", "everyday", [], range(100)),
        judged("both", "held-out", range(60, 160), range(10, 110)),
        judged("alone", "held-out", range(90, 130), []),
    ]


def test_sets_at_one_threshold(three):
    found = figures.of_sets(three, At(98.5, None), None, requests_a_day=1000)
    everyday, both, alone = (found["sets"][name] for name in ("everyday", "both", "alone"))
    assert everyday["fpr"]["value"] == 0.01 and everyday["false_alarms_a_day"]["value"] == pytest.approx(10)
    assert (both["recall"]["value"], both["fpr"]["value"]) == (0.61, 0.11) and both["against"] == "own"
    assert "false_alarms_a_day" not in both and "words" not in both
    assert alone["recall"]["value"] == 31 / 40 and alone["against"] == "everyday" and "fpr" not in alone
    wanted = Sample.of([*range(90, 130), *range(100)], [1] * 40 + [0] * 100)
    assert alone["auroc"]["value"] == float(auroc(*wanted.masses()))
    assert both["beats"]["words"]["value"] == pytest.approx(both["auroc"]["value"] - both["floors"]["words"]["value"])
    assert found["controls"] == {}


def test_mean_and_lowest_are_over_sets_that_were_held_out(three):
    macro = figures.of_sets(three, At(98.5, None), None, 1)["macro"]
    assert macro["recall"] == {"mean": (0.61 + 31 / 40) / 2, "minimum": 0.61, "worst": "both", "sets": 2}
    assert macro["fpr"] == {"mean": pytest.approx(0.06), "maximum": 0.11, "worst": "both"}


def test_the_text_floor_has_a_threshold_of_its_own(three):
    found = figures.of_sets(three, At(98.5, 0.75), None, 1)["sets"]["both"]["words"]
    assert found["recall"]["value"] == 0.0 and found["fpr"]["value"] == 0.5


def test_a_missing_value_is_left_out_and_counted(three):
    three[1].scored.values[0] = np.nan
    entry = figures.of_sets(three, At(98.5, None), None, 1)["sets"]["both"]
    assert entry["unmonitored"] == 1 and entry["recall"]["n"] == 99


def test_look_alikes_are_all_harmless_rows_that_are_not_everyday(three):
    found = overall.hard_benign([*three, judged("mitre", "look-alikes", [], [200] * 100)], 98.5)
    assert found["sets"] == {"both": 100, "mitre": 100}
    assert found["fpr"]["value"] == (11 + 100) / 200 and found["fpr"]["n"] == 200
    assert overall.hard_benign(three[:1], 98.5) == {}


def test_the_rate_by_length_has_every_row_in_one_bucket():
    short, long = judged("s", "everyday", [], range(100), tokens=16), judged("l", "everyday", [], [99] * 50, tokens=17)
    found = overall.by_length(figures.joined([short, long]), 98.5)
    assert [(b["up_to"], b["fpr"]["n"], b["fpr"]["value"]) for b in found] == [(16, 100, 0.01), (32, 50, 1.0)]


def test_the_rate_by_length_at_thresholds_by_length(three, card):
    short, long = judged("s", "everyday", [], range(100), tokens=16), judged("l", "everyday", [], [99] * 50, tokens=17)
    rows, levels = figures.joined([short, long]), ((16, 89.5), (20, 99.0))
    found = overall.by_length(rows, 98.5, levels)
    assert [(b["up_to"], b["fpr"]["value"]) for b in found] == [(16, 0.1), (32, 0.0)]
    assert overall.by_length(rows, 98.5, ((8, 0.0), (10, 99.0)))[0]["fpr"]["value"] == 0.0, "longer ones have the last"
    both = overall.over_all(three, At(98.5, None, ((32, 49.5),)), card)["by_length"]
    assert both["everyday"][0]["fpr"]["value"] == 0.01
    assert both["everyday, thresholds by length"][0]["fpr"]["value"] == 0.5
    assert "everyday, thresholds by length" not in overall.over_all(three, At(98.5, None), card)["by_length"]


def test_three_ways_to_a_probability_stand_side_by_side(card):
    ways = {name: {"brier": i / 10, "ece": i / 100} for i, name in enumerate(("logit", "platt", "isotonic"), 1)}
    own = {"platt": True, "brier": 0.4, "ece": 0.04}
    shown = str(view._probabilities({"calibration": own | {"ways": ways}}))
    assert all(text in shown for text in ("isotonic, fitted on other fifths", "as served", "0.300", "0.040"))
    assert "as served" not in str(view._probabilities({"calibration": {"ways": ways}}))
    assert view._probabilities({"calibration": {}}) == "" == view._probabilities({})


def test_all_four_probabilities_are_compared_on_the_same_new_rows(card):
    """The rows held back are easy, and Platt's line was fitted to them: no figure on probabilities may hold them."""
    chance = np.random.default_rng(0)
    new = judged("new", "held-out", chance.normal(1, 2, 600), chance.normal(-1, 2, 600))
    held = judged("unseen harmful", "unseen", [50] * 900, []), judged("everyday", "everyday", [], [-50] * 900)
    card = card.model_copy(update={"platt": Platt(slope=1, intercept=0, n=9, positive=3)})
    found = overall.over_all([new, *held], At(0.5, None), card)
    own = found["calibration"]
    assert own["n"] == 1200 and own["brier"] == pytest.approx(own["ways"]["logit"]["brier"]) and own["brier"] > 0.1
    assert "calibration" not in found["pooled"]


def test_without_a_new_set_nothing_is_said_of_probabilities(three, card):
    found = overall.over_all(three[:1], At(98.5, None), card)
    assert found["calibration"] == {} and found["pooled"]["harmless"] == 100
    assert overall.over_all([judged("a", "attack", [1, 2], [])], At(98.5, None), card) == {}


def test_the_roc_is_recall_at_a_share_of_everyday_requests(three, card):
    found = overall.over_all(three, At(98.5, None), card)["roc"]
    assert set(found) == {"both", "alone"}
    rates, recall = zip(*found["alone"], strict=True)
    assert rates[0] == 0.01 and rates[-1] == 1.0 and recall[-1] == 1.0
    assert recall[0] == 31 / 40  # above the second highest everyday value, 98
    assert list(recall) == sorted(recall)


def test_probabilities_are_the_cards(three, card):
    rows = figures.joined(three)
    found = overall.calibration(rows, card.model_copy(update={"platt": Platt(slope=1, intercept=-80, n=9, positive=3)}))
    p = np.array([1 / (1 + math.exp(-max(-60, min(60, v - 80)))) for v in rows.values])
    assert found["platt"] and found["brier"] == pytest.approx(((p - rows.labels) ** 2).mean())
    assert len(found["bins"]) == 10 and found["bins"][0]["said"] < 1e-6 < 0.99 < found["bins"][-1]["said"]
    assert sum(b["seen"] for b in found["bins"]) == pytest.approx(10 * rows.labels.mean(), abs=0.5)
    few = overall.calibration(figures.joined([judged("few", "held-out", [1, 2], [0])]), card)
    assert few["ece"] is None and "147 more are needed" in few["refused"] and not few["platt"]


def test_shares_of_the_histogram_sum_to_one(three, card):
    found = overall.over_all(three, At(98.5, None), card)["histogram"]
    assert {name: round(sum(s), 6) for name, s in found["shares"].items()} == {
        "everyday": 1, "look-alikes": 1, "harmful": 1,
    }  # fmt: skip
    assert len(found["edges"]) == 41 and found["threshold"] == 98.5


def test_bars_are_met_missed_or_not_measured(three):
    sets = {
        "jailbreakbench": {"auroc": {"value": 0.9}},
        "xstest": {"auroc": {"value": 0.8999}, "fpr": {"value": 0.1}},
        "mitre_frr": {"fpr": {"value": 0.051}},
    }
    answers = {"resp_xstest": {"beats": {"words": {"low": 0.0}}}}
    found = figures.bars({"sets": sets, "answers": answers, "controls": {"shuffled": 0.449}})
    assert [bar["met"] for bar in found] == [True, False, None, False, True, None, None, None, False, False]
    assert all(bar["met"] is None for bar in figures.bars({}))
    (bar,) = [b for b in figures.bars({"left_out": {"pooled": {"auroc": 0.91}}}) if b["met"] is not None]
    assert bar["what"].startswith("data sets left out") and bar["met"]


def test_held_back_rows_are_everyday_look_alikes_or_harmful():
    rows = [
        Row("a", 0, "dolly", "1", key="dolly"),
        Row("b", 0, "coconot_safety", "2", key="coconot_safety"),
        Row("c", 0, "midstream-pairs", "3", key="pairs"),
        Row("d", 1, "advbench", "4", key="advbench"),
    ]
    found = {s.name: [r.text for r in s.rows] for s in held_back(rows)}
    assert found == {"everyday": ["a"], "unseen look-alikes": ["b", "c"], "unseen harmful": ["d"]}
    assert [s.name for s in held_back(rows[:1])] == ["everyday"]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_recall_against_the_tokens_that_were_seen():
    running = [
        np.array([0.0, 2.0]),
        np.array([0.0] * 9 + [2.0]),
        np.array([0.0]),
        np.array([1.0, 1.0, 2.0]),
        np.zeros(0),
    ]
    found = by_tokens(running, [1, 1, 1, 0, 0], threshold=1.0)
    at = dict(zip(found["tokens"], zip(found["recall"], found["fpr"], strict=True), strict=True))
    assert at[1] == (0, 0) and at[2] == (1 / 3, 0) and at[4] == (1 / 3, 0.5)
    assert at[8] == (1 / 3, 0.5) and at[16] == at[512] == (2 / 3, 0.5)
    assert found["first"] == {"median": 6.0, "p90": 9.2}
    assert by_tokens([np.zeros(3)], [1], 1.0)["first"] == {} and by_tokens([np.zeros(3)], [1], 1.0)["fpr"] == []


def test_length_counts_whichever_way_round():
    texts = ["x" * n for n in (9, 8, 1, 2)]
    assert lengths(texts, [1, 1, 0, 0]).tolist() == [9, 8, 1, 2]
    assert lengths(texts, [0, 0, 1, 1]).tolist() == [-9, -8, -1, -2]


def test_what_the_rows_cannot_support_is_left_out():
    few = compare_with_floors(np.arange(4.0), [0, 0, 1, 1], list("abcd"), {"words": np.zeros(4)})
    assert few == {"floors": {}, "beats": {}}


def test_words_of_the_other_answers_tell_what_a_set_gives_away():
    exchanges = [
        Exchange("q", f"{'sure here is' if i % 2 else 'sorry I can not'} {i}", i % 2, str(i)) for i in range(60)
    ]
    values = words_here(exchanges)
    assert min(values[1::2]) > max(values[::2])
    assert words_here([Exchange("q", "a", 0, "1"), Exchange("q", "b", 0, "2")]) is None


@pytest.fixture
def card(tiny, random_probe):
    from .conftest import make_card

    return make_card(tiny, random_probe)


def test_everything_is_json(three, card):
    found = figures.of_sets(three, At(98.5, 0.5), None, 1) | overall.over_all(three, At(98.5, 0.5), card)
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
