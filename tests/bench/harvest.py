"""Harvest against plain transformers with `output_hidden_states=True`, in pairs: tokens/s, ratios, agreement.

The same texts, of 10 to 300 tokens in no order, through the chat template; what is kept is the mean over a row's
tokens. Plain: one row a pass, and 16 padded rows a pass, on the model as transformers loads it. Ours at the middle
block, which is what `midstream harvest` reads unless it is told otherwise, and at all blocks.
`python -m tests.bench.harvest [CAP_S [ROWS]]`: seconds for each of the four comparisons, and how many texts.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from monitor.config import cache_dir
from monitor.engines.demo import demo_model
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.types import Prompt
from tests.bench.pairs import measure, say, verdict
from training.data import PAIRS
from training.harvest import Sample, harvest, make_plan

ROWS, BATCH, THREADS = 64, 16, 2
LONGEST = 300
ALONE, BATCHED = 3.0, 1.5
NOISE = 0.03
"""Half-width of a time ratio at which a comparison ends."""


def samples(model: LoadedModel, n: int) -> list[Sample]:
    """Our own pairs, joined and cut to lengths that are as likely in each octave."""
    chance = random.Random(0)
    texts = [json.loads(line)["text"] for line in PAIRS.read_text().splitlines()]
    rows = []
    for i in range(n):
        wanted = round(10 * (LONGEST / 10) ** chance.random())
        words = " ".join(chance.sample(texts, 25))
        offsets = model.tokenizer(words, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        rows.append(Sample((("user", words[: offsets[wanted - 1][1]]),), i % 2, "bench"))
    return rows


def plain(module: torch.nn.Module, prompts: Sequence[Prompt], batch: int, layers: Sequence[int]) -> np.ndarray:
    """(n, n_layers, d) means over the counted positions, as one writes it without Midstream."""
    out = []
    with torch.inference_mode():
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            longest = max(len(p.token_ids) for p in part)
            ids = torch.tensor([[*p.token_ids, *[0] * (longest - len(p.token_ids))] for p in part])
            mask = torch.tensor([[1] * len(p.token_ids) + [0] * (longest - len(p.token_ids)) for p in part])
            states = module(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            for row, prompt in enumerate(part):
                turn = prompt.turns[-1]
                kept = [states[layer + 1][row, turn.start : turn.end].mean(0) for layer in layers]
                out.append(torch.stack(kept).numpy())
    return np.stack(out)


def ours(model: LoadedModel, rows: Sequence[Sample], layers: Sequence[int]) -> np.ndarray:
    """To shards on the disk and back, as the command does."""
    with tempfile.TemporaryDirectory() as folder:
        made = harvest(model, rows, Path(folder) / "shards", make_plan(model, rows, layers))
        return np.concatenate([shard.features["mean"] for shard in made.shards()])


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    cap_s = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    n = int(sys.argv[2]) if len(sys.argv) > 2 else ROWS
    torch.set_num_threads(THREADS)
    folder = demo_model(cache_dir())
    model = load_model(str(folder), cache=cache_dir())
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = samples(model, n)
    prompts = [model.template.encode([{"role": role, "content": text} for role, text in r.messages]) for r in rows]
    tokens = sum(len(p.token_ids) for p in prompts)
    say(f"{n} rows, {tokens} tokens with the template, {THREADS} threads, float32")
    every = list(range(model.n_layers - 1))
    # Transformers gives the last block after its final norm: no stream, and left out of the comparison.
    few = rows[:4], prompts[:4]
    off = np.abs(ours(model, few[0], every) - plain(module, few[1], 1, every)).max(axis=(0, 2))
    largest = np.abs(plain(module, few[1], 1, every)).max(axis=(0, 2))
    say(f"largest difference of a feature, as a share of its block's largest: {(off / largest).max():.1e}")
    for name, layers in (("middle block", [model.n_layers // 2]), ("all blocks", list(range(model.n_layers)))):
        for batch, target in ((1, ALONE), (BATCH, BATCHED)):
            kept = [layer for layer in layers if layer in every]
            found, pairs = measure(
                lambda batch=batch, kept=kept: seconds(lambda: plain(module, prompts, batch, kept)),
                lambda layers=layers: seconds(lambda: ours(model, rows, layers)),
                cap_s,
                NOISE * target,
            )
            speeds = [tokens / float(np.median(side)) for side in zip(*pairs, strict=True)]
            said = verdict(found, found.low >= target, found.high < target)
            say(
                f"{name}, against batches of {batch}: {speeds[1]:.0f} tokens/s to {speeds[0]:.0f}, ratio {found} "
                f"(target >= {target:g}: {said})"
            )


if __name__ == "__main__":
    main()
