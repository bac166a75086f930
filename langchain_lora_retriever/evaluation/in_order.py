"""Many generations of an engine, as many at once as it runs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from langchain_lora_retriever.engine.api import Completion, EngineClient, Generation

    K = TypeVar("K")

__all__ = ["in_order"]


def in_order(engine: EngineClient, submitted: Iterable[tuple[K, Generation]]) -> Iterator[tuple[K, Completion]]:
    """Yield what each generation ended with, in their order; those that run are aborted if one fails or nobody waits.

    Args:
        engine: Runs them.
        submitted: Keys and generations. The next is taken, and so submitted, while fewer than twice as many are under
            way as the engine runs at once.
    """
    running: deque[tuple[K, Generation]] = deque()
    try:
        for item in submitted:
            running.append(item)
            if len(running) >= 2 * engine.info.max_num_seqs:
                yield _finish(running)
        while running:
            yield _finish(running)
    finally:
        for _, generation in running:
            generation.abort()


def _finish(running: deque[tuple[K, Generation]]) -> tuple[K, Completion]:
    """Wait for the first, which stays among those to abort until it has ended."""
    key, generation = running[0]
    done = generation.result()
    running.popleft()
    return key, done
