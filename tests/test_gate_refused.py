"""Gate: every refusal is counted once, whoever it is from."""

import pytest

from monitor.metrics import Metrics

from .gated import HARMFUL, Answer, Inner, ask, chunk, fail, judge, part, stream, user, whole

BODY = {"messages": [user()]}


def rejected(metrics):
    samples = [s for family in metrics.registry.collect() for s in family.samples]
    return {s.labels["status"]: s.value for s in samples if s.name == "midstream_rejected_total"}


def asked(tiny, *script, **body):
    """(status, what was counted)"""
    metrics = Metrics()
    answer = Answer(ask(tiny, Inner(*script), BODY | body, metrics=metrics))
    return answer.status, rejected(metrics)


@pytest.mark.parametrize("status", [400, 404, 429, 500])
@pytest.mark.parametrize("streams", [False, True])
def test_what_vllm_refuses_is_counted(tiny, status, streams):
    """An unknown model, too long a prompt, too many requests."""
    error = {"error": {"message": "no", "type": "x", "param": None, "code": status}}
    assert asked(tiny, *whole(error, status), stream=streams) == (status, {str(status): 1})


def test_a_blocked_prompt_is_counted_once(tiny):
    assert asked(tiny, fail(HARMFUL), *whole({}, 200)) == (400, {"400": 1})


def test_an_answer_is_no_refusal(tiny):
    assert asked(tiny, judge(), *whole({"choices": []})) == (200, {})
    last = part(chunk(0, "a", "stop"), more=False)
    assert asked(tiny, stream(), judge(), last, stream=True) == (200, {})
