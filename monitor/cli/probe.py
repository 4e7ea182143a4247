"""`midstream probe`: the store's probes: what there is, how two differ, which one is live, and to and from a hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from monitor.cli.live import promote, rollback, shadow, shelf_of
from monitor.cli.options import Config, Json, Model, StoreFolder
from monitor.config import load_settings
from monitor.errors import ConfigInvalid

if TYPE_CHECKING:
    from probes_store.store import Store, StoredProbe

# The store brings torch, seconds that `midstream --help` need not wait for: it is imported where it is used.
app = typer.Typer(no_args_is_help=True, help="The probes in the store. NAME is the live version, NAME@v2 another one.")
for _command in (promote, rollback, shadow):
    app.command()(_command)
Reference = Annotated[str, typer.Argument(help="NAME, or NAME@VERSION.")]


def _find(shelf: Store, model: str, reference: str) -> StoredProbe:
    name, _, version = reference.partition("@")
    if not version:
        if name not in shelf.probes(model):
            raise ConfigInvalid(f"there is no probe {name!r} for model {model!r}; see `midstream probe list`")
        version = shelf.live(model).get(name) or str(shelf.newest(model, name))
    return shelf.load(model, name, version)


@app.command("list")
def list_probes(model: Model = None, config: Config = None, store: StoreFolder = None, as_json: Json = False) -> None:
    """List the probes in the store for a model."""
    shelf, slug = shelf_of(model, config, store)
    live, names = shelf.live(slug), shelf.probes(slug)
    if not names:
        raise ConfigInvalid(f"there is no probe for model {slug!r}; train one: midstream train with the same --model")
    found = [
        (shelf.load(slug, name, version), live.get(name) == version)
        for name in names
        for version in shelf.versions(slug, name)
    ]
    if as_json:
        print(json.dumps([_listed(stored, is_live) for stored, is_live in found]))
        return
    table = Table()
    for column in ("probe", "version", "live", "layers", "created", "from"):
        table.add_column(column)
    for stored, is_live in found:
        card, origin = stored.card, "shipped" if stored.shipped else "yours"
        created = card.created[:16].replace("T", " ")  # whole, it would be cut in 80 columns
        table.add_row(card.name, card.version, "live" if is_live else "", card.blocks, created, origin)
    Console().print(table)


def _listed(stored: StoredProbe, is_live: bool) -> dict[str, Any]:
    card = stored.card
    return {
        "probe": card.name,
        "version": card.version,
        "live": is_live,
        "layers": list(card.layers),
        "created": card.created,
        "shipped": stored.shipped,
    }


@app.command()
def show(
    reference: Reference,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the model card that push uploads.")] = False,
) -> None:
    """Print a probe's card: model, layers, thresholds with certified rates, figures, data with hashes."""
    from probes_store.describe import certified, describe, figures
    from probes_store.model_card import identity, model_card

    shelf, slug = shelf_of(model, config, store)
    stored = _find(shelf, slug, reference)
    card = stored.card
    live = shelf.live(slug).get(card.name) == card.version
    if markdown:
        print(model_card(stored), end="")
        return
    if as_json:
        print(json.dumps(describe(stored, live)))
        return
    out = Console(soft_wrap=True, highlight=False)
    marks = ", ".join(
        ["live" if live else "not live", "shipped" if stored.shipped else "yours", card.kind, card.license]
    )
    out.print(f"[bold]{card.name} {card.version}[/] ({marks})\n{escape(card.description)}")
    out.print(_table("", ("what", "value"), identity(card)))
    thresholds = [
        (r.format, r.phase, f"{r.rate:.2%}", f"{r.threshold:.3f}", r.n, _observed(r.observed, r.low, r.high))
        for r in certified(card)
    ]
    columns = ("format", "phase", "certified rate", "threshold", "benign", "observed on others")
    out.print(_table("thresholds", columns, thresholds) if thresholds else "not calibrated: it can only shadow")
    out.print(_table("figures", ("figure", "value"), figures(card.metrics)))
    data = [(d.file, d.rows, d.positive, d.sha256) for d in card.data]
    out.print(_table("data", ("file", "rows", "positive", "sha256"), data))


def _observed(rate: float | None, low: float | None, high: float | None) -> str:
    return "-" if rate is None or low is None or high is None else f"{rate:.2%} [{low:.2%}, {high:.2%}]"


@app.command()
def diff(
    a: Reference,
    b: Reference,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Compare two versions: fields, data, figures, thresholds, and the angle between their weights."""
    from probes_store.describe import compare

    shelf, slug = shelf_of(model, config, store)
    found = compare(_find(shelf, slug, a), _find(shelf, slug, b))
    if as_json:
        print(json.dumps(found))
        return
    out = Console(soft_wrap=True, highlight=False)
    columns = (found["a"], found["b"])
    for part in ("fields", "data", "metrics"):
        rows = [(r["name"], _value(r["a"]), _value(r["b"])) for r in found[part]]
        out.print(_table(part, ("", *columns), rows) if rows else f"{part}: the same")
    thresholds = [
        (r["format"], r["phase"], f"{r['rate']:.2%}", _value(r["a"]), _value(r["b"]), _value(r["change"]))
        for r in found["thresholds"]
    ]
    out.print(_table("thresholds", ("format", "phase", "certified rate", *columns, "change"), thresholds))
    cosines = ", ".join(
        f"layer {k}: {_value(v)}" if k != "all" else f"all: {_value(v)}" for k, v in found["cosine"].items()
    )
    out.print(f"cosine of the weights, {cosines}\nbias {_value(found['bias']['a'])} -> {_value(found['bias']['b'])}")


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    table = Table(title=title or None, box=box.SIMPLE, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


@app.command()
def export(
    reference: Reference,
    onnx: Annotated[Path, typer.Option(help="The file to write.")],
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
) -> None:
    """Write a probe as an ONNX graph, checked against torch."""
    from probes_store.export import export as write

    shelf, slug = shelf_of(model, config, store)
    stored = _find(shelf, slug, reference)
    off = write(stored, onnx)
    print(f"{stored.card.name} {stored.card.version} -> {onnx}; onnxruntime and torch differ by {off:.1g} at most")


@app.command()
def push(
    reference: Reference,
    repository: Annotated[str, typer.Argument(help="OWNER/NAME; made, private, if it is missing.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it.")] = False,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
) -> None:
    """Upload a probe and its model card to a Hugging Face repository, in one commit."""
    from probes_store import hub

    shelf, slug = shelf_of(model, config, store)
    commit = hub.push(_find(shelf, slug, reference), repository, public)
    print(f"pushed; to have it elsewhere: midstream probe pull {repository}@{commit}")


@app.command()
def pull(
    address: Annotated[str, typer.Argument(help="OWNER/NAME@COMMIT.")],
    config: Config = None,
    store: StoreFolder = None,
) -> None:
    """Fetch a probe of a Hugging Face repository, verify it and put it in the store. What is live stays live."""
    from probes_store import hub
    from probes_store.store import Store

    repository, _, commit = address.partition("@")
    stored = hub.pull(Store(load_settings(config, store=store).store), repository, commit)
    name, version = stored.card.name, stored.card.version
    print(f"{name} {version} is in the store; to serve it: midstream probe promote {name} {version}")
