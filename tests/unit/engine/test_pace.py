"""A long step's end is foreseen; a short one's, or one of unknown speed, is not waited for."""

from __future__ import annotations

import pytest

from langchain_lora_retriever.engine.pace import Pace


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock."""
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    """A pace that knows one step: 1,000 tokens in 50 ms."""
    pace = Pace(clock)
    assert pace.slack == 0
    pace.on_launch(1000)
    assert pace.slack == 0, "nothing is known of the speed yet"
    clock.now += 0.05
    pace.on_landing()
    assert pace.slack == 0, "nothing is in flight"
    return pace


def test_slack_ends_a_little_before_the_step(pace: Pace, clock: Clock) -> None:
    """It shrinks with time, and is never negative."""
    pace.on_launch(2000)
    assert pace.slack == pytest.approx(0.1 - 0.004)
    clock.now += 0.09
    assert pace.slack == pytest.approx(0.006)
    clock.now += 0.09
    assert pace.slack == 0


def test_a_step_begins_when_the_one_before_is_done(pace: Pace, clock: Clock) -> None:
    """While two are in flight there is nothing to wait for."""
    pace.on_launch(1000)
    clock.now += 0.01
    pace.on_launch(600)
    assert pace.slack == 0
    clock.now += 0.04
    pace.on_landing()
    assert pace.slack == pytest.approx(0.03 - 0.004)


def test_short_steps_are_not_waited_for(pace: Pace) -> None:
    """A decode step is over at once."""
    pace.on_launch(128)
    assert pace.slack == 0


def test_the_fastest_of_the_last_steps_counts(pace: Pace, clock: Clock) -> None:
    """A slow one does not let the device wait; fast ones are forgotten in the end."""
    for _ in range(8):
        pace.on_launch(1000)
        assert pace.slack == pytest.approx(0.05 - 0.004)
        clock.now += 0.2
        pace.on_landing()
    pace.on_launch(1000)
    assert pace.slack == pytest.approx(0.2 - 0.004)
