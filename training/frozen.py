"""Frozen rows scored by stored probes: what the release gate decides on, or a refusal to compare at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from monitor.config import Settings
from monitor.engines.embedded.harvest import prompt_values, residual_streams, score_streams
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.errors import ConfigInvalid, MidstreamError, ProbeMismatch
from monitor.probe import ProbeBank, ProbeWeights
from monitor.template import POSITION_RULE
from monitor.types import Phase, Prompt
from probes_store.card import DataFile
from probes_store.store import Store, StoredProbe, model_slug
from training.checks import Decision, Evidence
from training.data import Row, same_text, unique
from training.evaluate import set_figures
from training.floor import tfidf_scores
from training.gate import decide
from training.load import read_prompts, stem
from training.metrics import Array
from training.progress import progress
from training.trained import Trained, beyond_recipe, seen_files

_RERUN = 32
"""Rows scored once more, each alone in its pass."""


@dataclass(frozen=True, slots=True)
class Report:
    """against: the live probe, None if the candidate is live itself; canaries, noise: largest differences, in logits;
    sets: `set_figures` of each file at the candidate's threshold"""

    candidate: str
    against: str | None
    model: str
    threshold: float
    target_fpr: float
    canaries: float
    noise: float
    data: tuple[DataFile, ...]
    sets: dict[str, dict[str, Any]]
    decision: Decision


def run_gate(
    settings: Settings, candidate: str, against: str | None, files: Sequence[str], folder: Path | None, target: float
) -> Report:
    """candidate, against: NAME[@VERSION]; files: as training.load reads them; folder: where those of the candidate's
    recipe lie

    raises: ConfigInvalid, ProbeInvalid, ProbeMismatch: then there is nothing to compare, and no verdict
    """
    store, slug = Store(settings.store), model_slug(settings.model)
    one = _load(store, slug, candidate)
    other = _live(store, slug, one, against)
    _threshold(one, target)  # before the model is loaded
    rows, described = frozen_rows(files, one.card.kind == "concept")
    trained = _trained_on(one, folder)
    refuse_fitted(one, described)
    _refuse_overlap(rows, trained)
    console = Console(stderr=True)
    with console.status(f"loading {settings.model} …"):
        dtype = settings.dtype or one.card.model.dtype
        model = load_model(settings.model, cache=settings.cache, revision=settings.revision, dtype=dtype)
    floor = None if trained is None else np.array(tfidf_scores(trained.parts["fit"], [r.text for r in rows]))
    return compare(model, one, other, rows, described, target, floor, console)


def compare(
    model: LoadedModel,
    one: StoredProbe,
    other: StoredProbe | None,
    rows: Sequence[Row],
    described: tuple[DataFile, ...],
    target: float,
    floor: Array | None,
    console: Console,
    textless: bool = False,
) -> Report:
    """The gate over frozen rows. other: the live probe; textless: see `Evidence`. raises: as `run_gate`"""
    threshold = _threshold(one, target)
    probes = [one] if other is None else [one, other]
    for probe in probes:
        must_match(probe, model)
    canaries = max(check_canaries(probe, model) for probe in probes)
    prompts = _prompts(model, rows)
    values = _values(console, model, one, prompts)
    noise = _noise(model, one, prompts, values)
    labels, groups = np.array([r.label for r in rows]), [r.group for r in rows]
    live = None if other is None else _values(console, model, other, prompts)
    live_threshold = None
    if other is not None and other.card.calibration:
        try:
            live_threshold = _threshold(other, target)
        except MidstreamError:  # it can't certify this rate, which is no reason to keep it
            console.print(f"{_named(other)} certifies no {target:.2%}: recall is compared at that rate of the rows")
    evidence = Evidence(labels, groups, values, threshold, target, live, live_threshold, floor, noise, textless)
    decision = decide(evidence)
    sets = {}
    for name in dict.fromkeys(r.key for r in rows):
        at = [i for i, r in enumerate(rows) if r.key == name]
        sets[name] = set_figures(values[at].tolist(), labels[at].tolist(), [groups[i] for i in at], threshold)
    named = None if other is None else _named(other)
    return Report(_named(one), named, model.name, threshold, target, canaries, noise, described, sets, decision)


def _named(probe: StoredProbe) -> str:
    return f"{probe.card.name}@{probe.card.version}"


def _load(store: Store, slug: str, given: str) -> StoredProbe:
    """raises: ConfigInvalid if the store has no such probe"""
    name, _, version = given.partition("@")
    versions = store.versions(slug, name) if name in store.probes(slug) else {}
    if not versions:
        raise ConfigInvalid(f"there is no probe {given!r} for model {slug!r} in the store; see `midstream probes`")
    return store.load(slug, name, version or next(reversed(versions)))


def _live(store: Store, slug: str, candidate: StoredProbe, against: str | None) -> StoredProbe | None:
    if against is not None:
        return _load(store, slug, against)
    name = candidate.card.name
    version = store.live(slug).get(name)
    return None if version in (None, candidate.card.version) else store.load(slug, name, str(version))


def _threshold(probe: StoredProbe, target: float) -> float:
    """Of prompts in chat. raises: ConfigInvalid if the card can't certify the rate"""
    calibration = probe.card.calibration.get("chat", {}).get("prompt")
    if calibration is None:
        raise ConfigInvalid(f"{_named(probe)} has no calibration for prompts; train it with harmless rows to spare")
    try:
        return calibration.threshold(target)
    except ValueError as error:
        raise ConfigInvalid(
            f"{_named(probe)} has no threshold at {target:.3%}: {error}; or ask for another --target-fpr"
        ) from error


