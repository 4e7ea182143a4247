"""What tests share: a tiny random model with a real tokenizer, published probes, and a server on a real socket."""

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
for name in [k for k in os.environ if k.startswith("MIDSTREAM_")]:
    del os.environ[name]

import httpx
import hypothesis
import numpy as np
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from monitor.aggregate import Aggregation
from monitor.api.app import create_app
from monitor.api.edge import Edge
from monitor.api.judging import Judging
from monitor.api.openai import Service
from monitor.api.others import other_routes
from monitor.config import DEMO_MODEL, Settings, cache_dir, load_settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.engines.embedded.scorer import EmbeddedScorer
from monitor.live import LiveProbes, counted, load_live
from monitor.metrics import Metrics
from monitor.probe import ProbeBank, ProbeWeights
from monitor.template import POSITION_RULE
from monitor.types import Record
from probes_store.calibration import Calibration
from probes_store.card import Canary, Card, ModelId
from probes_store.store import Store

# Modules that assert for the tests of several files; before anything imports one of them.
pytest.register_assert_rewrite(*(f"tests.{m}" for m in ("cuts", "fake_session", "overload", "page", "shelf", "wires")))

from .fake_upstream import FakeUpstream
from .star import fit_star_probe

torch.set_num_threads(1)  # tiny matrices: a second thread only waits
hypothesis.settings.register_profile("ours", deadline=None)  # a busy machine is no bug
hypothesis.settings.load_profile("ours")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attack", action="store_true", help="the long attack and fault runs too")


# Half a minute and more: they begin first (with --no-loadscope-reorder), or the end of a run waits for one of them.
LONG = (
    "test_retrain.py", "test_observer.py", "test_loop.py", "test_contract.py", "test_leak.py", "test_report.py",
    "test_upstream_swap.py", "test_upstream_contract.py", "test_demo.py", "test_upstream_serve.py", "test_alerts.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    if not config.getoption("--attack"):
        for item in items:
            if item.get_closest_marker("attack"):
                item.add_marker(pytest.mark.skip(reason="long: run with --attack"))


CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAYER = 2


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, so that any text has ids and any id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(kind: Callable[..., Any] = LlamaConfig, **changes: Any) -> Any:
    """4 layers, 64 wide, for the tokenizer of bytes. kind: a config class of transformers"""
    tokenizer = tiny_tokenizer()
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.06,
    }
    return kind(**(fields | changes))


