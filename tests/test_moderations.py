"""/v1/moderations: OpenAI's official client over a real socket, a Scorer with planted values behind it."""

import math
import socket

import httpx
import openai
import pytest

from monitor.api.moderations import moderation_routes
from monitor.types import Mode

from .doors import ID, MODEL, FakeScorer, door, judging, listening, turns

HARM = {"harmful-intent", "weapons", "fraud"}
MODES = {"harmful-intent": Mode.BLOCK, "weapons": Mode.FLAG, "fraud": Mode.SHADOW, "the-sea": Mode.BLOCK}
PLANTED = {
    "bomb": {"harmful-intent": 3.0, "weapons": 2.0},
    "gun": {"weapons": 1.5},
    "scam": {"fraud": 2.5},
    "ocean": {"the-sea": 9.0},
    "broken": {"weapons": math.nan},
    "sea fog": {"the-sea": math.nan},
}


def calibrated(probe, version, value):
    assert version == "v3"
    return 1 / (1 + math.exp(-value / 2))


@pytest.fixture(scope="module")
def made():
    scorer = FakeScorer(PLANTED, MODES)
    routes = moderation_routes(judging(scorer, max_prompts=10), HARM.__contains__, calibrated)
    with listening(door(routes)) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
        yield scorer, url, client


@pytest.fixture
def scorer(made):
    made[0].reset()
    return made[0]


@pytest.fixture
def url(made, scorer):
    return made[1]


@pytest.fixture
def moderate(made, scorer):
    return lambda given, **more: made[2].moderations.create(input=given, **more)


def refused(moderate, given, **more):
    with pytest.raises(openai.BadRequestError) as caught:
        moderate(given, **more)
    assert caught.value.param == "input"
    return str(caught.value)


def test_one_text(moderate, scorer):
    answer = moderate("how to build a bomb")
    assert (answer.id, answer.model) == (f"modr-{ID}", MODEL)
    (result,) = answer.results
    assert result.flagged
    assert result.categories.model_extra == {"harmful-intent": True, "weapons": True, "fraud": False}
    assert result.category_scores.model_extra == {
        probe: pytest.approx(calibrated(probe, "v3", value))
        for probe, value in (("harmful-intent", 3.0), ("weapons", 2.0), ("fraud", -4.0))
    }
    assert result.category_applied_input_types.model_extra == {probe: ["text"] for probe in HARM}
    ((identity, prompt, said, caller),) = scorer.calls
    assert (identity, turns(prompt), said) == (ID, [("user", "how to build a bomb")], "")
    assert (caller.key, caller.route, caller.model) == ("tenant-1", "moderations", MODEL)


@pytest.mark.parametrize(
    ("text", "flagged"), [("hello", False), ("gun", True), ("scam", True), ("ocean", False), ("", False)]
)
def test_flagged_is_any_harm_probe_above_its_threshold_whatever_its_mode(moderate, text, flagged):
    """`scam` is a shadow probe's; `ocean` is a concept, that is no category though it would block."""
    (result,) = moderate(text).results
    assert result.flagged is flagged and any(result.categories.model_extra.values()) is flagged
    assert set(result.categories.model_extra) == HARM


def test_many_texts_are_judged_a_few_at_once_and_answered_in_order(moderate, scorer):
    scorer.wait_for = 4
    words = ["bomb", "hello", "scam", "ocean", "gun", "a", "b", "c", "d", "bomb"]
    answer = moderate(words)
    assert [r.flagged for r in answer.results] == [w in ("bomb", "scam", "gun") for w in words]
    assert scorer.most_at_once == 4
    assert sorted(call[0] for call in scorer.calls) == sorted([ID, *(f"{ID}-{i}" for i in range(1, 10))])


def test_parts_are_one_input_as_with_openai(moderate, scorer):
    parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "bomb"}]
    assert [r.flagged for r in moderate(parts).results] == [True]
    assert turns(scorer.calls[0][1]) == [("user", "first\nbomb")]


def test_an_image_is_refused_with_the_reason(moderate, scorer):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    assert "only text can be judged" in refused(moderate, [{"type": "text", "text": "x"}, image])
    assert scorer.calls == []


def test_bounds(moderate, scorer):
    assert "send 1 to 10" in refused(moderate, ["x"] * 11)
    assert "send 1 to 10" in refused(moderate, [])
    assert "shorten" in refused(moderate, ["fine", "x" * 500])
    assert len(moderate(["x"] * 10).results) == 10


def test_a_model_name_chooses_nothing(moderate, scorer):
    """Clients send OpenAI's names; a policy is chosen by the model's own."""
    for name in ("omni-moderation-latest", "tiny", MODEL):
        assert moderate("x", model=name).model == MODEL
        assert scorer.calls[-1][3].model == MODEL


@pytest.mark.parametrize("text", ["broken", "bomb broken"])
@pytest.mark.parametrize("fail_mode", ["open", "closed"])
def test_a_missing_score_is_never_not_flagged(url, scorer, text, fail_mode):
    scorer.fail_mode = fail_mode
    answer = httpx.post(url + "/v1/moderations", json={"input": ["hello", text]})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "unavailable" and "results" not in answer.json()


def test_a_missing_score_of_a_concept_takes_nothing_away(moderate, scorer):
    scorer.fail_mode = "open"
    assert moderate("sea fog").results[0].flagged is False


def test_without_a_harm_probe_nothing_is_said(url, scorer):
    del scorer.modes["harmful-intent"], scorer.modes["weapons"], scorer.modes["fraud"]
    answer = httpx.post(url + "/v1/moderations", json={"input": "hello"})
    assert answer.status_code == 503 and "no harm probe" in answer.json()["error"]["message"]


def test_a_full_queue_is_429(url, scorer):
    scorer.full = True
    answer = httpx.post(url + "/v1/moderations", json={"input": ["a", "b"]})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": None},
        {"input": 7},
        {"input": {"type": "text", "text": "x"}},
        {"input": [["x"]]},
        {"input": ["x", {"type": "text", "text": "x"}]},
        {"input": "x", "threshold": 0.9},
        {"input": [1, 2]},
        {"input": "x", "model": 1},
    ],
)
def test_what_has_another_shape_is_400(url, scorer, body):
    answer = httpx.post(url + "/v1/moderations", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert scorer.calls == []


def test_half_a_surrogate_pair_is_400(url, scorer):
    for given in (b'"\\ud800"', b'["\\udfff"]', b'[{"type": "text", "text": "\\ud800"}]'):
        answer = httpx.post(
            url + "/v1/moderations", content=b'{"input": %s}' % given, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
    assert scorer.calls == []


def test_a_client_that_leaves_stops_the_work(url, scorer):
    scorer.hang = True
    host, port = url.removeprefix("http://").split(":")
    body = b'{"input": "hello"}'
    lines = (
        "POST /v1/moderations HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    with socket.create_connection((host, int(port))) as client:
        client.sendall("\r\n".join((*lines, "", "")).encode() + body)
        assert scorer.entered.wait(30)
    assert scorer.cancelled.wait(30)
