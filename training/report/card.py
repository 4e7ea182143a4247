"""The figures of a recipe's evaluation sets, for the card of the probe that was just trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from training.data import Part, Row, same_text
from training.evaluate import rate, separation
from training.floor import tfidf_scores
from training.load import stem
from training.progress import progress
from training.recipe import Recipe
from training.report.scores import Judge, score_prompts
from training.report.sets import read_set


def evaluate_sets(
    judge: Judge,
    recipe: Recipe,
    parts: Mapping[Part, Sequence[Row]],
    tested: Sequence[float],
    folder: Path,
    threshold: float,
    console: Console | None = None,
) -> dict[str, Any]:
    """The sets under the recipe's `evaluate`, read here for the first time, and its own rows that were held back.

    tested: values of the test rows; threshold: of prompts; returns what a card keeps as `metrics.evaluation`
    raises: ConfigInvalid if a file can't be read
    """
    seen = {same_text(r.text) for part in ("fit", "calibrate") for r in parts[part]}
    concept = recipe.kind == "concept"
    sets: dict[str, Sequence[Row]] = {
        stem(file): [r for r in read_set(file, folder, concept)[0] if same_text(r.text) not in seen]
        for file in recipe.evaluate
    }
    read = [r for of in sets.values() for r in of]
    # The others' labels are about their answers.
    held = [(r, v) for r, v in zip(parts["test"], tested, strict=True) if not r.answer]
    own = {"unseen_harmful": [(r, v) for r, v in held if r.label == 1]}
    everyday = [(r, v) for r, v in held if r.label == 0]
    for source in sorted({r.source for r, _ in everyday}):
        own[f"harmless_{source}"] = [(r, v) for r, v in everyday if r.source == source]
    sets |= {name: [r for r, _ in of] for name, of in own.items()}
    rows = [r for of in sets.values() for r in of]
    prompts = judge.prompts([r.text for r in read])
    with progress(
        console or Console(stderr=True), "evaluating, tokens", sum(len(p.token_ids) for p in prompts)
    ) as tick:
        values = score_prompts(judge, prompts, (), tick).values.tolist()
    values += [v for of in own.values() for _, v in of]
    words = tfidf_scores(parts["fit"], [r.text for r in rows])
    report: dict[str, Any] = {}
    start = 0
    for name, of in sets.items():
        here = slice(start, start := start + len(of))
        if of:
            report[name] = _entry(of, values[here], words[here], threshold)
    if everyday:
        report["harmless_test"] = {"fpr": rate(values[len(rows) - len(everyday) :], threshold)}  # they come last
    return {"prompt_threshold": threshold, "sets": report}


def _entry(rows: Sequence[Row], values: Sequence[float], words: Sequence[float], threshold: float) -> dict[str, Any]:
    by_probe, by_words = ({label: _of(rows, v, label) for label in (1, 0)} for v in (values, words))
    entry: dict[str, Any] = {
        word: rate(by_probe[label], threshold) for label, word in ((1, "recall"), (0, "fpr")) if by_probe[label]
    }
    if by_probe[0] and by_probe[1]:
        entry["auroc"] = separation(by_probe[1], by_probe[0])
        entry["tfidf"] = separation(by_words[1], by_words[0])
    return entry


def _of(rows: Sequence[Row], values: Sequence[float], label: int) -> list[float]:
    return [v for v, r in zip(values, rows, strict=True) if r.label == label]
