"""What the release gate decides on, and what each of its checks says: types, no rule."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.metrics import Array, Figure

MARGIN = 0.02
"""Of AUROC, and of recall on flipped rows: what a candidate may lose to the live probe."""
MOST_ROWS = 1_000_000
"""Beyond which nobody is told to label more."""


class Verdict(enum.StrEnum):
    PASS = "PASS"  # noqa: S105 - not a password
    INCONCLUSIVE = "INCONCLUSIVE"
    STALE = "THRESHOLD STALE"
    DEGRADED = "DEGRADED"


EXIT_CODE = {Verdict.PASS: 0, Verdict.STALE: 10, Verdict.DEGRADED: 11, Verdict.INCONCLUSIVE: 12}
# The worst of the checks is the gate's: a new threshold does not mend a probe that ranks worse.
SEVERITY = list(Verdict)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The frozen rows, and what each judge says of them; all arrays (n,), in the same order.

    labels: 1 harmful, 0 harmless; groups: rows that belong together; candidate, live: served values; floor: of the
    text floor, fitted on the candidate's training rows; None: there is none to compare with
    textless: nor can there be: it goes on from the live probe by features, without any text
    noise: largest difference of a value between two runs
    """

    labels: npt.NDArray[np.int64]
    groups: Sequence[str]
    candidate: Array
    threshold: float
    target_fpr: float
    live: Array | None = None
    live_threshold: float | None = None
    floor: Array | None = None
    noise: float = 0.0
    textless: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """figure: None where the rows can't support one; wanted: of its interval; note: what follows"""

    name: str
    figure: Figure | None
    wanted: str
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODE[self.verdict]
