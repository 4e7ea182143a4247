"""Token ids -> text as it grows, piece by piece, with stop strings found and never released."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class AnswerText:
    """The text of one answer. Each sampled token adds a piece; released tokens release their pieces.

    A piece holds what became readable with its token: bytes of an unfinished character wait for the next one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._text = ""
        self._ends: list[int] = []  # end of each token's piece in _text
        self._cut: int | None = None  # where a stop string begins
        self._sent = 0

    def add(self, token_id: int) -> bool:
        """Take a sampled token; True if a stop string is complete now."""
        searched = max(0, len(self._text) - max((len(s) for s in self._stop), default=1) + 1)
        self._text += self._piece(token_id)
        self._ends.append(len(self._text))
        found = [i for s in self._stop if (i := self._text.find(s, searched)) >= 0]
        if found:
            self._cut = min(found)
        return bool(found)

    def _piece(self, token_id: int) -> str:
        try:
            return self._stream.step(self._backend, token_id) or ""
        except Exception as error:  # that is all its class says
            if "Invalid prefix" not in str(error):
                raise
            # A tokenizer that falls back to bytes has just read what came before in another way: a lone byte after a
            # character of several. That part is out; it goes on from here.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._backend, token_id) or ""

    def release(self, n_tokens: int, final: bool) -> str:
        """The text not yet released of the first n_tokens tokens.

        What could be the start of a stop string waits for the next token, unless `final`.
        """
        end = self._ends[n_tokens - 1] if n_tokens else 0
        if self._cut is not None:
            end = min(end, self._cut)
        elif not final:
            end -= self._could_stop(self._text[:end])
        if end <= self._sent:
            return ""
        piece = self._text[self._sent : end]
        self._sent = end
        return piece

    def shown(self, n_tokens: int) -> int:
        """How many of the first n_tokens tokens have all their text released."""
        return bisect.bisect_right(self._ends, self._sent, 0, n_tokens)

    def _could_stop(self, text: str) -> int:
        """Length of the longest tail of `text` that is a proper start of a stop string."""
        return max(
            (n for s in self._stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])),
            default=0,
        )
