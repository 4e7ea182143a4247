"""`midstream retrain`: labels and features of traffic -> a candidate beside the probe in service, judged by the gate.

It promotes nothing by itself. What the gate calls DEGRADED is not published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich.console import Console

from monitor import __version__
from monitor.config import Settings
from monitor.engines.embedded.model import LoadedModel, load_model
from monitor.errors import ConfigInvalid
from monitor.types import Phase
from probes_store import promote as promoting
from probes_store.card import Card, DataFile
from probes_store.store import Store, StoredProbe, model_slug
from training.checks import EXIT_CODE, Verdict
from training.data import EVALUATE_ONLY, Row, same_text
from training.fit import Array
from training.frozen import Report, compare, frozen_rows, must_match, refuse_fitted
from training.load import read_rows, stem
from training.retrain.beside import Beside, widened
from training.retrain.candidate import Made, Start, make, start_of
from training.retrain.said import all_said, read_said
from training.retrain.traffic import Rows, Traffic, read_traffic
from training.retrain.weighing import Weighed, alike, leaked, weigh
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
        refuse_fitted(live, described)  # a candidate is gone on from it
        since = self._newest().card.seen_until
        traffic = read_traffic(self.settings.log, self.settings.features, live.card, since)
        with self.console.status(f"loading {self.settings.model} …"):
            dtype = self.settings.dtype or live.card.model.dtype
            model = load_model(
                self.settings.model, cache=self.settings.cache, revision=self.settings.revision, dtype=dtype
            )
        must_match(live, model)
        reader = Reader(model, MAX_TEXT_TOKENS)
        made, counts, files = self._make(live, traffic, reader, frozen)
        card = self._card(live, made, traffic, counts, reader, files)
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
        return live

    def _newest(self) -> StoredProbe:
        """What has seen the newest labels, live or not."""
        version = self.store.newest(self.slug, self.asked.probe) or ""
        return self.store.load(self.slug, self.asked.probe, version)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _make(
        self, live: StoredProbe, traffic: Traffic, reader: Reader, frozen: Sequence[Row]
    ) -> tuple[Made, dict[str, Any], list[DataFile]]:
        said, unread = read_said(self.settings, traffic.unread, reader, live.card, self.console)
        whole = np.where(all_said(self.settings, traffic.rows.ids), 1.0, traffic.rows.q)
        rows = _joined(replace(traffic.rows, q=whole), said)
        called = rows.sampled & (rows.y == 0)
        start = start_of(live, np.concatenate([traffic.everyday, rows.x[called]]))
        weighed = self._weighed(rows, start)
        weights = weighed.weights.copy()
        dropped = leaked(rows.x, _features(reader, frozen, live.card), start.scaler)
        weights[dropped] = 0.0
        x, y, sampled, files = rows.x, rows.y, rows.sampled, []
        for file in self.asked.data:
            more, described = self._data(file, frozen)
            files.append(described)
            x = np.concatenate([x, _features(reader, more, live.card)])
            labels = np.array([r.label for r in more], dtype=np.int64)
            y = np.concatenate([y, labels])
            weights = np.concatenate([weights, alike(labels, np.ones(len(more)))])
            sampled = np.concatenate([sampled, np.zeros(len(more), dtype=bool)])
        counts = {
            "labels": len(rows.y),
            "harmful": int(rows.y.sum()),
            "counted": int((weighed.weights > 0).sum() - dropped.sum()),
            "from_texts": len(said.y),
            "unread": unread,
            "strange": traffic.strange,
            "copies": weighed.copies,
            "torn": weighed.torn,
            "in_frozen": int(dropped.sum()),
            "tenants": len(set(rows.tenants)),
            "capped": len(weighed.capped),  # their names are in the audit log; a card may be shared
            "everyday": len(traffic.everyday) + int(called.sum()),
            "data_rows": len(y) - len(rows.y),
        }
        self._say(", ".join(f"{name} {value}" for name, value in counts.items()))
        if weighed.capped:
            self._say(f"held to their share: {', '.join(name or '(no key)' for name in weighed.capped)}")
        return make(live, start, x, y, weights, sampled, traffic.everyday, self.asked.target), counts, files

    def _weighed(self, rows: Rows, start: Start) -> Weighed:
        share = self.settings.retrain_tenant_share
        return weigh(rows.x, rows.y, rows.q, rows.tenants, start.scaler, share, start.rows)

    def _data(self, file: str, frozen: Sequence[Row]) -> tuple[list[Row], DataFile]:
        if stem(file) in EVALUATE_ONLY:
            raise ConfigInvalid(f"{file}: for evaluation only; take it out of --data, or rename your own file")
        rows, described = read_rows(file)
        known = {same_text(r.text) for r in frozen}
        new = [r for r in rows if not r.answer and same_text(r.text) not in known]
        return new, described.model_copy(update={"used": {"fit": len(new)}})

    # --- the candidate ----------------------------------------------------------------------------------------------

    def _card(
        self,
        live: StoredProbe,
        made: Made,
        traffic: Traffic,
        counts: dict[str, Any],
        reader: Reader,
        files: Sequence[DataFile],
    ) -> Card:
        card = live.card
        retrained = {"from": card.version, "until": traffic.until, "share": self.settings.retrain_tenant_share} | counts
        kept = {name: value for name, value in card.fit.items() if name == "recipe"}
        return card.model_copy(
            update={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "code_version": __version__,
                "projections": 1,
                "aggregation": made.aggregation,
                "calibration": made.calibration,
                "thresholds": made.thresholds,
                "platt": made.platt,
                "data": (*card.data, *files),
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


def _joined(one: Rows, other: Rows) -> Rows:
    return Rows(
        one.ids + other.ids,
        np.concatenate([one.x, other.x]),
        np.concatenate([one.y, other.y]),
        np.concatenate([one.q, other.q]),
        one.tenants + other.tenants,
        np.concatenate([one.sampled, other.sampled]),
    )


def _features(reader: Reader, rows: Sequence[Row], card: Card) -> Array:
    """(n, n_layers * d_model): as the feature log pools them, by the model."""
    out = np.zeros((len(rows), len(card.layers), card.d_model))
    for index, turn in reader.streams(rows, card.layers):
        for column, layer in enumerate(card.layers):
            out[index, column] = turn[layer].mean(0).double().numpy()
    return out.reshape(len(rows), len(card.layers) * card.d_model)


def retrain(settings: Settings, asked: Asked, note: Note) -> int:
    """raises: MidstreamError"""
    return Retrainer(settings, asked, note).run()
