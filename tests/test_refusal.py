"""Refusal texts: official clients read them as normal, finished answers, whole and streamed."""

import anthropic
import httpx
import openai
import pytest

from monitor.api.refusal import ROUTES
from monitor.api.vllm.wires import WIRES

from .doors import ID, listening, refusing

TEXT = 'I can\'t help with that: "é \u2028 data: x\n\ndata: [DONE]".'  # what a naive event stream would trip over
USER = [{"role": "user", "content": "go"}]
PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}


@pytest.fixture(scope="module")
def url():
    with listening(refusing(TEXT, PATHS)) as url:
        yield url


@pytest.fixture
def gpt(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


def texts_and_finishes(chunks, n, text):
    """Each choice has one finish, after all of its text, and there is never an empty `choices`."""
    said, finishes = [""] * n, [[] for _ in range(n)]
    for chunk in chunks:
        (choice,) = chunk.choices
        assert not finishes[choice.index]
        said[choice.index] += text(choice) or ""
        if choice.finish_reason:
            finishes[choice.index].append(choice.finish_reason)
    assert finishes == [["content_filter"]] * n
    return said


@pytest.mark.parametrize("n", [1, 3])
class TestChoices:
    def test_chat(self, gpt, n):
        whole = gpt.chat.completions.create(model="m", messages=USER, n=n)
        assert [(c.index, c.message.content, c.finish_reason) for c in whole.choices] == [
            (i, TEXT, "content_filter") for i in range(n)
        ]
        assert (whole.id, whole.model, whole.created, whole.object) == (f"chatcmpl-{ID}", "m", 7, "chat.completion")
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (12, 0)

    def test_chat_streamed(self, gpt, n):
        chunks = list(gpt.chat.completions.create(model="m", messages=USER, n=n, stream=True))
        assert texts_and_finishes(chunks, n, lambda c: c.delta.content) == [TEXT] * n
        assert {(c.id, c.object, c.model, c.usage) for c in chunks} == {
            (f"chatcmpl-{ID}", "chat.completion.chunk", "m", None)
        }
        assert [c.choices[0].delta.role for c in chunks if c.choices[0].delta.role] == ["assistant"] * n

    def test_chat_in_the_stream_helper(self, gpt, n):
        with gpt.chat.completions.stream(model="m", messages=USER, n=n) as stream:
            events = list(stream)
            snapshot = stream.current_completion_snapshot
            with pytest.raises(openai.ContentFilterFinishReasonError):  # the client's own word for it
                stream.get_final_completion()
        assert [c.message.content for c in snapshot.choices] == [TEXT] * n
        assert "".join(e.delta for e in events if e.type == "content.delta") == TEXT * n

    def test_completions(self, gpt, n):
        whole = gpt.completions.create(model="m", prompt="go on", n=n)
        assert [(c.index, c.text, c.finish_reason) for c in whole.choices] == [
            (i, TEXT, "content_filter") for i in range(n)
        ]
        assert (whole.id, whole.object) == (f"cmpl-{ID}", "text_completion")

    def test_completions_streamed(self, gpt, n):
        chunks = list(gpt.completions.create(model="m", prompt="go on", n=n, stream=True))
        assert texts_and_finishes(chunks, n, lambda c: c.text) == [TEXT] * n
        assert {(c.id, c.object) for c in chunks} == {(f"cmpl-{ID}", "text_completion")}

    @pytest.mark.parametrize("route", ["chat", "completions"])
    def test_usage_is_the_last_chunk(self, gpt, n, route):
        asked = {"chat": {"messages": USER}, "completions": {"prompt": "go"}}[route]
        create = gpt.chat.completions.create if route == "chat" else gpt.completions.create
        chunks = list(create(model="m", n=n, stream=True, stream_options={"include_usage": True}, **asked))
        assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1) and all(c.choices for c in chunks[:-1])
        assert (chunks[-1].choices, chunks[-1].usage.total_tokens, chunks[-1].id) == ([], 12, chunks[0].id)


class TestResponses:
    def test_whole(self, gpt):
        whole = gpt.responses.create(model="m", input="go")
        assert (whole.id, whole.status, whole.incomplete_details.reason) == (
            f"resp_{ID}",
            "incomplete",
            "content_filter",
        )
        assert whole.output_text == TEXT and whole.error is None and whole.usage.input_tokens == 12

    def test_streamed(self, gpt):
        events = list(gpt.responses.create(model="m", input="go", stream=True))
        assert [e.type for e in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        assert [e.sequence_number for e in events] == list(range(9))
        final = events[-1].response
        assert (final.status, final.incomplete_details.reason, final.output_text) == (
            "incomplete",
            "content_filter",
            TEXT,
        )
        assert {e.response.id for e in events if hasattr(e, "response")} == {f"resp_{ID}"}
        items = {e.item.id for e in events if hasattr(e, "item")} | {e.item_id for e in events if hasattr(e, "item_id")}
        assert items == {final.output[0].id}

    def test_in_the_stream_helper(self, gpt):
        with gpt.responses.stream(model="m", input="go") as stream:
            events = list(stream)
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
        assert events[-1].type == "response.incomplete" and events[-1].response.output_text == TEXT


class TestMessages:
    ASKED = {"model": "m", "messages": USER, "max_tokens": 9}  # noqa: RUF012

    def test_whole(self, claude):
        whole = claude.messages.create(**self.ASKED)
        assert ([b.text for b in whole.content], whole.stop_reason, whole.id) == ([TEXT], "refusal", f"msg_{ID}")
        assert whole.stop_details.type == "refusal" and whole.stop_details.explanation
        assert (whole.usage.input_tokens, whole.usage.output_tokens) == (12, 0)

    def test_streamed(self, claude):
        events = list(claude.messages.create(**self.ASKED, stream=True))
        assert [e.type for e in events] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert events[0].message.stop_reason is None and events[-2].delta.stop_reason == "refusal"

    def test_in_the_stream_helper(self, claude):
        with claude.messages.stream(**self.ASKED) as stream:
            assert "".join(stream.text_stream) == TEXT
            final = stream.get_final_message()
        assert ([b.text for b in final.content], final.stop_reason, final.id) == ([TEXT], "refusal", f"msg_{ID}")
        assert final.stop_details.type == "refusal"


def test_extra_fields_stand_on_the_first_chunk_only(url):
    body = {"model": "m", "messages": USER, "user": "annotated"}
    assert "prompt_filter_results" in httpx.post(url + "/v1/chat/completions", json=body).json()
    streamed = httpx.post(url + "/v1/chat/completions", json=body | {"stream": True})
    assert streamed.text.count("prompt_filter_results") == 1
    assert "prompt_filter_results" in streamed.text.partition("\n\n")[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_on_the_wire(url, path, stream):
    answer = httpx.post(url + path, json={"model": "m", "stream": stream, "n": 2})
    kind = "text/event-stream; charset=utf-8" if stream else "application/json"
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert ("no-cache" in answer.headers.get("cache-control", "")) is stream
    if stream:
        events = answer.content.split(b"\n\n")
        assert events[-1] == b"" and all(e.startswith((b"data: ", b"event: ")) for e in events[:-1])
        has_done = path in ("/v1/chat/completions", "/v1/completions")
        assert (events[-2] == b"data: [DONE]") is has_done and answer.content.count(b"\ndata: [DONE]") == has_done


def test_every_generating_route_has_one():
    assert set(PATHS) < set(WIRES) and len(ROUTES) == len(WIRES) == len(PATHS) + 1  # and chat's /batch
