"""The logit lens as a page and as a picture: blocks by tokens, the newest block on top."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from monitor.errors import ConfigInvalid
from training.lens import Lens, ProbeTrace
from training.page import Html, element, page

_STYLE = """
.lens { font: 12px/1.3 ui-monospace, monospace; border-collapse: separate; border-spacing: 2px; }
.lens td, .lens th { border: 0; padding: .22rem .35rem; white-space: pre; text-align: center; max-width: 7.5rem;
  overflow: hidden; text-overflow: ellipsis; border-radius: .2rem; }
.lens th { background: var(--paper); } .lens th:first-child { position: sticky; left: 0; text-align: right; }
.lens td { background: color-mix(in oklab, var(--fill) calc(var(--p) * 100%), var(--card)); }
.lens td { --fill: var(--hot); --p: 0; } .lens td.harm { --fill: var(--harm); } .lens td.calm { --fill: var(--calm); }
.lens th.counts { border-bottom: 2px solid var(--s1); } .lens tr.read th { color: var(--s1); }
.lens tr.read td { outline: 1px solid var(--s1); }
.lens td:hover { outline: 2px solid var(--ink); }
.lens td[data-top]:hover::after { content: attr(data-top); position: fixed; right: 1rem; bottom: 1rem; z-index: 2;
  white-space: pre; text-align: left; padding: .7rem .9rem; border-radius: .5rem; border: 1px solid var(--line);
  background: var(--paper); color: var(--ink); font-size: 13px; box-shadow: 0 4px 18px #0005; }
"""


def visible(text: str) -> str:
    """A token on one line: line ends and lone spaces as signs; what does not print (escape codes, marks that turn text
    around) as □."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = text if text.strip(" ") else "␣" * len(text)
    return "".join(c if c.isprintable() else "□" for c in text) or "∅"


def lens_page(lens: Lens, model: str, text: str) -> str:
    """Self-contained HTML, light and dark; the text and every word are escaped."""
    n = lens.n_layers
    intro = (
        f"{model}: {n} blocks, {len(lens.tokens)} of {len(lens.scores)} tokens. Each cell is the word that the "
        "residual stream after that block would give as the next one; the stronger its colour, the more probable. "
        "Hover over a cell for its five most probable words."
    )
    parts: list[Html] = [
        element("p", intro, class_="soft"),
        element("p", element("strong", visible(text[:400]) + ("…" if len(text) > 400 else ""))),
        element("h2", "Logit lens: the next word after each block"),
        _grid(lens, [_word_row(lens, layer) for layer in reversed(range(n))], list(reversed(range(n))), ()),
    ]
    for probe in lens.probes:
        parts += [
            element("h2", f"Probe {probe.name}"),
            element("p", _what(probe), class_="soft"),
            _probe_grid(lens, probe),
        ]
    return page("Logit lens", *parts, style=_STYLE)


def _what(probe: ProbeTrace) -> str:
    marked = "Underlined tokens count towards its value. Above 0 leans towards the concept."
    if len(probe.reads) == 1:
        return (
            f"Its logit at each token. Serving scores block {probe.reads[0]} (outlined); the other rows are the same "
            f"direction at other blocks, to see where it comes up. {marked}"
        )
    return f"The share of each block that it reads; a token's score is their sum and a bias. {marked}"


def _grid(lens: Lens, rows: list[list[Html]], layers: list[int], reads: tuple[int, ...]) -> Html:
    head = [element("th", "block")]
    head += [
        element("th", visible(t), class_="counts" if c else None) for t, c in zip(lens.tokens, lens.counts, strict=True)
    ]
    lines = [
        element("tr", element("th", layer), *cells, class_="read" if layer in reads else None)
        for layer, cells in zip(layers, rows, strict=True)
    ]
    return element("div", element("table", element("tr", *head), *lines, class_="lens"), class_="wide")


def _word_row(lens: Lens, layer: int) -> list[Html]:
    cells = []
    for column, token in enumerate(lens.tokens):
        top = lens.top(layer, column)
        where = f"block {layer}, after {visible(token)}"
        found = "\n".join(f"{p:7.1%}  {visible(word)}" for word, p in top)
        cells.append(element("td", visible(top[0][0]), style=f"--p:{top[0][1]:.3f}", data_top=f"{where}\n{found}"))
    return cells


def _probe_grid(lens: Lens, probe: ProbeTrace) -> Html:
    layers = [i for i in reversed(range(lens.n_layers)) if np.isfinite(probe.values[i]).any()]
    # Coloured by what is served: deep blocks have longer streams, and would wash everything else out.
    served = np.abs(probe.values[list(probe.reads)])
    widest = float(np.nanmax(served)) or 1.0
    rows = [
        [
            element(
                "td",
                f"{value:+.1f}" if math.isfinite(value) else "–",
                class_="harm" if value > 0 else "calm",
                style=f"--p:{min(1.0, abs(value) / widest) if math.isfinite(value) else 0:.3f}",
            )
            for value in probe.values[layer].tolist()
        ]
        for layer in layers
    ]
    return _grid(lens, rows, layers, probe.reads)


def need_matplotlib(what: str) -> None:
    """raises: ConfigInvalid with the remedy, before minutes of work are lost to it"""
    if find_spec("matplotlib") is None:
        raise ConfigInvalid(f"{what} needs matplotlib; pip install 'midstream[report]'")


def save_png(figure: Any, path: Path) -> None:
    """The same bytes for the same figure: no version and no date in the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path.write_bytes(buffer.getvalue())


def lens_png(lens: Lens, path: Path, title: str) -> None:
    """A heat map of the top words. raises: ConfigInvalid without matplotlib"""
    need_matplotlib("--png")
    from matplotlib.figure import Figure

    n_layers, n_tokens = lens.ids.shape[:2]
    figure = Figure(figsize=(2.2 + 0.85 * n_tokens, 1.6 + 0.27 * n_layers), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(lens.probability[:, :, 0], cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    drawable = _drawable()
    for layer in range(n_layers):
        for column in range(n_tokens):
            word, p = lens.top(layer, column)[0]
            ink = "white" if p > 0.6 else "#222"
            # Without parse_math a `$` of the text would start a formula.
            shown = drawable(visible(word).strip(), 9)
            axes.text(column, layer, shown, ha="center", va="center", fontsize=7, color=ink, parse_math=False)
    labels = [drawable(visible(t), 12) for t in lens.tokens]
    axes.set_xticks(range(n_tokens), labels, rotation=45, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(0, n_layers, 2))
    axes.set_ylabel("block")
    axes.set_title(drawable(title, 90), fontsize=10, parse_math=False)
    figure.colorbar(picture, label="probability of the top word", fraction=0.03, pad=0.01)
    save_png(figure, path)


def _drawable() -> Any:
    """cut(text, length): what the one font that comes along can draw; other letters become □, not a warning each."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()

    def cut(text: str, length: int) -> str:
        text = text if len(text) <= length else text[: length - 1] + "…"
        return "".join(c if ord(c) in known else "□" for c in text)

    return cut
