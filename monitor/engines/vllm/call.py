"""A call: one HTTP request, as the judge and the gate in front of the routes both see it.

The gate makes it and puts it into a context variable; the engine's requests that are made on its behalf find it
there, whatever route made them and whatever id a client sent.
"""

from __future__ import annotations

import contextvars
import secrets
from dataclasses import dataclass, field

from monitor.types import Action, Format, Phase, Record


@dataclass(slots=True)
class Call:
    """expected: sequences that will be generated, n for each prompt; history: token ids that precede the newest turn,
    empty if unknown

    judged: sequences whose prompt has a verdict; blocked: choices that ended in a block, with the tokens released;
    failed: the first record of a sequence that may not be answered at all
    """

    route: str
    format: Format
    model: str = ""
    n: int = 1
    expected: int = 1
    history: tuple[int, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    started: int = 0
    judged: int = 0
    blocked: dict[int, int] = field(default_factory=dict)
    failed: Record | None = None


CALL: contextvars.ContextVar[Call | None] = contextvars.ContextVar("midstream_call", default=None)


def current() -> Call:
    """The call on whose behalf this runs. A request from nowhere is judged too, as raw text."""
    return CALL.get() or Call("internal", "raw")


def blocks_prompt(record: Record) -> bool:
    return any(r.phase is Phase.PROMPT and r.action is Action.BLOCK for r in record.readings)
