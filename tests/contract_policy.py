"""What a policy file does over HTTP, whatever the engine. A test file gives the fixture `policed`.

policed(policy): a running server under this policy file, whose probe `soft` gives the token `*` a logit from 0 to 0.5
and every other token less. `endpoint` is the second judge that a policy may ask.
"""

import json
import threading

import httpx
import pytest
import torch

from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.policy.file import load_policy
from monitor.probe import ProbeBank, ProbeWeights
from monitor.types import Action, Caller

from .contract import BOTH, CHAT, HTTP, STREAM, TEXT, Reply, asked, forced
from .second_judge import SecondJudge
from .star import FILLER, LAYER, STAR, fit_star_probe, token

HARMFUL = 0.99  # probability that the second judge gives
AT = 5  # position of the star in an answer
HIT = "go onaaaa*aa"  # a prompt with it
# What a sure probe gives: `*` is above it.
SURE = {"mode": "block", "threshold": 0.0}
# What an unsure one does: the token `*` is in the band.
UNSURE = {"mode": "block", "threshold": 1.0, "escalate": 0.0}
DECISION, POLICY = "x-midstream-decision", "x-midstream-policy"


def soft_star(quiet):
    """The fitted probe of tests/star.py, scaled so that the second judge can outweigh it either way."""
    probe, threshold = fit_star_probe(quiet)
    shifted = ProbeWeights("soft", probe.weight, probe.bias - threshold)
    start = quiet.template.encode([{"role": "user", "content": "go on"}]).token_ids
    prompts = [
        quiet.template.raw([*start, *[token(quiet, FILLER)] * p, token(quiet, STAR), token(quiet, FILLER)])
        for p in range(32)
    ]
    highest = max(
        float(score_streams(ProbeBank([shifted], quiet.d_model), streams)[:, 0].max())
        for _, streams in residual_streams(quiet, prompts, [LAYER])
    )
    scale = 0.5 / highest
    weight = {layer: torch.as_tensor(w) * scale for layer, w in shifted.weight.items()}
    return ProbeWeights("soft", weight, shifted.bias * scale)


def policy(prompt=None, response=None, **more):
    phases = {"prompt": prompt or {"mode": "shadow"}, "response": response or {"mode": "shadow"}}
    return {"name": "house", "probes": {"soft": phases}} | more


def as_file(folder, data):
    path = folder / "policy.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return load_policy(path)


@pytest.fixture(scope="module")
def endpoint():
    running = SecondJudge()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _fresh(endpoint):
    endpoint.let_go()
    endpoint.asked.clear()
    endpoint.says = 0.0


def starred(server, path, stream, **more):
    body = asked(path) | forced(server, AT) | {"max_tokens": 12, "stream": stream} | more
    return server.post(path, body)


