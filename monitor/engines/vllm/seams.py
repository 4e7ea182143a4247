"""Every name of vLLM's insides that we touch, and whether it is there: an upgrade fails here first."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Seam:
    """where: module and attribute; parameters: names that a call of ours passes or an override of ours takes"""

    where: str
    used_for: str
    parameters: tuple[str, ...] = ()


_OUTPUT = "vllm.v1.engine.output_processor:OutputProcessor"
_LAUNCH = "vllm.entrypoints.launchers"

SEAMS = (
    Seam("vllm.v1.worker.gpu_worker:Worker.load_model", "the tap is attached after it"),
    Seam("vllm.v1.worker.gpu_worker:Worker.execute_model", "a step begins and is noted", ("scheduler_output",)),
    Seam("vllm.v1.worker.gpu_worker:Worker.sample_tokens", "its output takes the scores along", ("grammar_output",)),
    Seam("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", "scores that are still on their way from a GPU"),
    Seam(
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        "scores are put into each request's output",
        ("scheduler_output", "model_runner_output"),
    ),
    Seam("vllm.v1.core.sched.async_scheduler:AsyncScheduler", "the same, with async scheduling"),
    Seam(
        f"{_OUTPUT}.add_request",
        "a request gets its Watch and its cache salt",
        ("request", "prompt", "parent_req", "request_index", "queue"),
    ),
    Seam(
        f"{_OUTPUT}.process_outputs",
        "the decision",
        ("engine_core_outputs", "engine_core_timestamp", "iteration_stats"),
    ),
    Seam(f"{_OUTPUT}.abort_requests", "a client has left", ("request_ids", "internal")),
    Seam(f"{_OUTPUT}.propagate_error", "the engine has died", ("e",)),
    Seam(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "what the second judge released is counted",
        ("scheduler_stats", "iteration_stats"),
    ),
    Seam(
        "vllm.v1.engine.core_client:AsyncMPClient.abort_requests_async",
        "the second judge has blocked",
        ("request_ids",),
    ),
    Seam("vllm.v1.engine.async_llm:AsyncLLM.add_request", "a refusal is noted", ("request_id", "prompt", "params")),
    Seam("vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config", "the engine is started", ("vllm_config",)),
    Seam("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", "probes are loaded into workers", ("method", "args")),
    Seam("vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config", "vLLM's settings", ("usage_context",)),
    Seam("vllm.v1.metrics.stats:IterationStats", "what the second judge released is counted"),
    Seam(
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest.build_chat_params",
        "the self-test renders a conversation",
        ("default_template", "default_template_content_format"),
    ),
    Seam(
        "vllm.renderers.base:BaseRenderer.render_chat_async",
        "the self-test renders a conversation",
        ("conversations", "chat_params"),
    ),
    Seam(f"{_LAUNCH}.cli_args:make_arg_parser", "vLLM's own arguments"),
    Seam(f"{_LAUNCH}.app:build_app", "vLLM's routes", ("args", "supported_tasks", "model_config")),
    Seam(f"{_LAUNCH}.api_server.app_state:init_app_state", "vLLM's routes", ("engine_client", "state", "args")),
    Seam(f"{_LAUNCH}.launcher:serve_http", "the HTTP server", ("app", "sock")),
)

# Fields of vLLM's data that we read or write.
FIELDS: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine:EngineCoreOutput": (
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "finish_reason",
        "stop_reason",
        "kv_transfer_params",
        "prefill_stats",
        "events",
        "new_prompt_logprobs_tensors",
        "prompt_token_id_logprobs",
        "trace_headers",
    ),
    "vllm.v1.engine:EngineCoreRequest": (
        "request_id",
        "external_req_id",
        "prompt_token_ids",
        "sampling_params",
        "cache_salt",
        "resumable",
    ),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
    ),
    "vllm.v1.core.sched.output:CachedRequestData": ("req_ids", "resumed_req_ids", "num_computed_tokens"),
    "vllm.v1.core.sched.output:NewRequestData": ("req_id", "num_computed_tokens"),
    "vllm.v1.outputs:LogprobsLists": (
        "logprob_token_ids",
        "logprobs",
        "sampled_token_ranks",
        "cu_num_generated_tokens",
    ),
}


def problem(seam: Seam) -> str | None:
    """None if vLLM has it as we use it, else what differs."""
    try:
        found = _resolve(seam.where)
    except (ImportError, AttributeError) as error:
        return f"{seam.where} is gone: {error}"
    if not seam.parameters:
        return None
    missing = set(seam.parameters) - set(inspect.signature(found).parameters)
    return f"{seam.where} takes no {', '.join(sorted(missing))}" if missing else None


def missing_fields() -> list[str]:
    gone = []
    for where, names in FIELDS.items():
        kind = _resolve(where)
        known = set(getattr(kind, "__annotations__", {})) | set(getattr(kind, "__struct_fields__", ()))
        gone += [f"{where}.{name}" for name in names if name not in known]
    return gone


def _resolve(where: str) -> Any:
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found
