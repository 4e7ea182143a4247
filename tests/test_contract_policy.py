"""Policies over HTTP, with the embedded engine."""

import pytest

from monitor.engines.embedded.scorer import EmbeddedScorer

from .conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.contract_policy")

from .contract import Server  # noqa: E402
from .contract_policy import Policed, _fresh, as_file, endpoint, soft_star  # noqa: E402, F401


@pytest.fixture(scope="module")
def soft(quiet):
    return soft_star(quiet)


@pytest.fixture
def policed(quiet, serve, soft, tmp_path):
    def started(policy):
        running = serve(quiet, [(soft, {"calibration": calibrated(1e6)})])
        running.engine.live = running.engine.live.under(as_file(tmp_path, policy))
        live = running.engine.live
        return Server(running.url, quiet, live, running.sink, running.idle, EmbeddedScorer(running.engine))

    return started


class TestEmbedded(Policed):
    pass
