"""Processes that end with the one that started them."""

from __future__ import annotations

import os
import signal
import threading
import time

__all__ = ["end_with"]

_WATCH_SECONDS = 1.0


def end_with(parent: int) -> None:
    """Let this process end when its parent has, whatever it does then, and not by the terminal's interrupt.

    An interrupt is for the parent to hear, which ends its children by ending.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
