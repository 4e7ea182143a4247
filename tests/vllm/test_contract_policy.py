"""Policies over HTTP, with vLLM: the shared engine's policy is replaced for each test."""

import json

import anthropic
import openai
import pytest

from ..conftest import calibrated

pytest.register_assert_rewrite("tests.contract", "tests.contract_policy")

from ..contract import BOTH, CHAT, STREAM, Reply, Server, asked, endless  # noqa: E402
from ..contract_policy import (  # noqa: E402
    AT,
    HIT,
    SURE,
    UNSURE,
    Policed,
    _fresh,  # noqa: F401
    as_file,
    endpoint,  # noqa: F401
    policy,
    soft_star,
    starred,
)
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
    Forced.bias = None

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

    @BOTH
    def test_a_replaced_answer_leaves_no_token_behind(self, policed, path):
        server = policed(policy(response=SURE, blocked_answer={"replace": TEXT}))
        (choice,) = starred(server, path, False, return_token_ids=True).json()["choices"]
        assert choice["finish_reason"] == "content_filter" and TEXT in json.dumps(choice)
        assert (choice["token_ids"], choice["logprobs"]) == ([], None)

    @STREAM
    @pytest.mark.parametrize("blocked_answer", ["cut", {"replace": TEXT}], ids=str)
    def test_a_blocked_response_has_no_raw_output(self, policed, quiet, blocked_answer, stream):
        server = policed(policy(response=SURE, blocked_answer=blocked_answer))
        Forced.bias = bias(quiet, AT)
        body = {"input": "go", "max_output_tokens": 30, "stream": stream, "enable_response_messages": True}
        response = server.post("/v1/responses", body)
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        final = events[-1]["response"] if stream else response.json()
        assert final["status"] == "incomplete" and final["input_messages"] and final["output_messages"] is None

    @pytest.mark.parametrize("value", [1, "true", "on"])
    def test_a_refusal_in_words_is_streamed_to_whom_vllm_would_stream(self, policed, value):
        server = policed(policy(prompt=SURE, blocked_prompt={"refusal": "No."}))
        more = {"max_tokens": 3, "stream": value, "stream_options": {"include_usage": value}}
        reply = Reply(server.post(CHAT, asked(CHAT, HIT) | more))
        assert reply.done and reply.texts == {0: "No."} and len(reply.usages) == 1

    def test_what_waited_is_counted_and_traced_as_any_other_answer(self, policed, endpoint, web, monkeypatch):
        """vLLM's own loop does not see what the second judge lets go: here an answer's start, then another's end."""
        engine, counted = web.harness.engine, []
        count = engine.logger_manager.record

        def noted(*args, **kwargs):
            counted.append(kwargs["iteration_stats"])
            count(*args, **kwargs)

        monkeypatch.setattr(engine.logger_manager, "record", noted)
        monkeypatch.setattr(engine.output_processor, "tracing_enabled", True)
        server = policed(policy(prompt=UNSURE, second=endpoint.policy))
        first = Reply(server.post(CHAT, asked(CHAT, HIT) | endless(server) | {"max_tokens": 200}))
        server = policed(policy(response=UNSURE, second=endpoint.policy))
        last = Reply(starred(server, CHAT, False, max_tokens=AT + 1))
        for reply, n in ((first, 200), (last, AT + 1)):
            assert [(r.released_tokens, len(r.escalations)) for r in server.records(reply.id)] == [(n, 1)]
        assert server.idle() and web.harness.judge.banks.current.users == 0
        stats = [s for s in counted if s is not None]
        assert sum(s.num_generation_tokens for s in stats) == 200 + AT + 1
        assert len([ended for s in stats for ended in s.finished_requests]) == 2
        assert max(waited for s in stats for waited in s.inter_token_latencies_iter) < 60, "not since the host's start"
