"""Labels since a time, for training: of each record the newest opinion, and what the record says of itself."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import func, select

from monitor.traffic.database import Where, opened
from monitor.traffic.review import Label
from monitor.traffic.tables import labels, records


class Labelled(NamedTuple):
    """One labelled record. key: name of the API key; created: of the request, labelled: of the label, in seconds since
    the epoch"""

    request_id: str
    choice: int
    key: str
    created: float
    label: Label
    labelled: float


def count_requests(where: Where) -> int:
    """Requests in the log, whatever choices they had. raises: ConfigInvalid if there is no such log"""
    query = select(func.count()).select_from(records).where(records.c.choice == 0)
    with opened(where) as connection:
        return int(connection.scalar(query) or 0)


def labelled_since(where: Where, since: float) -> list[Labelled]:
    """Records whose newest label came after `since` and says harmful or harmless, oldest label first.

    raises: ConfigInvalid if there is no such log
    """
    newest = select(func.max(labels.c.id)).group_by(labels.c.record)
    query = (
        select(
            records.c.request_id,
            records.c.choice,
            records.c.key,
            records.c.created,
            labels.c.label,
            labels.c.created.label("labelled"),
        )
        .join_from(labels, records, records.c.id == labels.c.record)
        .where(labels.c.id.in_(newest), labels.c.created > since, labels.c.label != str(Label.UNSURE))
        .order_by(labels.c.id)
    )
    with opened(where) as connection:
        rows = connection.execute(query).all()
    return [Labelled(r[0], r[1], r[2], r[3], Label(r[4]), r[5]) for r in rows]
