"""A token t* that is forced at a chosen position of an answer, and a probe that is fitted to fire on it.

It is forced by sampling parameters alone: a constant bias on a filler and on t*, and a frequency penalty of 2 that
lowers the filler a step at a time until t* overtakes it exactly at position p.
"""

import numpy as np
import torch

from monitor.engines.embedded.harvest import residual_streams
from monitor.probe import ProbeWeights
from training.fit import fit_logistic

LAYER = 1

FILLER, STAR, STOP = ord("a"), ord("*"), ord("!")


def token(model, character):
    (i,) = model.tokenizer(chr(character), add_special_tokens=False)["input_ids"]
    return i


def bias(model, p, after=None):
    """Filler before p, t* at p, then `after` if given. Steps of 2 dwarf the model's own logits, scaled to below 1."""
    star = 101 - 2 * p
    chosen = {token(model, FILLER): 98, token(model, STAR): star}
    if after is not None:
        chosen[after] = star - 0.5
    return {str(i): v for i, v in chosen.items()}


def fit_star_probe(quiet):
    """(probe, threshold), fitted on residual streams of t* among other tokens, as a user would fit one."""
    random = np.random.default_rng(0)
    characters = [c for c in range(33, 127) if c != STAR]
    x, y = [], []
    prompts = []
    for _ in range(120):
        body = "".join(chr(c) for c in random.choice(characters, 30)) + "a" * int(random.integers(0, 30))
        for at in sorted(random.choice(len(body), 3), reverse=True):
            body = body[:at] + chr(STAR) + body[at:]
        prompts.append(quiet.template.encode([{"role": "user", "content": body}]))
    # And in answers: the first word after a prompt, among fillers, and what may follow it.
    for start in (quiet.template.encode([{"role": "user", "content": "go"}]), quiet.template.raw("go on")):
        for p in range(1, 36):
            for follows in ("a", "a*", "!", ""):
                answer = quiet.tokenizer("a" * (p - 1) + "*" + follows, add_special_tokens=False)["input_ids"]
                prompts.append(quiet.template.raw([*start.token_ids, *answer]))
    for index, streams in residual_streams(quiet, prompts, [LAYER]):
        ids = np.array(prompts[index].token_ids)
        x.append(streams[LAYER].double().numpy())
        y.append((ids == token(quiet, STAR)).astype(np.int64))
    fitted = fit_logistic(np.concatenate(x), np.concatenate(y), np.ones(sum(map(len, y))), c=100.0)
    logits = fitted.logits(np.concatenate(x))
    labels = np.concatenate(y)
    low, high = logits[labels == 0].max(), logits[labels == 1].min()
    assert low < high, "the probe must separate t* perfectly for this test to mean anything"
    probe = ProbeWeights("star", {LAYER: torch.from_numpy(fitted.weight).float()}, fitted.bias)
    return probe, float((low + high) / 2)
