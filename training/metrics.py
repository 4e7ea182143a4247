"""What a probe's values are worth: figures with intervals, each refused where the rows can't support it.

A sample is drawn again by group: rows of one group (a pair, the turns of one author) are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes_store.calibration import Calibration, clopper_pearson

Array = npt.NDArray[np.float64]
Metric = Callable[[Array, Array], Array]
"""(..., k) harmful and (..., k) harmless mass at each distinct value, highest value first -> (...,)"""

MIN_GROUPS = 10
"""Of each label. Fewer, and a bootstrap interval is narrower than it says."""
LOW_FPR = (1e-3, 1e-1)
_ROUNDING = 1e-9
_CHUNK = 100  # draws at once: 8 MB for 10,000 rows


class Unsupported(ValueError):
    """A figure that the rows can't support. The message says how many more are needed, where a number helps."""


def need(have: int, needed: int, what: str, figure: str) -> None:
    """raises: Unsupported if there are too few"""
    if have < needed:
        raise Unsupported(f"{have} {what} can't support {figure}: {needed - have} more are needed ({needed} in all)")


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and its 95 % interval, over n rows."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Sample:
    """values: (n,) finite, higher leans harmful; labels: (n,) 1 harmful, 0 harmless; groups: (n,) codes from 0"""

    values: Array
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, values: npt.ArrayLike, labels: Sequence[int] | npt.NDArray[np.int64], groups: Sequence[str] | None = None
    ) -> Sample:
        """groups: rows that belong together; None: each row by itself

        raises: ValueError if a value is not finite or the lengths differ; Unsupported if a label is missing
        """
        v, y = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.int64)
        codes = np.arange(len(v)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        if not v.shape == y.shape == codes.shape:
            raise ValueError(f"{len(v)} values, {len(y)} labels and {len(codes)} groups don't belong together")
        if not np.isfinite(v).all():
            raise ValueError("a value is not finite; leave rows without a value out, and say so")
        for label, word in ((1, "harmful"), (0, "harmless")):
            need(int((y == label).sum()), 1, f"{word} rows", "any comparison of the two labels")
        return cls(v, y, codes.astype(np.int64))

    def masses(self, weights: Array | None = None) -> tuple[Array, Array]:
        """Harmful and harmless mass at each distinct value, highest first. weights: (..., n), 1 if None"""
        order = np.argsort(-self.values, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], np.diff(self.values[order]) != 0]))
        drawn = np.ones(len(order)) if weights is None else weights[..., order]
        harmful = drawn * self.labels[order]
        harmless = drawn - harmful
        if len(starts) == len(order):
            return harmful, harmless
        return np.add.reduceat(harmful, starts, axis=-1), np.add.reduceat(harmless, starts, axis=-1)

    def draws(self, rounds: int, seed: int) -> Iterator[Array]:
        """(<= 100, n) how often each row is drawn: whole groups, of each kind (its labels) as many as there are.

        raises: Unsupported with fewer than MIN_GROUPS groups of a label
        """
        n = int(self.groups.max()) + 1
        has = np.stack([np.bincount(self.groups[self.labels == label], minlength=n) > 0 for label in (0, 1)])
        for label, word in ((1, "harmful"), (0, "harmless")):
            need(int(has[label].sum()), MIN_GROUPS, f"groups of {word} rows", "a bootstrap interval")
        kinds = [np.flatnonzero((has[0] == a) & (has[1] == b)) for a, b in ((1, 0), (0, 1), (1, 1))]
        random = np.random.default_rng(seed)
        for start in range(0, rounds, _CHUNK):
            size = min(_CHUNK, rounds - start)
            counts = np.zeros((size, n))
            for kind in kinds:
                if len(kind):
                    counts[:, kind] = random.multinomial(len(kind), np.full(len(kind), 1 / len(kind)), size)
            yield counts[:, self.groups]

    def disjoint(self) -> float:
        """The lower end of an AUROC of 1, by Clopper and Pearson: all disjoint pairs of a harmful and a harmless group
        are in order. A bootstrap of perfectly separated rows has no width."""
        pairs = min(len(np.unique(self.groups[self.labels == label])) for label in (0, 1))
        return clopper_pearson(pairs, pairs)[0]


