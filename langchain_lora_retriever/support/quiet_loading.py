"""Load weights without other libraries' bars, which would tear the caller's output."""

from __future__ import annotations

import logging
import threading
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.support.forking import begin_in_every_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["quiet_loading"]

_package = logging.getLogger("langchain_lora_retriever")


class _QuietLoading:
    """Keeps transformers from showing how far it has read a file, unless this package's log is at DEBUG.

    Bars of downloads are the hub's own, and stay as the caller has them. Threads that load at the same time share it:
    the first one in switches the bars off, the last one out switches them on again.
    """

    def __init__(self) -> None:
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1 and not _package.isEnabledFor(logging.DEBUG):
                self._restore = _silence()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._restore is not None and not self._num_inside:
                self._restore()
                self._restore = None


def _silence() -> Callable[[], None]:
    """Switch transformers' bars off; returns what switches them on again."""
    from transformers.utils import logging as bars  # noqa: PLC0415 - seconds to import

    hub: Any = import_module("huggingface_hub.utils")
    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    was_enabled, shows_downloads = bars.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    gguf_bar = gguf.tqdm
    bars.disable_progress_bar()
    if shows_downloads:  # it has disabled these too
        hub.enable_progress_bars()
    gguf.tqdm = partial(gguf_bar, disable=True)  # GGUF files have a bar of their own

    def restore() -> None:
        gguf.tqdm = gguf_bar
        if was_enabled:
            bars.enable_progress_bar()
        if not shows_downloads:
            hub.disable_progress_bars()

    return restore


quiet_loading = _QuietLoading()
