"""What gives a label away without meaning: length, single tokens, openings and endings, a bag of words, the source.

A probe takes the shortest way: where one of these separates the classes it will learn that, and score well for it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np

from monitor.errors import ConfigInvalid
from training.data import Row, same_text, sample
from training.evaluate import auroc
from training.floor import tfidf_scores

MIN_ROWS = 20
"""Of each class: with fewer, a figure says nothing."""
WORDS_IN_AN_END = 3
_FOLDS = 5
_MAX_FITTED = 4000
_TOKEN = re.compile(r"\w+|[^\w\s]")


def enough(rows: Sequence[Row]) -> bool:
    positive = sum(r.label for r in rows)
    return min(positive, len(rows) - positive) >= MIN_ROWS


def length_auroc(rows: Sequence[Row]) -> float:
    """AUROC of a classifier that sees only how many characters a text has; 0.5 to 1, whichever way round."""
    lengths = np.array([float(len(r.text)) for r in rows])
    labels = np.array([r.label for r in rows])
    value = auroc(lengths[labels == 1], lengths[labels == 0])
    return max(value, 1 - value)


def token_shares(rows: Sequence[Row], top: int = 3) -> list[tuple[str, float, float]]:
    """The tokens (words and signs) that separate best: token, share of harmful texts with it, share of harmless ones.

    AUROC of "has the token" is 1/2 + |difference of the shares| / 2.
    """
    return _apart(rows, lambda row: set(_TOKEN.findall(row.text.lower())))[:top]


def ends(rows: Sequence[Row], top: int = 3) -> list[tuple[str, float, float]]:
    """The openings and endings of three words that separate best, as `token_shares`; `…` stands for the rest."""

    def of(row: Row) -> Iterable[str]:
        words = same_text(row.text).split()
        if len(words) > WORDS_IN_AN_END:
            yield " ".join(words[:WORDS_IN_AN_END]) + " …"
            yield "… " + " ".join(words[-WORDS_IN_AN_END:])

    return _apart(rows, of)[:top]


def _apart(rows: Sequence[Row], of: Callable[[Row], Iterable[str]]) -> list[tuple[str, float, float]]:
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for row in rows:
        counts[row.label].update(of(row))
    positive = sum(r.label for r in rows)
    totals = (len(rows) - positive, positive)
    shares = [(item, counts[1][item] / totals[1], counts[0][item] / totals[0]) for item in {*counts[0], *counts[1]}]
    return sorted(shares, key=lambda s: (-abs(s[1] - s[2]), s[0]))


def words_auroc(rows: Sequence[Row]) -> float | None:
    """AUROC of TF-IDF and logistic regression on rows that they were not fitted on: five folds, groups kept together.

    At most 4,000 rows, drawn by group. None if the groups are too few or too large to hold rows of both labels back.
    raises: ConfigInvalid if scikit-learn is not installed
    """
    if find_spec("sklearn") is None:
        raise ConfigInvalid("scikit-learn is not installed; pip install midstream[train]")
    # The words of the texts, whatever answers stand beside them: it is texts that are held back and scored.
    rows = [replace(r, answer="") for r in sample(rows, _MAX_FITTED, seed=0)]
    fold = np.array([int(hashlib.sha256(r.group.encode()).hexdigest(), 16) % _FOLDS for r in rows])
    labels = np.array([r.label for r in rows])
    values = []
    for held in range(_FOLDS):
        fit = [r for r, f in zip(rows, fold, strict=True) if f != held]
        test = labels[fold == held]
        if not 0 < test.sum() < len(test) or len({r.label for r in fit}) < 2:
            return None
        scores = np.array(tfidf_scores(fit, [r.text for r, f in zip(rows, fold, strict=True) if f == held]))
        values.append(auroc(scores[test == 1], scores[test == 0]))
    return float(np.mean(values))


def known_by_source(rows: Sequence[Row]) -> float:
    """Share of the rows whose source has rows of one label only."""
    labels: dict[str, set[int]] = {}
    for row in rows:
        labels.setdefault(row.source, set()).add(row.label)
    return sum(len(labels[r.source]) == 1 for r in rows) / len(rows)
