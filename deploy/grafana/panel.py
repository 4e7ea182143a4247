"""One panel as plain data, and the queries that recur. dashboard.py gives it Grafana's shape.

`$model` and `$probe` are the dashboard's variables, `$__rate_interval` is Grafana's own: at least four scrapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.models import units

RATIO, SECONDS, COUNT, NUMBER = units.PercentUnit, units.Seconds, units.Short, units.NoUnit
PER_SECOND, PER_MINUTE = units.CountsPerSecond, units.CountsPerMinute

MODEL, PROBE = 'model=~"$model"', 'probe=~"$probe"'
EVENT = f"{MODEL}, {PROBE}"
READING = "{{probe}} {{phase}}"
CARD = "{{probe}} {{phase}} {{format}}"
BY_CARD = "max by (probe, phase, format)"

Query = tuple[str, str]
"""PromQL, and its legend."""


@dataclass(frozen=True, slots=True)
class Panel:
    """width: of Grafana's 24 columns; warn, alarm: values at which the colour turns

    A heatmap has one query, over `le`; a stat shows one value; a table the labels of the newest samples.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["lines", "stat", "heatmap", "table"] = "lines"
    width: int = 8
    warn: float | None = None
    alarm: float | None = None


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    warn: float | None = None,
    alarm: float | None = None,
) -> Panel:
    return Panel(title, description, unit, queries, width=width, warn=warn, alarm=alarm)


def stat(title: str, description: str, unit: str, query: str, alarm: float | None = None) -> Panel:
    return Panel(title, description, unit, ((query, ""),), "stat", 4, alarm=alarm)


def heatmap(title: str, description: str, metric: str) -> Panel:
    query = f"sum by (le) (increase(midstream_{metric}_bucket{{{PROBE}}}[$__rate_interval]))"
    return Panel(title, description, COUNT, ((query, "{{le}}"),), "heatmap", 12)


def table(title: str, description: str, query: str) -> Panel:
    return Panel(title, description, NUMBER, ((query, ""),), "table", 24)


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Events a second, summed over everything but the labels in `by`."""
    return f"sum by ({by}) (rate(midstream_{metric}{{{where}}}[$__rate_interval]))"


def minutely(metric: str, by: str = "", where: str = "") -> str:
    """Events a minute, for what is rare: 0.0003 a second tells nobody anything."""
    return f"60 * {rate(metric, by, where)}"


def last_hour(metric: str, by: str = "") -> str:
    return f"sum by ({by}) (increase(midstream_{metric}[1h]))"


def quantiles(metric: str, by: str = "", where: str = "", legend: str = "") -> tuple[Query, Query]:
    """The median and the 99th percentile of a histogram."""
    buckets = rate(f"{metric}_bucket", f"le, {by}" if by else "le", where)
    median, tail = (f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.99))
    return (median, f"{legend} p50".strip()), (tail, f"{legend} p99".strip())
