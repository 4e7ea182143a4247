"""Policies over HTTP, with vLLM: the shared engine's policy is replaced for each test."""

import pytest

from ..conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.contract_policy")

from ..contract import Server  # noqa: E402
from ..contract_policy import Policed, _fresh, as_file, endpoint, soft_star  # noqa: E402, F401
from .shared import load, routes  # noqa: E402


@pytest.fixture(scope="module")
def web(shared, quiet, tmp_path_factory):
    load(shared, quiet, tmp_path_factory.mktemp("store"), [(soft_star(quiet), {"calibration": calibrated(1e6)})])
    with routes(shared) as web:
        yield web


@pytest.fixture
def policed(web, quiet, tmp_path):
    def started(policy):
        harness = web.harness
        bank = harness.judge.banks.current
        bank.live = bank.live.under(as_file(tmp_path, policy))
        return Server(web.url, quiet, bank.live, web.sink, web.idle, harness.started.scorer, harness.run)

    return started


class TestVllm(Policed):
    pass
