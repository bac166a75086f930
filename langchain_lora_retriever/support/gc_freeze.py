"""Keep the garbage collector from long looks at the heap while models are loaded and run."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from langchain_lora_retriever.support.forking import after_fork

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["freeze_what_came", "frozen_heap", "without_full_collections"]

_NEVER = 2**31 - 1  # collections of what is younger, before a full one
_lock = threading.Lock()
_num_frozen = 0
_num_without_full = 0
_threshold = 0  # of full collections, while there are none


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


def freeze_what_came() -> None:
    """Where the heap is frozen, freeze what was made since then too: something that has come to stay."""
    with _lock:
        if _num_frozen:
            gc.freeze()


@contextmanager
def without_full_collections(*, is_wanted: bool = True) -> Iterator[None]:
    """While any such block runs, collections that begin by themselves look at new objects only, which takes 2 ms.

    What a load makes is not frozen, and most of it stays until the load ends: the fields of a GGUF file are a million
    objects. The collector would visit them each time that a quarter has come, 0.1 s with every thread stopped.

    Args:
        is_wanted: False changes nothing.
    """
    global _num_without_full, _threshold  # noqa: PLW0603 - there is one collector
    if not is_wanted:
        yield
        return
    with _lock:
        if not _num_without_full:
            _threshold = _set_threshold(_NEVER)
        _num_without_full += 1
    try:
        yield
    finally:
        with _lock:
            _num_without_full -= 1
            if not _num_without_full:
                _set_threshold(_threshold)


def _set_threshold(of_full: int) -> int:
    """Set how many younger collections come before a full one; returns what it was."""
    youngest, young, before = gc.get_threshold()
    gc.set_threshold(youngest, young, of_full)
    return before


def _begin_in_child() -> None:
    """Collect as ever in a forked process: whoever loads in another thread is not there."""
    global _lock, _num_without_full  # noqa: PLW0603
    _lock = threading.Lock()
    if _num_without_full:
        _num_without_full = 0
        _set_threshold(_threshold)


after_fork(_begin_in_child)
