"""The embedded engine: right scores in any company, sequences that join and leave, aborts, bounds, its death."""

import queue
import threading

import numpy as np
import pytest
import torch

from monitor.aggregate import Aggregation
from monitor.config import load_settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.errors import Overloaded, RequestInvalid
from monitor.live import LiveProbes
from monitor.policy.rule import Rule
from monitor.probe import ProbeBank
from monitor.types import Caller, GenerationRequest, Mode, Phase, Sampling

from .conftest import Sink, reference_logits


@pytest.fixture
def engine_of(tiny, random_probe):
    running = []

    def make(mode=Mode.FLAG, threshold=-1e9, **settings):
        # Flagging everything makes every record keep its token scores.
        rules = tuple(Rule("random", "v1", 0, p, mode, threshold, Aggregation("max"), "closed") for p in Phase)
        live = LiveProbes.under_rules(ProbeBank([random_probe], tiny.d_model), {"chat": rules, "raw": rules})
        sink = Sink()
        died = []
        engine = EmbeddedEngine(tiny, live, load_settings(**settings), sink, died.append)
        engine.start()
        running.append(engine)
        return engine, sink, died

    yield make
    for engine in running:
        engine.stop(0.0)


def ask(engine, prompt, name="r", n=1, deliver=None, **sampling):
    deltas = queue.Queue()
    sampling = {"max_tokens": 16, "temperature": 0.0} | sampling
    caller = Caller(route="chat")
    engine.submit(GenerationRequest(name, (prompt,), n, Sampling(**sampling), caller), deliver or deltas.put)
    return deltas


def answer(deltas, n=1):
    texts, finishes, tokens = [""] * n, [None] * n, [0] * n
    while None in finishes:
        delta = deltas.get(timeout=60)
        texts[delta.index] += delta.text
        tokens[delta.index] += delta.n_tokens
        finishes[delta.index] = delta.finish
    return texts, finishes, tokens


def chat(model, text):
    return model.template.encode([{"role": "user", "content": text}])


def test_scores_alone_and_among_eight_that_join_and_leave(tiny, random_probe, engine_of):
    """Prompt and answer, every position, within 1e-4 of transformers; lengths differ, so they join and leave freely."""
    engine, sink, _ = engine_of(max_step_tokens=48)
    ids = {}
    waiting = []
    for i in range(24):
        prompt = chat(tiny, f"question {i} " + "very " * (i % 7) * 3)
        # logprobs=0 gives the sampled ids back
        waiting.append(
            (
                str(i),
                prompt,
                ask(engine, prompt, str(i), max_tokens=3 + (i * 5) % 29, logprobs=0, seed=i, temperature=1.0),
            )
        )
        if i % 8 == 7:
            for name, prompt, deltas in waiting:
                tokens, finish = [], None
                while finish is None:
                    delta = deltas.get(timeout=60)
                    tokens += [t.token_id for t in delta.tokens]
                    finish = delta.finish
                ids[name] = list(prompt.token_ids) + tokens
            waiting = []
    records = sink.wait(24)
    engine.stop(0.0)
    worst = 0.0
    for record in records:
        got = np.array(record.token_scores["random"])
        sequence = ids[record.request_id]
        expected = reference_logits(tiny.module, sequence, random_probe.weight, random_probe.bias)
        assert len(got) == len(sequence) - 1  # every position but the last sampled token
        worst = max(worst, float(np.abs(got - expected[: len(got)]).max()))
    print(f"24 requests, largest difference {worst:.2g}")
    assert worst <= 1e-4  # the records' rounding to five digits included


def test_prefill_rows_equal_transformers_unrounded(tiny, random_probe):
    rules = tuple(Rule("random", "v1", 0, p, Mode.SHADOW, None, Aggregation("max"), "closed") for p in Phase)
    live = LiveProbes.under_rules(ProbeBank([random_probe], tiny.d_model), {"chat": rules, "raw": rules})
    engine = EmbeddedEngine(tiny, live, load_settings(max_step_tokens=16), Sink())
    prompt = chat(tiny, "a long prompt " * 20)
    rows = engine.prefill(prompt)
    engine.stop(0.0)
    expected = reference_logits(tiny.module, list(prompt.token_ids), random_probe.weight, random_probe.bias)
    assert np.abs(rows[:, 0] - expected).max() <= 1e-4


