"""Keys of the data routes: known by name, kept as SHA-256, compared in constant time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from monitor.errors import ConfigInvalid
from monitor.plain_yaml import read_yaml

PREFIX = "ms-"
MAX_KEYS = 1000
"""Each request is compared with every key: 1000 of them take about half a millisecond."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HEADER = "# Keys of midstream's data routes; `midstream key create|list|revoke`. Holds digests, no key.\n"


class Keys:
    """Who may ask. Thread-safe: a reload replaces the whole table at once."""

    def __init__(self, default: str | None = None, file: Path | None = None) -> None:
        """default: the one key of the settings, named "default"; file: as `midstream key create` writes it

        raises: ConfigInvalid, naming what is wrong in the file
        """
        self._default = {} if default is None else {"default": _digest(default.encode())}
        self._file = file
        self.required = default is not None or file is not None
        """False: everybody may ask. A file without keys lets nobody in."""
        self._digests: Mapping[str, str] = {}
        self.reload()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._digests)

    def find(self, given: bytes) -> str | None:
        """The name of a key; None if it is not one."""
        digest, found = _digest(given), None
        # Every key, whatever was found: the time says nothing of which one, or how much of it, was right.
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def reload(self) -> int:
        """Read the file again; returns how many keys count now. raises: ConfigInvalid, and the old keys stay"""
        read = {} if self._file is None else read_keys(self._file)
        if both := self._default.keys() & read.keys():
            raise ConfigInvalid(f"key {min(both)!r} is in {str(self._file)!r} and is what api_key is called; rename it")
        self._digests = self._default | read
        return len(self._digests)


def _digest(key: bytes) -> str:
    # A slow hash protects words that people choose. Ours are 256 random bits: nobody finds one by trying, however fast
    # the hash is, and a request should not pay 100 ms for it.
    return hashlib.sha256(key).hexdigest()


def read_keys(file: Path) -> dict[str, str]:
    """Name -> SHA-256 (hex). Says on stderr if others may read the file. raises: ConfigInvalid"""
    try:
        mode = file.stat().st_mode
        data = read_yaml(file.read_bytes())
    except FileNotFoundError as error:
        remedy = f"make one: midstream key create NAME --keys {file}"
        raise ConfigInvalid(f"keys file {str(file)!r} does not exist; {remedy}") from error
    except OSError as error:
        raise ConfigInvalid(f"keys file {str(file)!r} can't be read: {error}") from error
    except ValueError as error:
        raise ConfigInvalid(f"keys file {str(file)!r} is not YAML: {error}") from error
    if mode & 0o077:
        print(f"midstream: keys file {str(file)!r} is open to other users; chmod 600 it", file=sys.stderr)
    return _checked(file, data)


def _checked(file: Path, data: Any) -> dict[str, str]:
    entries = [] if data is None else data
    where = f"keys file {str(file)!r}"
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise ConfigInvalid(f"{where} must be a list of at most {MAX_KEYS} entries, each a name and a sha256")
    found: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or set(entry) != {"name", "sha256"}:
            raise ConfigInvalid(f"{where}, entry {number}: it must have a name, a sha256 and nothing else")
        name, digest = check_name(entry["name"]), entry["sha256"]
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
            # Not shown: somebody may have put the key itself there.
            raise ConfigInvalid(f"{where}, key {name!r}: sha256 must be 64 hex digits in quotes, in lower case")
        if name in found:
            raise ConfigInvalid(f"{where}: the name {name!r} is there twice; revoke one of them")
        found[name] = digest
    return found


def check_name(name: object) -> str:
    """raises: ConfigInvalid"""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        wanted = "1 to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first"
        raise ConfigInvalid(f"key name {str(name)[:80]!r} is not a name; use {wanted}")
    return name


def create_key(file: Path, name: str) -> str:
    """A new key. Only its digest is kept: it can't be shown again. raises: ConfigInvalid"""
    check_name(name)
    with _alone(file):
        known = read_keys(file) if file.exists() else {}
        if name in known or name == "default":
            raise ConfigInvalid(f"there is a key {name!r} already; choose another name, or revoke that one first")
        if len(known) >= MAX_KEYS:
            raise ConfigInvalid(f"keys file {str(file)!r} is full with {MAX_KEYS} keys; revoke one first")
        key = PREFIX + secrets.token_urlsafe(32)
        _write(file, known | {name: _digest(key.encode())})
    return key


def revoke_key(file: Path, name: str) -> None:
    """raises: ConfigInvalid if there is none of that name"""
    with _alone(file):
        known = read_keys(file)
        if name not in known:
            raise ConfigInvalid(f"there is no key {name!r} in {str(file)!r}; it has {', '.join(known) or 'none'}")
        _write(file, {n: d for n, d in known.items() if n != name})


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Two commands at once must not lose each other's key: they take turns on the folder."""
    try:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigInvalid(f"folder {str(file.parent)!r} of the keys file: {error.strerror}; make it first") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(file: Path, digests: Mapping[str, str]) -> None:
    """A whole new file in place of the old one: a server that reads meanwhile sees one or the other."""
    text = _HEADER + yaml.safe_dump([{"name": n, "sha256": d} for n, d in digests.items()], sort_keys=False)
    try:
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".keys-", delete=False) as new:  # mode 0600
            try:
                _as_before(file, new.fileno())
                new.write(text)
                new.flush()
                os.fsync(new.fileno())
                os.replace(new.name, file)
            except (OSError, ConfigInvalid):
                os.unlink(new.name)
                raise
    except OSError as error:
        raise ConfigInvalid(f"keys file {str(file)!r} can't be written: {error.strerror}") from error


def _as_before(file: Path, new: int) -> None:
    """Owner and mode of the old file: root who revokes a key must not take the file from the server. raises:
    ConfigInvalid"""
    if not file.exists():
        return
    old = file.stat()
    try:
        os.fchown(new, old.st_uid, old.st_gid)
        os.fchmod(new, stat.S_IMODE(old.st_mode))
    except OSError as error:
        why = f"can't be replaced by one of the same owner, group and mode: {error.strerror}"
        raise ConfigInvalid(f"keys file {str(file)!r} {why}; do it as root or as its owner") from error
