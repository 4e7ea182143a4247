"""`midstream train`: labelled texts -> a probe in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monitor.cli.options import Config, Model
from monitor.config import load_settings


def train(
    model: Model = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="JSONL, CSV, Parquet or hf://OWNER/NAME@COMMIT/FILE; repeat it. Default: our pairs."),
    ] = None,
    name: Annotated[str, typer.Option(help="The probe's name.")] = "harmful-intent",
    layer: Annotated[int | None, typer.Option(help="Block to read; default: the middle one.")] = None,
    epochs: Annotated[int, typer.Option(help="Of the torch probe.")] = 200,
    answers: Annotated[int, typer.Option(help="Benign answers to generate for the response calibration.")] = 0,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML recipe instead of --data: the shipped probe's form.")
    ] = None,
    config: Config = None,
    store: Annotated[Path | None, typer.Option(help="Folder to publish into.")] = None,
) -> None:
    """Train a probe on labelled texts, calibrate it, and publish it to the store. A new name starts in shadow; of a
    name that is there already it is a new version, and the one that is live stays live.

    With --recipe, --data names the folder of its files, and --layer, --epochs and --answers are the recipe's.
    """
    from training.run import train as run

    settings = load_settings(config, model=model, store=store)
    run(settings, name=name, files=data or [], layer=layer, epochs=epochs, answers=answers, recipe=recipe)
