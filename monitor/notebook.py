"""Midstream as a library: `with monitor.watch(model, tokenizer) as w: model.generate(...)`, then `w.records`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monitor.config import Settings, load_settings
from monitor.engines.embedded.model import loaded
from monitor.errors import MidstreamError
from monitor.live import LiveProbes, load_live
from monitor.sequence import Watch
from monitor.tap import Tap
from monitor.types import Action, Caller, Prompt, Record, Scores
from probes_store.store import Store


class Watching:
    """What has been seen so far. One Record for each sequence of each `generate` call, once the call is over.

    scores: per sequence (n_tokens, K) float32 logits of every token that was fed; probes: the K columns
    """

    def __init__(self, model: Any, live: LiveProbes, model_name: str, eos_ids: frozenset[int], template: Any) -> None:
        self.probes = live.bank.names
        self.records: list[Record] = []
        self.scores: list[Scores] = []
        self._live, self._name, self._eos, self._template = live, model_name, eos_ids, template
        self._watches: list[Watch] = []
        self._rows: list[list[Scores]] = []
        self._ended: list[bool] = []
        self._tap = Tap(model, live.bank)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    @property
    def verdicts(self) -> list[Action]:
        return [record.verdict for record in self.records]

    def close(self) -> None:
        """Take the hooks out and write the records of the last call."""
        self._finish()
        for handle in self._handles:
            handle.remove()
        self._tap.detach()

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _input_ids(args, kwargs)
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False and self._watches and ids.shape[1] > 1:
            raise MidstreamError("generate without a cache feeds every token again at each step; leave use_cache on")
        if cache is None or cache.get_seq_length() == 0:
            self._begin(ids, kwargs.get("attention_mask"))
        elif ids.shape[0] != len(self._watches):
            raise MidstreamError("the batch changed within one generate call (beam search?); it can't be watched")
        self._tap.begin(ids.numel())

    def _begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._finish()
        for i, row in enumerate(ids):
            kept = row if mask is None else row[mask[i][-len(row) :].bool()]
            tokens = tuple(int(t) for t in kept)
            turns = self._template.turns(tokens)
            prompt = Prompt(tokens, turns, 0, "chat")
            self._watches.append(Watch(prompt, self._live.rules["chat"]))
            self._rows.append([])
            self._ended.append(False)

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = _input_ids(args, kwargs)
        batch, length = ids.shape
        rows = self._tap.read(batch * length).reshape(batch, length, -1)
        mask = kwargs.get("attention_mask")
        for i, watch in enumerate(self._watches):
            if self._ended[i]:
                continue  # generate feeds padding until the whole batch has ended
            mine = rows[i] if mask is None else rows[i][mask[i][-length:].bool().cpu().numpy()]
            first = sum(map(len, self._rows[i]))
            self._rows[i].append(mine)
            answered = first + len(mine) - watch.n_prompt
            # A token that is fed was sampled before; sampling of the next one is not seen here.
            watch.advance(first, mine, n_new=max(0, min(len(mine), answered)))
            self._ended[i] = answered > 0 and int(ids[i, -1]) in self._eos

    def _finish(self) -> None:
        request_id = secrets.token_hex(16)
        for i, watch in enumerate(self._watches):
            # The last sampled token was not fed, unless the sequence ended before the rest of its batch.
            nothing = np.empty((0, len(self.probes)), np.float32)
            watch.advance(watch.n_prompt + watch.n_sampled, nothing, 0 if self._ended[i] else 1, "stop")
            self.records.append(watch.record(request_id, i, self._name, Caller(route="notebook")))
            self.scores.append(np.concatenate(self._rows[i]))
        self._watches, self._rows, self._ended = [], [], []


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    ids: torch.Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise MidstreamError("the model was called without input_ids; embeddings alone can't be watched")
    return ids


@contextmanager
def watch(
    model: Any, tokenizer: Any, store: Path | None = None, settings: Settings | None = None
) -> Iterator[Watching]:
    """Score every token of plain `model.generate` calls with the probes that the store has for this model.

    model: a transformers causal model, loaded from a folder or the hub; batches may be left-padded
    yields: Watching; its records are complete after the block. Nothing is blocked: a verdict says what a server
    would have done
    raises: MidstreamError if there is no probe for the model, or it does not fit
    """
    settings = settings or load_settings()
    described = loaded(model, tokenizer)
    live = load_live(described.served(), Store(store or settings.store), settings, str(model.device))
    watching = Watching(model, live, described.name, described.eos_ids, described.template)
    try:
        yield watching
    finally:
        watching.close()
