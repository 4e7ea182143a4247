"""Policies over HTTP, in front of an upstream: a second judge, annotations, texts in place of what is blocked."""

import pytest

from monitor.errors import RequestInvalid
from monitor.upstream.engine import ObserverScorer

from .conftest import calibrated, publish
from .fake_observer import ProxyServer
from .test_upstream_contract import WholeObserver, far  # noqa: F401

pytest.register_assert_rewrite("tests.contract_policy")

from .contract import Server  # noqa: E402
from .contract_policy import Policed, _fresh, as_file, endpoint, soft_star  # noqa: E402, F401


@pytest.fixture(scope="module")
def soft(quiet):
    return soft_star(quiet)


@pytest.fixture
def policed(quiet, far, soft, tmp_path):
    running = []

    def started(policy):
        live, _ = publish(quiet, [(soft, {"calibration": calibrated(1e6)})], tmp_path / f"store{len(running)}")
        live = live.under(as_file(tmp_path, policy))
        running.append(proxy := ProxyServer(far.url + "/v1", observer=WholeObserver(quiet, live), live=live))
        proxy.start()
        idle = lambda: proxy.idle() and far.idle()  # noqa: E731
        return Server(proxy.url, quiet, live, proxy.sink, idle, ObserverScorer(proxy.engine))

    yield started
    for proxy in running:
        proxy.stop()


class TestProxy(Policed):
    def test_a_request_of_an_operators_own_is_followed_token_by_token(self, policed):
        """The tokens are the upstream's: it says so."""
        with pytest.raises(RequestInvalid, match="none to trace"):
            super().test_a_request_of_an_operators_own_is_followed_token_by_token(policed)
