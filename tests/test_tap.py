"""The tap equals transformers' own hidden states times the weights (T3), whatever the batch and the padding."""

import numpy as np
import pytest
import torch

from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.errors import ModelUnsupported, ProbeInvalid, ProbeMismatch
from monitor.probe import LinearProbe, ProbeBank, ProbeWeights
from monitor.tap import Tap, attach, decoder_blocks, tap_op

from .conftest import LAYER, reference_logits

TOLERANCE = 1e-4


def prompts_of(model, n, seed=0):
    random = np.random.default_rng(seed)
    words = ["river", "stone", "write", "a", "letter", "about", "keys", "?", "bread", "seven"]
    texts = [" ".join(random.choice(words, random.integers(1, 12))) for _ in range(n)]
    return [model.template.encode([{"role": "user", "content": t}]) for t in texts]


@pytest.fixture(scope="module")
def bank(tiny):
    torch.manual_seed(3)
    probes = [
        ProbeWeights("one", {LAYER: torch.randn(64) / 8}, 0.5),
        ProbeWeights("several", {i: torch.randn(64) / 8 for i in range(3)}, -1.0),
    ]
    return ProbeBank(probes, 64), probes


def test_linear_probe_is_a_linear_layer_and_a_sigmoid():
    probe = LinearProbe(8)
    hidden = torch.randn(2, 5, 8, dtype=torch.float16)
    assert probe.linear.weight.shape == (1, 8)
    assert probe.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(
        probe(hidden), torch.sigmoid(hidden.float() @ probe.linear.weight[0] + probe.linear.bias)
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_t3_batches_and_padding(tiny, bank, batch, side):
    stacked, probes = bank
    prompts = prompts_of(tiny, 25 if batch < 16 else 32, seed=batch)
    tap = Tap(tiny.module, stacked)
    tiny.module.set_attn_implementation("sdpa")
    try:
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            longest = max(len(p.token_ids) for p in group)
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for i, p in enumerate(group):
                where = slice(longest - len(p.token_ids), longest) if side == "left" else slice(0, len(p.token_ids))
                ids[i, where], mask[i, where] = torch.tensor(p.token_ids), 1
            tap.begin(ids.numel())
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                tiny.module(input_ids=ids, attention_mask=mask, position_ids=positions)
            rows = tap.read(ids.numel()).reshape(len(group), longest, 2)
            for i, p in enumerate(group):
                got = rows[i][mask[i].bool().numpy()]
                for k, probe in enumerate(probes):
                    expected = reference_logits(tiny.module, list(p.token_ids), probe.weight, probe.bias)
                    assert np.abs(got[:, k] - expected).max() <= TOLERANCE
    finally:
        tap.detach()


def test_t3_packed_harvest_equals_transformers_for_200_prompts(tiny, bank):
    stacked, probes = bank
    prompts = prompts_of(tiny, 200, seed=9)
    scores = {i: score_streams(stacked, s) for i, s in residual_streams(tiny, prompts, stacked.layers)}
    assert sorted(scores) == list(range(200))
    worst = 0.0
    for i, p in enumerate(prompts):
        for k, probe in enumerate(probes):
            expected = reference_logits(tiny.module, list(p.token_ids), probe.weight, probe.bias)
            worst = max(worst, float(np.abs(scores[i][:, k] - expected).max()))
    print(f"200 prompts, largest difference {worst:.2g}")
    assert worst <= TOLERANCE


def test_rows_are_nan_where_the_tap_did_not_write(tiny, bank):
    stacked, _ = bank
    tap = Tap(tiny.module, stacked)
    tap.begin(3)
    assert np.isnan(tap.read(3)).all()
    tap.detach()


def test_a_buffer_made_under_inference_mode_can_be_written_outside_of_it(tiny, bank):
    tap = Tap(tiny.module, bank[0])
    tiny.module.set_attn_implementation("sdpa")
    try:
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                tap.begin(3)
                tiny.module(input_ids=torch.tensor([[1, 2, 3]]))
                assert np.isfinite(tap.read(3)).all()
    finally:
        tap.detach()


def test_a_missing_layer_blinds_only_the_probes_that_read_it(bank):
    stacked, _ = bank
    per_layer = torch.ones(3, 4, 2)
    per_layer[stacked.layers.index(0)] = torch.nan
    rows = stacked.combine(per_layer)
    assert torch.isfinite(rows[:, 0]).all() and torch.isnan(rows[:, 1]).all()


def test_bias_counts_once(bank):
    stacked, _ = bank
    assert stacked.combine(torch.zeros(3, 1, 2)).tolist() == [[0.5, -1.0]]


def test_projections_of_a_probe_lie_next_to_each_other(tiny):
    """A bank of probes with 1, 3 and 2 projections is, column by column, one of six probes with one."""
    torch.manual_seed(4)
    heads = {0: torch.randn(3, 64), 2: torch.randn(3, 64)}
    probes = [
        ProbeWeights("one", {1: torch.randn(64)}, 0.5),
        ProbeWeights("three", heads, (1.0, -2.0, 0.25)),
        ProbeWeights("two", {1: torch.randn(2, 64)}, (0.0, 3.0)),
    ]
    bank = ProbeBank(probes, 64)
    assert [p.k for p in probes] == [1, 3, 2] and len(bank) == 6
    assert bank.names == ("one", "three.0", "three.1", "three.2", "two.0", "two.1")
    assert [range(6)[c] for c in bank.columns] == [range(1), range(1, 4), range(4, 6)]
    alone = ProbeBank(
        [
            ProbeWeights("", {k: w.reshape(-1, 64)[i] for k, w in p.weight.items()}, p.biases[i])
            for p in probes
            for i in range(p.k)
        ],
        64,
    )
    for index, streams in residual_streams(tiny, prompts_of(tiny, 2), bank.layers):
        got, expected = score_streams(bank, streams), score_streams(alone, streams)
        assert got.shape[1] == 6 and np.array_equal(got, expected), index


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.ones(3, 64), (0.0, 0.0)),
        (torch.ones(3, 64), 0.0),
        (torch.ones(64), (0.0, 0.0)),
        (torch.ones(2, 63), (0.0, 0.0)),
    ],
)
def test_another_number_of_projections_than_biases_is_refused(weight, bias):
    with pytest.raises(ProbeMismatch, match=f"for {len(bias) if isinstance(bias, tuple) else 1} projections"):
        ProbeBank([ProbeWeights("x", {0: weight}, bias)], 64)


