"""Thresholds by length (Mondrian): each certified by prompts of its lengths alone, and what a served prompt meets."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from monitor.errors import ConfigInvalid
from monitor.policy.file import load_policy
from monitor.policy.resolve import resolve
from monitor.sequence import Watch
from monitor.types import Mode, Phase
from probes_store.calibration import DELTA, Bucket, Calibration, rows_needed
from probes_store.store import Store

from .steps import generate, prompt, rule
from .test_cli import run, state  # noqa: F401

MODEL, NAME = "smollm2-135m-instruct", "harmful-intent"


def drawn(sizes, seed=0):
    """Values of so many prompts of each length; the longer, the higher, as a maximum's are."""
    random = np.random.default_rng(seed)
    lengths = [n for n, size in sizes.items() for _ in range(size)]
    return (random.random(len(lengths)) + np.log2(lengths)).tolist(), lengths


def fitted(sizes, seed=0, **more):
    values, lengths = drawn(sizes, seed)
    return Calibration.fit(values, "made up", lengths=lengths, **more)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_each_bucket_has_the_threshold_of_its_rows_alone():
    found = fitted({20: 400, 60: 300, 200: 1000})
    values, lengths = drawn({20: 400, 60: 300, 200: 1000})
    assert [b.up_to for b in found.buckets] == [32, 64, 256] and [b.n for b in found.buckets] == [400, 300, 1000]
    for up_to, threshold in found.by_length(0.01):
        mine = [v for v, n in zip(values, lengths, strict=True) if up_to / 2 < n <= up_to]
        assert threshold == Calibration.fit(mine, "these alone").threshold(0.01)
    assert len(found.by_length(0.01)) == 3


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.sampled_from([0.01, 0.02, 0.05]), st.integers(0, 99))
def test_buckets_with_too_few_rows_are_joined_with_neighbours(sizes, alpha, seed):
    sizes = {2 ** (3 + i): size for i, size in enumerate(sizes)}
    found, total = fitted(sizes, seed), sum(sizes.values())
    values, lengths = drawn(sizes, seed)
    if total < rows_needed(alpha):
        with pytest.raises(ValueError, match="more are needed"):
            found.by_length(alpha)
        return
    try:
        levels = found.by_length(alpha)
    except ValueError as error:
        assert "the card keeps" in str(error)  # joined tails of unlike buckets are short
        return
    assert levels[-1][0] == max(sizes), "every length that there are rows of has a threshold"
    shortest = 0
    for up_to, threshold in levels:
        mine = [v for v, n in zip(values, lengths, strict=True) if shortest < n <= up_to]
        assert len(mine) >= rows_needed(alpha)
        assert threshold == Calibration.fit(mine, "x", max_alpha=1.0).threshold(alpha)
        assert found.between(shortest, up_to).rate(threshold) <= alpha + 1e-6
        shortest = up_to


def test_one_threshold_flags_the_long_ones_and_thresholds_by_length_do_not():
    """The realised rate of each length is above the stated one at most as often as stated: 200 samples."""
    sizes, alpha = {20: 2700, 200: 300}, 0.01
    broken = {"one": 0, "by length": 0}
    for seed in range(200):
        found = fitted(sizes, seed)
        # A value is uniform on [log2 n, log2 n + 1): its rate above t is known exactly.
        rates = {n: lambda t, n=n: float(np.clip(np.log2(n) + 1 - t, 0, 1)) for n in sizes}
        broken["one"] += rates[200](found.threshold(alpha)) > alpha
        broken["by length"] += rates[200](dict(found.by_length(alpha))[256]) > alpha
    assert broken["one"] == 200
    assert broken["by length"] <= stats.binom.ppf(0.999, 200, DELTA)


def test_lengths_are_optional_and_an_older_card_refuses_with_the_remedy():
    older = Calibration.fit([float(i) for i in range(400)], "x")
    assert older.buckets == ()
    with pytest.raises(ValueError, match="train it again"):
        older.by_length(0.01)
    with pytest.raises(ValueError, match="no benign request has more than 64"):
        fitted({20: 400}).between(64, 128)
    with pytest.raises(ValueError, match="3 values and 2 lengths"):
        Calibration.fit([1.0, 2.0, 3.0], "x", lengths=[1, 2])


def test_a_card_keeps_them():
    found = fitted({1: 40, 20: 400})
    again = Calibration.model_validate_json(found.model_dump_json())
    assert again == found and again.by_length(0.01) == found.by_length(0.01)


@pytest.mark.parametrize(
    "buckets",
    [
        [Bucket(n=3, tail=(1.0,), up_to=8)],
        [Bucket(n=2, tail=(1.0,), up_to=8), Bucket(n=2, tail=(1.0,), up_to=8)],
        [Bucket(n=2, tail=(1.0,), up_to=16), Bucket(n=2, tail=(1.0,), up_to=8)],
    ],
)
def test_buckets_that_do_not_fit_are_refused(buckets):
    with pytest.raises(ValueError, match="buckets must ascend"):
        Calibration(n=4, tail=(1.0,), source="x", buckets=tuple(buckets))
    with pytest.raises(ValueError, match="descending"):
        Bucket(n=2, tail=(1.0, 2.0), up_to=8)


