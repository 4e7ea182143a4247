"""Fields of a request that vLLM knows and OpenAI does not, or reads in another way: judged, or refused."""

import json

import httpx
import pytest

from .forcing import BLOCKED, CHAT, STREAM, TEXT, USER, Next, chat, post, record, refused, say, works


class Fields:
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
            ("truncation_side", "right"),
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


class OddFields:
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
