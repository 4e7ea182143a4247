"""litellm and langchain-openai: blocks, refusals, annotations and outages are what they can read. No model is needed.

The official clients of OpenAI and Anthropic have their own tests, against each engine and in test_refusal.
"""

import asyncio
import math
import os

import openai
import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else importing it fetches a price list
import langchain_openai
import litellm
from litellm.exceptions import GuardrailRaisedException
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api import (
    GenericGuardrailAPI,
)

from monitor.api.app import create_app
from monitor.api.edge import Edge
from monitor.api.guardrail import guardrail_routes
from monitor.api.moderations import moderation_routes
from monitor.api.openai import Service
from monitor.config import load_settings
from monitor.metrics import Metrics
from monitor.types import Mode, Terms

from .doors import MODEL, FakeEngine, FakeScorer, door, judging, listening, refusing

PLANTED = {
    "bomb": {"harmful-intent": 3.0},
    "gun": {"weapons": 2.0},
    "broken": {"harmful-intent": math.nan},
}
MODES = {"harmful-intent": Mode.BLOCK, "weapons": Mode.FLAG}
ANSWERS = {"story": ["Once", " upon", " a", " bomb", " there"], "outage": ["Half", " an", " broken"]}
REFUSED = "I can't help with that."
STREAM = pytest.mark.parametrize("stream", [False, True])
ANNOTATE = pytest.mark.parametrize("annotate", [False, True])


@pytest.fixture(scope="module", autouse=True)
def runner():
    """litellm takes the main thread's loop; without one it makes one that nobody closes."""
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())
        yield runner


@pytest.fixture(scope="module")
def made():
    scorer = FakeScorer(PLANTED, MODES)
    engine = FakeEngine(scorer, ANSWERS)
    settings, metrics = load_settings(), Metrics()
    names = frozenset({MODEL, "tiny"})
    service = Service(engine, scorer.template, settings, names, len(scorer.template.tokenizer))
    app = create_app(service, metrics, engine.readiness, Edge.of(settings, metrics))
    with listening(app) as url:
        yield engine, url


@pytest.fixture
def engine(made):
    made[0].terms = Terms()
    return made[0]


@pytest.fixture
def url(made, engine):
    return made[1] + "/v1"


def user(text):
    return [{"role": "user", "content": text}]


def of_litellm(chunks):
    """(text, finish reasons)"""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return "".join(c.delta.content or "" for c in choices), [c.finish_reason for c in choices if c.finish_reason]


def of_langchain(chunks):
    found = list(chunks)
    finishes = [c.response_metadata["finish_reason"] for c in found if "finish_reason" in c.response_metadata]
    return "".join(str(c.text) for c in found), finishes


def until_it_raises(chunks, kind):
    """What came before the error."""
    found = []
    with pytest.raises(kind):
        for chunk in chunks:
            found.append(chunk)
    return found


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
class TestLiteLLM:
    @pytest.fixture
    def ask(self, url, provider):
        """(text, finish reasons) of an answer, streamed or not."""

        def asked(text, stream, **more):
            of = {"model": f"{provider}/tiny", "api_base": url, "api_key": "unused", "num_retries": 0}
            answer = litellm.completion(messages=user(text), stream=stream, **of, **more)
            if stream:
                return of_litellm(answer)
            (choice,) = answer.choices
            return choice.message.content, [choice.finish_reason]

        return asked

    @STREAM
    @ANNOTATE
    def test_a_blocked_prompt_is_its_own_content_policy_error(self, ask, engine, stream, annotate):
        engine.terms = Terms(annotate=annotate)
        with pytest.raises(litellm.ContentPolicyViolationError) as caught:
            ask("a bomb", stream)
        assert caught.value.status_code == 400 and "harmful-intent" in str(caught.value)

    @STREAM
    @ANNOTATE
    def test_a_blocked_answer_ends_with_content_filter(self, ask, engine, stream, annotate):
        engine.terms = Terms(annotate=annotate)
        assert ask("a story", stream) == ("Once upon a", ["content_filter"])

    @STREAM
    @ANNOTATE
    def test_a_flagged_answer_ends_as_ever(self, ask, engine, stream, annotate):
        engine.terms = Terms(annotate=annotate)
        assert ask("a gun", stream) == ("Fine.", ["stop"])

    def test_annotations_reach_the_caller(self, url, provider, engine):
        engine.terms = Terms(annotate=True)
        answer = litellm.completion(f"{provider}/tiny", user("a gun"), api_base=url, api_key="unused")
        (prompt,) = answer.prompt_filter_results
        assert prompt["content_filter_results"]["weapons"] == {"filtered": False, "detected": True}

    @STREAM
    def test_a_refusal_and_a_replacement_read_like_answers(self, ask, engine, stream):
        engine.terms = Terms(refusal=REFUSED, replacement="[removed]")
        assert ask("a bomb", stream) == (REFUSED, ["content_filter"])
        assert ask("a story", stream) == ("Once upon a[removed]" if stream else "[removed]", ["content_filter"])

    @STREAM
    def test_an_outage_is_unavailable_and_never_a_content_error(self, ask, stream):
        with pytest.raises(litellm.ServiceUnavailableError):
            ask("broken", stream)


