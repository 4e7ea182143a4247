"""The proxy in front of a plain vLLM server: nothing of ours runs there."""

import json
import sys

import httpx
import openai
import pytest

from monitor.engines.vllm.environment import prepare

from ..contract import CHAT, TEXT
from ..fake_observer import proxying
from ..foreign import foreign, free_port
from ..star import FILLER, token
from .conftest import EAGER

KEY = "the-operators-own"


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """Its URL."""
    prepare()
    port = free_port()
    # Not the command `vllm`: the CPU build's metadata has another name, and it stops there.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_folder)]
    command += ["--served-model-name", "far"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, *EAGER]
    with foreign(command, port, tmp_path_factory.mktemp("vllm")) as url:
        yield url


@pytest.fixture(scope="module")
def proxy(plain):
    with proxying(plain + "/v1", key=KEY, max_n=8) as server:
        yield server


@pytest.fixture(scope="module")
def api(proxy):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def forced(observer, p, character="*"):
    """Fields that make the answer "a" before position p (from 1 on) and the character there. See tests/star.py."""

    class Model:
        tokenizer = observer.tokenizer

    bias = {str(token(Model, FILLER)): 98, str(token(Model, ord(character))): 101 - 2 * p}
    return {"logit_bias": bias, "frequency_penalty": 2, "temperature": 0.01, "max_tokens": 40}


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_reads_an_answer(proxy, api, stream):
    given = forced(proxy.observer, 5, "b") | {"model": "far", "max_tokens": 8, "stream": stream}
    answer = api.chat.completions.create(messages=[{"role": "user", "content": "go on"}], n=2, **given)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        texts = ["".join(c.delta.content or "" for c in choices if c.index == i) for i in range(2)]
        assert [c.finish_reason for c in choices if c.finish_reason] == ["length"] * 2
    else:
        texts = [c.message.content for c in answer.choices]
        assert answer.usage.completion_tokens == 16
    assert texts[0].startswith("aaaa") and texts == texts[:1] * 2
    assert [m.id for m in api.models.list()] == ["far"]
    assert proxy.idle()


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_the_trigger_or_later_goes_out_at_any_position(proxy, path, stream):
    for p in range(1, 33):
        asked = {"messages": [{"role": "user", "content": "go"}]} if path == CHAT else {"prompt": "go on"}
        body = asked | {"stream": stream, "logprobs": True if path == CHAT else 1} | forced(proxy.observer, p)
        response = proxy.post(
            path.removeprefix("/v1"), body | ({"stream_options": {"include_usage": True}} if stream else {})
        )
        assert proxy.cut_before(p, response, stream).usages[-1]["completion_tokens"] == p - 1
    assert proxy.idle()


def test_a_client_that_leaves_ends_its_record(proxy):
    class Model:
        tokenizer = proxy.observer.tokenizer

    body = {"model": "far", "stream": True, "messages": [{"role": "user", "content": "go"}], "max_tokens": 900}
    body |= {"logit_bias": {str(token(Model, FILLER)): 98}}
    with httpx.stream("POST", proxy.url + CHAT, json=body, timeout=60) as left:
        next(left.iter_lines())
    (record,) = proxy.records(left)
    assert record.finish == "aborted" and record.coverage.response_tokens < 900
    assert proxy.idle()


def test_responses_are_read_along_too(proxy, api):
    stream = api.responses.create(model="far", input="go on", max_output_tokens=12, temperature=0, stream=True)
    events = list(stream)
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert events[-1].type in ("response.completed", "response.incomplete") and said
    whole = api.responses.create(model="far", input="go on", max_output_tokens=12, temperature=0)
    assert whole.output_text == said
    assert proxy.idle() and all(r.coverage.unmonitored == 0 for r in proxy.sink.records)


def test_vllms_own_errors_pass(proxy):
    for body in ({"model": "other"}, {"max_tokens": -1}, {"temperature": "hot"}):
        response = proxy.chat(**body)
        assert 400 <= response.status_code < 500 and json.loads(response.text)["error"]["message"]
