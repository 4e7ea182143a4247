"""Probe sets side by side: a sequence ends on the set that it began with, and the pass reads each set in use."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from monitor.engines.embedded.attention import Packed
from monitor.engines.embedded.model import LoadedModel
from monitor.errors import Overloaded
from monitor.live import LiveProbes
from monitor.tap import Tap
from monitor.types import Scores

MOST_SETS = 4


class ProbeSet:
    """live: the probes, whose policy may be replaced; the bank stays. tap: made by the first pass that reads it;
    verified: its canaries have been scored"""

    def __init__(self, live: LiveProbes) -> None:
        self.live = live
        self.tap: Tap | None = None
        self.verified = False

    @property
    def k(self) -> int:
        return len(self.live.bank)


class Sets:
    """The set in service, the one before (a roll-back needs no look at it again), and those that sequences still run
    on. The engine's lock is held around it."""

    def __init__(self, live: LiveProbes) -> None:
        self.current = self.before = ProbeSet(live)
        self.held = [self.current]

    def of(self, live: LiveProbes, in_use: Iterable[ProbeSet]) -> ProbeSet:
        """A set of this bank: the one that is held already (a roll-back's, or one just tried), or a new one.

        in_use: what sequences run on. raises: Overloaded if these are too many
        """
        used = {*in_use, self.current, self.before}
        self.held = [s for s in self.held if s in used or s.live.bank.same(live.bank)]
        for one in self.held:
            if one.live.bank.same(live.bank):
                return one
        if len(self.held) >= MOST_SETS:
            raise Overloaded(f"requests still run on {len(self.held)} sets of probes; try again when some are done")
        self.held.append(ProbeSet(live))
        return self.held[-1]

    def put(self, live: LiveProbes, in_use: Iterable[ProbeSet]) -> None:
        """Serve it from now on. raises: Overloaded"""
        one = self.of(live, in_use)
        one.live = live
        if one is not self.current:
            self.before, self.current = self.current, one


class Forward:
    """The model's own pass over packed tokens, and what its taps read. For one thread at a time.

    capacity: tokens of a step
    """

    def __init__(self, model: LoadedModel, first: ProbeSet, capacity: int) -> None:
        self._model, self._capacity = model, capacity
        self._tapped: list[ProbeSet] = []
        self._attach([first])

    def _attach(self, sets: Sequence[ProbeSet]) -> None:
        for one in sets:
            if one not in self._tapped:
                one.tap = Tap(self._model.module, one.live.bank, self._capacity)
                self._tapped.append(one)

    @property
    def several(self) -> bool:
        """More than one set's taps are in the model."""
        return len(self._tapped) > 1

    def keep(self, sets: Collection[ProbeSet]) -> None:
        """Take the other sets' taps out of the model."""
        for one in [t for t in self._tapped if t not in sets]:
            self._tapped.remove(one)
            if one.tap is not None:
                one.tap.detach()
                one.tap = None

    def run(
        self, tokens: list[list[int]], packed: Packed, sample_at: list[int], sets: Sequence[ProbeSet]
    ) -> tuple[dict[ProbeSet, Scores], torch.Tensor]:
        """(n_tokens, K) scores of each set, and the logits at `sample_at`."""
        n, device = packed.n_tokens, sets[0].live.bank.weight.device
        self._attach(sets)
        for one in self._tapped:
            if one.tap is not None:
                one.tap.begin(n)
        with torch.inference_mode():
            output = self._model.module(
                input_ids=torch.tensor([[t for part in tokens for t in part]], device=device),
                position_ids=torch.tensor([packed.positions()], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(sample_at, dtype=torch.long, device=device),
                packed=packed,
            )
        packed.advance()
        return {one: _scores(one, n) for one in sets}, output.logits[0]


def _scores(one: ProbeSet, n: int) -> Scores:
    """A tap that breaks leaves no scores, and the fail mode decides; it must not end everybody's answer."""
    try:
        if one.tap is not None:
            return one.tap.read(n)
    except RuntimeError as error:  # torch's kind
        print(f"midstream: the tap failed, {n} tokens have no score: {error}", file=sys.stderr)
    return np.full((n, one.k), np.nan, dtype=np.float32)
