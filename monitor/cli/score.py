"""`midstream score`: one message as a prompt, each token's score."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.cli.options import Config, Json, Model, StoreFolder
from monitor.config import load_settings
from monitor.terminal import plain


def score(
    text: Annotated[str, typer.Argument(help="A user's message.")],
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    tokens: Annotated[bool, typer.Option(help="Each token's score, coloured.")] = False,
    as_json: Json = False,
) -> None:
    """Score one message as a prompt, without generating."""
    from monitor.scoring import score_text

    scored = score_text(load_settings(config, model=model, store=store), text)
    if as_json:
        print(json.dumps(scored.as_dict()))
        return
    console = Console()
    table = Table()
    for column in ("probe", "version", "value", "probability", "threshold", "verdict"):
        table.add_column(column)
    for row in scored.rows:
        threshold = "-" if row.threshold is None else f"{row.threshold:.3f}"
        table.add_row(row.probe, row.version, f"{row.value:.3f}", f"{row.probability:.3f}", threshold, row.verdict)
    console.print(table)
    if tokens:
        for row in scored.rows:
            console.print(Text.assemble(f"{row.probe}: ", *_coloured(scored.tokens, row.token_scores)))


def _coloured(tokens: list[str], scores: list[float | None]) -> list[tuple[str, str]]:
    """Green below 0, red above, stronger with distance; grey where a position does not count."""
    parts = []
    for token, value in zip(tokens, scores, strict=True):
        shown = plain(token.replace("\n", "⏎"))
        if value is None:
            parts.append((shown, "dim"))
        else:
            level = min(255, 60 + int(abs(value) * 40))
            colour = f"rgb({level},30,30)" if value > 0 else f"rgb(20,{level // 2},40)"
            parts.append((f"{shown}[{value:+.1f}] ", f"white on {colour}"))
    return parts
