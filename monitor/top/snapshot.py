"""A minute of readings -> what the screen says. Pure: no clock, no socket, no terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from monitor.top.scrape import Scrape, grown, grown_buckets, quantile
from monitor.types import Action

ENOUGH = 20
"""Observations of the last minute below which quantiles are of everything since the start: a p99 of 5 says nothing."""
BARS = 60
_VERDICTS = tuple(str(a) for a in Action)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """recent: of the last minute, else since the server's start. None: nothing was observed"""

    p50: float | None
    p99: float | None
    recent: bool


@dataclass(frozen=True, slots=True)
class Threshold:
    """One rule in force. threshold: a probability; target, seen, low, high: shares of sequences, [low, high] 95 %"""

    probe: str
    phase: str
    format: str
    threshold: float | None
    target: float | None
    seen: float | None
    low: float | None
    high: float | None
    psi: float | None


@dataclass(frozen=True, slots=True)
class Events:
    """What one probe did in one phase, since the server's start. scores: values of sequences, as probabilities"""

    probe: str
    phase: str
    flags: float | None
    blocks: float | None
    would_block: float | None
    scores: Quantiles


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Counts are since the server's start, rates per second between the two newest readings, all None where unknown.

    time: seconds since the epoch; uptime_s, heartbeat_s: their age by our clock, so the two clocks must agree
    minute: sequences of the last minute by verdict, one item for each 1/60 of it, the newest last; none of two readings
    """

    time: float
    model: str | None
    ready: bool | None
    uptime_s: float | None
    heartbeat_s: float | None
    requests: dict[str, float]
    request_rates: dict[str, float | None]
    minute: list[dict[str, float]]
    tokens_scored: dict[str, float]
    token_rate: float | None
    active: float | None
    waiting: float | None
    thresholds: list[Threshold]
    events: list[Events]
    score_seconds: Quantiles
    holdback_seconds: Quantiles
    unmonitored: dict[str, float]
    leaked: float | None
    fail_open: float | None
    final_unscored: float | None
    queue: float | None
    dropped: float | None
    backlog: float | None


def snapshot(scrapes: Sequence[Scrape], minute_s: float = 60.0) -> Snapshot:
    """scrapes: oldest first, at least one; of what is older than `minute_s` before the newest only a rate is made"""
    new = scrapes[-1]
    recent = [s for s in scrapes if s.at >= new.at - minute_s]
    last = scrapes[-2] if len(scrapes) > 1 else None
    ready, tokens = new.total("ready"), new.by("phase", "tokens_scored_total")
    heartbeat = new.total("heartbeat_timestamp_seconds")
    first = recent[0] if len(recent) > 1 else None
    return Snapshot(
        time=new.at,
        model=_model(new),
        ready=None if ready is None else ready > 0,
        uptime_s=_age(new, new.started),
        heartbeat_s=_age(new, heartbeat if heartbeat else None),  # 0: it has not beaten yet
        requests=new.by("action", "requests_total"),
        request_rates={v: _rate(new, last, "requests_total", action=v) for v in _VERDICTS},
        minute=_minute(recent, minute_s),
        tokens_scored=tokens,
        token_rate=_rate(new, last, "tokens_scored_total"),
        active=new.total("active_sequences"),
        waiting=new.total("waiting_prompts"),
        thresholds=_thresholds(new),
        events=_events(new, first),
        score_seconds=_quantiles(new, first, "score_seconds"),
        holdback_seconds=_quantiles(new, first, "holdback_seconds"),
        unmonitored={c: n for c, n in new.by("cause", "unmonitored_tokens_total").items() if n},
        leaked=new.total("leaked_tokens_total"),
        fail_open=new.total("fail_open_total"),
        final_unscored=new.total("final_unscored_tokens_total"),
        queue=new.total("record_queue_depth"),
        dropped=new.total("records_dropped_total"),
        backlog=new.total("review_backlog"),
    )


def _model(new: Scrape) -> str | None:
    names = {name for of in ("blocks_total", "requests_total") for name in new.by("model", of)}
    return ", ".join(sorted(names - {""})) or None


def _age(new: Scrape, since: float | None) -> float | None:
    return None if since is None else max(0.0, new.at - since)


def _rate(new: Scrape, last: Scrape | None, name: str, **labels: str) -> float | None:
    if last is None or new.at <= last.at:
        return None
    more = grown(new.total(name, **labels), last.total(name, **labels))
    return None if more is None else more / (new.at - last.at)


def _minute(recent: Sequence[Scrape], minute_s: float) -> list[dict[str, float]]:
    """Growth between neighbours, spread evenly over the time between them."""
    if len(recent) < 3:  # that is a rate, no course
        return []
    bars: list[dict[str, float]] = [{} for _ in range(BARS)]

    def place(scrape: Scrape) -> int:
        return max(0, BARS - 1 - math.floor((recent[-1].at - scrape.at) / minute_s * BARS))

    for old, new in itertools.pairwise(recent):
        between = bars[place(old) + 1 : place(new) + 1] or [bars[place(new)]]
        before = old.by("action", "requests_total")
        for verdict, n in new.by("action", "requests_total").items():
            if more := grown(n, before.get(verdict)):
                for bar in between:
                    bar[verdict] = bar.get(verdict, 0.0) + more / len(between)
    return bars


def _quantiles(new: Scrape, first: Scrape | None, name: str, **labels: str) -> Quantiles:
    ever = new.buckets(name, **labels)
    lately = {} if first is None else grown_buckets(ever, first.buckets(name, **labels))
    recent = lately.get(math.inf, 0.0) >= ENOUGH
    chosen = lately if recent else ever
    return Quantiles(quantile(0.5, chosen), quantile(0.99, chosen), recent)


def _places(new: Scrape, labels: Sequence[str], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The values of these labels, sorted, in all series that have them."""
    found = {tuple(own[n] for n in labels) for name in names for own, _ in new.of(name) if own.keys() >= set(labels)}
    return sorted(found)


def _thresholds(new: Scrape) -> list[Threshold]:
    rows = []
    for probe, form, phase in _places(new, ("probe", "format", "phase"), ("threshold_ratio", "target_fpr_ratio")):
        at = {"probe": probe, "phase": phase, "format": form}
        rows.append(
            Threshold(
                probe,
                phase,
                form,
                new.total("threshold_ratio", **at),
                new.total("target_fpr_ratio", **at),
                new.total("observed_flag_ratio", **at),
                new.total("observed_flag_ratio_low", **at),
                new.total("observed_flag_ratio_high", **at),
                new.total("drift_psi_ratio", **at),
            )
        )
    return rows


def _events(new: Scrape, first: Scrape | None) -> list[Events]:
    return [
        Events(
            probe,
            phase,
            new.total("flags_total", probe=probe, phase=phase),
            new.total("blocks_total", probe=probe, phase=phase),
            new.total("would_block_total", probe=probe, phase=phase),
            _quantiles(new, first, "request_score", probe=probe, phase=phase),
        )
        for probe, phase in _places(new, ("probe", "phase"), ("flags_total", "blocks_total", "request_score_count"))
    ]
