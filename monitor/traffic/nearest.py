"""The review queue by distance from a threshold: what is hardest to tell apart teaches a probe most."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, func, select

from monitor.errors import ConfigInvalid
from monitor.traffic.database import Where, opened
from monitor.traffic.queue import SELECTED, Entry, Filter, entries, few_readings, is_narrow, wide_conditions
from monitor.traffic.rows import FIRST
from monitor.traffic.tables import readings, records

_RECENT = 200
"""Records that are looked through for the threshold in use."""
_ABOVE, _BELOW = 0, 1
Near = tuple[float, int, int]
"""A place: distance in logits, above or below, record."""


def nearest_queue(
    where: Where, which: Filter, around: float, limit: int, after: Near | None = None
) -> list[tuple[Near, Entry]]:
    """The first `limit` entries behind the place `after`, the nearest to `around` first; each with its place.

    which: of one probe in one phase: values of others can't be compared. A missing score has no distance
    raises: ConfigInvalid if there is no such log, or no probe and phase are named
    """
    if which.probe is None or which.phase is None:
        raise ConfigInvalid("distances are from one probe's threshold in one phase: name a probe and a phase")
    with opened(where) as connection:
        narrow = is_narrow(connection, which)
        parts = []
        for side in (_ABOVE, _BELOW):
            for query in _queries(which, around, side, after, narrow):
                parts.append([(_place(row, around, side), row) for row in connection.execute(query.limit(limit))])
        found = list(itertools.islice(heapq.merge(*parts, key=lambda pair: _order(pair[0])), limit))
        return list(zip([place for place, _ in found], entries(connection, [row for _, row in found]), strict=True))


def threshold_of(where: Where, probe: str, phase: str) -> float | None:
    """That the newest records were judged by; None if this probe has none there. raises: ConfigInvalid"""
    query = select(records.c.body).order_by(records.c.id.desc()).limit(_RECENT)
    with opened(where) as connection:
        for body in connection.execute(query).scalars():
            for reading in json.loads(body)["readings"]:
                if (reading["probe"], reading["phase"]) == (probe, phase) and reading["threshold"] is not None:
                    return float(reading["threshold"])
    return None


def _queries(which: Filter, around: float, side: int, after: Near | None, narrow: bool) -> Iterator[Select[Any]]:
    rank, record = readings.c.rank, readings.c.record
    if side == _ABOVE:
        own, order = [rank >= around, rank < FIRST], [rank.asc(), record.asc()]
    else:
        own, order = [rank < around, rank > -FIRST], [rank.desc(), record.desc()]
    rest = [*own, *_behind(around, side, after)]
    if narrow:
        yield few_readings(which).where(*rest).order_by(*order)
        return
    for conditions in wide_conditions(which):
        yield SELECTED.where(*conditions, *rest).order_by(*order)


def _behind(around: float, side: int, after: Near | None) -> list[ColumnElement[bool]]:
    if after is None:
        return []
    distance, at, record = after
    # An index knows ranks, not distances: the bound is a little loose, so that rounding loses nobody.
    loose = distance - 1e-9 * (1 + abs(around) + distance)
    own = func.abs(readings.c.rank - around)
    farther = own > distance
    if side == _ABOVE:
        bound = readings.c.rank >= around + loose
        tied: ColumnElement[bool] | None = (own == distance) & (readings.c.record > record) if at == _ABOVE else None
    else:
        bound = readings.c.rank <= around - loose
        tied = (own == distance) & (readings.c.record < record) if at == _BELOW else own == distance
    return [bound, farther if tied is None else farther | tied]


def _place(row: Row[Any], around: float, side: int) -> Near:
    return abs(row.rank - around), side, row.record


def _order(place: Near) -> tuple[float, int, int]:
    """As both queries are ordered: of equal distance those above first, there the oldest first, below the newest."""
    distance, side, record = place
    return distance, side, record if side == _ABOVE else -record
