"""The decision, where vLLM's engine outputs are processed: hold the newest token, block, and keep the record.

One step before detokenizing, so that text, logprobs, tool calls, n > 1 and every route agree. Runs on the event loop
of the API process, synchronously.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import FinishReason as Finish

from monitor.engines.vllm.banks import Bank, Banks
from monitor.engines.vllm.call import CALL, Call, blocks_prompt, current
from monitor.engines.vllm.held import Held
from monitor.engines.vllm.support import KEY
from monitor.sequence import Watch
from monitor.template import ChatTemplate
from monitor.types import FinishReason, Observer, Prompt, Record, RequestInvalid, Scores

_BLOCKED = "midstream:blocked"  # compared by identity: a client's stop string that reads the same is another object
_REASONS: dict[Any, FinishReason] = {
    Finish.STOP: "stop",
    Finish.REPETITION: "stop",
    Finish.LENGTH: "length",
    Finish.ABORT: "aborted",
    Finish.ERROR: "engine_error",
}


class Sequel:
    """One generated sequence on its way out. index: its choice within vLLM's request"""

    def __init__(self, call: Call, bank: Bank, prompt: Prompt, index: int) -> None:
        self.call, self.bank, self.index = call, bank, index
        self.watch = Watch(prompt, bank.live.rules[prompt.format])
        self.held = Held()
        self.judged = False  # its prompt's verdict is counted in the call

    def rows(self, segments: Iterable[tuple[int, bytes]], width: int) -> list[tuple[int, Scores]]:
        bank, k = self.bank.index, len(self.bank.live.bank)
        return [(first, np.frombuffer(raw, np.float32).reshape(-1, 2, width)[:, bank, :k]) for first, raw in segments]


