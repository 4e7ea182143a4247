"""Rows to harvest, and a harvest of them with the tiny model: three blocks, two poolings, five rows a shard."""

from training.data import Row
from training.harvest import Sample, harvest, make_plan

LAYERS = (0, 2, 3)
TEXTS = [f"{'red green blue ' * (i % 5)}{i}" for i in range(23)]
SAMPLES = [Sample.of(Row(text, i % 2, "abc"[i % 3], str(i))) for i, text in enumerate(TEXTS)]
CHAT = Sample((("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "What is 2 + 2?")), 0, "chat")


def run(model, folder, samples=SAMPLES, progress=lambda n: None, **changes):
    fields = {"layers": LAYERS, "poolings": ("mean", "last"), "shard_rows": 5} | changes
    return harvest(model, samples, folder, make_plan(model, samples, **fields), progress)
