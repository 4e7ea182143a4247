"""Texts that nearly repeat each other: Jaccard similarity of their 8-byte shingles, exact, without MinHash.

Two sets of n and m shingles whose similarity is at least t share at least t * max(n, m). So with each set's shingles
ordered from the rarest to the most frequent, the first n - ceil(t * n) + 1 of one and of the other have one in common
(Bayardo et al. 2007): only texts that meet there are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from training.data import same_text

SHINGLE = 8
"""Bytes: one fits a uint64, so no hash is needed."""
MAX_BYTES = 20_000
"""Of a text, from its start: beyond it two texts that agree so far are alike in any case."""
Shingles = npt.NDArray[np.uint64]


def shingles(text: str) -> Shingles:
    """The distinct 8-byte windows of a text, sorted; spelling of case and space does not count."""
    data = np.frombuffer(same_text(text).encode()[:MAX_BYTES].ljust(SHINGLE, b"\0"), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(data, SHINGLE)
    return np.unique(np.ascontiguousarray(windows).view(np.uint64)[:, 0])


def jaccard(a: Shingles, b: Shingles) -> float:
    """Shared over all, of two sets that are not empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def near_pairs(
    texts: Sequence[str], threshold: float = 0.8, groups: Sequence[str] | None = None
) -> list[tuple[int, int, float]]:
    """Pairs (i, j, similarity) with i < j and a similarity of at least `threshold`, by j.

    Of several texts that are all alike, each is paired with the first one only: enough to know what to drop.
    groups: of the texts; those of one group are no pair, and each is paired with the first of another group
    """
    sets, prefixes = _prefixes(texts, threshold)
    holders: dict[int, list[int]] = {}
    pairs = []
    for j, prefix in enumerate(prefixes):
        near = list(_near(j, prefix, sets, holders, threshold))
        others = near if groups is None else [(i, s) for i, s in near if groups[i] != groups[j]]
        if others:
            pairs.append((others[0][0], j, others[0][1]))
        # Two groups' texts stand for all that are alike: whichever group comes, one of them is of another.
        if not near or (groups is not None and len({groups[i] for i, _ in near}) == 1 and len(others) == len(near)):
            _hold(j, prefix, holders)
    return pairs


def near_others(texts: Sequence[str], others: Sequence[str], threshold: float = 0.8) -> list[tuple[int, int, float]]:
    """(i, j, similarity) for each text i that comes near one of the others: the first such j."""
    sets, prefixes = _prefixes([*others, *texts], threshold)
    holders: dict[int, list[int]] = {}
    for j, prefix in enumerate(prefixes[: len(others)]):
        _hold(j, prefix, holders)
    pairs = []
    for i in range(len(others), len(sets)):
        found = next(_near(i, prefixes[i], sets, holders, threshold), None)
        if found is not None:
            pairs.append((i - len(others), *found))
    return pairs


def _prefixes(texts: Sequence[str], threshold: float) -> tuple[list[Shingles], list[list[int]]]:
    """Each text's shingles, and the rare ones by which it can be found; those that no other text has are left out."""
    sets = [shingles(text) for text in texts]
    if not sets:
        return [], []
    owner = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    _, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    # By text, then from rare to frequent; the id breaks ties, the same way for every text.
    ranked = inverse[np.lexsort((inverse, counts[inverse], owner))]
    prefixes, start = [], 0
    for own in sets:
        prefix = ranked[start : start + len(own) - math.ceil(threshold * len(own)) + 1]
        prefixes.append(prefix[counts[prefix] > 1].tolist())
        start += len(own)
    return sets, prefixes


def _hold(index: int, prefix: list[int], holders: dict[int, list[int]]) -> None:
    for shingle in prefix:
        holders.setdefault(shingle, []).append(index)


def _near(
    index: int, prefix: list[int], sets: list[Shingles], holders: dict[int, list[int]], threshold: float
) -> Iterator[tuple[int, float]]:
    own = sets[index]
    for other in sorted({i for shingle in prefix for i in holders.get(shingle, ())}):
        shorter, longer = sorted((len(sets[other]), len(own)))
        if shorter >= threshold * longer:
            similarity = jaccard(sets[other], own)
            if similarity >= threshold:
                yield other, similarity
