"""What a candidate is fitted on: labelled traffic and rows of files, each with its weight, none of the frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from monitor.config import Settings
from monitor.errors import ConfigInvalid
from probes_store.card import Card, DataFile
from probes_store.store import StoredProbe
from training.data import EVALUATE_ONLY, Row, same_text
from training.fit import Array
from training.load import read_rows, stem
from training.retrain.candidate import Start, start_of
from training.retrain.said import all_said, draw_said, read_kept, read_said
from training.retrain.traffic import Rows, Traffic
from training.retrain.weighing import alike, leaked, weigh
from training.texts import Reader


@dataclass(frozen=True, slots=True)
class Given:
    """start: what is gone on from; x: (n, n_layers * d_model) features, labels of traffic before rows of files; y: (n,)
    1 harmful, 0 harmless; weights: (n,), 0 for what is left out; sampled: (n,) whether it is of the uniform slice;
    everyday: (m, n_layers * d_model) of the slice, without rows of x
    counts: for the card; capped: tenants that were held to their share; files: what was read
    """

    start: Start
    x: Array
    y: npt.NDArray[np.int64]
    weights: Array
    sampled: npt.NDArray[np.bool_]
    everyday: Array
    counts: dict[str, Any]
    capped: tuple[str, ...]
    files: tuple[DataFile, ...]


def gather(
    settings: Settings,
    data: Sequence[str],
    live: StoredProbe,
    traffic: Traffic,
    reader: Reader,
    frozen: Sequence[Row],
    console: Console,
) -> Given:
    """data: files of labelled rows. raises: ConfigInvalid for one that is for evaluation only, or for a wrong key"""
    drawn = draw_said(settings) if traffic.by_text else []
    said, unread = read_said(settings, traffic.unread, drawn, reader, live.card, console)
    known = traffic.harmful | {name for name, _ in said.ids}
    _, others = read_kept(settings, [one for one in drawn if one[0] not in known], reader, live.card, console)
    everyday = np.concatenate([traffic.everyday, others])
    whole = np.where(all_said(settings, traffic.rows.ids), 1.0, traffic.rows.q)
    rows = _joined(replace(traffic.rows, q=whole), said)
    called = rows.sampled & (rows.y == 0)
    start = start_of(live, np.concatenate([everyday, rows.x[called]]))
    # Without the leaked ones from the start: what they weighed, others would lack in the balance of labels and tenants.
    dropped = leaked(rows.x, _features(reader, frozen, live.card), start.scaler)
    share, stay = settings.retrain_tenant_share, ~dropped
    tenants = [tenant for tenant, stays in zip(rows.tenants, stay, strict=True) if stays]
    weighed = weigh(rows.x[stay], rows.y[stay], rows.q[stay], tenants, start.scaler, share, start.rows)
    weights = np.zeros(len(rows.y))
    weights[stay] = weighed.weights
    read = [_rows(file, frozen) for file in data]
    more = [row for file, _ in read for row in file]
    labels = [np.array([r.label for r in file], dtype=np.int64) for file, _ in read if file]
    counts = {
        "labels": len(rows.y),
        "harmful": int(rows.y.sum()),
        "counted": int((weights > 0).sum()),
        "from_texts": len(said.y),
        "unread": unread,
        "strange": traffic.strange,
        "copies": weighed.copies,
        "torn": weighed.torn,
        "in_frozen": int(dropped.sum()),
        "tenants": len(set(rows.tenants)),
        "capped": len(weighed.capped),
        "everyday": len(everyday) + int(called.sum()),
        "data_rows": len(more),
    }
    return Given(
        start,
        np.concatenate([rows.x, _features(reader, more, live.card)]),
        np.concatenate([rows.y, *labels]),
        np.concatenate([weights, *(alike(y, np.ones(len(y))) for y in labels)]),
        np.concatenate([rows.sampled, np.zeros(len(more), dtype=bool)]),
        everyday,
        counts,
        weighed.capped,
        tuple(described for _, described in read),
    )


def _rows(file: str, frozen: Sequence[Row]) -> tuple[list[Row], DataFile]:
    if stem(file) in EVALUATE_ONLY:
        raise ConfigInvalid(f"{file}: for evaluation only; take it out of --data, or rename your own file")
    rows, described = read_rows(file)
    known = {same_text(r.text) for r in frozen}
    new = [r for r in rows if not r.answer and same_text(r.text) not in known]
    return new, described.model_copy(update={"used": {"fit": len(new)}})


def _joined(one: Rows, other: Rows) -> Rows:
    return Rows(
        one.ids + other.ids,
        np.concatenate([one.x, other.x]),
        np.concatenate([one.y, other.y]),
        np.concatenate([one.q, other.q]),
        one.tenants + other.tenants,
        np.concatenate([one.sampled, other.sampled]),
    )


def _features(reader: Reader, rows: Sequence[Row], card: Card) -> Array:
    """(n, n_layers * d_model): as the feature log pools them, by the model."""
    out = np.zeros((len(rows), len(card.layers), card.d_model))
    for index, turn in reader.streams(rows, card.layers):
        for column, layer in enumerate(card.layers):
            out[index, column] = turn[layer].mean(0).double().numpy()
    return out.reshape(len(rows), len(card.layers) * card.d_model)
