"""A call: one HTTP request, as the judge and the gate in front of the routes both see it.

The gate makes it and puts it into a context variable; the engine's requests that are made on its behalf find it
there, whatever route made them and whatever id a client sent.
"""

from __future__ import annotations

import contextvars
import secrets
from dataclasses import dataclass, field

from monitor.engines.vllm.banks import Bank
from monitor.types import Action, Caller, Format, Opening, Phase, Prompt, Record, Terms, Trace


@dataclass(frozen=True, slots=True)
class Given:
    """A text that is only to be judged, in place of what the route rendered and the engine would sample."""

    prompt: Prompt
    answer: tuple[int, ...]


@dataclass(slots=True)
class Averages:
    """A request of ours that is read for its residual stream alone: nothing of it is judged or recorded.

    spans: positions [start, end); means: (n_spans, n_layers, d_model) float32 as bytes, once they have come
    """

    spans: list[list[int]]
    means: bytes | None = None


@dataclass(slots=True)
class Call:
    """key: name of the API key; model: its own name, asked: as the client spelled it; expected: sequences that will be
    generated, n for each prompt; history: token ids that precede the newest turn, empty if unknown; silent: no
    policy acts on it and it leaves no record

    terms: of the policy it is judged by, None before it is chosen; openings: by choice, once its prompt has its
    verdict; records: by choice, once it has ended; blocked: choices that ended in a block, with the tokens released;
    failed: the first record of a sequence that may not be answered at all; refused: status and words of vLLM's refusal
    of one that it has not begun
    """

    route: str
    format: Format
    model: str = ""
    key: str = ""
    asked: str = ""
    n: int = 1
    expected: int = 1
    history: tuple[int, ...] = ()
    given: Given | None = None
    trace: Trace | None = None
    silent: bool = False
    bank: Bank | None = None
    averages: Averages | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    terms: Terms | None = None
    openings: dict[int, Opening] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    blocked: dict[int, int] = field(default_factory=dict)
    failed: Record | None = None
    refused: tuple[int, str] | None = None

    @property
    def caller(self) -> Caller:
        return Caller(self.key, self.route, self.model)


CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("midstream_call", default=None)


def current() -> Call:
    """The call on whose behalf this runs. A request from nowhere is judged too, as raw text."""
    return CALL.get() or Call("internal", "raw")


def blocks_prompt(record: Record) -> bool:
    return any(r.phase is Phase.PROMPT and r.action is Action.BLOCK for r in record.readings)
