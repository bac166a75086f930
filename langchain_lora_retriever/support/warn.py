"""Warn of something once, whether somebody reads the log or not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

__all__ = ["warn"]


def warn(logger: logging.Logger, message: str, *, stacklevel: int) -> None:
    """Raise a `UserWarning`, and log it where the program has set up logging.

    Where it has not, Python prints a log's warnings all the same, and it would be said twice.

    Args:
        logger: Whose log.
        message: What is said.
        stacklevel: As in `warnings.warn`, counted from the caller.
    """
    if logger.hasHandlers():
        logger.warning("%s", message)
    warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)
