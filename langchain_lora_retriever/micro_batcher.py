"""Concurrent calls to a slow batch function, made as one call."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MicroBatcher"]


class _Batch:
    """Texts that are embedded together, and their vectors `[len(texts), d]` to come."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.vectors: Future[NDArray[np.float32]] = Future()
        self.arrivals: dict[asyncio.AbstractEventLoop, asyncio.Event] = {}


class MicroBatcher:
    """Embeds together whatever is asked for while the encoder is busy; adds no delay when it is not.

    Callers put their texts into the open batch. The first of them to get the encoder closes the batch and embeds it,
    so the others find their vectors made; an event loop is woken once for all that wait in it.

    Args:
        encode: Texts to `[n, d]`.
        max_texts: A batch of so many takes no more callers, so that the first of many need not wait for the last.
    """

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.float32]], *, max_texts: int = 64) -> None:
        self._encode = encode
        self._max_texts = max_texts
        self._encoder_lock = threading.Lock()
        self._batch_lock = threading.Lock()
        self._open = _Batch()
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-retriever-encoder")

    def run(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed in the caller's thread."""
        batch, rows = self._join(texts)
        self._embed(batch)
        return batch.vectors.result()[rows]

    async def arun(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed in the batcher's thread, without blocking the event loop; cancelling disturbs nobody else."""
        loop = asyncio.get_running_loop()
        batch, rows = self._join(texts)
        if loop not in batch.arrivals:
            batch.arrivals[loop] = asyncio.Event()
            batch.vectors.add_done_callback(partial(_announce, loop, batch.arrivals[loop]))
            self.executor.submit(self._embed, batch)
        await batch.arrivals[loop].wait()
        return batch.vectors.result()[rows]

    def _join(self, texts: Sequence[str]) -> tuple[_Batch, slice]:
        """Put texts into the open batch; that batch, and the rows in it that are theirs."""
        with self._batch_lock:
            if len(self._open.texts) >= self._max_texts:
                self._open = _Batch()
            batch = self._open
            start = len(batch.texts)
            batch.texts += texts
            return batch, slice(start, len(batch.texts))

    def _embed(self, batch: _Batch) -> None:
        """Have the vectors of a batch made, by whoever gets the encoder first."""
        with self._encoder_lock:
            if batch.vectors.done():
                return
            with self._batch_lock:
                if batch is self._open:
                    self._open = _Batch()
            try:
                batch.vectors.set_result(self._encode(batch.texts))
            except BaseException as error:  # noqa: BLE001  # an interrupt too: the others must not wait for ever
                batch.vectors.set_exception(error)


def _announce(loop: asyncio.AbstractEventLoop, arrival: asyncio.Event, _: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(arrival.set)
