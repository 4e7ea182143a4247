"""`midstream check --engine vllm`: start the engine with the tap, compare it with the cards, print one table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from vllm import __version__ as VLLM_VERSION

from monitor.config import Settings
from monitor.engines.vllm.call import Call
from monitor.engines.vllm.launch import Started, plan, started
from monitor.engines.vllm.nobody import Nobody
from monitor.engines.vllm.seams import SEAMS, missing_fields, problem
from monitor.errors import MidstreamError, ProbeMismatch

_STEPS = 64


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
    observer = Nobody()
    prepared = plan(settings, extra)
    async with started(prepared, observer) as running:
        report = agreed(await running.engine.collective_rpc("midstream_report"))
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


def agreed(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first worker's report: with tensor parallelism there is one of each. raises: ProbeMismatch if they differ"""
    first, *others = reports
    for other in others:
        differs = [name for name in ("d_model", "n_layers", "layers") if other[name] != first[name]]
        if differs:
            what = ", ".join(f"{name} {first[name]} and {other[name]}" for name in differs)
            raise ProbeMismatch(f"vLLM's workers don't agree on the model: {what}; start without tensor parallelism")
    return first


async def _decode(running: Started, observer: Nobody) -> float:
    """Seconds per decode step of one sequence. raises: ProbeMismatch if one of them went without a score"""
    prompt = running.plan.model.template.raw("The quick brown fox jumps over the lazy dog.")
    seconds = 0.0
    for _ in range(2):  # the first warms up
        observer.seconds, began = 0.0, time.perf_counter()
        record = await running.scorer.generate(Call("check", "raw"), prompt.token_ids, _STEPS, ignore_eos=True)
        seconds = (time.perf_counter() - began) / _STEPS
        lost = record.coverage.unmonitored
        if lost or record.finish != "length":
            raise ProbeMismatch(
                f"{_STEPS} decode steps were to be timed: {lost} tokens have no score, and the answer ended with "
                f"{record.finish!r}; try --enforce-eager, and a policy that lets a plain sentence pass"
            )
    return seconds


def _table(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title="midstream check", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table
