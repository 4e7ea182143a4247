"""The `midstream` command: the one file that may reach both the serving and the training side."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

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
    score,
    select,
    show,
    top,
    train,
)
from monitor.cli.options import Config, Model, StoreFolder
from monitor.config import Settings, load_settings
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
app.command("score")(score.score)
app.command("select")(select.select)
app.command("show")(show.show)
app.command("top")(top.top)
app.command("train")(train.train)
app.add_typer(observer.app, name="observer")


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
    store: StoreFolder = None,
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
    store: StoreFolder = None,
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


def main() -> None:
    """Every expected error is one line with its remedy on stderr, exit code 2."""
    try:
        app(standalone_mode=True)
    except MidstreamError as error:
        print(f"midstream: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
