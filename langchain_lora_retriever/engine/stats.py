"""What the engine has been doing, cheap enough to poll."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from langchain_lora_retriever.engine.request import Request

__all__ = ["EngineStats", "Percentiles", "RequestCounts", "StatsRecorder"]

_WINDOW = 4096  # latencies kept for the percentiles
_RATE_WINDOW_SECONDS = 10.0


class Percentiles(NamedTuple):
    """Median, 95th and 99th percentile in milliseconds; NaN before there is a value."""

    p50_ms: float = math.nan
    p95_ms: float = math.nan
    p99_ms: float = math.nan

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Percentiles:
        """Percentiles of durations."""
        values = list(seconds)
        return cls(*(1e3 * np.percentile(values, (50, 95, 99))).tolist()) if values else cls()


class EngineStats(NamedTuple):
    """A snapshot. What an engine does not count is 0.

    Attributes:
        num_running: Requests in the batch.
        num_waiting: Requests in the queue.
        num_free_blocks: KV-cache blocks no running request holds.
        num_resident_adapters: Adapters in device memory.
        num_steps: Forward passes so far.
        num_finished: Requests that ended, however they ended.
        num_prompt_tokens: Prompt tokens of all requests so far.
        num_cached_tokens: Those of them found in the prefix cache.
        num_output_tokens: Tokens generated so far.
        output_tokens_per_second: Over the last ten seconds.
        num_preemptions: Requests sent back to the queue for want of blocks.
        num_adapter_hits: Adapters that were resident when a request was admitted.
        num_adapter_loads: Adapters copied to the device.
        time_to_first_token: From submission.
        inter_token: Between a request's consecutive tokens.
        num_blocks: KV-cache blocks there are; 0 if unknown.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_resident_adapters: int = 0
    num_steps: int = 0
    num_finished: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    output_tokens_per_second: float = 0.0
    num_preemptions: int = 0
    num_adapter_hits: int = 0
    num_adapter_loads: int = 0
    time_to_first_token: Percentiles = Percentiles()
    inter_token: Percentiles = Percentiles()
    num_blocks: int = 0


class RequestCounts:
    """Counts and latencies of requests; one thread at a time writes, any may read.

    Attributes:
        first_token: Seconds from submission to the first token, of the requests counted last.
        inter_token: Seconds between consecutive tokens of a request, likewise.
    """

    def __init__(self) -> None:
        self.num_finished = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.first_token: deque[float] = deque(maxlen=_WINDOW)
        self.inter_token: deque[float] = deque(maxlen=_WINDOW)

    def told(self) -> dict[str, Any]:
        """The fields of `EngineStats` that it knows."""
        return {
            "num_finished": self.num_finished,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "num_output_tokens": self.num_output_tokens,
            "time_to_first_token": Percentiles.of(self.first_token),
            "inter_token": Percentiles.of(self.inter_token),
        }


class StatsRecorder(RequestCounts):
    """Counts and latencies of an engine; its thread writes, any thread may read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_steps = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._submitted: dict[int, float] = {}
        self._last_token: dict[int, float] = {}

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens per second over the last ten seconds."""
        now = time.monotonic()
        return sum(n for at, n in tuple(self._recent) if now - at <= _RATE_WINDOW_SECONDS) / _RATE_WINDOW_SECONDS

    def on_added(self, request: Request) -> None:
        """A request was queued."""
        self._submitted[request.request_id] = request.arrival
        self.num_prompt_tokens += len(request.prompt_token_ids)

    def on_step(self, sampled: Sequence[Request]) -> None:
        """A step sampled one token for each of `sampled`."""
        now = time.monotonic()
        self.num_steps += 1
        self.num_output_tokens += len(sampled)
        self._recent.append((now, len(sampled)))
        for request in sampled:
            last = self._last_token.get(request.request_id)
            if last is not None:
                self.inter_token.append(now - last)
            elif (submitted := self._submitted.pop(request.request_id, None)) is not None:
                self.first_token.append(now - submitted)
                self.num_cached_tokens += request.num_cached_tokens or 0
            self._last_token[request.request_id] = now

    def on_finished(self, request: Request) -> None:
        """A request left the engine."""
        self.num_finished += 1
        self._submitted.pop(request.request_id, None)
        self._last_token.pop(request.request_id, None)
