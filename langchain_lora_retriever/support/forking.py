"""Locks and threads that are made anew in a forked child, where their holders and their work are gone."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["after_fork", "begin_in_every_process"]

_begins: set[WeakMethod[Any]] = set()


def after_fork(begin: Callable[[], object]) -> None:
    """Call a function of a module in every child that is forked, where there are forks."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=begin)


def begin_in_every_process(begin: Callable[[], None]) -> None:
    """Call a bound method now, and again in every child that is forked while its object lives.

    A lock that another thread held at the fork is held in the child for ever, and an executor's threads are missing.
    """
    begin()
    _begins.add(WeakMethod(begin, _begins.discard))


def _begin_in_child() -> None:
    for reference in list(_begins):
        begin = reference()
        if begin is not None:
            begin()


after_fork(_begin_in_child)
atexit.register(_begins.clear)  # its callbacks would come after `weakref` is taken down
