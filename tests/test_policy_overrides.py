"""Overrides of a policy file: the model's names in `when`, completions alone, and the band of a probe that blocks."""

import json
import re

import pytest

from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.live import load_live
from monitor.policy.file import load_policy
from monitor.policy.resolve import resolve
from monitor.types import Caller, Mode, Phase
from probes_store.store import Store

from .conftest import publish
from .test_policy_file import ENDPOINT, NAME, probe, read, rule, shipped  # noqa: F401

BLOCKS = probe(response={"mode": "block", "min_tokens": 4})


def override(when, **more):
    return {"overrides": [{"name": "other", "when": when} | more]}


# --- the model's names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("upstream", "policy"), [(None, "other"), ("http://127.0.0.1:9/v1", "default")])
def test_an_alias_of_the_served_model_is_that_model(tiny, random_probe, tmp_path, upstream, policy):
    """A Caller has the engine's own name, whatever it asked for. An upstream's names are the callers' own."""
    path = tmp_path / "policy.yaml"
    path.write_text(json.dumps(override({"model": ["an-alias", "another"]})))
    publish(tiny, [(random_probe, {})], tmp_path / "store")
    settings = load_settings(store=tmp_path / "store", policy=path, model="an-alias", upstream=upstream)
    live = load_live(tiny.served(), Store(settings.store), settings)
    for one in (live, live.under(load_policy(path)), live.under(live.file)):
        assert one.file.choose(Caller(model=tiny.name)) == policy
        assert one.file.choose(Caller(model="an-alias")) == "other"
        assert one.file.choose(Caller(model="somebody-else")) == "default"


def test_another_models_override_stays_another_models(read):
    file = read(override({"model": ["org/large"]})).serving(("org/small", "small"))
    assert file.choose(Caller(model="org/small")) == "default"
    assert file.serving(()) is file and file.serving(("org/small", "small")) is file


# --- completions alone ------------------------------------------------------------------------------------------------


def test_what_is_asked_for_completions_alone_and_can_not_be_had_is_refused(read, shipped):
    refused = read(override({"route": ["completions"]}, **BLOCKS))
    with pytest.raises(
        ConfigInvalid, match=f"'other' is for completions alone, .* {NAME} v1 can't block in phase resp"
    ):
        resolve(shipped, refused)


@pytest.mark.parametrize(
    "data",
    [
        BLOCKS | override({"route": ["completions"]}, fail_mode="open"),
        override({"route": ["completions"]}, **probe(response={"mode": "shadow"})),
        override({"route": ["completions"]}, **probe(prompt={"mode": "block"})),
        override({"route": ["completions", "chat"]}, **BLOCKS),
        override({"key": ["acme"]}, **BLOCKS),
    ],
    ids=["inherited", "shadow", "can be had", "chats too", "any route"],
)
def test_elsewhere_completions_that_a_card_says_nothing_of_are_shadowed(read, shipped, data):
    assert rule(shipped, read(data), "other", Phase.RESPONSE, "raw").mode is Mode.SHADOW


# --- the band ---------------------------------------------------------------------------------------------------------

ASKS = {"second": ENDPOINT} | probe(prompt={"mode": "block", "escalate_fpr": 0.03})


@pytest.mark.parametrize("mode", ["flag", "shadow"])
def test_a_band_that_nobody_would_be_asked_about_is_refused(read, shipped, mode):
    says = re.escape(f"{NAME} v1 can't escalate in phase prompt: its mode is {mode}")
    own = probe(prompt={"escalate": 0.0, "mode": mode})
    for data in ({"second": ENDPOINT} | own, ASKS | override({"key": ["a"]}, **own)):
        with pytest.raises(ConfigInvalid, match=says):
            resolve(shipped, read(data))


@pytest.mark.parametrize("mode", ["flag", "shadow"])
def test_an_override_that_does_not_block_has_no_use_for_the_band(read, shipped, mode):
    file = read(ASKS | override({"key": ["a"]}, **probe(prompt={"mode": mode})))
    assert rule(shipped, file, "default", Phase.PROMPT).escalate is not None
    other = rule(shipped, file, "other", Phase.PROMPT)
    assert (other.mode, other.escalate) == (mode, None)


def test_a_threshold_and_a_rate_in_one_override_are_refused(read):
    with pytest.raises(ConfigInvalid, match="give threshold or target_fpr, not both"):
        read(override({"key": ["a"]}, **probe(prompt={"threshold": 1.0, "target_fpr": 0.01})))
