"""Whose label, on which record: what `midstream review` and the console share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import select

from monitor.errors import ConfigInvalid
from monitor.traffic.database import Where, opened
from monitor.traffic.review import NoSuchRecord, find_records
from monitor.traffic.tables import labels
from monitor.types import SEVERITY, Action

MAX_NAME = 64


def request_key(given: str) -> str:
    """A request's own id, also from the id that its client has seen."""
    return given.removeprefix("chatcmpl-").removeprefix("cmpl-")


def signed(name: str, field: str) -> str:
    """The name, if it can sign a label. field: where it was given. raises: ConfigInvalid"""
    if not (0 < len(name) <= MAX_NAME and name.isprintable()):
        raise ConfigInvalid(f"{field} {name[:MAX_NAME]!r} must be 1 to {MAX_NAME} characters that can be printed")
    return name


def only_choice(where: Where, request_id: str, field: str) -> int:
    """Of a request that has one. field: where it is said else. raises: ConfigInvalid if it has several, NoSuchRecord"""
    choices = [body["index"] for body in find_records(where, request_id)]
    if len(choices) > 1:
        raise ConfigInvalid(
            f"request {request_id!r} has choices {', '.join(map(str, choices))}; say which with {field}"
        )
    if not choices:
        raise NoSuchRecord(request_id, 0)
    return int(choices[0])


def decided(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reading of a record's body that decided, {} if there is none."""
    worst: Mapping[str, Any] = max(body["readings"], key=lambda r: SEVERITY[Action(r["action"])], default={})
    return worst


def listed(body: Mapping[str, Any], reading: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a list shows it: with one of its readings, {} for none."""
    return {
        "request_id": body["request_id"],
        "choice": body["index"],
        "verdict": body["verdict"],
        "time": body["created"],
        "model": body["model"],
        "route": body["route"],
    } | {name: reading.get(name) for name in ("probe", "phase", "value", "threshold")}


def newest_labels(where: Where, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Record's number -> the label that counts: {label, by, created}. raises: ConfigInvalid"""
    query = select(labels.c.record, labels.c.label, labels.c.by, labels.c.created)
    wanted = query.where(labels.c.record.in_(list(numbers))).order_by(labels.c.id)
    with opened(where) as connection:  # of several the last one stays
        return {
            row.record: {"label": row.label, "by": row.by, "created": row.created} for row in connection.execute(wanted)
        }
