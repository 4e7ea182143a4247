"""The `midstream` command: the one file that may reach both the serving and the training side."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.cli import (
    evaluate,
    gate,
    harvest,
    keys,
    lens,
    lint,
    log,
    observer,
    policy,
    probe,
    retrain,
    review,
    select,
    top,
    train,
)
from monitor.config import DEMO_MODEL, Settings, load_settings
from monitor.errors import ConfigInvalid, MidstreamError
from monitor.types import Mode, Phase

EXIT_USAGE = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Live safety monitoring for LLM serving: every token scored, judged before it is released.",
)
app.add_typer(keys.app, name="key")
app.add_typer(policy.app, name="policy")
app.add_typer(probe.app, name="probe")
app.command("probes")(probe.list_probes)
app.command("lint")(lint.lint)
app.command("evaluate")(evaluate.evaluate)
app.command("gate")(gate.gate)
app.command("lens")(lens.lens)
app.add_typer(lens.experiment, name="experiment")
app.command("harvest", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(harvest.harvest)
app.add_typer(log.app, name="log")
app.command("retrain")(retrain.retrain)
app.command("review")(review.review)
app.command("select")(select.select)
app.command("top")(top.top)
app.command("train")(train.train)
app.add_typer(observer.app, name="observer")
Model = Annotated[str | None, typer.Option(help=f"Model folder or hub id. Default: {DEMO_MODEL}, which comes along.")]
Config = Annotated[Path | None, typer.Option(help="YAML settings file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _modes(given: list[str] | None) -> dict[str, dict[Phase, Mode]] | None:
    modes: dict[str, dict[Phase, Mode]] = {}
    for item in given or []:
        name, _, mode = item.partition("=")
        probe, _, phase = name.rpartition(".")
        if phase not in list(Phase) or mode not in list(Mode) or not probe:
            raise ConfigInvalid(f"--mode {item!r} must be PROBE.PHASE=MODE, like harmful-intent.prompt=shadow")
        modes.setdefault(probe, {})[Phase(phase)] = Mode(mode)
    return modes or None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    engine: Annotated[str | None, typer.Option(help="embedded or vllm. vllm takes vLLM's arguments too.")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Stand in front of this endpoint, like https://HOST/v1, and read along.")
    ] = None,
    upstream_key_env: Annotated[str | None, typer.Option(help="Variable that holds the endpoint's key.")] = None,
    model: Model = None,
    config: Config = None,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    api_key: Annotated[str | None, typer.Option(help="Bearer token of /v1.")] = None,
    keys: Annotated[Path | None, typer.Option(help="File of more keys: midstream key create.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML policy file; then no --mode or --target-fpr.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="PROBE.PHASE=shadow|flag|block; repeat it.")] = None,
    target_fpr: Annotated[float | None, typer.Option(help="Benign requests that may be blocked.")] = None,
    on_flag_webhook: Annotated[str | None, typer.Option(help="POST each flag and block there.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of your own probes.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    allow_untested_vllm: Annotated[bool | None, typer.Option("--allow-untested-vllm")] = None,
) -> None:
    """Serve a model behind an OpenAI-compatible endpoint, watched."""
    settings = load_settings(
        config,
        engine=engine,
        upstream=upstream,
        upstream_key_env=upstream_key_env,
        model=model,
        host=host,
        port=port,
        api_key=api_key,
        keys=keys,
        policy=policy,
        modes=_modes(mode),
        target_fpr=target_fpr,
        webhook_url=on_flag_webhook,
        store=store,
        dtype=dtype,
        allow_untested_vllm=allow_untested_vllm,
    )
    raise typer.Exit(_run_server(settings, context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(
    context: typer.Context,
    engine: Annotated[str, typer.Option(help="vllm; its arguments may follow.")] = "vllm",
    model: Model = None,
    config: Config = None,
    store: Annotated[Path | None, typer.Option(help="Folder of your own probes.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    allow_untested_vllm: Annotated[bool | None, typer.Option("--allow-untested-vllm")] = None,
) -> None:
    """Start an engine with the tap, score the cards' canaries through it, and print what was found."""
    settings = load_settings(
        config, engine=engine, model=model, store=store, dtype=dtype, allow_untested_vllm=allow_untested_vllm
    )
    if settings.engine != "vllm":
        raise ConfigInvalid(f"--engine {engine!r}: only vllm has something to check; the embedded one does it at start")
    harvest.need_vllm()
    from monitor.engines.vllm.check import check as run

    raise typer.Exit(run(settings, context.args))


def _run_server(settings: Settings, extra: list[str]) -> int:
    from monitor import logs

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again: imports take seconds
    if settings.engine == "vllm":
        if settings.upstream:
            raise ConfigInvalid(
                "upstream and engine vllm exclude each other: both would answer; give the one that serves"
            )
        harvest.need_vllm()
        logs.start(settings)  # before vLLM is imported, which sets its own up
        from monitor.api.vllm.serve import serve as serve_vllm

        return serve_vllm(settings, extra)
    if extra:
        raise ConfigInvalid(f"unknown argument {extra[0]!r}; see midstream serve --help (vLLM's need --engine vllm)")
    logs.start(settings)
    if settings.upstream:
        _need("onnxruntime", "the observer needs onnxruntime; pip install midstream[observer]")
        from monitor.api.upstream.serve import serve as serve_upstream

        return serve_upstream(settings)
    from monitor.api.serve import serve as serve_embedded

    return serve_embedded(settings)


