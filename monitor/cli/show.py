"""`midstream show`: why a request was flagged or blocked."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.cli.options import Config, Json
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.terminal import all_plain

_WIDE = 107
"""Columns of the table with blanks around its cells."""


def show(
    request_id: Annotated[str, typer.Argument(help="From x-midstream-request-id, or a completion's id.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Why a request was flagged or blocked: values, thresholds, versions, and the positions that decided."""
    from monitor.traffic import find_records

    key = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
    records = find_records(load_settings(config).log, key)
    if not records:
        raise ConfigInvalid(f"no record of request {request_id!r}; it may be older than the log keeps")
    if as_json:
        print(json.dumps(records))
        return
    for record in records:
        _show(Console(), all_plain(record))


def _show(console: Console, record: dict[str, Any]) -> None:
    coverage = record["coverage"]
    # A Text, here and below: in a str rich would look for markup, and the model's name is the client's.
    console.print(
        Text.assemble(
            (record["request_id"], "bold"),
            f" choice {record['index']} · {record['route']} · {record['model']} · ",
            f"policy {record['policy']}{', key ' + record['key'] if record['key'] else ''}\nverdict ",
            (record["verdict"], "bold"),
            f", finish {record['finish']}, {record['released_tokens']} of {coverage['response_tokens']} answer tokens "
            f"released\nscored {coverage['prompt_scored']} prompt + {coverage['response_scored']} answer tokens, "
            f"{coverage['final_unscored']} last token unscored, {coverage['unmonitored']} unmonitored",
            # A record of an earlier version doesn't say; what it had was the engine's.
            ", read by the observer" if record.get("scored_by") == "observer" else "",
        )
    )
    # In 80 columns there is no room for blanks; a name or a figure that is cut says nothing.
    table = Table(padding=(0, 1 if console.width >= _WIDE else 0))
    for column in (
        "probe",
        "version",
        "phase",
        "mode",
        "value",
        "threshold",
        "verdict",
        "crossed at",
        "highest token",
    ):
        table.add_column(column, overflow="fold", no_wrap=column in ("probe", "phase"))
    acted = {r["probe"] for r in record["readings"] if r["action"] != "allow" or r["would_block"]}
    for r in record["readings"]:
        if r["mode"] == "shadow" and r["threshold"] is None and r["action"] == "allow":
            continue  # it is not calibrated there: its value says nothing
        peak = "-" if r["peak_position"] is None else f"{r['peak_score']:.3f} at {r['peak_position']}"
        crossed = "-" if r["crossed_at"] is None else str(r["crossed_at"])
        verdict = r["action"] + (" (would act)" if r["would_block"] and r["action"] == "allow" else "")
        numbers = _number(r["value"]), _number(r["threshold"])
        cells = (r["probe"], r["version"], r["phase"], r["mode"], *numbers, verdict, crossed, peak)
        table.add_row(*map(Text, cells))
    console.print(table)
    for asked in record["escalations"]:
        said = f"{asked['value']:.3f} at position {asked['position']}; the second judge: {_number(asked['second'])}"
        console.print(Text(f"{asked['probe']}, {asked['phase']}, uncertain: {said}: {asked['result']}"))
    for name, scores in record["token_scores"].items():
        if name not in acted:
            continue
        spans = [*record["counted"], [coverage["prompt_tokens"], len(scores)]]
        positions = [p for start, end in spans for p in range(start, min(end, len(scores)))]
        ranked = sorted(((p, scores[p]) for p in positions), key=lambda item: -item[1])[:8]
        console.print(Text(f"{name}: highest positions " + ", ".join(f"{p}: {s:.2f}" for p, s in ranked)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
