"""The engine's core: schedule, run, sample, deliver. One thread calls it; `worker.py` owns that thread."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch

from langchain_lora_retriever.engine.adapter_fit import AdapterFit
from langchain_lora_retriever.engine.adapter_slots import AdapterSlots
from langchain_lora_retriever.engine.detokenizer import Detokenizer
from langchain_lora_retriever.engine.kv_cache import KVCacheManager
from langchain_lora_retriever.engine.lora_layers import MAX_RANK
from langchain_lora_retriever.engine.model_runner import ModelRunner
from langchain_lora_retriever.engine.request import Delta, FinishReason, Request
from langchain_lora_retriever.engine.scheduler import Scheduler
from langchain_lora_retriever.engine.stats import EngineStats, StatsRecorder
from langchain_lora_retriever.errors import EngineError, InvalidRequestError, PromptTooLongError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.base_model import BaseModel
    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.flight import Flight
    from langchain_lora_retriever.engine.request import Constraint, TokenLogprob
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["Engine", "StepOutput"]

_NUM_LOOKED_AHEAD = 8  # waiting requests whose adapters travel to the device


class StepOutput(NamedTuple):
    """What one request gained in a step: a delta, or the error that ended it."""

    request: Request
    delta: Delta | None = None
    error: Exception | None = None


class Engine:
    """Continuous batching over one model, every request with its own weighted adapters.

    Args:
        base: The loaded model; it belongs to the engine until `close`.
        config: Limits.
    """

    def __init__(self, base: BaseModel, config: EngineConfig) -> None:
        self.config = config
        self.tokenizer = base.tokenizer
        self._runner = ModelRunner(base, config)
        self.device = self._runner.device
        memory = self._runner.memory
        self.module_shapes = self._runner.probe.module_shapes
        self.max_model_len = memory.max_model_len
        self.max_num_seqs = memory.max_num_seqs
        self._store = self._runner.make_store()
        self.fit = AdapterFit(
            base.name,
            self.module_shapes,
            max_rank=MAX_RANK,
            num_rows=memory.num_lora_rows,
            max_loras=config.max_loras,
        )
        self.slots = AdapterSlots(self._store, max_loras=config.max_loras, num_rows=memory.num_lora_rows)
        self.kv_cache = KVCacheManager(
            memory.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.kv_cache,
            self.slots,
            max_num_seqs=memory.max_num_seqs,
            max_num_batched_tokens=memory.max_num_batched_tokens,
            max_num_prefill_tokens=memory.max_num_prefill_tokens,
            step_sizes=self._runner.step_sizes,
        )
        self._recorder = StatsRecorder()
        self._eos_token_ids = _eos_token_ids(base)
        self._ids = itertools.count()
        self._is_async = self._runner.is_async
        self._in_flight: Flight | None = None
        self._in_step: Sequence[Request] = []
        self._outputs: list[StepOutput] = []

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._in_flight)

    def make_request(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        constraint: Constraint | None = None,
    ) -> Request:
        """Check a request against the engine's limits. Any thread may call this; nothing is queued yet.

        On a GPU its adapters begin to travel there.

        Raises:
            PromptTooLongError: If the prompt leaves no room for a single token.
            InvalidRequestError: If the prompt is empty, or an adapter is not for this model, or the composition can
                never be resident.
        """
        if not prompt_token_ids:
            raise InvalidRequestError("The prompt has no tokens: pass at least one.")
        if len(prompt_token_ids) >= self.max_model_len:
            raise PromptTooLongError(
                f"The prompt has {len(prompt_token_ids)} tokens, but prompt and answer together may have at most "
                f"{self.max_model_len}: shorten the prompt, or raise max_model_len or kv_cache_bytes."
            )
        if len(adapters) > self.config.max_adapters_per_request:
            raise InvalidRequestError(
                f"The request composes {len(adapters)} adapters; the engine takes at most "
                f"{self.config.max_adapters_per_request}: lower top_k or raise max_adapters_per_request."
            )
        self.fit.check_together([adapter for adapter, _ in adapters])
        self._store.prefetch([adapter for adapter, _ in adapters if not self.slots.is_resident(adapter)])
        ordered = sorted(adapters, key=lambda pair: pair[0].fingerprint)  # one sum, whatever order it was asked in
        return Request(
            request_id=next(self._ids),
            prompt_token_ids=list(prompt_token_ids),
            sampling=sampling,
            adapters=tuple(ordered),
            detokenizer=Detokenizer(self.tokenizer, sampling.stop, skip_special_tokens=sampling.skip_special_tokens),
            constraint=constraint,
            max_num_tokens=min(len(prompt_token_ids) + sampling.max_tokens, self.max_model_len),
        )

    def add(self, request: Request) -> None:
        """Queue a request made by `make_request`."""
        self._recorder.on_added(request)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Forget a request that is waiting or running, and free what it holds."""
        self.scheduler.finish(request)
        self._recorder.on_finished(request)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Compute one packed step: prefill what is waiting, decode what is running, choose tokens, deliver.

        With asynchronous scheduling a step is launched before the tokens of the last one are read, so that the device
        need not wait for this thread. It takes those tokens from where the device keeps them, and a request that turns
        out to have ended leaves one surplus token, which is dropped. A grammar needs the token first, and gets it.

        An exception that one request causes (its grammar, its tokens) ends that request alone and is in its output.
        An exception of the step itself is raised, with the step's requests still scheduled: see `fail_step`.
        """
        if self._in_flight is not None and any(r.constraint is not None for r in self._in_flight.requests):
            self._collect(self._in_flight)
        launched = self._launch()
        landing, self._in_flight = self._in_flight, launched
        if landing is not None:
            self._collect(landing)
        if self._in_flight is not None and not self._is_async:
            self._collect(self._in_flight)
        outputs, self._outputs = self._outputs, []
        return outputs

    def fail_step(self, cause: Exception) -> list[StepOutput]:
        """After `step` raised: end the requests that were in it, keep all others.

        Raises:
            AssertionError: If the bookkeeping did not survive; the engine must not be used any more.
        """
        outputs, self._outputs = self._outputs, []
        for request in self._in_step:
            if request.is_finished:
                continue
            self.abort(request)
            error = EngineError(f"The step that served this request failed: {cause!r}")
            error.__cause__ = cause
            outputs.append(StepOutput(request, error=error))
        self._in_step = []
        self.check_integrity()
        return outputs

    def check_integrity(self) -> None:
        """Assert that every block and slot is free, cached, or held by a running request."""
        self.scheduler.check_integrity()

    def stats(self) -> EngineStats:
        """A snapshot of what the engine has been doing; any thread may ask."""
        recorder = self._recorder
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_free_blocks=self.kv_cache.num_free_blocks,
            num_resident_adapters=self.slots.num_resident,
            num_steps=recorder.num_steps,
            num_finished=recorder.num_finished,
            num_prompt_tokens=recorder.num_prompt_tokens,
            num_cached_tokens=recorder.num_cached_tokens,
            num_output_tokens=recorder.num_output_tokens,
            output_tokens_per_second=recorder.output_tokens_per_second,
            num_preemptions=self.scheduler.num_preemptions,
            num_adapter_hits=self.slots.num_hits,
            num_adapter_loads=self.slots.num_loads,
            time_to_first_token=recorder.time_to_first_token,
            inter_token=recorder.inter_token,
        )

    def close(self) -> None:
        """Give the model back as it was and drop the device memory."""
        self._store.close()
        self._runner.close()

    def _launch(self) -> Flight | None:
        """Schedule a step and start it; None if there is nothing that could run before tokens are collected."""
        scheduled = self.scheduler.schedule()
        self._prefetch()
        if not scheduled:
            return None
        self._in_step = [item.request for item in scheduled]
        flight = self._runner.launch(scheduled)
        for item in scheduled:
            item.request.num_computed_tokens += item.num_new_tokens
            self.kv_cache.commit(item.request)
        for request in flight.requests:
            request.num_pending_tokens += 1
        return flight

    def _prefetch(self) -> None:
        """Let the adapters of those who are next travel while they wait."""
        if self.scheduler.waiting:
            adapters = [
                adapter
                for request in itertools.islice(self.scheduler.waiting, _NUM_LOOKED_AHEAD)
                for adapter, _ in request.adapters
                if not self.slots.is_resident(adapter)
            ]
            self._store.prefetch(adapters, may_drop=True)

    def _collect(self, flight: Flight) -> None:
        """Read a step's tokens and append what they are worth to the outputs."""
        if flight is self._in_flight:
            self._in_flight = None
        self._in_step = flight.requests
        token_ids, logprobs = flight.read()
        served = [row for row in zip(flight.requests, token_ids, logprobs, strict=True) if not row[0].is_finished]
        self._recorder.on_step([request for request, _, _ in served])
        outputs = [self._deliver(*row) for row in served]
        self._outputs += [output for output in outputs if output.delta is not None or output.error is not None]

    def _deliver(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> StepOutput:
        try:
            delta = self._accept(request, token_id, logprob)
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes to the request that caused it
            self.abort(request)
            return StepOutput(request, error=error)
        if delta is not None and delta.finish_reason is not None:
            self.scheduler.finish(request)
            self._recorder.on_finished(request)
        return StepOutput(request, delta)

    def _accept(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> Delta | None:
        """Append a sampled token, and the tokens the grammar forces after it; None if no text is certain yet."""
        request.num_pending_tokens -= 1
        if logprob is not None:
            request.logprobs.append(logprob)
        text, finish_reason = self._append(request, token_id)
        if request.constraint is not None and finish_reason is None:
            request.constraint.accept(token_id)
            for forced in request.constraint.forced_tokens():
                more, finish_reason = self._append(request, forced)
                text += more
                if finish_reason is not None:
                    break
                request.constraint.accept(forced)
            if finish_reason is None and request.constraint.is_finished:
                finish_reason = "stop"
        if finish_reason is not None and not request.detokenizer.is_stopped:
            text += request.detokenizer.flush()
        if not text and finish_reason is None:
            return None
        token_ids = tuple(request.output_token_ids[request.num_delivered_tokens :])
        request.num_delivered_tokens = len(request.output_token_ids)
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs, request.logprobs = tuple(request.logprobs), []
        return Delta(text, token_ids, logprobs, finish_reason, request.usage if finish_reason else None)

    def _append(self, request: Request, token_id: int) -> tuple[str, FinishReason | None]:
        request.output_token_ids.append(token_id)
        if token_id in self._eos_token_ids and not request.sampling.ignore_eos:
            return "", "stop"
        text = request.detokenizer.push(token_id)
        if request.detokenizer.is_stopped:
            return text, "stop"
        if request.num_known_tokens >= request.max_num_tokens:
            return text, "length"
        return text, None


def _eos_token_ids(base: BaseModel) -> frozenset[int]:
    """End-of-sequence ids of the generation config and of the tokenizer."""
    configured = base.model.generation_config.eos_token_id if base.model.generation_config else None
    ids = [configured] if isinstance(configured, int) else list(configured or ())
    return frozenset(i for i in (*ids, base.tokenizer.eos_token_id) if i is not None)