def frozen_rows(files: Sequence[str], concept: bool = False) -> tuple[list[Row], tuple[DataFile, ...]]:
    """All rows about a prompt, no text twice, each with its file's stem as key. raises: ConfigInvalid"""
    rows: list[Row] = []
    described = []
    for file in files:
        found, left, what = read_prompts(file)
        if left:
            Console(stderr=True).print(f"{file}: {left} rows label a `response`, not a prompt; they are left out")
        rows += [replace(r, key=stem(file)) for r in found]
        described.append(what)
    kept = unique(rows, concept=concept)
    for label, word in ((1, "harmful"), (0, "harmless")):
        if not any(r.label == label for r in kept):
            raise ConfigInvalid(f"--data has no {word} rows (label {label}); a gate needs both: add a file")
    return kept, tuple(described)


def _trained_on(probe: StoredProbe, folder: Path | None) -> Trained | None:
    """None without a folder. raises: ConfigInvalid if the candidate's rows can't be told"""
    trained = None if folder is None else Trained.of(probe.card, folder)
    if trained is not None and trained.missing:
        raise ConfigInvalid(f"{_named(probe)}: {trained.missing}; leave --rows out, or mend it")
    return trained


def refuse_fitted(probe: StoredProbe, described: Sequence[DataFile], recipe: bool = False) -> None:
    """recipe: files of its recipe are refused too; else only those beside it, whose rows are in no part of the recipe

    raises: ConfigInvalid for a file that it was fitted on, as its card says
    """
    seen = seen_files(probe.card) if recipe else beyond_recipe(probe.card)
    for file in described:
        if file.sha256 in seen:
            raise ConfigInvalid(
                f"{_named(probe)} was fitted on {file.file}, or calibrated, as its card says; it can't be judged on it"
            )


def _refuse_overlap(rows: Sequence[Row], trained: Trained | None) -> None:
    """raises: ConfigInvalid if the candidate has seen a frozen row"""
    seen = set() if trained is None else trained.texts
    known = sum(same_text(r.text) in seen for r in rows)
    if known:
        raise ConfigInvalid(f"the candidate was fitted or calibrated on {known} of the rows in --data; leave them out")


def must_match(probe: StoredProbe, model: LoadedModel) -> None:
    """raises: ProbeMismatch if the card was made for another model, dtype, template or rule of positions"""
    card = probe.card
    checks = (
        ("model", card.model.fingerprint, model.fingerprint),
        ("dtype", card.model.dtype, model.dtype),
        ("number of layers", card.model.n_layers, model.n_layers),
        ("width of the residual stream", card.d_model, model.d_model),
        ("chat template", card.template_hash[:16], model.template.hash[:16]),
        ("position rule", card.position_rule, POSITION_RULE),
        ("layers within the model", True, all(0 <= layer < model.n_layers for layer in card.layers)),
    )
    for what, wanted, have in checks:
        if wanted != have:
            raise ProbeMismatch(f"{_named(probe)} was made with {what} {wanted!r}, here it is {have!r}: no comparison")


def _weights(probe: StoredProbe) -> ProbeWeights:
    return ProbeWeights(probe.card.name, probe.weight, probe.bias)


def check_canaries(probe: StoredProbe, model: LoadedModel) -> float:
    """Largest difference of a golden score, in logits. raises: ProbeMismatch if the card allows less"""
    bank, largest = ProbeBank([_weights(probe)], model.d_model), 0.0
    prompts = [model.template.encode([{"role": "user", "content": c.text}]) for c in probe.card.canaries]
    for index, streams in residual_streams(model, prompts, bank.layers):
        counted = [p for t in prompts[index].turns for p in range(t.start, t.end)]
        got, wanted = score_streams(bank, streams)[counted].ravel(), np.array(probe.card.canaries[index].scores)
        off = float(np.abs(got - wanted).max()) if got.shape == wanted.shape else float("nan")
        if not off <= probe.card.canary_tolerance:  # also when it is NaN
            raise ProbeMismatch(f"{_named(probe)}: a canary is off by {off:.3g} logits: not the model it was made with")
        largest = max(largest, off)
    return largest


def _prompts(model: LoadedModel, rows: Sequence[Row]) -> list[Prompt]:
    prompts = [model.template.encode([{"role": "user", "content": r.text}]) for r in rows]
    long = [r for r, p in zip(rows, prompts, strict=True) if len(p.token_ids) > model.max_model_len]
    if long:
        raise ConfigInvalid(f"{len(long)} rows in --data are longer than the model's {model.max_model_len} tokens")
    return prompts


def _values(console: Console, model: LoadedModel, probe: StoredProbe, prompts: Sequence[Prompt]) -> Array:
    with progress(console, f"scoring by {_named(probe)}", len(prompts)) as tick:
        aggregation = {phase: probe.card.aggregation[phase.value] for phase in Phase}
        values = np.array(prompt_values(model, _weights(probe), aggregation, prompts, tick))
    if not np.isfinite(values).all():
        raise ConfigInvalid(f"{int((~np.isfinite(values)).sum())} rows in --data have no value; leave them out")
    return values


def _noise(model: LoadedModel, probe: StoredProbe, prompts: Sequence[Prompt], values: Array) -> float:
    """Largest change of a value when its prompt is scored alone. raises: ProbeMismatch if it is more than a canary's"""
    aggregation = {phase: probe.card.aggregation[phase.value] for phase in Phase}
    chosen = range(0, len(prompts), max(1, len(prompts) // _RERUN))
    alone = [prompt_values(model, _weights(probe), aggregation, [prompts[i]])[0] for i in chosen]
    noise = float(np.abs(values[list(chosen)] - np.array(alone)).max())
    if not noise <= probe.card.canary_tolerance:
        raise ProbeMismatch(f"values change by up to {noise:.3g} logits from run to run: nothing can be compared")
    return noise
