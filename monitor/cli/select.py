"""`midstream select`: which blocks, family and strength a recipe should name, by data sets left out of the fit."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from monitor.cli.harvest import blocks as read_blocks
from monitor.cli.options import Config, Json, Model
from monitor.config import load_settings

if TYPE_CHECKING:
    from training.select import Selection

_SHOWN = 12


class Solver(StrEnum):
    logistic = "logistic"
    ridge = "ridge"
    lda = "lda"
    difference_of_means = "difference_of_means"


def select(
    recipe: Annotated[Path, typer.Option(help="YAML recipe: its sources, their weights and shares.")],
    data: Annotated[Path, typer.Option(help="Folder of the recipe's files.")] = Path(),
    blocks: Annotated[
        str, typer.Option(help="Each alone: `middle`, `all`, or numbers and ranges like 5,10-15.")
    ] = "all",
    beside: Annotated[list[str] | None, typer.Option(help="Several side by side, like 13-17; repeat it.")] = None,
    solver: Annotated[list[Solver] | None, typer.Option(help="Repeat it. Default: logistic and ridge.")] = None,
    c: Annotated[
        list[float] | None, typer.Option(min=1e-9, help="Of logistic; repeat it. Default: 0.003, 0.03.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for everything that was tried, as JSON.")] = None,
    model: Model = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Rank blocks, families and strengths by data sets that the fit has not seen: recall at 1 % FPR first.

    Reads only the rows that the recipe fits on; no set for evaluation. Ridge brings its whole path of penalties.
    """
    from training.select_run import run  # torch and scikit-learn, which no other command waits for

    settings = load_settings(config, model=model)
    solvers = [s.value for s in solver or (Solver.logistic, Solver.ridge)]
    found = run(
        settings,
        recipe,
        data,
        lambda n: [(b,) for b in read_blocks(blocks, n)] + [tuple(read_blocks(text, n)) for text in beside or ()],
        solvers,
        c or [0.003, 0.03],
    )
    report = as_dict(found)
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        print(json.dumps(report))
    else:
        _show(Console(), found)


def as_dict(found: Selection) -> dict[str, Any]:
    tried = [
        {
            "recipe": candidate.recipe(),
            **{name: getattr(r, name) for name in ("recall", "worst", "auroc", "log_auroc", "threshold")},
            "recalls": r.recalls,
            "rates": r.rates,
        }
        for candidate, r in found.found
    ]
    return {
        "rows": found.rows,
        "left_out": list(found.data_sets),
        "never_left_out": list(found.skipped),
        "auroc": found.auroc,
        "tried": tried,
    }


def _show(console: Console, found: Selection) -> None:
    table = Table(title=f"{found.rows} rows, {len(found.data_sets)} data sets left out in turn")
    for column in ("blocks", "solver", "strength", "recall at 1 %", "lowest", "AUROC", "log-AUROC"):
        table.add_column(column)
    for candidate, r in found.found[:_SHOWN]:
        table.add_row(
            ", ".join(map(str, candidate.blocks)),
            candidate.solver,
            "-" if candidate.strength is None else f"{candidate.strength:.3g}",
            f"{r.recall:.1%}",
            f"{r.recalls[r.worst]:.1%} {r.worst}",
            f"{r.auroc:.3f}",
            "-" if r.log_auroc is None else f"{r.log_auroc:.3f}",
        )
    console.print(table)
    if len(found.found) > _SHOWN:
        console.print(f"and {len(found.found) - _SHOWN} more: --json or --out has them")
    first, figures = found.found[0]
    low, high = found.auroc["low"], found.auroc["high"]
    console.print(f"the first: left-out AUROC {found.auroc['value']:.3f} \\[{low:.3f}, {high:.3f}]", highlight=False)
    worst = sorted(figures.rates.items(), key=lambda item: -item[1])[:3]
    console.print("harmless sets flagged most: " + ", ".join(f"{k} {v:.1%}" for k, v in worst), highlight=False)
    for name in found.skipped:
        console.print(f"{name} was never left out: without it a label would be missing", highlight=False)
    console.print("put into the recipe: " + json.dumps(first.recipe())[1:-1].replace('"', ""), highlight=False)
