"""Harvest through vLLM, for training: pooled features of many sequences, by the mechanism of the feature log."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from monitor.config import Settings
from monitor.engines.embedded.model import LoadedModel
from monitor.engines.vllm.client import Judge
from monitor.engines.vllm.launch import describe, parse, start, tapped
from monitor.engines.vllm.nobody import Nobody
from monitor.engines.vllm.reread import averages
from monitor.engines.vllm.support import KEY, TapConfig
from monitor.errors import MidstreamError
from monitor.reread import Pooled
from monitor.types import Turn

_AT_ONCE = 64
_WORKER = "monitor.engines.vllm.worker.MonitoredWorker"


class VllmHarvest:
    """vLLM without probes and without clients, from `with` until its end; `read` is an `Averager`.

    layers: tells which blocks, of so many; extra: vLLM's own arguments; model: as the embedded engine describes it, but
    without its weights
    raises: MidstreamError if vLLM can't start
    """

    def __init__(self, settings: Settings, layers: Callable[[int], Sequence[int]], extra: Sequence[str] = ()) -> None:
        self._settings, self._extra = settings, extra
        served = describe(settings)
        self.layers = tuple(sorted(set(layers(served.n_layers))))
        self._arguments = parse(settings, extra, served.name, settings.dtype or "auto")
        self._config = tapped(self._arguments, _WORKER, lambda name: TapConfig(self.layers, 1, name, streams=True))
        model = self._config.model_config
        self.model = LoadedModel(
            name=served.name,
            fingerprint=served.fingerprint,
            quantization="",
            dtype=str(model.dtype).removeprefix("torch."),
            module=None,
            tokenizer=served.template.tokenizer,
            template=served.template,
            d_model=served.d_model,
            n_layers=served.n_layers,
            max_model_len=model.max_model_len - 1,  # vLLM wants room for a token
            eos_ids=frozenset(),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="midstream-harvest", daemon=True)
        self._engine: Any = None

    def __enter__(self) -> VllmHarvest:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except BaseException:
            self._end()
            raise
        return self

    async def _start(self) -> None:
        self._engine = start(self._config, self._arguments)
        tap = self._config.additional_config[KEY]
        Judge(self._engine, self.model.template, Nobody(), self.model.name, self.layers, tap["width"])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._end()

    async def _stop(self) -> None:
        self._engine.shutdown(timeout=0)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def read(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[Turn]]],
        layers: Sequence[int],
        progress: Callable[[int], None] = lambda n: None,
    ) -> Iterator[tuple[int, Pooled]]:
        """See `Averager`. layers: among those of this harvest. raises: MidstreamError if vLLM can't read one"""
        columns = [self.layers.index(layer) for layer in layers]
        came: queue.Queue[tuple[int, Pooled | None]] = queue.Queue()
        free = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int) -> None:
            ids, spans = sequences[index]
            means = None
            try:
                async with free:
                    means = await averages(self._engine, ids, spans, len(self.layers))
            finally:  # whatever went wrong: somebody waits for it
                came.put((index, means))

        async def every() -> None:
            async with asyncio.TaskGroup() as group:
                for index in range(len(sequences)):
                    group.create_task(one(index))

        work = asyncio.run_coroutine_threadsafe(every(), self._loop)
        try:
            for _ in sequences:
                index, means = came.get()
                if means is None:
                    raise MidstreamError(f"vLLM could not read a sequence of {len(sequences[index][0])} tokens")
                yield index, means[:, columns]
                progress(1)
            work.result()
        finally:
            work.cancel()
