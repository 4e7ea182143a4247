"""Retraining (T24): what was labelled makes a better candidate, poison does not, and nothing promotes itself."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from monitor.cli.retrain import seconds
from monitor.errors import ConfigInvalid
from monitor.traffic import Cipher, Said, TrafficLog, add_label
from monitor.traffic.features import Feature
from monitor.types import Action, Phase
from probes_store.base import Base, load_base
from training.fit import Scaler
from training.load import read_rows
from training.retrain.candidate import make, start_of
from training.retrain.posterior import curvature, fit_posterior
from training.retrain.run import Asked, retrain
from training.retrain.traffic import uniform
from training.retrain.weighing import CLIP, _level, leaked, weigh

from .conftest import LAYER
from .test_log_text import KEY
from .test_records import record
from .traffic_made import HARMFUL, HARMLESS, MODEL, NAME, World, texts

ENOUGH = 2600  # frozen benign rows, for the gate to be sure of a rate of 3 %
PLAIN = Scaler(np.zeros(16), np.ones(16))


@pytest.fixture
def world(tiny, tmp_path):
    return World(tiny, tmp_path)


def asked(world, benign=400, **changes):
    return Asked(NAME, frozen=world.frozen(benign), target=0.05, **changes)


def everyday(world, n=420):
    """What a server saw: n harmless requests, none of them labelled, then labels of both kinds."""
    world.serve(texts(n, 7), q=0.5)
    world.serve(texts(60, 8), HARMLESS)
    world.serve(texts(60, 9, "%"), HARMFUL, reason="flagged")
    world.serve(texts(20, 10, "#"), HARMFUL, reason="flagged")


# --- the whole ------------------------------------------------------------------------------------------------------


def test_labels_make_a_candidate_that_the_gate_has_judged(world):
    everyday(world, 1500)  # of fewer rows a certified threshold lies further above what the rate needs
    notes = []
    code = retrain(world.settings, asked(world, ENOUGH), notes.append)
    new = world.store.load(MODEL, NAME, "v2")
    gate, counts = new.card.metrics["gate"], new.card.retrained
    checks = {c["name"]: c for c in gate["checks"]}
    print(
        f"\n{gate['verdict']}: " + "; ".join(f"{n} {c['figure'] and c['figure']['value']}" for n, c in checks.items())
    )
    assert (code, gate["verdict"], gate["against"]) == (gate["exit_code"], "PASS", "v1")
    assert checks["AUROC - live's"]["figure"]["low"] > 0  # what it could not know before
    assert (counts["from"], counts["labels"], counts["harmful"], counts["everyday"]) == ("v1", 140, 80, 1560)
    assert (counts["copies"], counts["in_frozen"], counts["unread"], counts["tenants"]) == (0, 0, 0, 25)
    assert new.card.calibration["chat"]["prompt"].n == 1560
    # What the live one is calibrated for beside it, on harmless rows of the frozen set: of answers 59, which it takes,
    # and three to spare.
    assert (new.card.calibration["chat"]["response"].n, new.card.calibration["raw"]["prompt"].n) == (62, ENOUGH)
    base, before = load_base(new), load_base(world.store.load(MODEL, NAME, "v1"))
    assert (base.rows(0), base.rows(1)) == (before.rows(0) + 60, before.rows(1) + 80)
    # Nothing promotes itself: it is the candidate.
    assert world.store.live(MODEL) == {NAME: "v1"} and world.store.candidates(MODEL) == {NAME: "v2"}
    assert [n.split(": ")[1].split(" ")[0] for n in notes] == ["started", "labels", "gate", "published", "v2"]
    with pytest.raises(ConfigInvalid, match="nothing was labelled since"):
        retrain(world.settings, asked(world), notes.append)


def test_it_promotes_only_when_it_is_told_to_and_passes(world):
    everyday(world, 1500)
    assert retrain(world.settings, asked(world, ENOUGH, promote=True), print) == 0
    assert world.store.live(MODEL) == {NAME: "v2"} and world.store.candidates(MODEL) == {}


def test_too_little_everyday_traffic_certifies_nothing(world):
    world.serve(texts(30, 8), HARMLESS)
    world.serve(texts(30, 9, "%"), HARMFUL, reason="flagged")
    assert retrain(world.settings, asked(world, promote=True), print) == 12
    gate = world.store.load(MODEL, NAME, "v2").card.metrics["gate"]
    assert gate["verdict"] == "INCONCLUSIVE" and "29 more rows of everyday traffic" in gate["note"]
    assert world.store.live(MODEL) == {NAME: "v1"}


def test_without_labels_features_or_one_kind_there_is_nothing_to_train_on(world):
    world.serve(texts(30, 7))
    with pytest.raises(ConfigInvalid, match="nothing was labelled since"):
        retrain(world.settings, asked(world), print)
    world.serve(texts(30, 8), HARMLESS)
    with pytest.raises(ConfigInvalid, match="no labelled request that counts is harmful"):
        retrain(world.settings, asked(world), print)
    assert list(world.store.versions(MODEL, NAME)) == ["v1"]


def test_kept_texts_are_read_where_there_are_no_features(tiny, tmp_path):
    world = World(tiny, tmp_path, log_text=True, log_key=KEY)
    everyday(world)
    log = TrafficLog(world.settings.records, 10**6, 10**6, lambda n: None, cipher=Cipher(KEY))
    bodies = [{"messages": [{"role": "user", "content": t}]} for t in texts(20, 50, "%")]
    bodies += [{"prompt": [t, t]} for t in texts(10, 51, "%")] + [{"messages": []}]
    for i, body in enumerate(bodies):
        log.put(replace(record(f"t{i}", verdict=Action.FLAG), created=1e9))
        log.say(Said(f"t{i}", body, {0: "an answer"}))
    log.close()
    for i in range(len(bodies)):
        add_label(world.settings.log, f"t{i}", 0, HARMFUL, "somebody", lambda: 3e9)
    retrain(world.settings, Asked(NAME, target=0.05), print)
    counts = world.store.load(MODEL, NAME, "v2").card.retrained
    assert (counts["from_texts"], counts["unread"], counts["labels"]) == (30, 1, 170)


def test_labels_of_a_candidate_that_nobody_promoted_are_not_lost(world):
    everyday(world)
    retrain(world.settings, Asked(NAME, target=0.05), print)
    world.serve(texts(30, 60, "%"), HARMFUL, reason="flagged")
    retrain(world.settings, Asked(NAME, target=0.05), print)
    counts = world.store.load(MODEL, NAME, "v3").card.retrained
    assert (counts["from"], counts["labels"], counts["everyday"]) == ("v1", 170, 480)


# --- poison ---------------------------------------------------------------------------------------------------------


def judged(world):
    """(exit code, AUROC against the live probe's, counts), None for what was not published."""
    code = retrain(world.settings, asked(world), lambda line: None)
    if code == 11:
        assert list(world.store.versions(MODEL, NAME)) == ["v1"]
        return code, None, None
    card = world.store.load(MODEL, NAME, "v2").card
    checks = {c["name"]: c["figure"] for c in card.metrics["gate"]["checks"]}
    assert world.store.live(MODEL) == {NAME: "v1"}
    return code, checks["AUROC - live's"], card.retrained


def test_five_percent_of_flipped_labels_do_not_make_it_worse(world):
    world.serve(texts(420, 7), q=0.5)
    world.serve(texts(57, 8), HARMLESS)
    world.serve(texts(3, 18), HARMFUL)
    world.serve(texts(76, 9, "%#"), HARMFUL, reason="flagged")
    world.serve(texts(4, 19, "%#"), HARMLESS, reason="flagged")
    code, auroc, _ = judged(world)
    print(f"\n5 % flipped: exit {code}, AUROC against the live probe {auroc}")
    assert code == 11 or auroc["low"] > -0.02


def test_200_near_copies_of_one_tenant_count_once(world):
    everyday(world)
    world.serve([texts(1, 33, "#")[0] + " " * (i % 2) for i in range(200)], HARMLESS, key="mallory")
    code, auroc, counts = judged(world)
    print(f"\n200 near-copies: exit {code}, {counts and counts['copies']} copies, AUROC against the live one {auroc}")
    assert code == 11 or (counts["copies"] >= 198 and auroc["low"] > -0.02)


def test_a_tenant_with_many_different_labels_is_held_to_its_share(world):
    everyday(world)
    world.serve(texts(200, 34, "#"), HARMLESS, key="mallory")
    code, auroc, counts = judged(world)
    print(f"\n200 lies of one tenant: exit {code}, AUROC against the live one {auroc}")
    assert code == 11 or (counts["capped"] == 1 and auroc["low"] > -0.02)


def test_a_file_that_the_live_one_was_retrained_on_is_no_frozen_set(world):
    given = asked(world)
    live = world.store.load(MODEL, NAME, "v1")
    card = live.card.model_copy(update={"data": (read_rows(given.frozen[0])[1],)})
    world.store.publish(card, live.weight, live.bias)
    with pytest.raises(ConfigInvalid, match=r"v2 was fitted on frozen\.jsonl"):
        retrain(world.settings, given, print)


def test_a_conversation_of_the_frozen_set_is_left_out(world):
    everyday(world)
    world.serve(texts(80, 101, "%#")[:7], HARMFUL, reason="flagged")
    _, _, counts = judged(world)
    assert counts["in_frozen"] == 7 and counts["labels"] == 147


def test_ten_runs_give_ten_equal_hashes(world):
    everyday(world)
    found = set()
    for _ in range(10):
        retrain(world.settings, Asked(NAME, target=0.05), lambda line: None)
        newest = world.store.load(MODEL, NAME, "v2")
        found.add((newest.card.sha256, newest.card.base_sha256))
        import shutil

        shutil.rmtree(newest.path)
        (world.store.overlay / "live.json").unlink()
    assert len(found) == 1


# --- its parts ------------------------------------------------------------------------------------------------------


def rows_of(n, seed, d=16):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_copies_count_once_and_contradictions_not_at_all():
    x = np.concatenate([rows_of(4, 0), np.repeat(rows_of(1, 1), 5, axis=0), np.repeat(rows_of(1, 2), 2, axis=0)])
    y = np.array([0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1])
    found = weigh(x, y, np.ones(11), ["a"] * 11, PLAIN, 1.0, 0.0)
    assert (found.copies, found.torn) == (5, 2)
    # Two rows of one label and three of the other weigh the same.
    assert found.weights == pytest.approx([5 / 4, 5 / 6, 5 / 4, 5 / 6, 5 / 6, 0, 0, 0, 0, 0, 0])


def test_a_row_weighs_by_how_rarely_such_a_one_is_kept_up_to_a_bound():
    q = np.array([1.0, 1.0, 0.5, 0.001])
    found = weigh(rows_of(4, 0), np.array([0, 1, 1, 1]), q, ["a"] * 4, PLAIN, 1.0, 0.0).weights
    assert found.sum() == pytest.approx(4) and found[0] == pytest.approx(2)
    assert found[2] / found[1] == pytest.approx(2) and found[3] / found[1] == pytest.approx(CLIP)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 1000), min_size=20, max_size=60))
