"""What vLLM can do beyond plain answers, under monitoring: tools, structured output, reasoning, odd fields, routes.

Tokens are forced one by one by a logits processor in the worker that only these tests load.
"""

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest
import torch
from starlette.routing import Mount, Route
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from monitor.api.vllm.gate import Gate
from monitor.api.vllm.serve import _HARMLESS
from monitor.api.vllm.wires import WIRES
from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model

from ..conftest import calibrated
from ..star import fit_star_probe
from .conftest import EAGER, Harness, Web, make_plan

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAM = pytest.mark.parametrize("stream", [False, True])
USER = [{"role": "user", "content": "go"}]
BLOCKED = [{"role": "user", "content": "aaa*aa"}]
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
FORCING = ["--logits-processors", f"{__name__}:Forcing"]


class Forcing(AdapterLogitsProcessor):
    """Lets nothing but the given token be sampled, step by step; afterwards anything."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        ids = (params.extra_args or {}).get("forced")

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output_ids) < len(ids):
                only = torch.full_like(logits, -torch.inf)
                only[ids[len(output_ids)]] = 0.0
                return only
            return logits

        return None if ids is None else force


class Next:
    """What the next requests must sample."""

    ids: list[int] | None = None


@pytest.fixture(autouse=True)
def _unforced():
    Next.ids = None


def say(model, text, end=True):
    """Special tokens as themselves. end: and then the end token"""
    Next.ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    Next.ids += [model.tokenizer.eos_token_id] if end else []


def serve(model, folder, arguments):
    probe, threshold = fit_star_probe(model)
    modes = {"star": {"prompt": "block", "response": "block"}}
    # In long prompts the probe is less sure of what is a "*"; in the middle of JSON it is so of what is none.
    calibration = calibrated(threshold - 5)
    calibration["chat"]["response"] = calibrated(threshold + 10)["chat"]["response"]
    published = [(probe, {"calibration": calibration})]
    running = Harness(make_plan(model, folder, published, [*EAGER, *arguments, *FORCING], modes=modes))
    generate = running.engine.generate

    def forced(prompt, params, *args, **kwargs):
        if Next.ids is not None:
            params.extra_args = {"forced": Next.ids}
        return generate(prompt, params, *args, **kwargs)

    running.engine.generate = forced
    web = Web(running)
    web.model = model
    yield web
    web.stop()
    running.stop()


@pytest.fixture(scope="module")
def web(quiet, tmp_path_factory):
    yield from serve(quiet, tmp_path_factory.mktemp("store"), TOOLS)


def post(web, path, body, **kwargs):
    return httpx.post(web.url + path, json={"model": web.model.name} | body, timeout=60, **kwargs)


def chat(web, stream=False, **more):
    """(message, finish reason, raw bytes) of a chat answer; deltas of a stream put together"""
    body = {"messages": USER, "max_tokens": 200, "temperature": 0, "stream": stream} | more
    response = post(web, CHAT, body)
    assert response.status_code == 200, response.text
    if not stream:
        (choice,) = response.json()["choices"]
        return {"tool_calls": []} | choice["message"], choice["finish_reason"], response
    message, finishes, calls = {}, [], {}
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:])["choices"]:
            finishes += [choice["finish_reason"]] if choice["finish_reason"] else []
            for call in choice["delta"].get("tool_calls") or ():
                known = calls.setdefault(call["index"], {"function": {"name": "", "arguments": ""}})["function"]
                known["name"] += call["function"].get("name") or ""
                known["arguments"] += call["function"].get("arguments") or ""
            for key in ("content", "reasoning"):
                if choice["delta"].get(key):
                    message[key] = message.get(key, "") + choice["delta"][key]
    (finish,) = finishes
    return message | {"tool_calls": list(calls.values())}, finish, response


def record(web, response):
    (found,) = web.sink.of(response.headers["x-midstream-request-id"])
    return found


def works(web):
    """The engine answers an ordinary request, judged, and has nothing left to do."""
    Next.ids = None
    response = post(web, CHAT, {"messages": USER, "max_tokens": 3, "temperature": 0, "ignore_eos": True})
    assert response.status_code == 200 and record(web, response).released_tokens == 3
    return web.idle()


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


def refused(response):
    """No token: a 4xx, or vLLM's error event in a stream that says nothing else."""
    if response.status_code == 200:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        return bool(lines) and all(json.loads(line[6:]).keys() == {"error"} for line in lines)
    return 400 <= response.status_code < 500


