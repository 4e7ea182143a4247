"""The proxy in front of `transformers serve`: nothing of ours runs there, and the official client asks."""

import json
import sys

import openai
import pytest

from .fake_observer import proxying
from .foreign import foreign, free_port
from .star import FILLER, STAR, token

STREAM = pytest.mark.parametrize("stream", [False, True])
CHAT, TEXT = "/chat/completions", "/completions"
MORE = 3  # tokens after the trigger


@pytest.fixture(scope="module")
def name(tiny_folder):
    """It calls its models by their folders."""
    return str(tiny_folder)


@pytest.fixture(scope="module")
def proxy(name, tmp_path_factory):
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    folder = tmp_path_factory.mktemp("transformers")
    # Tiny matrices: a second thread only waits.
    with foreign(command, port, folder, OMP_NUM_THREADS="1") as url, proxying(url + "/v1") as server:
        yield server


@pytest.fixture(scope="module")
def api(proxy):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def forced(observer, p):
    """Makes the answer "a" before position p (from 1 on), and the star there: a run of p - 1 of them calls for it."""

    class Model:
        tokenizer = observer.tokenizer

    a, star = token(Model, FILLER), token(Model, STAR)
    bias = [[[a], 50.0], [[*[a] * (p - 1), star], 100.0]]
    return {"generation_config": json.dumps({"sequence_bias": bias, "do_sample": False, "max_new_tokens": p + MORE})}


@STREAM
def test_openais_client_reads_an_answer(proxy, api, name, stream):
    asked = {"model": name, "messages": [{"role": "user", "content": "go on"}], "stream": stream}
    answer = api.chat.completions.create(**asked, max_tokens=8, extra_body=forced(proxy.observer, 60))
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        text = "".join(c.delta.content or "" for c in choices)
        assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "length"
    assert text == "a" * 8
    assert proxy.idle() and proxy.sink.records[-1].finish == "length"


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param((1, 2, 9), id="sample"),
        pytest.param(range(1, 33), id="all", marks=pytest.mark.attack),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
@STREAM
def test_nothing_of_the_trigger_or_later_goes_out(proxy, name, path, stream, positions):
    for p in positions:
        asked = {"messages": [{"role": "user", "content": "go"}]} if path == CHAT else {"prompt": "go on"}
        body = asked | {"model": name, "stream": stream} | forced(proxy.observer, p)
        response = proxy.post(path, body)
        proxy.cut_before(p, response, stream)
    assert proxy.idle()


@STREAM
def test_responses_are_read_along_and_blocked(proxy, api, name, stream):
    asked = {"model": name, "input": "go", "stream": stream, "max_output_tokens": 9}
    for p, text, reason in ((60, "a" * 9, None), (7, "aaaaaa", "content_filter")):
        found = api.responses.create(**asked, extra_body=forced(proxy.observer, p))
        final = list(found)[-1].response if stream else found
        assert final.output_text == text
        assert reason is None or (final.status, final.incomplete_details.reason) == ("incomplete", reason)
        assert proxy.idle() and proxy.sink.records[-1].finish == (reason or "stop")


def test_its_own_errors_pass(proxy):
    response = proxy.chat(model="no/such-model")
    assert response.status_code >= 400 and "choices" not in response.text
