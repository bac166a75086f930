"""The engine's speed on the timed model: a whole run, one request alone, and streams beside a long prompt."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.nn.functional import linear

from engine_gpu.bench import DEVICE, Bench, Pairs, median_ms, percentile
from langchain_lora_retriever.retrieval.fusion import fuse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_lora_retriever.engine import EngineWorker
    from langchain_lora_retriever.engine.request import Request


def products(bench: Bench) -> None:
    """The matrix products of a decode step alone, the last one over the vocabulary included, in graph replay."""
    runner = bench.engine().core.runner
    weights = [group.product.weight for group in runner.lora_layers._groups]
    weights.append(bench.model.get_output_embeddings().weight)
    for num_tokens in (1, bench.batch):
        inputs = {w.shape[1]: torch.randn(num_tokens, w.shape[1], device=DEVICE, dtype=w.dtype) for w in weights}

        def run(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

        bench.put(f"products ms T={num_tokens}", round(_time_graph(run), 3))


def throughput(bench: Bench) -> None:
    """The whole run, base and composed: medians of rounds that take turns, and each as a share of the base."""
    many, few = len(bench.adapters), min(8, len(bench.adapters))
    fused = [fuse(bench.mixture(i, many)) for i in range(many)]
    kinds: dict[str, Callable[[int], Pairs]] = {
        "base": lambda _: [],
        f"mixture k=3, {few} adapters": lambda i: bench.mixture(i, few),
        f"mixture k=3, {many} adapters": lambda i: bench.mixture(i, many),
        f"selection, {many} adapters": lambda i: [(bench.adapters[i % many], 1.0)],
        f"fusion k=3, {many} fusions": lambda i: [(fused[i % many], 1.0)],
    }
    runs = {name: [kind(i) for i in range(bench.batch)] for name, kind in kinds.items()}
    worker = bench.engine()
    for pairs in runs.values():
        bench.run_all(worker, pairs)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(bench.rounds):
        for name, pairs in runs.items():
            rates[name].append(bench.run_all(worker, pairs))
    base = statistics.median(rates["base"])
    for name, values in rates.items():
        rate = statistics.median(values)
        bench.put(f"tok/s {name}", f"{rate:.0f} ({rate / base:.3f} of base; {min(values):.0f} to {max(values):.0f})")


def alone(bench: Bench) -> None:
    """One request: milliseconds per token once it runs."""
    worker = bench.engine()
    kinds: dict[str, Pairs] = {"base": [], "mixture k=3": bench.mixture(0, 3)}
    for name, adapters in kinds.items():
        for _ in range(2):
            with _Watch(worker) as watch:
                worker.submit(bench.prompt(0), bench.greedy(), adapters).result(300)
        pauses = watch.pauses()
        bench.put(f"alone ms/token {name}", round(statistics.median(pauses), 3))


def long_prompt(bench: Bench) -> None:
    """Pauses between the tokens of running streams while a 4,000-token prompt prefills."""
    num_streams, num_out, length = (2, 40, 100) if bench.is_tiny else (bench.batch // 2, 400, 4000)
    worker = bench.engine()
    for kind in ("base", "mixture k=3"):
        results = []
        for _ in range(2):
            pairs = [[] if kind == "base" else bench.mixture(i, 8) for i in range(num_streams)]
            running = [worker.submit(bench.prompt(i), bench.greedy(num_out), p) for i, p in enumerate(pairs)]
            streams = [iter(generation) for generation in running]
            for stream in streams:
                next(stream)  # every token of this tokenizer has a text: the stream has begun
            with _Watch(worker) as before:
                before.wait(10)
            with _Watch(worker) as during:
                start = time.perf_counter()
                late = worker.submit(bench.prompt(999, length), bench.greedy(2))
                next(iter(late))
                first = time.perf_counter() - start
            for generation in running:
                generation.abort()
            results.append((statistics.median(before.pauses()), during.pauses(), first))
        undisturbed, pauses, first = results[-1]
        p50, p95, p99 = (percentile(pauses, share) for share in (0.5, 0.95, 0.99))
        bench.put(
            f"{length}-token prompt beside {num_streams} streams, {kind}",
            f"inter-token ms of the streams: {undisturbed:.2f} before; p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f} "
            f"meanwhile; p99 / median before = {p99 / undisturbed:.2f}; the prompt's first token after "
            f"{1e3 * first:.1f} ms",
        )


class _Watch:
    """Writes down when each request was given a token, by looking over the recorder's shoulder."""

    def __init__(self, worker: EngineWorker) -> None:
        self._recorder: Any = worker.core.recorder
        self._times: dict[int, list[float]] = {}
        self._news = threading.Condition()
        self._num_steps = 0

    def __enter__(self) -> Self:
        on_step = self._recorder.on_step

        def watched(sampled: Sequence[Request]) -> None:
            now = time.perf_counter()
            for request in sampled:
                self._times.setdefault(request.request_id, []).append(now)
            on_step(sampled)
            with self._news:
                self._num_steps += 1
                self._news.notify()

        self._recorder.on_step = watched
        return self

    def __exit__(self, *_: object) -> None:
        del self._recorder.on_step

    def wait(self, num_steps: int) -> None:
        """Until so many steps have been seen."""
        with self._news:
            if not self._news.wait_for(lambda: self._num_steps >= num_steps, 60):
                raise TimeoutError(f"{self._num_steps} steps in 60 s, {num_steps} wanted")

    def pauses(self) -> list[float]:
        """Milliseconds between consecutive tokens of the same request."""
        return [1e3 * (b - a) for times in self._times.values() for a, b in itertools.pairwise(times)]


def _time_graph(run: Callable[[], None]) -> float:
    if DEVICE.type == "cpu":
        return median_ms(run, 2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return median_ms(graph.replay, 20)
