"""Two banks of probe columns in the workers: running requests end on the set they began with, new ones take the new.

Each load is an epoch. Its number enters the cache salt of every request that uses it, so the prefix cache never gives
a score of one set to a request of another; a roll-back is a new epoch too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from monitor.engines.vllm.support import N_BANKS
from monitor.errors import ConfigInvalid, Overloaded, ProbeMismatch
from monitor.live import LiveProbes

Rpc = Callable[[str, tuple[Any, ...]], Awaitable[Any]]


class Bank:
    """A probe set in the workers. users: requests that are still on it"""

    def __init__(self, index: int, epoch: int, live: LiveProbes) -> None:
        self.index, self.epoch, self.live = index, epoch, live
        self.users = 0


class Banks:
    """rpc: calls a worker method by name; layers: the tapped blocks; width: columns of a bank"""

    def __init__(self, rpc: Rpc, layers: tuple[int, ...], width: int) -> None:
        self._rpc, self._layers, self._width = rpc, layers, width
        self._banks: list[Bank | None] = [None] * N_BANKS
        self._epoch = 0
        self._swapping = asyncio.Lock()
        self._current: Bank | None = None

    @property
    def current(self) -> Bank:
        if self._current is None:
            raise ConfigInvalid("no probes are loaded; the server is not ready")
        return self._current

    async def load(self, live: LiveProbes, timeout_s: float = 60.0) -> Bank:
        """Serve `live` from now on. Waits until no request uses the bank that it goes into.

        raises: ProbeMismatch if it does not fit, Overloaded if requests of the set before the last still run
        """
        async with self._swapping:
            self._current = await self._fill(live, timeout_s)
            return self._current

    async def stage(self, live: LiveProbes, timeout_s: float = 5.0) -> Bank:
        """The bank that `live` lies in from now on, not in service yet. A set that a bank still holds, like the one
        before a promotion, is not loaded again: what the prefix cache has of it counts on.

        raises: as `load`
        """
        async with self._swapping:
            for bank in self._banks:
                if bank is not None and bank.live.bank.same(live.bank):
                    return bank
            return await self._fill(live, timeout_s)

    def put(self, live: LiveProbes) -> None:
        """Serve probes that a bank holds. raises: Overloaded if another set has taken their place since"""
        for bank in self._banks:
            if bank is not None and bank.live.bank.same(live.bank):
                bank.live = live
                self._current = bank
                return
        raise Overloaded("other probes were loaded meanwhile; try again")

    async def _fill(self, live: LiveProbes, timeout_s: float) -> Bank:
        other = sorted(set(live.bank.layers) - set(self._layers))
        if other:
            raise ProbeMismatch(
                f"the probes read layer {other[0]}, this server taps {', '.join(map(str, self._layers))}; restart it "
                "with the new probes in the store"
            )
        if len(live.bank) > self._width:
            raise ProbeMismatch(
                f"{len(live.bank.columns)} probes do not fit into {self._width} columns, they need {len(live.bank)}; "
                "restart the server with a larger probe_columns"
            )
        index = 0 if self._current is None else (self._current.index + 1) % N_BANKS
        await self._wait_idle(self._banks[index], timeout_s)
        # Nobody may take it for the old set while the workers write: not even if they fail half-way.
        self._banks[index] = None
        self._epoch += 1
        bank = live.bank
        shape = [len(bank.layers), bank.d_model, len(bank)]
        args = (index, self._epoch, list(bank.layers), shape, bank.weight.numpy().tobytes(), bank.bias.tolist())
        await self._rpc("midstream_load", args)
        filled = self._banks[index] = Bank(index, self._epoch, live)
        return filled

    async def _wait_idle(self, bank: Bank | None, timeout_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while bank is not None and bank.users:
            if asyncio.get_running_loop().time() > deadline:
                raise Overloaded(
                    f"{bank.users} requests still run on the probes before the last swap; try again when they are done"
                )
            await asyncio.sleep(0.01)
