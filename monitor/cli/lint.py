"""`midstream lint`: what is wrong with labelled texts before a probe is trained on them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from monitor.cli.options import Json

if TYPE_CHECKING:
    from training.lint import Finding

EXIT_FOUND = 1
_SHOWN = 10


def lint(
    files: Annotated[list[str], typer.Argument(help="JSONL, CSV, Parquet or hf://OWNER/NAME@COMMIT/FILE.")],
    against: Annotated[list[str] | None, typer.Option(help="An evaluation file, for overlap alone; repeat it.")] = None,
    as_json: Json = False,
) -> None:
    """Find repeats, contradictions, overlap with evaluation files, and shortcuts that give the label away.

    Exit code 0 without errors (warnings may stand), 1 with one. Texts are named by row and never printed; tokens and
    openings that tell the classes apart are.
    """
    # Here: they bring torch and scikit-learn, seconds that `midstream --help` need not wait for.
    from training.lint import lint as run

    report = run(files, against or [])
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        _print(Console(soft_wrap=True, highlight=False), report.findings, report.figures)
    if report.failed:
        raise typer.Exit(EXIT_FOUND)


def _print(console: Console, findings: tuple[Finding, ...], figures: dict[str, float | int | None]) -> None:
    for f in findings:
        colour = "red" if f.level == "error" else "yellow"
        rows = ", ".join(map(str, f.rows[:_SHOWN])) + (
            f" and {len(f.rows) - _SHOWN} more" if len(f.rows) > _SHOWN else ""
        )
        where = f.file + (f", {len(f.rows)} rows: {rows}" if f.rows else "")
        console.print(f"[{colour}]{f.level}[/] [bold]{f.rule}[/] {escape(where)}")
        console.print(f"  {escape(f.message)}\n  -> {escape(f.remedy)}")
    console.print(", ".join(f"{name} {_figure(value)}" for name, value in figures.items()))
    errors = sum(f.level == "error" for f in findings)
    console.print(f"errors: {errors}, warnings: {len(findings) - errors}")


def _figure(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
