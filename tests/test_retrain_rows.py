"""What a candidate is fitted, calibrated and judged on: each request once, no row of the frozen set, no file twice."""

import shutil

import pytest
from rich.console import Console

from monitor.errors import ConfigInvalid
from monitor.traffic import add_label
from probes_store.calibration import Calibration
from probes_store.promote import pin
from training.frozen import frozen_rows
from training.load import read_rows
from training.recipe import Recipe
from training.retrain.beside import Beside
from training.retrain.gather import gather
from training.retrain.run import Asked, retrain
from training.retrain.said import draw_said
from training.retrain.traffic import read_traffic

from .stored import make_card
from .test_log_text import KEY
from .traffic_made import HARMFUL, HARMLESS, MODEL, NAME, World, texts

ONE = Calibration.fit([float(i) for i in range(300)], "made up")


@pytest.fixture
def world(tiny, tmp_path):
    return World(tiny, tmp_path)


@pytest.fixture
def heard(tiny, tmp_path):
    """As behind an upstream: texts are kept, and no features."""
    return World(tiny, tmp_path, log_text=True, log_key=KEY)


def published(world, **changes):
    """The probe once more, with another card."""
    live = world.store.load(MODEL, NAME, "v1")
    return world.store.publish(live.card.model_copy(update=changes), live.weight, live.bias)


def given(world, frozen=()):
    live = world.store.load(MODEL, NAME, "v1")
    texts_too = world.settings.log_key is not None
    traffic = read_traffic(world.settings.log, world.settings.features, live.card, 0.0, texts_too)
    return gather(world.settings, (), live, traffic, world.reader, frozen, Console(stderr=True))


# --- what is gone on from -------------------------------------------------------------------------------------------


def test_a_probe_of_answers_is_not_made_one_of_prompts(world):
    published(world, calibration={"chat": {"response": ONE}})
    world.serve(texts(30, 8), HARMLESS)
    world.serve(texts(30, 9, "%"), HARMFUL, reason="flagged")
    with pytest.raises(ConfigInvalid, match=r"judges answers, .* midstream train --recipe"):
        retrain(world.settings, Asked(NAME, target=0.05), print)


def test_a_damaged_version_is_passed_over(world):
    pin(world.store, MODEL, NAME)
    damaged = published(world)
    (damaged / "card.json").write_text("")
    world.serve(texts(30, 8), HARMLESS)
    world.serve(texts(30, 9, "%"), HARMFUL, reason="flagged")
    assert retrain(world.settings, Asked(NAME, target=0.05), print) == 12
    assert world.store.load(MODEL, NAME, "v3").card.retrained["from"] == "v1"


@pytest.mark.parametrize(
    ("used", "says"),
    [
        ({}, "was fitted on frozen"),
        ({"fit": 300, "test": 100}, "was fitted on frozen"),
        ({"fit": 0, "calibrate": 1, "test": 399}, "was fitted on frozen"),
        ({"test": 480}, "nothing was labelled"),
        ({"fit": 0, "calibrate": 0, "test": 480}, "nothing was labelled"),
    ],
)
def test_a_file_of_the_recipe_is_no_frozen_set_unless_all_of_it_was_held_out(world, used, says):
    """The gate has its rows; here all of a file is judged on."""
    world.serve(texts(1, 7))
    frozen = world.frozen()
    recipe = Recipe(sources=({"file": "frozen.jsonl", "test": 0.2},)).model_dump(mode="json")
    own = read_rows(frozen[0])[1].model_copy(update={"used": used})
    published(world, data=(own,), fit={"recipe": recipe})
    with pytest.raises(ConfigInvalid, match=says):
        retrain(world.settings, Asked(NAME, frozen=frozen, target=0.05), print)


# --- labelled rows --------------------------------------------------------------------------------------------------


