"""The HTTP contract, with vLLM: the probes of the shared engine are swapped for what a test needs."""

import pytest
import torch

from monitor.probe import ProbeWeights

from ..conftest import LAYER, calibrated

pytest.register_assert_rewrite("tests.contract")

from ..contract import BOTH, LATE, Contract, Server, zero_probe  # noqa: E402
from ..star import fit_star_probe  # noqa: E402
from .shared import blocking, load, routes  # noqa: E402


@pytest.fixture(scope="module")
def web(shared):
    with routes(shared) as web:
        yield web


@pytest.fixture(scope="module")
def probes(quiet):
    """By name, with the threshold."""
    torch.manual_seed(1)
    calm = ProbeWeights("calm", {LAYER: torch.randn(quiet.d_model) / 8}, 0.25)
    trigger = ProbeWeights("trigger", zero_probe(quiet, LAYER), 1.0)
    return {probe.name: (probe, threshold) for probe, threshold in [(calm, 1e6), (trigger, 0.0), fit_star_probe(quiet)]}


@pytest.fixture
def start(web, probes, quiet, tmp_path):
    def started(name):
        probe, threshold = probes[name]
        published = [(probe, {"calibration": calibrated(threshold)})]
        live = load(web.harness, quiet, tmp_path, published, modes=blocking(name), target_fpr=0.1)
        return Server(web.url, quiet, live, web.sink, web.idle)

    return started


@pytest.fixture
def calm(start):
    return start("calm")


@pytest.fixture
def trigger(start):
    return start("trigger")


@pytest.fixture
def starred(start):
    return start("star")


class TestVllm(Contract):
    @pytest.mark.parametrize(("path", "body"), LATE, ids=str)
    def test_what_the_engine_alone_can_refuse_is_a_bad_request_streaming_too(self, calm, path, body):
        super().test_what_the_engine_alone_can_refuse_is_a_bad_request_streaming_too(calm, path, body)

    @BOTH
    def test_a_body_over_the_bound_that_was_not_announced_is_too_large_too(self, calm, path):
        super().test_a_body_over_the_bound_that_was_not_announced_is_too_large_too(calm, path)
