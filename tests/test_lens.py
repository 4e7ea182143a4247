"""The logit lens: what it shows of every block is the model's, and a probe is read as it is served."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3Config, Qwen3ForCausalLM

from monitor.config import cache_dir
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid, ModelUnsupported
from monitor.probe import ProbeBank, ProbeWeights
from training import lens as lens_module
from training.lens import logit_lens

from .conftest import LAYER, reference_logits, save_tiny, tiny_config
from .reference import chat, reference


def log_probabilities(lens, layer):
    """(n_shown, vocabulary) of a lens with every word, in the order of ids."""
    out = np.empty(lens.ids.shape[1:])
    np.put_along_axis(out, lens.ids[layer], lens.probability[layer].astype(np.float64), axis=1)
    return np.log(out)


# --- the lens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "granite", "qwen3"])
def model(request, tiny, tmp_path_factory):
    """Also one that scales its logits after the unembedding, and one with another attention."""
    if request.param == "llama":
        return tiny
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("lens") / request.param
    if request.param == "granite":
        module = GraniteForCausalLM(tiny_config(GraniteConfig, logits_scaling=8.0))
    else:
        module = Qwen3ForCausalLM(tiny_config(Qwen3Config, head_dim=16))
    return load_model(str(save_tiny(folder, module)), cache=cache_dir())


def test_the_last_block_is_what_the_model_says(model):
    prompt = chat(model, "what is a residual stream?")
    lens = logit_lens(model, prompt, last=12, k=len(model.tokenizer))
    _, logits = reference(model, prompt)
    assert log_probabilities(lens, model.n_layers - 1) == pytest.approx(
        logits[-12:].log_softmax(-1).numpy().astype(np.float64), abs=1e-4
    )


def test_every_block_is_norm_and_unembedding_of_its_stream(tiny):
    prompt = chat(tiny, "block by block")
    lens = logit_lens(tiny, prompt, last=9, k=len(tiny.tokenizer))
    hidden, _ = reference(tiny, prompt)
    for layer in range(tiny.n_layers - 1):
        with torch.inference_mode():
            wanted = tiny.module.lm_head(tiny.module.model.norm(hidden[layer + 1][0, -9:])).log_softmax(-1)
        assert log_probabilities(lens, layer) == pytest.approx(wanted.numpy().astype(np.float64), abs=1e-4)


def test_the_most_probable_come_first_and_add_up(tiny):
    lens = logit_lens(tiny, chat(tiny, "order"), last=5, k=len(tiny.tokenizer))
    assert (np.diff(lens.probability, axis=-1) <= 0).all()
    assert lens.probability.sum(-1) == pytest.approx(1.0, abs=1e-4)
    word, p = lens.top(0, 0)[0]
    assert word == tiny.tokenizer.decode([int(lens.ids[0, 0, 0])]) and p == lens.probability[0, 0, 0]


def test_which_positions_are_shown_and_which_count(tiny):
    prompt = chat(tiny, "hello")
    lens = logit_lens(tiny, prompt, last=10_000)
    counted = {p for turn in prompt.turns for p in range(turn.start, turn.end)}
    assert lens.positions == tuple(range(len(prompt.token_ids)))
    assert {p for p, c in zip(lens.positions, lens.counts, strict=True) if c} == counted
    assert "".join(lens.tokens) == tiny.tokenizer.decode(prompt.token_ids)
    short = logit_lens(tiny, prompt, last=3)
    assert short.positions == lens.positions[-3:] and short.tokens == lens.tokens[-3:]
    assert (short.ids == lens.ids[:, -3:]).all()


def test_memory_is_bounded_by_rows_at_a_time(tiny, monkeypatch):
    prompt = chat(tiny, "chunk by chunk")
    whole = logit_lens(tiny, prompt)
    monkeypatch.setattr(lens_module, "_CHUNK_LOGITS", 1)
    rows = []
    handle = tiny.module.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(args[0].shape[1]))
    try:
        one = logit_lens(tiny, prompt)
    finally:
        handle.remove()
    assert max(rows) == 1 and len(rows) > tiny.n_layers
    assert (one.ids == whole.ids).all()
    assert one.probability == pytest.approx(whole.probability, abs=1e-6)


def test_a_model_that_does_something_else_to_its_logits_is_refused(tiny):
    def halve(_module, _args, output):
        output.logits = output.logits / 2
        return output

    handle = tiny.module.register_forward_hook(halve)
    try:
        with pytest.raises(ModelUnsupported, match=r"LlamaForCausalLM: .* off by"):
            logit_lens(tiny, chat(tiny, "anything"))
    finally:
        handle.remove()
    assert logit_lens(tiny, chat(tiny, "anything")).n_layers == 4


def test_a_text_that_is_too_long_is_refused(tiny):
    short = dataclasses.replace(tiny, max_model_len=8)
    with pytest.raises(ConfigInvalid, match="this model reads 8; shorten it"):
        logit_lens(short, chat(tiny, "more than eight bytes"))


# --- the probes -------------------------------------------------------------------------------------------------------


def test_a_probe_of_one_block_is_read_as_it_is_served(tiny, random_probe):
    prompt = chat(tiny, "why was this flagged?")
    lens = logit_lens(tiny, prompt, ProbeBank([random_probe], tiny.d_model), last=7)
    wanted = reference_logits(tiny.module, list(prompt.token_ids), random_probe.weight, random_probe.bias)
    assert lens.scores[:, 0] == pytest.approx(wanted, abs=1e-4)
    (trace,) = lens.probes
    assert trace.reads == (LAYER,)
    assert trace.values[LAYER] == pytest.approx(wanted[-7:], abs=1e-4)
    hidden, _ = reference(tiny, prompt)
    elsewhere = (hidden[2][0, -7:] @ random_probe.weight[LAYER] + random_probe.bias).numpy()
    assert trace.values[1] == pytest.approx(elsewhere, abs=1e-4)


def test_a_probe_of_several_blocks_shows_what_each_adds(tiny):
    torch.manual_seed(2)
    several = ProbeWeights("several", {0: torch.randn(64), 3: torch.randn(64)}, -0.5)
    single = ProbeWeights("single", {1: torch.randn(64)}, 1.0)
    lens = logit_lens(tiny, chat(tiny, "two probes"), ProbeBank([several, single], 64), last=6)
    values = lens.probes[0].values
    assert lens.probes[0].reads == (0, 3)
    assert np.isnan(values[[1, 2]]).all()
    assert values[[0, 3]].sum(0) - 0.5 == pytest.approx(lens.scores[-6:, 0], abs=1e-4)
    assert lens.probes[1].values[1] == pytest.approx(lens.scores[-6:, 1], abs=1e-4)
    assert lens.as_dict()["probes"]["several"]["values"][1] == [None] * 6
