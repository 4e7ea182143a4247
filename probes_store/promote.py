"""Promote, roll back, try in shadow: which versions of a probe are served. live.json is replaced whole or not at all.

Beside the version in service it keeps the one before, under `model/probe@previous`, to go back to, and the one on
trial, under `model/probe@candidate`. Running servers notice a change within a fraction of a second.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from monitor.errors import ConfigInvalid, ProbeInvalid, ProbeMismatch
from probes_store.card import Card
from probes_store.store import CANDIDATE, PREVIOUS, Store, model_slug

WAIT_S, _LOOK_S = 2.0, 0.05
"""How long somebody else may be changing live.json: a server that scores canaries takes a moment."""
Tried = Callable[[Mapping[str, str]], None]
"""Told what live.json would say, before it is written; what it raises keeps the old one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """live: the version that is served; previous: the one to go back to, candidate: the one in shadow, if there is;
    stopped: the one that was in shadow until now"""

    probe: str
    live: str
    previous: str | None
    candidate: str | None = None
    stopped: str | None = None


def promote(
    store: Store,
    model: str,
    probe: str,
    version: str,
    other_model: bool = False,
    tried: Tried | None = None,
    fewer: bool = False,
    instead_of: str | None = None,
) -> Choice:
    """Make a version live; the one before is kept to go back to.

    other_model: the model itself was changed, so the card need not agree with the version that is live now
    fewer: it may be calibrated for less than the one before, and only shadow the rest
    instead_of: the version that must be live now; None: any
    raises: ConfigInvalid if there is no such version, it is calibrated for less, another one is live than was expected,
    or live.json can't be written; ProbeInvalid if the version is damaged, ProbeMismatch if it belongs to another model;
    what `tried` raises
    """
    card = _of_model(store, model, probe, version)
    with _editing(store, tried) as chosen:
        before = _serving(store, chosen, model, probe)
        _expected(chosen.get(f"{model}/{probe}", before), probe, instead_of)
        if before is not None and not other_model:
            with suppress(ProbeInvalid):  # a damaged version is what one promotes away from
                live = store.load(model, probe, before).card
                _same_model(card, live)
                if not fewer:
                    _as_wide(card, live)
        return _choose(chosen, model, probe, version, before)


def rollback(
    store: Store,
    model: str,
    probe: str,
    tried: Tried | None = None,
    to: str | None = None,
    instead_of: str | None = None,
) -> Choice:
    """Go back to the version that was live before; once more comes back again.

    to: the version that must be the one before, instead_of: the one that live.json must name now; None: any
    raises: ConfigInvalid if none is kept or another than was expected, ProbeInvalid if it is damaged; what `tried` does
    """
    with _editing(store, tried) as chosen:
        key, serving = f"{model}/{probe}", _serving(store, chosen, model, probe)
        _expected(chosen.get(key, serving), probe, instead_of)
        version = chosen.get(key + PREVIOUS)
        if version is None:
            name_one = f"name one: midstream probe promote {probe} VERSION"
            raise ConfigInvalid(f"no earlier version of {probe!r} is kept for {model!r}; {name_one}")
        if to not in (None, version):
            raise ConfigInvalid(f"{probe} would go back to {version}, not to {to}: somebody has changed it meanwhile")
        store.load(model, probe, version)
        return _choose(chosen, model, probe, version, serving)


def shadow(
    store: Store,
    model: str,
    probe: str,
    version: str | None,
    tried: Tried | None = None,
    instead_of: str | None = None,
) -> Choice:
    """Serve a version in shadow beside the live one, in place of the candidate before; None: serve none.

    raises: as `promote`, and ConfigInvalid for the version that is live
    """
    card = None if version is None else _of_model(store, model, probe, version)
    with _editing(store, tried) as chosen:
        key, live = f"{model}/{probe}", _serving(store, chosen, model, probe)
        _expected(chosen.get(key, live), probe, instead_of)
        if live is None:
            raise ConfigInvalid(f"no version of {probe!r} is live for model {model!r}; see `midstream probe list`")
        before = chosen.pop(key + CANDIDATE, None)
        if card is not None:
            if card.version == live:
                raise ConfigInvalid(f"{probe} {live} is live; name another version to try beside it")
            with suppress(ProbeInvalid):
                _same_model(card, store.load(model, probe, live).card)
            chosen[key], chosen[key + CANDIDATE] = live, card.version
        told = _told(chosen, model, probe, live)
        return replace(told, stopped=before if before != told.candidate else None)


