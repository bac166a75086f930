"""The engine's core: schedule, run, sample, deliver. One thread calls it; `worker.py` owns that thread."""

from __future__ import annotations

import itertools
import logging
import math
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from langchain_lora_retriever.engine.adapter_fit import AdapterFit
from langchain_lora_retriever.engine.adapter_slots import AdapterSlots
from langchain_lora_retriever.engine.admission import Admission
from langchain_lora_retriever.engine.detokenizer import Detokenizer, Vocabulary
from langchain_lora_retriever.engine.generation import Delta, TokenLogprob
from langchain_lora_retriever.engine.kv_blocks import KVCacheManager
from langchain_lora_retriever.engine.logits_rules import LogitsRules
from langchain_lora_retriever.engine.model.generation_defaults import GenerationDefaults
from langchain_lora_retriever.engine.model.lora_layers import MAX_RANK
from langchain_lora_retriever.engine.model.runner import ModelRunner
from langchain_lora_retriever.engine.request import Request, failure, first_active
from langchain_lora_retriever.engine.sampler import ChosenToken, not_finite
from langchain_lora_retriever.engine.scheduler import Scheduler
from langchain_lora_retriever.engine.stats import EngineStats, StatsRecorder
from langchain_lora_retriever.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.generation import FinishReason
    from langchain_lora_retriever.engine.model.load import BaseModel
    from langchain_lora_retriever.engine.pending_step import PendingStep
    from langchain_lora_retriever.engine.request import Constraint
    from langchain_lora_retriever.engine.sampler import Outcome
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["Engine", "StepFailedError", "StepOutput"]

_logger = logging.getLogger(__name__)

_NUM_LOOKED_AHEAD = 8  # waiting requests whose adapters travel to the device
_MAX_FORCED_TOKENS = 256
"""Forced tokens of a request taken in one step: others wait meanwhile. The grammar leaves the model no other choice."""


class StepOutput(NamedTuple):
    """What one request gained in a step: a delta, or the error that ended it."""

    request: Request
    delta: Delta | None = None
    error: Exception | None = None


class StepFailedError(Exception):
    """A step failed as a whole; the engine can go on.

    Attributes:
        outputs: What requests gained before, and the errors of those that the step served.
    """

    def __init__(self, outputs: list[StepOutput]) -> None:
        super().__init__("a step failed")
        self.outputs = outputs


class _BlamedError(Exception):
    """Part of a step failed for some requests."""

    def __init__(self, requests: Sequence[Request], cause: Exception) -> None:
        super().__init__()
        self.requests = requests
        self.cause = cause


