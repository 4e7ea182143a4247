"""The decision, where vLLM's engine outputs are processed: hold the newest token, block, and keep the record.

One step before detokenizing, so that text, logprobs, tool calls, n > 1 and every route agree. Runs on the event loop
of the API process, synchronously.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.platforms import current_platform
from vllm.v1.metrics.stats import IterationStats

from monitor.engines.vllm.banks import Banks
from monitor.engines.vllm.call import Averages, Call, current
from monitor.engines.vllm.sequel import BLOCKED, Sequel
from monitor.engines.vllm.support import KEY, POOLED
from monitor.errors import RequestInvalid
from monitor.policy.second import Asker
from monitor.question import Question
from monitor.reread import Offer
from monitor.template import ChatTemplate
from monitor.types import FinishReason, Observer, Prompt


class _Relay:
    """Stands in for vLLM's output queue of one request: gives a block its name."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, output: Any) -> None:
        for choice in getattr(output, "outputs", ()):
            if choice.stop_reason is BLOCKED:
                choice.finish_reason, choice.stop_reason = "content_filter", None
        self._queue.put(output)


class Judge:
    """Takes the place of methods of an AsyncLLM and of its output processor. Every request goes through it.

    engine: vLLM's AsyncLLM, whose workers are MonitoredWorkers; width: columns of a bank; offer: told of each finished
    sequence after its record
    """

    def __init__(
        self,
        engine: Any,
        template: ChatTemplate,
        observer: Observer,
        model_name: str,
        layers: tuple[int, ...],
        width: int,
        offer: Offer | None = None,
    ) -> None:
        self.engine, self.model_name = engine, model_name
        self.banks = Banks(lambda name, args: engine.collective_rpc(name, args=args), layers, width)
        self._template, self._observer, self._width = template, observer, width
        self._offer = offer
        self._loop = asyncio.get_running_loop()
        self._asker = Asker()
        self._aborting: set[asyncio.Task[None]] = set()
        self._sequels: dict[str, Sequel] = {}
        self._averages: dict[str, Averages] = {}
        self._processor = processor = engine.output_processor
        self._add, self._process = processor.add_request, processor.process_outputs
        self._abort, self._propagate = processor.abort_requests, processor.propagate_error
        processor.add_request, processor.process_outputs = self.add_request, self.process_outputs
        processor.abort_requests, processor.propagate_error = self.abort_requests, self.propagate_error
        self._enter, engine.add_request = engine.add_request, self.enter

    @property
    def active(self) -> int:
        return len(self._sequels)

    # --- in: a request ---------------------------------------------------------------------------------------------

    async def enter(self, *args: Any, **kwargs: Any) -> Any:
        """Keep why vLLM refuses a request: some routes that stream tell it in other words by then, or break off."""
        try:
            return await self._enter(*args, **kwargs)
        except VLLMClientError as error:
            current().refused = (400, str(error))
            raise
        except GracefulHTTPError as error:  # its queue is full
            current().refused = (int(error.http_status), error.message)
            raise

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
        call = current()
        params = request.sampling_params
        if params.extra_args and POOLED in params.extra_args:  # a client's word
            params.extra_args = {k: v for k, v in params.extra_args.items() if k != POOLED}
        if call.averages is not None:
            params.extra_args = {POOLED: call.averages.spans}
            self._add(request, prompt, parent_req, request_index, queue)
            self._averages[request.request_id] = call.averages
            return
        bank = call.bank or self.banks.current
        judged = self._prompt(call, request.prompt_token_ids)
        request.cache_salt = f"{KEY}:{bank.epoch}:{request.cache_salt or ''}"
        self._add(request, prompt, parent_req, request_index, _Relay(queue))
        index = _prompt_index(call, request.external_req_id) * call.n + request_index
        sequel = Sequel(call, bank, judged, index, request.request_id, self.model_name)
        self._sequels[request.request_id] = sequel
        bank.users += 1
        call.terms = sequel.terms

    def _prompt(self, call: Call, ids: list[int]) -> Prompt:
        if call.given is not None:
            return call.given.prompt
        if call.format == "chat":
            return self._template.rendered(ids, call.history)
        try:
            return self._template.raw(ids)
        except RequestInvalid as error:
            raise _invalid(str(error)) from error

    # --- out: what the engine made of it ---------------------------------------------------------------------------

    def process_outputs(self, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        passed, n_tokens, sequels, width = [], 0, self._sequels, self._width
        for output in outputs:
            sequel = sequels.get(output.request_id)
            if sequel is None:  # one of ours that is only read, or aborted: then vLLM ignores it too
                self._take_averages(output)
                passed.append(output)
                continue
            n_tokens += len(output.new_token_ids)
            if sequel.take(output, width):
                passed.append(output)
            if sequel.watch.question is not None:
                self._ask(sequel)
        self._observer.scored(time.perf_counter() - began, n_tokens)
        return self._pass_on(passed, *args, **kwargs)

    def _take_averages(self, output: Any) -> None:
        params = output.kv_transfer_params or {}
        params.pop(KEY, None)
        means = params.pop(POOLED, None)
        if not params:
            output.kv_transfer_params = None
        averages = self._averages.get(output.request_id)
        if averages is not None and means is not None:
            averages.means = means

    def _pass_on(self, outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """To vLLM's own method, and see which sequences have ended by it."""
        try:
            result = self._process(outputs, *args, **kwargs)
        finally:  # an error of vLLM's in the midst of it too: nothing else would end those that it has ended
            running = self._processor.request_states
            for output in outputs:
                if output.request_id not in running:
                    self._end(output.request_id, "stop")
        # To vLLM the engine has ended what was blocked; it has not.
        result.reqs_to_abort += [output.request_id for output in outputs if output.stop_reason is BLOCKED]
        return result

    def _end(self, request_id: str, finish: FinishReason) -> None:
        self._averages.pop(request_id, None)
        sequel = self._sequels.pop(request_id, None)
        if sequel is None:
            return
        sequel.watch.end(finish)
        sequel.bank.users -= 1
        call = sequel.call
        record = call.records[sequel.index] = sequel.record
        if record.finish == "engine_error" and call.failed is None:
            call.failed = record
        if not call.silent:
            self._observer.record(record)
            if self._offer is not None:
                self._offer(record, sequel.watch.prompt, sequel.tokens)

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        aborted: list[str] = self._abort(request_ids, internal)
        for request_id in aborted:
            self._end(request_id, "aborted")
        return aborted

    def propagate_error(self, error: Exception) -> None:
        self._propagate(error)
        for request_id in [*self._sequels, *self._averages]:
            self._end(request_id, "engine_error")

    # --- a second judge --------------------------------------------------------------------------------------------

    def _ask(self, sequel: Sequel) -> None:
        """Hand a question that is new to the second judge's thread; nothing here waits for it."""
        question = sequel.watch.question
        if question is None or question is sequel.asked:
            return
        sequel.asked = question
        how = sequel.bank.live.second(sequel.terms.policy)
        read, spell = sequel.tokens[: question.n_read], self._template.tokenizer.decode

        def answered(second: float | None) -> None:
            with contextlib.suppress(RuntimeError):  # at shutdown the loop may be closed; nobody is left to read
                self._loop.call_soon_threadsafe(self._answered, sequel, question, second)

        if how is None:  # the policy was replaced by one without a second judge
            answered(None)
        else:
            self._asker.ask(how, lambda: str(spell(read)), answered)

    def _answered(self, sequel: Sequel, question: Question, second: float | None) -> None:
        if sequel.watch.question is not question:
            return  # it ended without the answer
        output, ready = sequel.resolve(second)
        self._ask(sequel)
        if not ready:
            return
        stats = IterationStats() if self._processor.log_stats else None
        result = self._pass_on([output], time.monotonic(), stats)  # the engine's own clock
        if stats is not None and self.engine.logger_manager is not None:
            self.engine.logger_manager.record(scheduler_stats=None, iteration_stats=stats)
        if result.reqs_to_abort:
            task = self._loop.create_task(self.engine.engine_core.abort_requests_async(result.reqs_to_abort))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)

    def close(self) -> None:
        self._asker.close()


def _prompt_index(call: Call, external_id: str) -> int:
    """Which prompt of a list: vLLM appends its number to the id it was given."""
    separator = {"completions": "-", "chat-batch": "_"}.get(call.route)
    return int(external_id.rpartition(separator)[2]) if separator else 0


def _invalid(message: str) -> Exception:
    error: Exception = VLLMValidationError(message)
    return error
