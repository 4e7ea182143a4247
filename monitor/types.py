"""The words that cross modules: dataclasses, enums and Protocols. Imports nothing of ours."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]
Format = Literal["chat", "raw"]
FinishReason = Literal["stop", "length", "content_filter", "unmonitored", "aborted", "engine_error"]
Cause = Literal["not_finite", "gap", "missing_rows", "missing_probe"]
"""Why a token has no score: NaN or infinite; rows skipped; fewer rows than tokens; a probe that is scored no more."""


CANDIDATE_MARK = "@"
"""`probe@v2` is version 2 of a probe, served in shadow beside the live one; no name in a store has the mark."""


def is_candidate(probe: str) -> bool:
    """Whether this is no probe of the policy's but a version on trial: it is never told to a client."""
    return CANDIDATE_MARK in probe


class Phase(enum.StrEnum):
    PROMPT = "prompt"
    RESPONSE = "response"


class Mode(enum.StrEnum):
    """What a probe may do: shadow only counts, flag alerts, block ends the answer."""

    SHADOW = "shadow"
    FLAG = "flag"
    BLOCK = "block"


class Action(enum.StrEnum):
    """A verdict. `escalate`: held until a second judge has answered; `unmonitored`: a score that was needed is missing
    or not finite."""

    ALLOW = "allow"
    FLAG = "flag"
    ESCALATE = "escalate"
    BLOCK = "block"
    UNMONITORED = "unmonitored"


# The worse of two verdicts stands.
SEVERITY = {Action.ALLOW: 0, Action.FLAG: 1, Action.ESCALATE: 2, Action.UNMONITORED: 3, Action.BLOCK: 4}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as the server knows it: what a policy is chosen by. Nothing here is the client's own word.

    key: name of the API key, "" without one; route: chat, completions, responses, ...; model: its own name, whatever
    alias was asked for
    """

    key: str = ""
    route: str = "internal"
    model: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """How a client is told of verdicts, by its policy.

    annotate: verdicts in Azure's fields; refusal: the answer to a blocked prompt, None: 400; replacement: what stands
    in place of a blocked answer, None: it is cut
    """

    policy: str = "default"
    annotate: bool = False
    refusal: str | None = None
    replacement: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """Counted positions [start, end) of one turn of a prompt."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the model reads it.

    turns: counted positions, in order, never overlapping; `turns[newest:]` belong to the newest turn
    """

    token_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    newest: int
    format: Format


@dataclass(frozen=True, slots=True)
class Sampling:
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    """None: no logprobs; k >= 0: the sampled token's and the k likeliest."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Judged output of one choice, ready for the client.

    The first Delta of a choice carries the verdict on its prompt; `finish` is set on the last one only.
    """

    index: int
    text: str
    tokens: tuple[TokenLogprob, ...]
    n_tokens: int
    finish: FinishReason | None
    record: Record | None = None
    """Set with `finish`."""
    opening: Opening | None = None
    """Set on the first Delta of a choice."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What is known when the prompt has its verdict. readings: of the prompt phase"""

    terms: Terms
    readings: tuple[ProbeReading, ...]


@dataclass(frozen=True, slots=True)
class ProbeReading:
    """What one probe said about one sequence. Values are aggregated logits; None: no value (unmonitored)."""

    probe: str
    version: str
    phase: Phase
    mode: Mode
    threshold: float | None
    value: float | None
    """The prompt's maximum over its turns, or the response's running maximum: the served statistic."""
    newest: float | None
    """Prompt: the newest turn's value. Response: the last running value."""
    peak_position: int | None
    """Position of the highest token score; `crossed_at` is where the running value crossed the threshold."""
    peak_score: float | None
    crossed_at: int | None
    action: Action
    would_block: bool
    """A shadow or flag probe whose value is above its threshold."""
    sample: float | None = None
    """The score of one position of the phase that counts, drawn uniformly."""


