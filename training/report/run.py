"""`midstream evaluate`: one probe on every set that it has not seen, at one global threshold, its floors beside it.

Nothing is tuned here: threshold, probabilities and weights are the card's. The results go to report.json; report.html
and evasion.json are made of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from monitor import __version__
from monitor.config import Settings
from monitor.engines.embedded.model import load_model
from monitor.errors import ConfigInvalid
from monitor.probe import ProbeWeights
from probes_store.calibration import Calibration, rows_needed
from probes_store.store import Store, StoredProbe, model_slug
from training.data import Row
from training.floor import tfidf_scores
from training.frozen import check_canaries, must_match
from training.metrics import Array, Unsupported, conformal_threshold
from training.progress import progress
from training.report import figures as figures
from training.report.answers import answer_figures
from training.report.attacks import DOCUMENTS, LENGTHS, attack_rows, attack_table, needle_table
from training.report.floors import Controls, fit_sample, sweep
from training.report.overall import over_all
from training.report.scores import Judge, Scored, score_answers, score_prompts
from training.report.sets import MOST_ANSWERS, MOST_ROWS, answer_sets, held_back, prompt_sets
from training.trained import Trained
from training.transforms import TRANSFORMS

RATES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05)


@dataclass(frozen=True, slots=True)
class Options:
    """target_fpr: of prompts, and of answers; requests_a_day: for the false alarms; others: files of sets of your own;
    most: rows of a set; attacks: the attacks and the long texts too, half of the time"""

    target_fpr: float = 0.01
    requests_a_day: float = 100_000
    others: tuple[str, ...] = ()
    most: int = MOST_ROWS
    attacks: bool = True


def evaluate(
    settings: Settings, given: str | None, data: Path, out: Path, options: Options | None = None
) -> dict[str, Any]:
    """Write report.json, report.html and evasion.json into `out`; returns the report.

    given: NAME[@VERSION], by default the live probe, if there is one; data: the folder of the sets, and of the files
    that the probe's recipe names
    raises: ConfigInvalid, ProbeInvalid, ProbeMismatch
    """
    from training.report.view import report_page

    if not data.is_dir():
        raise ConfigInvalid(f"--data {str(data)!r} is not a folder; name the one that the sets lie in")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigInvalid(f"--out {str(out)!r} can't be made: {error.strerror}") from error
    probe = _choose(Store(settings.store), model_slug(settings.model), given)
    report = Evaluation(settings, probe, data, options or Options()).run()
    (out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    (out / "report.html").write_text(report_page(report), encoding="utf-8")
    if report["attacks"]:
        evasion = {name: report[name] for name in ("probe", "thresholds", "attacks")}
        (out / "evasion.json").write_text(json.dumps(evasion, indent=1) + "\n")
    return report


def _choose(store: Store, slug: str, given: str | None) -> StoredProbe:
    """raises: ConfigInvalid if the store has no such probe, or several and none is named"""
    if given is None:
        live = store.live(slug)
        if len(live) != 1:
            raise ConfigInvalid(f"name a probe; the store has {', '.join(live) or 'none'} for model {slug!r}")
        return store.load(slug, *next(iter(live.items())))
    name, _, version = given.partition("@")
    if name not in store.probes(slug):
        raise ConfigInvalid(f"there is no probe {name!r} for model {slug!r} in the store; see `midstream probes`")
    return store.load(slug, name, version or store.live(slug).get(name) or str(store.newest(slug, name)))


class Evaluation:
    """One run. Holds the model once; every text is computed once."""

    def __init__(self, settings: Settings, stored: StoredProbe, data: Path, options: Options) -> None:
        self.stored, self.card, self.data, self.options = stored, stored.card, data, options
        self.console, self.notes = Console(stderr=True), list[str]()
        self.thresholds = {phase: self._threshold(phase) for phase in ("prompt", "response")}
        if not any(self.thresholds.values()):
            raise ConfigInvalid(
                f"{self.card.name}@{self.card.version} is not calibrated: there is no threshold to report"
            )
        self.trained = Trained.of(self.card, data)
        self.parts = self.trained.parts
        if self.trained.missing:
            self.notes.append(
                "no text floor, no controls, no everyday rows and no attacks, and rows that the probe has seen are not "
                f"told from others: {self.trained.missing}"
            )
        with self.console.status(f"loading {settings.model} …"):
            dtype = settings.dtype or self.card.model.dtype
            self.model = load_model(settings.model, cache=settings.cache, revision=settings.revision, dtype=dtype)
        must_match(stored, self.model)
        self.canaries = check_canaries(stored, self.model)
        how = self.card.aggregation
        weights = ProbeWeights(self.card.name, stored.weight, stored.bias)
        recipe = self.trained.recipe
        longest = 512 if recipe is None else recipe.max_text_tokens
        self.judge = Judge(self.model, weights, how["prompt"], how["response"], longest)

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        report: dict[str, Any] = {"schema": "midstream-report/1", "probe": self._identity()}
        prompt, response = self.thresholds["prompt"], self.thresholds["response"]
        report |= {} if prompt is None else self._prompts(prompt["value"])
        harm = self.card.kind == "harm"
        report["answers"] = self._answers(response["value"]) if response is not None and harm else {}
        report |= {"attacks": {}, "needles": []}
        if prompt is not None and harm and self.options.attacks:
            report |= self._attacks(prompt["value"])
        report["left_out"] = self.card.metrics.get("left_out", {})
        report["bars"] = figures.bars(report)
        return report | {
            "thresholds": self.thresholds,
            "target_fpr": self.options.target_fpr,
            "requests_a_day": self.options.requests_a_day,
            "max_text_tokens": self.judge.max_text_tokens,
            "cut_as_calibrated": self.trained.recipe is not None,
            "notes": self.notes,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": __version__,
            "seconds": round(time.monotonic() - began),
        }

    def _identity(self) -> dict[str, Any]:
        card = self.card
        return {
            "name": card.name,
            "version": card.version,
            "kind": card.kind,
            "model": card.model.name,
            "n_layers": card.model.n_layers,
            "layers": list(card.layers),
            "aggregation": {phase: how.kind for phase, how in card.aggregation.items()},
            "sha256": card.sha256,
            "canaries_off_by": self.canaries,
        }

    def _threshold(self, phase: Any) -> dict[str, Any] | None:
        """What the card certifies in chat; None, said in a note, without a threshold at the target rate."""
        calibration = self.card.calibration.get("chat", {}).get(phase)
        target = self.options.target_fpr
        try:
            if calibration is None:
                raise ValueError(f"the card has no calibration of the {phase}")
            value = calibration.threshold(target)
        except ValueError as error:
            self.notes.append(f"nothing about the {phase}: {error}")
            return None
        others = {str(rate): calibration.threshold(rate) for rate in RATES if calibration.n >= rows_needed(rate)}
        try:
            conformal = conformal_threshold(calibration, target)
        except Unsupported:
            conformal = None
        found = {"target_fpr": target, "value": value, "n": calibration.n, "conformal": conformal}
        return found | {"source": calibration.source, "certified": others}

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _prompts(self, threshold: float) -> dict[str, Any]:
        seen, trained = self.trained.texts, self.trained.files
        folder = self.data if self.card.kind == "harm" else None  # a concept is no harm
        sets, notes = prompt_sets(folder, self.options.others, trained, seen, self.options.most)
        self.notes += notes
        sets += held_back(self.parts["test"], self.options.most)
        if not sets:
            self.notes.append("nothing about requests: there is no set of them; name one with --set, or another --data")
            return {}
        layers = sorted({0, *self.card.layers})
        controls, swept = self._floors(layers)
        scored = self._score([r for s in sets for r in s.rows], layers, "sets")
        words = self._words([r.text for s in sets for r in s.rows])
        judged, start = [], 0
        for s in sets:
            rows = slice(start, start := start + len(s.rows))
            judged.append(figures.Judged(s, scored.at(rows), None if words is None else words[0][rows]))
        at = figures.At(threshold, None if words is None else words[1], self._levels())
        found = figures.of_sets(judged, at, controls, self.options.requests_a_day)
        return found | over_all(judged, at, self.card) | {"sweep": swept}

    def _levels(self) -> tuple[tuple[int, float], ...]:
        """Of prompts in chat by length, where the card's rows can certify them."""
        try:
            return self.card.calibration["chat"]["prompt"].by_length(self.options.target_fpr)
        except ValueError as error:
            self.notes.append(f"no thresholds by length: {error}")
            return ()

    def _score(self, rows: Sequence[Row], layers: Sequence[int], label: str) -> Scored:
        prompts = self.judge.prompts([r.text for r in rows])
        with progress(self.console, f"{label}, tokens", sum(len(p.token_ids) for p in prompts)) as tick:
            return score_prompts(self.judge, prompts, layers, tick)

    def _floors(self, layers: Sequence[int]) -> tuple[Controls | None, dict[str, Any]]:
        if not self.parts["fit"]:
            return None, {}
        rows = fit_sample(self.parts["fit"])
        blocks = range(self.model.n_layers)
        features = self._score(rows, blocks, "a sample of the training rows at every block").features
        with self.console.status("fitting the floors …"):
            return Controls(rows, features, self.card.layers), sweep(rows, features)

    def _words(self, texts: Sequence[str]) -> tuple[Array, float | None] | None:
        """TF-IDF's values, and the threshold that its own calibration rows certify."""
        if not self.parts["fit"]:
            return None
        benign = [r.text for r in self.parts["calibrate"] if r.label == 0]
        with self.console.status("the text floor …"):
            scores = tfidf_scores(self.parts["fit"], [*benign, *texts])
        try:
            threshold = Calibration.fit(scores[: len(benign)], "text floor").threshold(self.options.target_fpr)
        except ValueError:
            threshold = None
        return np.array(scores[len(benign) :]), threshold

    # --- answers and attacks ----------------------------------------------------------------------------------------

    def _answers(self, threshold: float) -> dict[str, Any]:
        found = {}
        sets, notes = answer_sets(self.data, self.trained, min(self.options.most, MOST_ANSWERS))
        self.notes += notes
        for name, exchanges in sets.items():
            n = sum(len(e.text) + len(e.response) for e in exchanges) // 4
            with progress(self.console, f"answers of {name}, tokens (about)", n) as tick:
                texts, answers = [e.text for e in exchanges], [e.response for e in exchanges]
                scored = score_answers(self.judge, texts, answers, tick)
            found[name] = answer_figures(exchanges, scored, threshold, self.parts["fit"])
        return found

    def _attacks(self, threshold: float) -> dict[str, Any]:
        texts = attack_rows(self.parts["test"])
        if not texts[1] or not texts[0]:
            return {"attacks": {}, "needles": []}
        with progress(self.console, "attacks", len(TRANSFORMS)) as tick:
            attacks = attack_table(self.judge, threshold, texts, tick)
        everyday = [r.text for s in held_back(self.parts["test"]) if s.kind == "everyday" for r in s.rows]
        with progress(self.console, "requests in long texts", DOCUMENTS * len(LENGTHS)) as tick:
            needles = needle_table(self.judge, threshold, everyday, texts[1], tick) if everyday else []
        return {"attacks": attacks, "needles": needles}
