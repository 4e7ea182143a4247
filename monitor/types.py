"""The words that cross modules: dataclasses, enums, errors and Protocols. Imports nothing of ours."""

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


class MidstreamError(Exception):
    """The root of our errors. The message is one line: what is wrong, and what to do about it.

    MidstreamError
    ├── ConfigInvalid      a setting, a file or an argument
    ├── ModelUnsupported   a model that can't be loaded or tapped
    ├── ProbeInvalid       a probe file or card that is damaged or incomplete
    ├── ProbeMismatch      a sound probe that does not belong to this model
    ├── RequestInvalid     a client's request that can't be served as written
    └── Overloaded         a bound was reached; try again later
    """


class ConfigInvalid(MidstreamError):
    pass


class ModelUnsupported(MidstreamError):
    pass


class ProbeInvalid(MidstreamError):
    pass


class ProbeMismatch(MidstreamError):
    pass


class RequestInvalid(MidstreamError):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(MidstreamError):
    pass


class Phase(enum.StrEnum):
    PROMPT = "prompt"
    RESPONSE = "response"


class Mode(enum.StrEnum):
    """What a probe may do: shadow only counts, flag alerts, block ends the answer."""

    SHADOW = "shadow"
    FLAG = "flag"
    BLOCK = "block"


class Action(enum.StrEnum):
    """A verdict. `unmonitored`: a score that was needed is missing or not finite."""

    ALLOW = "allow"
    FLAG = "flag"
    BLOCK = "block"
    UNMONITORED = "unmonitored"


# The worse of two verdicts stands.
SEVERITY = {Action.ALLOW: 0, Action.FLAG: 1, Action.UNMONITORED: 2, Action.BLOCK: 3}


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


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request to an engine: each prompt gives n choices; choice i of prompt p has index p * n + i."""

    id: str
    prompts: tuple[Prompt, ...]
    n: int
    sampling: Sampling
    route: str


Deliver = Callable[[Delta], None]


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
