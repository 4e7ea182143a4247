"""The post made again: linear probes from 50 pairs each, their curves, every block, and how far they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as save_tensors

from monitor.config import Settings
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.errors import ConfigInvalid
from probes_store.calibration import clopper_pearson
from training.curves import EPOCHS, Labels, features, train
from training.data import Row, read_jsonl, sample
from training.evaluate import auroc, rate, separation
from training.fit import Array, Fitted, fit_torch
from training.floor import tfidf_scores
from training.pairs_made import Concept, concepts
from training.progress import progress

_SHUFFLES = 5
_PUBLIC_ROWS = 300
# Public sets that the final report looks at, if their folder is given; nothing is ever fitted or chosen on them.
_PUBLIC = {
    "caps": ("concept_caps.jsonl",),
    "html": ("concept_html.jsonl",),
    "harmful": ("jailbreakbench.jsonl", "xstest.jsonl", "strongreject.jsonl", "mitre_frr.jsonl"),
    "harmful-twins": ("jailbreakbench.jsonl", "xstest.jsonl", "strongreject.jsonl", "mitre_frr.jsonl"),
}


@dataclass(frozen=True, slots=True)
class Side:
    """Rows to fit or to validate on. features: (n_layers, n, d_model)"""

    rows: Sequence[Row]
    features: npt.NDArray[np.float32]

    def at(self, layer: int) -> Array:
        return np.asarray(self.features[layer], np.float64)

    @property
    def labels(self) -> Labels:
        return np.array([r.label for r in self.rows])


class Experiment:
    """One run: harvest once, then fit and look. The block is the middle one, chosen before anything is seen."""

    def __init__(self, model: LoadedModel, seed: int, console: Console, epochs: int = EPOCHS) -> None:
        self.model, self.seed, self.console, self.epochs = model, seed, console, epochs
        self.block = model.n_layers // 2
        self.concepts = concepts(seed)
        self.fitted: dict[str, Fitted] = {}

    def run(self, data: Path | None) -> dict[str, Any]:
        """Everything that the report shows. data: folder of public sets, read after all probes are fitted"""
        sides = self._harvest()
        found = {c.name: self._concept(c, *sides[c.name]) for c in self.concepts}
        sets = {c.name: dict(c.elsewhere) | self._public(c.name, data) for c in self.concepts}
        scored = self._score(row.text for of in sets.values() for rows in of.values() for row in rows)
        for c in self.concepts:
            found[c.name]["elsewhere"] = {name: self._elsewhere(c, rows, scored) for name, rows in sets[c.name].items()}
        return {
            "experiment": "residual-stream",
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "block": self.block,
            "n_layers": self.model.n_layers,
            "epochs": self.epochs,
            "seed": self.seed,
            "concepts": found,
        }

    def _harvest(self) -> dict[str, tuple[Side, Side]]:
        rows = [r for c in self.concepts for part in (c.fit, c.validation) for r in part]
        with progress(self.console, "residual stream, all blocks", len(rows)) as tick:
            harvested = features(self.model, [r.text for r in rows], range(self.model.n_layers), tick)
        sides, start = {}, 0
        for c in self.concepts:
            middle, end = start + len(c.fit), start + len(c.fit) + len(c.validation)
            sides[c.name] = Side(c.fit, harvested[:, start:middle]), Side(c.validation, harvested[:, middle:end])
            start = end
        return sides

    def _fit(self, fit: Side, labels: Labels, layer: int) -> Fitted:
        return fit_torch(fit.at(layer), labels, np.ones(len(labels)), self.epochs, range(self.epochs), self.seed)

    def _concept(self, concept: Concept, fit: Side, validation: Side) -> dict[str, Any]:
        blocks = range(self.model.n_layers)
        sweep = [_accuracy(self._fit(fit, fit.labels, layer), validation, layer) for layer in blocks]
        x, x_val = fit.at(self.block), validation.at(self.block)
        chosen = train(x, fit.labels, x_val, validation.labels, self.epochs, self.seed)
        self.fitted[concept.name] = chosen.fitted
        accuracy, n = chosen.curves["validation_accuracy"], len(validation.rows)
        low, high = clopper_pearson(round(accuracy[-1] * n), n)
        positive = validation.labels == 1
        words = np.array(tfidf_scores(fit.rows, [r.text for r in validation.rows]))
        length = np.array([float(len(r.text)) for r in validation.rows])
        random = np.random.default_rng(self.seed)
        shuffled = [
            _accuracy(self._fit(fit, random.permutation(fit.labels), self.block), validation, self.block)
            for _ in range(_SHUFFLES)
        ]
        return {
            "about": concept.about,
            "n_fit": len(fit.rows),
            "n_validation": n,
            "training_accuracy": chosen.curves["training_accuracy"][-1],
            "validation_accuracy": accuracy[-1],
            "low": round(low, 4),
            "high": round(high, 4),
            "first_perfect_epoch": accuracy.index(1.0) + 1 if 1.0 in accuracy else None,
            "curves": chosen.curves,
            "layers": sweep,
            "floors": {
                "words": round(auroc(words[positive], words[~positive]), 4),
                "length": round(_either(auroc(length[positive], length[~positive])), 4),
                "shuffled": round(float(np.mean(shuffled)), 4),
            },
        }

    def _public(self, name: str, data: Path | None) -> dict[str, Sequence[Row]]:
        if data is None:
            return {}
        files = {file.removesuffix(".jsonl"): read_jsonl(data / file)[0] for file in _PUBLIC[name]}
        return {stem: sample(rows, _PUBLIC_ROWS, self.seed) for stem, rows in files.items()}

    def _score(self, texts: Iterable[str]) -> dict[str, Array]:
        """Each text once -> its features at the block."""
        wanted = list(dict.fromkeys(texts))
        with progress(self.console, f"look-alikes, block {self.block}", len(wanted)) as tick:
            (found,) = features(self.model, wanted, [self.block], tick)
        return dict(zip(wanted, found.astype(np.float64), strict=True))

    def _elsewhere(self, concept: Concept, rows: Sequence[Row], scored: Mapping[str, Array]) -> dict[str, Any]:
        """Figures at the probe's own threshold, logit 0; a rate or AUROC that needs a missing label is None."""
        logits = self.fitted[concept.name].logits(np.stack([scored[r.text] for r in rows]))
        words = np.array(tfidf_scores(concept.fit, [r.text for r in rows]))
        positive = np.array([r.label == 1 for r in rows])
        both = bool(positive.any()) and not positive.all()
        apart = separation(logits[positive].tolist(), logits[~positive].tolist()) if both else {}
        return {
            "n_positive": int(positive.sum()),
            "n_negative": int((~positive).sum()),
            "auroc": apart.get("auroc"),
            "low": apart.get("low"),
            "high": apart.get("high"),
            "found": rate(logits[positive].tolist(), 0.0) if positive.any() else None,
            "false_alarms": rate(logits[~positive].tolist(), 0.0) if not positive.all() else None,
            "words": round(auroc(words[positive], words[~positive]), 4) if both else None,
        }


