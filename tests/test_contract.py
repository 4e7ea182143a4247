"""The HTTP contract, with the embedded engine."""

import pytest

from monitor.probe import ProbeWeights

from .conftest import LAYER, calibrated

pytest.register_assert_rewrite("tests.contract")

from .contract import BOTH, Contract, Server, zero_probe  # noqa: E402


@pytest.fixture
def start(quiet, serve):
    def started(probe, threshold):
        modes = {probe.name: {"prompt": "block", "response": "block"}}
        running = serve(quiet, [(probe, {"calibration": calibrated(threshold)})], modes=modes)
        return Server(running.url, quiet, running.engine.live, running.sink, running.idle)

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
