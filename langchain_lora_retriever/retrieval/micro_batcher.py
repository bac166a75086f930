"""Concurrent calls to a slow batch function, made as one call; each caller gets the outcome of its own texts."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from langchain_lora_retriever.errors import EncoderError, MissingDependencyError
from langchain_lora_retriever.retrieval.arrival import Arrival
from langchain_lora_retriever.support.forking import begin_in_every_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    T = TypeVar("T")

__all__ = ["MicroBatcher", "Outcome"]

Outcome: TypeAlias = "NDArray[np.float32] | BaseException"
"""A text's vector `[d]`, or why there is none."""

# What an encoder says of itself, not of a text.
_FAILURES_OF_ALL = (EncoderError, MissingDependencyError)
# How long an encoder may fail without any success before a batch is given up: each attempt of one that is away may
# take long.
_PATIENCE_SECONDS = 30.0


class _Batch:
    """Distinct texts that are embedded together, and their outcomes to come."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.outcomes: Future[dict[str, Outcome]] = Future()
        self.arrivals: dict[asyncio.AbstractEventLoop, Arrival] = {}


class MicroBatcher:
    """Embeds together whatever is asked for while the encoder is busy; adds no delay when it is not.

    Callers put their texts into the open batch, where equal texts are one. The first of them to get the encoder closes
    the batch and embeds it, so the others find their vectors made; an event loop is woken once for all that wait in
    it, who go on a few at a time, so that whatever else it runs goes on between them. A batch that fails is embedded
    again in halves, so that a text on which the encoder fails fails alone; unless the encoder says of itself that it
    cannot work (`EncoderError`), or fails over everything for half a minute.

    An interrupt (`KeyboardInterrupt`, or what a signal's handler raises) ends the call that it meets in the main
    thread; whoever waits with it embeds the batch. In any other thread it is the encoder's failure.

    Args:
        encode: Texts to `[n, d]`.
        max_texts: Maximum number of texts of a batch; more of one caller's are embedded in several, between which
            others may come.
    """

    def __init__(self, encode: Callable[[Sequence[str]], NDArray[np.float32]], *, max_texts: int = 64) -> None:
        self._encode = encode
        self._max_texts = max_texts
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._encoder_lock = threading.Lock()
        self._batch_lock = threading.Lock()
        self._open = _Batch()
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-retriever-encoder")

    def run(self, texts: Sequence[str]) -> list[Outcome]:
        """Embed in the caller's thread; one outcome per text."""
        outcomes: list[Outcome] = []
        for part in self._parts(texts):
            batch = self._join(part)
            self._embed(batch)
            made = batch.outcomes.result()
            outcomes += [made[text] for text in part]
        return outcomes

    async def arun(self, texts: Sequence[str]) -> list[Outcome]:
        """Embed in the batcher's thread, without blocking the event loop; cancelling disturbs nobody else."""
        loop = asyncio.get_running_loop()
        outcomes: list[Outcome] = []
        for part in self._parts(texts):
            batch = self._join(part)
            if loop not in batch.arrivals:
                self.executor.submit(self._embed, batch)
                batch.arrivals[loop] = Arrival(batch.outcomes, loop)
            await batch.arrivals[loop].wait()
            made = batch.outcomes.result()
            outcomes += [made[text] for text in part]
        return outcomes

    def alone(self, work: Callable[[], T]) -> T:
        """Do something else with the encoder, in the caller's thread, while it embeds nothing."""
        with self._encoder_lock:
            return work()

    def _parts(self, texts: Sequence[str]) -> list[Sequence[str]]:
        return [texts[start : start + self._max_texts] for start in range(0, len(texts), self._max_texts)]

    def _join(self, texts: Sequence[str]) -> _Batch:
        """Put texts into the open batch, or into a new one if they are too many for it."""
        with self._batch_lock:
            if self._open.texts and len(self._open.texts) + len(texts) > self._max_texts:
                self._open = _Batch()
            self._open.texts.update(dict.fromkeys(texts))
            return self._open

    def _embed(self, batch: _Batch) -> None:
        """Have the outcomes of a batch made, by whoever gets the encoder first."""
        with self._encoder_lock:
            if batch.outcomes.done():
                return
            with self._batch_lock:
                if batch is self._open:
                    self._open = _Batch()
            batch.outcomes.set_result(self._outcomes(list(batch.texts)))

    def _outcomes(self, texts: list[str]) -> dict[str, Outcome]:
        """Embed a batch, and after a failure each half of it."""
        outcomes: dict[str, Outcome] = {}
        parts, patient_until = [texts], math.inf
        while parts:
            part = parts.pop()
            made = self._attempt(part)
            if not isinstance(made, BaseException):
                outcomes.update(zip(part, made, strict=True))
                patient_until = math.inf
            elif len(part) == 1:
                outcomes[part[0]] = made
            elif isinstance(made, _FAILURES_OF_ALL) or time.monotonic() > patient_until:
                # Without its frames, which hold the texts of all.
                outcomes.update(dict.fromkeys(part, made.with_traceback(None)))
            else:
                patient_until = min(patient_until, time.monotonic() + _PATIENCE_SECONDS)
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
        return outcomes

    def _attempt(self, texts: list[str]) -> list[NDArray[np.float32]] | BaseException:
        """The texts' vectors `[d]`, or why there are none."""
        try:
            rows = list(self._encode(texts))
        except BaseException as error:
            if _is_interrupt(error) and threading.current_thread() is threading.main_thread():
                raise  # the next of those who wait makes the outcomes
            return error
        if len(rows) != len(texts):
            return ValueError(f"{len(rows)} vectors were made for {len(texts)} texts.")
        return rows


def _is_interrupt(error: BaseException) -> bool:
    """Whether an error was meant for the thread and not raised over a text, as the panics of Rust tokenizers are."""
    return not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime"
