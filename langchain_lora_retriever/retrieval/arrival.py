"""Work of another thread as the callers of an event loop wait for it: one wakes for all, and they go on in turns."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import fresh

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["Arrival", "SharedWork"]

# Callers that go on at once; each then has a millisecond of work, or two.
_AT_ONCE = 4


class Arrival:
    """The end of some work, for the callers of one event loop: they go on a few at a time, as they came.

    Args:
        work: Whose end it is.
        loop: The callers', in which this is made.
    """

    def __init__(self, work: Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._event = asyncio.Event()
        self._num_callers = 0
        work.add_done_callback(partial(_announce, loop, self._event))

    async def wait(self) -> None:
        """Wait for the end, and then while those before have their turn of the loop, and whatever else is ready."""
        num_turns = self._num_callers // _AT_ONCE
        self._num_callers += 1
        await self._event.wait()
        for _ in range(num_turns):
            await asyncio.sleep(0)


def _announce(loop: asyncio.AbstractEventLoop, event: asyncio.Event, _: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(event.set)


class SharedWork:
    """Something that many callers of an event loop want done, and that is done once for all who wait.

    Args:
        begin: Begins the work in another thread.
    """

    def __init__(self, begin: Callable[[], Future[Any]]) -> None:
        self._begin = begin
        self._under_way: dict[asyncio.AbstractEventLoop, tuple[Future[Any], Arrival]] = {}

    async def join(self) -> None:
        """Wait for what is under way, or begin it; whoever must not miss what came meanwhile joins once more.

        Cancelling disturbs nobody else.
        """
        loop = asyncio.get_running_loop()
        found = self._under_way.get(loop)
        if found is None:
            work = self._begin()
            found = self._under_way[loop] = work, Arrival(work, loop)
            work.add_done_callback(lambda _: self._under_way.pop(loop, None))
        work, arrival = found
        await arrival.wait()
        error = work.exception()
        if error is not None:
            raise fresh(error)
