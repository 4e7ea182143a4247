"""Probes of answers, of several blocks, and of one phase only: from a recipe to what is served."""

import json
import random

import numpy as np
import pytest

from monitor.aggregate import Aggregation
from monitor.config import load_settings
from monitor.engines.embedded.harvest import given_values
from monitor.live import load_live
from monitor.probe import ProbeWeights
from monitor.types import Mode, Phase
from probes_store.store import Store
from training.run import train

from .conftest import reference_logits

ANSWERS = {Phase.PROMPT: Aggregation("mean"), Phase.RESPONSE: Aggregation("ema")}


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Answers told apart by a word, after questions that say nothing; harmless prompts to calibrate on."""
    folder = tmp_path_factory.mktemp("answers")
    chance = random.Random(0)

    def words():
        return " ".join(chance.choices(["sea", "oak", "tea", "sun", "ink"], k=chance.randint(2, 5)))

    answers = [
        {"text": words(), "response": f"{words()} {'###' if i % 2 else '...'}", "label": i % 2} for i in range(240)
    ]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    (folder / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{words()} {i}", "label": 0}) for i in range(60))
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "sources:\n- {file: answers.jsonl, answers: true, calibrate: 0, test: 0.3}\n"
        "- {file: prompts.jsonl, calibrate: 0.9, test: 0.05}\n"
        "layers: [1, 2]\nsolver: logistic\nphases: [response]\nanswers: 40\nanswer_tokens: 4\n"
    )
    settings = load_settings(model=str(tiny_folder), store=folder / "store")
    train(settings, "said", [folder], None, 1, 0, recipe)
    return settings, Store(settings.store).load("tiny-llama", "said", "v1")


def test_the_card_has_both_blocks_and_one_phase(trained):
    _, stored = trained
    assert stored.card.layers == (1, 2) and set(stored.weight) == {1, 2}
    assert set(stored.card.calibration) == {"chat"} and set(stored.card.calibration["chat"]) == {"response"}
    assert stored.card.metrics["held_out"]["logistic_regression"]["auroc"] > 0.95
    assert stored.card.platt is None, "probabilities are of prompts, and these rows' labels are about their answers"


def test_it_may_block_answers_only(trained, tiny):
    settings, _ = trained
    live = load_live(tiny.served(), Store(settings.store), settings)
    assert [r.mode for r in live.rules["chat"]] == [Mode.SHADOW, Mode.SHADOW]
    assert [r.threshold is None for r in live.rules["chat"]] == [True, True], "40 answers certify no rate of 0.5 %"


def test_given_answers_are_judged_as_the_engine_does(trained, tiny):
    """Alone or packed with others, and as a Watch fed token by token with transformers' logits."""
    from monitor.policy.rule import Rule
    from monitor.sequence import Watch

    _, stored = trained
    probe = ProbeWeights("said", stored.weight, stored.bias)
    given = [
        (tiny.template.encode([{"role": "user", "content": text}]), tuple(tiny.tokenizer(answer)["input_ids"]))
        for text, answer in (("sea", "oak tea ###"), ("sun ink oak", "ink ..."), ("tea", "sun"))
    ]
    together = given_values(tiny, probe, ANSWERS, given)
    for (prompt, answer), value in zip(given, together, strict=True):
        rows = reference_logits(tiny.module, [*prompt.token_ids, *answer], stored.weight, stored.bias)[:, None]
        watch = Watch(
            prompt, [Rule("said", "v1", 0, Phase.RESPONSE, Mode.SHADOW, None, ANSWERS[Phase.RESPONSE], "open")]
        )
        watch.advance(0, rows[: len(prompt.token_ids)].astype(np.float32), 1)
        for n in range(len(answer)):
            at = len(prompt.token_ids) + n
            watch.advance(at, rows[at : at + 1].astype(np.float32), 1)
        assert value == pytest.approx(watch.readings(Phase.RESPONSE)[0].value, abs=1e-4)
        assert given_values(tiny, probe, ANSWERS, [(prompt, answer)]) == [pytest.approx(value, abs=1e-4)]
    empty = given_values(tiny, probe, ANSWERS, [(given[0][0], ())])
    assert np.isnan(empty).all(), "an answer without a token has no value"
