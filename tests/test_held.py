"""Held: what goes on is what is released, in order, with its logprobs; what vLLM sends once is delivered once."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.engines.vllm.held import Held

ONCE = ("prefill_stats", "new_prompt_logprobs_tensors", "prompt_token_id_logprobs", "trace_headers")


class Logprobs(NamedTuple):
    """As vLLM's LogprobsLists."""

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray
    sampled_token_ranks: np.ndarray
    cu_num_generated_tokens: list[int] | None = None


@dataclass
class Output:
    """As much of vLLM's EngineCoreOutput as is looked at."""

    new_token_ids: list[int] = field(default_factory=list)
    new_logprobs: Logprobs | None = None
    prefill_stats: Any = None
    new_prompt_logprobs_tensors: Any = None
    prompt_token_id_logprobs: Any = None
    trace_headers: Any = None
    events: list[Any] | None = None


def logprobs(tokens):
    """The sampled token and one other: every number says whose it is."""
    ids = np.array([[t, t + 1000] for t in tokens], dtype=np.int32).reshape(len(tokens), 2)
    return Logprobs(ids, ids.astype(np.float32) / -1000, np.array(tokens, dtype=np.int32))


def output(*tokens, with_logprobs=True, **once):
    return Output(list(tokens), logprobs(tokens) if with_logprobs and tokens else None, **once)


def test_the_newest_token_is_kept_and_goes_on_with_the_next():
    held = Held()
    first, second, last = output(1), output(2), output(3)
    assert not held.exchange(first, 0, False)
    assert held.exchange(second, 1, False) and second.new_token_ids == [1]
    assert held.exchange(last, 3, True) and last.new_token_ids == [2, 3] and held.sent == 3


def test_what_is_left_when_it_ends_is_dropped():
    held, last = Held(), output(3)
    held.exchange(output(1, 2), 1, False)
    assert held.exchange(last, 1, True)
    assert last.new_token_ids == [] and last.new_logprobs is None and held.sent == 1


def test_an_end_without_any_token_released_goes_on_with_what_vllm_sends_once():
    held, last = Held(), output(2)
    held.exchange(output(1, prefill_stats="stats", events=["queued"]), 0, False)
    assert held.exchange(last, 0, True)
    assert (last.new_token_ids, last.prefill_stats, last.events) == ([], "stats", ["queued"])


def test_an_end_without_tokens_of_its_own_releases_those_held():
    held, last = Held(), output()
    held.exchange(output(1), 0, False)
    assert held.exchange(last, 1, True)
    assert last.new_token_ids == [1] and last.new_logprobs.sampled_token_ranks.tolist() == [1]


def test_once_only_fields_survive_several_outputs_that_are_kept():
    held, kept = Held(), [output(prefill_stats=0, trace_headers={"a": "b"}), output(1), output()]
    assert not any(held.exchange(o, 0, False) for o in kept)
    last = output(2)
    assert held.exchange(last, 1, False)
    assert last.prefill_stats == 0 and last.trace_headers == {"a": "b"}
    after = output(3)
    assert held.exchange(after, 2, False)
    assert all(getattr(after, name) is None for name in ONCE) and after.events is None


def test_events_of_kept_outputs_come_first():
    held, last = Held(), output(2, events=["scheduled"])
    held.exchange(output(1, events=["queued"]), 0, False)
    held.exchange(last, 1, False)
    assert last.events == ["queued", "scheduled"]


def test_without_logprobs_none_appear():
    held, second = Held(), output(2, with_logprobs=False)
    held.exchange(output(1, with_logprobs=False), 0, False)
    held.exchange(second, 2, False)
    assert second.new_token_ids == [1, 2] and second.new_logprobs is None


@st.composite
def runs(draw):
    """Steps of one sequence: how many tokens each samples and how many may have gone on after it, never falling and
    never more than were sampled."""
    steps, sampled, released = [], 0, 0
    for _ in range(draw(st.integers(1, 12))):
        new = draw(st.integers(0, 3))
        sampled += new
        released = draw(st.integers(released, sampled))
        steps.append((new, released))
    return steps, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, len(steps) - 1))


@settings(max_examples=300, deadline=None)
@given(runs())
def test_what_goes_on_is_the_released_prefix_with_its_logprobs_and_every_once_field_once(run):
    steps, ends, with_logprobs, once_at = run
    held, passed, sampled = Held(), [], []
    went_on_at = None
    for i, (new, released) in enumerate(steps):
        tokens = list(range(len(sampled) + 1, len(sampled) + new + 1))
        sampled += tokens
        once = dict.fromkeys(ONCE, i) if i == once_at else {}
        out = output(*tokens, with_logprobs=with_logprobs, events=[i], **once)
        if held.exchange(out, released, ends and i == len(steps) - 1):
            passed.append(out)
            went_on_at = i if went_on_at is None and i >= once_at else went_on_at
            if i == went_on_at:
                assert all(getattr(out, name) == once_at for name in ONCE), "the first that goes on has them"
        got = [t for o in passed for t in o.new_token_ids]
        assert got == sampled[:released] and held.sent == released
    rows = [o.new_logprobs for o in passed]
    for out, lp in zip(passed, rows, strict=True):
        if not with_logprobs or not out.new_token_ids:
            assert lp is None
            continue
        expected = logprobs(out.new_token_ids)
        assert isinstance(lp, Logprobs) and lp.cu_num_generated_tokens is None
        assert all(np.array_equal(a, b) for a, b in zip(lp[:3], expected[:3], strict=True))
    for name in ONCE:
        assert sum(getattr(o, name) is not None for o in passed) == (went_on_at is not None)
    events = [e for o in passed for e in o.events]
    assert events == list(range(len(events))), "events keep their order and come once"
    if ends:  # whatever the engine still sends after the end carries nothing
        late = output(998, 999, with_logprobs=with_logprobs)
        held.exchange(late, held.sent, True)
        assert late.new_token_ids == [] and late.new_logprobs is None


def test_rows_of_two_widths_are_joined_at_the_narrower():
    """vLLM's rows are as wide as the step's most demanding request wants, and requests come and go between steps."""
    for narrow_first in (False, True):
        held, first, second = Held(), output(1), output(2)
        wide = first if not narrow_first else second
        extra = np.full((1, 3), 7, np.int32)
        ids, values, ranks, _ = wide.new_logprobs
        wide.new_logprobs = Logprobs(np.hstack([ids, extra]), np.hstack([values, extra]).astype(np.float32), ranks)
        assert not held.exchange(first, 0, False)
        assert held.exchange(second, 2, False)
        assert second.new_logprobs.logprob_token_ids.tolist() == [[1, 1001], [2, 1002]]
        assert second.new_logprobs.sampled_token_ranks.tolist() == [1, 2]
