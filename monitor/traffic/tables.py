"""The log's tables, as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

metadata = MetaData()
_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only an INTEGER key by itself


def _of_record() -> ForeignKey:
    return ForeignKey("records.id", ondelete="CASCADE")


records = Table(
    "records",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("choice", Integer, nullable=False),
    Column("created", Double, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("key", Text, nullable=False, server_default=""),
    Column("waiting", Integer, nullable=False, server_default="0"),
    Column("digest", Text),
    Column("q", Double),
    Column("feature", Text),
    Index("records_request", "request_id"),
    Index("records_created", "created"),
    Index("records_key", "key", "created"),
    Index("records_waiting", "id", sqlite_where=text("waiting = 1"), postgresql_where=text("waiting = 1")),
)
"""body: the Record as JSON; waiting: 1 until somebody has labelled what was not allowed; digest: of the prompt, keyed;
q: probability with which its features were kept, feature: where they are"""

readings = Table(
    "readings",
    metadata,
    Column("record", _ID, _of_record(), primary_key=True),
    Column("probe", Text, primary_key=True),
    Column("phase", Text, primary_key=True),
    Column("rank", Double, nullable=False),
    Column("decides", Integer, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("labelled", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("created", Double, nullable=False),
    # What stands behind `record` is there to be looked through: without it each row of a rare key, and for `decides`
    # each row that is counted, would be fetched from the table.
    Index("readings_queue", "probe", "phase", "verdict", "labelled", "rank", "record", "key", "created"),
    Index(
        "readings_decide",
        "verdict",
        "labelled",
        "rank",
        "record",
        "key",
        "created",
        "decides",
        sqlite_where=text("decides = 1"),
        postgresql_where=text("decides = 1"),
    ),
    sqlite_with_rowid=False,  # rows lie by record: what one record adds goes to one page
)
"""What the queue is ordered by, one row a probe and phase. rank: the value, or beyond every value where there is none;
decides: 1 for one of a record's; verdict, key, created: the record's"""

labels = Table(
    "labels",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("record", _ID, _of_record(), nullable=False),
    Column("label", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("created", Double, nullable=False),
    Index("labels_record", "record"),
)

said = Table(
    "said",
    metadata,
    Column("record", _ID, _of_record(), primary_key=True, autoincrement=False),
    Column("sealed", LargeBinary, nullable=False),
)
"""Texts, redacted and encrypted; empty unless `log_text`"""

meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
"""salt: of the digests; key: tells whether a key is the one that the texts were sealed with"""
