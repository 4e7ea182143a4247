"""One step of the graph for a batch of streams: caches laid side by side, new tokens packed, scores taken apart."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from monitor.errors import ConfigInvalid
from monitor.observer.build import GRAPH, INPUTS, OUTPUTS, Built, Shape
from monitor.types import Scores

Floats = npt.NDArray[np.float32]
Held = Callable[[], "Cache | None"]
PAGE = 64
"""Tokens by which a cache grows."""
SHORT = 8
"""New tokens up to which a stream goes on with an answer; with more it reads a prompt."""


def _nothing() -> None:
    return None


def pages(n_tokens: int) -> int:
    """Tokens that n take in memory."""
    return -(-n_tokens // PAGE) * PAGE


class Cache:
    """Keys and values of one stream: (2, n_blocks, kv_heads, room, head_dim), of which `length` tokens are filled."""

    def __init__(self, shape: Shape) -> None:
        self.length = 0
        self.data: Floats = np.zeros((2, shape.n_blocks, shape.kv_heads, 0, shape.head_dim), np.float32)
        self._shared = False

    def append(self, new: Floats) -> None:
        """new: (2, n_blocks, n, kv_heads, head_dim)"""
        end = self.length + new.shape[2]
        if self._shared or end > self.data.shape[3]:
            grown: Floats = np.zeros((*self.data.shape[:3], pages(end), self.data.shape[4]), np.float32)
            grown[:, :, :, : self.length] = self.data[:, :, :, : self.length]
            self.data, self._shared = grown, False
        self.data[:, :, :, self.length : end] = new.swapaxes(2, 3)
        self.length = end

    def fork(self) -> Cache:
        """Another that has read the same. Both have it together; whoever goes on copies it first.

        So it costs nothing in the event loop, where it is called: a prompt of 800 tokens is 20 MB.
        """
        self._shared = True
        return copy.copy(self)

    def clear(self) -> None:
        self.data = self.data[:, :, :, :0].copy()


class Rows:
    """Caches side by side, (2, n_blocks, rows, kv_heads, span, head_dim), as the graph takes them.

    A stream that is in the next batch too keeps its row: what it has read before is not copied again. That is most of
    what there is to copy, and without it would cost about as much as the step.
    """

    def __init__(self, shape: Shape, max_tokens: int) -> None:
        self._shape, self._max_tokens = shape, max_tokens
        self._data: Floats = np.zeros((2, shape.n_blocks, 0, shape.kv_heads, 0, shape.head_dim), np.float32)
        self._held: list[tuple[Held, int]] = []
        """What lies in each row, if it still lives, and how many of its tokens."""

    def place(self, caches: Sequence[Cache]) -> list[int]:
        """Bring these caches into the first rows; returns the row of each."""
        self._make_room(len(caches), max(c.length for c in caches))
        held = {ref(): row for row, (ref, _) in enumerate(self._held[: len(caches)])}
        free = sorted(set(range(len(caches))) - {held[c] for c in caches if c in held})
        placed = []
        for cache in caches:
            row = held[cache] if cache in held else free.pop()
            if self._held[row][0]() is not cache or self._held[row][1] != cache.length:
                self._data[:, :, row, :, : cache.length] = cache.data[:, :, :, : cache.length]
                # The graph multiplies what lies behind by zero, which must not be zero times infinity.
                self._data[:, :, row, :, cache.length :] = 0
                self._held[row] = (weakref.ref(cache), cache.length)
            placed.append(row)
        return placed

    def append(self, row: int, cache: Cache, new: Floats) -> None:
        """Add what `cache` has just been given. new: as for Cache.append"""
        start = cache.length - new.shape[2]
        if cache.length <= self._data.shape[4]:
            self._data[:, :, row, :, start : cache.length] = new.swapaxes(2, 3)
            self._held[row] = (weakref.ref(cache), cache.length)
        else:
            self._held[row] = (_nothing, 0)

    def past(self, kind: int, block: int, n: int) -> Floats:
        """(n, kv_heads, span, head_dim) of the first n rows. kind: 0 keys, 1 values"""
        part: Floats = self._data[kind, block, :n]
        return part

    def _make_room(self, n: int, longest: int) -> None:
        rows, span, need = self._data.shape[2], self._data.shape[4], pages(max(longest, 1))
        fits = need <= span <= 2 * (need + PAGE)
        if n <= rows and fits:
            return
        if not fits:
            span = need + PAGE  # room to grow into, or each page would move every row
        rows = rows if n <= rows and rows * span <= self._max_tokens else n
        shape = self._shape
        self._held = [(_nothing, 0)] * rows
        self._data = np.zeros((2, shape.n_blocks, rows, shape.kv_heads, span, shape.head_dim), np.float32)


class Session:
    """The graph in onnxruntime. For one thread at a time.

    max_tokens: rows that are kept for the next batch are given up when they would take more
    raises: ConfigInvalid if onnxruntime is missing or refuses the graph
    """

    def __init__(self, built: Built, threads: int | None = None, max_tokens: int = 32_768) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigInvalid("onnxruntime is not installed; pip install midstream[observer]") from error
        self.shape, self.int8 = built.shape, built.int8
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Threads that spin between steps would take the cores from whoever serves the conversation.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._graph: Any = onnxruntime.InferenceSession(built.graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class of their own
            reason = " ".join(str(error).split())[:300]
            raise ConfigInvalid(f"onnxruntime can't run {built.folder / GRAPH}: {reason}; remove the folder") from error
        self._answers, self._prompts = Rows(self.shape, max_tokens), Rows(self.shape, max_tokens)

    def step(self, parts: Sequence[tuple[Cache, Sequence[int]]]) -> list[Scores]:
        """Feed each stream its next tokens, at least one; returns (n, k) float32 for each.

        Its caches grow by what was fed; nothing changes if it raises.
        """
        width = max(len(ids) for _, ids in parts)
        rows = self._answers if width <= SHORT else self._prompts
        row_of = rows.place([cache for cache, _ in parts])
        lengths = [len(ids) for _, ids in parts]
        starts = np.cumsum([0, *lengths])
        index = np.zeros((len(parts), width), np.int64)
        back = np.empty(starts[-1], np.int64)
        positions = np.empty(starts[-1], np.int64)
        past_length = np.empty(len(parts), np.int64)
        for (cache, _), row, start, n in zip(parts, row_of, starts[:-1], lengths, strict=True):
            index[row, :n] = np.arange(start, start + n)
            back[start : start + n] = np.arange(row * width, row * width + n)
            positions[start : start + n] = np.arange(cache.length, cache.length + n)
            past_length[row] = cache.length
        token_ids = np.array([i for _, ids in parts for i in ids], np.int64)
        feeds = dict(zip(INPUTS, (token_ids, positions, index, back, past_length), strict=True))
        for block in range(self.shape.n_blocks):
            feeds[f"past_key_{block}"] = rows.past(0, block, len(parts))
            feeds[f"past_value_{block}"] = rows.past(1, block, len(parts))
        scores, keys, values = self._graph.run(list(OUTPUTS), feeds)
        new = np.stack([keys, values])
        for (cache, _), row, start, n in zip(parts, row_of, starts[:-1], lengths, strict=True):
            own = new[:, :, start : start + n]
            cache.append(own)
            rows.append(row, cache, own)
        return [scores[start : start + n] for start, n in zip(starts[:-1], lengths, strict=True)]

    def score(self, token_ids: Sequence[int], chunk: int) -> Scores:
        """(n, k) of one text, `chunk` tokens a step."""
        cache = Cache(self.shape)
        found = [self.step([(cache, token_ids[i : i + chunk])])[0] for i in range(0, len(token_ids), chunk)]
        return np.concatenate(found)
