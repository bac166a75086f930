"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from langchain_lora_retriever.runtime import Runtime

__all__ = ["Metrics"]

_MAX_ADAPTERS = 500
"""Adapters that are counted by name; more are counted together."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server. Every server has a registry of its own.

    Args:
        runtime: Whose engine is asked when the numbers are read.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._registry = CollectorRegistry()
        self._adapters: set[str] = set()
        self.requests = Counter(
            "lora_retriever_requests", "Requests by path and status", ("path", "status"), registry=self._registry
        )
        self.tokens = Counter(
            "lora_retriever_tokens", "Tokens: prompt, cached (of them), output", ("kind",), registry=self._registry
        )
        self.time_to_first_token = Histogram(
            "lora_retriever_time_to_first_token_seconds",
            "From a request's arrival to its first delta; to its end where the answer is given whole",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "lora_retriever_inter_token_seconds",
            "Between two deltas of a stream, per token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._adapter_requests = Counter(
            "lora_retriever_adapter_requests",
            f"Answers by adapter; from {_MAX_ADAPTERS} names on the others together",
            ("adapter",),
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(runtime))

    def count_adapters(self, names: Iterable[str]) -> None:
        """Count the adapters of a composition."""
        for name in names:
            if name not in self._adapters and len(self._adapters) < _MAX_ADAPTERS:
                self._adapters.add(name)
            self._adapter_requests.labels(name if name in self._adapters else "(others)").inc()

    def text(self) -> bytes:
        """The numbers as Prometheus reads them."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Asks the engine when the numbers are read."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[GaugeMetricFamily]:
        engine = self._runtime.running_engine
        if engine is None:
            return
        stats = engine.stats()
        for name, value, text in (
            ("running_requests", stats.num_running, "Requests in the batch"),
            ("waiting_requests", stats.num_waiting, "Requests in the queue"),
            ("free_blocks", stats.num_free_blocks, "Blocks of the KV cache that no running request holds"),
            ("resident_adapters", stats.num_resident_adapters, "Adapters in device memory"),
            ("steps", stats.num_steps, "Forward passes so far"),
            ("preemptions", stats.num_preemptions, "Requests sent back to the queue for want of blocks"),
            ("adapter_hits", stats.num_adapter_hits, "Adapters that were resident when a request was admitted"),
            ("adapter_loads", stats.num_adapter_loads, "Adapters copied to the device"),
            ("engine_alive", float(engine.is_alive), "1 while the engine takes requests"),
        ):
            yield GaugeMetricFamily(f"lora_retriever_{name}", text, value=value)
