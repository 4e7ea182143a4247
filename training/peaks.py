"""Fitting on what is served of an answer: the highest running mean, not the mean of the whole.

A value is compared with its threshold at every token, so a refusal is judged at the token where it looks worst. A
running mean of scores is the score of a running mean of activations: after each fit the running mean of each answer at
its highest token joins the rows, with the answer's label, and the fit is made again on all that was collected so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.fit import Array, Fitted
from training.logistic import fit_logistic_layers

Running = npt.NDArray[np.float32]
"""(n_tokens, n_features) of one row, n_tokens >= 1."""


def running_means(stream: Tensor, decay: float) -> Running:
    """Bias-corrected running means of activations, as monitor.aggregate makes of scores. stream: (n, n_features)"""
    out = np.empty(stream.shape, dtype=np.float32)
    average, mass = np.zeros(stream.shape[1], dtype=np.float64), 0.0
    for i, row in enumerate(stream.double().numpy()):
        mass = 1 + decay * mass
        average += (row - average) / mass
        out[i] = average
    return out


def fit_peaks(
    x: Array,
    running: Sequence[Running],
    y: npt.NDArray[np.int64],
    weights: Array,
    c: float,
    rounds: int,
    tick: Callable[[int], None] = lambda n: None,
) -> Fitted:
    """Logistic regression on the rows, then `rounds` more, each with the running means that were highest before it.

    x: (n, n_features); running: of each row; one of a single token joins as it is, so that a row without an answer
    keeps its share; weights: of rows, shared by all that a row has by then
    """
    collected = [x]
    for done in range(rounds + 1):
        k = len(collected)
        rows, labels, shares = np.concatenate(collected), np.tile(y, k), np.tile(weights / k, k)
        (fitted,) = fit_logistic_layers(rows[:, None], labels, shares, c, dtype=torch.float64)
        tick(1)
        if done < rounds:
            weight = fitted.weight.astype(np.float32)
            collected.append(np.stack([r[int((r @ weight).argmax())] for r in running]).astype(np.float64))
    return replace(fitted, details=fitted.details | {"peaks": rounds})