def test_litellm_raises_after_an_outage_in_the_middle_of_a_stream(url):
    """Of its provider hosted_vllm only newer versions do: 1.83 takes an event with an error for the end."""
    chunks = litellm.completion("openai/tiny", user("outage"), stream=True, api_base=url, api_key="unused")
    text, finishes = of_litellm(until_it_raises(chunks, litellm.ServiceUnavailableError))
    assert "Half an".startswith(text) and finishes == []


@STREAM
def test_litellm_reads_text_completions(url, stream):
    of = {"model": "text-completion-openai/tiny", "api_base": url, "api_key": "unused", "num_retries": 0}
    answer = litellm.text_completion(prompt="a story", stream=stream, **of)
    choices = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    assert "".join(c.text or "" for c in choices) == "Once upon a"
    assert [c.finish_reason for c in choices if c.finish_reason] == ["content_filter"]
    with pytest.raises(litellm.ContentPolicyViolationError):
        list(litellm.text_completion(prompt="a bomb", stream=stream, **of))


class TestLangChain:
    @pytest.fixture
    def model(self, url):
        return langchain_openai.ChatOpenAI(model="tiny", base_url=url, api_key="unused", max_retries=0)

    @STREAM
    @ANNOTATE
    def test_a_blocked_prompt_is_a_bad_request(self, model, engine, stream, annotate):
        engine.terms = Terms(annotate=annotate)
        with pytest.raises(openai.BadRequestError) as caught:
            of_langchain(model.stream("a bomb") if stream else [model.invoke("a bomb")])
        assert caught.value.code == "content_filter" and "harmful-intent" in caught.value.message

    @STREAM
    @ANNOTATE
    def test_a_blocked_answer_ends_with_content_filter(self, model, engine, stream, annotate):
        engine.terms = Terms(annotate=annotate)
        answer = model.stream("a story") if stream else [model.invoke("a story")]
        assert of_langchain(answer) == ("Once upon a", ["content_filter"])

    @STREAM
    @ANNOTATE
    def test_a_flagged_answer_ends_as_ever(self, model, engine, stream, annotate):
        engine.terms = Terms(annotate=annotate)
        assert of_langchain(model.stream("a gun") if stream else [model.invoke("a gun")]) == ("Fine.", ["stop"])

    @STREAM
    def test_a_refusal_and_a_replacement_read_like_answers(self, model, engine, stream):
        engine.terms = Terms(refusal=REFUSED, replacement="[removed]")
        for text, said in (("a bomb", REFUSED), ("a story", "Once upon a[removed]" if stream else "[removed]")):
            answer = model.stream(text) if stream else [model.invoke(text)]
            assert of_langchain(answer) == (said, ["content_filter"])

    @STREAM
    def test_an_outage_is_a_server_error(self, model, stream):
        with pytest.raises(openai.InternalServerError) as caught:
            of_langchain(model.stream("broken") if stream else [model.invoke("broken")])
        assert caught.value.status_code == 503

    def test_an_outage_in_the_middle_of_a_stream_raises(self, model):
        text, finishes = of_langchain(until_it_raises(model.stream("outage"), openai.APIError))
        assert "Half an".startswith(text) and finishes == []

    @STREAM
    def test_completions(self, url, stream):
        model = langchain_openai.OpenAI(model="tiny", base_url=url, api_key="unused", max_retries=0)
        if stream:
            assert "".join(model.stream("a story")) == "Once upon a"
        else:
            ((answer,),) = model.generate(["a story"]).generations
            assert (answer.text, answer.generation_info["finish_reason"]) == ("Once upon a", "content_filter")


