"""An answer's text as it grows -> token ids that more text won't change, and how much of the text they cover.

A tokenizer's last tokens depend on what comes next ("hel" + "lo" is one token). So the newest text waits until its
tokens are settled:

- tokens before the last two words are settled, where a word is what the tokenizer's own pre-tokenizer says, or is
  parted by white space where it has none. Two, because the patterns in use may join a contraction ("'" + "re") or
  blank lines;
- text that may become one of the tokenizer's added tokens ("<|im_" of "<|im_end|>") waits until it has or can't;
- of more than `max_tail` waiting tokens, the oldest are taken as they are: no word may wait for ever;
- `settle(final=True)` takes everything: the answer has ended, or the upstream pauses and the client waits.

So the ids of an answer are those of its whole text, except where a pause or a word without an end parted it.
"""

from __future__ import annotations

import bisect
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_CONTEXT = 64


class Words:
    """length: characters so far; n_tokens: ids given out so far

    max_tail: tokens that may wait for what comes next
    """

    def __init__(self, tokenizer: Any, max_tail: int = 16) -> None:
        self.length = 0
        self._tokenizer, self._max_tail = tokenizer, max_tail
        self._added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        # The last settled word, read again with what follows it: some tokenizers treat the start of a text differently.
        self._context = ""
        self._tail = ""
        self._starts: list[int] = []
        self._ends: list[int] = []

    @property
    def n_tokens(self) -> int:
        return len(self._ends)

    def is_added(self, token: str) -> bool:
        """Whether it is one of the tokenizer's own, like the one that ends an answer."""
        return token in self._added

    @property
    def waiting(self) -> bool:
        """Whether some text has no ids yet."""
        return bool(self._tail)

    def add(self, text: str) -> None:
        # Half a surrogate pair has no UTF-8: it is read as what a client would show for it.
        self._tail += _SURROGATE.sub("\ufffd", text)
        self.length += len(text)

    def settle(self, final: bool = False) -> list[int]:
        """The ids that are settled by now and were not before. final: all of them"""
        if not self._tail:
            return []
        window, skip = self._context + self._tail, len(self._context)
        encoding = self._tokenizer(window, add_special_tokens=False, return_offsets_mapping=True).encodings[0]
        offsets: list[tuple[int, int]] = encoding.offsets
        first = next((i for i, (_, end) in enumerate(offsets) if end > skip), len(offsets)) if skip else 0
        words = _words(window, encoding.word_ids, offsets)
        stop = len(offsets) if final else max(first, self._settled(window, words, offsets))
        base = self.length - len(window)
        for start, end in offsets[first:stop]:
            self._starts.append(base + max(start, skip))
            self._ends.append(base + end)
        if stop > first or final:
            self._keep(window, words, offsets, stop)
        return list(encoding.ids[first:stop])

    def covered(self, n_tokens: int) -> int:
        """Characters whose tokens are all among the first n_tokens."""
        if n_tokens == 0:
            return 0
        end = self._ends[n_tokens - 1]
        # The tokens of one character share its place: it is covered with the last of them.
        return min(end, self._starts[n_tokens]) if n_tokens < len(self._starts) else end

    def _settled(self, window: str, words: list[int], offsets: list[tuple[int, int]]) -> int:
        """How many tokens of the window are settled."""
        last = words[-1] if words else 0
        stop = bisect.bisect_left(words, last - 1)
        stop = max(stop, len(offsets) - self._max_tail)
        if (begun := self._could_be_added(window)) is not None:
            stop = min(stop, next(i for i in range(len(offsets) + 1) if i == len(offsets) or offsets[i][1] > begun))
        while 0 < stop < len(offsets) and offsets[stop][0] < offsets[stop - 1][1]:
            stop -= 1  # in the middle of a character
        return stop

    def _could_be_added(self, window: str) -> int | None:
        """Where the longest tail begins that an added token may begin with."""
        longest = max((len(a) for a in self._added), default=1) - 1
        for start in range(max(0, len(window) - longest), len(window)):
            tail = window[start:]
            if any(len(a) > len(tail) and a.startswith(tail) for a in self._added):
                return start
        return None

    def _keep(self, window: str, words: list[int], offsets: list[tuple[int, int]], stop: int) -> None:
        """Drop what is settled, except the last word of it."""
        cut = offsets[stop - 1][1] if stop < len(offsets) else len(window)
        context = 0
        if 0 < stop < len(words) and words[stop] != words[stop - 1]:
            context = cut - offsets[bisect.bisect_left(words, words[stop - 1])][0]
        self._context = window[cut - context : cut] if context <= _MAX_CONTEXT else ""
        self._tail = window[cut:]


def _words(window: str, ids: list[int | None], offsets: list[tuple[int, int]]) -> list[int]:
    """The number of each token's word, ascending."""
    if len(set(ids)) > 1:
        found, before, number = [], ids[0], 0
        for word in ids:
            number += word != before or word is None
            before = word
            found.append(number)
        return found
    # No pre-tokenizer: all of the text is one word to the tokenizer.
    found, number = [], 0
    for start, _ in offsets:
        number += window[start : start + 1].isspace() or window[max(0, start - 1) : start].isspace()
        found.append(number)
    return found
