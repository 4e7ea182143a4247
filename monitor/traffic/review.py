"""Reading the log, and people's labels of its records."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, func, insert, literal_column, select, update

from monitor.errors import ConfigInvalid
from monitor.traffic.database import Where, opened
from monitor.traffic.tables import labels, readings, records

_ONE: Any = literal_column("1")  # not a parameter: only then the partial index is known to fit


class Label(enum.StrEnum):
    """What a person says of a request that was flagged, blocked or not monitored."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"
    UNSURE = "unsure"


class NoSuchRecord(ConfigInvalid):
    def __init__(self, request_id: str, choice: int) -> None:
        super().__init__(
            f"there is no record of request {request_id!r}, choice {choice}; it may be older than the log keeps"
        )


def find_records(where: Where, request_id: str) -> list[dict[str, Any]]:
    """The records of one request, by choice. raises: ConfigInvalid if there is no such log"""
    query = select(records.c.body).where(records.c.request_id == request_id).order_by(records.c.choice)
    with opened(where, update=False) as connection:
        return [json.loads(body) for body in connection.execute(query).scalars()]


def count_unlabelled(where: Where) -> int:
    """Kept records of flags, blocks and missing scores that nobody has labelled. raises: ConfigInvalid"""
    with opened(where) as connection:
        return backlog(connection)


def backlog(connection: Connection) -> int:
    count: int = connection.scalar(select(func.count()).select_from(records).where(records.c.waiting == _ONE)) or 0
    return count


def unlabelled(where: Where, limit: int) -> list[dict[str, Any]]:
    """The newest records of the backlog, newest first. raises: ConfigInvalid if there is no such log"""
    query = select(records.c.body).where(records.c.waiting == _ONE).order_by(records.c.id.desc()).limit(limit)
    with opened(where) as connection:
        return [json.loads(body) for body in connection.execute(query).scalars()]


def add_label(
    where: Where, request_id: str, choice: int, label: Label, by: str, clock: Callable[[], float] = time.time
) -> Label | None:
    """Label one record; of several labels the newest counts, and the one that counted before is returned.

    clock: seconds since the epoch
    raises: ConfigInvalid if there is no such log, NoSuchRecord
    """
    with opened(where, "rw") as connection:
        which = records.c.request_id == request_id, records.c.choice == choice
        number = connection.scalar(select(records.c.id).where(*which).limit(1))
        if number is None:
            raise NoSuchRecord(request_id, choice)
        newest = select(labels.c.label).where(labels.c.record == number).order_by(labels.c.id.desc())
        before = connection.scalar(newest.limit(1))
        row = {"record": number, "label": str(label), "by": by, "created": clock()}
        connection.execute(insert(labels), row)
        connection.execute(update(records).where(records.c.id == number).values(waiting=0))
        connection.execute(update(readings).where(readings.c.record == number).values(labelled=1))
    return None if before is None else Label(before)


def find_labels(where: Where, request_id: str, choice: int) -> list[dict[str, Any]]:
    """{label, by, created} of one record, the newest first: it counts, the others are earlier opinions."""
    query = (
        select(labels.c.label, labels.c.by, labels.c.created)
        .join_from(labels, records, records.c.id == labels.c.record)
        .where(records.c.request_id == request_id, records.c.choice == choice)
        .order_by(labels.c.id.desc())
    )
    with opened(where) as connection:
        return [dict(row) for row in connection.execute(query).mappings()]
