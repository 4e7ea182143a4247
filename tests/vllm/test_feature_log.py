"""The feature log from inside vLLM: what is kept equals transformers, over prefix hits, n > 1 and chunked prefill."""

from random import Random

import pytest
from vllm.sampling_params import SamplingParams

from monitor.engines.vllm.call import CALL, Call
from monitor.engines.vllm.reread import averages
from monitor.engines.vllm.support import POOLED
from monitor.traffic.features import Chances, Events, FeatureLog, FeatureWriter, Origin, read_features
from monitor.types import Phase, Turn

from ..feature_log import close_to, hidden
from ..test_records import until
from .conftest import EAGER, EVERYTHING, harness, make_plan
from .test_engine import CHUNKED, FLAG, check, prompt


class Offered:
    """A feature log that is put between the engine and its judge when there is one."""

    log = None

    def __call__(self, *finished):
        if self.log is not None:
            self.log.offer(*finished)


@pytest.fixture(scope="module")
def engine(tiny, random_probe, tmp_path_factory):
    plan = make_plan(
        tiny,
        tmp_path_factory.mktemp("store"),
        [(random_probe, EVERYTHING)],
        [*EAGER, *CHUNKED],
        modes=FLAG,
        log_features=True,
    )
    with harness(plan) as running:
        running.judge._offer = Offered()
        yield running


@pytest.fixture
def kept(engine, tmp_path):
    """A feature log on the engine; call it for what was kept, once everything is written."""
    dropped, closed = [], []
    events = Events(lambda name, marks: {(i, choice) for i, choice, _ in marks}, lambda reason: None, dropped.append)
    writer = FeatureWriter(tmp_path / "features", Origin("f", "t", "p"), events, 100)
    log = FeatureLog(writer, Chances(1.0, 0.0, 0.0), 100, dropped.append, Random(1))
    engine.judge._offer.log = log
    log.attach(engine.started.rereading)

    def close():
        engine.judge._offer.log = None
        until(lambda: log.depth == 0)
        if not closed:
            closed.append(log.close())
        assert dropped == []
        return read_features(tmp_path / "features")

    yield close
    close()


def test_parity_over_chunks_prefix_hits_and_choices(engine, tiny, random_probe, kept):
    text = "the same beginning " * 15
    first = engine.run(engine.ask(prompt(tiny, text + "one"), ignore_eos=True, max_tokens=9))
    again = engine.run(engine.ask(prompt(tiny, text + "one"), n=2, temperature=1.0, ignore_eos=True, max_tokens=9))
    short = engine.run(engine.ask(prompt(tiny, "short"), ignore_eos=True, max_tokens=2))
    assert again.cached >= 192
    got, asked = kept(), {a.call.id: a for a in (first, again, short)}
    assert len(got) == 2 * 4
    for feature in got:
        answered = asked[feature.request_id]
        ids, n = answered.ids[feature.choice], len(answered.prompt_ids)
        turn = prompt(tiny, text + "one" if n > 200 else "short").turns[-1]
        span = (turn.start, turn.end) if feature.phase is Phase.PROMPT else (n, n + len(ids) - 1)
        assert feature.n_tokens == span[1] - span[0]
        assert close_to(feature.vectors[0], hidden(tiny.module, [*answered.prompt_ids, *ids], *span))
    check(engine, tiny, random_probe, first)  # and the scores are what they were


def test_while_others_run_it_is_read_too_and_leaves_no_record(engine, tiny, random_probe, kept):
    before = len(engine.sink.records)
    texts = [f"question {i} " * (1 + 8 * i) for i in range(8)]
    answers = engine.run(engine.ask_all([prompt(tiny, t) for t in texts], max_tokens=12, ignore_eos=True))
    got = kept()
    for answered in answers:
        check(engine, tiny, random_probe, answered)
    assert {f.request_id for f in got} == {a.call.id for a in answers}
    assert len(engine.sink.records) == before + 8
    assert engine.idle() and engine.judge._averages == {}


def test_a_client_cannot_ask_for_it(engine, tiny, kept):
    """The key in `vllm_xargs` is taken out; nothing of the stream reaches an output."""

    async def ask():
        call = Call("chat", "chat")
        token = CALL.set(call)
        try:
            params = SamplingParams(max_tokens=4, extra_args={POOLED: [[1, 3]], "other": 1})
            request = {"prompt_token_ids": list(prompt(tiny, "mine").token_ids)}
            return [output async for output in engine.engine.generate(request, params, call.id)]
        finally:
            CALL.reset(token)

    outputs = engine.run(ask())
    assert len(outputs) >= 1 and [o.kv_transfer_params for o in outputs] == [None] * len(outputs)
    # The log may be reading the sequence by now, over its own spans; the client's were taken by nobody.
    assert [[1, 3]] not in [averages.spans for averages in list(engine.judge._averages.values())]
    assert len(kept()) == 2
    assert engine.judge._averages == {}


def test_a_sequence_that_fills_the_context_is_not_read(engine, tiny):
    async def read(n):
        return await averages(engine.engine, [65] * n, [Turn(1, 2)], 1)

    assert engine.run(read(1024)) is None
    assert engine.run(read(1023)).shape == (1, 1, 128)


def test_without_the_setting_the_graph_has_no_such_op(tiny, random_probe, tmp_path):
    from monitor.engines.vllm.launch import tap_config

    configs = []
    for on in (False, True):
        plan = make_plan(tiny, tmp_path / str(on), [(random_probe, EVERYTHING)], EAGER, modes=FLAG, log_features=on)
        configs.append(tap_config(plan, "LlamaForCausalLM").as_dict())
    assert [c.pop("streams") for c in configs] == [False, True] and configs[0] == configs[1]
