"""`midstream key`: makes, lists and revokes the keys of the data routes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from monitor.cli.options import Config, Json
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.keys import create_key, read_keys, revoke_key

app = typer.Typer(no_args_is_help=True, help="Keys of the data routes. A running server reads them again on SIGHUP.")
File = Annotated[Path | None, typer.Option("--keys", help="YAML file of names and digests. Default: the setting keys.")]


def _file(given: Path | None, config: Path | None) -> Path:
    file = given or load_settings(config).keys
    if file is None:
        raise ConfigInvalid("there is no keys file; give --keys FILE, or set MIDSTREAM_KEYS or `keys` in the settings")
    return file


@app.command()
def create(name: str, keys: File = None, config: Config = None) -> None:
    """Make a key and print it, this once: only its SHA-256 is kept."""
    file = _file(keys, config)
    key = create_key(file, name)
    print(f"midstream: key {name!r} is in {file}; it can't be shown again", file=sys.stderr)
    print(key)


@app.command("list")
def list_names(
    keys: File = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """The names of the keys."""
    names = list(read_keys(_file(keys, config)))
    print(json.dumps(names) if as_json else "\n".join(names))


@app.command()
def revoke(name: str, keys: File = None, config: Config = None) -> None:
    """Take a key out of the file."""
    revoke_key(_file(keys, config), name)
    print(f"midstream: key {name!r} is revoked; a running server knows it until it reloads its keys", file=sys.stderr)
