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


def nearest_queue(
    where: Where, which: Filter, around: float, limit: int, after: tuple[float, int] | None = None
) -> list[Entry]:
    """The first `limit` entries behind the place `after`, the nearest to `around` first.

    which: of one probe in one phase: values of others can't be compared. A missing score has no distance
    raises: ConfigInvalid if there is no such log, or no probe and phase are named
    """
    if which.probe is None or which.phase is None:
        raise ConfigInvalid("distances are from one probe's threshold in one phase: name a probe and a phase")
    with opened(where) as connection:
        narrow = is_narrow(connection, which)
        queries = [q for side in (_ABOVE, _BELOW) for q in _queries(which, around, side, after, narrow)]
        parts = [connection.execute(query.limit(limit)).all() for query in queries]
        found = heapq.merge(*parts, key=lambda row: _order(row, around))
        return entries(connection, list(itertools.islice(found, limit)))


def threshold_of(where: Where, probe: str, phase: str) -> float | None:
    """That the newest records were judged by; None if this probe has none there. raises: ConfigInvalid"""
    query = select(records.c.body).order_by(records.c.id.desc()).limit(_RECENT)
    with opened(where) as connection:
        for body in connection.execute(query).scalars():
            for reading in json.loads(body)["readings"]:
                if (reading["probe"], reading["phase"]) == (probe, phase) and reading["threshold"] is not None:
                    return float(reading["threshold"])
    return None


def _queries(
    which: Filter, around: float, side: int, after: tuple[float, int] | None, narrow: bool
) -> Iterator[Select[Any]]:
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


def _behind(around: float, side: int, after: tuple[float, int] | None) -> list[ColumnElement[bool]]:
    if after is None:
        return []
    last, number = after
    rank, record = readings.c.rank, readings.c.record
    distance, at = abs(last - around), _ABOVE if last >= around else _BELOW
    if side == at == _ABOVE:
        return [rank >= last, (rank > last) | (record > number)]
    if side == at == _BELOW:
        return [rank <= last, (rank < last) | (record < number)]
    # The other side's place. An index knows ranks, not distances: its bound is a little loose, rounding loses nobody.
    loose, own = distance - 1e-9 * (1 + abs(around) + distance), func.abs(rank - around)
    return [rank >= around + loose, own > distance] if side == _ABOVE else [rank <= around - loose, own >= distance]


def _order(row: Row[Any], around: float) -> tuple[float, int, float, int]:
    """As both queries are ordered. Of equal distance those above come first; ranks that rounding makes equally far
    stay in their own order."""
    if row.rank >= around:
        return row.rank - around, _ABOVE, row.rank, row.record
    return around - row.rank, _BELOW, -row.rank, -row.record
