"""Policies over HTTP, with vLLM: the shared engine's policy is replaced for each test."""

import anthropic
import openai
import pytest

from ..conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.contract_policy")

from ..contract import STREAM, Server  # noqa: E402
from ..contract_policy import AT, SURE, Policed, _fresh, as_file, endpoint, policy, soft_star  # noqa: E402, F401
from ..star import bias  # noqa: E402
from .shared import Forced, load, routes  # noqa: E402

TEXT = "[ended by policy]"


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
    @STREAM
    def test_a_blocked_response_may_be_replaced(self, policed, quiet, stream):
        """The text stands alone, or as an item of its own behind what a stream has said already."""
        server = policed(policy(response=SURE, blocked_answer={"replace": TEXT}))
        Forced.bias = bias(quiet, AT)
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            found = client.responses.create(model=quiet.name, input="go", max_output_tokens=30, stream=stream)
            events = list(found) if stream else []
            Forced.bias = bias(quiet, AT)
            with client.responses.stream(model=quiet.name, input="go", max_output_tokens=30) as helper:
                assert list(helper)[-1].response.output_text == "a" * (AT - 1) + TEXT
        final = events[-1].response if stream else found
        assert (final.status, final.incomplete_details.reason) == ("incomplete", "content_filter")
        assert final.output_text == ("a" * (AT - 1) if stream else "") + TEXT
        assert [item.status for item in final.output] == ["incomplete"] * (2 if stream else 1)
        if stream:
            assert events[-1].type == "response.incomplete"
            assert [e.sequence_number for e in events] == list(range(len(events)))
            for kind in ("added", "done"):
                items = [e for e in events if e.type == f"response.output_item.{kind}"]
                assert [e.item.id for e in items] == [item.id for item in final.output]
                assert [e.output_index for e in items] == [0, 1]
        assert server.idle()

    @STREAM
    def test_a_blocked_message_may_be_replaced(self, policed, quiet, stream):
        server = policed(policy(response=SURE, blocked_answer={"replace": TEXT}))
        Forced.bias = bias(quiet, AT)
        asked = {"model": quiet.name, "max_tokens": 30, "messages": [{"role": "user", "content": "go"}]}
        with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
            if stream:
                with client.messages.stream(**asked) as events:
                    final = events.get_final_message()
            else:
                final = client.messages.create(**asked)
        said = ["a" * (AT - 1)] if stream else []
        assert ([block.text for block in final.content], final.stop_reason) == ([*said, TEXT], "refusal")
        assert server.idle()
