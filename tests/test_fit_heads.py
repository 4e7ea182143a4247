"""Fitted heads: each finds what was planted for it and the mean misses, and what is fitted is what a Watch serves."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from monitor.engines.embedded.harvest import score_streams
from monitor.policy.rule import Rule
from monitor.probe import ProbeBank
from monitor.sequence import Watch
from monitor.types import Mode, Phase, Prompt, Turn
from training.heads import FittedHead, HeadRecipe, fit_head, partial_auc, pooled

F = 12
MEAN = HeadRecipe("mean", steps=200, lr=1e-2)


def noise(random, n, shortest=40, longest=60):
    return [random.normal(0, 1, (random.integers(shortest, longest), F)) for _ in range(n)]


def needle(random, n=300):
    """One token of fifty in a harmful text; what the whole text is about moves the mean more."""
    texts, labels = noise(random, n), np.arange(n) % 2
    for x, label in zip(texts, labels, strict=True):
        x[:, 0] += random.normal(0, 1)
        x[random.integers(len(x)), 0] += 12.0 * label
    return texts, labels


def last_token(random, n=300):
    """Evidence counts in the last token alone; elsewhere it is as frequent in both."""
    texts, labels = noise(random, n), np.arange(n) % 2
    for x, label in zip(texts, labels, strict=True):
        x[:-1, 0] += random.normal(0, 3)
        x[-1, 0] = random.normal(3 if label else -3, 1)
    return texts, labels


def two_needles(random, n=400):
    """Harmful: one of each kind. Harmless: two of the same kind, so that no sum tells them apart."""
    texts, labels = noise(random, n), np.arange(n) % 2
    for x, label in zip(texts, labels, strict=True):
        first, second = random.choice(len(x), 2, replace=False)
        kind = random.integers(2)
        x[first, kind] += 12.0
        x[second, 1 - kind if label else kind] += 12.0
    return texts, labels


def stretch(random, n=300):
    """Harmful: twelve tokens in a row. Harmless: as many, here and there."""
    texts, labels = noise(random, n, 200, 300), np.arange(n) % 2
    for x, label in zip(texts, labels, strict=True):
        start = random.integers(len(x) - 12)
        x[np.arange(start, start + 12) if label else random.choice(len(x), 12, replace=False), 0] += 4.0
    return texts, labels


def auroc(recipe, made, seed=0):
    random = np.random.default_rng(seed)
    texts, labels = made(random)
    fitted = fit_head([x.astype(np.float16) for x in texts], labels, np.ones(len(labels)), recipe)
    texts, labels = made(random)
    return float(roc_auc_score(labels, fitted.values(texts)))


@pytest.mark.parametrize(
    ("made", "recipe"),
    [
        (needle, HeadRecipe("attention", heads=1, steps=300, lr=1e-2)),
        (needle, HeadRecipe("rolling_attention", heads=1, window=5, steps=300, lr=1e-2)),
        (needle, HeadRecipe("multimax", heads=1, steps=300, lr=1e-2)),
        (last_token, HeadRecipe("mean_last", steps=300, lr=1e-2)),
        (two_needles, HeadRecipe("multimax", heads=2, steps=400, lr=3e-2)),
        (stretch, HeadRecipe("swim", window=12, steps=300, lr=1e-2)),
    ],
    ids=lambda part: part.pooling if isinstance(part, HeadRecipe) else part.__name__,
)
def test_a_head_finds_what_the_mean_can_not(made, recipe):
    mean, head = auroc(MEAN, made), auroc(recipe, made)
    print(f"{made.__name__}: mean {mean:.3f}, {recipe.pooling} {head:.3f}")
    assert mean < 0.8 and head > 0.95


def test_the_low_fpr_objective_finds_what_tells_look_alikes_from_harm():
    """Six in a hundred harmless texts look more harmful than harm but for a feature that, over all, speaks for harm."""

    def made(random, n=3000):
        labels = (np.arange(n) % 2).astype(np.int64)
        alike = (labels == 0) & (random.random(n) < 0.06)
        x = random.normal(0, 1, (n, 4))
        x[:, 0] += np.where(labels == 1, 2.0, np.where(alike, 3.0, -4.0))
        x[:, 1] += np.where(labels == 1, 0.0, np.where(alike, 5.0, -2.0))
        return [row[None] for row in x], labels

    def recall(recipe):
        random = np.random.default_rng(0)
        texts, labels = made(random)
        fitted = fit_head(texts, labels, np.ones(len(labels)), recipe)
        texts, labels = made(random)
        values = fitted.values(texts)
        return float((values[labels == 1] > np.quantile(values[labels == 0], 0.99)).mean())

    plain, low = (recall(HeadRecipe("mean", steps=150, batch=512, lr=3e-2, low_fpr=w)) for w in (0.0, 0.3))
    print(f"recall at 1 % FPR: {plain:.3f}, with the objective {low:.3f}")
    assert plain < 0.1 and low > 0.5


def test_the_objective_sees_the_highest_harmless_values_alone():
    harmful, harmless = torch.tensor([2.0, 0.0]), torch.tensor([-9.0, 1.0, -50.0, -1e6])
    expected = torch.nn.functional.softplus(torch.tensor([1.0 - 2.0, 1.0 - 0.0])).mean()
    assert partial_auc(harmful, harmless, 0.25) == pytest.approx(float(expected))
    assert partial_auc(harmful, harmless, 0.26) < partial_auc(harmful, harmless, 0.25)  # two of four


RECIPES = [
    HeadRecipe(pooling, heads=2, window=4, steps=5, batch=8)
    for pooling in ("mean", "swim", "mean_last", "multimax", "attention", "rolling_attention")
]


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(3)
    texts = [5 + 3 * random.normal(0, 1, (n, 2 * F)) for n in (1, 2, 3, 4, 5, 9, 17, 30)]
    return [x.astype(np.float16) for x in texts], np.array([0, 1] * 4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.pooling)
def test_what_is_fitted_is_what_is_served(rows, recipe):
    texts, labels = rows
    fitted = fit_head(texts, labels, np.ones(len(texts)), recipe)
    probe = fitted.probe("p", layers=(3, 1))
    bank, how = ProbeBank([probe], F), fitted.aggregation
    assert probe.k == recipe.k == len(bank)
    rule = Rule("p", "v1", 0, Phase.PROMPT, Mode.SHADOW, None, how, "open", n_columns=probe.k)
    served, trained = [], []
    for x in texts:
        streams = {layer: torch.from_numpy(part).float() for layer, part in zip((3, 1), np.split(x, 2, 1), strict=True)}
        scores = score_streams(bank, streams)
        watch = Watch(Prompt(tuple(range(len(x))), (Turn(0, len(x)),), 0, "chat"), [rule])
        watch.advance(0, scores)
        served.append(watch.readings()[0].value)
        padded = np.concatenate([scores, np.repeat(scores[-1:], recipe.window, axis=0)])  # as in a batch
        value = pooled(recipe.pooling, recipe.window, torch.from_numpy(padded)[None], torch.tensor([len(x)]))
        trained.append(float(value))
    assert fitted.values(texts) == pytest.approx(served, rel=1e-4, abs=1e-4)
    if recipe.pooling != "swim":  # trained on sliding means, served as a moving average
        assert trained == pytest.approx(served, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.pooling)
def test_the_same_data_and_seed_give_the_same_bytes(rows, recipe):
    texts, labels = rows

    def bytes_of(weights):
        fitted: FittedHead = fit_head(texts, labels, weights, recipe)
        assert np.isfinite(fitted.weight).all()
        return fitted.weight.tobytes() + fitted.bias.tobytes()

    even = np.ones(len(texts))
    assert bytes_of(even) == bytes_of(even) != bytes_of(np.arange(1.0, 9.0))


def test_a_constant_feature_and_a_text_of_weight_0_change_nothing(rows):
    texts, labels = rows
    recipe, even = HeadRecipe("attention", heads=1, steps=30, batch=8), np.ones(len(texts))
    still = [np.concatenate([x, np.full((len(x), 1), 7.0, np.float16)], axis=1) for x in texts]
    fitted = fit_head(still, labels, even, recipe)
    assert np.abs(fitted.weight[:, -1]).max() < 1.0
    even[2] = 0.0
    one = fit_head(texts, labels, even, recipe)
    other = fit_head(texts, np.where(np.arange(8) == 2, 1, labels), even, recipe)
    assert np.array_equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t, y, w: (t[:-1], y, w), "7 texts, 8 labels and 8 weights"),
        (lambda t, y, w: ([*t[:-1], t[0][:0]], y, w), "no token"),
        (lambda t, y, w: (t, np.ones_like(y), w), "no training text has label 0"),
        (lambda t, y, w: (t, y, np.where(y, 0.0, w)), "no training text has label 1"),
        (lambda t, y, w: ([t[0] * np.float16(np.nan), *t[1:]], y, w), "not finite"),
    ],
)
def test_what_can_not_be_fitted_is_refused(rows, change, named):
    texts, labels = rows
    with pytest.raises(ValueError, match=named):
        fit_head(*change(texts, labels, np.ones(len(texts))), RECIPES[0])