def test_the_op_adds_the_residual_in_float32():
    hidden, residual = (
        torch.full((2, 4), 60000.0, dtype=torch.float16),
        torch.full((2, 4), 60000.0, dtype=torch.float16),
    )
    out = torch.empty(3, 1)
    tap_op(hidden, residual, torch.ones(4, 1), out)
    assert out[:2, 0].tolist() == [480000.0, 480000.0]  # float16 would be inf


def test_the_op_stays_whole_under_torch_compile():
    weight, out = torch.randn(4, 2), torch.full((5, 2), torch.nan)

    @torch.compile(backend="eager", fullgraph=True)
    def step(hidden):
        hidden = hidden * 2
        tap_op(hidden, None, weight, out)
        return hidden + 1

    hidden = torch.randn(5, 4)
    step(hidden)
    torch.testing.assert_close(out, hidden * 2 @ weight)


def test_refusals(tiny):
    with pytest.raises(ProbeMismatch, match="layer 4 does not exist: the model has blocks 0 to 3"):
        attach(tiny.module, [4], lambda layer, hidden: None)
    with pytest.raises(ProbeMismatch, match="63"):
        ProbeBank([ProbeWeights("x", {0: torch.ones(63)}, 0.0)], 64)
    with pytest.raises(ProbeInvalid, match="not finite"):
        ProbeBank([ProbeWeights("x", {0: torch.full((64,), torch.nan)}, 0.0)], 64)
    odd = torch.nn.Module()
    odd.config = tiny.module.config
    with pytest.raises(ModelUnsupported, match="expected one list of 4"):
        decoder_blocks(odd)