def test_rows_of_the_frozen_set_take_nothing_from_the_balance_of_the_others(world):
    frozen, _ = frozen_rows(world.frozen())
    known = texts(80, 101, "%#")[:30]
    world.serve(texts(20, 8), HARMLESS)
    world.serve([*known, *known[:1] * 40], HARMFUL, reason="flagged")
    world.serve(texts(10, 9, "%"), HARMFUL, reason="flagged")
    found = given(world, frozen)
    assert found.weights[found.y == 1].sum() == pytest.approx(found.weights[found.y == 0].sum()) == pytest.approx(15)
    assert (found.counts["in_frozen"], found.counts["counted"], (found.weights > 0).sum()) == (70, 30, 30)


# --- everyday rows --------------------------------------------------------------------------------------------------


def test_a_request_with_several_choices_is_one_everyday_row(world):
    """Its choices share a prompt: four of them certify no more than one."""
    world.serve(texts(30, 7), choices=4)
    called = world.serve(texts(10, 8), HARMLESS, choices=4)
    world.serve(texts(10, 9, "%"), HARMFUL, reason="flagged", choices=4)
    for request_id in called[:5]:
        add_label(world.settings.log, request_id, 2, HARMLESS, "another", lambda: 3e9)
    found = given(world)
    assert (len(found.everyday), len(found.y)) == (30, 25)
    assert (found.sampled & (found.y == 0)).sum() == 10 and found.counts["everyday"] == 40


def test_where_texts_are_kept_and_no_features_they_are_read_and_certify(heard):
    heard.say(texts(420, 7))
    heard.say(texts(60, 8), HARMLESS)
    heard.say(texts(60, 9, "%") + texts(20, 10, "#"), HARMFUL)
    retrain(heard.settings, Asked(NAME, frozen=heard.frozen(), target=0.05), print)
    card = heard.store.load(MODEL, NAME, "v2").card
    counts = card.retrained
    assert (counts["from_texts"], counts["unread"], counts["labels"], counts["everyday"]) == (140, 0, 140, 480)
    assert card.calibration["chat"]["prompt"].n == 480
    assert card.metrics["gate"]["against"] == "v1"  # it was judged, and not for want of rows


def test_the_everyday_rows_of_texts_are_a_bounded_sample_of_requests(heard):
    heard.say(texts(50, 7), choices=3)
    whole = draw_said(heard.settings)
    assert {choice for _, choice in whole} == {0} and len({name for name, _ in whole}) == len(whole) == 50
    assert draw_said(heard.settings, 20) == whole[:20] and sorted(whole) != whole
    heard.say(texts(5, 8), HARMLESS, choices=3)
    heard.say(texts(5, 9, "%"), HARMFUL, choices=3)
    found = given(heard)
    assert (len(found.everyday), found.sampled.sum(), found.counts["everyday"]) == (50, 10, 55)


def test_without_features_and_texts_it_says_what_to_set(heard):
    heard.serve(texts(3, 8), HARMLESS)
    shutil.rmtree(heard.settings.features)
    with pytest.raises(ConfigInvalid, match=r"no features at .* no texts in the log; set MIDSTREAM_LOG_FEATURES or"):
        given(heard)


# --- beside prompts -------------------------------------------------------------------------------------------------


class Fewer(Beside):
    """lost: answers that were empty"""

    lost = 0

    def _answers(self, texts):
        return [float(i) for i in range(len(texts) - self.lost)]

    def _raw(self, texts):
        return [float(i) for i in range(len(texts))]


class OneLost(Fewer):
    lost = 1


class ManyLost(Fewer):
    lost = 9


def test_an_empty_answer_costs_no_calibration():
    live = make_card(calibration={"chat": {"prompt": ONE, "response": ONE}, "raw": {"prompt": ONE}})
    some = [f"text {i}" for i in range(100)]

    def calibrated(kind, texts=some):
        found, missing = kind(None, None, {}, None, 0.05, Console(stderr=True)).calibrate(live, texts)
        return {(form, str(phase)): one.n for form, phases in found.items() for phase, one in phases.items()}, missing

    assert calibrated(OneLost) == ({("chat", "response"): 61, ("raw", "prompt"): 100}, "")
    assert calibrated(Fewer, some[:59]) == ({("chat", "response"): 59, ("raw", "prompt"): 59}, "")
    found, missing = calibrated(ManyLost)
    assert found == {("raw", "prompt"): 100} and "53 values of chat responses are too few" in missing