def _accuracy(fitted: Fitted, side: Side, layer: int) -> float:
    right = (fitted.logits(side.at(layer)) > 0) == (side.labels == 1)
    return round(float(right.mean()), 6)


def _either(value: float) -> float:
    """Longer or shorter: a shortcut both ways."""
    return max(value, 1 - value)


def residual_stream(
    settings: Settings, out: Path, data: Path | None = None, seed: int = 0, epochs: int = EPOCHS
) -> dict[str, Any]:
    """Run it; write results.json, index.html, curves.png (with matplotlib) and probes.safetensors into `out`.

    The same model, seed and machine give the same bytes. raises: ConfigInvalid if `out` or `data` is no folder
    """
    from training.experiment_report import write_report

    if data is not None:
        _check_public(data)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigInvalid(f"--out {str(out)!r} can't be made: {error.strerror}") from error
    console = Console(stderr=True)
    with console.status(f"loading {settings.model} …"):
        model = load_model(settings.model, cache=settings.cache, revision=settings.revision, dtype=settings.dtype)
    run = Experiment(model, seed, console, epochs)
    results = run.run(data)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    tensors = {f"{name}.weight": torch.from_numpy(f.weight).float() for name, f in run.fitted.items()}
    tensors |= {f"{name}.bias": torch.tensor([f.bias]) for name, f in run.fitted.items()}
    (out / "probes.safetensors").write_bytes(save_tensors(tensors))
    written = ["results.json", "probes.safetensors", *write_report(results, out)]
    _tell(Console(), results)
    print(f"wrote {', '.join(sorted(written))} to {out}")
    return results


def _check_public(data: Path) -> None:
    """Said now, not after minutes of work; nothing is opened yet."""
    missing = sorted({file for files in _PUBLIC.values() for file in files if not (data / file).is_file()})
    if missing:
        raise ConfigInvalid(f"--data {str(data)!r} has no {missing[0]}; name the folder that holds the public sets")


def _tell(console: Console, results: dict[str, Any]) -> None:
    table = Table(title=f"validation accuracy after {results['epochs']} epochs, block {results['block']}")
    for column in ("probe", "accuracy", "95 % interval", "rows", "1.0 at epoch", "lowest AUROC elsewhere"):
        table.add_column(column)
    for name, c in results["concepts"].items():
        lowest = min(e["auroc"] for e in c["elsewhere"].values() if e["auroc"] is not None)
        first = c["first_perfect_epoch"]
        table.add_row(
            name,
            f"{c['validation_accuracy']:.3f}",
            f"{c['low']:.3f} to {c['high']:.3f}",
            str(c["n_validation"]),
            "-" if first is None else str(first),
            f"{lowest:.3f}",
        )
    console.print(table)