@contextmanager
def _blaming(requests: Sequence[Request]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _BlamedError(requests, error) from error


class Engine:
    """Continuous batching over one model, every request with its own weighted adapters.

    Args:
        base: The loaded model; it belongs to the engine until `close`.
        config: Limits.
        expected: Adapters for whose kinds it prepares, where `config` does not say for which.
    """

    def __init__(self, base: BaseModel, config: EngineConfig, expected: Sequence[Adapter] = ()) -> None:
        self.config = config
        self._defaults = GenerationDefaults.of(base)
        self.tokenizer = base.tokenizer
        self.runner = ModelRunner(base, config, expected)
        with ExitStack() as undo:
            undo.callback(self.runner.close)
            self.store = self.runner.make_store()
            undo.callback(self.store.close)
            self._make_rest(base, config)
            undo.pop_all()

    def _make_rest(self, base: BaseModel, config: EngineConfig) -> None:
        """Make what stands around the runner and the store."""
        self.device = self.runner.device
        memory = self.runner.memory
        self.module_shapes = self.runner.module_shapes
        self.max_model_len = memory.max_model_len
        self.max_num_seqs = memory.max_num_seqs
        fit = AdapterFit(
            base.name,
            self.module_shapes,
            max_rank=MAX_RANK,
            num_rows=memory.num_lora_rows,
            max_loras=config.max_loras,
            vocabulary=self.runner.probe.vocabulary.sides,
            vocab_size=self.runner.vocab_size,
            is_base_weight=self.runner.lora_layers.is_base_weight,
        )
        self.admission = Admission(
            max_model_len=memory.max_model_len,
            vocab_size=self.runner.vocab_size,
            max_adapters_per_request=config.max_adapters_per_request,
            fit=fit,
        )
        self.slots = AdapterSlots(
            self.store,
            max_loras=config.max_loras,
            num_rows=memory.num_lora_rows,
            num_warm_rows=memory.num_warm_rows,
        )
        self.kv_cache = KVCacheManager(
            memory.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching and not self.runner.probe.recurrent,
            num_warm_blocks=memory.num_warm_blocks,
        )
        if config.enable_prefix_caching and self.runner.probe.recurrent:
            _logger.info(
                "%s keeps states of sequences beside keys and values: prefixes are not shared between requests.",
                type(base.model).__name__,
            )
        self.scheduler = Scheduler(
            self.kv_cache,
            self.slots,
            max_num_seqs=memory.max_num_seqs,
            max_num_batched_tokens=memory.max_num_batched_tokens,
            num_usual_tokens=memory.num_usual_tokens,
            max_num_prefill_tokens=memory.max_num_prefill_tokens,
            step_sizes=self.runner.step_sizes,
        )
        self.recorder = StatsRecorder()
        self._vocabulary = Vocabulary(base.tokenizer)
        self._ids = itertools.count()
        self._is_async = self.runner.is_async
        self._pending: PendingStep | None = None
        self._dormant: set[str] = set()  # fingerprints of activated LoRAs that a prompt did not invoke

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether a `step` would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._pending)

    def make_request(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        output_token_ids: Sequence[int] = (),
    ) -> Request:
        """Check a request against the engine's limits. Any thread may call this; nothing is queued yet.

        On a GPU its adapters begin to travel there, but for those of which something is to be computed first. One that
        has the beginning of its answer already is as one that was preempted: its tokens are computed again, in one go.

        Raises:
            InvalidRequestError: As `Admission.check` does.
        """
        token_ids = self.admission.check(prompt_token_ids, sampling, adapters, output_token_ids)
        max_num_tokens = min(len(token_ids) + sampling.max_tokens, self.max_model_len)
        end_token_ids = self._end_token_ids(sampling)
        rules = None
        if self._defaults.has_rules or sampling.repetition_penalty is not None:
            rules = LogitsRules(
                self._defaults,
                token_ids,
                repetition_penalty=sampling.repetition_penalty,
                end_token_ids=end_token_ids,
                max_num_tokens=max_num_tokens,
            )
        layers = self.runner.lora_layers
        missing = [adapter for adapter, _ in adapters if not self.slots.is_resident(adapter)]
        self.store.prefetch([adapter for adapter in missing if not adapter.members and layers.is_prepared(adapter)])
        ordered = sorted(adapters, key=lambda pair: pair[0].fingerprint)  # one sum, whatever order it was asked in
        activations = tuple([first_active(adapter.invocation_tokens, token_ids) for adapter, _ in ordered])
        if None in activations:
            self._tell_dormant([a for (a, _), first in zip(ordered, activations, strict=True) if first is None])
        request = Request(
            request_id=next(self._ids),
            prompt_token_ids=token_ids,
            sampling=sampling,
            adapters=tuple(ordered),
            activations=activations,
            detokenizer=Detokenizer(
                self.tokenizer,
                sampling.stop,
                skip_special_tokens=sampling.skip_special_tokens,
                vocabulary=self._vocabulary,
            ),
            rules=rules if rules is not None and rules.is_needed else None,
            end_token_ids=end_token_ids,
            max_num_tokens=max_num_tokens,
            output_token_ids=list(output_token_ids),
            num_delivered_tokens=len(output_token_ids),
        )
        for token_id in request.output_token_ids:
            request.detokenizer.push(token_id)  # its text was given where it was chosen
        return request

    def preparations(self, request: Request) -> list[Callable[[], object]]:
        """What is to be computed of the request's adapters before others wait for it; the results are to be held.

        Of those that are not in device memory: fusions are averaged, and DoRA's gains worked out.
        """
        layers = self.runner.lora_layers
        missing = [adapter for adapter, _ in request.adapters if not self.slots.is_resident(adapter)]
        return [
            *(partial(dict, adapter.weights) for adapter in missing if adapter.members),
            *(partial(layers.prepare, adapter) for adapter in missing if not layers.is_prepared(adapter)),
        ]

    def _tell_dormant(self, adapters: Sequence[Adapter]) -> None:
        """Say once of an activated LoRA that a prompt does not invoke it."""
        for adapter in adapters:
            if adapter.fingerprint not in self._dormant:
                self._dormant.add(adapter.fingerprint)
                _logger.warning(
                    "adapter %r is an activated LoRA, and its invocation tokens %s do not occur in a prompt it was "
                    "chosen for: the base model answers, as with PEFT. Put %r where it is to be active.",
                    adapter.name,
                    list(adapter.invocation_tokens),
                    self.tokenizer.decode(list(adapter.invocation_tokens)),
                )

    def add(self, request: Request) -> None:
        """Queue a request made by `make_request`."""
        self.recorder.on_added(request)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Forget a request that is waiting or running, and free what it holds."""
        self.scheduler.finish(request)
        self.recorder.on_finished(request)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Compute one packed step: prefill what is waiting, decode what is running, choose tokens, deliver.

        With asynchronous scheduling a step is launched before the tokens of the last one are read, so that the device
        need not wait for this thread. It takes those tokens from where the device keeps them, and a request that turns
        out to have ended leaves one surplus token, which is dropped. What needs the token first (a
        grammar, a ban on repeated sequences) gets it.

        What goes wrong for one request (its adapters cannot be loaded, its grammar fails, its logits are not finite)
        ends that request alone and is in its output.

        Raises:
            StepFailedError: If the step itself failed. Its requests have ended, with errors that are in its outputs.
            Exception: If scheduling or the bookkeeping is broken; the engine must not be used any more.
        """
        outputs: list[StepOutput] = []
        try:
            if self._pending is not None and any(r.needs_known_tokens for r in self._pending.requests):
                outputs += self._collect(self._pending)
            launched = self._launch(outputs)
            last, self._pending = self._pending, launched
            if last is not None:
                outputs += self._collect(last)
            if self._pending is not None and not self._is_async:
                outputs += self._collect(self._pending)
            if self._pending is None:
                self.runner.forget_choices()
        except _BlamedError as blamed:
            outputs += self._end(blamed.requests, blamed.cause)
            outputs += self._collect_what_ran()
            self.check_integrity()
            raise StepFailedError(outputs) from blamed.cause
        return outputs

    def check_integrity(self) -> None:
        """Assert that every block and slot is free, cached, or held by a running request."""
        self.scheduler.check_integrity()

    def stats(self) -> EngineStats:
        """A snapshot of what the engine has been doing; any thread may ask."""
        recorder = self.recorder
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_free_blocks=self.kv_cache.num_free_blocks,
            num_resident_adapters=self.slots.num_resident,
            num_steps=recorder.num_steps,
            output_tokens_per_second=recorder.output_tokens_per_second,
            num_preemptions=self.scheduler.num_preemptions,
            num_adapter_hits=self.slots.num_hits,
            num_adapter_loads=self.slots.num_loads,
            num_blocks=self.runner.memory.num_blocks,
            **recorder.told(),
        )

    def close(self) -> None:
        """Give the model back as it was, drop the device memory, and let go of all requests."""
        self._pending = None
        self.scheduler.forget()
        self.runner.forget_choices()
        self.store.close()
        self.runner.close()

    def _launch(self, outputs: list[StepOutput]) -> PendingStep | None:
        """Schedule a step and start it; None if there is nothing that could run before tokens are collected.

        Args:
            outputs: Where requests go that cannot be admitted.
        """
        scheduled = self.scheduler.schedule()
        outputs += map(self._refuse, self.scheduler.take_refused())
        self._prefetch()
        if not scheduled:
            return None
        with _blaming([item.request for item in scheduled]):
            pending = self.runner.launch(scheduled)
            for item in scheduled:
                item.request.num_computed_tokens += item.num_new_tokens
            for request in pending.requests:
                request.num_pending_tokens += 1
        return pending

    def _refuse(self, refused: tuple[Request, Exception]) -> StepOutput:
        """End a request that never ran."""
        request, error = refused
        request.is_finished = True
        self.recorder.on_finished(request)
        names = ", ".join(repr(adapter.name) for adapter, _ in request.adapters)
        return StepOutput(request, error=failure(f"The adapters {names} cannot be loaded", error))

    def _end(self, requests: Sequence[Request], cause: Exception) -> list[StepOutput]:
        """End the requests of a step that failed, but for those that have ended already; keep all others."""
        outputs = []
        for request in requests:
            if not request.is_finished:
                self.kv_cache.forget(request)  # others may find what it was to compute
                self.abort(request)
                error = EngineError(f"The step that served this request failed: {cause!r}")
                error.__cause__ = cause
                outputs.append(StepOutput(request, error=error))
        return outputs

    def _end_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """The model's end-of-sequence tokens, unless these are ignored, and the request's own."""
        return (frozenset() if sampling.ignore_eos else self._defaults.eos_token_ids).union(sampling.stop_token_ids)

    def _prefetch(self) -> None:
        """Let the adapters of those who are next travel while they wait."""
        if self.scheduler.waiting:
            adapters = [
                adapter
                for request in itertools.islice(self.scheduler.waiting, _NUM_LOOKED_AHEAD)
                for adapter, _ in request.adapters
                if not self.slots.is_resident(adapter)
            ]
            self.store.prefetch(adapters, may_drop=True)

    def _collect(self, pending: PendingStep) -> list[StepOutput]:
        """Read the tokens of a step that was launched, and say what each request gained."""
        if pending is self._pending:
            self._pending = None
        with _blaming(pending.requests):
            served = [row for row in zip(pending.requests, pending.read(), strict=True) if not row[0].is_finished]
            self.recorder.on_step([request for request, _ in served])
            outputs = [self._deliver(*row) for row in served]
        return [output for output in outputs if output.delta is not None or output.error is not None]

    def _collect_what_ran(self) -> list[StepOutput]:
        """Read the tokens of the step before one that failed, which may have written over them on the device."""
        if self._pending is None:
            return []
        try:
            return self._collect(self._pending)
        except _BlamedError as blamed:
            return self._end(blamed.requests, blamed.cause)

    def _deliver(self, request: Request, outcome: Outcome) -> StepOutput:
        scores = request.prompt_logprobs
        if scores and isinstance(outcome, ChosenToken) and not all(map(math.isfinite, scores.values())):
            outcome = not_finite(request)
        if not isinstance(outcome, ChosenToken):
            self.kv_cache.forget(request)  # what it has computed may be as wrong as its logits
            self.abort(request)
            return StepOutput(request, error=outcome)
        try:
            delta = self._accept(request, *outcome)
        except BaseException as error:  # noqa: BLE001 - panics of tokenizers too; it ends the request it came from
            self.abort(request)
            return StepOutput(request, error=failure("The request failed while its answer was read", error))
        if delta is not None and delta.finish_reason is not None:
            self.scheduler.finish(request)
            self.recorder.on_finished(request)
        return StepOutput(request, delta)

    def _accept(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> Delta | None:
        """Append a sampled token, and the tokens the grammar forces after it; None if no text is certain yet."""
        request.num_pending_tokens -= 1
        text, finish_reason = self._append(request, token_id, logprob)
        if request.constraint is not None and finish_reason is None:
            more, finish_reason = self._follow(request, request.constraint, token_id)
            text += more
        if finish_reason is not None and not request.detokenizer.is_stopped:
            text += request.detokenizer.flush()
        if not text and finish_reason is None:
            return None
        token_ids = tuple(request.output_token_ids[request.num_delivered_tokens :])
        request.num_delivered_tokens = len(request.output_token_ids)
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs, request.logprobs = tuple(request.logprobs), []
        prompt_logprobs = request.take_prompt_logprobs()
        if finish_reason is None:
            return Delta(text, token_ids, logprobs, None, None, prompt_logprobs=prompt_logprobs)
        is_shortened = request.constraint is not None and request.constraint.is_shortened
        return Delta(text, token_ids, logprobs, finish_reason, request.usage, is_shortened, prompt_logprobs)

    def _follow(self, request: Request, constraint: Constraint, token_id: int) -> tuple[str, FinishReason | None]:
        """Advance the grammar by a token, and append those it forces next, as many as a step may take."""
        constraint.accept(token_id)
        text = ""
        for forced in itertools.islice(constraint.forced_tokens(), _MAX_FORCED_TOKENS):
            if not 0 <= forced < self.runner.vocab_size:
                raise InvalidRequestError(
                    f"The grammar forces the token {forced}, but the model has {self.runner.vocab_size} tokens: "
                    "change the grammar, or the tokenizer, which has more tokens than the model."
                )
            logprob = TokenLogprob(forced, 0.0, ()) if request.sampling.logprobs is not None else None
            more, finish_reason = self._append(request, forced, logprob)
            text += more
            if finish_reason is not None:
                return text, finish_reason
            constraint.accept(forced)
        return text, "stop" if constraint.is_finished else None

    def _append(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> tuple[str, FinishReason | None]:
        request.output_token_ids.append(token_id)
        if logprob is not None:
            request.logprobs.append(logprob)
        if token_id in request.end_token_ids:
            return "", "stop"
        text = request.detokenizer.push(token_id)
        if request.detokenizer.is_stopped:
            return text, "stop"
        if request.num_known_tokens >= request.max_num_tokens:
            return text, "length"
        return text, None
