"""Starts vLLM's engine with the tap in its workers: settings, checks, probes, self-test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm import __version__ as VLLM_VERSION
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from monitor.config import Settings
from monitor.engines.identity import identify, locate
from monitor.engines.vllm.client import Judge
from monitor.engines.vllm.reread import VllmRereading
from monitor.engines.vllm.scorer import VllmScorer
from monitor.engines.vllm.selftest import check_canaries, check_decoding, check_rendering
from monitor.engines.vllm.support import KEY, TapConfig, check_config, check_environment
from monitor.errors import ConfigInvalid
from monitor.live import LiveProbes, ServedModel, load_candidates, load_live, names_of
from monitor.reread import Offer
from monitor.template import ChatTemplate
from monitor.types import Observer
from probes_store.store import Store

_OURS = (
    "--worker-cls",
    "--scheduler-cls",
    "--additional-config",
    "--model",
    "--host",
    "--port",
    "--api-key",
    "--dtype",
)

_TLS = "Midstream speaks plain HTTP; put a TLS proxy in front (SECURITY.md)"
_KEYS = "the keys are midstream's; leave it out and set MIDSTREAM_API_KEY or MIDSTREAM_KEYS"
_RENDERS = "thresholds hold for prompts that the model's own chat template and tokenizer make; leave it out"
# Settings of the embedded engine that vLLM has arguments of its own for.
_VLLM_HAS = {
    "max_sequences": "vLLM's --max-num-seqs",
    "max_step_tokens": "vLLM's --max-num-batched-tokens",
    "kv_tokens": "vLLM's --kv-cache-memory-bytes",
    "max_queue": "vLLM's --max-num-queued-reqs",
    "max_model_len": "vLLM's --max-model-len",
    "default_max_tokens": "vLLM's --override-generation-config",
    "threads": "OMP_NUM_THREADS",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before the engine starts. arguments: vLLM's own, parsed"""

    settings: Settings
    arguments: Any
    model: ServedModel
    live: LiveProbes


@dataclass(frozen=True, slots=True)
class Started:
    engine: Any
    judge: Judge
    scorer: VllmScorer
    rereading: VllmRereading
    plan: Plan
    dtype: str
    off: float
    """Largest difference of a canary's logit from its card."""


def plan(settings: Settings, extra: Sequence[str]) -> Plan:
    """Read the model's configuration and its probes; parse vLLM's arguments.

    extra: arguments for vLLM, as on its own command line
    raises: MidstreamError
    """
    check_environment(VLLM_VERSION, settings.allow_untested_vllm)
    for setting, remedy in _VLLM_HAS.items():
        if setting in settings.model_fields_set:
            raise ConfigInvalid(f"setting {setting!r} is the embedded engine's; with --engine vllm use {remedy}")
    if settings.score_last:
        raise ConfigInvalid("score_last is not supported with vLLM yet; leave it out")
    taken = next((a for a in extra if a.split("=")[0] in _OURS), None)
    if taken is not None:
        raise ConfigInvalid(f"{taken.split('=')[0]} is set by midstream itself; use midstream's own option for it")
    model = describe(settings)
    live = load_live(model, Store(settings.store), settings)
    arguments = parse(settings, extra, model.name, settings.dtype or live.probes[0].card.model.dtype)
    model = replace(model, aliases=tuple(arguments.served_model_name))
    return Plan(settings, arguments, model, live.called(names_of(model, settings)))


def parse(settings: Settings, extra: Sequence[str], name: str, dtype: str) -> Any:
    """vLLM's arguments: those that our settings give, and the operator's own. name: that the model is served under"""
    parser = make_arg_parser(FlexibleArgumentParser(prog="midstream serve --engine vllm", exit_on_error=True))
    where = locate(settings.model, settings.cache)
    own = ["--model", str(where), "--host", settings.host, "--port", str(settings.port), "--dtype", dtype]
    if settings.revision is not None:
        own += ["--revision", settings.revision]
    given = {a.split("=")[0] for a in extra}
    if "--shutdown-timeout" not in given:
        own += ["--shutdown-timeout", str(round(settings.shutdown_timeout_s))]
    if "--served-model-name" not in given:
        own += ["--served-model-name", *dict.fromkeys([settings.model, name])]
    arguments = parser.parse_args([*own, *extra])
    _check(arguments, {str(where), settings.model}, settings.revision)
    validate_parsed_serve_args(arguments)
    return arguments


