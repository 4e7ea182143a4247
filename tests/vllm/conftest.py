"""vLLM on tiny random models: an engine in this process, and our server as a process of its own on a real socket."""

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
# Even with --enforce-eager vLLM compiles its sampler at the first request for logprobs, which stalls everybody for
# seconds, minutes on a busy machine. The tests of compiled graphs take this away.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # vLLM would put the engines of all workers on the first core.
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)]))

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM
from vllm.sampling_params import RequestOutputKind, SamplingParams

from monitor.config import load_settings
from monitor.engines.vllm import launch
from monitor.engines.vllm.call import CALL, Call
from probes_store.store import Store

from ..conftest import Sink, calibrated, make_card, save_tiny, tiny_config

COMMON = ["--max-model-len", "1024", "--max-num-seqs", "64"]
EAGER = [*COMMON, "--enforce-eager"]
# A score above this is every score: the record then carries them all.
EVERYTHING = {"calibration": calibrated(-1e9)}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the other tests' model, with heads that vLLM's CPU attention has kernels for."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(hidden_size=128))
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny-llama", model)


class Answered:
    """One finished request: per choice its token ids and text; cached: prompt tokens out of the prefix cache."""

    def __init__(self, call: Call, prompt_ids: tuple[int, ...], n: int) -> None:
        self.call, self.prompt_ids, self.cached = call, prompt_ids, 0
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.texts = [""] * n
        self.finish: list[str | None] = [None] * n

    def take(self, output: Any) -> None:
        self.cached = max(self.cached, output.num_cached_tokens or 0)
        for choice in output.outputs:
            self.ids[choice.index] += choice.token_ids
            self.texts[choice.index] += choice.text
            self.finish[choice.index] = choice.finish_reason or self.finish[choice.index]


class Harness:
    """A started engine on an event loop of its own thread. `run` runs a coroutine there."""

    def __init__(self, plan: Any, worker: str | None = None) -> None:
        self.plan, self.sink = plan, Sink()
        self._worker = worker
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._stack = contextlib.AsyncExitStack()
        try:
            self.started = self.run(self._start(), 600)
        except BaseException:
            self._end()
            raise
        self.judge, self.engine = self.started.judge, self.started.engine

    async def _start(self) -> Any:
        config = launch.engine_config(self.plan, self._worker) if self._worker else launch.engine_config(self.plan)
        return await self._stack.enter_async_context(launch.started(self.plan, self.sink, config))

    def run(self, coroutine: Any, timeout_s: float = 300) -> Any:
        return self.submit(coroutine).result(timeout_s)

    def submit(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        self.run(self._stack.aclose())
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    async def ask(self, prompt: Any, n: int = 1, form: str = "chat", stream: bool = True, **sampling: Any) -> Answered:
        call = Call("chat", form, n=n, expected=n)
        answered = Answered(call, prompt.token_ids, n)
        token = CALL.set(call)
        try:
            kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
            params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0} | sampling), n=n, output_kind=kind)
            request = {"prompt_token_ids": list(prompt.token_ids)}
            async for output in self.engine.generate(request, params, call.id):
                answered.take(output)
        finally:
            CALL.reset(token)
        return answered

    async def ask_all(self, prompts: list[Any], **kwargs: Any) -> list[Answered]:
        return await asyncio.gather(*(self.ask(p, **kwargs) for p in prompts))

    def idle(self) -> bool:
        return self.judge.active == 0 and not self.engine.output_processor.request_states


def make_plan(model: Any, folder: Path, probes: list[Any], arguments: list[str], **settings: Any) -> Any:
    """Publish probes and plan an engine as `midstream serve --engine vllm` does."""
    store = Store(folder, shipped=folder / "none")
    for probe, changes in probes:
        store.publish(make_card(model, probe, **changes), probe.weight, probe.bias)
    chosen = load_settings(engine="vllm", model=str(model.module.config.name_or_path), store=folder, **settings)
    return launch.plan(chosen, arguments)


@contextlib.contextmanager
def harness(plan: Any, worker: str | None = None) -> Iterator[Harness]:
    running = Harness(plan, worker)
    try:
        yield running
    finally:
        running.stop()


class VllmServer:
    """`midstream serve --engine vllm`, as an operator starts it."""

    def __init__(self, folder: Path, model: Any, probes: list[Any], arguments: list[str], **settings: str) -> None:
        self.model, self._folder = model, folder
        store = Store(folder / "store", shipped=folder / "none")
        for probe, changes in probes:
            store.publish(make_card(model, probe, **changes), probe.weight, probe.bias)
        self.records = folder / "records.sqlite3"
        own = {"MIDSTREAM_" + key.upper(): value for key, value in settings.items()}
        environment = os.environ | {"MIDSTREAM_STORE": str(folder / "store"), "MIDSTREAM_RECORDS": str(self.records)}
        self._log = (folder / "log").open("w+b")
        command = [sys.executable, "-m", "monitor.cli", "serve", "--engine", "vllm", "--port", "0"]
        command += ["--model", str(model.module.config.name_or_path), *arguments]
        self.process = subprocess.Popen(
            command, env=environment | own, stdout=self._log, stderr=subprocess.STDOUT, cwd=folder
        )
        self.url = ""

    def wait(self, timeout_s: float = 900) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = [line for line in self.log().splitlines() if "midstream ready" in line]
            if found:
                self.url = found[0].split(" on ")[1].split("/v1")[0]
                return
            assert self.process.poll() is None, self.log()[-3000:]
            time.sleep(0.2)
        raise AssertionError(f"not ready: {self.log()[-3000:]}")

    def log(self) -> str:
        self._log.flush()
        return (self._folder / "log").read_text(errors="replace")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            self._log.close()

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": self.model.name} | body, timeout=120, **kwargs)

    def record(self, request_id: str, n: int = 1) -> list[dict[str, Any]]:
        """The request's records; waits for the log's writer."""
        from monitor.traffic import find_records

        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(sqlite3.Error):
                found = find_records(self.records, request_id)
                if len(found) >= n:
                    return found
            time.sleep(0.02)
        raise AssertionError(f"{len(found)} of {n} records of {request_id}")

    def metric(self, name: str) -> float:
        lines = httpx.get(self.url + "/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Web:
    """The harness's engine behind our application, on a real socket of this process."""

    def __init__(self, running: Harness, **settings: Any) -> None:
        import uvicorn
        from prometheus_client import CollectorRegistry

        from monitor.api.vllm.serve import build
        from monitor.metrics import Metrics

        self.harness, self.sink = running, running.sink
        app = running.run(build(running.started, Metrics(CollectorRegistry())))
        self.app = app
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        self._server.install_signal_handlers = lambda: None  # not the main thread
        self._task = running.submit(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._task.result(20)
        self._listener.close()

    def idle(self) -> bool:
        """Nothing runs any more: vLLM resets its prefix cache only when no block is in use."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.harness.idle() and self.harness.run(self.harness.engine.reset_prefix_cache()):
                return True
            time.sleep(0.02)
        return False


from .shared import quiet, shared  # noqa: E402, F401  (fixtures, which need what stands above)
