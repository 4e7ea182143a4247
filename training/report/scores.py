"""The served statistic of prompts, conversations and answers, and pooled features beside it: one pass for all of them.

The statistic is what a server's Watch makes of the same scores (a test compares them), by the same op and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from monitor.aggregate import Aggregation, Running, aggregate
from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.engines.embedded.model import LoadedModel
from monitor.probe import ProbeBank, ProbeWeights
from monitor.template import Message
from monitor.types import Prompt, Scores
from training.metrics import Array

MAX_ANSWER_TOKENS = 512
Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Judge:
    """A probe as it is served. aggregation: of each phase"""

    model: LoadedModel
    probe: ProbeWeights
    prompt: Aggregation
    response: Aggregation
    max_text_tokens: int = 512
    """A text is cut after so many, as those were that the thresholds are calibrated on."""

    @property
    def bank(self) -> ProbeBank:
        return ProbeBank([self.probe], self.model.d_model)

    def prompts(self, texts: Sequence[str]) -> list[Prompt]:
        """Each as the user's only message."""
        return [self.model.template.encode([{"role": "user", "content": self.cut(t)}]) for t in texts]

    def cut(self, text: str) -> str:
        offsets = self.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= self.max_text_tokens else text[: offsets[self.max_text_tokens - 1][1]]


@dataclass(frozen=True, slots=True)
class Scored:
    """values: (n,) float64, NaN where a score was not finite; tokens: (n,) of each prompt; features: layer -> (n, d)
    float32, the newest turn averaged"""

    values: Array
    tokens: npt.NDArray[np.int64]
    features: dict[int, npt.NDArray[np.float32]]

    def at(self, rows: Sequence[int] | slice) -> Scored:
        chosen = np.arange(len(self.values))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        features = {layer: x[chosen] for layer, x in self.features.items()}
        return Scored(self.values[chosen], self.tokens[chosen], features)


def score_prompts(judge: Judge, prompts: Sequence[Prompt], layers: Sequence[int], tick: Tick) -> Scored:
    """layers: those to keep features of, beside the probe's own, which are read in the same pass; tick: of tokens"""
    bank = judge.bank
    values = np.full(len(prompts), np.nan)
    features = {layer: np.zeros((len(prompts), judge.model.d_model), np.float32) for layer in layers}
    for index, streams in residual_streams(judge.model, prompts, sorted({*bank.layers, *layers})):
        prompt = prompts[index]
        values[index] = prompt_value(judge.prompt, prompt, score_streams(bank, streams))
        newest = prompt.turns[-1]
        for layer in layers:
            features[layer][index] = streams[layer][newest.start : newest.end].mean(0).numpy()
        tick(len(prompt.token_ids))
    return Scored(values, np.array([len(p.token_ids) for p in prompts], dtype=np.int64), features)


def prompt_value(how: Aggregation, prompt: Prompt, scores: Scores, first: int = 0) -> float:
    """The maximum over the turns from `first` on; NaN if a score of the prompt is not finite.

    scores: (>= n_prompt, k) of the probe's k projections
    """
    rows = scores[: len(prompt.token_ids)]
    if not np.isfinite(rows).all():
        return float("nan")
    return max(
        (aggregate(how, _columns(rows[t.start : t.end])) for t in prompt.turns[first:] if t.end > t.start),
        default=np.nan,
    )


def score_conversations(
    judge: Judge, conversations: Sequence[Sequence[Message]], at_once: int, tick: Tick = lambda n: None
) -> Array:
    """(n,): what may block each conversation, the highest value of the newest turn over all requests that it takes.

    at_once: requests that share a pass; each keeps all its tokens in a cache of its own; tick: of requests
    """
    requests = [
        (i, list(c[: k + 1])) for i, c in enumerate(conversations) for k, m in enumerate(c) if m["role"] == "user"
    ]
    bank = judge.bank
    values = np.full(len(conversations), -np.inf)
    for start in range(0, len(requests), at_once):
        part = requests[start : start + at_once]
        prompts = [judge.model.template.encode(messages) for _, messages in part]
        for index, streams in residual_streams(judge.model, prompts, bank.layers):
            prompt = prompts[index]
            value = prompt_value(judge.prompt, prompt, score_streams(bank, streams), prompt.newest)
            values[part[index][0]] = np.maximum(values[part[index][0]], value)  # NaN stays
            tick(1)
    return values


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """prompts: (n,) values of the requests; running: per answer (n_scored,) the highest value up to each token, empty
    where no token has a score; the last token of an answer is never fed, and has none"""

    prompts: Array
    running: list[Array]

    def values(self) -> Array:
        """(n,): of the whole answers, NaN where there is none"""
        return np.array([float(r[-1]) if len(r) else np.nan for r in self.running])


def score_answers(judge: Judge, texts: Sequence[str], answers: Sequence[str], tick: Tick) -> ScoredAnswers:
    """Answers that are given, as if the model had written them. tick: of tokens"""
    bank, tokenizer = judge.bank, judge.model.tokenizer
    prompts = judge.prompts(texts)
    ids = [tuple(tokenizer(a, add_special_tokens=False)["input_ids"])[:MAX_ANSWER_TOKENS] for a in answers]
    # The last token is not fed, as when it is generated.
    whole = [Prompt(p.token_ids + a[:-1], p.turns, p.newest, p.format) for p, a in zip(prompts, ids, strict=True)]
    values, running = np.full(len(prompts), np.nan), [np.zeros(0) for _ in prompts]
    for index, streams in residual_streams(judge.model, whole, bank.layers):
        scores, prompt = score_streams(bank, streams), prompts[index]
        values[index] = prompt_value(judge.prompt, prompt, scores)
        running[index] = running_values(judge.response, scores[len(prompt.token_ids) :])
        tick(len(whole[index].token_ids))
    return ScoredAnswers(values, running)


def _columns(scores: Scores) -> Scores:
    """What `aggregate` takes: (n,) of one projection."""
    return scores[:, 0] if scores.shape[1] == 1 else scores


def running_values(how: Aggregation, scores: Scores) -> Array:
    """(n,): the highest value so far at each token; all NaN from a score on that is not finite. scores: (n, k)"""
    running, out = Running([(how, 0, scores.shape[1])]), np.full(len(scores), np.nan)
    for i, row in enumerate(scores.tolist()):
        if not np.isfinite(row).all():
            break
        running.add(row)
        out[i] = running.highest[0]
    return out
