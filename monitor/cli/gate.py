"""`midstream gate`: may this probe go into service? A verdict with exit code 0, 10, 11 or 12, for CI."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from monitor.cli.options import Config, Json, Model, StoreFolder
from monitor.config import load_settings

if TYPE_CHECKING:
    from training.frozen import Report

_COLOUR = {"PASS": "green", "INCONCLUSIVE": "yellow", "THRESHOLD STALE": "magenta", "DEGRADED": "red"}


def gate(
    candidate: Annotated[str, typer.Argument(help="NAME[@VERSION] in the store; without a version the newest.")],
    data: Annotated[list[str], typer.Option(help="Frozen rows: JSONL, CSV, Parquet or hf://...; repeat it.")],
    against: Annotated[str | None, typer.Option(help="NAME[@VERSION] to compare with. Default: the live one.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Folder of the candidate's training files: for the text floor, and for overlap.")
    ] = None,
    target_fpr: Annotated[
        float | None, typer.Option(min=1e-6, max=0.5, help="Of prompts. Default: half of the settings' target_fpr.")
    ] = None,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the candidate's.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a probe with the live one and with the text floor, on frozen rows that it has not seen.

    Exit codes: 0 PASS, 10 THRESHOLD STALE, 11 DEGRADED, 12 INCONCLUSIVE, 2 if there is nothing to compare.
    """
    from training.frozen import run_gate  # torch and scikit-learn, which no other command waits for

    settings = load_settings(config, model=model, store=store, dtype=dtype)
    target = settings.target_fpr / 2 if target_fpr is None else target_fpr
    report = run_gate(settings, candidate, against, data, rows, target)
    if as_json:
        print(json.dumps(as_dict(report), allow_nan=False))
    else:
        _show(Console(), report)
    raise typer.Exit(report.decision.exit_code)


def as_dict(report: Report) -> dict[str, Any]:
    decision = report.decision
    found = {name: getattr(report, name) for name in report.__slots__ if name not in ("decision", "data")}
    return {
        "verdict": decision.verdict,
        "exit_code": decision.exit_code,
        **found,
        "data": [file.model_dump() for file in report.data],
        "checks": [asdict(check) for check in decision.checks],
    }


def _show(console: Console, report: Report) -> None:
    against = "nothing: it is live" if report.against is None else report.against
    console.print(
        f"{report.candidate} against {against} · {report.model}\n"
        f"threshold {report.threshold:.3f}, certified for {report.target_fpr:.3%} · canaries off by "
        f"{report.canaries:.2g}, a second run by {report.noise:.2g} logits",
        highlight=False,
    )
    sets = _table("set", "rows", "recall", "false positives", "AUROC")
    for name, found in report.sets.items():
        rows = f"{found['harmful']} / {found['harmless']}"
        sets.add_row(name, rows, _share(found, "recall"), _share(found, "fpr"), _share(found, "auroc", 1, ".3f"))
    console.print(sets)
    checks = _table("check", "value, 95 % interval", "wanted", "verdict")
    for check in report.decision.checks:
        figure = None if check.figure is None else asdict(check.figure)
        rate = check.name == "false-positive rate"
        shown = _figure(figure, 100 if rate else 1, ".2f" if rate else "+.3f")
        checks.add_row(check.name, shown, check.wanted, f"[{_COLOUR[check.verdict]}]{check.verdict}[/]")
    console.print(checks)
    for check in report.decision.checks:
        if check.note:
            console.print(f"{check.name}: {check.note}", highlight=False, markup=False, soft_wrap=True)
    verdict = report.decision.verdict
    console.print(f"[bold {_COLOUR[verdict]}]{verdict}[/]")


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column)
    return table


def _share(found: dict[str, Any], name: str, scale: float = 100, form: str = ".1f") -> str:
    return _figure(found.get(name), scale, form)


def _figure(figure: dict[str, Any] | None, scale: float, form: str) -> str:
    if figure is None:
        return "-"
    value, low, high = (format(scale * figure[key], form) for key in ("value", "low", "high"))
    return f"{value}{' %' if scale == 100 else ''} \\[{low}, {high}]"
