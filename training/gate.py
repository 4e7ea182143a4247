"""The release gate: may a probe go into service? A pure decision over arrays, each check with its interval.

A check that the rows can't settle is INCONCLUSIVE, never a pass: it says how many more rows would settle it.
"""

from __future__ import annotations

import numpy as np

from probes_store.calibration import STALE_HIGH, STALE_LOW, clopper_pearson, is_stale
from training import metrics
from training.checks import MARGIN, MOST_ROWS, SEVERITY, Check, Decision, Evidence, Verdict
from training.metrics import Figure, Sample, Unsupported
from training.recall import recall


def decide(evidence: Evidence) -> Decision:
    """raises: ValueError if the arrays don't belong together or a value is not finite"""
    e = evidence
    candidate = Sample.of(e.candidate, e.labels, e.groups)
    checks = [_false_positives(e)]
    if e.live is not None:
        checks.append(_difference("AUROC - live's", candidate, Sample.of(e.live, e.labels, e.groups), -MARGIN))
        checks.append(recall(e, e.live, e.live_threshold))
    if e.floor is None and e.textless and e.live is not None:
        pass  # the live probe was held to it
    elif e.floor is None:
        note = "the rows that the candidate was trained on are needed for it"
        checks.append(Check("AUROC - text floor's", None, "above 0", Verdict.INCONCLUSIVE, note))
    else:
        checks.append(_difference("AUROC - text floor's", candidate, Sample.of(e.floor, e.labels, e.groups), 0.0))
    return Decision(max((c.verdict for c in checks), key=SEVERITY.index), tuple(checks))


def _false_positives(e: Evidence) -> Check:
    harmless = np.flatnonzero(e.labels == 0)
    values, groups = e.candidate[harmless], [e.groups[i] for i in harmless]
    wanted = f"{STALE_LOW * e.target_fpr:.2%} to {STALE_HIGH * e.target_fpr:.2%}"
    try:
        seen = metrics.share_above(values, e.threshold, groups)
        # A value within the noise of the threshold may be above it in the next run, or not.
        low = metrics.share_above(values, e.threshold + e.noise, groups).low
        high = metrics.share_above(values, e.threshold - e.noise, groups).high
    except Unsupported as error:
        return Check("false-positive rate", None, wanted, Verdict.INCONCLUSIVE, str(error))
    verdict, note = _band(low, high, e.target_fpr), ""
    if verdict is Verdict.STALE and low > e.target_fpr:
        note = "calibrate it again on harmless rows like these: it flags more of them than it is certified for"
    elif verdict is Verdict.STALE:
        note = "calibrate it again, on more rows: its threshold is higher than it needs to be"
    elif verdict is Verdict.INCONCLUSIVE:
        note = _more_rows(seen, e.target_fpr)
    return Check("false-positive rate", Figure(seen.value, low, high, seen.n), wanted, verdict, note)


def _band(low: float, high: float, target: float) -> Verdict:
    if is_stale(low, high, target):
        return Verdict.STALE
    inside = STALE_LOW * target <= low and high <= STALE_HIGH * target
    return Verdict.PASS if inside else Verdict.INCONCLUSIVE


def _more_rows(seen: Figure, target: float) -> str:
    if _band(*clopper_pearson(round(seen.value * seen.n), seen.n), target) is not Verdict.INCONCLUSIVE:
        return "rows that share groups, or lie within the noise of the threshold, leave it open: add others"
    more = benign_rows_needed(seen.value, seen.n, target)
    return "its rate lies on an edge: more rows won't tell" if more is None else f"{more} more benign rows needed"


def benign_rows_needed(rate: float, n: int, target_fpr: float) -> int | None:
    """How many harmless rows more settle the check of the false-positive rate, if the rate stays what it was over n;
    None if a million don't."""
    from scipy.stats import beta

    total = np.unique(np.geomspace(n + 1, max(n + 2, MOST_ROWS), 4000).astype(np.int64))
    hits = np.rint(rate * total)
    # Clopper and Pearson's ends; of no hits, and of nothing but hits, the beta distribution has none.
    low = np.where(hits == 0, 0.0, beta.ppf(0.025, np.maximum(hits, 1), total - hits + 1))
    high = np.where(hits == total, 1.0, beta.ppf(0.975, hits + 1, np.maximum(total - hits, 1)))
    low_edge, high_edge = STALE_LOW * target_fpr, STALE_HIGH * target_fpr
    settled = (low > high_edge) | (high < low_edge) | ((low >= low_edge) & (high <= high_edge))
    return int(total[settled.argmax()]) - n if settled.any() else None


def _difference(name: str, candidate: Sample, other: Sample, edge: float) -> Check:
    wanted = f"above {edge:g}"
    try:
        figure = metrics.paired(metrics.auroc, candidate, other)
    except Unsupported as error:
        return Check(name, None, wanted, Verdict.INCONCLUSIVE, str(error))
    if figure.high < edge:
        return Check(name, figure, wanted, Verdict.DEGRADED, "train it again: what it is compared with ranks better")
    if figure.low > edge:
        return Check(name, figure, wanted, Verdict.PASS)
    away = figure.value - edge
    width = figure.value - figure.low if away > 0 else figure.high - figure.value
    # An interval narrows with the square root of the rows.
    more = figure.n * ((width / away) ** 2 - 1) if away else float("inf")
    note = "it lies on the edge: more rows won't tell" if more > MOST_ROWS else f"about {round(more)} more rows needed"
    return Check(name, figure, wanted, Verdict.INCONCLUSIVE, note)
