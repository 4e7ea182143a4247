"""The HTTP contract, with the embedded engine."""

import time

import pytest
import torch

from monitor.probe import ProbeWeights

from .conftest import LAYER, calibrated

pytest.register_assert_rewrite("tests.contract")

from .contract import BOTH, Contract, Server, zero_probe  # noqa: E402
from .star import fit_star_probe  # noqa: E402


@pytest.fixture(scope="module")
def quiet(tiny):
    """The tiny model with logits so small that a bias decides."""
    with torch.no_grad():
        tiny.module.lm_head.weight.mul_(1e-3)
    yield tiny
    with torch.no_grad():
        tiny.module.lm_head.weight.mul_(1e3)


@pytest.fixture(scope="module")
def star_probe(quiet):
    return fit_star_probe(quiet)


@pytest.fixture
def start(quiet, serve):
    def started(probe, threshold):
        modes = {probe.name: {"prompt": "block", "response": "block"}}
        running = serve(quiet, [(probe, {"calibration": calibrated(threshold)})], modes=modes)

        def idle():
            deadline = time.monotonic() + 20
            while (active := running.engine.describe()["active"]) and time.monotonic() < deadline:
                time.sleep(0.01)
            return not active

        return Server(running.url, quiet, running.engine.live, running.sink, idle)

    return started


@pytest.fixture
def calm(start, random_probe):
    return start(random_probe, 1e6)


@pytest.fixture
def trigger(start, quiet):
    return start(ProbeWeights("trigger", zero_probe(quiet, LAYER), 1.0), 0.0)


@pytest.fixture
def starred(start, star_probe):
    return start(*star_probe)


class TestEmbedded(Contract):
    @BOTH
    def test_errors_have_an_id_too(self, calm, path):
        super().test_errors_have_an_id_too(calm, path)
