"""The HTTP contract, with vLLM: one engine, whose probes are swapped for what a test needs."""

import pytest
import torch

from monitor.live import assemble
from monitor.probe import ProbeWeights

from ..conftest import LAYER, calibrated

pytest.register_assert_rewrite("tests.contract")

from ..contract import BOTH, LATE, Contract, Server, zero_probe  # noqa: E402
from ..star import fit_star_probe  # noqa: E402
from . import test_leak  # noqa: E402
from .conftest import EAGER, Harness, Web, make_plan  # noqa: E402

quiet = test_leak.quiet


@pytest.fixture(scope="module")
def web(quiet, tmp_path_factory):
    torch.manual_seed(1)
    calm = ProbeWeights("calm", {LAYER: torch.randn(quiet.d_model) / 8}, 0.25)
    trigger = ProbeWeights("trigger", zero_probe(quiet, LAYER), 1.0)
    probes = [(calm, 1e6), (trigger, 0.0), fit_star_probe(quiet)]
    modes = {probe.name: {"prompt": "block", "response": "block"} for probe, _ in probes}
    published = [(probe, {"calibration": calibrated(threshold)}) for probe, threshold in probes]
    store = tmp_path_factory.mktemp("store")
    running = Harness(make_plan(quiet, store, published, EAGER, modes=modes, target_fpr=0.1))
    web = Web(running)
    yield web
    web.stop()
    running.stop()


@pytest.fixture
def start(web, quiet):
    def started(name):
        plan = web.harness.plan
        (stored,) = [p for p in plan.live.probes if p.card.name == name]
        settings = plan.settings.model_copy(update={"modes": {name: plan.settings.modes[name]}})
        live = assemble([stored], quiet.d_model, settings)
        web.harness.run(web.harness.judge.banks.load(live))
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
