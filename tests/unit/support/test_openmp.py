"""A team of threads follows the cores that there are for it: how many, and how its threads wait."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import joblib
import psutil
import pytest
import torch

from langchain_lora_retriever.support import openmp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECOND = 1_000_000_000


def num_idle_teams() -> int:
    """Teams that are kept idle in this process."""
    return sum(thread.name.startswith("idle-team") for thread in threading.enumerate())


class Clock:
    """Stands for what the kernel tells of a thread."""

    def __init__(self) -> None:
        self.times = openmp._Times(0, 0)

    def pass_time(self, seconds: float, *, share_waited: float) -> None:
        """Let the thread be ready for so long, and wait for a core for a share of it."""
        waited = int(seconds * SECOND * share_waited)
        self.times = openmp._Times(self.times.ran + int(seconds * SECOND) - waited, self.times.waited + waited)


@pytest.fixture
def clock() -> Clock:
    """At nothing."""
    return Clock()


@pytest.fixture
def spinning(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[openmp._Spinning]:
    """A team of two on two cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    spinning = openmp._Spinning(lambda: clock.times, 2)
    yield spinning
    spinning.close()
    assert num_idle_teams() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="teams are libgomp's")
def test_a_thread_may_compute_alone() -> None:
    """It starts no team, and no other thread's number changes."""

    def num_started(begin: Callable[[], None]) -> tuple[int, int]:
        """How many threads this one computes with, and how many a copy starts."""
        begin()
        before = psutil.Process().num_threads()
        torch.ones(1 << 20).clone()
        return torch.get_num_threads(), psutil.Process().num_threads() - before

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as executor:
            num_threads, started = executor.submit(num_started, openmp.compute_alone).result()
        assert num_threads == 1
        assert started <= 0  # others' threads may end meanwhile
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as executor:
            num_threads, started = executor.submit(num_started, lambda: None).result()
        assert num_threads == 3
        assert started > 0
    finally:
        torch.set_num_threads(before)


def test_it_sleeps_while_others_use_the_cores(clock: Clock, spinning: openmp._Spinning) -> None:
    """It spins again once they are gone, and in between keeps what it does."""
    steps = [(0.01, True), (0.45, False), (0.4, False), (0.2, False), (0.05, True), (0.2, True), (0.5, False)]
    for share, spins in steps:
        clock.pass_time(1, share_waited=share)
        spinning.look()
        assert spinning.is_on == spins, share
        assert num_idle_teams() == (0 if spins else 1)


def test_one_bad_moment_is_not_looked_at(clock: Clock, spinning: openmp._Spinning) -> None:
    """A look is taken every 0.3 s of running and waiting, however many steps that is."""
    for _ in range(9):
        clock.pass_time(0.03, share_waited=1)
        spinning.look()
    assert spinning.is_on
    clock.pass_time(0.03, share_waited=1)
    spinning.look()
    assert not spinning.is_on


@pytest.mark.parametrize(
    ("num_cores", "num_threads", "num_teams"), [(2, 2, 1), (16, 16, 1), (16, 8, 2), (16, 15, 1), (64, 2, 63)]
)
def test_there_are_more_threads_than_cores_then(
    num_cores: int, num_threads: int, num_teams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted are all that do not lead a team, and one more."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)), raising=False)
    assert openmp._num_idle_teams(num_threads) == num_teams
    assert 1 + (num_threads - 1) * (1 + num_teams) > num_cores


def test_a_small_team_on_many_cores_is_left_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a hundred threads to have two of them sleep."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    spinning = openmp._Spinning(lambda: clock.times, 2)
    clock.pass_time(1, share_waited=0.5)
    spinning.look()
    assert spinning.is_on
    assert num_idle_teams() == 0


def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there are as many as before once the engine is closed; those who set fewer keep their number."""

    def count(wanted: int) -> tuple[int, int]:
        torch.set_num_threads(wanted)
        with openmp.openmp_team(is_wanted=True) as look:
            look()
            within = torch.get_num_threads()
        return within, torch.get_num_threads()

    before = torch.get_num_threads()
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    try:
        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(count, 3).result() == (2, 3)
            assert executor.submit(count, 1).result() == (1, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells of a thread's waiting")
def test_the_kernel_tells_of_this_thread() -> None:
    """How long it ran, in nanoseconds, and how long it waited."""
    waits = openmp._Waits.of_this_thread()
    if waits is None:
        pytest.skip("this kernel does not tell")
    first = waits.read()
    x = torch.ones(1 << 16)
    while waits.read().ran - first.ran < SECOND // 20:
        x.mul_(1)
    assert waits.read().waited >= first.waited
    waits.close()


def test_a_thread_on_a_gpu_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it runs; cores are not looked at."""
    monkeypatch.setattr(joblib, "cpu_count", lambda: pytest.fail("counted"))

    def count() -> tuple[int, int]:
        torch.set_num_threads(3)
        with openmp.openmp_team(is_wanted=False) as look:
            look()
            within = torch.get_num_threads()
        return within, torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(count).result() == (1, 3)
    finally:
        torch.set_num_threads(before)
