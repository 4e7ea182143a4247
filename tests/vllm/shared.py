"""One engine for the tests that need nothing special of theirs: each module puts the probes that it wants into it.

An engine takes most of a minute to start. What a test samples is set where the routes meet the engine, since not every
route's API has a bias.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from monitor.config import cache_dir, load_settings
from monitor.engines.embedded.model import load_model
from monitor.live import LiveProbes, load_live
from monitor.probe import ProbeWeights
from probes_store.store import Store

from ..conftest import calibrated, make_card
from .conftest import EAGER, Harness, Web, make_plan

TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


class Forced:
    """What the next requests must sample; None: what they like."""

    bias: dict[str, float] | None = None


def force(running: Harness) -> None:
    generate = running.engine.generate

    def forced(prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if Forced.bias is not None:
            params.logit_bias = {int(i): v for i, v in Forced.bias.items()}
            params.frequency_penalty = 2.0
            params.temperature = 0.0
        return generate(prompt, params, *args, **kwargs)

    running.engine.generate = forced


@pytest.fixture(scope="session")
def quiet(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model with logits so small that a bias decides."""
    folder = tmp_path_factory.mktemp("quiet") / "tiny-quiet"
    model = load_model(str(tiny_folder), cache=cache_dir())
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1e-3)
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return load_model(str(folder), cache=cache_dir())


@pytest.fixture(scope="session")
def shared(quiet: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    nothing = ProbeWeights("nothing", {layer: torch.zeros(quiet.d_model) for layer in (1, 2)}, 0.0)  # taps both
    plan = make_plan(
        quiet,
        tmp_path_factory.mktemp("store"),
        [(nothing, {"calibration": calibrated(1e6)})],
        [*EAGER, *TOOLS],
        max_concurrent=600,
        probe_columns=4,
    )
    running = Harness(plan)
    force(running)
    yield running
    running.stop()


def load(running: Harness, model: Any, folder: Path, probes: list[Any], **settings: Any) -> LiveProbes:
    """Have the engine score these probes, [(weights, changes of the card)], from now on."""
    store = Store(folder, shipped=folder / "none")
    for probe, changes in probes:
        store.publish(make_card(model, probe, **changes), probe.weight, probe.bias)
    live = load_live(model.served(), store, load_settings(engine="vllm", model=model.name, store=folder, **settings))
    running.run(running.judge.banks.load(live))
    return live


@contextlib.contextmanager
def routes(running: Harness) -> Iterator[Web]:
    """vLLM's routes in front of the engine, for one module."""
    web = Web(running)
    yield web
    web.stop()
    Forced.bias = None


def blocking(*names: str) -> dict[str, dict[str, str]]:
    return {name: {"prompt": "block", "response": "block"} for name in names}
