"""Ctrl-C: a command ends within a second, whatever its threads are about."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ["ending_soon", "raising"]

_SECONDS = 0.8
"""What an orderly end may take: a model that is being loaded, or a step of a large one, would take longer."""
INTERRUPTED = 130
"""Exit status, as of a program that the signal has ended."""


@contextlib.contextmanager
def ending_soon() -> Iterator[None]:
    """End the process soon after an interrupt, by itself or else by force.

    Nothing is lost by force: pools are changed by rename, and training is resumed from its last checkpoint.
    """
    with _handling(_end):
        yield


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Let an interrupt raise `KeyboardInterrupt` in the block and nothing else: whoever runs it goes on."""
    with _handling(signal.default_int_handler):
        yield


@contextlib.contextmanager
def _handling(handler: signal._HANDLER) -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    # Signals that a shell has switched off stay so, and only the main thread may switch them.
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(_SECONDS, _end_now)
    timer.daemon = True
    timer.start()
    signal.default_int_handler(number, frame)


def _end_now() -> None:
    with contextlib.suppress(Exception):  # a pipe that nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)
