"""When the next step has to be launched, by how long steps have taken."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_lora_retriever.engine import step_times
from langchain_lora_retriever.engine.step_times import StepTimes


class Event:
    """Stands in for one of a device on which every step takes `milliseconds`."""

    milliseconds = 40.0

    def __init__(self, **_: Any) -> None:
        self.is_recorded = False

    def record(self) -> None:
        """As torch's."""
        self.is_recorded = True

    def elapsed_time(self, end: Any) -> float:
        """As torch's, with what was recorded alone."""
        assert self.is_recorded
        assert end.is_recorded
        return self.milliseconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still, without a GPU."""
    time = [100.0]
    monkeypatch.setattr(step_times.torch.cuda, "Event", Event)
    monkeypatch.setattr(step_times.time, "monotonic", lambda: time[0])
    return time


def run(times: StepTimes, num_tokens: int, milliseconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes so long."""
    monkeypatch.setattr(Event, "milliseconds", milliseconds)
    clock, end = times.begin(num_tokens), Event()
    end.record()
    assert clock is not None
    clock.stop(end)


def test_small_steps_and_others_than_captured_ones_are_not_timed(now: list[float]) -> None:
    """They are over too soon, or of no size that comes again."""
    times = StepTimes([256, 512, 2048])
    assert times.begin(511) is None
    assert times.begin(2049) is None
    assert times.begin(512) is not None
    assert StepTimes(()).begin(1024) is None


def test_the_shortest_of_a_size_counts(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is due some time before the earliest end; a size that has not been seen leaves none."""
    times = StepTimes([512, 1024, 2048])
    unseen = times.begin(2000)
    assert unseen is not None
    assert unseen.seconds_to_spare() < 0
    for milliseconds in (50.0, 40.0, 60.0):
        run(times, 1900, milliseconds, monkeypatch)
    clock = times.begin(2048)
    assert clock is not None
    assert clock.seconds_to_spare() == pytest.approx(0.030)
    now[0] += 0.029
    assert clock.seconds_to_spare() == pytest.approx(0.001)
    now[0] += 0.002
    assert clock.seconds_to_spare() < 0
    other = times.begin(600)
    assert other is not None
    assert other.seconds_to_spare() < 0


def test_a_short_step_is_not_waited_for(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model's are over before anybody could come."""
    times = StepTimes([1024])
    run(times, 1024, 9.0, monkeypatch)
    clock = times.begin(1024)
    assert clock is not None
    assert clock.seconds_to_spare() < 0
