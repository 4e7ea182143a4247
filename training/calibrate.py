"""What a fitted probe's values mean: calibration on harmless rows, probabilities, and what its thresholds then do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from rich.console import Console

from monitor.aggregate import Aggregation
from monitor.config import Settings
from monitor.engines.embedded.harvest import answer_values, given_values, prompt_values
from monitor.probe import ProbeWeights
from monitor.types import Format, Phase
from probes_store.calibration import Calibration, rows_needed
from probes_store.card import Platt, Threshold
from training.data import Row
from training.evaluate import rate
from training.fit import fit_platt
from training.progress import progress
from training.recipe import Recipe
from training.texts import Reader

TARGETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05)
MIN_ROWS = 20
Calibrations = dict[Format, dict[Phase, Calibration]]


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Values as served of any rows, and what follows from them."""

    reader: Reader
    probe: ProbeWeights
    aggregation: Mapping[Phase, Aggregation]
    recipe: Recipe
    settings: Settings
    console: Console

    def values(self, rows: Sequence[Row], label: str, form: Format = "chat") -> list[float]:
        """Of each row: of its prompt, or, where its label is about an answer, of that answer after its prompt."""
        model, read, how = self.reader.model, self.reader, dict(self.aggregation)
        if form == "raw" and self.recipe.raw_prompt is not None:
            how[Phase.PROMPT] = self.recipe.raw_prompt
        values = [float("nan")] * len(rows)
        asked = [i for i, r in enumerate(rows) if not r.answer]
        given = [i for i, r in enumerate(rows) if r.answer]
        with progress(self.console, label, len(rows)) as tick:
            prompts = [read.prompt(rows[i].text, form) for i in asked]
            pairs = [(read.prompt(rows[i].text, form), read.answer(rows[i].answer)) for i in given]
            for i, value in zip(asked, prompt_values(model, self.probe, how, prompts, tick), strict=True):
                values[i] = value
            for i, value in zip(given, given_values(model, self.probe, how, pairs, tick), strict=True):
                values[i] = value
        return values

    def calibrate(self, rows: Sequence[Row]) -> Calibrations:
        """rows: harmless prompts that nothing was fitted to; for answers, this model is asked them"""
        prompts = [r for r in rows if not r.answer]
        if len(prompts) < MIN_ROWS:
            self.console.print(f"[yellow]{len(prompts)} harmless rows are too few to calibrate on: shadow only[/]")
            return {}
        result: Calibrations = {"chat": {}, "raw": {}}
        if Phase.PROMPT in self.recipe.phases:
            first = self.recipe.max_text_tokens
            source = f"held-out harmless prompts of the training files, the first {first} tokens of each"
            for form, phases in result.items():
                usable = prompts if form == "chat" else [r for r in prompts if len(r.text.split()) > 1]
                values = self.values(usable, f"calibrating prompts ({form})", form)
                lengths = [len(self.reader.prompt(r.text, form).token_ids) for r in usable]
                phases[Phase.PROMPT] = Calibration.fit(values, source, lengths=lengths)
        # Raw text has no answer in the sense of a dialogue; without a calibration a probe can only shadow it.
        if self.recipe.answers and Phase.RESPONSE in self.recipe.phases:
            # The rows lie by source: the first ones are of few.
            some = Random(self.recipe.seed).sample(prompts, min(self.recipe.answers, len(prompts)))  # noqa: S311
            result["chat"][Phase.RESPONSE] = self._answers([r.text for r in some])
        return {form: phases for form, phases in result.items() if phases}

    def _answers(self, texts: Sequence[str]) -> Calibration:
        """Of this model's own answers, through the serving engine."""
        prompts = [self.reader.prompt(text) for text in texts]
        limit = self.recipe.answer_tokens
        with progress(self.console, "calibrating answers (chat)", len(prompts)) as tick:
            values = answer_values(self.reader.model, self.probe, self.aggregation, prompts, self.settings, limit, tick)
        return Calibration.fit(values, f"this model's answers of up to {limit} tokens to held-out harmless prompts")

    def platt(self, rows: Sequence[Row], values: Sequence[float]) -> Platt | None:
        """Probabilities of prompts, from rows that nothing was fitted to and their values; None if one label is
        missing. Values of answers are others', and are left out."""
        asked = [(r, v) for r, v in zip(rows, values, strict=True) if not r.answer]
        rows, values = [r for r, _ in asked], [v for _, v in asked]
        labels = np.array([r.label for r in rows])
        if len(set(labels.tolist())) < 2:
            return None
        slope, intercept = fit_platt(np.array(values), labels)
        if slope <= 0:
            self.console.print("[yellow]higher values are not more harmful on the held-out rows: no probabilities[/]")
            return None
        return Platt(slope=slope, intercept=intercept, n=len(rows), positive=int(labels.sum()))

    def thresholds(
        self, calibrations: Calibrations, rows: Sequence[Row], values: Sequence[float]
    ) -> tuple[Threshold, ...]:
        """For reading, in the card: what certified thresholds do on harmless rows that nothing was fitted to."""
        harmless = [v for r, v in zip(rows, values, strict=True) if r.label == 0 and not r.answer]
        table = []
        for form, phases in calibrations.items():
            for phase, calibrated in phases.items():
                for target in TARGETS:
                    if calibrated.n >= rows_needed(target):
                        seen = harmless if form == "chat" and phase is Phase.PROMPT else []
                        table.append(_threshold(form, phase, target, calibrated.threshold(target), seen))
        return tuple(table)


def _threshold(form: Format, phase: Phase, target: float, threshold: float, values: Sequence[float]) -> Threshold:
    known = {}
    if values:
        seen = rate(values, threshold)
        known = {"observed_fpr": seen["rate"], "fpr_low": seen["low"], "fpr_high": seen["high"]}
    return Threshold(
        format=form, phase=phase.value, target_fpr=target, threshold=threshold, test_rows=len(values), **known
    )
