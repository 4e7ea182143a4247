"""`midstream policy`: what a policy file means for the probes in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from monitor.cli.options import Config, Json, StoreFolder
from monitor.config import load_settings
from monitor.errors import ConfigInvalid
from monitor.policy.file import PolicyFile, When, load_policy
from monitor.policy.rule import Policy, Rule

if TYPE_CHECKING:
    from probes_store.calibration import Calibration
    from probes_store.store import StoredProbe

_LEGEND = """(≤ x%): no more benign requests than that cross it, with 95 % confidence, on traffic
like the rows the probe was calibrated on; several probes' rates add up. Between the two
values a second judge is asked. By length: each by prompts of its lengths alone; longer
ones have the last. A day: at most so many of the requests named. (m, k): from the m-th token of
an answer, k in a row."""

app = typer.Typer(no_args_is_help=True, help="Policy files. A running server reads its own again on SIGHUP.")


@app.callback()
def _group() -> None:
    """A group of commands, though it has one."""


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="YAML policy file.")],
    model: Annotated[str | None, typer.Option(help="Whose probes it is for.")] = None,
    config: Config = None,
    store: StoreFolder = None,
    per_day: Annotated[
        float | None, typer.Option(min=0, help="Benign requests a day: how many of them may be flagged or blocked.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate a policy file against the live probes, and print every threshold with the rate it is certified for."""
    settings = load_settings(config, model=model, store=store)
    # Here: they bring torch, seconds that `midstream --help` need not wait for.
    from monitor.policy.resolve import resolve
    from probes_store.store import Store, model_slug

    shelf, slug = Store(settings.store), model_slug(settings.model)
    live = shelf.live(slug)
    if not live:
        raise ConfigInvalid(f"there is no probe for model {slug!r}; name the model with --model")
    probes = [shelf.load(slug, name, version) for name, version in live.items()]
    read = load_policy(file)
    policies = resolve(probes, read)
    rows = [row for name, policy in policies.items() for row in _rows(probes, name, policy, per_day)]
    if as_json:
        print(json.dumps({"name": read.name, "sha256": read.digest, "rules": rows}))
        return
    console = Console()
    console.print(f"[bold]{read.name}[/] · {file} · sha256 {read.digest[:16]}", highlight=False)
    for name, policy in policies.items():
        console.print(_table(read, policy, [r for r in rows if r["policy"] == name]))
    console.print(_LEGEND, soft_wrap=True, highlight=False)


def _rows(stored: list[StoredProbe], name: str, policy: Policy, per_day: float | None) -> list[dict[str, Any]]:
    probes = {p.card.name: p for p in stored}
    found = []
    for form, rules in policy.rules.items():
        for rule in rules:
            calibration = probes[rule.probe].card.calibration.get(form, {}).get(rule.phase.value)
            row: dict[str, Any] = {
                "policy": name,
                "format": form,
                "probe": rule.probe,
                "version": rule.version,
                "phase": rule.phase,
                "mode": rule.mode,
                "escalate": rule.escalate,
                "threshold": rule.threshold,
                "certified_fpr": _certified(calibration, rule.threshold),
                "asked_fpr": _certified(calibration, rule.escalate),
                "on_history": rule.on_history,
                "min_tokens": rule.min_tokens,
                "consecutive": rule.consecutive,
                "fail_mode": rule.fail_mode,
                "by_length": _by_length(calibration, rule),
            }
            rates = [b["certified_fpr"] for b in row["by_length"]] or [row["certified_fpr"]]
            if per_day is not None:
                row["false_alarms_a_day"] = None if None in rates else per_day * max(rates)
            found.append(row)
    return found


def _certified(calibration: Calibration | None, value: float | None) -> float | None:
    return None if calibration is None or value is None else calibration.rate(value)


def _by_length(calibration: Calibration | None, rule: Rule) -> list[dict[str, Any]]:
    """Each threshold with the rate that the prompts of its lengths certify it for."""
    found, shortest = [], 0
    for up_to, threshold in rule.by_length:
        rate = None if calibration is None else calibration.between(shortest, up_to).rate(threshold)
        found.append({"up_to": up_to, "threshold": threshold, "certified_fpr": rate})
        shortest = up_to
    return found


def _table(file: PolicyFile, policy: Policy, rows: list[dict[str, Any]]) -> Table:
    terms = policy.terms
    whom = next((_whom(o.when) for o in file.overrides if o.name == terms.policy), "everybody else")
    does = [
        "a blocked prompt gets " + ("400" if terms.refusal is None else "a refusal"),
        "a blocked answer is " + ("cut" if terms.replacement is None else "replaced"),
        f"fails {rows[0]['fail_mode']}",
        *(["annotated"] if terms.annotate else []),
    ]
    table = Table(title=f"{terms.policy}: {whom}", caption=", ".join(does), box=box.SIMPLE, title_justify="left")
    daily = "false_alarms_a_day" in rows[0]
    for column in ("probe", "where", "mode", "asks above", "threshold", *(["a day"] if daily else [])):
        table.add_column(column)
    for row in rows:
        when = (
            "" if (row["min_tokens"], row["consecutive"]) == (1, 1) else f" ({row['min_tokens']}, {row['consecutive']})"
        )
        table.add_row(
            str(row["probe"]),
            f"{'chat' if row['format'] == 'chat' else 'completions'} {row['phase']}",
            f"{row['mode']}{when}",
            _level(row["escalate"], row["asked_fpr"]),
            "\n".join(_levels(row)),
            *([_alarms(row["false_alarms_a_day"])] if daily else []),
        )
    return table


def _whom(when: When) -> str:
    return ", ".join(f"{name} {' or '.join(values)}" for name, values in when.model_dump(exclude_defaults=True).items())


def _level(value: object, rate: object) -> str:
    certified = f" (≤ {rate:.2%})" if isinstance(rate, float) else ""
    return f"{value:.2f}{certified}" if isinstance(value, float) else "-"


def _levels(row: dict[str, Any]) -> list[str]:
    levels = [f"≤ {b['up_to']:,} tokens: {_level(b['threshold'], b['certified_fpr'])}" for b in row["by_length"]]
    return levels or [_level(row["threshold"], row["certified_fpr"])]


def _alarms(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"
