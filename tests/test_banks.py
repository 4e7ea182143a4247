"""Banks: two probe sets in turn, one epoch per load, and no set is overwritten while a request is on it."""

import asyncio

import numpy as np
import pytest
import torch

from monitor.engines.vllm.banks import Banks
from monitor.errors import ConfigInvalid, Overloaded, ProbeMismatch
from monitor.live import LiveProbes
from monitor.probe import ProbeBank, ProbeWeights

D_MODEL = 8


def live(*layers, n=1):
    """n probes that read these layers."""
    probes = [
        ProbeWeights(f"p{i}", {layer: torch.full((D_MODEL,), layer + i / 4) for layer in layers}, i) for i in range(n)
    ]
    return LiveProbes.under_rules(ProbeBank(probes, D_MODEL), {})


class Rpc:
    """The workers: keeps every call, and fails or waits if told to."""

    def __init__(self):
        self.calls, self.error, self.running, self.most_at_once = [], None, 0, 0

    async def __call__(self, name, args):
        self.calls.append((name, args))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def rpc():
    return Rpc()


def banks_of(rpc, layers=(1, 3), width=2):
    return Banks(rpc, layers, width)


def where(rpc):
    """(bank, epoch) of every load."""
    return [args[:2] for _, args in rpc.calls]


def test_without_probes_there_is_no_current_set(rpc):
    with pytest.raises(ConfigInvalid, match="not ready"):
        _ = banks_of(rpc).current


def test_loads_alternate_between_the_banks_and_epochs_rise(rpc):
    async def run():
        banks = banks_of(rpc)
        for epoch in range(1, 6):
            probes = live(1)
            bank = await banks.load(probes)
            assert banks.current is bank and bank.live is probes and bank.epoch == epoch and bank.users == 0

    asyncio.run(run())
    assert where(rpc) == [(0, 1), (1, 2), (0, 3), (1, 4), (0, 5)]


def test_workers_get_the_weights_as_bytes_in_the_order_of_the_layers(rpc):
    probes = live(3, 1, n=2)
    asyncio.run(banks_of(rpc).load(probes))
    ((name, (bank, epoch, layers, shape, weight, bias)),) = rpc.calls
    assert (name, bank, epoch, layers, shape, bias) == ("midstream_load", 0, 1, [1, 3], [2, D_MODEL, 2], [0.0, 1.0])
    array = np.frombuffer(weight, np.float32).reshape(shape)
    assert array[:, 0].tolist() == [[1.0, 1.25], [3.0, 3.25]]


def test_a_layer_that_is_not_tapped_is_refused_and_nothing_changes(rpc):
    async def run():
        banks = banks_of(rpc)
        before = await banks.load(live(1))
        with pytest.raises(ProbeMismatch, match="layer 2, this server taps 1, 3; restart"):
            await banks.load(live(1, 2))
        assert banks.current is before

    asyncio.run(run())
    assert where(rpc) == [(0, 1)]


def test_more_probes_than_columns_are_refused_and_nothing_changes(rpc):
    async def run():
        banks = banks_of(rpc)
        with pytest.raises(ProbeMismatch, match=r"3 probes do not fit into 2 columns.*probe_columns"):
            await banks.load(live(1, n=3))
        with pytest.raises(ConfigInvalid):
            _ = banks.current

    asyncio.run(run())
    assert rpc.calls == []


def test_the_set_before_may_still_be_in_use(rpc):
    async def run():
        banks = banks_of(rpc)
        (await banks.load(live(1))).users += 1
        await banks.load(live(1), timeout_s=0)

    asyncio.run(run())
    assert where(rpc) == [(0, 1), (1, 2)]


def test_a_load_waits_for_the_users_of_the_bank_it_overwrites(rpc):
    async def run():
        banks = banks_of(rpc)
        oldest = await banks.load(live(1))
        oldest.users += 1
        before = await banks.load(live(1))
        waiting = asyncio.create_task(banks.load(live(3)))
        await asyncio.sleep(0.03)
        assert not waiting.done() and banks.current is before and len(rpc.calls) == 2
        oldest.users -= 1
        assert (await waiting) is banks.current

    asyncio.run(run())
    assert where(rpc) == [(0, 1), (1, 2), (0, 3)]


def test_after_the_time_out_it_is_overloaded_and_the_old_set_stays(rpc):
    async def run():
        banks = banks_of(rpc)
        oldest = await banks.load(live(1))
        oldest.users += 2
        before = await banks.load(live(1))
        with pytest.raises(Overloaded, match="2 requests still run"):
            await banks.load(live(1), timeout_s=0.02)
        assert banks.current is before and len(rpc.calls) == 2
        oldest.users = 0
        await banks.load(live(1), timeout_s=0.02)

    asyncio.run(run())
    assert where(rpc) == [(0, 1), (1, 2), (0, 3)]


def test_concurrent_loads_are_serialised(rpc):
    async def run():
        banks = banks_of(rpc)
        loaded = await asyncio.gather(*(banks.load(live(1)) for _ in range(6)))
        assert [b.epoch for b in loaded] == [1, 2, 3, 4, 5, 6] and banks.current is loaded[-1]

    asyncio.run(run())
    assert rpc.most_at_once == 1 and [bank for bank, _ in where(rpc)] == [0, 1, 0, 1, 0, 1]


def test_a_load_that_fails_in_the_workers_leaves_the_old_set_and_never_reuses_its_epoch(rpc):
    async def run():
        banks = banks_of(rpc)
        before = await banks.load(live(1))
        rpc.error = RuntimeError("a worker died")
        with pytest.raises(RuntimeError, match="died"):
            await banks.load(live(3))
        assert banks.current is before
        rpc.error = None
        await banks.load(live(3))

    asyncio.run(run())
    # Some workers may hold the failed set under epoch 2: its scores must not be taken for those of another.
    assert where(rpc) == [(0, 1), (1, 2), (1, 3)]


def test_a_load_that_is_given_up_lets_the_next_one_in(rpc):
    async def run():
        banks = banks_of(rpc)
        oldest = await banks.load(live(1))
        oldest.users += 1
        await banks.load(live(1))
        waiting = asyncio.create_task(banks.load(live(1)))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        oldest.users = 0
        await banks.load(live(1), timeout_s=0.5)

    asyncio.run(run())
    assert where(rpc) == [(0, 1), (1, 2), (0, 3)]
