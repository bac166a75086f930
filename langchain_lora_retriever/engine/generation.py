"""The caller's end of a running request: iterate it, await it, abort it, from any thread or event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from langchain_lora_retriever.errors import RequestAbortedError, fresh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

__all__ = ["Completion", "Delta", "FinishReason", "Generation", "TokenLogprob", "Usage", "deliver"]

FinishReason: TypeAlias = Literal["stop", "length"]


class TokenLogprob(NamedTuple):
    """Log-probability of a generated token and of its likeliest alternatives, before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Usage(NamedTuple):
    """Token counts of a finished request."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class Delta(NamedTuple):
    """What a request gained since the last delta. The last one carries `finish_reason` and `usage`.

    Attributes:
        text: Text that is certain by now.
        token_ids: Its tokens, and those whose text is not certain yet.
        logprobs: One for each token, if they were asked for.
        finish_reason: "stop" at an end-of-sequence token, a stop string or the end of a grammar; "length" at the token
            limit; None before the end.
        usage: Token counts of the whole request.
        is_shortened: Whether a grammar made the answer end early, to fit the token limit.
        prompt_logprobs: In the first delta, if they were asked for: the log-probabilities of the prompt's tokens from
            `SamplingParams.prompt_logprobs_from` on.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    usage: Usage | None
    is_shortened: bool = False
    prompt_logprobs: tuple[float, ...] | None = None


