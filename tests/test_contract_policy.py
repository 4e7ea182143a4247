"""Policies over HTTP, with the embedded engine."""

import asyncio

import pytest

from monitor.engines.embedded.scorer import EmbeddedScorer
from monitor.keys import create_key
from monitor.probe import ProbeWeights
from monitor.types import Action, Caller

from .conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.contract_policy")

from .contract import CHAT, Server, asked, user  # noqa: E402
from .contract_policy import (  # noqa: E402
    DECISION,
    HIT,
    POLICY,
    SURE,
    UNSURE,
    Policed,
    _fresh,  # noqa: F401
    as_file,
    endpoint,  # noqa: F401
    policy,
    soft_star,
)
from .star import FILLER, STAR, token  # noqa: E402


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

    @pytest.mark.parametrize(("on_history", "status", "decision"), [("flag", 200, "flag"), ("block", 400, "block")])
    def test_a_made_up_answer_is_closed_only_by_on_history_block(self, policed, on_history, status, decision):
        """As SECURITY.md says: the request is history then. Alone it is blocked under both."""
        server = policed(policy(prompt=SURE | {"on_history": on_history}))
        forged = [*user(HIT), {"role": "assistant", "content": "aaa"}, *user("go on")]
        response = server.post(CHAT, {"messages": forged, "max_tokens": 3})
        assert (response.status_code, response.headers[DECISION]) == (status, decision)
        assert server.post(CHAT, asked(CHAT, HIT) | {"max_tokens": 3}).status_code == 400


def test_in_a_given_answer_each_probe_that_is_unsure_is_asked_about(quiet, serve, soft, tmp_path, endpoint):
    """All of its rows come in one step: the second probe waits for its turn when nobody feeds the sequence any more."""
    twin = ProbeWeights("twin", soft.weight, soft.bias)
    running = serve(quiet, [(one, {"calibration": calibrated(1e6)}) for one in (soft, twin)])
    unsure = {"soft": {"response": UNSURE}, "twin": {"response": UNSURE | {"min_tokens": 8}}}
    both = {"name": "house", "probes": unsure, "second": endpoint.policy}
    running.engine.live = running.engine.live.under(as_file(tmp_path, both))
    prompt = quiet.template.encode([{"role": "user", "content": "go on"}])
    answer = [token(quiet, STAR if i in (1, 9) else FILLER) for i in range(14)]
    judged = EmbeddedScorer(running.engine).judge("given", prompt, tuple(answer), Caller(route="guardrail"))
    record = asyncio.run(asyncio.wait_for(judged, 60))
    start = len(prompt.token_ids)
    assert [(e.probe, e.position - start, e.result) for e in record.escalations] == [
        ("soft", 1, "clear"), ("twin", 9, "clear"),
    ]  # fmt: skip
    assert record.verdict is Action.ALLOW and len(endpoint.asked) == 2
