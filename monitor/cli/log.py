"""`midstream log`: what is in the traffic log, the kept texts of a request, and erasing."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from typing import Annotated

import typer
from rich.console import Console

from monitor.audit import Audit
from monitor.cli.options import Config, Json
from monitor.config import Settings, load_settings
from monitor.errors import ConfigInvalid
from monitor.traffic import Cipher, counts, erase, erase_each, erase_texts, erased_from, find_said
from monitor.traffic.features import erase_features
from monitor.traffic.labelling import request_key

app = typer.Typer(no_args_is_help=True, help="The traffic log: counts, kept texts, and erasing.")


@app.command("status")
def status(config: Config = None, as_json: Json = False) -> None:
    """How many records there are by verdict, and how many of them are labelled."""
    found = counts(load_settings(config).log)
    if as_json:
        print(json.dumps({verdict: {"records": n, "labelled": done} for verdict, (n, done) in found.items()}))
        return
    for verdict, (n, done) in sorted(found.items()):
        _say(f"{verdict}: {n} records, {done} labelled")


@app.command("text")
def text(request_id: str, config: Config = None) -> None:
    """What was said in one request, as JSON by choice: redacted, and only if the server runs with log_text."""
    settings, key = load_settings(config), request_key(request_id)
    found = find_said(settings.log, key, Cipher(settings.log_key))
    if not found:
        raise ConfigInvalid(
            f"no text of request {request_id!r} is kept; set log_text, or it is older than the log keeps"
        )
    print(json.dumps(found))


@app.command("erase")
def erase_some(
    key: Annotated[str | None, typer.Option(help="Everything of this API key, by its name; '' for no key.")] = None,
    request_id: Annotated[str | None, typer.Option("--id", help="Everything of this request.")] = None,
    texts: Annotated[bool, typer.Option("--texts", help="Every kept text; records and labels stay.")] = False,
    config: Config = None,
) -> None:
    """Erase records with their readings, labels, texts and features: the bytes in the files too. There is no way back.

    With a running server use `POST /admin/erase`, which comes after what is queued there: records that it has not
    written yet come in after this command.
    """
    if [key is not None, request_id is not None, texts].count(True) != 1:
        raise ConfigInvalid("erase what? Give one of --key NAME, --id REQUEST_ID or --texts")
    settings = load_settings(config)
    number = None if request_id is None else request_key(request_id)
    if texts:
        what, acts = "every text", {"texts": lambda: erased_from(settings.log, erase_texts)}
    else:
        what = f"key {key!r}" if key is not None else f"request {number!r}"
        of_records = functools.partial(erase, key=key, request_id=number)
        acts = {
            "records": lambda: erased_from(settings.log, of_records),
            "features": lambda: erase_features(settings.features, key, number),
        }
    gone = _noted(settings, what, acts)
    rows = gone.pop("features", 0)
    ((kind, n),) = gone.items()
    _say(f"erased {n} {kind}" + (f" and {rows} features" if rows else ""))


def _noted(settings: Settings, what: str, acts: Mapping[str, Callable[[], int]]) -> dict[str, int]:
    """Written down before anything is erased, or nothing is; and how it ended, however that was."""
    with contextlib.closing(Audit(settings.audit)) as audit:
        row = audit.write("command", "", "ERASE", what)
        try:
            gone = erase_each(acts)
        except ConfigInvalid as error:
            audit.ended(row, str(error))
            raise
        audit.ended(row, f"{sum(n for kind, n in gone.items() if kind != 'features')} erased")
        return gone


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
