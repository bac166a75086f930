"""A workload as it comes: log-normal lengths, adapters asked for zipf-wise, all at once or one after the other."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from engine_gpu.bench import percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_gpu.bench import Bench, Pairs
    from langchain_lora_retriever.engine import EngineWorker

ROOM = {"max_num_seqs": 256, "kv_cache_bytes": 32 << 30}
RATE = 24.0  # arrivals a second, a third of what the engine can do


class Asked(NamedTuple):
    """One request."""

    prompt: list[int]
    num_out: int
    first_adapter: int


class Answered(NamedTuple):
    """Milliseconds from the arrival to the first token, and between the later ones."""

    first: float
    pauses: list[float]


def log_normal(bench: Bench) -> None:
    """512 requests at once, medians of 181 tokens in and 90 out; tokens a second of the base and with adapters."""
    worker = bench.engine(**({} if bench.is_tiny else ROOM))
    asked = _requests(bench)
    rates: dict[str, list[float]] = {kind: [] for kind in ("base", "selection", "mixture")}
    for round_ in range(1 + bench.rounds):
        for kind, values in rates.items():
            start = time.perf_counter()
            running = [worker.submit(a.prompt, bench.greedy(a.num_out), _adapters(bench, a, kind)) for a in asked]
            num_tokens = sum(len(generation.result(300).token_ids) for generation in running)
            if round_ > 0:
                values.append(num_tokens / (time.perf_counter() - start))
    base = statistics.median(rates["base"])
    for kind, values in rates.items():
        rate = statistics.median(values)
        of_base = f"{rate / base:.3f} of base; {min(values):.0f} to {max(values):.0f}"
        bench.put(f"log-normal, tok/s, {kind}", f"{rate:.0f} ({of_base})")


def online(bench: Bench) -> None:
    """The same requests as they arrive, at `RATE` and at nine tenths of what the engine can do."""
    worker = bench.engine(**({} if bench.is_tiny else ROOM))
    asked = _requests(bench)
    for kind in ("base", "mixture"):
        for _ in range(2):  # the first loads the adapters
            start = time.perf_counter()
            asyncio.run(_arrive(bench, worker, asked, kind, rate=1e9))
        most = len(asked) / (time.perf_counter() - start)
        for name, rate in ((f"{RATE:.0f} a second", RATE), (f"{0.9 * most:.1f} a second, 0.9 of all", 0.9 * most)):
            answers = asyncio.run(_arrive(bench, worker, asked, kind, rate))
            firsts = [answer.first for answer in answers]
            pauses = [pause for answer in answers for pause in answer.pauses]
            first = f"first token {percentile(firsts, 0.5):.1f} / {percentile(firsts, 0.99):.1f}"
            between = f"between tokens {percentile(pauses, 0.5):.2f} / {percentile(pauses, 0.99):.2f}"
            bench.put(f"online, {kind}, {name}, ms p50 / p99", f"{first}, {between}")


def _requests(bench: Bench) -> list[Asked]:
    """The same every time."""
    rng = random.Random(0)
    num, num_adapters = (12, len(bench.adapters)) if bench.is_tiny else (512, 32)
    weights = [1 / rank for rank in range(1, num_adapters + 1)]
    asked = []
    for _ in range(num):
        num_in = min(max(int(rng.lognormvariate(5.2, 0.8)), 16), 64 if bench.is_tiny else 1024)
        num_out = min(max(int(rng.lognormvariate(4.5, 0.7)), 8), 16 if bench.is_tiny else 384)
        (first,) = rng.choices(range(num_adapters), weights)
        prompt = [rng.randrange(3, 300 if bench.is_tiny else 128_000) for _ in range(num_in)]
        asked.append(Asked(prompt, num_out, first))
    return asked


def _adapters(bench: Bench, asked: Asked, kind: str) -> Pairs:
    """What a request runs: nothing, its adapter, or that and the next two."""
    num = {"base": 0, "selection": 1, "mixture": 3}[kind]
    every = bench.adapters
    return [(every[(asked.first_adapter + j) % len(every)], 1 / num) for j in range(num)]


async def _arrive(bench: Bench, worker: EngineWorker, asked: Sequence[Asked], kind: str, rate: float) -> list[Answered]:
    """Ask at exponentially distributed times, the same for every kind; await all answers."""
    rng = random.Random(1)
    begin = time.perf_counter() + 0.05

    async def ask(request: Asked, at: float) -> Answered:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        times = []
        async for delta in worker.submit(
            request.prompt, bench.greedy(request.num_out), _adapters(bench, request, kind)
        ):
            times += [time.perf_counter()] * len(delta.token_ids)
        assert len(times) == request.num_out
        return Answered(1e3 * (times[0] - begin - at), [1e3 * (b - a) for a, b in itertools.pairwise(times)])

    waits, at = [], 0.0
    for request in asked:
        at += rng.expovariate(rate)
        waits.append(ask(request, at))
    return list(await asyncio.gather(*waits))
