"""`midstream retrain`: labels and features of the traffic -> a candidate, judged by the gate, in shadow."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Annotated

import typer

from monitor.audit import Audit
from monitor.cli.options import Config, Model, StoreFolder
from monitor.config import Settings, load_settings
from monitor.errors import ConfigInvalid, MidstreamError

_EVERY = re.compile(r"every ([1-9][0-9]{0,3}) ?([mhd])")
_SECONDS = {"m": 60, "h": 3600, "d": 86_400}


def retrain(
    probe: Annotated[str, typer.Option(help="The probe's name.")],
    data: Annotated[
        list[str] | None, typer.Option(help="More labelled rows: JSONL, CSV or Parquet; repeat it.")
    ] = None,
    frozen: Annotated[
        list[str] | None, typer.Option(help="Rows to judge on, never fitted; repeat it. Default: retrain_frozen.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help='Stay, and train again and again: "every 24h" (m, h, d). Or call it from cron.')
    ] = None,
    promote_if_pass: Annotated[
        bool, typer.Option("--promote-if-pass", help="Make it live if the gate says PASS. Without: never.")
    ] = False,
    target_fpr: Annotated[
        float | None, typer.Option(min=1e-6, max=0.5, help="Of prompts. Default: half of the settings' target_fpr.")
    ] = None,
    nice: Annotated[int, typer.Option(min=0, max=19, help="Give way to other processes by so much.")] = 0,
    model: Model = None,
    config: Config = None,
    store: StoreFolder = None,
) -> None:
    """Go on from the live version with the labels that it has not seen. Whatever the gate says, but for DEGRADED, the
    result is published and is the candidate: read in shadow, promoted by nobody but you.

    Exit codes, as `midstream gate`: 0 PASS, 10 THRESHOLD STALE, 11 DEGRADED (then nothing is published),
    12 INCONCLUSIVE, 2 if there is nothing to train on. With --schedule it stays, and prints what became of each.
    """
    every = None if schedule is None else seconds(schedule)
    os.nice(nice)
    settings = load_settings(config, model=model, store=store)
    target = settings.target_fpr / 2 if target_fpr is None else target_fpr
    rows = tuple(frozen or settings.retrain_frozen)
    if every is None:
        raise typer.Exit(_once(settings, probe, tuple(data or ()), rows, target, promote_if_pass))
    while True:
        began = time.monotonic()
        try:
            _once(settings, probe, tuple(data or ()), rows, target, promote_if_pass)
        except MidstreamError as error:  # nothing to train on today is no reason to stop
            print(f"midstream: {error}", file=sys.stderr)
        time.sleep(max(0.0, every - (time.monotonic() - began)))


def seconds(schedule: str) -> int:
    """raises: ConfigInvalid"""
    found = _EVERY.fullmatch(schedule.strip())
    if found is None:
        raise ConfigInvalid(f'--schedule {schedule!r} must be like "every 24h", with m, h or d; or call it from cron')
    return int(found[1]) * _SECONDS[found[2]]


def _once(
    settings: Settings, probe: str, data: tuple[str, ...], frozen: tuple[str, ...], target: float, promote: bool
) -> int:
    from training.retrain.run import Asked, retrain

    audit = Audit(settings.audit)
    try:

        def note(what: str) -> None:
            audit.write("retrain", "", "RETRAIN", what)

        try:
            return retrain(settings, Asked(probe, data, frozen, target, promote), note)
        except MidstreamError as error:
            note(f"retrain {probe}: refused: {error}")
            raise
    finally:
        audit.close()