class TestFields:
    def test_beam_search_is_refused(self, web):
        for value in (True, 1, "on", "true"):
            response = post(web, CHAT, {"messages": USER, "use_beam_search": value, "n": 2, "max_tokens": 3})
            assert response.status_code == 400 and "use_beam_search" in response.json()["error"]["message"]
        assert works(web)

    def test_prompt_logprobs_come_with_a_judged_answer(self, web):
        say(web.model, "aaaa")
        for path, given in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "go on"})):
            response = post(web, path, given | {"prompt_logprobs": 1, "max_tokens": 3})
            body = response.json()
            found = body.get("prompt_logprobs") or body["choices"][0]["prompt_logprobs"]
            coverage = record(web, response).coverage
            assert len(found) == coverage.prompt_tokens == coverage.prompt_scored
        blocked = post(web, TEXT, {"prompt": "go onaa*", "prompt_logprobs": 1, "max_tokens": 3})
        assert blocked.status_code == 400 and "logprob" not in blocked.text
        say(web.model, "aaaa*aaa")
        body = post(web, TEXT, {"prompt": "go on", "prompt_logprobs": 1, "max_tokens": 9}).json()
        assert body["choices"][0]["text"] == "aaaa" and len(body["choices"][0]["prompt_logprobs"]) == 5
        assert works(web)

    def test_echo_of_a_blocked_answer(self, web):
        say(web.model, "aaaa*aaa")
        body = {"prompt": "go on", "echo": True, "logprobs": 1, "max_tokens": 9}
        (choice,) = post(web, TEXT, body).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("go onaaaa", "content_filter")
        assert len(choice["logprobs"]["tokens"]) == 9

    def test_token_ids_that_are_asked_for_are_those_released(self, web):
        for stream in (False, True):
            say(web.model, "aaaa*aaa")
            _, finish, response = chat(web, stream, return_token_ids=True, logprobs=True, top_logprobs=0)
            star = web.model.tokenizer("*", add_special_tokens=False)["input_ids"][0]
            lines = response.text.splitlines() if stream else ["data: " + response.text]
            bodies = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            ids = [i for b in bodies for c in b["choices"] for i in c.get("token_ids") or ()]
            assert finish == "content_filter" and len(ids) == 4 and star not in ids
            assert all(not b.get("kv_transfer_params") for b in bodies)

    @STREAM
    def test_min_tokens_and_ignore_eos(self, web, stream):
        end = web.model.tokenizer.eos_token_id
        _, finish, response = chat(web, stream, logit_bias={str(end): 100}, min_tokens=5, max_tokens=9)
        assert finish == "stop" and record(web, response).coverage.response_tokens >= 5
        Next.ids = [*web.model.tokenizer("aa")["input_ids"], end, *web.model.tokenizer("aabb")["input_ids"]]
        message, finish, _ = chat(web, stream, ignore_eos=True, max_tokens=7)
        assert (message["content"], finish) == ("aaaabb", "length")
        message, finish, _ = chat(web, stream, max_tokens=7)
        assert (message["content"], finish) == ("aa", "stop")
        Next.ids = [*web.model.tokenizer("aa")["input_ids"], end, *web.model.tokenizer("aa*aa")["input_ids"]]
        message, finish, _ = chat(web, stream, ignore_eos=True, max_tokens=9)
        assert (message["content"], finish) == ("aaaa", "content_filter")

    @STREAM
    def test_stop_tokens_and_bad_words(self, web, stream):
        say(web.model, "aaaab*aa")
        (b,) = web.model.tokenizer("b", add_special_tokens=False)["input_ids"]
        message, finish, _ = chat(web, stream, stop_token_ids=[b])
        assert (message["content"], finish) == ("aaaa", "stop")
        say(web.model, "aaaa!b")
        message, finish, _ = chat(web, stream, stop=["!"], include_stop_str_in_output=True)
        assert (message["content"], finish) == ("aaaa!", "stop")
        assert works(web)

    def test_a_seed_on_a_cpu_is_a_bad_request_and_the_engine_lives_on(self, web):
        long = {"messages": [{"role": "user", "content": "word " * 150}], "seed": 1, "max_tokens": 3}
        assert post(web, CHAT, long).status_code == 400
        assert post(web, CHAT, long | {"n": 2}).status_code == 400
        assert post(web, TEXT, {"prompt": "go on", "seed": 0}).status_code == 400
        assert works(web)

    def test_a_seed_on_a_cpu_is_a_bad_request_streaming_too(self, web):
        assert post(web, CHAT, {"messages": USER, "seed": 1, "stream": True}).status_code == 400

    def test_a_cache_salt_changes_neither_score_nor_verdict(self, web):
        text = "tell me more of it, " * 8
        say(web.model, "aaaa")
        history = [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]
        readings = []
        for salt in (None, "one", "two", "one", None, "midstream:1:", "midstream:0:one"):
            more = {} if salt is None else {"cache_salt": salt}
            response = post(web, CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | more)
            found = record(web, response)
            assert found.verdict == "allow" and found.coverage.unmonitored == 0
            readings.append([(r.value, r.newest, r.peak_position) for r in found.readings])
            blocked = post(web, CHAT, {"messages": [*history, *BLOCKED]} | more)
            assert blocked.status_code == 400 and blocked.json()["error"]["code"] == "content_filter"
        for later in readings[1:]:
            assert later[0] == pytest.approx(readings[0][0], abs=1e-3)
            assert later[1] == pytest.approx(readings[0][1], abs=1e-3)
        assert works(web)

    def test_a_priority_is_taken_or_refused_and_never_unjudged(self, web):
        for value in (0, 5, -5, 2**40, "high"):
            response = post(web, CHAT, {"messages": USER, "priority": value, "max_tokens": 3})
            assert refused(response) or record(web, response).coverage.unmonitored == 0
        assert works(web)

    def test_fields_that_reach_past_the_monitor_are_refused(self, web):
        for field, value in (
            ("vllm_xargs", {"forced": [1]}),
            ("kv_transfer_params", {"a": 1}),
            ("prompt_embeds", "AAAA"),
            ("chat_template", "{{ 1 }}"),
            ("continue_final_message", True),
            ("add_generation_prompt", False),
            ("background", True),
        ):
            response = post(web, CHAT, {"messages": USER, "max_tokens": 3, field: value})
            assert response.status_code == 400 and field in response.text
        assert works(web)


