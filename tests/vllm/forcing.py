"""An engine that samples what it is told: tokens are forced one by one, by a logits processor in the worker."""

import json
from typing import Any

import httpx
import pytest
import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from ..conftest import calibrated
from ..star import fit_star_probe
from .conftest import EAGER, Harness, Web, make_plan

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAM = pytest.mark.parametrize("stream", [False, True])
USER = [{"role": "user", "content": "go"}]
BLOCKED = [{"role": "user", "content": "aaa*aa"}]
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


def refused(response):
    """No token: a 4xx, or vLLM's error event in a stream that says nothing else."""
    if response.status_code == 200:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
        return bool(lines) and all(json.loads(line[6:]).keys() == {"error"} for line in lines)
    return 400 <= response.status_code < 500
