"""Readings for the queue, labels by record, texts, keyed digests, and where a record's features are."""

from __future__ import annotations

import json
import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

from monitor.traffic.rows import reading_rows

revision = "v2"
down_revision = "v1"

_CHUNK = 500
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _record(**how: Any) -> sa.Column[Any]:
    return sa.Column("record", _ID, sa.ForeignKey("records.id", ondelete="CASCADE"), **how)


def upgrade() -> None:
    _records()
    readings = _readings()
    _labels()
    op.create_table("said", _record(primary_key=True, autoincrement=False), _column("sealed", sa.LargeBinary))
    meta = op.create_table("meta", sa.Column("name", sa.Text, primary_key=True), _column("value", sa.LargeBinary))
    op.bulk_insert(meta, [{"name": "salt", "value": secrets.token_bytes(32)}])
    _fill(readings)


def _column(name: str, kind: Any, **how: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **how)


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _records() -> None:
    op.execute("DROP INDEX IF EXISTS records_review")
    op.add_column("records", _column("key", sa.Text, server_default=""))
    op.add_column("records", _column("waiting", sa.Integer, server_default="0"))
    for name, kind in (("digest", sa.Text()), ("q", sa.Double()), ("feature", sa.Text())):
        op.add_column("records", sa.Column(name, kind))
    op.create_index("records_created", "records", ["created"])
    op.create_index("records_key", "records", ["key", "created"])
    op.create_index("records_waiting", "records", ["id"], **_where("waiting = 1"))


def _readings() -> sa.Table:
    table = op.create_table(
        "readings",
        _record(primary_key=True),
        sa.Column("probe", sa.Text, primary_key=True),
        sa.Column("phase", sa.Text, primary_key=True),
        _column("rank", sa.Double),
        _column("decides", sa.Integer),
        _column("verdict", sa.Text),
        _column("labelled", sa.Integer),
        _column("key", sa.Text),
        _column("created", sa.Double),
        sqlite_with_rowid=False,
    )
    order = ["verdict", "labelled", "rank", "record", "key", "created"]
    op.create_index("readings_queue", "readings", ["probe", "phase", *order])
    op.create_index("readings_decide", "readings", [*order, "decides"], **_where("decides = 1"))
    return table


def _labels() -> None:
    """By the record's number, and only those whose record is still kept."""
    op.execute("DROP INDEX IF EXISTS labels_request")
    op.rename_table("labels", "labels_v1")
    op.create_table(
        "labels",
        sa.Column("id", _ID, primary_key=True),
        _record(nullable=False),
        *(_column(name, kind) for name, kind in (("label", sa.Text), ("by", sa.Text), ("created", sa.Double))),
    )
    op.create_index("labels_record", "labels", ["record"])
    op.execute(
        'INSERT INTO labels (record, label, "by", created) SELECT r.id, l.label, l."by", l.created FROM labels_v1 l '
        "JOIN records r ON r.request_id = l.request_id AND r.choice = l.choice ORDER BY l.id"
    )
    op.drop_table("labels_v1")
    op.execute("UPDATE records SET waiting = 1 WHERE verdict <> 'allow' AND id NOT IN (SELECT record FROM labels)")


def _fill(readings: sa.Table) -> None:
    """The queue's rows of the records that there are, some hundreds at a time."""
    connection, last = op.get_bind(), 0
    some = sa.text("SELECT id, verdict, created, body FROM records WHERE id > :last ORDER BY id LIMIT :n")
    labelled = set(connection.execute(sa.text("SELECT DISTINCT record FROM labels")).scalars())
    while rows := connection.execute(some, {"last": last, "n": _CHUNK}).all():
        found, keys = [], []
        for number, verdict, created, text in rows:
            body = json.loads(text)
            key = body.get("key", "")
            keys.append({"n": number, "k": key})
            own = {"record": number, "verdict": verdict, "created": created, "key": key}
            own["labelled"] = int(number in labelled)
            found += [row | own for row in reading_rows(body)]
        connection.execute(sa.insert(readings), found)
        connection.execute(sa.text("UPDATE records SET key = :k WHERE id = :n"), keys)
        last = rows[-1].id
