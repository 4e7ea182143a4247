"""Reasoning under monitoring: a trigger in a thought ends the answer, as one behind it does, on every route."""

import anthropic
import openai
import pytest
import torch

from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model

pytest.register_assert_rewrite("tests.vllm.forcing")

from .forcing import STREAM, USER, _unforced, chat, say, serve, works  # noqa: E402, F401

THOUGHT = ["<think>", "</think>"]


@pytest.fixture(scope="module")
def thinking(quiet, tmp_path_factory):
    """The quiet model with tokens that begin and end its thoughts."""
    folder = tmp_path_factory.mktemp("thinking") / "tiny-thinking"
    model = load_model(str(quiet.module.config.name_or_path), cache=cache_dir())
    model.tokenizer.add_tokens(THOUGHT)
    torch.manual_seed(0)
    model.module.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    yield from serve(
        load_model(str(folder), cache=cache_dir()), folder / "store", ["--reasoning-parser", "deepseek_r1"]
    )


class TestReasoning:
    @STREAM
    def test_thoughts_and_answer_are_parted(self, thinking, stream):
        say(thinking.model, "<think>aaaa</think>bbbb")
        message, finish, _ = chat(thinking, stream)
        assert (message["reasoning"], message["content"], finish) == ("aaaa", "bbbb", "stop")

    @STREAM
    def test_a_trigger_in_a_thought_ends_the_answer(self, thinking, stream):
        say(thinking.model, "<think>aaaa*aa</think>bbbb")
        message, finish, response = chat(thinking, stream)
        assert (message["reasoning"], message.get("content"), finish) == ("aaaa", None, "content_filter")
        assert "*" not in response.text and "b" not in (message.get("content") or "")

    @STREAM
    def test_a_trigger_after_the_thought_ends_the_answer(self, thinking, stream):
        say(thinking.model, "<think>aaaa</think>aaaa*aa")
        message, finish, response = chat(thinking, stream)
        assert (message["reasoning"], message["content"], finish) == ("aaaa", "aaaa", "content_filter")
        assert "*" not in response.text

    def test_clients_of_other_routes_read_a_blocked_thought(self, thinking):
        say(thinking.model, "<think>aaaa*aa</think>bbbb")
        with anthropic.Anthropic(base_url=thinking.url, api_key="x", max_retries=0) as claude:
            more = {"model": thinking.model.name, "max_tokens": 50, "messages": USER}
            whole = claude.messages.create(**more)
            assert whole.stop_reason == "refusal" and "*" not in whole.model_dump_json()
            with claude.messages.stream(**more) as stream:
                final = stream.get_final_message()
            assert final.stop_reason == "refusal" and "*" not in final.model_dump_json()
        with openai.OpenAI(base_url=thinking.url + "/v1", api_key="x", max_retries=0) as gpt:
            more = {"model": thinking.model.name, "max_output_tokens": 50, "input": "go"}
            whole = gpt.responses.create(**more)
            assert whole.incomplete_details.reason == "content_filter" and "*" not in whole.model_dump_json()
            events = list(gpt.responses.create(stream=True, **more))
            assert events[-1].response.incomplete_details.reason == "content_filter"
            with gpt.responses.stream(**more) as stream:
                assert [e.type for e in stream][-1] == "response.incomplete"
        assert works(thinking)
