"""The figures of a report: lines with intervals as HTML that a phone can read, and curves as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.page import Html, element, line_chart

STYLE = """
.tiles > * { flex: 1 1 13rem; } section { margin-top: 2.4rem; } h2 { font-size: 1.25rem; }
.wide { font-size: .86rem; } .wide th, .wide td { padding: .3rem .45rem; } .wide td { white-space: nowrap; }
.bars td:first-child { white-space: normal; min-width: 9rem; }
.row > figure { flex-basis: 26rem; } figure + .wide, .row + .wide { margin-top: 1rem; } ul { max-width: 52rem; }
.met, .missed { padding: .1rem .5rem; border-radius: .4rem; color: #fff; }
.met { background: light-dark(#0b7a52, #1f7a55); } .missed { background: light-dark(#b5352a, #a83a2a); }
figcaption { margin-bottom: .5rem; font-weight: 600; }
.line { display: grid; grid-template-columns: minmax(6rem, 30%) 1fr 4.2rem; gap: .7rem; align-items: center;
  padding: .12rem 0; }
.line > :last-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.line > :first-child { overflow-wrap: anywhere; line-height: 1.2; }
.track { position: relative; height: 1.1rem; border-radius: .3rem;
  background: repeating-linear-gradient(90deg, var(--line) 0 1px, transparent 1px var(--step)); }
.track i { position: absolute; top: 50%; } .track .bar { height: .45rem; margin-top: -.22rem; border-radius: .3rem;
  background: var(--s0); opacity: .35; } .track .dot { width: .7rem; height: .7rem; margin: -.35rem; border-radius: 50%;
  background: var(--s0); } .track .other { width: .5rem; height: .5rem; margin: -.33rem; border-radius: 50%;
  border: 2px solid var(--s1); } .axis { color: var(--soft); font-size: .8rem; } .axis .track { background: none; }
.axis i { transform: translate(-50%, -50%); font-style: normal; white-space: nowrap; }
@media (max-width: 42rem) { body { padding: 1.2rem .9rem 3rem; } .row > figure { flex-basis: 100%; }
  figure { overflow-x: auto; } figure > svg { min-width: 33rem; }
  .line { grid-template-columns: minmax(5rem, 34%) 1fr 3.7rem; gap: .5rem; font-size: .85rem; } }
"""
_DRAWN = ("jailbreakbench", "xstest", "strongreject", "unseen harmful", "toxicchat_train")
"""Sets of the ROC: a sixth line would share a colour."""


def section(title: str, *parts: object) -> Html:
    return element("section", element("h2", title), *parts)


def soft(text: str) -> Html:
    return element("p", text, class_="soft")


def percent(figure: Mapping[str, Any] | None, digits: int = 0) -> str | None:
    if figure is None:
        return None
    value, low, high = (f"{100 * figure[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"


def number(figure: Mapping[str, Any] | None, sign: str = "") -> str | None:
    if figure is None:
        return None
    return f"{figure['value']:{sign}.3f} ({figure['low']:{sign}.3f} to {figure['high']:{sign}.3f})"


@dataclass(frozen=True, slots=True)
class Line:
    """figure: with value, low and high; others: marks beside it, by name"""

    name: str
    figure: Mapping[str, Any]
    others: Mapping[str, float] = field(default_factory=dict)


def forest(title: str, lines: Sequence[Line], low: float, high: float, percent: bool = False) -> Html:
    """A dot with its interval for each line, on one scale that is widened, in tenths, to hold them all."""
    shown_values = [v for line in lines for v in (line.figure["low"], line.figure["high"], *line.others.values())]
    low = math.floor(10 * min([low, *shown_values]) + 1e-9) / 10
    high = math.ceil(10 * max([high, *shown_values]) - 1e-9) / 10
    step = 0.1 if high - low < 0.65 else 0.2

    def at(value: float) -> float:
        return 100 * min(1.0, max(0.0, (value - low) / (high - low)))

    def shown(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.3f}"

    def one(line: Line) -> Html:
        value, left, right = (at(line.figure[k]) for k in ("value", "low", "high"))
        told = f"{shown(line.figure['value'])}, {shown(line.figure['low'])} to {shown(line.figure['high'])}"
        marks = [
            element("i", class_="bar", style=f"left:{left:.1f}%;width:{max(right - left, 0.4):.1f}%"),
            *(element("i", class_="other", style=f"left:{at(v):.1f}%", title=n) for n, v in line.others.items()),
            element("i", class_="dot", style=f"left:{value:.1f}%"),
        ]
        track = element("span", *marks, class_="track", title=told, style=f"--step:{100 * step / (high - low):.2f}%")
        return element(
            "div", element("span", line.name), track, element("span", shown(line.figure["value"])), class_="line"
        )

    ticks = [low + i * step for i in range(math.floor((high - low) / step + 1e-9) + 1)]
    labels = [element("i", f"{100 * t:.0f}" if percent else f"{t:.1f}", style=f"left:{at(t):.1f}%") for t in ticks]
    axis = element(
        "div", element("span"), element("span", *labels, class_="track"), element("span"), class_="line axis"
    )
    return element("figure", element("figcaption", title), *map(one, lines), axis)


def curves(report: Mapping[str, Any]) -> Iterator[Html]:
    """ROC, values, calibration, blocks: those that there is something to draw for."""
    if report.get("roc"):
        drawn = {n: [(100 * f, r) for f, r in p] for n, p in report["roc"].items() if n in _DRAWN}
        drawn = drawn or {n: [(100 * f, r) for f, r in p] for n, p in list(report["roc"].items())[:5]}
        yield line_chart(
            "Recall against everyday requests flagged", drawn, "% of everyday requests flagged", "recall", (0, 1), True
        )
    if report.get("histogram"):
        yield _histogram(report["histogram"])
    if report.get("calibration", {}).get("bins"):
        yield _calibration(report["calibration"])
    swept = report.get("sweep") or {}
    lines = {
        name: [(float(block), area) for block, area in enumerate(swept.get(key, ())) if area is not None]
        for key, name in (("sources", "sources held out"), ("rows", "rows held out"))
    }
    if any(lines.values()):
        yield line_chart("A ridge at each block, training rows only", lines, "block", "AUROC")


def _histogram(found: Mapping[str, Any]) -> Html:
    edges = found["edges"]
    lines = {name: list(_steps(edges, shares)) for name, shares in found["shares"].items()}
    top = max(share for shares in found["shares"].values() for share in shares)
    lines["threshold"] = [(found["threshold"], 0.0), (found["threshold"], top)]
    return line_chart("Share of rows by value", lines, "value of the request, a logit", "share", (0, top))


def _steps(edges: Sequence[float], shares: Sequence[float]) -> Iterable[tuple[float, float]]:
    for left, right, share in zip(edges, edges[1:], shares, strict=False):
        yield from ((left, share), (right, share))


def _calibration(found: Mapping[str, Any]) -> Html:
    bins = found["bins"]
    lines = {
        "seen": [(b["said"], b["seen"]) for b in bins],
        "seen, low": [(b["said"], b["low"]) for b in bins],
        "seen, high": [(b["said"], b["high"]) for b in bins],
        "right": [(0.0, 0.0), (1.0, 1.0)],
    }
    told = "" if found["ece"] is None else f"; Brier {found['brier']:.3f}, error {found['ece']:.3f}"
    return line_chart(f"Probabilities on sets that are new to it{told}", lines, "said", "share that is harmful", (0, 1))


_LENGTHS = {"everyday, thresholds by length": "the same, by length", "all harmless": "all"}


def by_length(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Html:
    lines = [
        Line(f"{_LENGTHS.get(name, name)}, up to {b['up_to']:,}", b["fpr"])
        for name, buckets in found.items()
        for b in buckets
    ]
    return forest("Harmless requests flagged, by tokens with the template", lines, 0.0, 0.3, percent=True)


def by_tokens(answers: Mapping[str, Any]) -> Html:
    """Answers that were flagged by then; both sets' lines of a kind look alike but for the colour."""
    lines = {}
    for name, entry in answers.items():
        seen = entry["by_tokens"]
        for key, label in (("recall", "harmful flagged"), ("fpr", "harmless flagged")):
            if seen[key]:
                lines[f"{name}, {label}"] = [(float(n), r) for n, r in zip(seen["tokens"], seen[key], strict=True)]
    return line_chart(
        "Flagged by the tokens of the answer that were seen", lines, "tokens", "share", (0, 1), log_x=True
    )
