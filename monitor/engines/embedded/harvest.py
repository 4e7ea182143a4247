"""The harvest interface, for training: the residual stream and the served statistics of many prompts.

Same template, positions, tap and Watch as serving. Prompts are packed without padding and sorted by length, and the
forward pass stops after the last block that is needed.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from monitor.aggregate import Aggregation
from monitor.config import Settings
from monitor.engines.embedded.attention import KVCache, use_packed_attention
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.embedded.streams import Streams
from monitor.errors import MidstreamError
from monitor.live import LiveProbes
from monitor.policy.rule import Rule
from monitor.probe import ProbeBank, ProbeWeights
from monitor.reread import Pooled
from monitor.sequence import Watch
from monitor.tap import tap_op
from monitor.types import Caller, Delta, Format, GenerationRequest, Mode, Phase, Prompt, Record, Sampling, Scores, Turn

Progress = Callable[[int], None]
_PASS_TOKENS = 2048
_CALIBRATION_SEQUENCES = 32


def _silent(n: int) -> None:
    return None


def residual_streams(
    model: LoadedModel, prompts: Sequence[Prompt], layers: Sequence[int], progress: Progress = _silent
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """(index, {layer: (n_tokens, d_model) float32}) for each prompt, shortest first.

    progress: called with the number of prompts done since the last call
    raises: ProbeMismatch for a layer the model does not have
    """
    if not prompts:
        return
    use_packed_attention(model.module)
    taken = Streams(model.module, layers)
    try:
        # What all prompts begin with (a template's system turn, the user's header) is computed once.
        shared = prompts[0].token_ids[: _shared(prompts)]
        prefix = KVCache(len(shared))
        head = {layer: torch.empty(0, model.d_model) for layer in layers}
        if shared:
            head = taken.run([shared], [prefix])
        for batch in _batches([len(p.token_ids) - len(shared) for p in prompts]):
            tokens = [prompts[i].token_ids[len(shared) :] for i in batch]
            streams = taken.run(tokens, [prefix.fork(len(prompts[i].token_ids)) for i in batch])
            start = 0
            for index, n in zip(batch, map(len, tokens), strict=True):
                yield index, {k: torch.cat([head[k], streams[k][start : start + n]]) for k in layers}
                start += n
            progress(len(batch))
    finally:
        taken.close()


def span_means(
    model: LoadedModel,
    sequences: Sequence[tuple[Sequence[int], Sequence[Turn]]],
    layers: Sequence[int],
    progress: Progress = _silent,
) -> Iterator[tuple[int, Pooled]]:
    """See `Averager`, which it is of a model."""
    prompts = [Prompt(tuple(ids), tuple(spans), 0, "raw") for ids, spans in sequences]
    for index, streams in residual_streams(model, prompts, layers, progress):
        per_span = [[streams[k][s.start : s.end].mean(0) for k in layers] for s in prompts[index].turns]
        yield index, np.stack([torch.stack(means).numpy() for means in per_span])


def _shared(prompts: Sequence[Prompt]) -> int:
    """How many tokens all prompts begin with; each keeps at least one of its own."""
    first, last = min(p.token_ids for p in prompts), max(p.token_ids for p in prompts)
    shortest = min(len(p.token_ids) for p in prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), shortest)
    return min(same, shortest - 1)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and total + lengths[index] > _PASS_TOKENS:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


def _in_shadow(
    probe: ProbeWeights, d_model: int, aggregation: Mapping[Phase, Aggregation]
) -> tuple[ProbeBank, tuple[Rule, ...]]:
    rules = tuple(
        Rule(probe.name, "v0", 0, p, Mode.SHADOW, None, aggregation[p], "open", n_columns=probe.k) for p in Phase
    )
    return ProbeBank([probe], d_model), rules


def prompt_values(
    model: LoadedModel,
    probe: ProbeWeights,
    aggregation: Mapping[Phase, Aggregation],
    prompts: Sequence[Prompt],
    progress: Progress = _silent,
) -> list[float]:
    """The served statistic of each prompt: its maximum over turns, as a server's Watch would see it."""
    bank, rules = _in_shadow(probe, model.d_model, aggregation)
    values = [float("nan")] * len(prompts)
    for index, streams in residual_streams(model, prompts, bank.layers, progress):
        watch = Watch(prompts[index], rules)
        watch.advance(0, score_streams(bank, streams))
        values[index] = _value(watch.readings()[0].value)
    return values


def given_values(
    model: LoadedModel,
    probe: ProbeWeights,
    aggregation: Mapping[Phase, Aggregation],
    given: Sequence[tuple[Prompt, tuple[int, ...]]],
    progress: Progress = _silent,
) -> list[float]:
    """The served statistic of each answer, (prompt, its tokens), as if the model had sampled it; NaN without one."""
    bank, rules = _in_shadow(probe, model.d_model, aggregation)
    whole = [Prompt((*p.token_ids, *answer), p.turns, p.newest, p.format) for p, answer in given]
    values = [float("nan")] * len(given)
    for index, streams in residual_streams(model, whole, bank.layers, progress):
        prompt, answer = given[index]
        watch = Watch(prompt, rules)
        watch.replay(0, score_streams(bank, streams), len(answer))
        values[index] = _value(watch.readings(Phase.RESPONSE)[0].value)
    return values


def score_streams(bank: ProbeBank, streams: Mapping[int, Tensor]) -> Scores:
    """(n_tokens, K) float32 logits of harvested streams, by the op that serves."""
    n = next(iter(streams.values())).shape[0]
    per_layer = torch.empty(len(bank.layers), n, len(bank))
    for row, layer in enumerate(bank.layers):
        tap_op(streams[layer], None, bank.weight[row], per_layer[row])
    scores: Scores = bank.combine(per_layer).numpy()
    return scores


def answer_values(
    model: LoadedModel,
    probe: ProbeWeights,
    aggregation: Mapping[Phase, Aggregation],
    prompts: Sequence[Prompt],
    settings: Settings,
    max_tokens: int,
    progress: Progress = _silent,
) -> list[float]:
    """Let the model answer each prompt, through the serving engine; the served statistic of each answer.

    An answer without a scored token has none and is left out.
    """
    bank, rules = _in_shadow(probe, model.d_model, aggregation)
    formats: tuple[Format, ...] = ("chat", "raw")
    observer = _Keep()
    settings = settings.model_copy(update={"max_queue": len(prompts), "max_sequences": _CALIBRATION_SEQUENCES})
    engine = EmbeddedEngine(model, LiveProbes.under_rules(bank, dict.fromkeys(formats, rules)), settings, observer)
    done: queue.Queue[Delta] = queue.Queue()
    engine.start()
    try:
        for i, prompt in enumerate(prompts):
            engine.submit(
                GenerationRequest(str(i), (prompt,), 1, Sampling(max_tokens, temperature=0.7, seed=i), CALIBRATION),
                lambda delta: done.put(delta) if delta.record else None,
            )
        for _ in prompts:
            done.get()
            progress(1)
    finally:
        engine.stop(0.0)
    if unfinished := sum(r.finish not in ("stop", "length") for r in observer.records):
        raise MidstreamError(f"{unfinished} answers did not finish ({engine.readiness()}); nothing was calibrated")
    values = [_value(r.readings[1].value) for r in observer.records]
    return [v for v in values if np.isfinite(v)]


CALIBRATION = Caller(route="calibration")


class _Keep:
    """An observer that keeps every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def record(self, record: Record) -> None:
        self.records.append(record)

    def scored(self, seconds: float, n_tokens: int) -> None:
        return None


def _value(value: float | None) -> float:
    return float("nan") if value is None else value
