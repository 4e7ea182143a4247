"""Policies over HTTP, with the embedded engine."""

import pytest

from monitor.engines.embedded.scorer import EmbeddedScorer
from monitor.keys import create_key

from .conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.contract_policy")

from .contract import CHAT, Server, asked  # noqa: E402
from .contract_policy import (  # noqa: E402
    HIT,
    POLICY,
    SURE,
    Policed,
    _fresh,  # noqa: F401
    as_file,
    endpoint,  # noqa: F401
    policy,
    soft_star,
)


@pytest.fixture(scope="module")
def soft(quiet):
    return soft_star(quiet)


@pytest.fixture
def policed(quiet, serve, soft, tmp_path):
    def started(policy, **settings):
        running = serve(quiet, [(soft, {"calibration": calibrated(1e6)})], **settings)
        running.engine.live = running.engine.live.under(as_file(tmp_path, policy))
        live = running.engine.live
        return Server(running.url, quiet, live, running.sink, running.idle, EmbeddedScorer(running.engine))

    return started


class TestEmbedded(Policed):
    def test_an_override_is_chosen_by_the_key_that_opened_the_door(self, policed, tmp_path):
        keys = tmp_path / "keys.yaml"
        partner = create_key(keys, "partner")
        strict = {"name": "strict", "when": {"key": ["partner"]}, "probes": {"soft": {"prompt": SURE}}}
        server = policed(policy(overrides=[strict]), api_key="the-key-of-everybody", keys=keys)
        for key, status, name in (("the-key-of-everybody", 200, "house"), (partner, 400, "strict")):
            headers = {"Authorization": f"Bearer {key}"}
            response = server.post(CHAT, asked(CHAT, HIT) | {"max_tokens": 3}, headers=headers)
            assert (response.status_code, response.headers[POLICY]) == (status, name)
        assert sorted(r.key for r in server.sink.records) == ["default", "partner"]
        assert server.post(CHAT, asked(CHAT, HIT)).status_code == 401
