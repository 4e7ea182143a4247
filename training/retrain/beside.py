"""What features of traffic can't calibrate: answers, and prompts of /v1/completions. Harmless rows at hand can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from rich.console import Console

from monitor.aggregate import Aggregation
from monitor.config import Settings
from monitor.engines.embedded.harvest import answer_values, prompt_values
from monitor.probe import ProbeWeights
from monitor.types import Format, Phase
from probes_store.calibration import Calibration, rows_needed
from probes_store.card import Card, Threshold
from training.calibrate import TARGETS
from training.progress import progress
from training.texts import Reader

ANSWER_TOKENS = 64
_SOURCE = "harmless rows of the frozen files"
_ALSO: tuple[tuple[Format, Phase], ...] = (("chat", Phase.RESPONSE), ("raw", Phase.PROMPT))
Calibrations = dict[Format, dict[Phase, Calibration]]


@dataclass(frozen=True, slots=True)
class Beside:
    """Calibrates a candidate for what the version in service is calibrated for, beside prompts of chat.

    target: the rate to certify; of answers as many as it takes, and a few more, drawn at random
    """

    reader: Reader
    probe: ProbeWeights
    aggregation: Mapping[Phase, Aggregation]
    settings: Settings
    target: float
    console: Console

    def calibrate(self, live: Card, texts: Sequence[str]) -> tuple[Calibrations, str]:
        """texts: harmless prompts that nothing was fitted to. Returns also what is missing, "" for nothing"""
        have = {(form, phase) for form, phases in live.calibration.items() for phase in phases}
        wanted = [(form, phase) for form, phase in _ALSO if (form, phase.value) in have]
        need = rows_needed(self.target)
        if not wanted:
            return {}, ""
        if len(texts) < need:
            return {}, f"{need - len(texts)} more harmless --frozen rows certify answers and completions"
        drawn = min(len(texts), need + need // 20 + 1)  # some answers are empty, and have no value
        some = Random(0).sample(list(texts), drawn)  # noqa: S311 - which rows, not a secret
        found: Calibrations = {}
        missing = []
        for form, phase in wanted:
            values = self._raw(texts) if form == "raw" else self._answers(some)
            if len(values) < need:
                missing.append(f"{len(values)} values of {form} {phase}s are too few to certify {self.target:.2%}")
                continue
            found.setdefault(form, {})[phase] = Calibration.fit(values, _SOURCE)
        return found, "; ".join(missing)

    def _raw(self, texts: Sequence[str]) -> list[float]:
        """One word has no position left to judge."""
        prompts = [self.reader.prompt(text, "raw") for text in texts if len(text.split()) > 1]
        with progress(self.console, "calibrating prompts (raw)", len(prompts)) as tick:
            return prompt_values(self.reader.model, self.probe, self.aggregation, prompts, tick)

    def _answers(self, texts: Sequence[str]) -> list[float]:
        prompts = [self.reader.prompt(text) for text in texts]
        model, settings = self.reader.model, self.settings
        with progress(self.console, "calibrating answers", len(prompts)) as tick:
            return answer_values(model, self.probe, self.aggregation, prompts, settings, ANSWER_TOKENS, tick)


def widened(card: Card, found: Calibrations) -> Card:
    """The card with these as well."""
    calibration = {form: dict(phases) for form, phases in card.calibration.items()}
    thresholds = list(card.thresholds)
    for form, phases in found.items():
        for phase, one in phases.items():
            calibration.setdefault(form, {})[phase.value] = one
            thresholds += [
                Threshold(format=form, phase=phase, target_fpr=rate, threshold=one.threshold(rate))
                for rate in TARGETS
                if one.n >= rows_needed(rate)
            ]
    return card.model_copy(update={"calibration": calibration, "thresholds": tuple(thresholds)})