# --- the rule ---------------------------------------------------------------------------------------------------------

LEVELS = ((4, 1.0), (8, 3.0))


def test_a_prompt_meets_the_threshold_of_its_length():
    one = rule(Phase.PROMPT, threshold=9.0, by_length=LEVELS)
    assert [one.at(n).threshold for n in (1, 4, 5, 8, 9, 10_000)] == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0]
    assert rule(Phase.PROMPT).at(4) == rule(Phase.PROMPT)


@pytest.mark.parametrize(("n", "value", "blocked"), [(4, 2.0, True), (6, 2.0, False), (6, 4.0, True), (12, 2.0, False)])
def test_a_sequence_is_judged_by_it_and_says_so(n, value, blocked):
    watch = Watch(prompt(n), [rule(Phase.PROMPT, threshold=9.0, by_length=LEVELS), rule(Phase.RESPONSE)])
    judged = generate(watch, np.full((n + 3, 1), value, np.float32), 3)
    assert judged[-1].finish == ("content_filter" if blocked else "length")
    (reading,) = watch.readings(Phase.PROMPT)
    assert reading.threshold == (1.0 if n <= 4 else 3.0)
    assert watch.readings(Phase.RESPONSE)[0].threshold == 5.0


def test_a_band_must_lie_below_all_of_them():
    with pytest.raises(ValueError, match=r"must lie below the threshold \(1\.0\)"):
        rule(Phase.PROMPT, threshold=9.0, by_length=LEVELS, escalate=2.0)
    assert rule(Phase.PROMPT, threshold=9.0, by_length=LEVELS, escalate=0.5).at(5).escalate == 0.5


# --- the policy file --------------------------------------------------------------------------------------------------


@pytest.fixture
def stored():
    """The shipped probe, with lengths in its card."""
    probe = Store().load(MODEL, NAME, "v1")
    chat = probe.card.calibration["chat"] | {"prompt": fitted({20: 700, 200: 700})}
    return type(probe)(
        **{
            name: getattr(probe, name)
            if name != "card"
            else probe.card.model_copy(update={"calibration": {"chat": chat}})
            for name in probe.__slots__
        }
    )


def policy(path, **phases):
    path.write_text(json.dumps({"probes": {NAME: phases}}))
    return load_policy(path)


def test_a_policy_asks_for_them(stored, tmp_path):
    file = policy(tmp_path / "policy.yaml", prompt={"by_length": True, "mode": "block", "target_fpr": 0.01})
    (found,) = [r for r in resolve([stored], file)["default"].rules["chat"] if r.phase is Phase.PROMPT]
    assert found.by_length == stored.card.calibration["chat"]["prompt"].by_length(0.01) and found.mode is Mode.BLOCK
    raw = resolve([stored], file)["default"].rules["raw"]
    assert {r.mode for r in raw} == {Mode.SHADOW} and {r.by_length for r in raw} == {()}


def test_a_card_without_lengths_is_refused_with_the_remedy(tmp_path):
    probe = Store().load(MODEL, NAME, "v1")
    assert not probe.card.calibration["chat"]["prompt"].buckets
    file = policy(tmp_path / "policy.yaml", prompt={"by_length": True, "mode": "block"})
    with pytest.raises(ConfigInvalid, match="knows no lengths"):
        resolve([probe], file)


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ({"prompt": {"by_length": True, "threshold": 1.0}}, "give threshold or by_length, not both"),
        ({"response": {"by_length": True}}, "by_length belongs to `prompt`"),
    ],
)
def test_what_it_cannot_mean_is_refused(phases, said, tmp_path):
    with pytest.raises(ConfigInvalid, match=re.escape(said)):
        policy(tmp_path / "policy.yaml", **phases)


def test_an_override_by_value_replaces_it(stored, tmp_path):
    path = tmp_path / "policy.yaml"
    other = {"name": "x", "when": {"key": ["a"]}, "probes": {NAME: {"prompt": {"threshold": 3.5}}}}
    path.write_text(json.dumps({"probes": {NAME: {"prompt": {"by_length": True}}}, "overrides": [other]}))
    (found,) = [r for r in resolve([stored], load_policy(path))["x"].rules["chat"] if r.phase is Phase.PROMPT]
    assert (found.threshold, found.by_length) == (3.5, ())


# --- false alarms a day -----------------------------------------------------------------------------------------------


def test_check_says_how_many_false_alarms_a_day_it_may_cost(run, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps({"target_fpr": 0.02}))
    code, out, _ = run("policy", "check", path, "--per-day", "100000", "--json")
    rows = {(r["format"], r["phase"]): r for r in json.loads(out)["rules"]}
    assert code == 0 and 500 < rows["chat", "prompt"]["false_alarms_a_day"] <= 1000.1
    assert rows["raw", "response"]["false_alarms_a_day"] is None
    shown = f"{rows['chat', 'prompt']['false_alarms_a_day']:,.0f}"
    assert shown in run("policy", "check", path, "--per-day", "100000")[1]
    assert shown not in run("policy", "check", path)[1]
