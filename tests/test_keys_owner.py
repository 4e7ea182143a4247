"""Whose the file of the keys is: `sudo midstream key revoke` must not take it from the server, which would go on with
the old keys."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from monitor.keys import create_key, read_keys, revoke_key

from .web import ROOT

OTHER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a file of somebody else's")
REVOKE = f"""
import os, pathlib, sys
from monitor.errors import ConfigInvalid
from monitor.keys import revoke_key
file = pathlib.Path(sys.argv[1])
os.chown(file.parent, {OTHER}, {OTHER})
os.setuid({OTHER})
try:
    revoke_key(file, "a")
except ConfigInvalid as error:
    print(error)
"""


def owned(file):
    found = file.stat()
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


@pytest.mark.parametrize("owner", [None, pytest.param((OTHER, OTHER + 1), marks=as_root)])
def test_a_changed_file_keeps_its_owner_and_mode(tmp_path, owner):
    file = tmp_path / "keys.yaml"
    create_key(file, "a"), create_key(file, "b")
    file.chmod(0o640)
    if owner:
        os.chown(file, *owner)
    before = owned(file)
    revoke_key(file, "a")
    assert owned(file) == before
    create_key(file, "c")
    assert owned(file) == before and list(read_keys(file)) == ["b", "c"]
    assert [p.name for p in tmp_path.iterdir()] == ["keys.yaml"]


@as_root
def test_who_can_not_keep_the_owner_changes_nothing():
    """May write the folder, so could put a file of their own there."""
    with tempfile.TemporaryDirectory() as folder:  # others can't come as far as tmp_path
        file = Path(folder) / "keys.yaml"
        create_key(file, "a")
        file.chmod(0o644)
        before = owned(file)
        command = [sys.executable, "-c", REVOKE, str(file)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "same owner, group and mode: Operation not permitted; do it as root" in done.stdout, done.stderr
        assert owned(file) == before and list(read_keys(file)) == ["a"]
        assert [p.name for p in file.parent.iterdir()] == ["keys.yaml"]
