"""Run heavy torch work in a thread that ends with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_aside"]

P = ParamSpec("P")
T = TypeVar("T")


def run_aside(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread of its own and wait for it.

    On a CPU, OpenMP keeps a team of threads for every thread that ever ran a parallel product. Once the teams outnumber
    the cores, its threads sleep after each product in place of spinning, and the engine's steps, which are thousands
    of small products, take half as long again (measured on two cores). A thread that ends takes its team along, so
    that between calls the engine's team is the only one.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside") as executor:
        return executor.submit(function, *args, **kwargs).result()
