"""The probes in service: verified against the model, stacked into a bank, each with its rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from monitor.config import Settings
from monitor.errors import ConfigInvalid, MidstreamError, ProbeMismatch
from monitor.policy.file import Body, PolicyFile, SecondPolicy, policy_of
from monitor.policy.resolve import resolve
from monitor.policy.rule import Policy, Rule
from monitor.probe import ProbeBank, ProbeWeights
from monitor.template import POSITION_RULE, ChatTemplate
from monitor.types import Caller, Format, Prompt, Scores
from probes_store.store import Store, StoredProbe, model_slug


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a card is compared with. aliases: other names that it is served under"""

    name: str
    fingerprint: str
    dtype: str
    d_model: int
    n_layers: int
    template: ChatTemplate
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LiveProbes:
    """policies: by name, with the file that chooses among them; names: of the served model, its own first, or empty
    where callers name another one"""

    probes: tuple[StoredProbe, ...]
    bank: ProbeBank
    policies: Mapping[str, Policy]
    file: PolicyFile
    names: tuple[str, ...] = ()

    @classmethod
    def under_rules(cls, bank: ProbeBank, rules: Mapping[Format, tuple[Rule, ...]]) -> LiveProbes:
        """A bank without cards, judged by these rules, whoever asks."""
        return cls((), bank, {"default": Policy(rules)}, PolicyFile("default", Body(), (), ""))

    @property
    def default(self) -> Policy:
        return self.policies[self.file.name]

    @property
    def rules(self) -> Mapping[Format, tuple[Rule, ...]]:
        """Of the default policy."""
        return self.default.rules

    def choose(self, caller: Caller) -> Policy:
        return self.policies[self.file.choose(caller)]

    def second(self, policy: str) -> SecondPolicy | None:
        """The endpoint that the policy of this name asks; None if it asks none, or is no more."""
        body = self.file.bodies.get(policy)
        return None if body is None or body.second is None or body.second.url is None else body.second

    @property
    def versions(self) -> tuple[tuple[str, str, str], ...]:
        """(name, version, sha256) of each probe: the same ones are the same set."""
        return tuple((p.name, p.card.version, p.card.sha256) for p in self.probes)

    def under(self, file: PolicyFile) -> LiveProbes:
        """The same probes under another policy. raises: ConfigInvalid if they can't do what it asks"""
        file = file.serving(self.names)
        return replace(self, policies=resolve(self.probes, file), file=file)

    def called(self, names: tuple[str, ...]) -> LiveProbes:
        """The same, of a model with these names."""
        return replace(self, names=names).under(self.file)

    def check_canaries(
        self, template: ChatTemplate, score: Callable[[Prompt], Scores], tolerance: float | None = None
    ) -> float:
        """Score every card's canaries; returns the largest difference, in logits.

        tolerance: the operator's, instead of the cards'
        raises: ProbeMismatch if one is further off than its card allows, or not finite
        """
        largest = 0.0
        for columns, probe in zip(self.bank.columns, self.probes, strict=True):
            card = probe.card
            for canary in card.canaries:
                prompt = _canary_prompt(template, canary.text)
                got = score(prompt)[counted(prompt), columns].ravel()
                expected = np.array(canary.scores, dtype=np.float32)
                off = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("nan")
                allowed = card.canary_tolerance if tolerance is None else tolerance
                if not off <= allowed:  # also when it is NaN
                    raise ProbeMismatch(
                        f"probe {card.name} {card.version}: canary {canary.text[:32]!r} is off by {off:.3g} logits, "
                        f"{allowed:g} is allowed; serve the model it was trained on, in {card.model.dtype}, or train "
                        "again (another dtype shifts scores a little: accept that with MIDSTREAM_CANARY_TOLERANCE)"
                    )
                largest = max(largest, off)
        return largest


def _canary_prompt(template: ChatTemplate, text: str) -> Prompt:
    return template.encode([{"role": "user", "content": text}])