def test_no_tenant_has_more_than_its_share(sums):
    level = _level(sums, 0.1)
    held = [min(s, level) for s in sums]
    assert max(held) <= 0.1 * sum(held) * (1 + 1e-6)


def test_with_few_tenants_a_share_of_base_and_labels_holds():
    found = weigh(rows_of(50, 0), np.arange(50) % 2, np.ones(50), ["a"] * 45 + ["b"] * 5, PLAIN, 0.1, 100.0)
    assert (found.weights[:45].sum(), found.weights[45:].sum()) == (pytest.approx(0.1 * 150), 5)
    assert found.capped == ("a",)


def test_a_tenant_that_alone_has_a_label_is_held_to_its_share_all_the_same():
    """Attackers are few: what they are held to is not given back to balance the labels."""
    y = np.array([0] * 60 + [1] * 20)
    tenants = [f"t{i % 30}" for i in range(60)] + ["mallory"] * 20
    found = weigh(rows_of(80, 0), y, np.ones(80), tenants, PLAIN, 0.1, 100.0)
    assert found.capped == ("mallory",)
    assert found.weights[60:].sum() == pytest.approx(0.1 * found.weights.sum())


def test_a_row_of_traffic_weighs_in_the_fit_what_was_decided(world):
    """Rows that hardly weigh hardly move the weights."""
    live = world.store.load(MODEL, NAME, "v1")
    start = start_of(live, np.zeros((0, world.tiny.d_model)))
    x = world.features(texts(40, 70) + texts(40, 71, "%"))
    y = np.repeat([0, 1], 40)

    def moved(weight):
        made = make(live, start, x, y, np.full(80, weight), np.zeros(80, bool), x[:0], 0.05)
        return float(np.linalg.norm(made.fitted.weight - start.weight))

    assert moved(1e-9) < 0.01 * moved(1.0)


