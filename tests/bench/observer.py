"""The observer in float32 and int8 against transformers' forward, cut at the same block and full: tokens/s.

Interleaved. Every side feeds the same streams one token at a time after the same prompts, and keeps its keys and
values. Then, given labelled files, what int8 changes: AUROC, and verdicts at the served threshold.
`python -m tests.bench.observer [CAP_S [FILE.jsonl ...]]`
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from monitor.config import DEMO_MODEL, load_settings
from monitor.engines.identity import locate
from monitor.errors import ConfigInvalid
from monitor.observer.load import load, make
from monitor.observer.session import Cache, Session
from monitor.sequence import Watch
from monitor.types import Phase
from tests.bench.pairs import measure, ratio, say, verdict
from training.evaluate import auroc
from training.load import read_rows

PROMPT, STEPS = 96, 4
STREAMS = (1, 16, 64)
TARGET = 3.0
NOISE = 0.05
CHUNK, GROUP = 128, 8
THREADS = int(os.environ.get("THREADS", os.cpu_count() or 1))  # 1 on a busy machine: threads that wait for each other


class Ours:
    def __init__(self, session: Session, streams: int) -> None:
        self.session, self.ids = session, texts(streams, session.shape.vocabulary)
        self.caches = [Cache(session.shape) for _ in range(streams)]
        session.step([(self.caches[0], self.ids[0][:PROMPT])])
        for i in range(1, streams):  # what a prompt says makes no step slower: one is read for all
            self.caches[i] = self.caches[0].fork()

    def rate(self) -> float:
        """Tokens/s of STEPS steps after the prompts."""
        for cache in self.caches:
            cache.length = PROMPT
        began = time.perf_counter()
        for step in range(PROMPT, PROMPT + STEPS):
            self.session.step([(c, ids[step : step + 1]) for c, ids in zip(self.caches, self.ids, strict=True)])
        return len(self.caches) * STEPS / (time.perf_counter() - began)


class Theirs:
    """A batch without padding: every stream is as long as the others, which real ones are not."""

    def __init__(self, model, streams: int, vocabulary: int) -> None:
        self.model = model
        self.ids = torch.tensor(texts(streams, vocabulary))
        self.cache = DynamicCache()
        with torch.inference_mode():
            self.model(input_ids=self.ids[:1, :PROMPT], past_key_values=self.cache, use_cache=True)
        self.cache.batch_repeat_interleave(streams)

    def rate(self) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for step in range(PROMPT, PROMPT + STEPS):
                self.model(input_ids=self.ids[:, step : step + 1], past_key_values=self.cache, use_cache=True)
        rate = len(self.ids) * STEPS / (time.perf_counter() - began)
        self.cache.crop(-STEPS)
        return rate


def texts(streams: int, vocabulary: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return random.integers(100, vocabulary, (streams, PROMPT + STEPS)).tolist()


def prompt_rate(session: Session) -> float:
    ids = texts(1, session.shape.vocabulary)[0] * 5
    began = time.perf_counter()
    session.score(ids, CHUNK)
    return len(ids) / (time.perf_counter() - began)


def compare(sessions: dict[str, Session], cut, full, cap_s: float) -> None:
    vocabulary = sessions["float32"].shape.vocabulary
    for streams in STREAMS:
        ours = {name: Ours(session, streams) for name, session in sessions.items()}
        theirs = {"cut": Theirs(cut, streams, vocabulary), "full": Theirs(full, streams, vocabulary)}
        rates: dict[str, list[float]] = {}

        def rate(name, one, rates=rates):
            rates.setdefault(name, []).append(one.rate())
            return rates[name][-1]

        for one in (*ours.values(), *theirs.values()):
            one.rate()  # warm
        for name in ours:
            found, _ = measure(
                lambda n=name, o=ours: rate(n, o[n]), lambda t=theirs: rate("cut", t["cut"]), cap_s, NOISE
            )
            said = verdict(found, found.low >= TARGET, found.high < TARGET)
            say(f"{streams} streams, {name} to the cut forward: {found} (target >= {TARGET:g}: {said})")
        pairs = [(rate("float32", ours["float32"]), rate("full", theirs["full"])) for _ in range(6)]
        say(f"{streams} streams, float32 to the full forward: {ratio(pairs)}")
        told = ", ".join(f"{name} {np.median(found):.0f}" for name, found in rates.items())
        say(f"{streams} streams, tokens/s: {told}")


def changes(int8, float32, file: Path) -> None:
    """AUROC of the first probe's prompt value, and verdicts that int8 turns over."""
    rows, _ = read_rows(file)
    values: dict[str, list[float]] = {}
    rules = float32.live.rules["chat"]
    for name, loaded in (("float32", float32), ("int8", int8)):
        session = Session(loaded.built, THREADS)
        encode = loaded.observer.template.encode
        prompts = [encode([{"role": "user", "content": row.text}]) for row in rows]
        begun, shared = Cache(session.shape), loaded.observer.template.opening()
        (head,) = session.step([(begun, shared)])
        for start in range(0, len(prompts), GROUP):
            group = prompts[start : start + GROUP]
            scores = session.step([(begun.fork(), p.token_ids[len(shared) :]) for p in group])
            for prompt, found in zip(group, scores, strict=True):
                watch = Watch(prompt, rules)
                watch.advance(0, np.concatenate([head, found]))
                values.setdefault(name, []).append(watch.readings()[0].value)
    labels = np.array([row.label for row in rows])
    a, b = (np.array(values[name]) for name in ("float32", "int8"))
    before, after = (auroc(v[labels == 1], v[labels == 0]) for v in (a, b))
    threshold = next(r.threshold for r in rules if r.phase is Phase.PROMPT)
    flips = int(((a > threshold) != (b > threshold)).sum())
    say(
        f"{file.name}: AUROC {before:.4f}, int8 {after:.4f} ({after - before:+.4f}); {flips} of {len(rows)} verdicts "
        f"at {threshold:.2f} turn over; a value moves by {np.abs(a - b).mean():.3f}, at most {np.abs(a - b).max():.3f}"
    )


def loaded(settings, int8: bool):
    try:
        return load(settings, int8)
    except ConfigInvalid:  # not built yet
        make(settings, int8)
        return load(settings, int8)


def main() -> None:
    cap_s = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    torch.set_num_threads(THREADS)
    settings = load_settings()
    float32, int8 = loaded(settings, False), loaded(settings, True)
    shape, folder = float32.built.shape, locate(DEMO_MODEL, settings.cache)
    cut = AutoModel.from_pretrained(folder, num_hidden_layers=shape.n_blocks, dtype=torch.float32).eval()
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    say(f"{float32.observer.model.name}, blocks 0 to {shape.n_blocks - 1} of {full.config.num_hidden_layers}")
    say(f"canaries: float32 off by {float32.off:.2g}, int8 by {int8.off:.2g}")
    sessions = {name: Session(one.built, THREADS) for name, one in (("float32", float32), ("int8", int8))}
    for name, session in sessions.items():
        read = np.median([prompt_rate(session) for _ in range(5)])
        say(f"a prompt in chunks of {CHUNK}, {name}: {read:.0f} tokens/s on {THREADS} threads")
    compare(sessions, cut, full, cap_s)
    for file in sys.argv[2:]:
        changes(int8, float32, Path(file))


if __name__ == "__main__":
    main()
