"""What a policy file means for a set of probes: modes, thresholds out of the cards, one Policy for each name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from monitor.errors import ConfigInvalid
from monitor.policy.file import Body, Override, PhasePolicy, PolicyFile, ProbePolicy
from monitor.policy.rule import Policy, Rule, Second
from monitor.types import Format, Mode, Phase, Terms
from probes_store.calibration import Calibration
from probes_store.store import StoredProbe

FORMATS: tuple[Format, ...] = ("chat", "raw")


def resolve(probes: Sequence[StoredProbe], file: PolicyFile) -> Mapping[str, Policy]:
    """By name. raises: ConfigInvalid for a probe that isn't there, or a mode or rate that its card can't give"""
    policies = {name: _policy(probes, name, body) for name, body in file.bodies.items()}
    for override in file.overrides:
        if set(override.when.route) == {"completions"}:
            _check_completions(policies[override.name], override)
    return policies


def _check_completions(policy: Policy, override: Override) -> None:
    """Elsewhere completions that a card says nothing of are shadowed, while chats have what was asked for. An override
    for completions alone would have nothing of it."""
    for rule in policy.rules["raw"]:
        asked = override.own.get(rule.probe, ProbePolicy()).of(rule.phase).mode
        if rule.mode is Mode.SHADOW and asked not in (None, Mode.SHADOW):
            raise ConfigInvalid(
                f"policy {override.name!r} is for completions alone, and there probe {rule.probe} {rule.version} can't "
                f"{asked} in phase {rule.phase}: the card has no calibration for it; set its mode there to shadow"
            )


def _policy(probes: Sequence[StoredProbe], name: str, body: Body) -> Policy:
    have = [p.card.name for p in probes if not p.candidate]
    second = body.second
    for wanted in (*body.probes, *(second.probes if second else ())):
        if wanted not in have:
            served = ", ".join(sorted(have))
            raise ConfigInvalid(f"policy {name!r} names probe {wanted!r}; of this model {served} are live")
    terms = Terms(
        name,
        body.annotate,
        None if body.blocked_prompt == "error" else body.blocked_prompt["refusal"],
        None if body.blocked_answer == "cut" else body.blocked_answer["replace"],
    )
    asked = Second() if second is None else Second(second.probes, second.weight, second.recheck_tokens, second.max_held)
    return Policy({form: _rules(probes, form, body) for form in FORMATS}, terms, asked)


def _of(body: Body, probe: StoredProbe, phase: Phase) -> PhasePolicy:
    """A candidate is under the policy of its probe, but for the mode: it is there to be compared."""
    own = body.probes.get(probe.card.name, ProbePolicy())
    said = own.of(phase)
    return said.model_copy(update={"mode": Mode.SHADOW}) if probe.candidate else said


def _rules(probes: Sequence[StoredProbe], form: Format, body: Body) -> tuple[Rule, ...]:
    said = {(p.name, phase): _of(body, p, phase) for p in probes for phase in Phase}
    modes = {(p.name, phase): said[p.name, phase].mode or _unasked(p, phase) for p in probes for phase in Phase}
    sharing = [k for k, m in modes.items() if m is Mode.BLOCK and said[k].threshold is None is said[k].target_fpr]
    alpha = body.target_fpr / max(1, len(sharing))
    rules = []
    column = 0
    for probe in probes:
        for phase in Phase:
            key = probe.name, phase
            rules.append(_rule(probe, column, phase, form, body, said[key], modes[key], alpha))
        column += probe.card.projections
    return tuple(rules)


def _unasked(probe: StoredProbe, phase: Phase) -> Mode:
    """A shipped probe of harm, or a promoted one that went on from it, blocks in the phases that it is calibrated for,
    and takes a share of the rate there, unless its card says that it starts in shadow. So does one that somebody has
    just trained, and a concept, which says nothing of harm."""
    card = probe.card
    able = phase.value in card.calibration.get("chat", {}) and card.kind == "harm" and card.starts == "block"
    return Mode.BLOCK if (probe.shipped or probe.heir) and able else Mode.SHADOW


def _rule(
    probe: StoredProbe,
    column: int,
    phase: Phase,
    form: Format,
    body: Body,
    said: PhasePolicy,
    mode: Mode,
    alpha: float,
) -> Rule:
    card = probe.card
    if said.escalates and mode is not Mode.BLOCK and not probe.candidate:
        raise ConfigInvalid(
            f"probe {card.name} {card.version} can't escalate in phase {phase}: its mode is {mode}, and a second judge "
            "is asked only about what may block; set its mode there to block, or leave escalate out"
        )
    calibration = card.calibration.get(form, {}).get(phase.value)
    threshold = escalate = None
    by_length: tuple[tuple[int, float], ...] = ()
    try:
        if calibration is None:
            raise ValueError("the card has no calibration for it; calibrate it with `midstream train`")
        threshold = _at(calibration, said.threshold, said.target_fpr or alpha)
        if said.by_length:
            by_length = calibration.by_length(said.target_fpr or alpha)
        if said.escalates and not probe.candidate:
            escalate = _at(calibration, said.escalate, said.escalate_fpr or alpha)
    except ValueError as error:
        # What was asked for by name is refused, and so is a rate at which a probe that blocks no longer could: nobody
        # disarms it by asking for fewer false alarms. Completions that a card says nothing of can only be shadowed.
        asked = said.mode not in (None, Mode.SHADOW) or mode is Mode.BLOCK
        if asked and (form == "chat" or calibration is not None):
            raise ConfigInvalid(
                f"probe {card.name} {card.version} can't {mode} in phase {phase} ({form}): {error}; or set its mode "
                "there to shadow"
            ) from error
        mode, by_length = Mode.SHADOW, ()
    try:
        return Rule(
            probe=probe.name,
            version=card.version,
            column=column,
            phase=phase,
            mode=mode,
            threshold=threshold,
            aggregation=card.how(form, phase.value),
            fail_mode=body.fail_mode,
            on_history=said.on_history or body.on_history,
            escalate=escalate,
            min_tokens=said.min_tokens,
            consecutive=said.consecutive,
            n_columns=card.projections,
            by_length=by_length,
        )
    except ValueError as error:
        raise ConfigInvalid(f"{error} (format {form})") from error


def _at(calibration: Calibration, value: float | None, alpha: float) -> float:
    return calibration.threshold(alpha) if value is None else value
