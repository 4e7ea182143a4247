"""Answers fitted where they look worst, which is where they are judged; and rows drawn from many groups."""

import json

import numpy as np
import pytest
import torch

from monitor.aggregate import Aggregation, Running
from training.data import ANSWERS, Row, of_each_group, read_jsonl
from training.peaks import fit_peaks, running_means
from training.recipe import Recipe, gather


@pytest.mark.parametrize("how", [Aggregation("ema"), Aggregation("mean"), Aggregation("ema", alpha=0.5)], ids=str)
def test_the_score_of_a_running_mean_is_the_running_mean_of_scores(how):
    random = np.random.default_rng(0)
    stream, weight = random.normal(size=(40, 6)), random.normal(size=6)
    served = Running([(how, 0, 1)])
    values = []
    for score in stream @ weight:
        served.add([float(score)])
        values.append(served.values[0])
    means = running_means(torch.from_numpy(stream), how.decay)
    assert means.shape == (40, 6)
    np.testing.assert_allclose(means @ weight, values, atol=1e-4)


def made(n=120, tokens=30):
    """Answers whose first tokens look harmful in both classes along one feature, and differ later along another."""
    random = np.random.default_rng(1)
    y = np.arange(n) % 2
    streams = random.normal(0, 0.3, size=(n, tokens, 8))
    streams[:, :4, 0] += 4  # every answer begins alike, with what the harmful ones also have later
    streams[y == 1, 4:, 0] += 1
    streams[y == 1, 4:, 1] += 1
    return streams, y


def test_rounds_pull_down_the_highest_running_mean_of_harmless_answers():
    streams, y = made()
    running = [running_means(torch.from_numpy(s), 15 / 17) for s in streams]
    x, weights = streams.mean(1), np.ones(len(y))

    def gap(fitted):
        """By the served statistic: how far the lowest harmful value lies above the highest harmless one."""
        values = np.array([(r @ fitted.weight).max() for r in running])
        return values[y == 1].min() - values[y == 0].max()

    plain, peaks = (fit_peaks(x, running, y, weights, 0.1, rounds) for rounds in (0, 3))
    assert plain.details["peaks"] == 0 and peaks.details["peaks"] == 3
    assert gap(peaks) > gap(plain)
    assert peaks.weight[1] > peaks.weight[0], "what all answers begin with says less than what only some go on with"
    again = fit_peaks(x, running, y, weights, 0.1, 3)
    assert again.weight.tobytes() == peaks.weight.tobytes()


def test_a_row_of_one_token_stays_what_it_is():
    streams, y = made()
    x = streams.mean(1)
    alone = [row[None].astype(np.float32) for row in x]
    one, other = (fit_peaks(x, alone, y, np.ones(len(y)), 0.1 / k, k - 1) for k in (1, 3))
    np.testing.assert_allclose(one.weight, other.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "given",
    [{"solver": "adam"}, {"solver": "logistic", "response": {"kind": "max"}}, {"solver": "best"}],
    ids=str,
)
def test_peaks_that_nothing_could_serve_are_refused(given):
    with pytest.raises(ValueError, match="peaks"):
        Recipe.model_validate({"sources": [{"file": "a"}], "peaks": 2} | given)


def test_some_rows_of_every_group_and_of_one_split(tmp_path):
    rows = [Row(f"{g} {i}", i % 2, "s", f"g{g}") for g in range(5) for i in range(g * 4)]
    kept = of_each_group(rows, 3, 0)
    assert kept == of_each_group(rows, 3, 0) and len(kept) == 4 + 6 + 6 + 6
    assert {r.group for r in kept} == {"g1", "g2", "g3", "g4"}
    items = [
        {"text": f"t {i}", "label": i % 2, "split": "train" if i < 60 else "evaluate", "group": i % 6}
        for i in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    source = {"file": "a.jsonl", "split": "train", "each": 5, "calibrate": 0, "test": 0.2}
    parts, _ = gather(Recipe.model_validate({"sources": [source]}), tmp_path)
    texts = {r.text for part in parts.values() for r in part}
    assert len(texts) == 30 and texts <= {f"t {i}" for i in range(60)}


def test_our_answers_are_harmless_and_about_requests():
    rows, _ = read_jsonl(ANSWERS)
    assert len(rows) >= 100 and {r.label for r in rows} == {0} and all(r.answer.strip() for r in rows)
