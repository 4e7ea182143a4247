"""The self-test of a started engine whose tap is whole: what it compares, and that no verdict comes into it."""

import argparse
import copy
import dataclasses

import pytest
import torch

from monitor.engines.vllm.check import _decode
from monitor.engines.vllm.nobody import Nobody
from monitor.engines.vllm.selftest import check_canaries, check_decoding, check_rendering
from monitor.errors import ProbeMismatch
from monitor.probe import ProbeWeights
from monitor.template import ChatTemplate

from ..conftest import CHATML, LAYER, calibrated
from .shared import blocking, load


def test_decode_steps_score_as_prompts_do_whatever_the_probes_make_of_it(shared, quiet, tmp_path):
    """This one blocks every prompt: an answer would end before its first token."""
    trigger = (ProbeWeights("trigger", {LAYER: torch.zeros(quiet.d_model)}, 1.0), {"calibration": calibrated(0.0)})
    live = load(shared, quiet, tmp_path, [trigger], modes=blocking("trigger"), target_fpr=0.1)
    scorer, before = shared.started.scorer, len(shared.sink.records)
    assert shared.run(check_canaries(scorer, shared.plan, live)) <= 1e-3
    assert shared.run(check_decoding(scorer, shared.plan, live)) <= 1e-3
    assert len(shared.sink.records) == before and shared.idle()
    with pytest.raises(ProbeMismatch, match="ended with 'content_filter'"):
        shared.run(_decode(shared.started, Nobody()))


def test_an_undisturbed_decode_step_has_its_time(shared, quiet, tmp_path):
    calm = (ProbeWeights("calm", {LAYER: torch.zeros(quiet.d_model)}, 0.0), {"calibration": calibrated(1e6)})
    load(shared, quiet, tmp_path, [calm], modes=blocking("calm"))
    assert 0 < shared.run(_decode(shared.started, Nobody())) < 10


def test_another_rendering_is_found(shared, quiet):
    shared.run(check_rendering(shared.engine, shared.plan))
    tokenizer = copy.deepcopy(quiet.tokenizer)
    tokenizer.chat_template = CHATML.replace("<|im_start|>assistant", "<|im_start|>bot")
    model = dataclasses.replace(shared.plan.model, template=ChatTemplate(tokenizer))
    with pytest.raises(ProbeMismatch, match="other tokens than the chat template"):
        shared.run(check_rendering(shared.engine, dataclasses.replace(shared.plan, model=model)))


def test_a_format_that_the_template_does_not_take_is_found(shared):
    arguments = argparse.Namespace(**vars(shared.plan.arguments) | {"chat_template_content_format": "openai"})
    with pytest.raises(ProbeMismatch, match="can't render a conversation"):
        shared.run(check_rendering(shared.engine, dataclasses.replace(shared.plan, arguments=arguments)))
