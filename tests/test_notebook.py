"""`monitor.watch` around plain transformers `generate`: the same scores and verdicts as the server."""

import itertools

import numpy as np
import pytest
import torch
from transformers import DynamicCache

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


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def test_each_call_is_its_own_and_the_hooks_go_away(tiny, store):
    before = hooks(tiny)
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        assert hooks(tiny) > before
        generate(tiny, ["one"], max_new_tokens=3)
        generate(tiny, ["two", "three"], max_new_tokens=3)
    assert len(w.records) == 3
    assert hooks(tiny) == before


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


@pytest.fixture
def fails(tiny):
    """fails(n): the n-th pass from now on raises."""
    handles = []

    def at(n):
        passes = itertools.count(1)

        def fail(*_):
            if next(passes) == n:
                raise RuntimeError("out of memory")

        handles.append(tiny.module.model.layers[-1].register_forward_hook(fail))

    yield at
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("at", "finish", "rows"), [(1, "aborted", 0), (3, "stop", 1)])
def test_a_pass_that_raises_says_so_and_leaves_the_model_as_it_was(tiny, store, fails, at, finish, rows):
    fails(at)
    before = hooks(tiny)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        monitor.watch(tiny.module, tiny.tokenizer, store=store) as w,
    ):
        generate(tiny, ["one"], max_new_tokens=5)
    assert hooks(tiny) == before
    ((record,), (scores,)) = w.records, w.scores
    n_prompt = record.coverage.prompt_tokens
    assert (record.finish, len(scores), record.coverage.unmonitored) == (finish, rows and n_prompt + rows, 0)
    assert generate(tiny, ["one"], max_new_tokens=3)


def test_after_a_pass_that_raised_the_next_call_is_watched(tiny, store, fails):
    fails(1)
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(tiny, ["one"], max_new_tokens=5)
        generate(tiny, ["two"], max_new_tokens=3)
    assert [r.finish for r in w.records] == ["aborted", "stop"] and w.records[1].coverage.response_scored == 2


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 8}],
    ids=lambda how: next(iter(how)),
)
def test_what_is_not_plain_generation_is_refused_rather_than_booked_to_the_wrong_sequence(tiny, store, how):
    (asked,) = how
    with (
        monitor.watch(tiny.module, tiny.tokenizer, store=store) as w,
        pytest.raises(MidstreamError, match=f"only plain generation .*{asked}"),
    ):
        generate(tiny, ["again and again and again"], max_new_tokens=8, **how)
    assert w.records == []
    assert generate(tiny, ["again and again and again"], max_new_tokens=8, **how), "unwatched it works"


def test_a_cache_is_its_owners_again_after_the_call(tiny, store):
    cache = DynamicCache()
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        generate(tiny, ["one"], max_new_tokens=3, past_key_values=cache)
        ids = torch.tensor([[1, 2]])
        with pytest.raises(MidstreamError, match="a cache of an earlier call"):
            tiny.module(input_ids=ids, past_key_values=cache)
    length = cache.get_seq_length()
    cache.crop(-1)
    assert cache.get_seq_length() == length - 1 and w.records == []


def test_a_call_under_inference_mode_and_one_outside_of_it(tiny, store):
    ids = torch.tensor([[1, 2, 3]])
    with monitor.watch(tiny.module, tiny.tokenizer, store=store) as w:
        tiny.module.set_attn_implementation("sdpa")
        with torch.inference_mode():
            tiny.module(input_ids=ids)
        tiny.module(input_ids=ids)
    assert np.array_equal(w.scores[0], w.scores[1])