def test_rows_of_the_frozen_set_are_found():
    x = rows_of(5, 0)
    assert leaked(x, x[[1, 3]] * 2, PLAIN).tolist() == [False, True, False, True, False]
    assert leaked(x, x[:0], PLAIN).tolist() == [False] * 5


def feature(i, reason, rate):
    vectors = np.zeros((1, 2), np.float16)
    return Feature(str(i), 0, "", 0.0, Phase.PROMPT, 1.0, reason, "f", "t", "p", 3, (1,), vectors, rate)


def test_the_uniform_slice_is_thinned_to_the_smallest_rate_flagged_or_not():
    """The rate was raised from 0.1 to 0.4 in the meantime: of what came since, a quarter counts."""
    kept = [feature(f"a{i}", "uniform", 0.1) for i in range(100)] + [feature(f"b{i}", "near", 0.0) for i in range(50)]
    kept += [feature(f"c{i}", "uniform", 0.4) for i in range(2000)]
    kept += [feature(f"d{i}", "flagged", 0.4 if i % 2 else 0.0) for i in range(4000)]
    found = [(f.reason, f.request_id[0]) for f in uniform(kept)]
    assert found.count(("uniform", "a")) == 100 and ("near", "b") not in found
    assert 430 < found.count(("uniform", "c")) < 570 and 430 < found.count(("flagged", "d")) < 570
    assert uniform(kept[100:150]) == []


