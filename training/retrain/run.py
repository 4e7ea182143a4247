"""`midstream retrain`: labels and features of traffic -> a candidate beside the probe in service, judged by the gate.

It promotes nothing by itself. What the gate calls DEGRADED is not published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from monitor import __version__
from monitor.config import Settings
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.errors import ConfigInvalid, ProbeInvalid
from monitor.types import Phase
from probes_store import promote as promoting
from probes_store.card import Card, DataFile
from probes_store.store import Store, StoredProbe, model_slug
from training.checks import EXIT_CODE, Verdict
from training.data import Row
from training.frozen import Report, compare, frozen_rows, must_match, refuse_fitted
from training.retrain.beside import Beside, widened
from training.retrain.candidate import Made, make
from training.retrain.gather import Given, gather
from training.retrain.traffic import Traffic, read_traffic
from training.run import canaries_of
from training.texts import Reader

MAX_TEXT_TOKENS = 512
Note = Callable[[str], None]
"""Told of each step, for the audit log."""


@dataclass(frozen=True, slots=True)
class Asked:
    """data: more labelled rows, as files; frozen: rows to judge on; target: false-positive rate of prompts

    promote: make it live if the gate says PASS
    """

    probe: str
    data: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    target: float = 0.005
    promote: bool = False


class Retrainer:
    """One run. Prints progress to stderr, and notes every step."""

    def __init__(self, settings: Settings, asked: Asked, note: Note) -> None:
        self.settings, self.asked, self.note = settings, asked, note
        self.console = Console(stderr=True)
        self.store, self.slug = Store(settings.store), model_slug(settings.model)

    def run(self) -> int:
        """The exit code, as of `midstream gate`. raises: MidstreamError, noted too, and then nothing has changed"""
        live = self._live()
        self._say(f"started from {live.card.version}")
        frozen, described = frozen_rows(self.asked.frozen) if self.asked.frozen else ([], ())
        refuse_fitted(live, described, recipe=True)  # a candidate is gone on from it
        texts = self.settings.log_key is not None
        traffic = read_traffic(self.settings.log, self.settings.features, live.card, self._since(), texts)
        with self.console.status(f"loading {self.settings.model} …"):
            dtype = self.settings.dtype or live.card.model.dtype
            model = load_model(
                self.settings.model, cache=self.settings.cache, revision=self.settings.revision, dtype=dtype
            )
        must_match(live, model)
        reader = Reader(model, MAX_TEXT_TOKENS)
        given = gather(self.settings, self.asked.data, live, traffic, reader, frozen, self.console)
        self._counted(given)
        made = make(
            live, given.start, given.x, given.y, given.weights, given.sampled, given.everyday, self.asked.target
        )
        card = self._card(live, made, traffic, given, reader)
        report, verdict = self._judged(model, live, card, made, frozen, described)
        if verdict is not Verdict.DEGRADED and not made.needed:
            card = self._wide(live.card, card, made, reader, frozen)
        return self._publish(live, card, made, report, verdict)

    def _live(self) -> StoredProbe:
        versions = self.store.live(self.slug)
        if self.asked.probe not in versions:
            have = ", ".join(versions) or "none"
            raise ConfigInvalid(f"there is no probe {self.asked.probe!r} for model {self.slug!r}; it has {have}")
        live = self.store.load(self.slug, self.asked.probe, versions[self.asked.probe])
        if live.card.kind == "concept":
            raise ConfigInvalid(
                f"{live.card.name} watches a concept; labels say harmful or harmless: name a harm probe"
            )
        if live.card.of_answers:
            raise ConfigInvalid(
                f"{live.card.name} judges answers, and labels of traffic are about prompts; train it again with "
                "midstream train --recipe, whose files label answers"
            )
        return live

    def _since(self) -> float:
        """Until when the newest version, live or not, has seen the labels."""
        for version in reversed(self.store.versions(self.slug, self.asked.probe)):
            with suppress(ProbeInvalid):  # a damaged one has seen nothing that anybody could tell
                return self.store.load(self.slug, self.asked.probe, version).card.seen_until
        return 0.0

    def _counted(self, given: Given) -> None:
        self._say(", ".join(f"{name} {value}" for name, value in given.counts.items()))
        if given.capped:  # their names are in the audit log alone; a card may be shared
            self._say(f"held to their share: {', '.join(name or '(no key)' for name in given.capped)}")

    # --- the candidate ----------------------------------------------------------------------------------------------

    def _card(self, live: StoredProbe, made: Made, traffic: Traffic, given: Given, reader: Reader) -> Card:
        card = live.card
        share = self.settings.retrain_tenant_share
        retrained = {"from": card.version, "until": traffic.until, "share": share} | given.counts
        kept = {name: value for name, value in card.fit.items() if name == "recipe"}
        return card.model_copy(
            update={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code_version": __version__,
                "projections": 1,
                "aggregation": made.aggregation,
                "raw_prompt": None,
                "calibration": made.calibration,
                "thresholds": made.thresholds,
                "platt": made.platt,
                "data": (*card.data, *given.files),
                "fit": {"method": made.fitted.method, **made.fitted.details, "retrained": retrained, **kept},
                "metrics": {"held_out": made.held_out, "gate": None},
                "canaries": canaries_of(reader, made.probe),
                "sha256": hashlib.sha256(b"").hexdigest(),
                "base_sha256": None,
            }
        )

    def _judged(
        self,
        model: LoadedModel,
        live: StoredProbe,
        card: Card,
        made: Made,
        frozen: Sequence[Row],
        described: tuple[DataFile, ...],
    ) -> tuple[dict[str, Any] | None, Verdict]:
        """What the card will say of the gate, and its verdict: INCONCLUSIVE where there is nothing to judge by."""
        if made.needed:
            why = f"{made.needed} more rows of everyday traffic certify {self.asked.target:.2%}"
            self._say(f"gate: INCONCLUSIVE: {why}")
            return {"verdict": Verdict.INCONCLUSIVE.value, "exit_code": 12, "note": why}, Verdict.INCONCLUSIVE
        if not frozen:
            self._say("gate: INCONCLUSIVE: no frozen rows to judge by; name some with --frozen")
            return None, Verdict.INCONCLUSIVE
        new = replace(live, card=card, weight=made.probe.weight, bias=made.probe.bias, shipped=False)
        report = compare(model, new, live, frozen, described, self.asked.target, None, self.console, textless=True)
        for check in report.decision.checks:
            figure = check.figure and f"{check.figure.value:.4f} [{check.figure.low:.4f}, {check.figure.high:.4f}]"
            self.console.print(f"  {check.name}: {figure or '-'} wanted {check.wanted}: {check.verdict} {check.note}")
        self._say(f"gate: {report.decision.verdict} against {live.card.version} on {len(frozen)} frozen rows")
        return _told(report, live.card.version), report.decision.verdict

    def _wide(self, live: Card, card: Card, made: Made, reader: Reader, frozen: Sequence[Row]) -> Card:
        """Calibrated for answers and completions as well, where there are rows for that: the frozen ones, to which
        nothing is fitted."""
        texts = list(dict.fromkeys(r.text for r in frozen if r.label == 0 and not r.answer))
        aggregation = {Phase(phase): how for phase, how in made.aggregation.items()}
        beside = Beside(reader, made.probe, aggregation, self.settings, self.asked.target, self.console)
        found, missing = beside.calibrate(live, texts)
        if missing:
            self._say(f"answers or completions would only be shadowed: {missing}")
        return widened(card, found)

    def _publish(
        self, live: StoredProbe, card: Card, made: Made, report: dict[str, Any] | None, verdict: Verdict
    ) -> int:
        if verdict is Verdict.DEGRADED:
            self._say("refused: it is worse than the live one on the frozen rows; nothing was published")
            return EXIT_CODE[verdict]
        card = card.model_copy(update={"metrics": card.metrics | {"gate": report}})
        # The newest version is what a store without a live.json serves: first it is written down what is live.
        promoting.pin(self.store, self.slug, self.asked.probe)
        folder = self.store.publish(card, made.probe.weight, made.probe.bias, made.base.dump())
        version = folder.name
        sha256 = self.store.load(self.slug, self.asked.probe, version).card.sha256
        self._say(f"published {version}, sha256 {sha256[:16]}")
        if self.asked.promote and verdict is Verdict.PASS and self._promoted(version, live.card.version):
            return EXIT_CODE[verdict]
        self._shadowed(version, live.card.version)
        return EXIT_CODE[verdict]

    def _promoted(self, version: str, before: str) -> bool:
        """False, and said why, if it may only be a candidate: it covers less, or another version is live by now."""
        try:
            promoting.promote(self.store, self.slug, self.asked.probe, version, instead_of=before)
        except ConfigInvalid as error:
            self._say(f"not promoted: {error}")
            return False
        self._say(f"promoted {version}, as --promote-if-pass says")
        return True

    def _shadowed(self, version: str, before: str) -> None:
        try:
            promoting.shadow(self.store, self.slug, self.asked.probe, version, instead_of=before)
        except ConfigInvalid as error:  # it is published, and whoever has changed what is live may choose
            self._say(f"{version} is no candidate: {error}")
            return
        self._say(f"{version} is the candidate: servers read it in shadow beside {before}")

    def _say(self, what: str) -> None:
        line = f"retrain {self.asked.probe}: {what}"
        self.note(line)
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _told(report: Report, live: str) -> dict[str, Any]:
    decision = report.decision
    return {
        "verdict": decision.verdict.value,
        "exit_code": decision.exit_code,
        "against": live,
        "threshold": report.threshold,
        "target_fpr": report.target_fpr,
        "data": [file.model_dump() for file in report.data],
        "checks": [asdict(check) | {"verdict": check.verdict.value} for check in decision.checks],
    }


def retrain(settings: Settings, asked: Asked, note: Note) -> int:
    """raises: MidstreamError"""
    return Retrainer(settings, asked, note).run()