def _need(package: str, remedy: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigInvalid(remedy)


@app.command()
def show(
    request_id: Annotated[str, typer.Argument(help="From x-midstream-request-id, or a completion's id.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Why a request was flagged or blocked: values, thresholds, versions, and the positions that decided."""
    from monitor.traffic import find_records

    key = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
    records = find_records(load_settings(config).log, key)
    if not records:
        raise ConfigInvalid(f"no record of request {request_id!r}; it may be older than the log keeps")
    if as_json:
        print(json.dumps(records))
        return
    for record in records:
        _show(Console(), record)


def _show(console: Console, record: dict[str, Any]) -> None:
    coverage = record["coverage"]
    console.print(
        f"[bold]{record['request_id']}[/] choice {record['index']} · {record['route']} · {record['model']} · "
        f"policy {record['policy']}{', key ' + record['key'] if record['key'] else ''}\n"
        f"verdict [bold]{record['verdict']}[/], finish {record['finish']}, "
        f"{record['released_tokens']} of {coverage['response_tokens']} answer tokens released\n"
        f"scored {coverage['prompt_scored']} prompt + {coverage['response_scored']} answer tokens, "
        f"{coverage['final_unscored']} last token unscored, {coverage['unmonitored']} unmonitored"
        # A record of an earlier version doesn't say; what it had was the engine's.
        f"{', read by the observer' if record.get('scored_by') == 'observer' else ''}",
        highlight=False,
    )
    table = Table()
    for column in (
        "probe",
        "version",
        "phase",
        "mode",
        "value",
        "threshold",
        "verdict",
        "crossed at",
        "highest token",
    ):
        table.add_column(column)
    acted = {r["probe"] for r in record["readings"] if r["action"] != "allow" or r["would_block"]}
    for r in record["readings"]:
        if r["mode"] == "shadow" and r["threshold"] is None and r["action"] == "allow":
            continue  # it is not calibrated there: its value says nothing
        peak = "-" if r["peak_position"] is None else f"{r['peak_score']:.3f} at {r['peak_position']}"
        crossed = "-" if r["crossed_at"] is None else str(r["crossed_at"])
        verdict = r["action"] + (" (would act)" if r["would_block"] and r["action"] == "allow" else "")
        table.add_row(
            r["probe"],
            r["version"],
            r["phase"],
            r["mode"],
            _number(r["value"]),
            _number(r["threshold"]),
            verdict,
            crossed,
            peak,
        )
    console.print(table)
    for asked in record["escalations"]:
        said = f"{asked['value']:.3f} at position {asked['position']}; the second judge: {_number(asked['second'])}"
        console.print(f"{asked['probe']}, {asked['phase']}, uncertain: {said}: {asked['result']}", highlight=False)
    for name, scores in record["token_scores"].items():
        if name not in acted:
            continue
        spans = [*record["counted"], [coverage["prompt_tokens"], len(scores)]]
        positions = [p for start, end in spans for p in range(start, min(end, len(scores)))]
        ranked = sorted(((p, scores[p]) for p in positions), key=lambda item: -item[1])[:8]
        console.print(f"{name}: highest positions " + ", ".join(f"{p}: {s:.2f}" for p, s in ranked), highlight=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@app.command()
def score(
    text: Annotated[str, typer.Argument(help="A user's message.")],
    model: Model = None,
    config: Config = None,
    store: Annotated[Path | None, typer.Option(help="Folder of your own probes.")] = None,
    tokens: Annotated[bool, typer.Option(help="Each token's score, coloured.")] = False,
    as_json: Json = False,
) -> None:
    """Score one message as a prompt, without generating."""
    from monitor.scoring import score_text

    scored = score_text(load_settings(config, model=model, store=store), text)
    if as_json:
        print(json.dumps(scored.as_dict()))
        return
    console = Console()
    table = Table()
    for column in ("probe", "version", "value", "probability", "threshold", "verdict"):
        table.add_column(column)
    for row in scored.rows:
        threshold = "-" if row.threshold is None else f"{row.threshold:.3f}"
        table.add_row(row.probe, row.version, f"{row.value:.3f}", f"{row.probability:.3f}", threshold, row.verdict)
    console.print(table)
    if tokens:
        for row in scored.rows:
            console.print(Text.assemble(f"{row.probe}: ", *_coloured(scored.tokens, row.token_scores)))


def _coloured(tokens: list[str], scores: list[float | None]) -> list[tuple[str, str]]:
    """Green below 0, red above, stronger with distance; grey where a position does not count."""
    parts = []
    for token, value in zip(tokens, scores, strict=True):
        shown = token.replace("\n", "⏎")
        if value is None:
            parts.append((shown, "dim"))
        else:
            level = min(255, 60 + int(abs(value) * 40))
            colour = f"rgb({level},30,30)" if value > 0 else f"rgb(20,{level // 2},40)"
            parts.append((f"{shown}[{value:+.1f}] ", f"white on {colour}"))
    return parts


def main() -> None:
    """Every expected error is one line with its remedy on stderr, exit code 2."""
    try:
        app(standalone_mode=True)
    except MidstreamError as error:
        print(f"midstream: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
