"""Embedded engine: tokens/s of 8 streams against one, and of monitored steps against unmonitored ones."""

import queue
import statistics
import time

import torch

from monitor.aggregate import Aggregation
from monitor.config import DEMO_MODEL, cache_dir, load_settings
from monitor.engines.embedded.engine import EmbeddedEngine
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.live import LiveProbes
from monitor.policy.rule import Rule
from monitor.probe import ProbeBank, ProbeWeights
from monitor.types import GenerationRequest, Mode, Phase, Sampling
from tests.bench.pairs import ratio, say

TOKENS = 48
PAIRS = 6


class Quiet:
    def record(self, record):
        return None

    def scored(self, seconds, n_tokens):
        return None


def engine_with(model: LoadedModel, n_probes: int) -> EmbeddedEngine:
    torch.manual_seed(0)
    layer = model.n_layers // 2
    probes = [ProbeWeights(f"p{i}", {layer: torch.randn(model.d_model) / 24}, 0.0) for i in range(n_probes)]
    rules = tuple(
        Rule(p.name, "v1", i, phase, Mode.BLOCK, 1e9, Aggregation("ema"), "closed")
        for i, p in enumerate(probes)
        for phase in Phase
    )
    live = LiveProbes.under_rules(ProbeBank(probes, model.d_model), {"chat": rules, "raw": rules})
    engine = EmbeddedEngine(model, live, load_settings(), Quiet())
    engine.start()
    return engine


def tokens_per_second(engine: EmbeddedEngine, model: LoadedModel, streams: int) -> float:
    prompt = model.template.encode([{"role": "user", "content": "Write about the sea."}])
    deltas: queue.Queue = queue.Queue()
    sampling = Sampling(TOKENS, temperature=0, logit_bias=dict.fromkeys(model.eos_ids, -100.0))
    began = time.perf_counter()
    for i in range(streams):
        engine.submit(GenerationRequest(str(i), (prompt,), 1, sampling), deltas.put)
    tokens = ended = 0
    while ended < streams:
        delta = deltas.get()
        tokens += delta.n_tokens
        ended += delta.finish is not None
    return tokens / (time.perf_counter() - began)


def main() -> None:
    model = load_model(DEMO_MODEL, cache=cache_dir())
    say(f"{model.name}, {model.dtype}, {torch.get_num_threads()} threads, {TOKENS} tokens a stream, {PAIRS} pairs")

    engine = engine_with(model, 1)
    tokens_per_second(engine, model, 8)  # warm
    pairs = [(tokens_per_second(engine, model, 8), tokens_per_second(engine, model, 1)) for _ in range(PAIRS)]
    engine.stop(0.0)
    many, one = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    say(f"8 streams {many:.1f} tokens/s, 1 stream {one:.1f}: ratio {ratio(pairs)} (target >= 2.5)")

    for n_probes in (1, 8):
        pairs = []
        for i in range(PAIRS):
            rates = {}
            for k in (n_probes, 0) if i % 2 else (0, n_probes):
                engine = engine_with(model, k)
                rates[k] = tokens_per_second(engine, model, 8)
                engine.stop(0.0)
            pairs.append((rates[n_probes], rates[0]))
        say(f"{n_probes} probes against none, 8 streams: ratio {ratio(pairs)}")


if __name__ == "__main__":
    main()
