"""Pieces of an HTML report: one page, no network, no script. Text is escaped unless an element made it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence

_VOID = {"img", "meta", "br", "hr"}
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 42

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2128, #e6e9ee); --soft: light-dark(#5b6673, #98a3b0);
  --paper: light-dark(#ffffff, #12161c); --card: light-dark(#f5f7fa, #1b2129); --line: light-dark(#dde3ea, #303945);
  --hot: light-dark(#7db8ff, #2163c4); --harm: light-dark(#ff9d8a, #a83a2a); --calm: light-dark(#8fd6a8, #1f6b42);
  --s0: light-dark(#1f6fd6, #6aa9ff); --s1: light-dark(#c4530c, #ff9d57); --s2: light-dark(#0d8563, #45c99b);
  --s3: light-dark(#8244c4, #c199ff); --s4: light-dark(#b3186a, #ff7dbb); }
body { margin: 0 auto; padding: 2rem 1.5rem 5rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { max-width: 52rem; } .soft, caption, figcaption { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > * { flex: 1 1 18rem; min-width: 0; margin: 0; }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
caption { text-align: left; padding-bottom: .4rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
.key svg { width: 1.6rem; display: inline-block; vertical-align: middle; margin-right: .35rem; }
"""


class Html(str):
    """Markup that is finished: not escaped again. Joining it to a plain str gives a plain str, which is."""

    __slots__ = ()


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    return Html("".join(escape(part) for part in parts))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """`element("td", text, class_="n")`: in a name a trailing _ is dropped, others become -; None leaves one out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{join(children)}</{name}>"))


def page(title: str, *body: object, style: str = "") -> str:
    """A whole document. style: more CSS, of ours only. Its policy forbids scripts and every request."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(_STYLE + style)),
    )
    content = element("body", element("h1", title), *(join([part, "\n"]) for part in body))
    return f"<!doctype html>\n{element('html', head, content, lang='en')}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Html:
    """Numbers to the right, floats with three digits; None and NaN are a dash."""
    lines = [[(*_shown(value),) for value in row] for row in rows]
    right = [bool(lines) and any(line[i][1] for line in lines) for i in range(len(head))]
    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else "",
            element("tr", *(element("th", h, class_="n" if r else None) for h, r in zip(head, right, strict=True))),
            *(
                element(
                    "tr", *(element("td", v, class_="n" if r else None) for (v, _), r in zip(line, right, strict=True))
                )
                for line in lines
            ),
        ),
        class_="wide",
    )


def _shown(value: object) -> tuple[object, bool]:
    """(what is written, whether it is a number)"""
    if isinstance(value, float):
        return ("–" if math.isnan(value) else f"{value:.3f}"), True
    if isinstance(value, int):
        return f"{value:,}", True
    return ("–" if value is None else value), False


def tile(label: str, value: str, note: str = "") -> Html:
    """One big figure with what it is above and what limits it below."""
    return element("div", label, element("b", value), element("span", note, class_="soft"), class_="tile")


def image(png: bytes, alt: str) -> Html:
    return element(
        "img", src="data:image/png;base64," + base64.b64encode(png).decode(), alt=alt, style="max-width:100%"
    )


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    log_x: bool = False,
) -> Html:
    """A figure with inline SVG.

    series: name -> (x, y) points, in x's order; points that are not finite are left out. Names that are alike up to a
    comma ("caps, validation", "caps, training") share a colour, the later ones are dashed.
    log_x: every x must be above 0
    """
    points = {n: [p for p in ps if all(map(math.isfinite, p))] for n, ps in series.items()}
    scale = math.log10 if log_x else float
    xs = [scale(x) for ps in points.values() for x, _ in ps] or [0.0]
    ys = [y for ps in points.values() for _, y in ps] or [0.0]
    low_y, high_y = y_range or (min(ys), max(ys))

    def at_x(x: float) -> float:
        return _LEFT + (scale(x) - min(xs)) / ((max(xs) - min(xs)) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - low_y) / ((high_y - low_y) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in _ticks(low_y, high_y):
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=_at(at_y(y)), y2=_at(at_y(y)), class_="grid"))
        parts.append(element("text", f"{y:.3g}", x=_LEFT - 7, y=_at(at_y(y) + 4), text_anchor="end"))
    for tick in _ticks(min(xs), max(xs)):
        x = 10**tick if log_x else tick
        parts.append(element("text", f"{x:.3g}", x=_at(at_x(x)), y=_HEIGHT - _BOTTOM + 18, text_anchor="middle"))
    parts.append(element("text", x_label, x=(_LEFT + _WIDTH) / 2, y=_HEIGHT - 6, text_anchor="middle"))
    middle = _at((_HEIGHT - _BOTTOM + _TOP) / 2)
    parts.append(element("text", y_label, text_anchor="middle", transform=f"translate(12 {middle}) rotate(-90)"))
    looks = _looks(list(points))
    for name, ps in points.items():
        path = " ".join(f"{_at(at_x(x))},{_at(at_y(y))}" for x, y in ps)
        parts.append(element("polyline", element("title", name), points=path, **looks[name]))
    key = [
        element("span", element("svg", element("polyline", points="0,5 26,5", **looks[n]), viewBox="0 0 26 10"), n)
        for n in points
    ]
    drawing = element("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    return element("figure", element("figcaption", title), drawing, element("div", *key, class_="key"))


def _looks(names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    heads = list(dict.fromkeys(n.partition(",")[0] for n in names))
    looks: dict[str, dict[str, str | None]] = {}
    seen: set[str] = set()
    for name in names:
        head = name.partition(",")[0]
        colour = f"stroke: var(--s{heads.index(head) % 5})"
        looks[name] = {"style": colour, "stroke_dasharray": "5 4" if head in seen else None}
        seen.add(head)
    return looks


def _at(value: float) -> str:
    return f"{value:.1f}"


def _ticks(low: float, high: float) -> list[float]:
    """4 to 9 round numbers between low and high."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * s for s in (0.1, 0.2, 0.25, 0.5, 1, 2) if span / (power * s) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
