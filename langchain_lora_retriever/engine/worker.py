"""The engine in this process: a thread that owns the model, and a client that any thread may call."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from traceback import clear_frames
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from langchain_lora_retriever.engine.api import EngineInfo
from langchain_lora_retriever.engine.config import EngineConfig
from langchain_lora_retriever.engine.core import Engine, StepFailedError
from langchain_lora_retriever.engine.generation import Generation, deliver
from langchain_lora_retriever.engine.grammar import compiler_of
from langchain_lora_retriever.engine.pinned_copy import on_device
from langchain_lora_retriever.engine.request import failure
from langchain_lora_retriever.errors import EngineDeadError, EngineOverloadedError, fresh
from langchain_lora_retriever.support.forking import after_fork
from langchain_lora_retriever.support.gc_freeze import frozen_heap
from langchain_lora_retriever.support.openmp import openmp_team

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.admission import Admission
    from langchain_lora_retriever.engine.api import Grammar, Registration
    from langchain_lora_retriever.engine.core import StepOutput
    from langchain_lora_retriever.engine.generation import Delta
    from langchain_lora_retriever.engine.grammar import CompiledGrammar, GrammarCompiler
    from langchain_lora_retriever.engine.model.load import BaseModel
    from langchain_lora_retriever.engine.request import Request
    from langchain_lora_retriever.engine.stats import EngineStats
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["EngineWorker"]

_logger = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 8
"""Steps that may fail one after the other before the engine takes itself for broken."""
_SECONDS_TO_BEGIN = 1e-4
"""How long whoever fills the first step of an idle engine lets its thread have the interpreter."""
_MAX_SECONDS_AT_EXIT = 60
"""How long a process that ends waits for the step that runs."""


class EngineWorker:
    """An engine with a thread of its own: an `EngineClient`, and more. Any thread or event loop may call every method.

    Args:
        base: The loaded model; it belongs to the engine until `close`.
        config: Limits.
        compiler: Compiles grammars; by default the tokenizer's, which others share.
        expected: Adapters that it is likely to run: it prepares for their kinds, where `config.adapter_kinds` does not
            say for which. Others may come and these may not.

    Raises:
        EngineError: If the architecture or the memory does not allow serving.
    """

    def __init__(
        self,
        base: BaseModel,
        config: EngineConfig | None = None,
        *,
        compiler: GrammarCompiler | None = None,
        expected: Sequence[Adapter] = (),
    ) -> None:
        self.config = config or EngineConfig()
        self.core = Engine(base, self.config, expected)
        has_begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(has_begun,), name="lora-engine", daemon=True)
        try:
            self._prepare(base, compiler)
            self._thread.start()
            has_begun.wait()  # the heap is frozen by then, before whoever loaded the model thaws it
        except BaseException:
            if self._thread in threading.enumerate():  # it has begun or is about to, and the core is its own
                has_begun.wait()
                self.close()
            else:
                self.core.close()
            raise
        _running.add(self)

    def _prepare(self, base: BaseModel, compiler: GrammarCompiler | None) -> None:
        """Make what the thread finds when it begins."""
        self._compiler = compiler or compiler_of(base.tokenizer)
        names = {base.name, str(base.model.config.name_or_path or "")}
        self.info = EngineInfo(
            name=base.name,
            base_names=frozenset(names - {"", type(base.model).__name__}),
            device=str(self.core.device),
            max_model_len=self.core.max_model_len,
            max_num_seqs=self.core.max_num_seqs,
        )
        self._generations: dict[Request, Generation] = {}  # the engine's thread alone
        self._submitted: WeakSet[Generation] = WeakSet()  # for a forked process, which tells those who hold one
        self._inbox: deque[Callable[[], None]] = deque()
        self._news = threading.Condition()
        self._num_idle_tokens = 0  # of prompts that came since the thread had nothing to do; -1 once it has
        self._arriving: dict[Request, Generation] = {}  # submitted, and not with the scheduler yet
        self._preparer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-preparer")
        self._num_failed_steps = 0  # one after the other
        self._is_closing = False
        self._is_exiting = False
        self._death: BaseException | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self.core.tokenizer

    @property
    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        """`(in_features, out_features)` of every module that an adapter may target, by module path."""
        return self.core.module_shapes

    @property
    def admission(self) -> Admission:
        """What it asks of requests before it takes them."""
        return self.core.admission

    @property
    def resident_fingerprints(self) -> list[str]:
        """The adapters in device memory."""
        return self.core.slots.resident_fingerprints

    @property
    def is_alive(self) -> bool:
        """Whether it still takes requests: it was neither closed, nor has its bookkeeping failed."""
        return not self._is_closing

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Say of each adapter whether it can run here; see `EngineClient.register`."""
        return self.admission.register(adapters)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        *,
        grammar: Grammar | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> Generation:
        """Queue a request; see `EngineClient.submit`."""
        if self._is_closing:
            raise self._dead()
        request = self.core.make_request(prompt_token_ids, sampling, adapters, output_token_ids)
        generation = Generation(on_abort=partial(self._leave, request))  # which does not hold it: no cycle to collect
        with self._news:
            self._check_alive()
            self._check_room()
            self._arriving[request] = generation
        self._submitted.add(generation)
        try:
            compiled = None if grammar is None else self._compiler.start(grammar)
            prepared = [self._preparer.submit(prepare) for prepare in self.core.preparations(request)]
        except BaseException as error:
            with self._news:
                self._arriving.pop(request, None)
            if isinstance(error, RuntimeError) and self._is_closing:  # the preparer has just been shut down
                raise self._dead() from error
            raise
        _when_done(
            [*prepared, *([compiled] if compiled else [])],
            lambda: self._arrive(request, generation, prepared, compiled),
        )
        if not prepared and compiled is None:
            self._let_begin(len(request.prompt_token_ids))
        return generation

    def _let_begin(self, num_tokens: int) -> None:
        """Let the engine's thread have the interpreter once what came while it was idle fills a step.

        Whoever submits many requests one after the other would keep it for the switch interval, 5 ms, at least.
        """
        with self._news:
            if self._num_idle_tokens < 0:
                return
            self._num_idle_tokens += num_tokens
            if self._num_idle_tokens < self.core.runner.memory.num_usual_tokens:
                return
            self._num_idle_tokens = -1
        time.sleep(_SECONDS_TO_BEGIN)

    def check_process(self) -> None:
        """Say what is wrong in a forked process, where neither the engine nor its model can be used.

        Raises:
            EngineDeadError: If the engine was running when this process was forked.
        """
        if isinstance(self._death, EngineDeadError):
            raise self._dead()

    def stats(self) -> EngineStats:
        """A snapshot of what the engine has been doing."""
        return self.core.stats()

    def check_integrity(self) -> None:
        """Assert, between two steps, that no block or slot is lost."""
        done = threading.Event()
        failure: list[BaseException] = []

        def check() -> None:
            try:
                self.core.check_integrity()
            except AssertionError as error:
                failure.append(error)
            finally:
                done.set()

        self._post(check)
        done.wait()
        if failure:
            raise failure[0]

    def close(self) -> None:
        """Stop the thread, abort what is running, give the model back as it was. Idempotent."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _end_with_interpreter(self) -> None:
        """Let the thread end before the interpreter is taken down under it; nobody wants the model back any more."""
        self._is_exiting = True
        with self._news:
            self._is_closing = True
            self._news.notify()
        self._thread.join(_MAX_SECONDS_AT_EXIT)

    def _end_in_child(self) -> None:
        """Say in a forked process that the engine is not there: its thread is its parent's."""
        self._death = EngineDeadError(
            "This process was forked from one whose engine was running, and a thread does not survive that. Make the "
            "first call after the fork (in each worker), or start processes by spawn."
        )
        self._is_closing = True
        self._news = threading.Condition()
        for generation in list(self._submitted):
            generation.orphan(self._death)

    def __enter__(self) -> Self:
        """Nothing to do: the thread runs from the start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _dead(self) -> EngineDeadError:
        if isinstance(self._death, EngineDeadError):
            return EngineDeadError(str(self._death))
        why = f" after an error: {self._death!r}" if self._death else ": it was closed"
        return EngineDeadError(f"The engine has stopped{why}. Create a new one.{_advice(self._death)}")

    def _check_alive(self) -> None:
        if self._is_closing or self._death is not None:
            raise self._dead() from self._death

    def _post(self, action: Callable[[], None]) -> None:
        """Let the engine's thread do something before its next step."""
        with self._news:
            self._check_alive()
            self._inbox.append(action)
            self._news.notify()

    def _check_room(self) -> None:
        limit = self.config.max_waiting
        if limit is None:
            return
        scheduler = self.core.scheduler
        num_unfinished = len(self._arriving) + len(scheduler.waiting) + len(scheduler.running)
        if num_unfinished >= limit + self.info.max_num_seqs:
            raise EngineOverloadedError(
                f"{num_unfinished} requests run or wait, {self.info.max_num_seqs} may run at once, and "
                f"EngineConfig(max_waiting={limit}) lets no more wait: try again later, or raise it."
            )

    def _leave(self, request: Request) -> None:
        """Let go of a request that was aborted; a stopped engine has done so already."""
        with self._news:
            self._arriving.pop(request, None)
        with suppress(EngineDeadError):
            self._post(lambda: self._forget(request))

    def _arrive(
        self,
        request: Request,
        generation: Generation,
        prepared: Sequence[Future[Any]],
        compiled: Future[CompiledGrammar] | None,
    ) -> None:
        """Give a request to the scheduler, all that it waited for being done; called by whatever thread did the last.

        It holds what was prepared until then, so that it is still kept where the adapter is packed.
        """
        try:
            for result in prepared:
                result.result()
            if compiled is not None:
                limit = request.max_num_tokens - len(request.prompt_token_ids)
                request.constraint = constraint = compiled.result().constraint(fit=limit)
                if request.output_token_ids:
                    constraint.follow(request.output_token_ids)
            self._post(lambda: self._accept(request, generation))
        except BaseException as error:  # noqa: BLE001 - panics of native code too; it ends the request it came from
            with self._news:
                self._arriving.pop(request, None)
            generation.fail(failure("The request could not be prepared", fresh(error)))

    def _accept(self, request: Request, generation: Generation) -> None:
        with self._news:
            self._arriving.pop(request, None)
        if not generation.is_done:  # it may have been aborted on the way
            self._generations[request] = generation
            self.core.add(request)

    def _forget(self, request: Request) -> None:
        if self._generations.pop(request, None) is not None:
            self.core.abort(request)

    def _run(self, has_begun: threading.Event) -> None:
        cause: BaseException | None = None
        try:
            with (
                on_device(self.core.device),
                openmp_team(is_wanted=self.core.device.type == "cpu") as look_at_cores,
                frozen_heap(is_wanted=self.config.freeze_heap),
            ):
                has_begun.set()
                while self._take_news():
                    self._deliver(self._step())
                    look_at_cores()
        except BaseException as error:
            _logger.exception("The engine died")
            clear_frames(error.__traceback__)  # it is kept as a cause, and they hold other callers' prompts
            cause = error
        has_begun.set()
        self._die(cause)
        if self._is_exiting:
            return
        try:
            with on_device(self.core.device):
                self.core.close()
        except Exception:
            if cause is None:
                raise
            _logger.exception("The engine died and could not give its model back")

    def _take_news(self) -> bool:
        """Do what was posted, and wait if there is nothing to compute; False once the engine is closing."""
        while True:
            with self._news:
                while not (self._inbox or self._is_closing or self.core.has_unfinished_requests):
                    self._num_idle_tokens = 0
                    self._news.wait()
                self._num_idle_tokens = -1
                if self._is_closing:
                    return False
            self._do_what_was_posted()
            if self.core.has_unfinished_requests:
                return True

    def _do_what_was_posted(self) -> None:
        """One by one: if one of them fails, the others are still there for `_die`."""
        while True:
            with self._news:
                if not self._inbox:
                    return
                action = self._inbox.popleft()
            action()

    def _step(self) -> list[StepOutput]:
        try:
            outputs = self.core.step()
        except StepFailedError as failed:
            error = failed.__cause__
            self._num_failed_steps += 1
            if self._num_failed_steps >= _MAX_FAILED_STEPS or _is_sticky(error):
                self._deliver([output for output in failed.outputs if output.error is None])
                raise (error or failed) from None  # `_die` tells those that the step served
            _logger.exception("A step failed; its requests get the error and the engine goes on", exc_info=error)
            if error is not None:
                clear_frames(error.__traceback__)
            return failed.outputs
        self._num_failed_steps = 0
        return outputs

    def _deliver(self, outputs: list[StepOutput]) -> None:
        news: list[tuple[Generation, Delta | Exception]] = []
        ended: list[Request] = []
        for request, delta, error in outputs:
            generation = self._generations[request]
            if delta is not None:
                news.append((generation, delta))
            if error is not None:
                news.append((generation, error))
            if error is not None or (delta is not None and delta.finish_reason is not None):
                ended.append(request)
        deliver(news)
        for request in ended:  # only now: whatever ends the thread before, `_die` tells them
            del self._generations[request]

    def _die(self, cause: BaseException | None) -> None:
        with self._news:
            self._death = cause
            self._is_closing = True
        while True:
            try:
                self._do_what_was_posted()  # an accepted request must hear of it, and whoever waits for a check
                break
            except BaseException:
                _logger.exception("What was asked of an engine that died failed")
        error = EngineDeadError(
            f"The engine died: {cause!r}.{_advice(cause)}"
            if cause
            else "The engine was closed while this request was running."
        )
        error.__cause__ = cause
        with self._news:
            generations = [*self._generations.values(), *self._arriving.values()]
            self._generations.clear()
            self._arriving.clear()
        for generation in generations:
            generation.fail(error)
        self._preparer.shutdown(wait=False, cancel_futures=True)


def _when_done(futures: Sequence[Future[Any]], action: Callable[[], None]) -> None:
    """Call `action` once all are done: now, or in the thread that does the last."""
    left = list(range(len(futures) + 1))  # popped by one thread each, under the interpreter's lock
    actions = [action]  # a future keeps its callbacks as long as it lives: they must not keep what the action holds

    def count(_: object = None) -> None:
        if left.pop() == 0:
            actions.pop()()

    for future in futures:
        future.add_done_callback(count)
    count()


def _is_sticky(error: BaseException | None) -> bool:
    """Whether an error of the device stays: after an illegal access every later call fails too, out of memory not."""
    is_of_device = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    return is_of_device and "out of memory" not in str(error)


def _advice(cause: BaseException | None) -> str:
    return " The device cannot be used by this process any more: start another." if _is_sticky(cause) else ""


_running: WeakSet[EngineWorker] = WeakSet()


@atexit.register
def _end_all() -> None:
    for worker in list(_running):
        worker._end_with_interpreter()  # noqa: SLF001 - its other half


def _end_all_in_child() -> None:
    for worker in list(_running):
        worker._end_in_child()  # noqa: SLF001 - its other half


after_fork(_end_all_in_child)