def canary_prompts(live: LiveProbes, template: ChatTemplate) -> list[Prompt]:
    """Every prompt that `check_canaries` will ask for, once."""
    texts = dict.fromkeys(c.text for probe in live.probes for c in probe.card.canaries)
    return [_canary_prompt(template, text) for text in texts]


def counted(prompt: Prompt) -> list[int]:
    return [p for turn in prompt.turns for p in range(turn.start, turn.end)]


def load_live(
    model: ServedModel,
    store: Store,
    settings: Settings,
    device: str = "cpu",
    *,
    chosen: Mapping[str, str] | None = None,
    file: PolicyFile | None = None,
    beside: Sequence[StoredProbe] = (),
) -> LiveProbes:
    """The live version of every probe that the store has for this model.

    chosen: in place of live.json; file: the policy, in place of the settings'; beside: candidates
    raises: ConfigInvalid if there is none or a mode can't be had, ProbeInvalid, ProbeMismatch
    """
    slug = model_slug(model.name)
    live = store.live(slug, chosen)
    if not live:
        raise ConfigInvalid(
            f"there is no probe for model {slug!r}; train one: midstream train --model {settings.model} "
            "(add --data FILES for your own rows)"
        )
    probes = tuple(store.load(slug, name, version) for name, version in live.items())
    for probe in probes:
        _verify(probe, model)
    return assemble((*probes, *beside), model.d_model, settings, device, file, names_of(model, settings))


def names_of(model: ServedModel, settings: Settings) -> tuple[str, ...]:
    """What requests may call it, its own name first; none in front of an upstream."""
    if settings.upstream is not None:
        return ()
    return tuple(dict.fromkeys((model.name, settings.model, model_slug(model.name), *model.aliases)))


def load_candidates(
    model: ServedModel, store: Store, chosen: Mapping[str, str] | None = None
) -> tuple[list[StoredProbe], list[str]]:
    """The versions on trial that are sound and belong to this model, and of each other one why not, in a sentence.

    raises: ConfigInvalid if live.json is damaged
    """
    slug, found, refused = model_slug(model.name), list[StoredProbe](), list[str]()
    for name, version in store.candidates(slug, chosen).items():
        try:
            probe = replace(store.load(slug, name, version), candidate=True)
            _verify(probe, model)
            found.append(probe)
        except MidstreamError as error:
            refused.append(f"candidate {name} {version} is left out: {error}")
    return found, refused


def assemble(
    probes: Sequence[StoredProbe],
    d_model: int,
    settings: Settings,
    device: str = "cpu",
    file: PolicyFile | None = None,
    names: tuple[str, ...] = (),
) -> LiveProbes:
    """Stack verified probes and resolve their rules. file: the policy, in place of the settings'"""
    weights = [ProbeWeights(p.name, p.weight, p.bias) for p in probes]
    bank = ProbeBank(weights, d_model, device)
    file = (policy_of(settings) if file is None else file).serving(names)
    return LiveProbes(tuple(probes), bank, resolve(probes, file), file, names)


def _verify(probe: StoredProbe, model: ServedModel) -> None:
    card = probe.card
    checks = (
        ("model", card.model.fingerprint, model.fingerprint),
        ("width of the residual stream", card.d_model, model.d_model),
        ("number of layers", card.model.n_layers, model.n_layers),
        ("chat template", card.template_hash[:16], model.template.hash[:16]),
        ("position rule", card.position_rule, POSITION_RULE),
    )
    for what, wanted, have in checks:
        if wanted != have:
            raise ProbeMismatch(
                f"probe {card.name} {card.version} was trained with {what} {wanted!r}, this model has {have!r}; "
                "serve the model it was trained on, or train again: midstream train"
            )
    wrong = [layer for layer in card.layers if not 0 <= layer < model.n_layers]
    if wrong:
        raise ProbeMismatch(
            f"probe {card.name} {card.version} reads layer {wrong[0]}, the model has layers 0 to "
            f"{model.n_layers - 1}; publish a probe for one of these"
        )