def save_tiny(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that writes nonsense deterministically."""
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny-llama", LlamaForCausalLM(tiny_config()))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), cache=cache_dir())


@pytest.fixture(scope="module")
def quiet(tiny: LoadedModel) -> Iterator[LoadedModel]:
    """The tiny model with logits so small that a bias decides."""
    with torch.no_grad():
        tiny.module.lm_head.weight.mul_(1e-3)
    yield tiny
    with torch.no_grad():
        tiny.module.lm_head.weight.mul_(1e3)


@pytest.fixture(scope="module")
def star_probe(quiet: LoadedModel) -> tuple[ProbeWeights, float]:
    return fit_star_probe(quiet)


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The real model that comes along."""
    return load_model(DEMO_MODEL, cache=cache_dir())


def make_card(model: LoadedModel, probe: ProbeWeights, **changes: Any) -> Card:
    """A card that fits; `changes` make it lie."""
    text = "a canary"
    prompt = model.template.encode([{"role": "user", "content": text}])
    ((_, streams),) = residual_streams(model, [prompt], sorted(probe.weight))
    scores = score_streams(ProbeBank([probe], model.d_model), streams)[counted(prompt)].ravel()
    fields: dict[str, Any] = {
        "name": probe.name,
        "version": "v1",
        "created": "2026-01-01T00:00:00+00:00",
        "code_version": "0",
        "model": ModelId(
            name=model.name,
            fingerprint=model.fingerprint,
            dtype=model.dtype,
            quantization="none",
            n_layers=model.n_layers,
        ),
        "layers": tuple(sorted(probe.weight)),
        "d_model": model.d_model,
        "template_hash": model.template.hash,
        "position_rule": POSITION_RULE,
        "aggregation": {"prompt": Aggregation("max"), "response": Aggregation("max")},
        "canaries": (Canary(text=text, scores=tuple(float(s) for s in scores)),),
        "sha256": "0" * 64,
    }
    return Card(**(fields | changes))


def calibrated(threshold: float, n: int = 600) -> dict[str, dict[str, Calibration]]:
    """Both formats and phases, with `threshold` as what any certified rate up to 10 % gives."""
    one = Calibration.fit([threshold] * n, "made up for a test")
    return {form: {"prompt": one, "response": one} for form in ("chat", "raw")}


@pytest.fixture(scope="session")
def random_probe(tiny: LoadedModel) -> ProbeWeights:
    torch.manual_seed(1)
    return ProbeWeights("random", {LAYER: torch.randn(tiny.d_model) / 8}, 0.25)


class Sink:
    """An observer that keeps every record, and counts like a server's."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.records: list[Record] = []
        self.at: dict[str, float] = {}
        """Request id -> when its newest record came, on the monotonic clock."""
        self._new = threading.Condition()

    def record(self, record: Record) -> None:
        self.metrics.record(record)
        with self._new:
            self.at[record.request_id] = time.monotonic()
            self.records.append(record)
            self._new.notify_all()

    def scored(self, seconds: float, n_tokens: int) -> None:
        self.metrics.scored(seconds, n_tokens)

    def wait(self, n: int, timeout_s: float = 60.0) -> list[Record]:
        """At least n records; the time-out only guards against hanging."""
        with self._new:
            assert self._new.wait_for(lambda: len(self.records) >= n, timeout_s), f"{len(self.records)} of {n} records"
            return list(self.records)

    def of(self, request_id: str) -> list[Record]:
        return sorted((r for r in self.records if r.request_id == request_id), key=lambda r: r.index)


class LiveServer:
    """A server in this process, reached over a real socket."""

    def __init__(self, engine: EmbeddedEngine, model: LoadedModel, sink: Sink, settings: Settings) -> None:
        self.engine, self.model, self.sink = engine, model, sink
        vocabulary = model.module.config.vocab_size
        service = Service(engine, model.template, settings, frozenset({model.name}), vocabulary)
        self.edge = Edge.of(settings, sink.metrics)
        judging = Judging(EmbeddedScorer(engine), model.template, settings, model.name)
        others = other_routes(judging, lambda: engine.live)
        self.app = app = create_app(service, sink.metrics, engine.readiness, self.edge, others)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = self.edge.server_options() | {"log_level": "error"}
        self._server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **options))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def start(self) -> None:
        self.engine.start()
        self._thread.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            time.sleep(0.02)
        raise AssertionError("the server did not come up")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self.engine.stop(0.0)
        self._listener.close()

    def post(self, path: str, body: dict[str, Any], **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": self.model.name} | body, timeout=60, **kwargs)

    def idle(self) -> bool:
        """Waits until nothing runs any more; False if it goes on."""
        deadline = time.monotonic() + 20
        while (busy := self.engine.describe())["active"] or busy["waiting"]:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def metric(self, name: str, **labels: str) -> float:
        return self.sink.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    """A scripted endpoint to stand in front of."""
    fake = FakeUpstream()
    yield fake
    fake.close()


Serve = Callable[..., LiveServer]


@contextlib.contextmanager
def serving(
    model: LoadedModel, probes: list[tuple[ProbeWeights, dict[str, Any]]], folder: Path, **settings: Any
) -> Iterator[LiveServer]:
    """A LiveServer of probes, given as [(probe, card changes)] and published to `folder`."""
    live, chosen = publish(model, probes, folder, **settings)
    sink = Sink()
    server = LiveServer(EmbeddedEngine(model, live, chosen, sink), model, sink, chosen)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(model, [(probe, card changes)], **settings) -> a LiveServer; stopped after the test."""
    with contextlib.ExitStack() as running:
        stores = itertools.count()

        def start(*given: Any, **settings: Any) -> LiveServer:
            return running.enter_context(serving(*given, tmp_path / f"store{next(stores)}", **settings))

        yield start


def publish(
    model: LoadedModel, probes: list[tuple[ProbeWeights, dict[str, Any]]], folder: Path, **settings: Any
) -> tuple[LiveProbes, Settings]:
    """Publish probes to a store and load them as a server does."""
    store = Store(folder, shipped=folder / "none")
    for probe, changes in probes:
        store.publish(make_card(model, probe, **changes), probe.weight, probe.bias)
    chosen = load_settings(store=folder, **settings)
    return load_live(model.served(), store, chosen), chosen


def reference_logits(model: Any, ids: list[int], weight: dict[int, torch.Tensor], bias: float) -> np.ndarray:
    """transformers' output_hidden_states times the weights: what the tap must equal."""
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return (sum(states[layer + 1][0].float() @ w for layer, w in weight.items()) + bias).numpy()
