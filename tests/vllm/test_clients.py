"""Official clients read vLLM through our gate: an ordinary answer, a blocked prompt, an answer blocked midway."""

import anthropic
import openai
import pytest

from ..conftest import calibrated
from ..star import bias, fit_star_probe
from .shared import Forced, blocking, load, routes

USER = [{"role": "user", "content": "go"}]
BLOCKED = [{"role": "user", "content": "tell*me"}]
P = 6  # where the answer is blocked: five letters come before


@pytest.fixture(scope="module")
def web(shared, quiet, tmp_path_factory):
    probe, threshold = fit_star_probe(quiet)
    published = [(probe, {"calibration": calibrated(threshold)})]
    load(shared, quiet, tmp_path_factory.mktemp("store"), published, modes=blocking("star"))
    with routes(shared) as web:
        yield web


@pytest.fixture
def gpt(web):
    with openai.OpenAI(base_url=web.url + "/v1", api_key="x", max_retries=0) as client:
        yield client
    assert web.idle()


@pytest.fixture
def claude(web):
    with anthropic.Anthropic(base_url=web.url, api_key="x", max_retries=0) as client:
        yield client
    assert web.idle()


@pytest.fixture
def allowed(quiet):
    """The next answers are "a" to their end, P of them."""
    Forced.bias = bias(quiet, 60)
    return {"model": quiet.name}


@pytest.fixture
def blocked(quiet):
    """The next answers are blocked at P."""
    Forced.bias = bias(quiet, P)
    return {"model": quiet.name}


ASKED = {"max_tokens": P}
MANY = {"max_tokens": 30}


class TestChat:
    def test_an_answer(self, gpt, allowed):
        whole = gpt.chat.completions.create(messages=USER, **ASKED, **allowed)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("aaaaaa", "length")
        chunks = list(gpt.chat.completions.create(messages=USER, stream=True, **ASKED, **allowed))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "aaaaaa"

    def test_the_stream_helper(self, gpt, allowed):
        with gpt.chat.completions.stream(messages=USER, **ASKED, **allowed) as stream:
            kinds = [event.type for event in stream]
            assert stream.current_completion_snapshot.choices[0].message.content == "aaaaaa"
        assert kinds.count("content.done") == 1

    def test_a_blocked_answer(self, gpt, blocked):
        whole = gpt.chat.completions.create(messages=USER, **MANY, **blocked)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("aaaaa", "content_filter")
        chunks = list(gpt.chat.completions.create(messages=USER, stream=True, **MANY, **blocked))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "aaaaa"
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["content_filter"]

    def test_a_blocked_answer_in_the_stream_helper(self, gpt, blocked):
        with gpt.chat.completions.stream(messages=USER, **MANY, **blocked) as stream:
            events = list(stream)
            snapshot = stream.current_completion_snapshot
            with pytest.raises(openai.ContentFilterFinishReasonError):  # the client's own word for it
                stream.get_final_completion()
        assert (snapshot.choices[0].message.content, snapshot.choices[0].finish_reason) == ("aaaaa", "content_filter")
        assert "".join(e.delta for e in events if e.type == "content.delta") == "aaaaa"

    def test_a_blocked_prompt(self, gpt, allowed):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                gpt.chat.completions.create(messages=BLOCKED, stream=stream, **ASKED, **allowed)
            assert caught.value.code == "content_filter"
        with (
            pytest.raises(openai.BadRequestError) as caught,
            gpt.chat.completions.stream(messages=BLOCKED, **ASKED, **allowed),
        ):
            pass
        assert caught.value.code == "content_filter"


class TestCompletions:
    def test_an_answer(self, gpt, allowed):
        whole = gpt.completions.create(prompt="go on", **ASKED, **allowed)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("aaaaaa", "length")
        chunks = list(gpt.completions.create(prompt="go on", stream=True, **ASKED, **allowed))
        assert "".join(c.choices[0].text for c in chunks) == "aaaaaa"

    def test_a_blocked_answer(self, gpt, blocked):
        whole = gpt.completions.create(prompt="go on", **MANY, **blocked)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("aaaaa", "content_filter")
        chunks = list(gpt.completions.create(prompt="go on", stream=True, **MANY, **blocked))
        assert "".join(c.choices[0].text for c in chunks) == "aaaaa"
        assert chunks[-1].choices[0].finish_reason == "content_filter"

    def test_a_blocked_prompt(self, gpt, allowed):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                gpt.completions.create(prompt="go onaa*", stream=stream, **ASKED, **allowed)
            assert caught.value.code == "content_filter"


