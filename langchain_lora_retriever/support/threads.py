"""Work in other threads, and when a call must be over."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Generic, TypeVar

from langchain_lora_retriever.errors import fresh
from langchain_lora_retriever.support.forking import after_fork, begin_in_every_process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["Deadline", "SingleFlight", "run_in_thread", "run_within"]

T = TypeVar("T")


class Deadline:
    """When a call must be over.

    Args:
        timeout: Seconds from now; None, or more than a clock can count, for no limit.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout if timeout is not None and timeout <= threading.TIMEOUT_MAX else None
        self._start = time.monotonic()

    def remaining(self) -> float | None:
        """Seconds left, 0 once they have passed; None for no limit."""
        return None if self._timeout is None else max(0.0, self._start + self._timeout - time.monotonic())

    def error(self) -> TimeoutError:
        """What a call that is late raises."""
        return TimeoutError(f"The call took longer than timeout={self._timeout} s and was aborted.")

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Cancel what the body awaits once the time has passed. The body must not yield to others.

        Raises:
            TimeoutError: If it was cancelled for that reason.
        """
        scope = asyncio.timeout(self.remaining())
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if scope.expired():
                raise self.error() from error
            raise


def _new_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=64, thread_name_prefix="lora-call")


# For what may be slow before a request is in the engine (loading, embedding, compiling), and whose callers may leave
# before it is done.
_threads = _new_threads()


def _renew_threads() -> None:
    """Begin anew in a forked process, which has none of its parent's threads."""
    global _threads  # noqa: PLW0603
    _threads = _new_threads()


after_fork(_renew_threads)


def run_within(deadline: Deadline, work: Callable[[], T], *, discard: Callable[[T], object]) -> T:
    """Do work, in another thread where there is a deadline, and leave it to finish by itself if that passes.

    Args:
        deadline: When to stop waiting.
        work: What to do.
        discard: Undoes the result of work that nobody waits for any more; called in any thread.

    Raises:
        TimeoutError: If the deadline passes first.
    """
    if deadline.remaining() is None:
        return work()
    future = _threads.submit(copy_context().run, work)
    try:
        if wait([future], deadline.remaining()).done:
            return future.result()
    except BaseException:
        _leave(future, discard)
        raise
    _leave(future, discard)
    raise deadline.error()


async def run_in_thread(work: Callable[[], T], *, discard: Callable[[T], object] = lambda _: None) -> T:
    """Do work without blocking the event loop; `discard` undoes a result that comes after the task was cancelled."""
    future = _threads.submit(copy_context().run, work)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        _leave(future, discard)
        raise


class SingleFlight(Generic[T]):
    """One piece of work that a thread does for all who want it at the same time. Any event loop may call."""

    def __init__(self) -> None:
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # held for a look at who flies
        self._flight: Future[T] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Do the work, or await the flight that is under way: what changed after it began, it may not have seen.

        Args:
            work: What to do, the same at every call. It goes on when callers are cancelled, for those who stay.

        Raises:
            BaseException: What the work raises, anew for each caller.
        """
        with self._lock:
            flight = self._flight
            if flight is None or flight.done():
                flight = self._flight = _threads.submit(copy_context().run, work)
        flight.add_done_callback(self._forget)
        landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        flight.add_done_callback(lambda _: _tell(landed))
        await landed
        error = flight.exception()
        if error is not None:
            raise fresh(error)
        return flight.result()

    def _forget(self, flight: Future[T]) -> None:
        """Nobody joins it any more, so its result need not live on."""
        with self._lock:
            if self._flight is flight:
                self._flight = None


def _tell(landed: asyncio.Future[None]) -> None:
    """Wake a caller from another thread, if it and its loop are still there."""

    def wake() -> None:
        if not landed.done():
            landed.set_result(None)

    loop = landed.get_loop()
    with suppress(RuntimeError):  # its loop was closed
        loop.call_soon_threadsafe(wake)


def _leave(future: Future[T], discard: Callable[[T], object]) -> None:
    """Stop waiting for work: what has not begun never does, and a result that comes later is discarded."""

    def on_done(done: Future[T]) -> None:
        if not done.cancelled() and done.exception() is None:
            discard(done.result())

    future.cancel()
    future.add_done_callback(on_done)
