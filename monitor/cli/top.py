"""`midstream top`: a running server's verdicts, scores and rates, as they change."""

from __future__ import annotations

from typing import Annotated

import typer

from monitor.errors import ConfigInvalid

EXIT_UNREACHABLE = 1


def top(
    url: Annotated[str, typer.Option(help="Of the server.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str | None, typer.Option(envvar="MIDSTREAM_API_KEY", help="Bearer token, if a proxy asks one for /metrics.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Two looks, one snapshot; exit code 1 if unreachable.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
) -> None:
    """Watch a running server: verdicts, rates, thresholds, overhead and coverage, until Ctrl-C."""
    from monitor.top.watch import watch  # an HTTP client and a parser that no other command needs

    if not url.startswith(("http://", "https://")):
        raise ConfigInvalid(f"--url {url!r} must begin with http:// or https://")
    try:
        reached = watch(url, key, interval, once, as_json)
    except KeyboardInterrupt:
        raise typer.Exit from None
    if not reached:
        raise typer.Exit(EXIT_UNREACHABLE)
