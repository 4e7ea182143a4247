"""Does a candidate catch fewer harmful rows than the live probe? As both are served, or at one false-positive rate.

Whoever flags more catches more: where the candidate loses rows at its own threshold but also flags fewer harmless ones
for sure, that is the thresholds' doing, and says little about the probes. They are then compared at one rate.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import replace

import numpy as np

from training.checks import MARGIN, MOST_ROWS, Check, Evidence, Verdict
from training.flips import Flags, Flips, mcnemar, share_difference, tango
from training.metrics import Array, Figure, Sample, Unsupported, draws_of_difference, need, recall_at, threshold_at

_NAME = "recall - live's"
_WANTED = f"above {-MARGIN:g}"


def recall(e: Evidence, live: Array, live_threshold: float | None) -> Check:
    """live_threshold: None if the live probe certifies no such rate: then it is at one rate that they are compared"""
    if live_threshold is None:
        return _at_one_rate(e, live)
    harmful = np.flatnonzero(e.labels == 1)
    ours, theirs = e.candidate > e.threshold, live > live_threshold
    note = f"{_caught(ours[harmful], theirs[harmful])}; {_false_alarms(e, ours, theirs)}"
    if e.threshold == live_threshold and np.array_equal(e.candidate, live):
        return _same(_NAME, len(harmful))
    try:
        figure = share_difference(ours[harmful], theirs[harmful], [e.groups[i] for i in harmful])
        check = _judged(_NAME, figure, mcnemar(ours[harmful], theirs[harmful]), note)
        if check.verdict is Verdict.PASS or not _fewer_alarms(e, ours, theirs):
            return check
    except Unsupported as error:
        return Check(_NAME, None, _WANTED, Verdict.INCONCLUSIVE, f"{note}; {error}")
    fairer = _at_one_rate(e, live)
    return replace(fairer, note=f"{fairer.note}; each at its threshold: {note}")


def _at_one_rate(e: Evidence, live: Array) -> Check:
    """Each at the lowest threshold that flags at most `target_fpr` of the harmless rows. Its interval is the wider of
    Tango's, over the rows that only one flags, and the paired bootstrap's, in which the thresholds move as well."""
    name = f"{_NAME}, both at {e.target_fpr:.2%} of these harmless rows"
    harmful = e.labels == 1
    if np.array_equal(e.candidate, live):
        return _same(name, int(harmful.sum()))
    try:
        needed = math.ceil(1 / e.target_fpr)
        need(int((~harmful).sum()), needed, "harmless rows", f"a threshold at {e.target_fpr:.2%}")
        ours, theirs = (v[harmful] > threshold_at(v[~harmful], e.target_fpr) for v in (e.candidate, live))
        one, other = (Sample.of(v, e.labels, e.groups) for v in (e.candidate, live))
        low, high = draws_of_difference(recall_at(e.target_fpr), one, other)
    except Unsupported as error:
        return Check(name, None, _WANTED, Verdict.INCONCLUSIVE, str(error))
    figure = share_difference(ours, theirs)
    figure = Figure(figure.value, min(low, figure.low), max(high, figure.high), figure.n)
    return _judged(name, figure, mcnemar(ours, theirs), _caught(ours, theirs))


def _same(name: str, n: int) -> Check:
    return Check(name, Figure(0.0, 0.0, 0.0, n), _WANTED, Verdict.PASS, "the same judge of every row")


def _fewer_alarms(e: Evidence, ours: Flags, theirs: Flags) -> bool:
    """The candidate flags fewer harmless rows, for sure. raises: Unsupported with too few groups"""
    harmless = np.flatnonzero(e.labels == 0)
    return share_difference(ours[harmless], theirs[harmless], [e.groups[i] for i in harmless]).high < 0


def _judged(name: str, figure: Figure, flips: Flips, note: str) -> Check:
    # Beyond the margin as it was seen, and a loss for sure: a candidate that blocks less need not be proven far worse.
    if figure.value < -MARGIN and figure.high < 0 and flips.p < 0.05:
        return Check(name, figure, _WANTED, Verdict.DEGRADED, note)
    if figure.low > -MARGIN:
        return Check(name, figure, _WANTED, Verdict.PASS, note)
    return Check(name, figure, _WANTED, Verdict.INCONCLUSIVE, f"{note}; {_more_harmful(flips, figure)}")


def _caught(ours: Flags, theirs: Flags) -> str:
    flips = mcnemar(ours, theirs)
    return (
        f"{ours.mean():.1%} of {len(ours)} harmful rows, live {theirs.mean():.1%}; {flips.only_one} rows won, "
        f"{flips.only_other} lost, McNemar p = {flips.p:.2g}"
    )


def _false_alarms(e: Evidence, ours: Flags, theirs: Flags) -> str:
    harmless = e.labels == 0
    return f"{ours[harmless].mean():.1%} of {int(harmless.sum())} harmless ones, live {theirs[harmless].mean():.1%}"


def _more_harmful(flips: Flips, seen: Figure) -> str:
    more = harmful_rows_needed(flips.only_one, flips.only_other, seen.n)
    if more == 0:
        return "rows that share groups, or the thresholds' own noise, leave it open: add others"
    return "it lies on the edge: more rows won't tell" if more is None else f"about {more} more harmful rows needed"


def harmful_rows_needed(won: int, lost: int, n: int) -> int | None:
    """How many harmful rows more settle the check of the recall, if both shares stay what they were over n; None if a
    million don't."""
    value = (won - lost) / n
    if value == -MARGIN:
        return None

    def settled(total: int) -> bool:
        low, high = tango(won * total / n, lost * total / n, total)
        return low > -MARGIN if value > -MARGIN else high < 0

    totals = np.unique(np.geomspace(n, max(n + 2, MOST_ROWS), 4000).astype(np.int64)).tolist()
    place = bisect.bisect_left(totals, True, key=settled)
    return totals[place] - n if place < len(totals) else None
