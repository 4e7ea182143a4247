"""Midstream as a library: `with monitor.watch(model, tokenizer) as w: model.generate(...)`, then `w.records`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

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

_PLAIN = (
    "only plain generation can be watched, one token a step and each sequence by itself: leave out num_beams, "
    "assistant_model, prompt_lookup_num_tokens, prefill_chunk_size and a cache of an earlier call"
)
_MOVES = ("reorder_cache", "crop")
"""What beam search and drafted tokens call on the cache. Nothing else tells that the rows are another sequence's from
then on, or a rejected token's."""


@dataclass(slots=True)
class _Seen:
    """A sequence of the call at work. ended: generate feeds padding until the whole batch has"""

    watch: Watch
    rows: list[Scores] = field(default_factory=list)
    ended: bool = False


class Watching:
    """What has been seen so far. One Record for each sequence of each `generate` call, once the call is over.

    scores: per sequence (n_tokens, K) float32 logits of every token that was fed; probes: the K columns
    """

    def __init__(self, model: Any, live: LiveProbes, model_name: str, eos_ids: frozenset[int], template: Any) -> None:
        self.probes = live.bank.names
        self.records: list[Record] = []
        self.scores: list[Scores] = []
        self._live, self._name, self._eos, self._template = live, model_name, eos_ids, template
        self._seen: list[_Seen] = []
        self._fed = 0  # columns of the call, padding too
        self._cache: Any = None
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
        try:
            self._finish()
        finally:
            for handle in self._handles:
                handle.remove()
            self._tap.detach()

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _input_ids(args, kwargs)
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False and self._seen and ids.shape[1] > 1:
            raise MidstreamError("generate without a cache feeds every token again at each step; leave use_cache on")
        if cache is None or cache.get_seq_length() == 0:
            self._begin(ids, kwargs.get("attention_mask"), cache)
        elif ids.shape != (len(self._seen), 1) or cache.get_seq_length() != self._fed:
            self._refuse()
        self._tap.begin(ids.numel())

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self._seen = []  # no record rather than a wrong one
        raise MidstreamError(_PLAIN)

    def _begin(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> None:
        self._finish()
        if cache is not None:
            self._cache = cache
            for name in _MOVES:
                setattr(cache, name, self._refuse)
        # Nobody waits for these tokens, however long a question stays open.
        second = replace(self._live.default.second, max_held=sys.maxsize)
        for i, row in enumerate(ids):
            kept = row if mask is None else row[mask[i][-len(row) :].bool()]
            tokens = tuple(int(t) for t in kept)
            turns = self._template.turns(tokens)
            prompt = Prompt(tokens, turns, 0, "chat")
            self._seen.append(_Seen(Watch(prompt, self._live.rules["chat"], second)))

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = _input_ids(args, kwargs)
        batch, length = ids.shape
        rows = self._tap.read(batch * length).reshape(batch, length, -1)
        mask = kwargs.get("attention_mask")
        self._fed += length
        for i, one in enumerate(self._seen):
            if one.ended:
                continue
            mine = rows[i] if mask is None else rows[i][mask[i][-length:].bool().cpu().numpy()]
            first = sum(map(len, one.rows))
            one.rows.append(mine)
            answered = first + len(mine) - one.watch.n_prompt
            # A token that is fed was sampled before; sampling of the next one is not seen here.
            one.watch.advance(first, mine, n_new=max(0, min(len(mine), answered)))
            one.ended = answered > 0 and int(ids[i, -1]) in self._eos

    def _finish(self) -> None:
        # Out of the way first: whatever fails below, the next call starts with nothing of this one.
        seen, cache, self._seen, self._cache, self._fed = self._seen, self._cache, [], None, 0
        if cache is not None:
            for name in _MOVES:
                vars(cache).pop(name, None)
        request_id = secrets.token_hex(16)
        nothing = np.empty((0, len(self.probes)), np.float32)
        for i, one in enumerate(seen):
            watch = one.watch
            if one.rows:
                # The last sampled token was not fed, unless the sequence ended before the rest of its batch.
                watch.advance(watch.n_prompt + watch.n_sampled, nothing, 0 if one.ended else 1, "stop")
                watch.end("stop")  # a judge at a URL is not asked here: what it would have been asked stays open
            else:  # the pass over the prompt raised
                watch.end("aborted")
            self.records.append(watch.record(request_id, i, self._name, Caller(route="notebook")))
            self.scores.append(np.concatenate([nothing, *one.rows]))


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
    would have done. It is the default policy's; a second judge at a URL is not asked, and where a server would ask it
    the verdict is `escalate`
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
