"""`midstream harvest`: labelled texts -> pooled features of any blocks, in shards that a killed run goes on from."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.cli.options import Config, Json, Model
from monitor.config import Settings, load_settings
from monitor.errors import ConfigInvalid

if TYPE_CHECKING:
    from rich.console import Console

    from monitor.engines.embedded.model import LoadedModel
    from monitor.reread import Averager


class Engine(StrEnum):
    embedded = "embedded"
    vllm = "vllm"


class Pool(StrEnum):
    mean = "mean"
    last = "last"


def harvest(
    data: Annotated[list[str], typer.Option(help="JSONL, CSV, Parquet or hf://OWNER/NAME@COMMIT/FILE; repeat it.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards; one that was begun is gone on with.")],
    layers: Annotated[
        str, typer.Option(help="Blocks: `middle`, `all`, or numbers and ranges like 5,10-15.")
    ] = "middle",
    pooling: Annotated[
        list[Pool] | None, typer.Option(help="Over the newest turn's counted positions; repeat it. Default: mean.")
    ] = None,
    half: Annotated[bool, typer.Option("--float16", help="Half the disk; about 3 digits.")] = False,
    max_text_tokens: Annotated[int, typer.Option(min=8, help="A text is cut after so many.")] = 512,
    answers: Annotated[
        bool, typer.Option("--answers", help="The labels are about each row's `response`, not about its `text`.")
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Also write statistics-POOLING.safetensors.")
    ] = False,
    engine: Annotated[Engine, typer.Option(help="vllm takes vLLM's arguments too.")] = Engine.embedded,
    model: Model = None,
    config: Config = None,
    as_json: Json = False,
    *,
    context: typer.Context,
) -> None:
    """Harvest features for training, once for any number of fits. Run it again to go on where it was killed."""
    from rich.console import Console

    from training.harvest import Sample, make_plan, statistics_of, unfinished
    from training.harvest import harvest as run
    from training.load import read_rows
    from training.progress import progress

    console = Console(stderr=True)
    samples = [Sample.of(row, answers) for file in data for row in read_rows(file)[0]]
    if answers and not all(sample.answer.strip() for sample in samples):
        missing = sum(not sample.answer.strip() for sample in samples)
        raise ConfigInvalid(f"--answers: {missing} of {len(samples)} rows have no `response`; leave their files out")
    settings = load_settings(config, model=model)
    with reading(settings, engine, layers, context.args, console) as (loaded, read, reader):
        plan = make_plan(
            loaded,
            samples,
            blocks(layers, loaded.n_layers),
            [p.value for p in pooling or [Pool.mean]],
            "float16" if half else "float32",
            max_text_tokens,
            reader=reader,
        )
        rows = sum(len(plan.rows_of(number)) for number in unfinished(out, plan))
        with progress(console, "harvesting", rows) as tick:
            made = run(loaded, samples, out, plan, tick, read)
    if statistics:
        for name in plan.poolings:
            statistics_of(made, name).save(out / f"statistics-{name}.safetensors")
    told = {"folder": str(out), "rows": plan.rows, "harvested": rows, "layers": plan.layers, "poolings": plan.poolings}
    if as_json:
        print(json.dumps(told))
        return
    console.print(f"{out}: {plan.rows} rows ({rows} of them now), layers {', '.join(map(str, plan.layers))}")


@contextlib.contextmanager
def reading(
    settings: Settings, engine: Engine, layers: str, extra: list[str], console: Console
) -> Iterator[tuple[LoadedModel, Averager | None, str]]:
    """The model as `training.harvest` wants it, who reads, and the reader's name. raises: MidstreamError"""
    if engine is Engine.vllm:
        need_vllm()
        from monitor.engines.vllm.harvest import VllmHarvest

        with VllmHarvest(settings, lambda n_layers: blocks(layers, n_layers), extra) as harvest:
            yield harvest.model, harvest.read, reader_name(engine, extra)
        return
    from monitor.engines.embedded.model import load_model

    if extra:
        raise ConfigInvalid(f"unknown argument {extra[0]!r}; vLLM's need --engine vllm")
    with console.status(f"loading {settings.model} …"):
        loaded = load_model(settings.model, cache=settings.cache, revision=settings.revision, dtype=settings.dtype)
    yield loaded, None, reader_name(engine)


def reader_name(engine: Engine, extra: Sequence[str] = ()) -> str:
    """Of an engine with its own arguments, in whatever order they come: two that differ may read other features."""
    items: list[list[str]] = []
    for word in extra:
        if word.startswith("-") or not items:
            items.append(word.split("=", 1))
        else:
            items[-1].append(word)
    return " ".join([engine.value, *(" ".join(item) for item in sorted(items))])


def need_vllm() -> None:
    """raises: ConfigInvalid without vLLM, or with an installation that can't work"""
    if find_spec("vllm") is None:
        raise ConfigInvalid("vLLM is not installed; pip install midstream[vllm], or `make setup-vllm` for the CPU")
    from monitor.engines.vllm.environment import prepare

    prepare()


def blocks(text: str, n_layers: int) -> list[int]:
    """`middle`, `all`, or numbers and ranges, both ends included; raises: ConfigInvalid for anything else"""
    if text in ("middle", "all"):
        return [n_layers // 2] if text == "middle" else list(range(n_layers))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= n_layers:
            raise ConfigInvalid(
                f"--layers {text!r}: write `middle`, `all`, or numbers and ranges like 5,10-15; "
                f"the model has blocks 0 to {n_layers - 1}"
            )
        found.update(range(first, last + 1))
    return sorted(found)
