"""`monitor.watch` around plain transformers `generate`: the same scores and verdicts as the server."""

import numpy as np
import pytest
import torch

import monitor
from monitor.errors import MidstreamError

from .conftest import calibrated, publish, reference_logits


@pytest.fixture
def store(tiny, random_probe, tmp_path):
    publish(tiny, [(random_probe, {"calibration": calibrated(-1e6)})], tmp_path, modes={"random": {"prompt": "flag"}})
    return tmp_path


def generate(model, prompts, **kwargs):
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    model.module.set_attn_implementation("sdpa")
    out = model.module.generate(**batch, do_sample=False, pad_token_id=tokenizer.pad_token_id, **kwargs)
    return batch, out


def test_scores_of_a_padded_batch_equal_transformers(tiny, random_probe, store):
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        batch, out = generate(tiny, ["short", "a rather longer question"], max_new_tokens=12)
    assert len(w.records) == 2 and w.probes == ("random",)
    for i, (record, scores) in enumerate(zip(w.records, w.scores, strict=True)):
        ids = out[i][batch["attention_mask"][i].argmax() :].tolist()
        expected = reference_logits(tiny.module, ids[: len(scores)], random_probe.weight, random_probe.bias)
        assert np.abs(scores[:, 0] - expected).max() <= 1e-4
        assert record.coverage.final_unscored == 1 and record.coverage.unmonitored == 0
        assert record.coverage.prompt_tokens == int(batch["attention_mask"][i].sum())
        assert all(r.would_block or r.action == "flag" for r in record.readings)


def test_each_call_is_its_own_and_the_hooks_go_away(tiny, store):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.module.modules())

    before = hooks()
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        assert hooks() > before
        generate(tiny, ["one"], max_new_tokens=3)
        generate(tiny, ["two", "three"], max_new_tokens=3)
    assert len(w.records) == 3
    assert hooks() == before


def test_the_same_verdict_values_as_the_engine(tiny, random_probe, store, serve):
    server = serve(tiny, [(random_probe, {"calibration": calibrated(-1e6)})])
    server.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "same"}], "max_tokens": 8, "temperature": 0}
    )
    served = server.sink.wait(1)[0]
    server.engine.stop(0.0)
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        generate(tiny, ["same"], max_new_tokens=8)
    values = [[r.value for r in record.readings] for record in (served, w.records[0])]
    assert np.allclose(values[0], values[1], atol=1e-4)


def test_embeddings_without_ids_are_refused(tiny, store):
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w, pytest.raises(MidstreamError, match="input_ids"):
        tiny.module(inputs_embeds=torch.zeros(1, 3, 64))
    assert w.records == []