class TestRefusalTexts:
    """Of the routes that only vLLM has."""

    @pytest.fixture
    def url(self):
        with listening(refusing(REFUSED, {"/v1/responses": "responses", "/v1/messages": "messages"})) as url:
            yield url

    @STREAM
    def test_langchain_reads_responses(self, url, stream):
        model = langchain_openai.ChatOpenAI(
            model="tiny", base_url=url + "/v1", api_key="unused", max_retries=0, use_responses_api=True
        )
        found = list(model.stream("go")) if stream else [model.invoke("go")]
        assert "".join(str(c.text) for c in found) == REFUSED
        ended = [c.response_metadata for c in found if c.response_metadata.get("incomplete_details")]
        assert [m["incomplete_details"]["reason"] for m in ended] == ["content_filter"]

    @STREAM
    def test_litellm_reads_responses(self, url, stream):
        of = {"api_base": url + "/v1", "api_key": "unused", "num_retries": 0}
        answer = litellm.responses("go", "openai/tiny", stream=stream, **of)
        last = list(answer)[-1].response if stream else answer
        assert (last.status, last.incomplete_details.reason) == ("incomplete", "content_filter")
        assert last.output[0].content[0].text == REFUSED

    @STREAM
    def test_litellm_reads_messages(self, url, stream):
        of = {"api_base": url, "api_key": "unused", "num_retries": 0, "max_tokens": 9}
        answer = litellm.completion("anthropic/tiny", user("go"), stream=stream, **of)
        if stream:
            text, finishes = of_litellm(answer)
        else:
            text, finishes = answer.choices[0].message.content, [answer.choices[0].finish_reason]
        assert (text, finishes) == (REFUSED, ["content_filter"])


class TestOtherDoors:
    @pytest.fixture
    def scorer(self, engine):
        engine.scorer.reset()
        return engine.scorer

    def test_litellm_moderates(self, scorer):
        def probability(probe, version, value):
            return 1 / (1 + math.exp(-value))

        with listening(door(moderation_routes(judging(scorer), MODES.__contains__, probability))) as url:
            answer = litellm.moderation("a bomb", api_base=url + "/v1", api_key="unused")
        assert answer.results[0].flagged and scorer.calls[0][3].route == "moderations"

    @pytest.fixture
    def guardrail(self, scorer, runner):
        """guardrail(input_type, **inputs) as the gateway calls it, with its own fail mode."""
        with listening(door(guardrail_routes(judging(scorer)))) as url:

            async def apply(kind, fallback="fail_closed", **inputs):
                asked = GenericGuardrailAPI(
                    api_base=url, api_key="unused", guardrail_name="midstream", unreachable_fallback=fallback
                )
                asked.async_handler = AsyncHTTPHandler()  # the shared one would outlive this loop
                data = {"metadata": {"user_api_key_alias": "someone"}, "model": "gpt-4o"}
                try:
                    return await asked.apply_guardrail(inputs=inputs, request_data=data, input_type=kind)
                finally:
                    await asked.async_handler.close()

            yield lambda *args, **inputs: runner.run(apply(*args, **inputs))

    def test_the_gateway_lets_a_harmless_conversation_pass(self, guardrail, scorer):
        call = {"id": "c", "type": "function", "function": {"name": "run", "arguments": '{"q": "x"}'}}
        messages = [*user("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "c", "content": "a gun"}]
        inputs = {"texts": ["hi", "a gun"], "structured_messages": messages, "tool_calls": [call], "model": "gpt-4o"}
        assert guardrail("request", **inputs)["texts"] == ["hi", "a gun"]
        assert len(scorer.calls) == 1 and guardrail("response", texts=["fine"])["texts"] == ["fine"]

    @pytest.mark.parametrize("kind", ["request", "response"])
    @pytest.mark.parametrize("fallback", ["fail_closed", "fail_open"])
    def test_the_gateway_blocks(self, guardrail, kind, fallback):
        with pytest.raises(GuardrailRaisedException, match="blocked by the safety monitor"):
            guardrail(kind, fallback, texts=["a bomb"])

    def test_an_outage_is_left_to_the_gateways_own_fail_mode(self, guardrail):
        assert guardrail("request", "fail_open", texts=["broken"])["texts"] == ["broken"]
        with pytest.raises(Exception, match="503"):
            guardrail("request", texts=["broken"])
