"""A certified rate holds on real requests: the shipped probe's values of benign rows, drawn again and again.

`make attack`. The rows are everyday prompts of the probe's own recipe that it was not fitted on.
"""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from monitor.probe import ProbeWeights
from probes_store.calibration import DELTA, Calibration, rows_needed
from probes_store.store import Store, model_slug
from training.recipe import Recipe, gather
from training.report.scores import Judge, score_prompts

DATA = Path(__file__).parents[2] / "shared" / "data"
SPLITS = 200
ALPHAS = (0.005, 0.01, 0.02, 0.05)
MOST = stats.binom.ppf(0.999, SPLITS, DELTA)
"""Of 200 samples whose bound may fail with probability 5 %: 20 or fewer, or something is wrong."""


@pytest.fixture(scope="module")
def benign(demo):
    """Values as served, of all everyday rows that were held back from the fit."""
    if not DATA.is_dir():
        pytest.skip("the recipe's data files are not beside the repository")
    store, slug = Store(), model_slug(demo.name)
    probe = store.load(slug, "harmful-intent", store.live(slug)["harmful-intent"])
    card = probe.card
    parts, _ = gather(Recipe.model_validate(card.fit["recipe"]), DATA)
    texts = [r.text for part in ("calibrate", "test") for r in parts[part] if r.label == 0 and not r.answer]
    weights = ProbeWeights(card.name, probe.weight, probe.bias)
    judge = Judge(demo, weights, card.aggregation["prompt"], card.aggregation["response"])
    values = score_prompts(judge, judge.prompts(texts), (), lambda n: None).values
    return values[np.isfinite(values)]


@pytest.mark.attack
@pytest.mark.parametrize("alpha", ALPHAS)
def test_of_random_samples_no_more_break_their_bound_than_stated(benign, alpha):
    """Samples with replacement: of the rows they are drawn from, the true rate is known exactly."""
    random, broken, rates = np.random.default_rng(0), 0, []
    for _ in range(SPLITS):
        sample = random.choice(benign, max(600, rows_needed(alpha)))
        threshold = Calibration.fit(sample.tolist(), "drawn").threshold(alpha)
        rates.append(float((benign > threshold).mean()))
        broken += rates[-1] > alpha
    print(
        f"\ncertified {alpha:.1%}: broken in {broken} of {SPLITS} samples ({DELTA:.0%} stated), realised rate mean "
        f"{np.mean(rates):.2%}, highest {max(rates):.2%}, over {len(benign)} real benign rows"
    )
    assert broken <= MOST and np.mean(rates) > alpha / 10


@pytest.mark.attack
@pytest.mark.parametrize("alpha", [0.01, 0.02])
def test_of_random_splits_the_other_half_speaks_against_the_bound_no_more_often_than_stated(benign, alpha):
    """Calibrated on one half; the flags of the other half are compared with what the bound allows them at 95 %."""
    random, against, above = np.random.default_rng(1), 0, 0
    for _ in range(SPLITS):
        order = random.permutation(benign)
        half = len(order) // 2
        threshold = Calibration.fit(order[:half].tolist(), "half").threshold(alpha)
        flagged, n = int((order[half:] > threshold).sum()), len(order) - half
        against += stats.binom.sf(flagged - 1, n, alpha) < DELTA
        above += flagged / n > alpha
    print(
        f"\ncertified {alpha:.1%}: the other half is above it in {above} of {SPLITS} splits, by more than chance "
        f"allows at 95 % in {against}"
    )
    assert against <= MOST