class Completion(NamedTuple):
    """A finished request: its deltas, joined."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    usage: Usage
    is_shortened: bool = False
    prompt_logprobs: tuple[float, ...] | None = None


Wake: TypeAlias = "tuple[asyncio.AbstractEventLoop | None, Callable[[], object]]"
"""What tells somebody of news, and the event loop it must be called in; None for any thread."""


class Generation:
    """A request in the engine. Its deltas are delivered once, to one iterator; `result` may be asked by anyone.

    Closing an iterator early, or cancelling the task that awaits one, aborts the request and frees its memory.

    Args:
        on_abort: Tells the engine to forget the request; called at most once, from the aborting thread.
    """

    def __init__(self, on_abort: Callable[[], None]) -> None:
        self._on_abort = on_abort
        self._lock = threading.Lock()
        self._pending: deque[Delta] = deque()
        self._received: list[Delta] = []
        self._on_news: list[Wake] = []
        self._on_end: list[Wake] = []
        self._sink: Callable[[Delta | Exception], object] | None = None
        self._future: Future[Completion] = Future()

    @property
    def is_done(self) -> bool:
        """Whether it finished, failed or was aborted."""
        return self._future.done()

    def __iter__(self) -> Iterator[Delta]:
        """Yield deltas as they come; raises as `deltas` does."""
        return self.deltas()

    def deltas(self, timeout: float | None = None) -> Iterator[Delta]:
        """Yield deltas as they come.

        Args:
            timeout: Seconds, from the first delta asked for, after which no further one is waited for.

        Raises:
            TimeoutError: If `timeout` passes first. The request is aborted.
            RequestAbortedError: If the request is aborted meanwhile.
            EngineError: If the step that served it failed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                ready = threading.Event()
                delta = self._next_or_wait((None, ready.set))
                if delta is None:
                    if not ready.wait(None if end is None else max(0.0, end - time.monotonic())):
                        raise TimeoutError
                    continue
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self.abort()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield deltas as they come, without blocking the event loop; raises as `__iter__` does.

        Each may be asked for in another loop.
        """
        try:
            while True:
                ready = asyncio.Event()
                delta = self._next_or_wait((asyncio.get_running_loop(), ready.set))
                if delta is None:
                    await ready.wait()
                    continue
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self.abort()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Args:
            timeout: Seconds to wait. The request goes on if they pass; call `abort` to end it.

        Raises:
            TimeoutError: If `timeout` passes first.
            RequestAbortedError: If the request is aborted.
            EngineError: If the step that served it failed.
        """
        try:
            error = self._future.exception(timeout)
        except KeyboardInterrupt:
            self.abort()
            raise
        if error is not None:
            raise fresh(error)
        return self._future.result()

    async def aresult(self) -> Completion:
        """Wait for the end without blocking the event loop; cancelling the awaiting task aborts the request."""
        ended = asyncio.Event()
        with self._lock:
            self._on_end.append((asyncio.get_running_loop(), ended.set))
            if self._future.done():
                ended.set()
        try:
            await ended.wait()
        except asyncio.CancelledError:
            self.abort()
            raise
        return self.result()

    def hand_over(self, sink: Callable[[Delta | Exception], object]) -> None:
        """Give what has come, and what comes, to a function, in order; no iterator gets anything then.

        Args:
            sink: Takes deltas, and the error that ends the request. Called by whoever delivers, the engine's thread
                mostly: it must neither wait nor fail, nor ask this generation for anything.
        """
        with self._lock:
            for delta in self._pending:
                sink(delta)
            self._pending.clear()
            error = self._future.exception() if self._future.done() else None
            if isinstance(error, Exception):
                sink(error)
            self._sink = sink

    def abort(self) -> None:
        """End the request and free its memory; nothing happens if it is done already."""
        if self.fail(RequestAbortedError("The request was aborted before it finished.")):
            self._on_abort()

    def put(self, delta: Delta) -> None:
        """Deliver a delta; nothing happens if it is done already."""
        deliver([(self, delta)])

    def fail(self, error: Exception) -> bool:
        """End with an error; False if it is done already."""
        wakes = self._take(error)
        _wake_all(wakes or ())
        return wakes is not None

    def orphan(self, error: Exception) -> None:
        """End with an error in a forked process, unless it has ended well.

        Its own lock, or the old future's, may be held by a thread that is not there: neither is looked at.
        """
        self._lock, self._future = threading.Lock(), Future()
        if self._received and self._received[-1].finish_reason is not None:
            self._future.set_result(_join(self._received))
        else:
            self._future.set_exception(error)

    def _take(self, news: Delta | Exception) -> list[Wake] | None:
        """Take in a delta or an error; whom to wake, None if it is done already."""
        with self._lock:
            if self._future.done():
                return None
            if self._sink is not None:
                self._sink(news)
            wakes, self._on_news = self._on_news, []
            if isinstance(news, Exception):
                self._future.set_exception(news)
                return wakes + self._on_end
            if self._sink is None:
                self._pending.append(news)
            self._received.append(news)
            if news.finish_reason is None:
                return wakes
            self._future.set_result(_join(self._received))
            return wakes + self._on_end

    def _next_or_wait(self, wake: Wake) -> Delta | None:
        """The next delta; or None, and `wake` will be called once there is news."""
        with self._lock:
            if self._pending:
                return self._pending.popleft()
            if self._future.done():
                error = self._future.exception()
                if error is not None:
                    raise fresh(error)
                raise RuntimeError("This generation was iterated to its end already; iterate it once.")
            self._on_news.append(wake)
            return None


def deliver(news: Iterable[tuple[Generation, Delta | Exception]]) -> None:
    """Hand out what a step gave. The engine's thread calls this.

    An event loop is woken once for all that wait in it: every wake-up makes the engine's thread compete with it.
    """
    _wake_all([wake for generation, item in news for wake in generation._take(item) or ()])  # noqa: SLF001 - its other half


def _wake_all(wakes: Iterable[Wake]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[Callable[[], object]]] = {}
    for loop, action in wakes:
        if loop is None:
            action()
        else:
            by_loop.setdefault(loop, []).append(action)
    for loop, actions in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(_call_all, actions)


def _call_all(actions: Iterable[Callable[[], object]]) -> None:
    for action in actions:
        action()


def _join(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    logprobs = None
    if any(delta.logprobs is not None for delta in deltas):
        logprobs = tuple(item for delta in deltas for item in delta.logprobs or ())
    return Completion(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        logprobs,
        last.finish_reason,
        last.usage,
        last.is_shortened,
        deltas[0].prompt_logprobs,
    )