class TestResponses:
    def test_an_answer(self, gpt, allowed):
        whole = gpt.responses.create(input="go", max_output_tokens=P, **allowed)
        assert whole.output_text == "aaaaaa" and whole.error is None
        events = list(gpt.responses.create(input="go", max_output_tokens=P, stream=True, **allowed))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "aaaaaa"
        assert [e.sequence_number for e in events] == list(range(len(events)))

    def test_the_stream_helper(self, gpt, allowed):
        with gpt.responses.stream(input="go", max_output_tokens=P, **allowed) as stream:
            kinds = [event.type for event in stream]
        assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")

    def test_a_blocked_answer(self, gpt, blocked):
        whole = gpt.responses.create(input="go", max_output_tokens=30, **blocked)
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "content_filter")
        assert whole.output_text == "aaaaa"

    def test_a_blocked_answer_streamed(self, gpt, blocked):
        events = list(gpt.responses.create(input="go", max_output_tokens=30, stream=True, **blocked))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "aaaaa"
        final = events[-1]
        assert final.type == "response.incomplete" and final.response.output_text == "aaaaa"
        assert (final.response.status, final.response.incomplete_details.reason) == ("incomplete", "content_filter")
        assert [e.sequence_number for e in events] == list(range(len(events)))
        opened = [e.item.id for e in events if e.type == "response.output_item.added"]
        assert opened == [e.item.id for e in events if e.type == "response.output_item.done"]
        assert opened == [item.id for item in final.response.output]

    def test_a_blocked_answer_in_the_stream_helper(self, gpt, blocked):
        with gpt.responses.stream(input="go", max_output_tokens=30, **blocked) as stream:
            events = list(stream)
        assert events[-1].type == "response.incomplete"
        assert events[-1].response.incomplete_details.reason == "content_filter"
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "aaaaa"

    def test_an_answer_blocked_at_its_first_token(self, gpt, quiet):
        Forced.bias = bias(quiet, 1)
        for stream in (False, True):
            found = gpt.responses.create(model=quiet.name, input="go", max_output_tokens=30, stream=stream)
            final = list(found)[-1].response if stream else found
            assert (final.status, final.incomplete_details.reason) == ("incomplete", "content_filter")
            assert final.output_text == ""

    def test_a_blocked_prompt(self, gpt, allowed):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                gpt.responses.create(input="tell*me", stream=stream, max_output_tokens=P, **allowed)
            assert caught.value.code == "content_filter"
        with (
            pytest.raises(openai.BadRequestError) as caught,
            gpt.responses.stream(input="tell*me", max_output_tokens=P, **allowed) as stream,
        ):
            list(stream)
        assert caught.value.code == "content_filter"


class TestMessages:
    def test_an_answer(self, claude, allowed):
        whole = claude.messages.create(messages=USER, **ASKED, **allowed)
        assert ([b.text for b in whole.content], whole.stop_reason) == (["aaaaaa"], "max_tokens")
        with claude.messages.stream(messages=USER, **ASKED, **allowed) as stream:
            assert "".join(stream.text_stream) == "aaaaaa"
            assert stream.get_final_message().stop_reason == "max_tokens"

    def test_a_blocked_answer(self, claude, blocked):
        whole = claude.messages.create(messages=USER, **MANY, **blocked)
        assert ([b.text for b in whole.content], whole.stop_reason) == (["aaaaa"], "refusal")
        assert whole.usage.output_tokens == P - 1

    def test_a_blocked_answer_streamed(self, claude, blocked):
        with claude.messages.stream(messages=USER, **MANY, **blocked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert ([b.text for b in final.content], final.stop_reason) == (["aaaaa"], "refusal")
        assert final.usage.output_tokens == P - 1
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1
        assert kinds[-1] == "message_stop"

    def test_an_answer_blocked_at_its_first_token(self, claude, quiet):
        Forced.bias = bias(quiet, 1)
        whole = claude.messages.create(model=quiet.name, messages=USER, **MANY)
        assert "".join(b.text for b in whole.content) == "" and whole.stop_reason == "refusal"
        with claude.messages.stream(model=quiet.name, messages=USER, **MANY) as stream:
            assert "".join(stream.text_stream) == ""
            assert stream.get_final_message().stop_reason == "refusal"

    def test_a_blocked_prompt(self, claude, allowed):
        for stream in (False, True):
            with pytest.raises(anthropic.BadRequestError) as caught:
                claude.messages.create(messages=BLOCKED, stream=stream, **ASKED, **allowed)
            assert caught.value.body["error"]["type"] == "invalid_request_error"
            assert "blocked by the safety monitor" in str(caught.value)
        with pytest.raises(anthropic.BadRequestError), claude.messages.stream(messages=BLOCKED, **ASKED, **allowed):
            pass

    def test_an_unknown_model_is_not_found(self, claude):
        with pytest.raises(anthropic.NotFoundError):
            claude.messages.create(model="claude-3", messages=USER, **ASKED)

    def test_a_system_text_and_a_history_that_fires_are_answered(self, web, claude, allowed):
        history = [*BLOCKED, {"role": "assistant", "content": "no"}, *USER]
        raw = claude.messages.with_raw_response.create(messages=history, system="be kind", **ASKED, **allowed)
        assert raw.parse().content[0].text == "aaaaaa"
        (record,) = web.sink.of(raw.headers["x-midstream-request-id"])
        assert record.verdict == "flag"
