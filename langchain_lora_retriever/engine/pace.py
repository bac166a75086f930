"""How long the step in flight will keep the device busy, so that the next one may still take in who comes meanwhile."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pace"]

_MIN_TOKENS = 512  # steps of fewer are over before waiting is worth it
_NUM_RATES = 8  # long steps that are remembered
_LEAD = 4e-3  # seconds that scheduling and launching the next step take, generously


class Pace:
    """Predicts when a long step ends, by the fastest of the last ones.

    A step is launched before the one in flight is done, so that the device need not wait. Beside a long prefill that
    would be much too early: whoever asks within its time would have to wait for the step after the next, and the next
    would be a small one.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._in_flight: deque[tuple[int, float]] = deque()  # tokens, and when it was launched
        self._rates: deque[float] = deque(maxlen=_NUM_RATES)  # seconds per token of long steps
        self._last_landing = 0.0

    @property
    def slack(self) -> float:
        """Seconds for which nothing need be launched; 0 if that is not known."""
        if len(self._in_flight) != 1 or not self._rates:
            return 0.0
        num_tokens, launched = self._in_flight[0]
        if num_tokens < _MIN_TOKENS:
            return 0.0
        end = max(launched, self._last_landing) + num_tokens * min(self._rates)
        return max(0.0, end - _LEAD - self._clock())

    def on_launch(self, num_tokens: int) -> None:
        """A step was launched."""
        self._in_flight.append((num_tokens, self._clock()))

    def on_landing(self) -> None:
        """The oldest step in flight is done."""
        now = self._clock()
        num_tokens, launched = self._in_flight.popleft()
        if num_tokens >= _MIN_TOKENS:
            self._rates.append((now - max(launched, self._last_landing)) / num_tokens)
        self._last_landing = now
