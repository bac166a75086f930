"""How long steps take on a device, so that nothing need be decided for the next one while a long one has just begun."""

from __future__ import annotations

import bisect
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["StepClock", "StepTimes"]

_AHEAD = 0.010
"""Seconds before a step's end by which the next one is launched: whoever launches may have to wait 5 ms for the
interpreter, and then packs and launches for 2."""
_LONG = 512
"""Tokens from which on a step is timed: smaller ones are over too soon."""


class StepTimes:
    """The shortest time that steps of each size have taken.

    Args:
        sizes: Numbers of tokens to which steps with prompts in them are padded, ascending; () where they are not.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._shortest: dict[int, float] = {}

    def begin(self, num_tokens: int) -> StepClock | None:
        """Time the step of so many tokens that is launched next on the current stream; None if it is not worth it."""
        index = bisect.bisect_left(self._sizes, num_tokens)
        if num_tokens < _LONG or index == len(self._sizes):
            return None
        return StepClock(self, self._sizes[index])

    def note(self, size: int, seconds: float) -> None:
        """Remember what a step took on the device alone."""
        self._shortest[size] = min(seconds, self._shortest.get(size, seconds))

    def shortest(self, size: int) -> float:
        """Seconds that a step of that size takes at least; 0 if none has been seen."""
        return self._shortest.get(size, 0.0)


class StepClock:
    """Times one step, from when the device begins it.

    Args:
        times: Where it is remembered.
        size: Its tokens, padded.
    """

    def __init__(self, times: StepTimes, size: int) -> None:
        self._times = times
        self._size = size
        self._launched_at = time.monotonic()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self, end: torch.cuda.Event) -> None:
        """Take note once the step is over; `end` was recorded behind it and has come to pass."""
        self._times.note(self._size, self._begin.elapsed_time(end) / 1e3)

    def seconds_to_spare(self) -> float:
        """How long the next step need not be launched for the device to go on without a pause; 0 or less: launch.

        The step cannot have begun before it was launched, so it does not end before this says, however late whoever
        asks is.
        """
        return self._launched_at + self._times.shortest(self._size) - _AHEAD - time.monotonic()