def test_the_prior_stands_for_the_rows_that_its_moments_are_of():
    """Base rows as moments, then new rows: about the fit of all rows at once, and not that of the new ones alone."""
    random, d = np.random.default_rng(3), 8

    def sample(n, at):
        y = np.arange(n) % 2
        return random.normal(size=(n, d)) + np.outer(y - 0.5, at), y

    old_at, new_at = np.eye(d)[0] * 2, np.eye(d)[1] * 2
    (x0, y0), (x1, y1) = sample(2000, old_at), sample(200, new_at)
    live = LogisticRegression(C=np.inf, tol=1e-8).fit(x0, y0)
    weight, bias = live.coef_[0], float(live.intercept_[0])
    base = Base.of(x0[:, None], (LAYER,), y0)
    precision = curvature(base, (LAYER,), weight, bias, (1000.0, 1000.0))
    found = fit_posterior(x1, y1, np.ones(200), (weight, bias), precision)
    joint = LogisticRegression(C=np.inf, tol=1e-8).fit(np.concatenate([x0, x1]), np.concatenate([y0, y1])).coef_[0]
    alone = LogisticRegression(C=np.inf, tol=1e-8).fit(x1, y1).coef_[0]

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    print(f"\ncosine to the joint fit: {cosine(found.weight, joint):.4f}; live {cosine(weight, joint):.4f}")
    assert cosine(found.weight, joint) > 0.98 > cosine(weight, joint) or cosine(found.weight, joint) > 0.995
    assert cosine(found.weight, joint) > cosine(alone, joint) + 0.2
    nothing = fit_posterior(x1[:0], y1[:0], np.ones(0), (weight, bias), precision)
    np.testing.assert_allclose(nothing.weight, weight)


@pytest.mark.parametrize(("schedule", "wanted"), [("every 24h", 86_400), ("every 5m", 300), ("every 1 d", 86_400)])
def test_a_schedule(schedule, wanted):
    assert seconds(schedule) == wanted


@pytest.mark.parametrize("schedule", ["", "24h", "every 0h", "0 3 * * *", "every 1w"])
def test_a_schedule_of_another_form_is_refused(schedule):
    with pytest.raises(ConfigInvalid, match="cron"):
        seconds(schedule)
