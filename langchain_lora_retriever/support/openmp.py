"""OpenMP on a CPU: one team of threads computes; how many they are, and how they wait for each other."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

import joblib
import threadpoolctl
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["compute_alone", "openmp_team", "run_aside"]

P = ParamSpec("P")
T = TypeVar("T")

_PERIOD = 300_000_000  # nanoseconds of running and waiting between two looks
_CONTENDED = 0.25  # share of them spent waiting for a core, from which the team sleeps: 0.4 beside one busy process
_FREE = 0.12  # below which it spins again: asleep on an idle machine it has 0.05
_MAX_IDLE_TEAMS = 16
_logger = logging.getLogger(__name__)


def run_aside(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread of its own and wait for it.

    On a CPU, OpenMP keeps a team of threads for every thread that ever ran a parallel product. Once the teams outnumber
    the cores, its threads sleep after each product in place of spinning, and the engine's steps, which are thousands
    of small products, take half as long again (measured on two cores). A thread that ends takes its team along, so
    that between calls the engine's team is the only one.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside") as executor:
        return executor.submit(function, *args, **kwargs).result()


def compute_alone() -> None:
    """Let the calling thread, and no other, compute without a team from now on.

    A copy of 128 KB is enough for PyTorch to call a team, whose members wait for each other: copying an adapter of 84
    MB, 448 of them, took 0.04 to 4.5 s beside three busy processes on two cores, and 18 ms alone.
    """
    _without_team()


def _without_team() -> threadpoolctl.threadpool_limits:
    torch.get_num_threads()  # PyTorch sets a thread's number once, when it is first asked for
    return threadpoolctl.threadpool_limits(1, user_api="openmp")


@contextmanager
def openmp_team(*, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """Compute with no more threads than there are cores for, which spin only while they have the cores for themselves.

    A step is hundreds of small products, and at the end of each the team's threads wait for the last of them. libgomp
    lets them spin, which is fastest on cores of their own. Beside other busy processes a thread that spins uses up the
    very time in which the one it waits for would run: of 54 tokens a second 4 were left beside four of them, and 14
    where the threads sleep. With more threads than cores under its management libgomp lets them sleep: so idle teams
    are kept while the cores are contended, by what the kernel tells of this thread's own waiting.

    Containers have fewer cores than they see (`cpu.max`): the team has as many threads as the quota allows.

    Args:
        is_wanted: Whether the thread computes on a CPU. One that does not computes alone what little it has to.

    Yields:
        What the computing thread calls after every step; it takes some microseconds.
    """
    with ExitStack() as undo:
        if is_wanted:
            yield _follow_cores(undo)
        else:
            undo.enter_context(_without_team())
            yield _do_nothing


def _follow_cores(undo: ExitStack) -> Callable[[], None]:
    """Set the number of this thread's threads; returns what sees to how they wait. `undo` gets what is to be undone."""
    num_before = torch.get_num_threads()
    num_threads = min(num_before, joblib.cpu_count())
    if num_threads < num_before:
        _logger.info("computing with %d threads in place of %d: no more cores are granted", num_threads, num_before)
        torch.set_num_threads(num_threads)
        undo.callback(torch.set_num_threads, num_before)
    waits = _Waits.of_this_thread() if num_threads > 1 else None
    if waits is None:
        return _do_nothing
    undo.callback(waits.close)
    spinning = _Spinning(waits.read, num_threads)
    undo.callback(spinning.close)
    return spinning.look


def _do_nothing() -> None:
    pass


class _Times(NamedTuple):
    """Nanoseconds that a thread ran, and that it was ready to run and waited for a core."""

    ran: int
    waited: int


class _Waits:
    """What Linux tells of one thread (`/proc/thread-self/schedstat`); None of it elsewhere."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def of_this_thread(cls) -> _Waits | None:
        """Follow the thread that calls this, if the system tells of it."""
        if sys.platform != "linux":
            return None
        try:
            return cls(os.open("/proc/thread-self/schedstat", os.O_RDONLY))
        except OSError:  # a kernel without these figures, or a container that hides them
            return None

    def read(self) -> _Times:
        """The thread's times so far."""
        ran, waited, _ = os.pread(self._file, 100, 0).split()
        return _Times(int(ran), int(waited))

    def close(self) -> None:
        """Read no more."""
        os.close(self._file)


class _Spinning:
    """Has the team's threads sleep while others use the cores."""

    def __init__(self, read: Callable[[], _Times], num_threads: int) -> None:
        self._read = read
        self._num_threads = num_threads
        self._last = read()
        self._idle_teams: _IdleTeams | None = None

    @property
    def is_on(self) -> bool:
        """Whether the threads spin."""
        return self._idle_teams is None

    def look(self) -> None:
        """See whether the cores are contended, if it is time to."""
        now = self._read()
        ran, waited = now.ran - self._last.ran, now.waited - self._last.waited
        if ran + waited < _PERIOD:
            return
        self._last = now
        share = waited / (ran + waited)
        if self._idle_teams is None and share > _CONTENDED:
            num_teams = _num_idle_teams(self._num_threads)
            if num_teams <= _MAX_IDLE_TEAMS:
                self._idle_teams = _IdleTeams(num_teams)
        elif share < _FREE:
            self.close()

    def close(self) -> None:
        """Let them spin again."""
        if self._idle_teams is not None:
            self._idle_teams.close()
            self._idle_teams = None


def _num_idle_teams(num_threads: int) -> int:
    """How many more teams there must be for libgomp to manage more threads than there are cores.

    It counts every thread of a team but the one that leads it, and one more.
    """
    num_more = len(os.sched_getaffinity(0)) - num_threads + 1
    return max(1, math.ceil(num_more / (num_threads - 1)))


class _IdleTeams:
    """Threads with an OpenMP team each, which computed once and wait for the end."""

    def __init__(self, num_teams: int) -> None:
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"idle-team-{index}", daemon=True) for index in range(num_teams)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End them, and their teams with them."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        torch.zeros(1 << 20).add_(1)  # large enough for every thread of a team
        self._end.wait()
