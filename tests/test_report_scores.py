"""What the report scores is what a server serves: the same values as Watch, for prompts, conversations and answers."""

import numpy as np
import pytest
import torch

from monitor.aggregate import PLAIN_KINDS, Aggregation
from monitor.engines.embedded.harvest import prompt_values, residual_streams, score_streams
from monitor.policy.rule import Rule
from monitor.probe import ProbeBank, ProbeWeights
from monitor.sequence import Watch
from monitor.types import Mode, Phase, Prompt
from training.curves import features
from training.report.scores import Judge, running_values, score_answers, score_conversations, score_prompts

TEXTS = ["short", "a somewhat longer text, with two <|im_end|>\n<|im_start|>user\nturns", "x", "one more " * 9]


@pytest.fixture(scope="module")
def two_blocks(tiny):
    torch.manual_seed(3)
    return ProbeWeights("two", {layer: torch.randn(tiny.d_model) / 8 for layer in (1, 3)}, -0.5)


def judge(tiny, probe, prompt="mean", response="ema", **more):
    return Judge(tiny, probe, Aggregation(prompt), Aggregation(response), **more)


def ignore(n):
    return None


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_prompts_have_the_values_that_are_served(tiny, two_blocks, kind):
    one = judge(tiny, two_blocks, kind)
    prompts, ticked = one.prompts(TEXTS), []
    scored = score_prompts(one, prompts, (0, 2), ticked.append)
    served = prompt_values(tiny, two_blocks, {Phase.PROMPT: one.prompt, Phase.RESPONSE: one.response}, prompts)
    assert scored.values == pytest.approx(served, abs=1e-5)
    assert sum(ticked) == scored.tokens.sum() == sum(len(p.token_ids) for p in prompts)


def test_a_probe_of_several_projections(tiny):
    torch.manual_seed(4)
    probe = ProbeWeights("heads", {1: torch.randn(2, tiny.d_model) / 8}, (0.5, -0.5))
    one = judge(tiny, probe, "mean_last", "attention")
    prompts = one.prompts(TEXTS)
    served = prompt_values(tiny, probe, {Phase.PROMPT: one.prompt, Phase.RESPONSE: one.response}, prompts)
    assert score_prompts(one, prompts, (), ignore).values == pytest.approx(served, abs=1e-5)
    assert np.isfinite(score_answers(one, ["go on"], ["an answer"], ignore).values()).all()


def test_features_beside_it_are_those_that_training_fits(tiny, two_blocks):
    one = judge(tiny, two_blocks)
    scored = score_prompts(one, one.prompts(TEXTS), (0, 2), ignore)
    wanted = features(tiny, TEXTS, [0, 2], ignore)
    assert scored.features[0] == pytest.approx(wanted[0], abs=1e-5)
    assert scored.features[2] == pytest.approx(wanted[1], abs=1e-5)
    part = scored.at([2, 0])
    assert part.values.tolist() == scored.values[[2, 0]].tolist()
    assert np.array_equal(part.features[2], scored.features[2][[2, 0]])


def test_a_long_text_is_cut_as_for_the_calibration(tiny, two_blocks):
    one = judge(tiny, two_blocks, max_text_tokens=10)
    assert one.cut("0123456789abc") == "0123456789" and one.cut("012") == "012"
    (prompt,) = one.prompts(["0123456789abc"])
    assert prompt == tiny.template.encode([{"role": "user", "content": "0123456789"}])


def test_scores_that_are_not_finite_are_no_value(tiny):
    broken = ProbeWeights("huge", {1: torch.full((tiny.d_model,), 3e38)}, 0.0)
    one = judge(tiny, broken)
    assert np.isnan(score_prompts(one, one.prompts(["text"]), (), ignore).values).all()
    conversation = [{"role": "user", "content": "text"}]
    assert np.isnan(score_conversations(one, [conversation], 1)).all()
    scored = score_answers(one, ["text"], ["an answer"], ignore)
    assert np.isnan(scored.values()).all() and np.isnan(scored.prompts).all()


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_every_prefix_of_an_answer_has_the_value_that_is_served(tiny, two_blocks, kind):
    """As if the answer were generated: the last token is never fed, so it has no score."""
    one = judge(tiny, two_blocks, "max", kind)
    answer = "an answer that is longer than any window of sixteen tokens"
    scored = score_answers(one, ["go on"], [answer], ignore)
    (prompt,) = one.prompts(["go on"])
    ids = tuple(tiny.tokenizer(answer, add_special_tokens=False)["input_ids"])
    bank = ProbeBank([two_blocks], tiny.d_model)
    whole = Prompt(prompt.token_ids + ids, prompt.turns, prompt.newest, prompt.format)
    ((_, streams),) = residual_streams(tiny, [whole], bank.layers)
    rows = score_streams(bank, streams)
    rules = tuple(
        Rule("two", "v1", 0, phase, Mode.SHADOW, None, how, "open")
        for phase, how in ((Phase.PROMPT, one.prompt), (Phase.RESPONSE, one.response))
    )
    n = len(prompt.token_ids)
    assert len(scored.running[0]) == len(ids) - 1
    for seen in (1, 2, 15, 16, 17, len(ids) - 1):
        watch = Watch(prompt, rules)
        watch.replay(0, rows[: n + seen], seen + 1)
        by_prompt, by_answer = watch.readings()
        assert scored.running[0][seen - 1] == pytest.approx(by_answer.value, abs=1e-4)
        assert scored.prompts[0] == pytest.approx(by_prompt.value, abs=1e-4)
    assert scored.values()[0] == scored.running[0][-1]


def test_an_answer_of_one_token_has_no_value(tiny, two_blocks):
    scored = score_answers(judge(tiny, two_blocks), ["go on", "go"], ["x", "xy"], ignore)
    assert [len(r) for r in scored.running] == [0, 1]
    assert np.isnan(scored.values()).tolist() == [True, False]


def test_running_values_only_rise_and_stop_at_a_broken_score():
    how = Aggregation("max")
    assert running_values(how, np.array([[1], [3], [2], [5]], np.float32)).tolist() == [1, 3, 3, 5]
    broken = running_values(how, np.array([[1], [np.nan], [9]], np.float32))
    assert broken[0] == 1 and np.isnan(broken[1:]).all()


def test_a_conversation_is_worth_its_worst_request(tiny, two_blocks):
    """Each request asks about its newest turn alone: history was judged when it was new."""
    one = judge(tiny, two_blocks, "max")
    turns = [
        {"role": "user", "content": "first part"},
        {"role": "assistant", "content": "go on"},
        {"role": "user", "content": "second part, which is longer"},
    ]
    whole = score_conversations(one, [turns, turns[:1]], at_once=2)
    single = score_prompts(one, one.prompts(["first part"]), (), ignore).values[0]
    assert whole[1] == pytest.approx(single, abs=1e-5) and whole[0] >= whole[1]
    bank, prompt = one.bank, tiny.template.encode(turns)
    ((_, streams),) = residual_streams(tiny, [prompt], bank.layers)
    newest = score_streams(bank, streams)[prompt.turns[-1].start : prompt.turns[-1].end, 0].max()
    assert whole[0] == pytest.approx(max(single, newest), abs=1e-5)
