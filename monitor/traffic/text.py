"""What was said: texts for the log, redacted and then encrypted with a key that the database never sees."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from monitor.errors import ConfigInvalid
from monitor.traffic.database import FAILURES, Where, opened
from monitor.traffic.redact import redacted
from monitor.traffic.tables import meta, records, said

SLICE = 4000
"""Requests that retraining reads as everyday traffic at most, where there are no features: 2,995 certify a rate of
0.1 %."""
_NONCE = 12
_CHECK = b"midstream"


@dataclass(frozen=True, slots=True)
class Said:
    """One request's texts. prompt: what the client sent, as JSON has it; answers: what went out, by choice"""

    request_id: str
    prompt: Any
    answers: Mapping[int, str]

    def of(self, choices: Iterable[int]) -> Said:
        """The same request, with an answer for each of these choices: empty where nothing went out."""
        return Said(self.request_id, self.prompt, {i: self.answers.get(i, "") for i in choices})

    @property
    def size(self) -> int:
        """Characters, roughly."""
        return len(str(self.prompt)) + sum(map(len, self.answers.values()))


class Cipher:
    """AES-256-GCM; every text is bound to its record's request and choice. key: 32 bytes in base64

    raises: ConfigInvalid, which never quotes the key
    """

    def __init__(self, key: str | None) -> None:
        remedy = "make one with: openssl rand -base64 32"
        if not key:
            raise ConfigInvalid(f"texts need MIDSTREAM_LOG_KEY, 32 bytes in base64; {remedy}")
        try:
            raw = base64.b64decode(key, validate=True)
        except (binascii.Error, ValueError):
            raise ConfigInvalid(f"log_key is not base64; {remedy}") from None
        if len(raw) != 32:
            raise ConfigInvalid(f"log_key has {len(raw)} bytes, it must have 32; {remedy}")
        self._aes = AESGCM(raw)

    def seal(self, plain: bytes, about: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE)
        return nonce + self._aes.encrypt(nonce, plain, about.encode())

    def open(self, sealed: bytes, about: str) -> bytes:
        """raises: ConfigInvalid if another key, or nobody, has sealed this about that"""
        try:
            return self._aes.decrypt(sealed[:_NONCE], sealed[_NONCE:], about.encode())
        except InvalidTag:
            raise ConfigInvalid(
                "log_key is not the key that the texts were sealed with; set the right MIDSTREAM_LOG_KEY, or give the "
                "texts up: midstream log erase --texts"
            ) from None

    def check(self, connection: Connection) -> None:
        """The first key that a log sees is its own from then on. raises: ConfigInvalid for another one"""
        known = connection.scalar(select(meta.c.value).where(meta.c.name == "key"))
        if known is None:
            connection.execute(insert(meta), {"name": "key", "value": self.seal(_CHECK, "key")})
        else:
            self.open(known, "key")


def write_said(connection: Connection, cipher: Cipher, texts: Sequence[Said]) -> int:
    """Of records that are there, each once; returns how many are lost, which costs no record of the transaction.

    raises: SQLAlchemyError where the whole transaction is lost
    """
    savepoint = connection.begin_nested()
    try:
        found = [_sealed(connection, cipher, one) for one in texts]
        rows = [row for some in found for row in some]
        if rows:
            # The newest insert of a record's text is not better than the first: say it twice, and nothing happens.
            ignoring = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            connection.execute(ignoring(said).on_conflict_do_nothing(), rows)
    except FAILURES:
        savepoint.rollback()
        return sum(len(one.answers) for one in texts)
    savepoint.commit()
    return sum(len(one.answers) for one in texts) - len(rows)


def _sealed(connection: Connection, cipher: Cipher, one: Said) -> list[dict[str, Any]]:
    """Rows of the choices that have a record."""
    try:
        prompt, rows = redacted(one.prompt), []
        for choice, answer in one.answers.items():
            query = select(records.c.id).where(records.c.request_id == one.request_id, records.c.choice == choice)
            number = connection.scalar(query)
            if number is not None:
                plain = json.dumps({"prompt": prompt, "answer": redacted(answer)}).encode()
                rows.append({"record": number, "sealed": cipher.seal(plain, _about(one.request_id, choice))})
    except (TypeError, ValueError, RecursionError):  # one that JSON can't hold costs itself, not the thread
        return []
    return rows


def find_said(where: Where, request_id: str, cipher: Cipher) -> dict[int, dict[str, Any]]:
    """The kept texts of one request by choice: {prompt, answer}. raises: ConfigInvalid; for a wrong key too"""
    with opened(where) as connection:
        return _said(connection, request_id, cipher)


def said_requests(where: Where) -> list[tuple[str, int]]:
    """Each request whose texts are kept, with the first choice of it. raises: ConfigInvalid if there is no such log"""
    query = select(records.c.request_id, func.min(records.c.choice)).join_from(
        records, said, said.c.record == records.c.id
    )
    with opened(where) as connection:
        return [(name, choice) for name, choice in connection.execute(query.group_by(records.c.request_id))]


def count_slice(where: Where) -> int:
    """How many requests' texts are kept, up to SLICE. raises: ConfigInvalid if there is no such log"""
    kept = select(records.c.request_id).join_from(records, said, said.c.record == records.c.id).distinct().limit(SLICE)
    with opened(where) as connection:
        return int(connection.scalar(select(func.count()).select_from(kept.subquery())) or 0)


def said_prompts(where: Where, ids: Iterable[tuple[str, int]], cipher: Cipher) -> Iterator[Any]:
    """What the client sent of each request and choice, None where it is not kept. raises: as `find_said`"""
    with opened(where) as connection:
        for request_id, choice in ids:
            yield _said(connection, request_id, cipher).get(choice, {}).get("prompt")


def _said(connection: Connection, request_id: str, cipher: Cipher) -> dict[int, dict[str, Any]]:
    query = (
        select(records.c.choice, said.c.sealed)
        .join_from(records, said, said.c.record == records.c.id)
        .where(records.c.request_id == request_id)
        .order_by(records.c.choice)
    )
    return {
        choice: json.loads(cipher.open(sealed, _about(request_id, choice)))
        for choice, sealed in connection.execute(query)
    }


def digest(salt: bytes, prompt: Any) -> str:
    """Tells whether two prompts are the same, to nobody who has not this log's salt. prompt: as JSON has it"""
    plain = json.dumps(prompt, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(plain, key=salt, digest_size=16).hexdigest()


def _about(request_id: str, choice: int) -> str:
    return f"{request_id}:{choice}"
