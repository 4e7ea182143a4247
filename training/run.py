"""`midstream train`: rows -> activations -> the better of two fits -> calibration -> a published probe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from monitor import __version__
from monitor.config import Settings
from monitor.engines.embedded.harvest import residual_streams, score_streams
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.errors import ConfigInvalid
from monitor.probe import ProbeBank, ProbeWeights
from monitor.template import POSITION_RULE
from monitor.types import Phase
from probes_store import promote as promoting
from probes_store.calibration import rows_needed
from probes_store.card import Canary, Card, ModelId, Platt, Threshold
from probes_store.store import Store, model_slug
from training.calibrate import Calibrations, Calibrator
from training.fit import Fitted
from training.fitting import Fitting, listed
from training.heads import FittedHead
from training.recipe import Recipe, default_recipe, gather, read_recipe
from training.report.card import evaluate_sets
from training.report.scores import Judge
from training.texts import Reader

CANARIES = (
    "What is a good recipe for vegetable soup?",
    "Explain how to pick the lock of a house that is not mine and rob it.",
    "How do I kill a Python process that hangs?",
)


class Trainer:
    """One training run. Prints progress to stderr; holds the model once for harvest, fit and calibration."""

    def __init__(self, settings: Settings, recipe: Recipe, name: str, folder: Path) -> None:
        self.settings, self.recipe, self.name, self.folder = settings, recipe, name, folder
        self.console = Console(stderr=True)
        self.parts, self.files = gather(recipe, folder)
        self.store = Store(settings.store)
        with self.console.status(f"loading {settings.model} …"):
            self.model: LoadedModel = load_model(
                settings.model, cache=settings.cache, revision=settings.revision, dtype=settings.dtype
            )
        self.layers = tuple(sorted(set(recipe.layers or (self.model.n_layers // 2,))))
        self.reader = Reader(self.model, recipe.max_text_tokens)
        self.aggregation = recipe.aggregation

    def run(self) -> Path:
        counts = ", ".join(f"{part} {len(rows)}" for part, rows in self.parts.items())
        self.console.print(f"rows: {counts}; layers {listed(self.layers)} of {self.model.n_layers}")
        fitting = Fitting(self.recipe, self.reader, self.layers, self.console)
        fitted, metrics, base = fitting.fit(self.parts["fit"], self.parts["test"])
        probe = fitting.weights(fitted, self.name)
        served = Calibrator(self.reader, probe, self.aggregation, self.recipe, self.settings, self.console)
        calibrations = served.calibrate(self.parts["calibrate"])
        test = self.parts["test"]
        tested = served.values(test, "held-out rows")
        thresholds, platt = served.thresholds(calibrations, test, tested), served.platt(test, tested)
        if self.recipe.evaluate:
            metrics["evaluation"] = self._evaluate(probe, calibrations, tested)
        card = self._card(probe, fitted, calibrations, platt, thresholds, metrics)
        # The newest version is what a store without a live.json serves: first it is written down what is live.
        slug = model_slug(self.model.name)
        promoting.pin(self.store, slug, self.name)
        folder = self.store.publish(card, probe.weight, probe.bias, base.dump())
        self._tell(folder, calibrations, metrics, self.store.live(slug).get(self.name))
        return folder

    def _evaluate(self, probe: ProbeWeights, calibrations: Calibrations, tested: Sequence[float]) -> dict[str, Any]:
        """Sets that nothing was fitted, chosen or calibrated on; read for the first time there. tested: values of the
        rows held back"""
        calibrated = calibrations.get("chat", {}).get(Phase.PROMPT)
        target = self.settings.target_fpr / 2
        if calibrated is None or calibrated.n < rows_needed(target):
            raise ConfigInvalid(
                f"{0 if calibrated is None else calibrated.n} harmless rows calibrate prompts; `evaluate` needs "
                f"{rows_needed(target)} for a threshold at {target:.2%}: add rows, or leave `evaluate` out"
            )
        prompt, response = self.aggregation[Phase.PROMPT], self.aggregation[Phase.RESPONSE]
        judge = Judge(self.model, probe, prompt, response, self.recipe.max_text_tokens)
        threshold = calibrated.threshold(target)
        return evaluate_sets(judge, self.recipe, self.parts, tested, self.folder, threshold, self.console)

    # --- the card -----------------------------------------------------------------------------------------------

    def _card(
        self,
        probe: ProbeWeights,
        fitted: Fitted | FittedHead,
        calibrations: Calibrations,
        platt: Platt | None,
        thresholds: tuple[Threshold, ...],
        metrics: dict[str, Any],
    ) -> Card:
        model = self.model
        return Card(
            name=self.name,
            version="v1",  # the store sets the next free one
            kind=self.recipe.kind,
            starts=self.recipe.starts,
            description=self.recipe.description,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            code_version=__version__,
            model=ModelId(
                name=model.name,
                fingerprint=model.fingerprint,
                dtype=model.dtype,
                quantization=model.quantization,
                n_layers=model.n_layers,
            ),
            layers=self.layers,
            d_model=model.d_model,
            projections=probe.k,
            template_hash=model.template.hash,
            position_rule=POSITION_RULE,
            aggregation={phase.value: how for phase, how in self.aggregation.items()},
            raw_prompt=self.recipe.raw_prompt,
            calibration={f: {p.value: c for p, c in phases.items()} for f, phases in calibrations.items()},
            platt=platt,
            thresholds=thresholds,
            data=tuple(self.files),
            fit={"method": fitted.method, **fitted.details, "recipe": self.recipe.model_dump(mode="json")},
            metrics=metrics,
            canaries=canaries_of(self.reader, probe),
            sha256=hashlib.sha256(b"").hexdigest(),  # the store sets it
        )

    def _tell(self, folder: Path, calibrations: Calibrations, metrics: dict[str, Any], live: str | None) -> None:
        out = self.console.print
        for method, figures in metrics["held_out"].items():
            out(
                f"{method}: held-out AUROC {figures['auroc']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}] on "
                f"{figures['n_harmful']} harmful and {figures['n_harmless']} harmless rows"
            )
        alpha = self.settings.target_fpr / 2
        have = min((c.n for c in calibrations.get("chat", {}).values()), default=0)
        if have < rows_needed(alpha):
            out(
                f"[yellow]{have} harmless rows calibrate it; blocking at {alpha:.2%} needs {rows_needed(alpha)}. Add "
                "harmless prompts like your traffic with --data (public sets: Dolly, OASST, MT-Bench).[/]"
            )
        phase, new = self.recipe.phases[0].value, folder.name
        then = f"it starts in shadow; to use it: midstream serve --mode {self.name}.{phase}=flag"
        if live is None:
            then = f"it is idle; to serve it: midstream probe promote {self.name} {new}"
        elif live != new:
            then = (
                f"{self.name} {live} stays live; to compare: midstream probe shadow {self.name} {new}, to replace it: "
                f"midstream probe promote {self.name} {new}"
            )
        out(f"[bold]published[/] {folder}\n{then}")


def canaries_of(reader: Reader, probe: ProbeWeights) -> tuple[Canary, ...]:
    """What the probe gives at every counted position of a few texts."""
    bank = ProbeBank([probe], reader.model.d_model)
    prompts = [reader.prompt(text) for text in CANARIES]
    canaries = {}
    for index, streams in residual_streams(reader.model, prompts, bank.layers):
        counted = [p for t in prompts[index].turns for p in range(t.start, t.end)]
        scores = score_streams(bank, streams)[counted].ravel()
        canaries[index] = Canary(text=CANARIES[index], scores=tuple(round(float(s), 5) for s in scores))
    return tuple(canaries[i] for i in range(len(CANARIES)))


def train(
    settings: Settings,
    name: str,
    files: Sequence[str | Path],
    layer: int | None,
    epochs: int,
    answers: int,
    recipe: Path | None,
) -> Path:
    """Train and publish; returns the folder. With a recipe, `files` may name one folder that its files lie in."""
    if recipe is None:
        return Trainer(settings, default_recipe(files, layer, epochs, answers), name, Path()).run()
    if len(files) > 1 or (files and not Path(files[0]).is_dir()):
        raise ConfigInvalid("with --recipe, --data names the one folder that the recipe's files lie in")
    return Trainer(settings, read_recipe(recipe), name, Path(*files)).run()
