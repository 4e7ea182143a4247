"""Records and labels, as they were before Alembic: files of that time have them, whole or without the labels."""

from __future__ import annotations

from alembic import op

revision = "v1"
down_revision = None

_ID = {"sqlite": "INTEGER NOT NULL PRIMARY KEY", "postgresql": "BIGSERIAL PRIMARY KEY"}
_STATEMENTS = (
    """CREATE TABLE IF NOT EXISTS records (
        id {id}, request_id TEXT NOT NULL, choice INTEGER NOT NULL, created DOUBLE PRECISION NOT NULL,
        verdict TEXT NOT NULL, body TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS records_request ON records (request_id)",
    """CREATE TABLE IF NOT EXISTS labels (
        id {id}, request_id TEXT NOT NULL, choice INTEGER NOT NULL, label TEXT NOT NULL, "by" TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL)""",
)


def upgrade() -> None:
    number = _ID[op.get_context().dialect.name]
    for statement in _STATEMENTS:
        op.execute(statement.format(id=number))
