"""Reading a finished sequence once more, for the residual stream that serving never keeps: averaged, span by span.

Which sequences are kept is known only when they have ended. By then a prefix out of the cache never had a forward pass
of its own, and choices share one; so nothing is noted while a sequence runs, and a kept one is read again from its
first token, when the engine has time. Nothing of it is sampled, judged, recorded or counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from monitor.types import Prompt, Record, Turn

Pooled = npt.NDArray[np.float32]
"""(n_spans, n_layers, d_model): the residual stream at each layer, averaged over the positions of each span."""

Offer = Callable[[Record, Prompt, Sequence[int]], None]
"""Told of every finished sequence by the engine, which must not wait: its record, prompt, and all of its token ids."""


Averager = Callable[
    [Sequence[tuple[Sequence[int], Sequence[Turn]]], Sequence[int], Callable[[int], None]], Iterator[tuple[int, Pooled]]
]
"""Reads many sequences for training: (token ids, spans) of each, the layers, told how many are done since -> the index
of each and its means, in any order."""


class Rereader(Protocol):
    """An engine, seen as one that reads. One reading at a time; nobody asks for a second before `done` was called."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that it taps, ascending."""
        ...

    def reread(
        self, ids: Sequence[int], spans: Sequence[Turn], layers: Sequence[int], done: Callable[[Pooled | None], None]
    ) -> None:
        """Read these tokens when there is time. Does not wait; from any thread.

        layers: of `layers`, ascending; done: called once, later and from any thread, with the means, or with None if it
        can't be read; never, if the engine stops first
        """
        ...
