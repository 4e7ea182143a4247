"""A Snapshot -> what stands on the terminal, 80 columns wide at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from monitor.terminal import plain
from monitor.top.snapshot import ENOUGH, Quantiles, Snapshot, Threshold

STALE_S = 30.0
"""A heartbeat comes every 5 s."""
_STEPS = "▁▂▃▄▅▆▇█"
_COLOURS = {"allow": "green", "flag": "yellow", "escalate": "cyan", "block": "red", "unmonitored": "magenta"}


def draw(url: str, shot: Snapshot | None, error: str | None = None) -> RenderableType:
    """shot: the newest there is; error: why there is none newer"""
    parts: list[RenderableType] = [_head(url, shot)]
    if error is not None:
        parts.append(Text(plain(f"can't be reached, trying again: {error}"), "bold red"))
    if shot is not None:
        # What must be 0 stands first: a screen that is too low is cut at its foot.
        parts += [*_state(shot), _traffic(shot), _minute(shot), _thresholds(shot), _events(shot), _footnote(shot)]
    return Group(*parts)


def _head(url: str, shot: Snapshot | None) -> Text:
    head = Text.assemble(("midstream", "bold"), "  ", plain(url))
    if shot is None:
        return head
    head.append("  " + plain(shot.model or "-"), "bold")
    head.append("\n")
    said = {True: ("ready", "green"), False: ("not ready", "bold red"), None: ("ready -", "")}
    head.append(*said[shot.ready])
    head.append(f" · up {_span(shot.uptime_s)} · heartbeat ")
    late = shot.heartbeat_s is not None and shot.heartbeat_s > STALE_S
    head.append(f"{_span(shot.heartbeat_s)} ago", "bold red" if late else "")
    head.append(f" · {datetime.fromtimestamp(shot.time).strftime('%H:%M:%S')}")
    return head


def _traffic(shot: Snapshot) -> RenderableType:
    table = _table("", *_COLOURS)
    rates = [_number(shot.request_rates.get(verdict), ".2f") for verdict in _COLOURS]
    table.add_row("requests/s", *(Text(r, c) for r, c in zip(rates, _COLOURS.values(), strict=True)))
    table.add_row("in all", *(_number(shot.requests.get(verdict, 0.0), ".0f") for verdict in _COLOURS))
    tokens = ", ".join(f"{plain(phase)} {n:.0f}" for phase, n in sorted(shot.tokens_scored.items())) or "-"
    line = Text.assemble(
        f"tokens/s {_number(shot.token_rate, '.1f')} · scored: {tokens} · ",
        f"active {_number(shot.active, '.0f')} · waiting {_number(shot.waiting, '.0f')}",
    )
    return Group(table, line)


def _minute(shot: Snapshot) -> RenderableType:
    if not shot.minute:
        return Text()
    allowed = [bar.get("allow", 0.0) for bar in shot.minute]
    others = [sum(n for verdict, n in bar.items() if verdict != "allow") for bar in shot.minute]
    grid = Table.grid(padding=(0, 1))
    for name, bars, colour in (("allow", allowed, "green"), ("others", others, "red")):
        grid.add_row(name, Text(_sparkline(bars, max(*allowed, *others)), colour), f"{sum(bars):.0f}")
    return Group(Text("\nlast minute", "dim"), grid, "")


def _sparkline(bars: list[float], highest: float) -> str:
    """Anything at all is at least the lowest step; nothing is a point."""
    top = len(_STEPS) - 1
    return "".join("·" if n <= 0 else _STEPS[min(top, int(n / highest * len(_STEPS)))] for n in bars)


def _thresholds(shot: Snapshot) -> RenderableType:
    table = _table("probe", "format", "phase", "above", "target", "seen, 95 % interval", "PSI", left=3)
    for t in shot.thresholds:
        where = (plain(t.probe), plain(t.format), plain(t.phase))
        psi = Text(_number(t.psi, ".3f"), "bold red" if t.psi is not None and t.psi > 0.25 else "")
        table.add_row(*where, _number(t.threshold, ".3f"), _percent(t.target), _seen(t), psi)
    return Group(table, "")


def _seen(t: Threshold) -> Text:
    if t.seen is None:
        return Text("-")
    above = t.low is not None and t.target is not None and t.low > t.target
    interval = "" if t.low is None or t.high is None else f" [{t.low * 100:.2f}, {t.high * 100:.2f}]"
    return Text(_percent(t.seen) + interval, "bold red" if above else "")


def _events(shot: Snapshot) -> RenderableType:
    table = _table("probe", "phase", "flags", "blocks", "would block", "score p50", "p99", left=2)
    for e in shot.events:
        counts = (_number(n, ".0f") for n in (e.flags, e.blocks, e.would_block))
        table.add_row(plain(e.probe), plain(e.phase), *counts, *_pair(e.scores, "{:.3f}".format))
    return table


def _state(shot: Snapshot) -> Iterator[RenderableType]:
    causes = ", ".join(f"{plain(cause)} {n:.0f}" for cause, n in shot.unmonitored.items() if n)
    coverage = Text("coverage  ")
    _alarm(coverage, "unmonitored", sum(shot.unmonitored.values()), f" ({causes})" if causes else "")
    _alarm(coverage, " · leaked", shot.leaked)
    _alarm(coverage, " · fail open", shot.fail_open)
    coverage.append(f" · last tokens, never fed {_number(shot.final_unscored, '.0f')}")
    yield coverage
    log = Text(f"records   queue {_number(shot.queue, '.0f')}")
    _alarm(log, " · dropped", shot.dropped)
    log.append(f" · to review {_number(shot.backlog, '.0f')}")
    yield log
    step, hold = (" / ".join(_pair(q, _seconds)) for q in (shot.score_seconds, shot.holdback_seconds))
    yield Text(f"overhead  p50 / p99: judging a step {step} · held back {hold}\n")


def _footnote(shot: Snapshot) -> Text:
    quantiles = [shot.score_seconds, shot.holdback_seconds, *(e.scores for e in shot.events)]
    since = any(q.p50 is not None and not q.recent for q in quantiles)
    return Text(f"* since the start: fewer than {ENOUGH} in the last minute" if since else "", "dim")


def _alarm(line: Text, name: str, n: float | None, more: str = "") -> None:
    line.append(f"{name} {_number(n, '.0f')}{more}", "bold red" if n else "")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        # A long name of a probe folds; a number never does.
        table.add_column(column, justify="left" if i < left else "right", no_wrap=i > 0, overflow="fold")
    return table


def _pair(q: Quantiles, shown: Callable[[float], str]) -> tuple[str, str]:
    mark = "" if q.recent or q.p50 is None else "*"
    p50, p99 = ("-" if value is None else shown(value) for value in (q.p50, q.p99))
    return p50, p99 + mark


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