class _Relay:
    """Stands in for vLLM's output queue of one request: gives a block its name."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, output: Any) -> None:
        for choice in getattr(output, "outputs", ()):
            if choice.stop_reason is _BLOCKED:
                choice.finish_reason, choice.stop_reason = "content_filter", None
        self._queue.put(output)


class Judge:
    """Takes the place of four methods of an AsyncLLM's output processor. Every request goes through it.

    engine: vLLM's AsyncLLM, whose workers are MonitoredWorkers; width: columns of a bank
    """

    def __init__(
        self,
        engine: Any,
        template: ChatTemplate,
        observer: Observer,
        model_name: str,
        layers: tuple[int, ...],
        width: int,
    ) -> None:
        self.engine, self.model_name = engine, model_name
        self.banks = Banks(lambda name, args: engine.collective_rpc(name, args=args), layers, width)
        self._template, self._observer, self._width = template, observer, width
        self._sequels: dict[str, Sequel] = {}
        self._kept: dict[str, list[Sequel]] = {}  # self-tests that wait for their sequence
        self._processor = processor = engine.output_processor
        self._add, self._process = processor.add_request, processor.process_outputs
        self._abort, self._propagate = processor.abort_requests, processor.propagate_error
        processor.add_request, processor.process_outputs = self.add_request, self.process_outputs
        processor.abort_requests, processor.propagate_error = self.abort_requests, self.propagate_error

    @property
    def active(self) -> int:
        return len(self._sequels)

    # --- in: a request ---------------------------------------------------------------------------------------------

    def add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        """One sequence is about to be sent to the engine: give it a Watch, and its probe set a say in its cache key.

        raises: VLLMValidationError, which the routes answer with 400, for what can't be judged
        """
        if request.sampling_params is None or request.resumable or request.prompt_token_ids is None:
            raise _invalid("only generation from token ids is monitored; send a text prompt")
        if request.sampling_params.seed is not None and current_platform.is_cpu():
            # One such request would end the engine for everybody as soon as its prompt is prefilled in chunks.
            raise _invalid("vLLM on a CPU can't sample with a seed; leave it out")
        call, bank = current(), self.banks.current
        judged = self._prompt(call, request.prompt_token_ids)
        request.cache_salt = f"{KEY}:{bank.epoch}:{request.cache_salt or ''}"
        self._add(request, prompt, parent_req, request_index, _Relay(queue))
        index = _prompt_index(call, request.external_req_id) * call.n + request_index
        self._sequels[request.request_id] = Sequel(call, bank, judged, index)
        bank.users += 1
        call.started += 1

    def _prompt(self, call: Call, ids: list[int]) -> Prompt:
        if call.format == "chat":
            return self._template.rendered(ids, call.history)
        try:
            return self._template.raw(ids)
        except RequestInvalid as error:
            raise _invalid(str(error)) from error

    # --- out: what the engine made of it ---------------------------------------------------------------------------

    def process_outputs(self, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        passed, n_tokens = [], 0
        for output in outputs:
            sequel = self._sequels.get(output.request_id)
            if sequel is None:  # aborted; vLLM ignores it too
                if output.kv_transfer_params:
                    output.kv_transfer_params.pop(KEY, None)
                passed.append(output)
                continue
            n_tokens += len(output.new_token_ids)
            if self._judge(sequel, output):
                passed.append(output)
        self._observer.scored(time.perf_counter() - began, n_tokens)
        result = self._process(passed, *args, **kwargs)
        for output in passed:
            request_id = output.request_id
            if output.stop_reason is _BLOCKED:  # to vLLM the engine has ended it; it has not
                result.reqs_to_abort.append(request_id)
            if request_id not in self._processor.request_states:
                self._end(request_id, "stop")
        return result

    def _judge(self, sequel: Sequel, output: Any) -> bool:
        """Rewrite one output to what may be released. False if nothing of it may go on yet."""
        watch, call = sequel.watch, sequel.call
        params = output.kv_transfer_params
        segments = params.pop(KEY, ()) if params else ()
        if params is not None and not params:
            output.kv_transfer_params = None
        rows = sequel.rows(segments, self._width)
        n_new = len(output.new_token_ids)
        finish = None if output.finish_reason is None else _REASONS[output.finish_reason]
        for first, part in rows[:-1]:
            watch.advance(first, part)
        first, last = rows[-1] if rows else (watch.n_scored, np.empty((0, len(sequel.bank.live.bank)), np.float32))
        judged = watch.advance(first, last, n_new, finish)
        if call.failed is not None and watch.finish is None:
            watch.end("aborted")  # another sequence of the call may not be answered: neither is this one
        if not sequel.judged and (watch.prompt_judged or watch.finish):
            sequel.judged = True
            call.judged += 1
        ready = sequel.held.exchange(output, judged.released, watch.finish is not None)
        if watch.finish is not None and watch.finish != finish:
            self._stop(sequel, output)
        return ready

    def _stop(self, sequel: Sequel, output: Any) -> None:
        """The Watch has ended it, not the engine."""
        call, finish = sequel.call, sequel.watch.finish
        output.finish_reason, output.stop_reason = Finish.ABORT, _BLOCKED
        if finish == "content_filter":
            call.blocked[sequel.index] = sequel.watch.released
        record = self._record(sequel)
        if call.failed is None and (finish == "unmonitored" or blocks_prompt(record)):
            call.failed = record

    def _record(self, sequel: Sequel) -> Record:
        return sequel.watch.record(sequel.call.id, sequel.index, self.model_name, sequel.call.route)

    def _end(self, request_id: str, finish: FinishReason) -> None:
        sequel = self._sequels.pop(request_id, None)
        if sequel is None:
            return
        sequel.watch.end(finish)
        sequel.bank.users -= 1
        if sequel.call.id in self._kept:
            self._kept[sequel.call.id].append(sequel)
            return
        self._observer.record(self._record(sequel))

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        aborted: list[str] = self._abort(request_ids, internal)
        for request_id in aborted:
            self._end(request_id, "aborted")
        return aborted

    def propagate_error(self, error: Exception) -> None:
        self._propagate(error)
        for request_id in list(self._sequels):
            self._end(request_id, "engine_error")

    # --- without a client ------------------------------------------------------------------------------------------

    async def prefill(self, prompt: Prompt) -> Scores:
        """(n_tokens, K) scores of a prompt, computed and not from the cache; leaves no record.

        raises: what vLLM raises for a prompt it can't take
        """
        call = Call("self-test", prompt.format)
        token = CALL.set(call)
        kept: list[Sequel] = []
        self._kept[call.id] = kept
        try:
            params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
            request = {"prompt_token_ids": list(prompt.token_ids), "cache_salt": call.id}
            async for _ in self.engine.generate(request, params, call.id):
                pass
        finally:
            CALL.reset(token)
            del self._kept[call.id]
        return kept[0].watch.scores


def _prompt_index(call: Call, external_id: str) -> int:
    """Which prompt of a list: vLLM appends its number to the id it was given."""
    separator = {"completions": "-", "chat-batch": "_"}.get(call.route)
    return int(external_id.rpartition(separator)[2]) if separator else 0


def _invalid(message: str) -> Exception:
    error: Exception = VLLMValidationError(message)
    return error
