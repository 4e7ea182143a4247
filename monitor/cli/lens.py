"""`midstream lens` and `midstream experiment`: what the blocks would say, and the post's probes made again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.cli.options import Config, Json, Model, StoreFolder
from monitor.config import Settings, load_settings
from monitor.errors import ConfigInvalid

if TYPE_CHECKING:
    from monitor.engines.embedded.model import LoadedModel
    from monitor.live import LiveProbes
    from monitor.types import Prompt
    from training.lens import Lens


experiment = typer.Typer(no_args_is_help=True, help="Experiments that explain the method.")

_COLUMN = 12

HELP = (
    "What each block would say next, token by token, and what the probes read there: why was this flagged?\n\n"
    "The text is a user's message, as the server would score it; with --raw it is a text to go on with. One word in "
    "several languages shows at which block the next one comes up:\n\n"
    "midstream lens --raw --html flower.html "
    "'Italiano: fiore. Español: flor. Français: fleur. Deutsch: Blume. English:'"
)


def lens(
    text: Annotated[str, typer.Argument(help="A user's message; - reads it from stdin.")],
    model: Model = None,
    conversation: Annotated[
        bool,
        typer.Option(
            help="The text is JSON: a list of {role, content}; with an empty role it is a text to go on with."
        ),
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: a text to go on with.")] = False,
    last: Annotated[int, typer.Option(min=1, max=512, help="How many of the last tokens.")] = 24,
    html: Annotated[Path | None, typer.Option(help="Write a heat map as one page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a heat map as a picture (extra `report`).")] = None,
    probes: Annotated[bool, typer.Option(help="Read the probes too.")] = True,
    config: Config = None,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    if text == "-":
        text = sys.stdin.read()
    if not text.strip():
        raise ConfigInvalid("the text is empty; write something to look at")
    if conversation and raw:
        raise ConfigInvalid("--conversation and --raw exclude each other; leave one out")
    for path in (html, png):
        if path is not None and not path.parent.is_dir():
            raise ConfigInvalid(f"{path}: there is no folder {str(path.parent)!r}; create it")
    from monitor.engines.embedded.model import load_model
    from training.lens import logit_lens
    from training.lens_view import lens_page, lens_png, need_matplotlib

    if png is not None:
        need_matplotlib("--png")
    settings = load_settings(config, model=model, store=store)
    loaded = load_model(settings.model, cache=settings.cache, revision=settings.revision, dtype=settings.dtype)
    live = _live(loaded, settings) if probes else None
    messages = _messages(text) if conversation else [{"role": "user", "content": text}]
    if raw or not loaded.template.has_chat or any(not m["role"] for m in messages):
        prompt = loaded.template.raw("".join(m["content"] for m in messages))
    else:
        prompt = loaded.template.encode(messages)
    found = logit_lens(loaded, prompt, live.bank if live else None, last)
    verdicts = _verdicts(live, prompt, found) if live else []
    if html is not None:
        html.write_text(lens_page(found, loaded.name, text), encoding="utf-8")
    if png is not None:
        lens_png(found, png, f"logit lens, {loaded.name}")
    if as_json:
        print(json.dumps({"model": loaded.name, "verdicts": verdicts, **found.as_dict()}))
        return
    _print(Console(), found, verdicts)
    for path in (html, png):
        if path is not None:
            print(f"wrote {path}")


lens.__doc__ = HELP


def _messages(text: str) -> list[dict[str, str]]:
    try:
        messages = json.loads(text)
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigInvalid('--conversation wants JSON like [{"role": "user", "content": "Hi"}]') from error


def _live(model: LoadedModel, settings: Settings) -> LiveProbes | None:
    """The probes of this model, verified as for serving; None, said so, if it has none."""
    from monitor.live import load_live
    from probes_store.store import Store, model_slug

    shelf = Store(settings.store)
    if not shelf.live(model_slug(model.name)):
        print(f"midstream: no probe for {model.name}: the logit lens alone", file=sys.stderr)
        return None
    return load_live(model.served(), shelf, settings)


def _verdicts(live: LiveProbes, prompt: Prompt, lens: Lens) -> list[str]:
    """One line a probe: the served value of the prompt and what it is compared with."""
    from monitor.sequence import Watch
    from monitor.types import Phase

    watch = Watch(prompt, live.rules[prompt.format], live.default.second)
    watch.advance(0, lens.scores)
    lines = []
    for r in (r for r in watch.readings() if r.phase is Phase.PROMPT):
        value, threshold = ("-" if v is None else f"{v:.3f}" for v in (r.value, r.threshold))
        lines.append(f"{r.probe} {r.version}: value {value}, threshold {threshold}: {r.action}")
    return lines


def _print(console: Console, lens: Lens, verdicts: list[str]) -> None:
    from training.lens_view import visible

    fit = max(1, (console.width - 9) // (_COLUMN + 3))
    columns = range(len(lens.tokens))[-fit:]
    table = Table()
    table.add_column("block", justify="right")
    for column in columns:
        mark = "*" if lens.probes and lens.counts[column] else ""
        table.add_column(Text(_cut(visible(lens.tokens[column]), _COLUMN - 1) + mark), width=_COLUMN, no_wrap=True)
    for layer in reversed(range(lens.n_layers)):
        cells = []
        for column in columns:
            word, p = lens.top(layer, column)[0]
            shown = f"{_cut(visible(word), _COLUMN - 4):<{_COLUMN - 4}}{p:4.0%}"
            cells.append(Text(shown, style="bold" if p >= 0.5 else "" if p >= 0.1 else "dim"))
        table.add_row(str(layer), *cells)
    for index, probe in enumerate(lens.probes):
        table.add_section()
        scores = lens.scores[[lens.positions[c] for c in columns], index].tolist()
        cells = [Text(f"{v:+.2f}".rjust(_COLUMN), style="red" if v > 0 else "green") for v in scores]
        table.add_row(_cut(probe.name, 14), *cells)
    console.print(table)
    for line in verdicts:
        console.print(line, highlight=False, markup=False)
    if lens.probes:
        console.print("* counts towards a probe's value; above 0 leans harmful", highlight=False)
    if len(columns) < len(lens.scores):
        hidden = f"the last {len(columns)} of {len(lens.scores)} tokens; a wider terminal or --html shows more"
        console.print(hidden, highlight=False, style="dim")


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


@experiment.callback()
def _group() -> None:
    pass


@experiment.command("residual-stream")
def residual_stream(
    out: Annotated[Path, typer.Option(help="Folder for the curves, the page and the probes.")] = Path(
        "residual-stream"
    ),
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with public test sets (jailbreakbench.jsonl, ...), for the report alone."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another choice of pairs and of first weights.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, max=100_000, help="Of Adam.")] = 200,
    config: Config = None,
) -> None:
    """Linear probes for capitals, HTML and harm from 50 pairs each: curves, layer sweep, and how far they hold."""
    from training.experiment import residual_stream as run

    run(load_settings(config, model=model), out, data, seed, epochs)
