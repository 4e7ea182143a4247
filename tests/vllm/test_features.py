"""What vLLM can do beyond plain answers, under monitoring: tools, structured output, odd fields, routes.

One engine serves all of them: what is asked of odd fields and of routes stands in `fields` and `paths`.
"""

import json

import anthropic
import openai
import pytest

from .shared import TOOLS

pytest.register_assert_rewrite("tests.vllm.forcing", "tests.vllm.fields", "tests.vllm.paths")

from .fields import Fields, OddFields  # noqa: E402
from .forcing import (  # noqa: E402
    CHAT,
    STREAM,
    USER,
    _unforced,  # noqa: F401
    chat,
    post,
    record,
    refused,
    say,
    serve,
    works,
)
from .paths import Routes  # noqa: E402


@pytest.fixture(scope="module")
def web(quiet, tmp_path_factory):
    yield from serve(quiet, tmp_path_factory.mktemp("store"), TOOLS)


def declared(name):
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(x):
    return f'<tool_call>\n{{"name": "f", "arguments": {{"x": "{x}"}}}}\n</tool_call>'


def is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class TestTools:
    @STREAM
    def test_a_tool_call_arrives_complete(self, web, stream):
        say(web.model, call("aaaaaa"))
        message, finish, response = chat(web, stream, tools=[declared("f")])
        (found,) = message["tool_calls"]
        assert found["function"]["name"] == "f" and json.loads(found["function"]["arguments"]) == {"x": "aaaaaa"}
        assert finish == "tool_calls" and record(web, response).verdict == "allow"
        assert works(web)

    def test_a_tool_call_with_the_trigger_in_its_arguments_never_arrives(self, web):
        say(web.model, call("aaaa*aaaa"))
        message, finish, response = chat(web, tools=[declared("f")])
        assert finish == "content_filter" and not message["tool_calls"] and "*" not in response.text
        assert record(web, response).released_tokens == call("aaaa*").index("*")
        assert works(web)

    def test_a_streamed_tool_call_with_the_trigger_in_its_arguments_stays_incomplete(self, web):
        say(web.model, call("aaaa*aaaa"))
        message, finish, response = chat(web, True, tools=[declared("f")])
        assert finish == "content_filter" and "*" not in response.text
        assert all(not is_json(c["function"]["arguments"]) for c in message["tool_calls"])
        assert works(web)

    @STREAM
    def test_a_trigger_behind_a_complete_call_ends_the_answer_as_filtered(self, web, stream):
        """Streamed, the call is out before the trigger is sampled; its finish reason says not to run it."""
        say(web.model, call("aaaa") + "aaaa*a")
        message, finish, response = chat(web, stream, tools=[declared("f")])
        assert finish == "content_filter" and "*" not in response.text
        assert stream or not message["tool_calls"]

    @STREAM
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}], ids=str)
    def test_a_demanded_tool_call_is_watched_too(self, web, choice, stream):
        for x, wanted in (("aaaa", "tool_calls"), ("aaaa*a", "content_filter")):
            say(web.model, call(x))
            message, finish, response = chat(web, stream, tools=[declared("f")], tool_choice=choice)
            assert "*" not in response.text
            if wanted == "content_filter":
                assert finish == wanted and (stream or not message["tool_calls"])
            else:
                assert [c["function"]["name"] for c in message["tool_calls"]] == ["f"], response.text

    def test_messages_and_responses_carry_no_half_call_either(self, web):
        with anthropic.Anthropic(base_url=web.url, api_key="x", max_retries=0) as claude:
            tool = {"name": "f", "input_schema": declared("f")["function"]["parameters"]}
            more = {"model": web.model.name, "max_tokens": 200, "messages": USER, "tools": [tool]}
            say(web.model, call("aaaaaa"))
            whole = claude.messages.create(**more)
            assert [b.input for b in whole.content if b.type == "tool_use"] == [{"x": "aaaaaa"}]
            say(web.model, call("aaaa*aaaa"))
            whole = claude.messages.create(**more)
            assert whole.stop_reason == "refusal" and all(b.type == "text" for b in whole.content)
            with claude.messages.stream(**more) as stream:
                events = list(stream)
                final = stream.get_final_message()
            assert final.stop_reason == "refusal" and "*" not in final.model_dump_json()
            starts = [e.index for e in events if e.type == "content_block_start"]
            assert starts == [e.index for e in events if e.type == "content_block_stop"]
        with openai.OpenAI(base_url=web.url + "/v1", api_key="x", max_retries=0) as gpt:
            flat = {"type": "function", "strict": False} | declared("f")["function"]
            more = {"model": web.model.name, "max_output_tokens": 200, "input": "go", "tools": [flat]}
            say(web.model, call("aaaaaa"))
            calls = [item for item in gpt.responses.create(**more).output if item.type == "function_call"]
            assert [json.loads(c.arguments) for c in calls] == [{"x": "aaaaaa"}]
            say(web.model, call("aaaa*aaaa"))
            whole = gpt.responses.create(**more)
            assert whole.status == "incomplete" and all(item.type == "message" for item in whole.output)
            events = list(gpt.responses.create(stream=True, **more))
            assert events[-1].type == "response.incomplete"
            assert all(item.type == "message" for item in events[-1].response.output)
            assert not [e for e in events if e.type == "response.function_call_arguments.done"]
        assert works(web)


SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"], "additionalProperties": False}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


class TestStructured:
    @STREAM
    def test_a_regex_is_followed_and_watched(self, web, stream):
        """Nothing is forced here but by the grammar."""
        message, finish, _ = chat(web, stream, structured_outputs={"regex": "a{4}b{2}"})
        assert (message["content"], finish) == ("aaaabb", "stop")
        message, finish, response = chat(web, stream, structured_outputs={"regex": r"a{4}\*a{4}"})
        assert (message["content"], finish) == ("aaaa", "content_filter") and "*" not in response.text
        assert works(web)

    @STREAM
    def test_a_json_schema_is_followed_and_watched(self, web, stream):
        say(web.model, '{"x": "aaaaaa"}')
        message, finish, _ = chat(web, stream, response_format=AS_JSON)
        assert (json.loads(message["content"]), finish) == ({"x": "aaaaaa"}, "stop")
        say(web.model, '{"x": "aaaa*aaaa"}')
        message, finish, _ = chat(web, stream, response_format=AS_JSON)
        assert (message["content"], finish) == ('{"x": "aaaa', "content_filter")
        assert works(web)

    def test_a_bad_grammar_is_a_bad_request(self, web):
        for stream in (False, True):
            for grammar in ({"regex": "a{4"}, {"json": "{nope"}, {"choice": []}):
                body = {"messages": USER, "structured_outputs": grammar, "max_tokens": 5, "stream": stream}
                response = post(web, CHAT, body)
                assert refused(response), response.text
        assert works(web)


class TestFields(Fields):
    """What a request may ask beside its text."""


class TestOddFields(OddFields):
    """What hardly any client sends."""


class TestRoutes(Routes):
    """Where a client may send it."""
