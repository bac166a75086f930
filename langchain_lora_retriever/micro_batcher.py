"""Concurrent calls to a slow batch function, made as one call."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["MicroBatcher"]


class MicroBatcher:
    """Embeds together whatever is asked for while the encoder is busy; adds no delay when it is not.

    Callers queue their texts. The first to get the encoder takes the whole queue, so those who wait for it
    find their vectors made.

    Args:
        encode: Texts to `[n, d]`.
    """

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.float32]]) -> None:
        self._encode = encode
        self._encoder_lock = threading.Lock()
        self._queue_lock = threading.Lock()
        self._queue: list[tuple[Sequence[str], Future[NDArray[np.float32]]]] = []
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-retriever-encoder")

    def run(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed in the caller's thread."""
        future = self._enqueue(texts)
        self._drain()
        return future.result()

    def submit(self, texts: Sequence[str]) -> Future[NDArray[np.float32]]:
        """Embed in the batcher's thread."""
        future = self._enqueue(texts)
        self.executor.submit(self._drain)
        return future

    def _enqueue(self, texts: Sequence[str]) -> Future[NDArray[np.float32]]:
        future: Future[NDArray[np.float32]] = Future()
        with self._queue_lock:
            self._queue.append((texts, future))
        return future

    def _drain(self) -> None:
        with self._encoder_lock:
            with self._queue_lock:
                queue, self._queue = self._queue, []
            batch = [(texts, future) for texts, future in queue if future.set_running_or_notify_cancel()]
            if not batch:
                return
            try:
                vectors = self._encode([text for texts, _ in batch for text in texts])
            except BaseException as error:  # noqa: BLE001  # an interrupt too: the others must not wait for ever
                for _, future in batch:
                    future.set_exception(error)
                return
            start = 0
            for texts, future in batch:
                future.set_result(vectors[start : start + len(texts)])
                start += len(texts)
