"""A prompt, rules and rows of scores, and the steps in which an engine gives them to a Watch."""

import numpy as np

from monitor.aggregate import Aggregation
from monitor.policy.rule import Rule
from monitor.types import Mode, Phase, Prompt, Turn


def prompt(n, turns=None, newest=0):
    return Prompt(tuple(range(n)), turns or (Turn(min(1, n - 1), n),), newest, "chat")


def rule(phase, mode=Mode.BLOCK, threshold=5.0, kind="max", column=0, fail_mode="closed", **more):
    return Rule(f"p{column}", "v1", column, phase, mode, threshold, Aggregation(kind), fail_mode, **more)


def both(**kwargs):
    return [rule(Phase.PROMPT, **kwargs), rule(Phase.RESPONSE, **kwargs)]


def rows(*values):
    return np.array(values, dtype=np.float32).reshape(len(values), -1)


def generate(watch, scores, n_answer, finish="length"):
    """As an engine does: the prompt in one step, then the row of each token one step after it was sampled."""
    n = watch.n_prompt
    seen = [watch.advance(0, scores[:n], n_new=1, finish=finish if n_answer == 1 else None)]
    for i in range(1, n_answer):
        if seen[-1].finish:
            break
        last = i == n_answer - 1
        seen.append(watch.advance(n + i - 1, scores[n + i - 1 : n + i], 1, finish if last else None))
    return seen
