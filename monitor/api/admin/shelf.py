"""What the store holds of a model's probes, as the admin route tells it, and what the next training has to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from monitor.config import Settings
from monitor.errors import MidstreamError
from monitor.metrics.drift import Standing
from monitor.traffic import Where
from monitor.traffic.labelled import Labelled, count_requests, labelled_since
from monitor.traffic.text import count_slice
from probes_store.calibration import rows_needed
from probes_store.store import PREVIOUS, Store, StoredProbe


def everyday(settings: Settings) -> int:
    """Rows of the uniform slice that retraining finds: of features, or of kept texts where there never were any."""
    try:
        if settings.log_features:
            return math.floor(settings.feature_rate * count_requests(settings.log))
        by_text = settings.log_text and not settings.features.is_dir()
        return count_slice(settings.log) if by_text else 0
    except MidstreamError:  # no log yet
        return 0


class Shelf:
    """store, slug: whose probes; log: the traffic log; target_fpr: of prompts, what a threshold is certified for

    everyday: how many rows of the uniform slice there are
    served: the probes that answer requests now, whatever live.json says
    standings: how the thresholds in force stand to the newest values
    """

    def __init__(
        self,
        store: Store,
        slug: str,
        log: Where,
        target_fpr: float,
        everyday: Callable[[], int],
        served: Callable[[], Sequence[StoredProbe]],
        standings: Callable[[], Sequence[Standing]] = tuple,
    ) -> None:
        self._store, self._slug, self._log, self._target, self._everyday = store, slug, log, target_fpr, everyday
        self._served, self._standings = served, standings

    def describe(self) -> dict[str, Any]:
        """live, candidate: what live.json names, and missing if the store lacks it; serves, tries: what runs here.
        live is None of a probe that starts idle, until it is promoted.

        Reads files and the log. raises: ConfigInvalid if live.json is damaged
        """
        chosen = self._store.choices()
        live, candidates = self._store.named(self._slug, chosen), self._store.candidates(self._slug, chosen)
        served = self._served()
        serves, tries = ({p.card.name: p.card.version for p in served if p.candidate is on} for on in (False, True))
        standings = self._standings()
        probes = []
        for name in self._store.probes(self._slug):
            version = live.get(name)
            versions = [self._version(name, v, version, candidates.get(name)) for v in self._newest_first(name)]
            since = self.since(name)
            probes.append(
                {
                    "name": name,
                    "live": version,
                    "previous": chosen.get(f"{self._slug}/{name}{PREVIOUS}"),
                    "candidate": candidates.get(name),
                    "missing": version is not None and version not in self._store.versions(self._slug, name),
                    "serves": serves.get(name),
                    "tries": tries.get(name),
                    "backlog": len(self._labels(since)),
                    "needed": self.needed(),
                    "thresholds": [_standing(s) for s in standings if s.probe == name],
                    "versions": versions,
                }
            )
        return {"model": self._slug, "probes": probes}

    def since(self, probe: str) -> float:
        """Until when the newest version has seen the traffic."""
        for version in self._newest_first(probe):
            try:
                return self._store.load(self._slug, probe, version).card.seen_until
            except MidstreamError:
                continue  # a damaged version has seen nothing that anybody could tell
        return 0.0

    def needed(self) -> int:
        """Rows of the uniform slice that a threshold at the target rate still lacks, or people's labels of them."""
        return max(0, rows_needed(self._target) - self._everyday())

    def needs(self) -> dict[str, int]:
        """`needed`, by probe of harm. raises: ConfigInvalid if live.json is damaged"""
        return dict.fromkeys(self._store.named(self._slug), self.needed())

    def _labels(self, since: float) -> Sequence[Labelled]:
        try:
            return labelled_since(self._log, since)
        except MidstreamError:  # no log yet
            return ()

    def _newest_first(self, probe: str) -> list[str]:
        return list(reversed(self._store.versions(self._slug, probe)))

    def _version(self, name: str, version: str, live: str | None, candidate: str | None) -> dict[str, Any]:
        marks = {"version": version, "live": version == live, "candidate": version == candidate}
        try:
            stored = self._store.load(self._slug, name, version)
        except MidstreamError as error:
            return marks | {"damaged": str(error)} | dict.fromkeys(_OF_CARD)
        return marks | of_card(stored)


def _standing(standing: Standing) -> dict[str, Any]:
    return {name: value for name, value in asdict(standing).items() if name != "probe"}


_OF_CARD = ("created", "kind", "layers", "sha256", "metrics", "gate", "labels")


def of_card(stored: StoredProbe) -> dict[str, Any]:
    card = stored.card
    return {
        "created": card.created,
        "kind": card.kind,
        "layers": list(card.layers),
        "sha256": card.sha256,
        "metrics": {name: value for name, value in card.metrics.items() if name != "gate"},
        "gate": card.metrics.get("gate"),
        "labels": card.retrained.get("labels"),
    }
