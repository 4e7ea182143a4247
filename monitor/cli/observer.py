"""`midstream observer`: build the small model that reads along with a hosted endpoint, and check it."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from monitor.cli.options import Config, Model, StoreFolder
from monitor.config import Settings, load_settings

app = typer.Typer(no_args_is_help=True, help="The model that reads along with an endpoint which can't be tapped.")
Int8 = Annotated[bool, typer.Option("--int8", help="int8 weights: faster, and scores differ a little.")]

Probes = Annotated[list[str] | None, typer.Option(help="NAME@VERSION to be promoted or shadowed, may repeat.")]


@app.command()
def build(
    model: Model = None, config: Config = None, store: StoreFolder = None, int8: Int8 = False, probe: Probes = None
) -> None:
    """Export the model up to the last block that a live probe reads, and check it against the probes' canaries.

    With --probe also what a running proxy needs to run that version in shadow, and to promote it.
    """
    from monitor.observer.load import make

    settings = load_settings(config, model=model, store=store)
    console = Console(stderr=True)
    with console.status(f"building the observer of {settings.model} …"):
        made = make(settings, int8, probe or ())
    size = sum(p.stat().st_size for p in made.folder.iterdir())
    print(f"{made.folder}: {made.shape.n_blocks} blocks, {size / 1e6:.0f} MB")
    _check(settings, int8)


@app.command()
def check(model: Model = None, config: Config = None, store: StoreFolder = None, int8: Int8 = False) -> None:
    """Load the built observer as the proxy does, score the canaries, and print what was found."""
    _check(load_settings(config, model=model, store=store), int8)


def _check(settings: Settings, int8: bool) -> None:
    from monitor.observer.load import load

    began = time.perf_counter()
    loaded = load(settings, int8)
    took, cards, shape = time.perf_counter() - began, [p.card for p in loaded.live.probes], loaded.built.shape
    table = Table(title="midstream observer", show_header=False)
    per_token = 2 * shape.n_blocks * shape.kv_heads * shape.head_dim * 4
    for row in (
        ("model", f"{loaded.observer.model.name}, blocks 0 to {shape.n_blocks - 1}, {'int8' if int8 else 'float32'}"),
        ("probes", ", ".join(f"{c.name} {c.version}" for c in cards)),
        ("canaries", f"{sum(len(c.canaries) for c in cards)} scored, largest difference {loaded.off:.2g}"),
        ("reads at most", f"{loaded.observer.max_tokens} tokens of one conversation"),
        ("memory", f"{per_token / 1e3:.1f} kB a token"),
        ("loaded in", f"{took:.1f} s"),
    ):
        table.add_row(*row)
    Console().print(table)