def pin(store: Store, model: str, probe: str) -> None:
    """Write down the version that is live, so that a newer one in the store does not take its place."""
    if probe not in store.probes(model):
        return
    with _editing(store) as chosen:
        version = _serving(store, chosen, model, probe)
        if version is not None:
            chosen.setdefault(f"{model}/{probe}", version)


def _of_model(store: Store, model: str, probe: str, version: str) -> Card:
    card = store.load(model, probe, version).card
    if model_slug(card.model.name) != model:
        raise ProbeMismatch(
            f"{probe} {version} lies under {model!r}, its card is for {card.model.name!r}; train it again"
        )
    return card


def _serving(store: Store, chosen: dict[str, str], model: str, probe: str) -> str | None:
    version = store.named(model, chosen).get(probe)
    return version if version in store.versions(model, probe) else None


def _choose(chosen: dict[str, str], model: str, probe: str, version: str, before: str | None) -> Choice:
    key = f"{model}/{probe}"
    chosen[key] = version
    if before not in (None, version):
        chosen[key + PREVIOUS] = str(before)
    if chosen.get(key + CANDIDATE) == version:  # its trial is over
        del chosen[key + CANDIDATE]
    return _told(chosen, model, probe, version)


def _told(chosen: dict[str, str], model: str, probe: str, live: str) -> Choice:
    key = f"{model}/{probe}"
    return Choice(probe, live, chosen.get(key + PREVIOUS), chosen.get(key + CANDIDATE))


def _expected(live: str | None, probe: str, wanted: str | None) -> None:
    """live: as live.json names it, in the store or not"""
    if wanted not in (None, live):
        raise ConfigInvalid(f"{probe} {wanted} is not live any more, {live} is: somebody has changed it meanwhile")


def _as_wide(card: Card, live: Card) -> None:
    """A version that lacks a calibration can only shadow there: nobody should find out later that it blocks no more."""
    lost = [
        f"{'answers' if phase == 'response' else 'prompts'} ({'chat' if form == 'chat' else 'completions'})"
        for form, phases in live.calibration.items()
        for phase in phases
        if phase not in card.calibration.get(form, {})
    ]
    if lost:
        raise ConfigInvalid(
            f"{card.name} {card.version} is not calibrated for {', '.join(lost)}, which {live.version} is: it "
            "would only shadow them. Retrain with more harmless --frozen rows, or add --fewer-phases"
        )


def _same_model(card: Card, live: Card) -> None:
    checks = (
        ("model", live.model.fingerprint, card.model.fingerprint),
        ("width", live.d_model, card.d_model),
        ("number of layers", live.model.n_layers, card.model.n_layers),
        ("chat template", live.template_hash[:16], card.template_hash[:16]),
        ("position rule", live.position_rule, card.position_rule),
    )
    for what, wanted, have in checks:
        if wanted != have:
            raise ProbeMismatch(
                f"{card.name} {card.version} was trained with {what} {have!r}, the live {live.version} with "
                f"{wanted!r}; train it on the model that is served, or add --other-model if that is what changed"
            )


@contextmanager
def _editing(store: Store, tried: Tried | None = None) -> Iterator[dict[str, str]]:
    """live.json's content, to change; written when the block ends well. One process at a time."""
    if store.overlay is None:
        raise ConfigInvalid("the shipped store is read-only; set MIDSTREAM_STORE to a folder of yours")
    try:
        store.overlay.mkdir(parents=True, exist_ok=True)
        lock = (store.overlay / ".live.lock").open("w")
    except OSError as error:
        raise ConfigInvalid(f"store {str(store.overlay)!r} can't be written: {error.strerror}") from error
    with lock:
        deadline = time.monotonic() + WAIT_S
        while not _locked(lock):
            if time.monotonic() > deadline:
                raise ConfigInvalid(f"another process is changing {store.overlay / 'live.json'}; try again")
            time.sleep(_LOOK_S)
        chosen = store.choices()
        yield chosen
        if tried is not None:
            tried(chosen)
        try:
            _replace(store.overlay / "live.json", json.dumps(chosen, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise ConfigInvalid(f"store {str(store.overlay)!r} can't be written: {error.strerror}") from error


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, after a power failure too."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".live-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fchmod(handle, 0o644)
            os.fsync(handle)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