ODD = [
    {"stream_interval": 3},
    {"stream_interval": 50},
    {"repetition_detection": {"max_pattern_size": 4, "min_count": 4}},
    {"thinking_token_budget": 2},
    {"reasoning_effort": "low"},
    {"include_reasoning": False},
    {"logprob_token_ids": [65, 66], "logprobs": True},
    {"logprobs": True, "return_tokens_as_token_ids": True},
    {"return_token_offsets": True},
    {"return_prompt_text": True},
    {"request_id": "mine-7_3"},
    {"session_id": "mine"},
    {"truncate_prompt_tokens": 8},
    {"truncate_prompt_tokens": 8, "truncation_side": "right"},
    {"watermarking": True},
    {"skip_special_tokens": False, "spaces_between_special_tokens": False},
    {"stop": ["aaaa*", "*a"], "include_stop_str_in_output": True},
    {"echo": True},
    {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "length_penalty": 2.0},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"user": "u", "service_tier": "auto", "store": True, "metadata": {"a": "b"}, "unheard_of": 1},
]


class TestOddFields:
    @STREAM
    @pytest.mark.parametrize("field", ODD, ids=lambda f: next(iter(f)))
    def test_a_block_stands_or_the_field_is_refused(self, web, field, stream):
        if not stream and "stream_options" in field:
            pytest.skip("for streams only")
        for path, given in ((CHAT, {"messages": USER}), (TEXT, {"prompt": "go on"})):
            say(web.model, "aaaa*aaa")
            body = given | {"max_tokens": 30, "temperature": 0, "stream": stream} | field
            if path == TEXT and "logprobs" in body:
                body["logprobs"] = 1
            response = post(web, path, body)
            if refused(response):
                continue
            (found,) = web.sink.of(response.headers["x-midstream-request-id"])
            assert found.coverage.unmonitored == 0 and found.released_tokens <= 4, found
            assert "*" not in response.text
            assert found.finish == "stop" or '"content_filter"' in response.text
            lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            usages = [json.loads(line).get("usage") for line in lines] if stream else [response.json()["usage"]]
            assert all(u["completion_tokens"] <= 4 for u in usages if u), usages
        assert works(web)

    def test_a_batch_with_more_than_one_answer_each_is_refused(self, web):
        body = {"messages": [USER, USER], "max_tokens": 3, "n": 2}
        assert refused(post(web, CHAT + "/batch", body))
        judged = post(web, CHAT + "/batch", body | {"n": 1, "stream": True})  # vLLM takes no notice of `stream`
        assert len(web.sink.of(judged.headers["x-midstream-request-id"])) == len(judged.json()["choices"]) == 2
        blocked = post(web, CHAT + "/batch", {"messages": [USER, BLOCKED], "max_tokens": 3})
        assert blocked.status_code == 400 and blocked.json()["error"]["innererror"]["prompt_index"] == 1
        assert works(web)

    def test_a_body_in_utf_16_is_read_the_same_by_all(self, web):
        raw = json.dumps({"model": web.model.name, "messages": USER, "use_beam_search": True}).encode("utf-16")
        response = httpx.post(web.url + CHAT, content=raw, headers={"Content-Type": "application/json"}, timeout=60)
        assert response.status_code == 400

    def test_what_the_client_calls_its_request_never_moves_an_index(self, web):
        for name in ("a-7", "a_7", "7", "-", "_", "a-b_c-0"):
            say(web.model, "aa*a")
            body = {"prompt": ["go on", "go on"], "max_tokens": 9, "request_id": name}
            response = post(web, TEXT, body, headers={"X-Request-Id": name})
            choices = response.json()["choices"]
            assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
                (0, "aa", "content_filter"),
                (1, "aa", "content_filter"),
            ]
            assert [
                r.index for r in sorted(web.sink.of(response.headers["x-midstream-request-id"]), key=lambda r: r.index)
            ] == [0, 1]
        assert works(web)