def _check(arguments: Any, model: Collection[str], revision: str | None) -> None:
    """By what they come to: a name may be spelled in ways, and stand in vLLM's own --config.

    model: where its tokenizer may be. raises: ConfigInvalid
    """
    refused = (
        ("ssl-keyfile", arguments.ssl_keyfile, _TLS),
        ("ssl-certfile", arguments.ssl_certfile, _TLS),
        ("ssl-ca-certs", arguments.ssl_ca_certs, _TLS),
        ("api-key", arguments.api_key, _KEYS),
        ("chat-template", arguments.chat_template, _RENDERS),
        ("default-chat-template-kwargs", arguments.default_chat_template_kwargs, _RENDERS),
        ("tokenizer", arguments.tokenizer not in (None, *model), _RENDERS),
        ("tokenizer-mode", arguments.tokenizer_mode.lower() not in ("auto", "hf"), _RENDERS),
        ("tokenizer-revision", arguments.tokenizer_revision not in (None, revision), _RENDERS),
    )
    for name, given, why in refused:
        if given:
            raise ConfigInvalid(f"--{name} is not supported: {why}")


def describe(settings: Settings) -> ServedModel:
    """Which model this is, from its configuration and tokenizer alone. raises: MidstreamError"""
    from transformers import AutoConfig, AutoTokenizer

    path = locate(settings.model, settings.cache)
    try:
        config: Any = AutoConfig.from_pretrained(path, revision=settings.revision)
        tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigInvalid(f"--model {settings.model!r} can't be loaded: {_one_line(error)}") from error
    if not config.name_or_path:
        config.name_or_path = str(path)
    identity, text = identify(config), config.get_text_config()
    template = ChatTemplate(tokenizer)
    return ServedModel(
        identity.name,
        identity.fingerprint,
        settings.dtype or "auto",
        text.hidden_size,
        text.num_hidden_layers,
        template,
    )


def engine_config(plan: Plan, worker: str = "monitor.engines.vllm.worker.MonitoredWorker") -> Any:
    """vLLM's VllmConfig with our worker and scheduler in it. raises: MidstreamError for what is not supported"""
    return tapped(plan.arguments, worker, lambda architecture: tap_config(plan, architecture))


def tapped(arguments: Any, worker: str, tap: Callable[[str], TapConfig]) -> Any:
    """As `engine_config`. tap: by the model's architecture"""
    try:
        parsed = AsyncEngineArgs.from_cli_args(arguments)
        config: Any = parsed.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (ValueError, OSError) as error:  # pydantic's errors are ValueErrors
        raise ConfigInvalid(f"vLLM refuses its arguments: {_one_line(error)}") from error
    check_config(config, arguments.api_server_count or 1)
    of_workers = tap(config.model_config.architecture).as_dict()
    config.additional_config = {**config.additional_config, KEY: of_workers}
    config.parallel_config.worker_cls = worker
    kind = "MonitoredAsyncScheduler" if config.scheduler_config.async_scheduling else "MonitoredScheduler"
    config.scheduler_config.scheduler_cls = f"monitor.engines.vllm.scheduler.{kind}"
    return config


def tap_config(plan: Plan, architecture: str) -> TapConfig:
    # Candidates come in beside the live probes when it serves: their layers must be tapped by then.
    candidates, _ = load_candidates(plan.model, Store(plan.settings.store))
    layers = {*plan.live.bank.layers, *(layer for p in candidates for layer in p.card.layers)}
    columns = len(plan.live.bank) + sum(p.card.projections for p in candidates)
    width = max(plan.settings.probe_columns, columns)
    return TapConfig(tuple(sorted(layers)), width, architecture, plan.settings.log_features)


@contextlib.asynccontextmanager
async def started(
    plan: Plan, observer: Observer, config: Any = None, offer: Offer | None = None
) -> AsyncIterator[Started]:
    """The engine, its probes loaded and its self-test passed; shut down at the end. offer: told of finished sequences

    raises: ProbeMismatch if the self-test fails, and what vLLM raises if it can't start
    """
    config = config or engine_config(plan)
    tap = TapConfig(**config.additional_config[KEY])
    engine = start(config, plan.arguments)
    layers, dtype = tuple(tap.layers), str(config.model_config.dtype).removeprefix("torch.")
    with contextlib.ExitStack() as stack:
        stack.callback(engine.shutdown, timeout=config.shutdown_timeout)
        judge = Judge(engine, plan.model.template, observer, plan.model.name, layers, tap.width, offer)
        stack.callback(judge.close)
        rereading = VllmRereading(engine, layers, lambda: judge.active)
        stack.callback(rereading.close)
        await judge.banks.load(plan.live)
        scorer = VllmScorer(engine)
        off = await check_canaries(scorer, plan, plan.live)
        await check_decoding(scorer, plan, plan.live)
        await check_rendering(engine, plan)
        yield Started(engine, judge, scorer, rereading, plan, dtype, off)


def start(config: Any, arguments: Any) -> Any:
    """vLLM's AsyncLLM. raises: ConfigInvalid if it does not start"""
    try:
        return AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=arguments.enable_log_requests,
            disable_log_stats=arguments.disable_log_stats,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigInvalid(f"vLLM did not start ({_one_line(error)}); its own messages above say why") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
