"""Freeze the garbage collector's heap while an engine is loaded and runs."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["frozen_heap"]

_lock = threading.Lock()
_num_frozen = 0


@contextmanager
def frozen_heap(*, is_wanted: bool = True, collects: bool = True) -> Iterator[None]:
    """While any such block runs, no collection looks at what was there when the last one began.

    A full collection stops every thread while it visits each object of the process. With torch and transformers
    imported that takes 0.2 s, in which no stream gets a token, to find nothing. What is made later is collected as
    ever.
    The process has one frozen set: when the last block ends, what others have put there by `gc.freeze` is thawed too.

    Args:
        is_wanted: False changes nothing.
        collects: Whether to collect what is garbage already, which takes as long as a full collection; else it stays
            until the last block ends.
    """
    global _num_frozen  # noqa: PLW0603 - there is one heap
    if not is_wanted:
        yield
        return
    with _lock:
        if collects:
            gc.collect()
        gc.freeze()
        _num_frozen += 1
    try:
        yield
    finally:
        with _lock:
            _num_frozen -= 1
            if not _num_frozen:
                gc.unfreeze()
