"""Texts and conversations -> pooled features at any blocks, in shards that a killed run goes on from.

Same template, positions and tap as serving, by the embedded engine or by vLLM. What is pooled is the newest turn with
the template's closing tokens, as in `midstream train`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from monitor.engines.embedded.harvest import span_means
from monitor.engines.embedded.model import LoadedModel
from monitor.errors import ConfigInvalid, MidstreamError
from monitor.reread import Averager
from monitor.template import POSITION_RULE
from monitor.types import Prompt, Turn
from training.data import Row
from training.shards import (
    Features,
    Harvest,
    Manifest,
    Plan,
    Pooling,
    Shard,
    is_sound,
    read_manifest,
    write_manifest,
    write_shard,
)
from training.statistics import Statistics
from training.texts import Reader

SHARD_ROWS = 512
EMBEDDED = "embedded"
"""The reader that is used if no other is given."""
POOL: dict[Pooling, Callable[[Turn], Turn]] = {"mean": lambda turn: turn, "last": lambda t: Turn(t.end - 1, t.end)}
"""The positions of a turn that are averaged."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A labelled conversation. messages: (role, content), oldest first; the newest turn is what the label is about, or
    `answer`, an answer to them, where there is one"""

    messages: tuple[tuple[str, str], ...]
    label: int
    source: str
    answer: str = ""

    @classmethod
    def of(cls, row: Row, answers: bool = False) -> Sample:
        """A row's text as the user's only message. answers: the label is about the row's answer to it"""
        return cls((("user", row.text),), row.label, row.source, row.answer if answers else "")

    @property
    def sha256(self) -> str:
        """Of the messages alone: a row keeps it when its label is corrected."""
        what = [self.messages, self.answer] if self.answer else self.messages
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def make_plan(
    model: LoadedModel,
    samples: Sequence[Sample],
    layers: Iterable[int],
    poolings: Iterable[Pooling] = ("mean",),
    dtype: Literal["float16", "float32"] = "float32",
    max_text_tokens: int = 512,
    shard_rows: int = SHARD_ROWS,
    reader: str = EMBEDDED,
) -> Plan:
    """max_text_tokens: each message is cut after so many; reader: names what `harvest` is given as `read`

    raises: ConfigInvalid without samples, layers or poolings, or for a layer the model does not have
    """
    chosen, pools = tuple(sorted(set(layers))), tuple(sorted(set(poolings)))
    if not samples or not chosen or not pools:
        raise ConfigInvalid("a harvest needs at least one row, one layer and one pooling")
    for layer in {chosen[0], chosen[-1]} - set(range(model.n_layers)):
        raise ConfigInvalid(f"layer {layer} does not exist: the model has blocks 0 to {model.n_layers - 1}")
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.sha256, sample.label, sample.source]).encode())
    return Plan(
        model=model.name,
        fingerprint=model.fingerprint,
        reader=reader,
        model_dtype=model.dtype,
        template_hash=model.template.hash,
        position_rule=POSITION_RULE,
        d_model=model.d_model,
        layers=chosen,
        poolings=pools,
        dtype=dtype,
        max_text_tokens=max_text_tokens,
        shard_rows=shard_rows,
        sources=tuple(sorted({s.source for s in samples})),
        rows=len(samples),
        rows_sha256=digest.hexdigest(),
    )


def unfinished(folder: Path, plan: Plan) -> list[int]:
    """Numbers of the shards that are still to be made: missing, or not with the checksum of the manifest.

    raises: ConfigInvalid if the folder holds the harvest of another plan, naming what differs
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return list(range(plan.n_shards))
    if manifest.plan != plan:
        names = [k for k in Plan.model_fields if getattr(plan, k) != getattr(manifest.plan, k)]
        raise ConfigInvalid(f"{folder} holds another harvest ({', '.join(names)} differ); name another folder")
    return [number for number in range(plan.n_shards) if not is_sound(folder, number, manifest)]


def harvest(
    model: LoadedModel,
    samples: Sequence[Sample],
    folder: Path,
    plan: Plan,
    progress: Callable[[int], None] = lambda n: None,
    read: Averager | None = None,
) -> Harvest:
    """Make the shards that are missing; each is in the manifest as soon as it is on the disk. One run at a time.

    plan: of `make_plan` with the same model and samples; progress: called with the number of rows done since
    read: another engine's, in place of the embedded one
    raises: ConfigInvalid as `unfinished`, or if a sample does not fit into the model's context, or a feature into
    float16; MidstreamError if a feature is not finite
    """
    missing = unfinished(folder, plan)
    read = read or functools.partial(span_means, model)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_manifest(folder) or Manifest(plan=plan)
    shards = {number: digest for number, digest in done.shards.items() if number not in missing}
    write_manifest(folder, Manifest(plan=plan, shards=shards))
    for number in missing:
        shard = _make(model, [samples[i] for i in plan.rows_of(number)], plan, progress, read)
        shards[number] = write_shard(folder, number, shard, plan)
        write_manifest(folder, Manifest(plan=plan, shards=dict(sorted(shards.items()))))
    return Harvest(folder)


def _make(
    model: LoadedModel, samples: Sequence[Sample], plan: Plan, progress: Callable[[int], None], read: Averager
) -> Shard:
    prompts = [_prompt(model, sample, plan.max_text_tokens) for sample in samples]
    shape = len(samples), len(plan.layers), plan.d_model
    features: dict[Pooling, Features] = {pooling: np.empty(shape, dtype=np.float32) for pooling in plan.poolings}
    sequences = [(p.token_ids, [POOL[pooling](p.turns[-1]) for pooling in features]) for p in prompts]
    for index, means in read(sequences, plan.layers, progress):
        for out, mean in zip(features.values(), means, strict=True):
            out[index] = mean
    for pooling, out in features.items():
        if not np.isfinite(out).all():
            row = samples[int(np.argwhere(~np.isfinite(out))[0, 0])]
            raise MidstreamError(f"a {pooling} feature of row {row.sha256[:16]} is not finite; load with another dtype")
        if plan.dtype == "float16" and float(np.abs(out).max()) > float(np.finfo(np.float16).max):
            raise ConfigInvalid(f"a {pooling} feature is too large for float16; harvest in float32")
    return Shard(
        features,
        np.array([s.label for s in samples], dtype=np.int64),
        np.array([p.turns[-1].end - p.turns[-1].start for p in prompts], dtype=np.int64),
        [s.sha256 for s in samples],
        [s.source for s in samples],
    )


def _prompt(model: LoadedModel, sample: Sample, max_text_tokens: int) -> Prompt:
    reader = Reader(model, max_text_tokens)
    messages = [{"role": role, "content": reader.cut(text)} for role, text in sample.messages]
    prompt = model.template.encode(messages)
    if sample.answer:
        prompt = reader.answered(prompt, sample.answer)
    if not prompt.turns:
        raise ConfigInvalid(f"row {sample.sha256[:16]} of {sample.source!r} has no position that counts; leave it out")
    if len(prompt.token_ids) > model.max_model_len:
        raise ConfigInvalid(
            f"row {sample.sha256[:16]} of {sample.source!r} has {len(prompt.token_ids)} tokens, {model.name} reads "
            f"{model.max_model_len}; leave it out or cut its messages shorter"
        )
    return prompt


def statistics_of(made: Harvest, pooling: Pooling) -> Statistics:
    """One pass over a harvest's shards."""
    statistics = Statistics(made.plan.d_model, made.plan.origin(pooling))
    for shard in made.shards():
        statistics.add(shard.features[pooling], made.plan.layers, shard.labels, shard.sources)
    return statistics
