"""What every engine of ours does over HTTP. A test file gives the fixtures `calm`, `trigger` and `starred`.

calm: a probe that never fires; trigger: one that fires on every prompt; starred: one that fires on the token `*`.
All three block in both phases. The tests force what is sampled by fields that any client may send.
"""

from .answers import Answers
from .blocks import Blocks, Conversations
from .exchange import (
    BOTH,
    CHAT,
    HTTP,
    JSON,
    STREAM,
    TEXT,
    Reply,
    Server,
    address,
    asked,
    endless,
    expected,
    forced,
    prompt_reading,
    request,
    scored,
    user,
    zero_probe,
)
from .housekeeping import Departures, Housekeeping, Ids
from .refusals import LATE, Refusals

__all__ = [
    "BOTH",
    "CHAT",
    "HTTP",
    "JSON",
    "LATE",
    "STREAM",
    "TEXT",
    "Answers",
    "Blocks",
    "Contract",
    "Conversations",
    "Departures",
    "Housekeeping",
    "Ids",
    "Refusals",
    "Reply",
    "Server",
    "address",
    "asked",
    "endless",
    "expected",
    "forced",
    "prompt_reading",
    "request",
    "scored",
    "user",
    "zero_probe",
]


class Contract(Answers, Ids, Blocks, Conversations, Refusals, Departures, Housekeeping):
    """All of it: subclass this as Test… in a file with the three fixtures."""
