"""`midstream probe promote`, `rollback` and `shadow`: which versions are served; each an audit row."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monitor.audit import Audit
from monitor.cli.options import Config, Json, Model, StoreFolder
from monitor.config import load_settings
from monitor.errors import ConfigInvalid, MidstreamError

if TYPE_CHECKING:
    from probes_store.store import Store


def shelf_of(model: str | None, config: Path | None, store: Path | None) -> tuple[Store, str]:
    from probes_store.store import Store, model_slug

    settings = load_settings(config, model=model, store=store)
    return Store(settings.store), model_slug(settings.model)


def promote(
    name: Annotated[str, typer.Argument(help="The probe.")],
    version: Annotated[str, typer.Argument(help="Like v2.")],
    other_model: Annotated[
        bool, typer.Option("--other-model", help="The model was changed: don't compare with the live version's.")
    ] = False,
    fewer_phases: Annotated[
        bool, typer.Option("--fewer-phases", help="It may only shadow what it is not calibrated for.")
    ] = False,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Make a version live, in running servers too, once it verifies there. The one before is kept for rollback."""
    from probes_store import promote as promoting

    shelf, slug = shelf_of(model, config, store)
    with _audited(config, f"promote {name} {version}"):
        _chosen(promoting.promote(shelf, slug, name, version, other_model, fewer=fewer_phases), as_json)


def shadow(
    name: Annotated[str, typer.Argument(help="The probe.")],
    version: Annotated[str | None, typer.Argument(help="Like v2.")] = None,
    none: Annotated[bool, typer.Option("--none", help="Serve no candidate of this probe.")] = False,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Serve a version in shadow beside the live one: it is read and counted as NAME@VERSION, and does nothing."""
    from probes_store import promote as promoting

    if (version is None) != none:
        raise ConfigInvalid("name a version to try, or say --none")
    shelf, slug = shelf_of(model, config, store)
    with _audited(config, f"shadow {name} {version or 'none'}"):
        choice = promoting.shadow(shelf, slug, name, version)
    if as_json:
        print(json.dumps(asdict(choice)))
    else:
        stopped = f"; {choice.stopped} is stopped" if choice.stopped else ""
        print(f"{name}: {f'{version} in shadow beside {choice.live}' if version else 'no candidate'}{stopped}")


def rollback(
    name: Annotated[str, typer.Argument(help="The probe.")],
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Go back to the version that was live before the last promotion."""
    from probes_store import promote as promoting

    shelf, slug = shelf_of(model, config, store)
    with _audited(config, f"rollback {name}"):
        _chosen(promoting.rollback(shelf, slug, name), as_json)


@contextmanager
def _audited(config: Path | None, what: str) -> Iterator[None]:
    """One row, written before it is done. raises: ConfigInvalid, AuditFailed, and nothing is done"""
    audit = Audit(load_settings(config).audit)
    try:
        row = audit.write("cli", getpass.getuser(), "STORE", what)
        try:
            yield
        except MidstreamError as error:
            audit.ended(row, f"refused: {error}")
            raise
        audit.ended(row, "done")
    finally:
        audit.close()


def _chosen(choice: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(choice)))
        return
    back = f"; {choice.previous} is kept: midstream probe rollback {choice.probe}" if choice.previous else ""
    print(f"{choice.probe} {choice.live} is live; running servers take it once it verifies there{back}")