class Policed:
    # --- a second judge -----------------------------------------------------------------------------------------

    @BOTH
    @STREAM
    def test_an_uncertain_answer_is_held_and_blocked_if_the_second_judge_says_so(self, policed, endpoint, path, stream):
        server = policed(policy(response=UNSURE, second=endpoint.policy))
        endpoint.says = HARMFUL
        reply = Reply(starred(server, path, stream))
        assert reply.texts == {0: "a" * (AT - 1)} and reply.finishes == {0: ["content_filter"]}
        (record,) = server.records(reply.id)
        assert record.verdict is Action.BLOCK and record.policy == "house"
        (question,) = record.escalations
        assert (question.result, question.position) == ("block", record.coverage.prompt_tokens + AT - 1)
        assert endpoint.wait().endswith("*\n</conversation>") and len(endpoint.asked) == 1
        assert server.idle()

    @BOTH
    @STREAM
    def test_and_goes_on_whole_if_not(self, policed, endpoint, path, stream):
        server = policed(policy(response=UNSURE, second=endpoint.policy))
        reply = Reply(starred(server, path, stream))
        assert len(reply.texts[0]) == 12 and reply.texts[0][AT - 1] == "*" and reply.finishes == {0: ["length"]}
        (record,) = server.records(reply.id)
        assert record.verdict is Action.ALLOW and record.escalations[0].result == "clear"

    @STREAM
    def test_the_engines_end_waits_for_the_answer_too(self, policed, endpoint, stream):
        """The star is the last token but one: the engine is done long before the second judge."""
        server = policed(policy(response=UNSURE, second=endpoint.policy))
        for says, text, finish in ((0.0, "a" * (AT - 1) + "*", "length"), (HARMFUL, "a" * (AT - 1), "content_filter")):
            endpoint.says = says
            endpoint.hold()
            got = []
            asking = threading.Thread(
                target=lambda got=got: got.append(starred(server, CHAT, stream, max_tokens=AT + 1))
            )
            questions = len(endpoint.asked)
            asking.start()
            endpoint.wait(questions + 1)
            assert got == [], "nothing ends while the question is open"
            endpoint.let_go()
            asking.join(60)
            reply = Reply(got[0])
            assert reply.texts[0][:AT] == text and reply.finishes == {0: [finish]}

    def test_while_it_waits_nothing_of_the_held_part_is_on_the_wire(self, policed, endpoint):
        server = policed(policy(response=UNSURE, second=endpoint.policy))
        endpoint.hold()
        body = {"model": server.model.name, "stream": True, "max_tokens": 12} | asked(CHAT) | forced(server, AT)
        seen = ""
        with HTTP.stream("POST", server.url + CHAT, json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    seen += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                if seen == "a" * (AT - 1):
                    endpoint.wait()
                    assert "*" not in seen
                    endpoint.let_go()
        assert seen[AT - 1] == "*" and len(seen) == 12

    @BOTH
    def test_an_uncertain_prompt_waits_before_its_first_byte(self, policed, endpoint, path):
        server = policed(policy(prompt=UNSURE, second=endpoint.policy))
        endpoint.says = HARMFUL
        for stream in (False, True):
            response = server.post(path, asked(path, HIT) | {"max_tokens": 3, "stream": stream})
            assert response.status_code == 400 and response.json()["error"]["code"] == "content_filter"
        endpoint.says = 0.0
        assert Reply(server.post(path, asked(path, HIT) | {"max_tokens": 3})).finishes[0] in (["length"], ["stop"])

    @pytest.mark.parametrize(("fail_mode", "status"), [("closed", 503), ("open", 200)])
    def test_a_second_judge_that_fails_is_the_fail_modes(self, policed, endpoint, fail_mode, status):
        server = policed(policy(prompt=UNSURE, second=endpoint.policy, fail_mode=fail_mode))
        endpoint.says = (500, b"{}")
        response = server.post(CHAT, asked(CHAT, HIT) | {"max_tokens": 3})
        assert response.status_code == status and len(endpoint.asked) == 1
        if status == 503:
            assert response.headers["retry-after"] and response.headers[DECISION] == "unmonitored"

    def test_a_deadline_that_passes_is_a_failure(self, policed, endpoint):
        server = policed(policy(prompt=UNSURE, second=endpoint.policy | {"deadline_s": 0.2}))
        endpoint.hold()
        assert server.post(CHAT, asked(CHAT, HIT) | {"max_tokens": 3}).status_code == 503
        endpoint.let_go()

    def test_a_client_that_leaves_while_it_waits_ends_the_request(self, policed, endpoint):
        server = policed(policy(prompt=UNSURE, second=endpoint.policy))
        endpoint.hold()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.url + CHAT,
                json={"model": server.model.name, "max_tokens": 3} | asked(CHAT, HIT),
                timeout=httpx.Timeout(30, read=1.0),
            )
        endpoint.let_go()
        assert server.idle()

    # --- what a client is told ----------------------------------------------------------------------------------

    @BOTH
    @STREAM
    def test_annotations_are_azures_and_never_without_a_choice(self, policed, path, stream):
        server = policed(policy(response=SURE, annotate=True))
        reply = Reply(starred(server, path, stream))
        assert all(body["choices"] for body in reply.bodies) and len(reply.ids) == 1
        clean = {"soft": {"filtered": False, "detected": False}}
        assert reply.bodies[0]["prompt_filter_results"] == [{"prompt_index": 0, "content_filter_results": clean}]
        told = [c for body in reply.bodies for c in body["choices"] if "content_filter_results" in c]
        assert [c["finish_reason"] for c in told] == ["content_filter"]
        assert told[0]["content_filter_results"] == {"soft": {"filtered": True, "detected": True}}
        assert sum("prompt_filter_results" in body for body in reply.bodies) == 1

    @BOTH
    @STREAM
    def test_without_the_policy_nothing_is_annotated(self, policed, path, stream):
        raw = starred(policed(policy(response=SURE)), path, stream).text
        assert "filter_results" not in raw and "content_filter" in raw

    @BOTH
    @STREAM
    def test_a_blocked_answer_may_be_replaced(self, policed, path, stream):
        server = policed(policy(response=SURE, blocked_answer={"replace": "[ended by policy]"}))
        reply = Reply(starred(server, path, stream, **({"logprobs": True} if path == CHAT else {"logprobs": 1})))
        said = "a" * (AT - 1) if stream else ""
        assert reply.texts == {0: said + "[ended by policy]"} and reply.finishes == {0: ["content_filter"]}
        assert "*" not in reply.raw.replace("[ended by policy]", "")

    @BOTH
    @STREAM
    def test_a_blocked_prompt_may_be_refused_in_words(self, policed, path, stream):
        server = policed(policy(prompt=SURE, blocked_prompt={"refusal": "I can't help with that."}))
        response = server.post(path, asked(path, HIT) | {"max_tokens": 3, "stream": stream, "n": 2})
        reply = Reply(response)
        assert reply.texts == dict.fromkeys(range(2), "I can't help with that.")
        assert reply.finishes == {0: ["content_filter"], 1: ["content_filter"]}
        assert response.headers[DECISION] == "block" and response.headers[POLICY] == "house"
        records = server.records(reply.id, 2)  # the second need not have been read when the first is blocked
        assert any(r.verdict is Action.BLOCK for r in records)
        assert all(r.verdict is Action.BLOCK or r.finish == "aborted" for r in records)

    @STREAM
    def test_headers_name_the_decision_and_the_policy(self, policed, stream):
        server = policed(policy(prompt={"mode": "flag", "threshold": 0.0}))
        for text, decision in (("go on", "allow"), (HIT, "flag")):
            response = server.post(CHAT, asked(CHAT, text) | {"max_tokens": 3, "stream": stream})
            assert (response.headers[DECISION], response.headers[POLICY]) == (decision, "house")
            assert len(response.headers["x-midstream-request-id"]) == 32

    # --- whose policy -------------------------------------------------------------------------------------------

    def test_an_override_is_chosen_by_route_and_never_by_the_client(self, policed):
        strict = {"name": "raw-text", "when": {"route": ["completions"]}, "probes": {"soft": {"prompt": SURE}}}
        server = policed(policy(overrides=[strict]))
        assert server.post(CHAT, asked(CHAT, HIT) | {"max_tokens": 3}).headers[POLICY] == "house"
        response = server.post(TEXT, asked(TEXT, HIT) | {"max_tokens": 3})
        assert response.status_code == 400 and response.headers[POLICY] == "raw-text"
        tries = {POLICY: "house", "x-policy": "house", "x-midstream-key": "house", "x-original-route": "chat"}
        for name, value in tries.items():
            headers = {name: value}
            assert server.post(TEXT, asked(TEXT, HIT) | {"max_tokens": 3}, headers=headers).status_code == 400

    def test_min_tokens_and_consecutive_are_counted_in_tokens(self, policed):
        for least, said in ((AT, "a" * (AT - 1)), (AT + 1, "a" * (AT - 1) + "*a")):  # which goes on *a*a
            server = policed(policy(response=SURE | {"min_tokens": least}))
            reply = Reply(starred(server, CHAT, False))
            assert (reply.texts[0], reply.finishes[0]) == (said, ["content_filter"])
        server = policed(policy(response=SURE | {"consecutive": 2}))
        assert Reply(starred(server, CHAT, False)).finishes == {0: ["length"]}, "one star is not two in a row"

    # --- texts that are only judged -----------------------------------------------------------------------------

    def test_moderations_judge_without_generating(self, policed):
        server = policed(policy(prompt={"mode": "flag", "threshold": 0.0}))
        before = len(server.sink.records)  # the engine, and with it the sink, may be shared with other modules
        found = server.api.moderations.create(input=["go on", HIT])
        assert [r.flagged for r in found.results] == [False, True]
        scores = [r.category_scores.model_dump()["soft"] for r in found.results]
        assert 0 < scores[0] < 0.5 < scores[1] < 1
        records = server.sink.records[before:]
        assert [r.route for r in records] == ["moderations"] * 2 and all(
            r.coverage.response_tokens == 0 for r in records
        )

    def test_a_given_answer_is_judged_like_a_generated_one(self, policed):
        """And its record says how much of it would have gone out."""
        server = policed(policy(response=SURE))
        generated = Reply(starred(server, CHAT, False))
        (told,) = server.records(generated.id)
        prompt = server.model.template.encode([{"role": "user", "content": "go on"}])
        answer = (token(server.model, FILLER),) * (AT - 1) + (token(server.model, STAR),) * 2
        record = server.judge("given", prompt, answer, Caller(route="guardrail"))
        assert record.verdict is told.verdict is Action.BLOCK and record.released_tokens == AT - 1
        ours, theirs = (next(r for r in one.readings if r.phase == "response") for one in (record, told))
        assert ours.crossed_at == theirs.crossed_at and ours.value == pytest.approx(theirs.value, abs=1e-3)
        calm = server.judge("calm", prompt, answer[: AT - 1], Caller(route="guardrail"))
        c = calm.coverage
        assert calm.verdict is Action.ALLOW and calm.released_tokens == AT - 1
        assert (c.response_tokens, c.response_scored, c.final_unscored) == (AT - 1, AT - 1, 0)

    def test_a_request_of_an_operators_own_is_followed_token_by_token(self, policed):
        from monitor.api.admin.aside import Aside
        from monitor.api.admin.tracing import Tracing

        server = policed(policy())
        tracing = Tracing(server.scorer, server.model.template, lambda: ["soft"], server.model.name, Aside())

        async def follow():
            return [e async for e in tracing.trace("trace", [{"role": "user", "content": HIT}], 4, 0.0)]

        *tokens, last = server.run(follow())
        prompt = server.model.template.encode([{"role": "user", "content": HIT}])
        assert [t["position"] for t in tokens] == list(range(len(tokens)))
        n_prompt = len(prompt.token_ids)
        assert [t["phase"] for t in tokens] == ["prompt"] * n_prompt + ["response"] * (len(tokens) - n_prompt)
        assert len(tokens) - n_prompt == 3, "the last token is never fed"
        by_text = {t["token"]: t["scores"]["soft"] for t in tokens[:n_prompt]}
        assert by_text["*"] > 0 > by_text["g"]
        assert last["finish"] == "length" and {r["probe"] for r in last["readings"]} == {"soft"}
