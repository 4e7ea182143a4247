"""`midstream check --engine vllm`: start the engine with the tap, compare it with the cards, print one table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from vllm import __version__ as VLLM_VERSION
from vllm.sampling_params import SamplingParams

from monitor.config import Settings
from monitor.engines.vllm.launch import Started, plan, started
from monitor.engines.vllm.seams import SEAMS, missing_fields, problem
from monitor.errors import MidstreamError, ProbeMismatch
from monitor.types import Record

_STEPS = 64


class _Nobody:
    """An observer of records that nobody keeps; counts what judging costs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self, record: Record) -> None:
        return None

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.seconds += seconds


def check(settings: Settings, extra: Sequence[str]) -> int:
    """0 if everything fits. raises: MidstreamError at the first mismatch that keeps the engine from serving"""
    console = Console()
    broken = [p for p in map(problem, SEAMS) if p is not None] + [f"{f} is gone" for f in missing_fields()]
    rows = [("vLLM", VLLM_VERSION), ("seams", f"{len(SEAMS) - len(broken)} of {len(SEAMS)} found")]
    try:
        if broken:
            raise ProbeMismatch("; ".join(broken) + f": vLLM {VLLM_VERSION} is not one that midstream knows")
        rows += asyncio.run(_measure(settings, extra))
    except MidstreamError:
        console.print(_table(rows))
        raise
    console.print(_table(rows))
    return 0


async def _measure(settings: Settings, extra: Sequence[str]) -> list[tuple[str, str]]:
    observer = _Nobody()
    prepared = plan(settings, extra)
    async with started(prepared, observer) as running:
        (report,) = await running.engine.collective_rpc("midstream_report")
        if report["d_model"] != prepared.model.d_model or report["n_layers"] != prepared.model.n_layers:
            raise ProbeMismatch(
                f"the worker's model is {report['n_layers']} layers of {report['d_model']}, the configuration says "
                f"{prepared.model.n_layers} of {prepared.model.d_model}"
            )
        step = await _decode(running, observer)
        cards = [p.card for p in prepared.live.probes]
        return [
            ("model", f"{prepared.model.name}, {running.dtype}, {report['n_layers']} layers of {report['d_model']}"),
            ("worker", f"{report['worker']} on {report['device']}, {report['runner'].rpartition('.')[2]}"),
            ("compiled", f"{report['compiled']}, CUDA graphs {report['cuda_graphs']}"),
            ("tapped layers", ", ".join(map(str, report["layers"]))),
            ("probes", ", ".join(f"{c.name} {c.version}" for c in cards)),
            ("canaries", f"{sum(len(c.canaries) for c in cards)} scored, largest difference {running.off:.2g}"),
            ("decode step", f"{1000 * step:.2f} ms"),
            ("of it the tap", f"{1e6 * report['tap_seconds']:.0f} µs"),
            ("of it judging", f"{1e6 * observer.seconds / _STEPS:.0f} µs"),
        ]


async def _decode(running: Started, observer: _Nobody) -> float:
    """Seconds per decode step of one sequence."""
    params = SamplingParams(max_tokens=_STEPS, temperature=0.0, ignore_eos=True)
    prompt = running.plan.model.template.raw("The quick brown fox jumps over the lazy dog.")
    times = []
    for i in range(2):  # the first warms up
        observer.seconds, began = 0.0, time.perf_counter()
        async for _ in running.engine.generate({"prompt_token_ids": list(prompt.token_ids)}, params, f"check-{i}"):
            pass
        times.append((time.perf_counter() - began) / _STEPS)
    return times[-1]


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title="midstream check", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