@dataclass(frozen=True, slots=True)
class Escalation:
    """One question to the second judge. value, second: logits; second is None if it failed or came too late"""

    probe: str
    phase: Phase
    position: int
    value: float
    second: float | None
    result: Literal["block", "clear", "failed", "overflow"]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Tokens of one sequence, each in exactly one place.

    prompt_scored + response_scored + unmonitored + final_unscored + not_computed = prompt_tokens + response_tokens
    """

    prompt_tokens: int
    response_tokens: int
    """Sampled, released or not."""
    prompt_scored: int
    response_scored: int
    final_unscored: int
    """0 or 1: the last sampled token is never fed back, so it has no score (DESIGN: rule 2)."""
    unmonitored: int
    not_computed: int
    """Positions that an aborted or blocked sequence never ran."""
    causes: Mapping[str, int]


ScoredBy = Literal["engine", "observer"]
"""Whose residual stream the scores are of: the model's that answered, or of a second one's that read the same text."""


@dataclass(frozen=True, slots=True)
class Record:
    """One finished sequence: everything that is kept about it. Holds no text."""

    request_id: str
    index: int
    created: float
    model: str
    route: str
    format: Format
    verdict: Action
    finish: FinishReason
    released_tokens: int
    held_tokens: int
    coverage: Coverage
    readings: tuple[ProbeReading, ...]
    counted: tuple[tuple[int, int], ...]
    """Positions [start, end) of the prompt that count; every position of the answer does."""
    token_scores: Mapping[str, Sequence[float]]
    """Per probe, one score for each position; empty where no probe crossed its threshold or broke."""
    key: str = ""
    """Name of the API key, "" without one."""
    policy: str = "default"
    escalations: tuple[Escalation, ...] = ()
    held_seconds: float = 0.0
    """The longest that a sampled token waited until it was released."""
    scored_by: ScoredBy = "engine"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to an engine: each prompt gives n choices; choice i of prompt p has index p * n + i."""

    id: str
    prompts: tuple[Prompt, ...]
    n: int
    sampling: Sampling
    caller: Caller = Caller()
    given: tuple[int, ...] | None = None
    """The answer, if it is given and only to be judged: nothing is sampled."""
    trace: Trace | None = None


Deliver = Callable[[Delta], None]
Trace = Callable[[int, Sequence[int], Scores], None]
"""Told of every judged row of choice 0: the first position, the token ids there, (n, P) scores, one a probe."""


class Scorer(Protocol):
    """Requests that no client waits for: a text that is only judged, or one whose scores are looked at."""

    async def judge(self, request_id: str, prompt: Prompt, answer: tuple[int, ...], caller: Caller) -> Record:
        """The record, as if `answer` had been generated after `prompt` (and published like one); its
        `released_tokens` says how much of the answer would have gone out.

        prompt: what the model would have read; answer: token ids, empty to judge the prompt alone
        raises: RequestInvalid if it can't fit, Overloaded; cancelling it stops the work
        """
        ...

    async def follow(
        self, request_id: str, prompt: Prompt, max_tokens: int, temperature: float, caller: Caller, trace: Trace
    ) -> Record:
        """Answer a prompt for nobody; `trace` is told of every judged row. raises: as `judge`"""
        ...


class Observer(Protocol):
    """What is told of every finished sequence. Called from the engine's thread; must not block."""

    def record(self, record: Record) -> None: ...

    def scored(self, seconds: float, n_tokens: int) -> None: ...


class Engine(Protocol):
    """What the API needs of an engine. `submit` and `abort` may be called from any thread."""

    model_name: str
    max_model_len: int

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request. `deliver` is called from the engine's thread, at least once per choice.

        raises: Overloaded when the queue is full or the engine is stopping, RequestInvalid if it can't fit
        """
        ...

    def abort(self, request_id: str) -> None:
        """Stop computing the request; its records say `aborted`. Unknown ids are ignored."""
        ...

    def readiness(self) -> str | None:
        """None when ready, else the reason in a sentence."""
        ...

    def describe(self) -> Mapping[str, Any]: ...