def auroc(harmful: Array, harmless: Array) -> Array:
    """P(a harmful row scores above a harmless one), ties count half."""
    below = harmless.sum(-1, keepdims=True) - harmless.cumsum(-1)
    area: Array = ((below + harmless / 2) * harmful).sum(-1) / (harmful.sum(-1) * harmless.sum(-1))
    return area


def auprc(harmful: Array, harmless: Array) -> Array:
    """Average precision. It depends on the share of harmful rows: compare it on the same rows only."""
    hits = harmful.cumsum(-1)
    flagged = hits + harmless.cumsum(-1)
    precision = np.divide(hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
    area: Array = (harmful * precision).sum(-1) / hits[..., -1]
    return area


def log_auroc(harmful: Array, harmless: Array) -> Array:
    """The mean recall over false-positive rates from 0.1 % to 10 %, each order of magnitude alike (PROBES 9.9).

    raises: Unsupported with fewer than 1,000 harmless rows, which can't resolve 0.1 %
    """
    need(round(float(harmless.sum(-1).min())), round(1 / LOW_FPR[0]), "harmless rows", "log-AUROC from 0.1 %")
    recall = harmful.cumsum(-1) / harmful.sum(-1, keepdims=True)
    rate = harmless.cumsum(-1) / harmless.sum(-1, keepdims=True)
    start, end = np.zeros_like(rate[..., :1]), np.ones_like(rate[..., :1])
    edges = np.log10(np.clip(np.concatenate([start, rate, end], axis=-1), *LOW_FPR))
    steps = np.diff(edges, axis=-1) * np.concatenate([start, recall], axis=-1)
    span = np.log10(LOW_FPR[1]) - np.log10(LOW_FPR[0])
    area: Array = steps.sum(-1) / span
    return area


def recall_at(rate: float) -> Metric:
    """Recall at the lowest threshold that flags at most `rate` of the harmless mass; 0 if none does."""

    def recall(harmful: Array, harmless: Array) -> Array:
        caught = harmful.cumsum(-1) / harmful.sum(-1, keepdims=True)
        flagged = harmless.cumsum(-1) / harmless.sum(-1, keepdims=True)
        best: Array = np.where(flagged <= rate + _ROUNDING, caught, 0.0).max(-1)
        return best

    return recall


def threshold_at(harmless: Array, rate: float) -> float:
    """The lowest value of a harmless row above which at most `rate` of them lie. harmless: (n,) with n > 0"""
    return float(np.sort(harmless)[::-1][min(len(harmless) - 1, int(rate * len(harmless) + _ROUNDING))])


def interval(metric: Metric, sample: Sample, rounds: int = 1000, seed: int = 0) -> Figure:
    """A metric with its percentile bootstrap over groups. raises: Unsupported"""
    value = float(metric(*sample.masses()))
    drawn = np.concatenate([metric(*sample.masses(w)) for w in sample.draws(rounds, seed)])
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    if low == high and value in (0.0, 1.0):
        edge = _seen_perfect(metric, sample)
        low, high = (edge, 1.0) if value else (0.0, 1 - edge)
    return Figure(value, low, high, len(sample.values))


def paired(metric: Metric, one: Sample, other: Sample, rounds: int = 1000, seed: int = 0) -> Figure:
    """metric(one) - metric(other), both on the same rows, drawn together.

    raises: Unsupported; ValueError if the rows are not the same
    """
    low, high = draws_of_difference(metric, one, other, rounds, seed)
    value = float(metric(*one.masses()) - metric(*other.masses()))
    if low == high and not np.array_equal(_ranks(one.values), _ranks(other.values)):
        room = 1 - _seen_perfect(metric, one)  # they order all these pairs alike, and differ all the same
        low, high = low - room, high + room
    return Figure(value, low, high, len(one.values))


def draws_of_difference(
    metric: Metric, one: Sample, other: Sample, rounds: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of `paired`'s draws alone: no width where no draw differs. raises: as `paired`"""
    if not (np.array_equal(one.labels, other.labels) and np.array_equal(one.groups, other.groups)):
        raise ValueError("a paired comparison needs two scores of the same rows, in the same order")
    drawn = [metric(*one.masses(w)) - metric(*other.masses(w)) for w in one.draws(rounds, seed)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5]).tolist()
    return low, high


def _seen_perfect(metric: Metric, sample: Sample) -> float:
    if metric is not auroc:
        raise Unsupported(f"no draw of these rows changes {metric.__name__}, so it has no interval; take AUROC")
    return sample.disjoint()


def _ranks(values: Array) -> npt.NDArray[np.int64]:
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def share_above(
    values: npt.ArrayLike, threshold: float, groups: Sequence[str] | None = None, rounds: int = 1000, seed: int = 0
) -> Figure:
    """Share of values strictly above a threshold: recall on harmful rows, false-positive rate on harmless ones.

    Clopper and Pearson's interval; where rows share groups, the wider of it and the grouped bootstrap, for it takes
    rows to be independent. raises: Unsupported without rows
    """
    v = np.asarray(values, dtype=np.float64)
    need(len(v), 1, "rows", "a rate")
    if not np.isfinite(v).all():
        raise ValueError("a value is not finite; leave rows without a value out, and say so")
    above = v > threshold
    low, high = clopper_pearson(int(above.sum()), len(v))
    codes = np.arange(len(v)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n = int(codes.max()) + 1
    if n < len(v):
        need(n, MIN_GROUPS, "groups of rows", "a rate over rows that share groups")
        random = np.random.default_rng(seed)
        counts = random.multinomial(n, np.full(n, 1 / n), rounds).astype(np.float64)
        rates = counts @ np.bincount(codes, above) / (counts @ np.bincount(codes))
        drawn_low, drawn_high = np.percentile(rates, [2.5, 97.5]).tolist()
        low, high = min(low, drawn_low), max(high, drawn_high)
    return Figure(float(above.mean()), low, high, len(v))


def false_alarms_a_day(fpr: Figure, requests_a_day: float) -> Figure:
    """Harmless requests a day that are expected above the threshold, if all traffic is like the rows of `fpr`."""
    return Figure(fpr.value * requests_a_day, fpr.low * requests_a_day, fpr.high * requests_a_day, fpr.n)


def conformal_threshold(calibration: Calibration, alpha: float) -> float:
    """Split conformal: the next harmless request like these is above it with probability at most `alpha`, averaged over
    calibration samples. Calibration.threshold says more: that for 95 % of the samples. It is never lower than this.

    raises: Unsupported below 1 / alpha - 1 rows, or if the card keeps too few values
    """
    needed = int(np.ceil(1 / alpha - 1e-9)) - 1
    need(calibration.n, needed, "harmless rows", f"a conformal rate of {alpha:.3%}")
    above = int(np.floor((calibration.n + 1) * alpha + 1e-9)) - 1
    if above >= len(calibration.tail):
        raise Unsupported(f"the card keeps {len(calibration.tail)} values, too few for a rate of {alpha:.3%}")
    return calibration.tail[above]


def over_sets(values: Mapping[str, float]) -> dict[str, float | str]:
    """Mean and minimum over data sets, and which set has it: a mean alone hides the one that fails."""
    need(len(values), 1, "sets", "a mean over sets")
    worst = min(values, key=lambda name: values[name])
    return {"mean": sum(values.values()) / len(values), "minimum": values[worst], "worst": worst}