def test_greedy_text_equals_transformers_generate(tiny, engine_of):
    engine, _, _ = engine_of(mode=Mode.SHADOW, threshold=None)
    prompts = [chat(tiny, f"prompt {i}") for i in range(6)]
    got = [answer(d)[0][0] for d in [ask(engine, p, str(i), max_tokens=20) for i, p in enumerate(prompts)]]
    engine.stop(0.0)
    tiny.module.set_attn_implementation("sdpa")
    for prompt, text in zip(prompts, got, strict=True):
        out = tiny.module.generate(torch.tensor([prompt.token_ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        ids = out[0, len(prompt.token_ids) :]
        assert text == tiny.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def test_a_seed_gives_the_same_answer_in_any_company(tiny, engine_of):
    engine, _, _ = engine_of()
    prompt = chat(tiny, "the same")
    alone = answer(ask(engine, prompt, "a", temperature=1.0, seed=7, n=3), 3)[0]
    crowd = [ask(engine, chat(tiny, f"noise {i}"), f"n{i}", max_tokens=30) for i in range(6)]
    together = answer(ask(engine, prompt, "b", temperature=1.0, seed=7, n=3), 3)[0]
    for deltas in crowd:
        answer(deltas)
    assert alone == together and len(set(alone)) == 3


def test_choices_share_a_prefill_and_have_their_own_scores(tiny, random_probe, engine_of):
    engine, sink, _ = engine_of()
    answer(ask(engine, chat(tiny, "three of them"), n=3, temperature=1.0, seed=1), 3)
    records = sink.wait(3)
    assert sorted(r.index for r in records) == [0, 1, 2]
    n_prompt = records[0].coverage.prompt_tokens
    prompts = {tuple(r.token_scores["random"][:n_prompt]) for r in records}
    assert len(prompts) == 1 and all(r.coverage.prompt_scored == n_prompt for r in records)
    assert len({tuple(r.token_scores["random"][n_prompt:]) for r in records}) == 3


def test_an_abort_stops_computing(tiny, engine_of):
    engine, sink, _ = engine_of()
    first = threading.Event()
    ask(
        engine,
        chat(tiny, "long"),
        "gone",
        max_tokens=900,
        logit_bias={tiny.tokenizer.eos_token_id: -100},
        deliver=lambda delta: first.set(),
    )
    assert first.wait(60)
    engine.abort("gone")
    record = sink.wait(1)[0]
    assert (record.finish, engine.describe()["active"]) == ("aborted", 0)
    assert record.coverage.response_tokens < 900
    steps = engine.steps
    answer(ask(engine, chat(tiny, "next"), "next", max_tokens=4))
    assert engine.steps - steps <= 6  # one prefill, three more tokens: nothing else is being computed


def test_an_abort_of_a_waiting_request_and_of_an_unknown_one(tiny, engine_of):
    engine, sink, _ = engine_of(max_sequences=1)
    aborted = threading.Event()

    def held(*args):
        aborted.wait(60)

    handle = tiny.module.register_forward_pre_hook(held)
    try:
        busy = ask(engine, chat(tiny, "busy"), "busy", max_tokens=20, logit_bias={tiny.tokenizer.eos_token_id: -100})
        ask(engine, chat(tiny, "waits"), "waits")
        engine.abort("waits")
        engine.abort("never heard of")
    finally:
        aborted.set()
        handle.remove()
    assert answer(busy)[1] == ["length"]
    by_id = {r.request_id: r for r in sink.wait(2)}
    assert by_id["waits"].finish == "aborted" and by_id["waits"].coverage.not_computed > 0


def test_the_queue_is_bounded(tiny, engine_of):
    engine, _, _ = engine_of(max_sequences=1, max_queue=2)
    held = {"max_tokens": 400, "logit_bias": {tiny.tokenizer.eos_token_id: -100}}
    with pytest.raises(Overloaded, match="waiting already"):
        for i in range(8):
            ask(engine, chat(tiny, "x"), f"q{i}", **held)
    for i in range(8):
        engine.abort(f"q{i}")


def test_what_can_never_fit_is_refused(tiny, engine_of):
    engine, _, _ = engine_of(kv_tokens=256)
    with pytest.raises(RequestInvalid, match="this server holds 256"):
        ask(engine, chat(tiny, "x"), max_tokens=300)


def test_stop_strings_are_cut_even_across_tokens(tiny, engine_of):
    engine, _, _ = engine_of(mode=Mode.SHADOW, threshold=None)
    prompt = chat(tiny, "tell")
    whole = answer(ask(engine, prompt, "w", max_tokens=24))[0][0]
    stop = whole[6:9]
    texts, finishes, _ = answer(ask(engine, prompt, "s", max_tokens=24, stop=(stop,)))
    assert texts[0] == whole[: whole.index(stop)] and finishes == ["stop"]


def test_score_last_buys_the_missing_row(tiny, engine_of):
    engine, sink, _ = engine_of(score_last=True)
    answer(ask(engine, chat(tiny, "x"), max_tokens=5))
    coverage = sink.wait(1)[0].coverage
    assert coverage.final_unscored == 0
    assert coverage.prompt_scored + coverage.response_scored == coverage.prompt_tokens + coverage.response_tokens


def test_draining_refuses_and_finishes(tiny, engine_of):
    engine, _, _ = engine_of()
    deltas = ask(engine, chat(tiny, "x"), max_tokens=30, logit_bias={tiny.tokenizer.eos_token_id: -100})
    engine.drain()
    with pytest.raises(Overloaded, match="shutting down"):
        ask(engine, chat(tiny, "y"), "y")
    assert answer(deltas)[1] == ["length"] and engine.readiness() == "the server is shutting down"


def test_a_step_that_raises_ends_everything_loudly(tiny, engine_of):
    engine, sink, died = engine_of(max_sequences=1)

    def broken(*args):
        raise RuntimeError("the device is gone")

    ask(engine, chat(tiny, "a"), "a", max_tokens=900, logit_bias={tiny.tokenizer.eos_token_id: -100})
    ask(engine, chat(tiny, "b"), "b")
    handle = tiny.module.register_forward_pre_hook(broken)
    try:
        records = sink.wait(2)
    finally:
        handle.remove()
    assert {r.finish for r in records} == {"engine_error"}
    assert "died" in engine.readiness()
    with pytest.raises(Overloaded):
        ask(engine, chat(tiny, "c"), "c")
    engine.stop(0.0)
    assert [str(e) for e in died] == ["the device is gone"]


def test_a_tap_that_is_removed_makes_every_request_unmonitored(tiny, engine_of):
    engine, sink, _ = engine_of(mode=Mode.BLOCK, threshold=1e9)
    assert answer(ask(engine, chat(tiny, "a"), "a"))[1] != ["unmonitored"]
    engine._sets.current.tap.detach()
    texts, finishes, tokens = answer(ask(engine, chat(tiny, "b"), "b"))
    assert (texts, finishes, tokens) == ([""], ["unmonitored"], [0])
    assert sink.wait(2)[1].coverage.unmonitored > 0


def test_an_observer_that_raises_ends_the_engine_loudly(tiny, engine_of):
    engine, sink, died = engine_of()

    def broken(record):
        raise BrokenPipeError("nobody reads the log")

    sink.record = broken
    ask(engine, chat(tiny, "x"), max_tokens=3)
    engine._thread.join(30)
    assert not engine._thread.is_alive() and len(died) == 1 and "died" in engine.readiness()


def test_logits_that_are_not_numbers_end_one_sequence(tiny, engine_of):
    engine, _, _ = engine_of(mode=Mode.SHADOW, threshold=None)
    armed = [True]

    def poison(module, args, output):
        if armed:
            armed.clear()
            output[0, 0] = torch.nan
        return output

    handle = tiny.module.lm_head.register_forward_hook(poison)
    try:
        bad = answer(ask(engine, chat(tiny, "bad"), "bad", max_tokens=4))
        good = answer(ask(engine, chat(tiny, "good"), "good", max_tokens=4))
    finally:
        handle.remove()
    assert bad[1] == ["engine_error"] and good[1] != ["engine_error"]
    assert engine.readiness() is None


def test_models_that_would_mix_requests_are_refused(tiny):
    from monitor.engines.embedded.model import _check_batchable
    from monitor.errors import ModelUnsupported

    config = tiny.module.config
    before = getattr(config, "layer_types", None)
    try:
        config.layer_types = ["conv", "full_attention"]
        with pytest.raises(ModelUnsupported, match="conv"):
            _check_batchable(tiny.module)
    finally:
        config.layer_types = before
    _check_batchable(tiny.module)


def test_a_given_text_that_is_longer_than_the_model_reads_is_refused(serve, quiet, random_probe):
    """It would be scored behind the model's last position, and hold the memory of everybody."""
    server = serve(quiet, [(random_probe, {})], max_model_len=64)
    prompt = quiet.template.encode([{"role": "user", "content": "go on"}])
    answer = (prompt.token_ids[-1],) * 64
    with pytest.raises(RequestInvalid, match="do not fit into the model's 64"):
        server.engine.submit(GenerationRequest("g", (prompt,), 1, Sampling(0), given=answer), lambda delta: None)
    response = server.post("/v1/moderations", {"input": "word " * 200})
    assert response.status_code == 400 and "64" in response.json()["error"]["message"]
