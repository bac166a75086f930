"""Memory that C libraries have freed and not given back."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["give_back_freed"]


def give_back_freed() -> None:
    """Give memory back to the system that was freed and is kept for later, where the C library can (glibc).

    To be called when something large is over: a load, a first embedding of many texts. It takes some ten milliseconds.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _libc() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None  # musl has none
