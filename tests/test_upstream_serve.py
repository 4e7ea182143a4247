"""`midstream serve --upstream` as an operator starts it: an exported observer, the command, a scripted endpoint."""

import os
import subprocess
import sys

import httpx
import openai
import pytest

from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model

from .conftest import calibrated, publish
from .fake_upstream import chat_stream, chat_whole, head, json_answer
from .star import fit_star_probe
from .test_demo import Process

FOLDERS = ("MIDSTREAM_MODEL", "MIDSTREAM_STORE", "MIDSTREAM_CACHE")


@pytest.fixture(scope="module")
def settings(tiny_folder, tmp_path_factory):
    """A model, a probe that fires on `*`, and an observer of both built by the command."""
    folder = tmp_path_factory.mktemp("reads-along")
    model = load_model(str(tiny_folder), cache=cache_dir())
    probe, threshold = fit_star_probe(model)
    publish(model, [(probe, {"calibration": calibrated(threshold)})], folder / "store")
    values = dict(zip(FOLDERS, (str(tiny_folder), str(folder / "store"), str(folder / "cache")), strict=True))
    command = [sys.executable, "-m", "monitor.cli", "observer", "build"]
    built = subprocess.run(command, env=os.environ | values, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "3 blocks" in built.stdout or "2 blocks" in built.stdout, built.stdout
    return values


@pytest.fixture(scope="module")
def proxy(settings, upstream, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FAR_KEY", "sk-far")
        config = tmp_path_factory.mktemp("config") / "settings.yaml"
        config.write_text(
            "".join(f"{key.removeprefix('MIDSTREAM_').lower()}: {value}\n" for key, value in settings.items())
        )
        process = Process(
            tmp_path_factory.mktemp("serve"),
            *("--config", str(config), "--upstream", upstream.url, "--upstream-key-env", "FAR_KEY"),
            *("--mode", "star.prompt=block", "--mode", "star.response=block", "--api-key", "our-own-key"),
        )
    process.api = openai.OpenAI(base_url=process.url + "/v1", api_key="our-own-key", max_retries=0, timeout=60)
    yield process
    process.stop()


def ask(proxy, text="go on", **more):
    return proxy.api.chat.completions.create(model="far", messages=[{"role": "user", "content": text}], **more)


def test_a_harmless_answer_comes_as_it_was(proxy, upstream):
    upstream.answer = lambda asked: json_answer(chat_whole("aaaa bbbb"))
    assert ask(proxy).choices[0].message.content == "aaaa bbbb"
    headers = {k.lower(): v for k, v in dict(upstream.asked[-1].headers).items()}
    assert headers["authorization"] == "Bearer sk-far", "the endpoint gets its own key, never the client's"


def test_a_blocked_prompt_is_never_sent(proxy, upstream):
    before = len(upstream.asked)
    with pytest.raises(openai.BadRequestError, match="blocked by the safety monitor"):
        ask(proxy, "*** *** ***", stream=True)
    assert len(upstream.asked) == before


@pytest.mark.parametrize("position", [1, 2, 7, 20])
def test_nothing_from_the_trigger_on_goes_out(proxy, upstream, position):
    upstream.answer = lambda asked: [head(), *chat_stream("a" * (position - 1) + "*" + "b" * 9, size=3)]
    chunks = list(ask(proxy, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert "*" not in text and "b" not in text and text == "a" * len(text) and len(text) < position
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["content_filter"]


def test_it_says_what_it_is_and_counts(proxy):
    ready = httpx.get(proxy.url + "/ready").json()
    assert ready["status"] == "ready" and ready["engine"] == "observer"
    metrics = httpx.get(proxy.url + "/metrics").text
    assert 'midstream_blocks_total{model="tiny-llama",phase="response",probe="star"} 4.0' in metrics
    assert "midstream_final_unscored_tokens_total 0.0" in metrics, "the observer reads the last token, too"


def test_an_observer_that_was_not_built_is_a_line_with_the_command(settings, tmp_path):
    values = settings | {"MIDSTREAM_CACHE": str(tmp_path / "empty")}
    command = [sys.executable, "-m", "monitor.cli", "serve", "--port", "0", "--upstream", "http://127.0.0.1:9/v1"]
    failed = subprocess.run(command, env=os.environ | values, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "midstream observer build" in failed.stderr.strip().splitlines()[-1]


def test_an_upstream_beside_vllm_is_refused():
    command = [sys.executable, "-m", "monitor.cli", "serve", "--engine", "vllm", "--upstream", "http://127.0.0.1:9/v1"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "exclude each other" in failed.stderr.strip().splitlines()[-1]


def test_a_dtype_that_the_observer_does_not_take_is_refused():
    values = {"MIDSTREAM_DTYPE": "bfloat16"}
    command = [sys.executable, "-m", "monitor.cli", "serve", "--port", "0", "--upstream", "http://127.0.0.1:9/v1"]
    failed = subprocess.run(command, env=os.environ | values, capture_output=True, text=True, timeout=120)
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 2 and "'dtype' has value 'bfloat16'" in last and "is float32; unset" in last