ELSEWHERE = [
    "/invocations",
    "/inference/v1/generate",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/generative_scoring",
    "/cohere/v2/chat",
    "/v2/chat",
    "/v1/embeddings",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/load_lora_adapter",
    "/update_weights",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/sleep",
    "/pause",
    "/start_profile",
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/v1/%63hat/completions",
    "/v1/chat%2fcompletions",
    "/v1/chat/completions/",
    "/v1/completions/",
    "/V1/chat/completions",
    "/v1/chat/completions;x",
    "/v1/chat/completions?x=1",
    "/v1/./chat/completions",
    "/x/../v1/chat/completions",
    "/v1/responses/",
    "/v1/responses/resp_1/cancel",
    "/v1/messages/",
    "/v1/messages/batches",
]


JUDGED_ONLY = ("/v1/moderations", "/beta/litellm_basic_guardrail_api")


class TestRoutes:
    def test_every_route_is_harmless_or_gated_or_ours(self, web):
        for route in web.app.routes:
            if route.path in WIRES:
                assert isinstance(route, Route) and isinstance(route.app, Gate), route.path
            else:
                assert route.path in {*_HARMLESS, "/ready", *JUDGED_ONLY}, route.path
        gated = {route.path for route in web.app.routes if route.path in WIRES}
        assert gated == set(WIRES)
        assert [r.path for r in web.app.routes if isinstance(r, Mount)] == ["/metrics"]

    @pytest.mark.parametrize("path", ELSEWHERE)
    def test_no_path_gives_an_unjudged_answer(self, web, path):
        say(web.model, "aaaaaaaa")
        everything = {
            "messages": USER,
            "prompt": "go on",
            "input": "go",
            "text": "go",
            "message": "go",
            "max_tokens": 8,
        }
        everything |= {"token_ids": [70, 71], "sampling_params": {"max_tokens": 8}, "method": "x", "query": "a"}
        raw = json.dumps(everything | {"model": web.model.name}).encode()
        for method in ("POST", "GET", "PUT"):
            response = ask_raw(web, method, path, raw)
            if response.status_code == 200:
                assert record(web, response).coverage.unmonitored == 0, path
            else:
                assert response.status_code in (307, 400, 404, 405), (path, response.text)
                assert "aaaa" not in response.text

    def test_other_methods_do_not_generate(self, web):
        for path in WIRES:
            for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD"):
                assert ask_raw(web, method, path, b"{}").status_code == 405

    def test_other_content_types_are_refused_or_judged(self, web):
        raw = json.dumps({"model": web.model.name, "messages": USER, "max_tokens": 3}).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", ""):
            response = httpx.post(web.url + CHAT, content=raw, headers={"Content-Type": kind}, timeout=60)
            assert response.status_code in (400, 415) or record(web, response).coverage.unmonitored == 0

    def test_a_repeated_key_is_read_once_and_the_same_by_all(self, web):
        """The gate and vLLM both take the last one."""
        say(web.model, "aaaa")
        model = json.dumps(web.model.name)
        for first, last, status in (("false", "true", 400), ("true", "false", 200)):
            raw = f'{{"model": {model}, "messages": [{{"role": "user", "content": "go"}}], "max_tokens": 3, '
            raw += f'"use_beam_search": {first}, "use_beam_search": {last}}}'
            response = httpx.post(web.url + CHAT, content=raw.encode(), headers={"Content-Type": "application/json"})
            assert response.status_code == status
        assert works(web)


def ask_raw(web, method, path, content):
    """As it is written: httpx would tidy the path."""
    target = httpx.URL(web.url).copy_with(raw_path=path.encode())
    headers = {"Content-Type": "application/json"}
    with httpx.Client(timeout=60) as client:
        return client.request(method, target, content=content, headers=headers)


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


THOUGHT = ["<think>", "</think>"]


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
