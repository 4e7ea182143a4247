"""Traffic as training reads it: labels of the log beside the features that were kept of the same requests.

A label is about the request: its features are those of the prompt's newest turn. No text is needed; where texts are
kept and the key is given, those of labelled requests without features are read by the model instead, and where no
features are kept at all, everyday ones too.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from monitor.errors import ConfigInvalid
from monitor.traffic.database import Where
from monitor.traffic.features import Feature, read_features
from monitor.traffic.labelled import Labelled, labelled_since
from monitor.traffic.review import Label
from monitor.types import Phase
from probes_store.card import Card
from training.fit import Array

YOUNG_S = 900.0
"""How long a finished request's features may take to be written: they are read and written in turn."""
Id = tuple[str, int]
"""Request and choice."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Labelled requests. x: (n, n_layers * d_model); y: (n,) 1 harmful, 0 harmless; q: (n,) the probability that each
    was kept with; tenants: names of API keys; sampled: (n,) whether it is of the uniform slice"""

    ids: tuple[Id, ...]
    x: Array
    y: npt.NDArray[np.int64]
    q: Array
    tenants: tuple[str, ...]
    sampled: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Traffic:
    """rows: labelled; everyday: (m, n_layers * d_model) of a uniform slice of all requests, one of each, those that
    nobody has labelled, or called harmless before the version in service was made; until: the newest label's time;
    unread: labelled requests without features; harmful: requests that somebody has ever called so; strange: features of
    another model or template; by_text: there are no features, but texts"""

    rows: Rows
    everyday: Array
    until: float
    unread: tuple[Labelled, ...]
    harmful: frozenset[str]
    strange: int
    by_text: bool


def read_traffic(
    log: Where, features: Path, card: Card, since: float, texts: bool = False, clock: Callable[[], float] = time.time
) -> Traffic:
    """What the version in service has not seen. A label whose request may still be on its way into the features waits
    for the next time, with all that came after it: so none is lost, and none counts twice.

    card: of the version that is gone on from; since: what the newest version has seen, which may be a candidate: there
    must be a label that it has not; texts: they can be read where there is no folder of features
    clock: seconds since the epoch
    raises: ConfigInvalid if there is no log, no features, or no label since then
    """
    labels = labelled_since(log, card.seen_until)
    if not any(one.labelled > since for one in labels):
        raise ConfigInvalid("nothing was labelled since the newest version; label some requests: midstream review")
    by_text = texts and not features.is_dir()
    prompts, strange = _of_model([] if by_text else read_features(features, layers=card.layers), card)
    # A text is written with its record.
    kept, young = {(f.request_id, f.choice) for f in prompts}, math.inf if by_text else clock() - YOUNG_S
    waiting = [one.labelled for one in labels if one.created > young and (one.request_id, one.choice) not in kept]
    labels = [one for one in labels if one.labelled < min(waiting, default=math.inf)]
    if not labels:
        raise ConfigInvalid(
            f"the features of what was labelled are not written yet; try again in {YOUNG_S / 60:.0f} minutes, or set "
            "MIDSTREAM_LOG_FEATURES for the server"
        )
    # The same request may be told of twice, read again after a restart; what is newest counts.
    by_id = {(f.request_id, f.choice): f for f in prompts}
    found = [(one, by_id[one.request_id, one.choice]) for one in labels if (one.request_id, one.choice) in by_id]
    whole = {f.request_id: f for f in uniform(list(by_id.values()))}
    rows = Rows(
        tuple((one.request_id, one.choice) for one, _ in found),
        stacked([f for _, f in found], card),
        np.array([int(one.label is Label.HARMFUL) for one, _ in found], dtype=np.int64),
        np.array([f.q for _, f in found]),
        tuple(one.key for one, _ in found),
        firsts([one.request_id for one, _ in found], whole),
    )
    known = {(one.request_id, one.choice) for one, _ in found}
    unread = tuple(one for one in labels if (one.request_id, one.choice) not in known)
    harmful = frozenset(one.request_id for one in labelled_since(log, 0.0) if one.label is Label.HARMFUL)
    everyday = [f for name, f in whole.items() if name not in harmful | {one.request_id for one, _ in found}]
    until = max(one.labelled for one in labels)
    return Traffic(rows, stacked(everyday, card), until, unread, harmful, strange, by_text)


def firsts(requests: Sequence[str], drawn: Container[str]) -> npt.NDArray[np.bool_]:
    """(n,): whether a row is the first one of a request that was drawn. Choices of a request share its prompt: one
    value, not as many as there are answers."""
    first = {name: i for i, name in reversed([*enumerate(requests)])}
    return np.array([name in drawn and first[name] == i for i, name in enumerate(requests)], dtype=bool)


def uniform(features: Sequence[Feature]) -> list[Feature]:
    """Features that every request had the same chance to leave, flagged or not: without flagged ones the highest values
    would be missing from a calibration. Where that chance was changed in the meantime, the smallest one holds: of the
    others as many are taken as it says, by a hash of their names."""
    rates = [f.rate for f in features if f.rate > 0]
    return [f for f in features if f.rate > 0 and draw((f.request_id, f.choice)) < min(rates) / f.rate]


def draw(one: Id) -> float:
    """In [0, 1), of the name alone."""
    digest = hashlib.sha256(f"{one[0]}:{one[1]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def stacked(features: Sequence[Feature], card: Card) -> Array:
    """(n, n_layers * d_model) float64"""
    if not features:
        return np.zeros((0, len(card.layers) * card.d_model))
    return np.stack([f.vectors for f in features]).astype(np.float64).reshape(len(features), -1)


def _of_model(features: Sequence[Feature], card: Card) -> tuple[list[Feature], int]:
    wanted = (card.model.fingerprint, card.template_hash[:16], card.position_rule)
    prompts = [f for f in features if f.phase is Phase.PROMPT]
    fit = [f for f in prompts if (f.fingerprint, f.template_hash[:16], f.position_rule) == wanted]
    return fit, len(prompts) - len(fit)
