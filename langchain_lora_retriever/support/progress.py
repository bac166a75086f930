"""How far a long piece of work is: a bar where somebody looks on, in a terminal or a notebook; lines in the log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

if TYPE_CHECKING:
    import logging

__all__ = ["Progress"]

_QUIET_SECONDS = 2.0
"""Nothing is shown of work that is over by then."""
_LOG_SECONDS = 10.0
"""Between two lines in the log."""


class Progress:
    """Tells on standard error, if that is a terminal or a notebook's, and in the log at INFO, how far a loop is.

    For one thread.

    Args:
        label: What is done, such as "Embedding samples".
        total: How much there is to do.
        logger: Where lines go. They begin after two seconds, and come every ten from then on.
    """

    def __init__(self, label: str, total: int, logger: logging.Logger) -> None:
        self._label = label
        self._total = total
        self._logger = logger
        self._done = 0
        self._start = self._told = time.monotonic()
        self._bar = tqdm(total=total, desc=label, disable=not _is_watched(), delay=_QUIET_SECONDS, leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        seconds = time.monotonic() - self._start
        if seconds > _QUIET_SECONDS:
            self._logger.info("%s: %s of %s in %.0f s", self._label, f"{self._done:,}", f"{self._total:,}", seconds)

    def update(self, num: int) -> None:
        """So many more are done."""
        self._done += num
        self._bar.update(num)
        now = time.monotonic()
        is_first = self._told == self._start
        if now - self._told > (_QUIET_SECONDS if is_first else _LOG_SECONDS) and self._done < self._total:
            left = (now - self._start) / max(1, self._done) * (self._total - self._done)
            self._told = now
            self._logger.info(
                "%s: %s of %s, %.0f s left", self._label, f"{self._done:,}", f"{self._total:,}", left
            )  # fmt: skip


def _is_watched() -> bool:
    """Whether standard error goes to somebody's eyes: a terminal's, or, through Jupyter's kernel, a notebook's."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
