"""The review queue: records by what a probe said of them, the highest value first, filtered."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, literal_column, select

from monitor.errors import ConfigInvalid
from monitor.traffic.database import Where, opened
from monitor.traffic.rows import FIRST, LAST
from monitor.traffic.tables import readings, records
from monitor.types import Action, Phase

FEW = 20_000
"""So many records of a key or a time are looked at one by one; of more, the highest values are looked through."""
_NOT_ALLOWED = frozenset(Action) - {Action.ALLOW}
_DECIDES: Any = readings.c.decides == literal_column("1")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records. probe, phase: those that this probe has read, ordered by what it said; both or none, which orders
    by the reading that decided; key: name of an API key

    since, until: seconds since the epoch, the first included; labelled: None for either
    """

    probe: str | None = None
    phase: Phase | None = None
    verdicts: frozenset[Action] = _NOT_ALLOWED
    key: str | None = None
    since: float | None = None
    until: float | None = None
    labelled: bool | None = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in the queue. value: None where there is none; body: the record as JSON has it"""

    place: tuple[float, int]
    probe: str
    phase: str
    value: float | None
    body: dict[str, Any]
    q: float | None
    feature: str | None


def review_queue(where: Where, which: Filter, limit: int, after: tuple[float, int] | None = None) -> list[Entry]:
    """The first `limit` entries behind the place `after`; missing scores come before every value.

    raises: ConfigInvalid if there is no such log, or a probe is named without a phase
    """
    if (which.probe is None) != (which.phase is None):
        raise ConfigInvalid("a queue is ordered by one probe in one phase: name both, or neither")
    with opened(where) as connection:
        if is_narrow(connection, which):
            found = connection.execute(_narrow(which, after).limit(limit)).all()
        else:
            parts = [connection.execute(query.limit(limit)).all() for query in _wide(which, after)]
            found = list(itertools.islice(heapq.merge(*parts, key=_order, reverse=True), limit))
        return entries(connection, found)


def counts(where: Where) -> dict[str, tuple[int, int]]:
    """Verdict -> (records, labelled ones) of the whole log. raises: ConfigInvalid"""
    found = {}
    with opened(where) as connection:
        for verdict in map(str, Action):
            waiting, done = (connection.scalar(_count(verdict, labelled)) or 0 for labelled in (0, 1))
            if waiting + done:
                found[verdict] = waiting + done, done
    return found


def _count(verdict: str, labelled: int) -> Select[Any]:
    """One at a time: each is a stretch of an index, where a GROUP BY would walk the table."""
    own = readings.c.verdict == verdict, readings.c.labelled == labelled
    return select(func.count()).select_from(readings).where(_DECIDES, *own)


SELECTED = select(readings.c.rank, readings.c.record, readings.c.probe, readings.c.phase)
_ORDER = readings.c.rank.desc(), readings.c.record.desc()


def _wide(which: Filter, after: tuple[float, int] | None) -> Iterator[Select[Any]]:
    """One query for each verdict and label: an index has their records in the queue's order."""
    for conditions in wide_conditions(which):
        yield SELECTED.where(*conditions, *_behind(after)).order_by(*_ORDER)


def wide_conditions(which: Filter) -> Iterator[list[ColumnElement[bool]]]:
    """Of each verdict and label, by columns of the index that has them in order."""
    pair = [_DECIDES] if which.probe is None else [readings.c.probe == which.probe, readings.c.phase == which.phase]
    for verdict, labelled in itertools.product(sorted(which.verdicts), _labelled(which)):
        own = [readings.c.verdict == str(verdict), readings.c.labelled == labelled]
        yield [*pair, *own, *_owned(readings.c, which)]


def _narrow(which: Filter, after: tuple[float, int] | None) -> Select[Any]:
    return few_readings(which).where(*_behind(after)).order_by(*_ORDER)


def few_readings(which: Filter) -> Select[Any]:
    """Few records come into question: take all of their readings, for somebody to sort."""
    few = select(records.c.id).where(*_owned(records.c, which)).limit(FEW).subquery()
    if which.probe is None:
        pair = [_DECIDES]
    else:
        pair = [_plain(readings.c.probe) == which.probe, _plain(readings.c.phase) == which.phase]
    verdicts = _plain(readings.c.verdict).in_(sorted(map(str, which.verdicts)))
    rest = [verdicts, readings.c.labelled.in_(_labelled(which))]
    return SELECTED.join_from(few, readings, readings.c.record == few.c.id).where(*pair, *rest)


def is_narrow(connection: Connection, which: Filter) -> bool:
    owned = _owned(records.c, which)
    if not owned:
        return False
    some = select(records.c.id).where(*owned).limit(FEW).subquery()
    return (connection.scalar(select(func.count()).select_from(some)) or 0) < FEW


def _owned(columns: Any, which: Filter) -> list[ColumnElement[bool]]:
    conditions = []
    if which.key is not None:
        conditions.append(columns.key == which.key)
    if which.since is not None:
        conditions.append(columns.created >= which.since)
    if which.until is not None:
        conditions.append(columns.created < which.until)
    return conditions


def _behind(after: tuple[float, int] | None) -> list[ColumnElement[bool]]:
    if after is None:
        return []
    rank, record = after
    return [readings.c.rank <= rank, (readings.c.rank < rank) | (readings.c.record < record)]


def _plain(column: Any) -> Any:
    """As an expression, which no index is used for: the few records are found by their own."""
    return func.coalesce(column, "")


def _labelled(which: Filter) -> list[int]:
    return [0, 1] if which.labelled is None else [int(which.labelled)]


def _order(row: Row[Any]) -> tuple[float, int]:
    return row.rank, row.record


def entries(connection: Connection, rows: Sequence[Row[Any]]) -> list[Entry]:
    wanted = select(records.c.id, records.c.body, records.c.q, records.c.feature)
    kept = connection.execute(wanted.where(records.c.id.in_([row.record for row in rows])))
    bodies = {number: rest for number, *rest in kept}
    found = []
    for row in rows:
        body, q, feature = bodies[row.record]
        value = None if row.rank in (FIRST, LAST) else row.rank
        found.append(Entry((row.rank, row.record), row.probe, row.phase, value, json.loads(body), q, feature))
    return found
