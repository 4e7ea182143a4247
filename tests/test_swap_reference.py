"""What lies beside a probe to compare traffic with: read before the probe serves, so that a refused one never does."""

import json

import numpy as np
import pytest

from monitor.config import load_settings
from monitor.errors import ProbeInvalid
from monitor.policy.keeper import PolicyKeeper
from monitor.types import Phase
from probes_store.base import Base

from .both_ports import policy
from .conftest import LAYER, calibrated, make_card
from .test_records import until
from .versions import MODEL, both, choose, live, probe, reloads, rows  # noqa: F401


@pytest.fixture
def based(tiny, both):
    """v4, which blocks and has a base, beside a server that compares; the base's file."""
    both.metrics.shift.watched = True
    one = probe(tiny, 5.0)
    features = np.random.default_rng(1).normal(size=(200, 1, tiny.d_model)).astype(np.float32)
    base = Base.of(features, (LAYER,), np.zeros(200, np.int64))
    card = make_card(tiny, one, calibration=calibrated(0.0))
    return both.store.publish(card, one.weight, one.bias, base.dump()) / "base.safetensors"


def references(both):
    return set(both.metrics.shift._references)


def test_a_set_whose_base_can_not_be_read_is_refused_and_does_not_serve(both, based):
    based.write_bytes(b"another file")
    choose(both, json.dumps({f"{MODEL}/hair": "v4"}))
    until(lambda: reloads(both, "refused") == 1)
    assert live(both) == {"hair": ("v1", "block")} and reloads(both, "loaded") == 0
    assert [row[3][:9] for row in rows(both) if row[1] == "RELOAD"] == ["refused: "]
    assert both.admin("POST", "probes/hair/promote", json={"version": "v4"}).status_code == 422


def test_the_references_come_and_go_with_the_probes(both, based):
    assert both.admin("POST", "probes/hair/promote", json={"version": "v4"}).status_code == 200
    assert references(both) == {("hair", Phase.PROMPT)}
    assert both.admin("POST", "probes/hair/rollback", json={}).status_code == 200
    assert references(both) == set(), "v1 has no base"


def test_a_policy_that_is_read_again_reads_no_base(both, based):
    assert both.admin("POST", "probes/hair/promote", json={"version": "v4"}).status_code == 200
    based.write_bytes(b"another file")
    assert both.ask().status_code == 400
    policy(both.settings.policy, "flag")
    assert both.admin("POST", "policy/reload").json() == {"policy": "flags"}
    assert both.ask().status_code == 200 and references(both) == {("hair", Phase.PROMPT)}


class Unfit:
    """Probes that no policy fits."""

    def under(self, file):
        raise ProbeInvalid("its card is damaged")


def test_a_policy_is_counted_as_refused_whatever_the_reason(tmp_path):
    counted, put = [], []
    settings = load_settings(policy=policy(tmp_path / "policy.yaml", "flag"))
    with pytest.raises(ProbeInvalid):
        PolicyKeeper(settings, Unfit, put.append, counted.append).reload()
    assert (counted, put) == (["refused"], [])
