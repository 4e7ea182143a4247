"""From settings to a LocalObserver that may serve: which model, its probes, the built graph, and the self-test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monitor.config import Settings
from monitor.engines.identity import identify, locate
from monitor.errors import ConfigInvalid
from monitor.live import LiveProbes, ServedModel, load_candidates, load_live
from monitor.observer.build import Built, build, find
from monitor.observer.reader import LocalObserver
from monitor.observer.room import Bounds
from monitor.observer.session import Session
from monitor.template import ChatTemplate
from probes_store.store import CANDIDATE, Store, model_slug

INT8_TOLERANCE = 1.0
"""Largest difference of a canary's logit with int8 weights, unless the operator says otherwise."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An observer that has passed its self-test; `start` it. off: the canaries' largest difference, in logits"""

    observer: LocalObserver
    live: LiveProbes
    built: Built
    off: float


def describe(settings: Settings) -> tuple[ServedModel, Any]:
    """Which model this is, and its tokenizer; its weights are not read. raises: MidstreamError"""
    from transformers import AutoConfig, AutoTokenizer

    path = locate(settings.model, settings.cache)
    try:
        config: Any = AutoConfig.from_pretrained(path, revision=settings.revision)
        tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=settings.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigInvalid(f"--model {settings.model!r} can't be loaded: {reason}") from error
    if not config.name_or_path:
        config.name_or_path = str(path)
    identity, text = identify(config), config.get_text_config()
    served = ServedModel(
        identity.name,
        identity.fingerprint,
        "float32",
        text.hidden_size,
        text.num_hidden_layers,
        ChatTemplate(tokenizer),
    )
    return served, tokenizer


def make(settings: Settings, int8: bool = False, versions: Sequence[str] = ()) -> Built:
    """Build the observer of the live probes, unless the cache has it, and those that they may be swapped for.

    versions: NAME@VERSION; with each in place of the live one, and with it in shadow beside that
    returns: of the live probes; raises: MidstreamError
    """
    from monitor.engines.embedded.model import load_model

    store = Store(settings.store)
    model = load_model(settings.model, cache=settings.cache, revision=settings.revision)
    served, made = model.served(), list[Built]()
    for chosen in _choices(store, model_slug(served.name), versions):
        candidates, refused = load_candidates(served, store, chosen)
        if refused:
            raise ConfigInvalid("; ".join(refused))
        for beside in [(), candidates] if candidates else [()]:
            live = load_live(served, store, settings, chosen=chosen, beside=beside)
            made.append(build(model, live, settings.cache, int8))
    return made[0]


def _choices(store: Store, slug: str, versions: Sequence[str]) -> list[dict[str, str]]:
    """live.json as it is, and as each of these would make it."""
    now = store.choices()
    found = [now]
    for each in versions:
        name, _, version = each.partition("@")
        if version not in store.versions(slug, name):
            raise ConfigInvalid(f"--probe {each!r} is not in the store; name one like harmful-intent@v2")
        found += [now | {f"{slug}/{name}": version}, now | {f"{slug}/{name}{CANDIDATE}": version}]
    return found


def load(settings: Settings, int8: bool = False) -> Loaded:
    """The built observer of the live probes, its canaries scored.

    raises: ConfigInvalid if it is not built, ProbeMismatch if a canary is off, ProbeInvalid if a file is damaged
    """
    model, tokenizer = describe(settings)
    return observer_of(settings, model, tokenizer, load_live(model, Store(settings.store), settings), int8)


def observer_of(
    settings: Settings, model: ServedModel, tokenizer: Any, live: LiveProbes, int8: bool | None = None
) -> Loaded:
    """The built observer of these probes, its canaries scored. int8: None, as the settings say. raises: as `load`"""
    int8 = settings.observer_int8 if int8 is None else int8
    built = find(model, live, settings.cache, int8)
    if built is None:
        form = " --int8" if int8 else ""
        names = "".join(f" --probe {p.card.name}@{p.card.version}" for p in live.probes)
        raise ConfigInvalid(
            f"there is no observer of {model.name} with these probes yet; build it: "
            f"midstream observer build --model {settings.model}{names}{form}"
        )
    bounds = Bounds.of(settings)
    session = Session(built, settings.threads, bounds.kv_tokens // 2)
    tolerance = settings.canary_tolerance or (INT8_TOLERANCE if int8 else None)
    off = live.check_canaries(model.template, lambda p: session.score(p.token_ids, bounds.max_step_tokens), tolerance)
    columns = [(p.name, p.card.version) for p in live.probes for _ in range(p.card.projections)]
    observer = LocalObserver(session, model, tokenizer, columns, bounds, model.template.opening())
    return Loaded(observer, live, built, off)
