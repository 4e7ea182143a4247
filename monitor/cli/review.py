"""`midstream review`: what nobody has labelled yet, and a label for one request."""

from __future__ import annotations

import getpass
import json
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console

from monitor.cli.options import Config, Json
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.terminal import plain
from monitor.traffic import Label, Where, add_label, count_unlabelled, unlabelled
from monitor.traffic.labelling import decided, listed, only_choice, request_key, signed


def review(
    request_id: Annotated[str | None, typer.Argument(help="Which one to label; without it, what waits.")] = None,
    choice: Annotated[int | None, typer.Option(help="Which choice, where the request has several.")] = None,
    label: Annotated[Label | None, typer.Option(help="What it was.")] = None,
    by: Annotated[str | None, typer.Option(help="Who says so. Default: who is logged in.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many to list.")] = 20,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List the newest flags and blocks that nobody has labelled, or label one of them. Neither shows any text."""
    records = load_settings(config).log
    if request_id is None:
        if not (choice is None and label is None and by is None):
            raise ConfigInvalid("whose label? Name the request: midstream review REQUEST_ID --label LABEL")
        _list(records, limit, as_json)
        return
    if label is None:
        raise ConfigInvalid(
            f"--label is missing; give one of {', '.join(Label)} (midstream show {request_id} says why)"
        )
    name = signed(getpass.getuser() if by is None else by, "--by")
    _label(records, request_key(request_id), choice, label, name, as_json)


def _list(records: Where, limit: int, as_json: bool) -> None:
    found = [listed(body, decided(body)) for body in unlabelled(records, limit)]
    waiting = count_unlabelled(records)
    if as_json:
        print(json.dumps({"unlabelled": waiting, "newest": found}))
        return
    console = Console()
    for e in found:
        # Two lines for each: an id that can be copied and all the rest don't fit side by side into 80 columns.
        when = datetime.fromtimestamp(e["time"]).isoformat(" ", "seconds")
        _say(console, f"{e['request_id']}  choice {e['choice']}  {e['verdict']}")
        _say(console, f"    {_why(e)} · {e['route']} · {when}")
    _say(console, f"{len(found)} of {waiting} unlabelled" if waiting else "nothing waits for a label")


def _why(entry: dict[str, Any]) -> str:
    value, threshold = ("-" if entry[n] is None else f"{entry[n]:.3f}" for n in ("value", "threshold"))
    return f"{entry['probe'] or '-'} {entry['phase'] or '-'}: {value}, threshold {threshold}"


def _label(records: Where, key: str, choice: int | None, label: Label, by: str, as_json: bool) -> None:
    if choice is None:
        choice = only_choice(records, key, "--choice")
    before = add_label(records, key, choice, label, by)
    if as_json:
        said = {"request_id": key, "choice": choice, "label": label, "by": by, "before": before}
        print(json.dumps(said))
        return
    _say(Console(), f"{key}  choice {choice}: {label}, by {by}" + (f" (it was {before})" if before else ""))


def _say(console: Console, line: str) -> None:
    console.print(plain(line), highlight=False, markup=False, emoji=False, soft_wrap=True)
