"""`midstream evaluate`: what a probe is worth, on every set that it has not seen, as a page and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from monitor.cli.options import Config, Model, StoreFolder
from monitor.config import load_settings

_COLOUR = {True: "[green]met[/]", False: "[red]missed[/]", None: "-"}


def evaluate(
    data: Annotated[Path, typer.Option(help="Folder of the evaluation sets and of the probe's training files.")],
    probe: Annotated[str | None, typer.Argument(help="NAME[@VERSION]; without a version the live one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and evasion.json.")] = Path("report"),
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A set of your own: JSONL, CSV, Parquet or hf://...; repeat it.")
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="The certified rate whose threshold is reported on.")
    ] = 0.01,
    requests_per_day: Annotated[float, typer.Option(min=0, help="For the expected false alarms.")] = 100_000,
    rows: Annotated[int, typer.Option(min=20, help="Most rows of a set; more are drawn from by chance.")] = 750,
    attacks: Annotated[bool, typer.Option(help="Attacks and long texts too; they take half of the time.")] = True,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report on a probe: every set at one global threshold, with intervals, floors, attacks and long texts.

    Sets that are for evaluation only are never fitted, chosen or calibrated on; beside this command they are read by
    `train` for its card, by `gate` and `experiment`, and by `lint` to find overlap. A quarter of an hour on two cores.
    """
    from training.report.run import Options  # torch and scikit-learn, which no other command waits for
    from training.report.run import evaluate as run

    options = Options(target_fpr, requests_per_day, tuple(sets or ()), rows, attacks)
    report = run(load_settings(config, model=model, store=store), probe, data, out, options)
    if as_json:
        print(json.dumps(report, allow_nan=False))
        return
    _show(Console(), report)
    print(f"wrote report.html, report.json{' and evasion.json' if report['attacks'] else ''} to {out}")


def _show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title=f"{report['probe']['name']} {report['probe']['version']}")
    for column in ("set", "harmful / harmless", "AUROC", "recall", "flagged", "words"):
        table.add_column(column)
    for name, e in [*report.get("sets", {}).items(), *report["answers"].items()]:
        words = e.get("floors", {}).get("words")
        table.add_row(
            name,
            f"{e['harmful']} / {e['harmless']}",
            _figure(e.get("auroc"), 1, ".3f"),
            _figure(e.get("recall")),
            _figure(e.get("fpr")),
            "-" if words is None else f"{words['value']:.3f}",
        )
    console.print(table)
    for bar in report["bars"]:
        value = "-" if bar["value"] is None else f"{bar['value']:.3f}"
        console.print(f"{_COLOUR[bar['met']]} {bar['what']}: {value}, wanted {bar['wanted']}", highlight=False)
    for note in report["notes"]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _figure(figure: dict[str, Any] | None, scale: float = 100, form: str = ".1f") -> str:
    if figure is None:
        return "-"
    value, low, high = (format(scale * figure[key], form) for key in ("value", "low", "high"))
    return f"{value}{' %' if scale == 100 else ''} \\[{low}, {high}]"
