"""Look at a server every second, and print what was seen: on a live screen, line by line, or once."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Iterator

import httpx
from rich.console import Console
from rich.live import Live

from monitor.terminal import plain
from monitor.top.scrape import TIMEOUT_S, Scrape, Unreachable, fetch
from monitor.top.snapshot import Snapshot, snapshot
from monitor.top.view import draw

MINUTE_S = 60.0
Sight = tuple[Snapshot | None, str | None]
"""The newest snapshot there is, and why there is none newer: None if it is new."""


def watch(url: str, key: str | None, interval_s: float, once: bool, as_json: bool) -> bool:
    """Whether `once` reached the server; without it, for ever. key: bearer token that is sent along"""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx.Client(headers=headers, timeout=TIMEOUT_S) as client:
        sights = _looks(client, url.rstrip("/").removesuffix("/metrics") + "/metrics", interval_s)
        if once:
            return _once(url, sights, as_json)
        _on(url, sights, as_json)
    return True


def _looks(client: httpx.Client, metrics: str, interval_s: float) -> Iterator[Sight]:
    """For ever. A failed look keeps what was seen: the next rate is over the whole gap."""
    seen: deque[Scrape] = deque()
    newest: Snapshot | None = None
    while True:
        try:
            seen.append(fetch(client, metrics, time.time()))
        except Unreachable as error:
            yield newest, str(error)
        else:
            while len(seen) > 2 and seen[0].at < seen[-1].at - MINUTE_S:
                seen.popleft()
            newest = snapshot(seen, MINUTE_S)
            yield newest, None
        time.sleep(interval_s)


def _once(url: str, sights: Iterator[Sight], as_json: bool) -> bool:
    shot, error = next(sights)
    if error is None:  # a rate needs two looks
        shot, error = next(sights)
    if as_json:
        print(_line(url, shot, error))
    elif error is None:
        Console().print(draw(url, shot))
    else:
        print(f"midstream: {url} can't be reached: {plain(error)}", file=sys.stderr)
    return error is None


def _on(url: str, sights: Iterator[Sight], as_json: bool) -> None:
    console = Console()
    if as_json:
        for shot, error in sights:
            print(_line(url, shot, error), flush=True)
    elif not console.is_terminal:
        for shot, error in sights:
            console.print(draw(url, shot, error))
            sys.stdout.flush()
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for shot, error in sights:
                live.update(draw(url, shot, error), refresh=True)


def _line(url: str, shot: Snapshot | None, error: str | None) -> str:
    if error is not None or shot is None:
        return json.dumps({"url": url, "time": time.time(), "error": error})
    return json.dumps({"url": url, "error": None} | dataclasses.asdict(shot), allow_nan=False)
