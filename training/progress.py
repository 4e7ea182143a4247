"""A progress bar with rate and time left, for work that takes minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `tick(n)`: n more are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began, done = time.monotonic(), 0
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, rate="")

        def tick(n: int) -> None:
            nonlocal done
            done += n
            bar.update(task, advance=n, rate=f"{done / (time.monotonic() - began):.0f}/s")

        yield tick


def ticks(n: int, tick: Callable[[int], None]) -> Iterator[int]:
    """0 .. n - 1, each ticked once it is done."""
    for i in range(n):
        yield i
        tick(1)
