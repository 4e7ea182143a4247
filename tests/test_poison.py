"""T24, what training itself promises: the same data and seed are the same bytes, and no conversation lies in two parts.

The rest of T24 (flipped labels, one tenant's near-copies) is retraining's.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import PAIRS
from training.recipe import Recipe, gather

RUNS = 10
ROOT = Path(__file__).parent.parent


@pytest.mark.attack
def test_ten_processes_make_the_same_bytes(tmp_path):
    """`midstream train` with the model that comes along; each process with a hash seed of its own."""
    rows = PAIRS.read_text().splitlines()[:160]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows))
    cards, weights = [], []
    for run in range(RUNS):
        store = tmp_path / f"store-{run}"
        environment = os.environ | {"PYTHONHASHSEED": str(run), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "monitor.cli", "train", "--data", str(data), "--store", str(store)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        (folder,) = store.glob("*/harmful-intent/v*")
        card = json.loads((folder / "card.json").read_text())
        card.pop("created")
        cards.append(card)
        weights.append((folder / "probe.safetensors").read_bytes())
    equal = sum(w == weights[0] for w in weights)
    print(f"\nT24 {equal} of {RUNS} probes have the same bytes, sha256 {cards[0]['sha256'][:16]}")
    assert equal == RUNS and all(card == cards[0] for card in cards)


words = st.sampled_from(["sea", "oak", "tea", "sun", "ink", "SEA", "oak tea"])
texts = st.lists(words, min_size=1, max_size=3).map(" ".join)
row = st.fixed_dictionaries({"text": texts, "label": st.integers(0, 1), "group": st.sampled_from("abcdef")})
files = st.lists(st.lists(row, min_size=1, max_size=25), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, st.integers(0, 1000), st.booleans())
def test_a_leaked_conversation_is_in_one_part_only(tmp_path, found, seed, by_source):
    """Turns of one conversation share a group; the same words in another file, whatever their case, are the same row.
    0 groups and 0 texts are in two of fit, calibrate and test."""
    sure = [{"text": f"always {label} {i}", "label": label} for label in (0, 1) for i in range(12)]
    sources = []
    for number, rows in enumerate([*found, sure]):
        (tmp_path / f"f{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources.append({"file": f"f{number}.jsonl", "by_source": by_source, "calibrate": 0.3, "test": 0.3})
    parts, _ = gather(Recipe(sources=sources, seed=seed), tmp_path)
    groups, identities = defaultdict(set), defaultdict(set)
    for part, rows in parts.items():
        for r in rows:
            # Harmful rows of the calibrate share are tested on: those two are one side, apart from the fit.
            groups[r.group].add("fit" if part == "fit" else "held out")
            identities[r.identity].add(part)
    assert all(len(sides) == 1 for sides in groups.values())
    assert all(len(places) == 1 for places in identities.values())
    total = sum(map(len, parts.values()))
    assert total == len(identities), "no text is there twice"
