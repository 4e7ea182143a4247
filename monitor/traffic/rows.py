"""A Record as rows: its body as JSON, and what the queue is ordered by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, func, insert, select, text, update

from monitor.traffic.tables import readings, records
from monitor.types import SEVERITY, Action, Coverage, Escalation, ProbeReading, Record

FIRST, LAST = 1e300, -1e300
"""Ranks of a reading without a value: what could not be scored comes first, what had nothing to score last."""


class Row(NamedTuple):
    """One record, ready to be written."""

    record: dict[str, Any]
    readings: list[dict[str, Any]]


Mark = tuple[str, int, float]
"""A kept sequence: request id, choice, and the probability that it was kept with."""

_NAMES = {
    kind: tuple(field.name for field in dataclasses.fields(kind))
    for kind in (Record, Coverage, ProbeReading, Escalation)
}


def record_json(record: Record) -> dict[str, Any]:
    """As JSON has it. Shares what the record holds: `dataclasses.asdict` copies all of it, which costs the most."""
    parts = {"coverage": _fields(record.coverage)}
    lists = {"readings": [*map(_fields, record.readings)], "escalations": [*map(_fields, record.escalations)]}
    return _fields(record) | parts | lists


def _fields(one: Record | Coverage | ProbeReading | Escalation) -> dict[str, Any]:
    return {name: getattr(one, name) for name in _NAMES[type(one)]}


def row_of(record: Record, digest: str | None = None) -> Row:
    """digest: of its prompt. raises: TypeError, ValueError or RecursionError for what JSON can't hold"""
    body = record_json(record)
    verdict = str(record.verdict)
    own = {"verdict": verdict, "key": record.key, "created": record.created}
    columns = {
        "request_id": record.request_id,
        "choice": record.index,
        "body": json.dumps(body),
        "waiting": int(record.verdict is not Action.ALLOW),
        "digest": digest,
    }
    return Row(own | columns, [row | own | {"labelled": 0} for row in reading_rows(body)])


def reading_rows(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """probe, phase, rank and decides of each reading of a record's body; one without names if it has none."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for reading in body["readings"]:
        action = Action(reading["action"])
        missing = FIRST if action is Action.UNMONITORED else LAST
        rank = missing if reading["value"] is None else float(reading["value"])
        name = reading["probe"], str(reading["phase"])
        found[name] = max(found.get(name, (0, LAST)), (SEVERITY[action], rank))
    if not found:
        found["", ""] = 0, FIRST if body["verdict"] == Action.UNMONITORED else LAST
    worst = max(found, key=lambda name: found[name])
    return [
        {"probe": probe, "phase": phase, "rank": rank, "decides": int((probe, phase) == worst)}
        for (probe, phase), (_, rank) in found.items()
    ]


def write(connection: Connection, rows: Sequence[Row]) -> None:
    """raises: SQLAlchemyError"""
    if not rows:
        return
    numbers = _numbers(connection, len(rows))
    connection.execute(insert(records), [row.record | {"id": n} for n, row in zip(numbers, rows, strict=True)])
    found = [reading | {"record": n} for n, row in zip(numbers, rows, strict=True) for reading in row.readings]
    connection.execute(insert(readings), found)


def _numbers(connection: Connection, n: int) -> list[int]:
    """The next n. Taken beforehand: asking for each row's number makes SQLite's driver write row by row."""
    if connection.dialect.name == "postgresql":  # other servers write too
        series = "SELECT nextval(pg_get_serial_sequence('records', 'id')) FROM generate_series(1, :n)"
        return list(connection.execute(text(series), {"n": n}).scalars())
    newest = connection.scalar(select(func.max(records.c.id))) or 0  # whoever writes has locked the others out
    return list(range(newest + 1, newest + 1 + n))


def mark_features(engine: Engine, file: str, marks: Sequence[Mark]) -> set[tuple[str, int]]:
    """Tell records the file of their features; returns the (request id, choice) of those that there are.

    raises: SQLAlchemyError
    """
    there = set()
    with engine.begin() as connection:
        for request_id, choice, q in marks:
            which = (records.c.request_id == request_id) & (records.c.choice == choice)
            if connection.execute(update(records).where(which).values(q=q, feature=file)).rowcount:
                there.add((request_id, choice))
    return there
