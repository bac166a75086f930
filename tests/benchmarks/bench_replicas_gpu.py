"""Engines in other processes: how throughput grows with replicas, what a killed one costs, and what one process costs.

    PYTHONPATH=.:kernels:tests:tests/benchmarks python tests/benchmarks/bench_replicas_gpu.py replicas --counts 1 2
    ... bench_replicas_gpu.py kill --counts 2
    ... bench_replicas_gpu.py stub --counts 1 2 4 8 --callers 1 4
    ... bench_replicas_gpu.py one

`replicas`: an 8B-shaped Llama of random weights in bf16, one replica for each GPU behind Ray Serve, reached through a
`RemoteEngine` in each of some calling processes. Streams ask one request after the other, mixtures of three of adapters
drawn zipf-wise. The largest count of replicas is started, and for each count so many of them get all requests: tokens a
second that arrive in a window of time, time to first token and the share of adapters found resident. `kill`: every
stream twice undisturbed and once with a replica killed in its middle, in float32, where what runs beside changes no
token. `stub`: without a model or a GPU, requests a second through several calling processes, and where they land.
`one`: a single GPU: the engine alone, 64 and 256 streams through the HTTP server over it and over one in a process of
its own, and `abatch` of as many. `--tiny` tries the script anywhere. Ray is needed by the first three, FastAPI and
uvicorn by `one`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from engine_gpu.bench import DEVICE, RANK, TARGETS, Bench, free_memory, percentile
from stub_engine import StubEngine

from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from langchain_lora_retriever.engine.api import EngineClient

Pairs = list[tuple[Adapter, float]]
NUM_DISTINCT = 64  # sets of tensors; more adapters are these under other scalings


class Row(NamedTuple):
    """One request of a stream."""

    prompt: list[int]
    sampling: SamplingParams
    adapters: Pairs


class Timed(NamedTuple):
    """One answer: its tokens, seconds to the first, the longest pause, and when it ended."""

    token_ids: tuple[int, ...]
    text: str
    first: float
    pause: float
    completion: Any


# Engines


def make_engine(
    *,
    is_tiny: bool,
    max_num_seqs: int = 128,
    lora_cache_bytes: int | None = None,
    pinned_lora_bytes: int | None = None,
    is_exact: bool = False,
) -> Any:
    """The engine of a replica. It captures steps for what it is asked here alone: three adapters of one rank.

    Args:
        is_tiny: Whether everything is small.
        max_num_seqs: Requests at once.
        lora_cache_bytes: For resident adapters, of which 190 take 16 GiB.
        pinned_lora_bytes: For those that are ready to be copied; None takes twice as much.
        is_exact: Of few layers, in float32: what it answers does not depend on what runs beside.
    """
    bench = make_bench(is_tiny=is_tiny, is_exact=is_exact)
    size: dict[str, Any] = {"captured_num_adapters": (3,), "captured_ranks": (RANK,)}
    if lora_cache_bytes is not None and not is_tiny:
        num_loras = int(lora_cache_bytes / (90 << 20))
        pinned = 2 * lora_cache_bytes if pinned_lora_bytes is None else pinned_lora_bytes
        size |= {"lora_cache_bytes": lora_cache_bytes, "max_loras": num_loras, "pinned_lora_bytes": pinned}
    return bench.engine(max_num_seqs=8 if is_tiny else max_num_seqs, **size)


def make_bench(*, is_tiny: bool, is_exact: bool = False) -> Bench:
    """The model's shape and dtype."""
    if not is_exact:
        return Bench(None, is_tiny=is_tiny)
    return Bench(None, is_tiny=is_tiny, dtype=torch.float32, **({} if is_tiny else {"num_hidden_layers": 8}))


# Adapters and requests


def make_adapters(num: int, *, is_tiny: bool, folder: Path | None, is_exact: bool = False) -> list[Adapter]:
    """Random adapters of rank 16 on all seven projections; number `i` is the same every time.

    More than `NUM_DISTINCT` are these tensors under other scalings, which makes other contents of them. With a folder
    they are PEFT checkpoints that share files of weights, and every replica reads them there.
    """
    bench = make_bench(is_tiny=is_tiny, is_exact=is_exact)
    with torch.device("meta"):  # shapes alone: the model is the replicas'
        bench._model = bench_model_shapes(bench)
    distinct = bench.make_adapters(min(num, NUM_DISTINCT))
    if folder is None:
        adapters = []
        for i in range(num):
            one = distinct[i % len(distinct)]
            scaling = 2.0 + 1e-4 * (i // len(distinct))
            weights = {path: LoraWeights(w.lora_A, w.lora_B, scaling) for path, w in one.weights.items()}
            adapters.append(replace(one, name=f"n{i}", fingerprint=f"{i:04d}-bench", weights=weights))
        return adapters
    return _written(distinct, num, folder)


def bench_model_shapes(bench: Bench) -> Any:
    """The timed model without its weights."""
    import transformers

    config = transformers.LlamaConfig(**bench.shape, tie_word_embeddings=False)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def _written(distinct: list[Adapter], num: int, folder: Path) -> list[Adapter]:
    from safetensors.torch import save_file

    from langchain_lora_retriever.pool.checkpoint import read_adapter

    for i, adapter in enumerate(distinct):
        tensors = {}
        for path, w in adapter.weights.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = w.lora_A.contiguous()
            tensors[f"base_model.model.{path}.lora_B.weight"] = w.lora_B.contiguous()
        (folder / f"weights{i}").mkdir(parents=True)
        save_file(tensors, folder / f"weights{i}" / "adapter_model.safetensors")

    def write(i: int) -> Adapter:
        path = folder / f"n{i}"
        path.mkdir()
        alpha = RANK * (2.0 + 1e-4 * (i // len(distinct)))
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": alpha,
            "target_modules": list(TARGETS), "base_model_name_or_path": "8b",
        }  # fmt: skip
        (path / "adapter_config.json").write_text(json.dumps(config))
        source = folder / f"weights{i % len(distinct)}" / "adapter_model.safetensors"
        os.link(source, path / "adapter_model.safetensors")
        return read_adapter(path)

    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(write, range(num)))


def make_rows(
    adapters: Sequence[Adapter], num: int, *, num_in: int, num_out: int, seed: int, is_tiny: bool,
    varies: bool = False, **sampling: Any,
) -> list[Row]:  # fmt: skip
    """Requests: random prompts, mixtures of three adapters drawn zipf-wise.

    Args:
        adapters: To draw from.
        num: How many.
        num_in: Tokens of a prompt.
        num_out: Tokens of an answer.
        seed: Of the draws.
        is_tiny: Whether the vocabulary is.
        varies: Whether lengths lie between half of that and half as much again, or are all the same: then streams that
            ask one request after the other end together and ask together, and an engine idles in between.
        **sampling: Other settings of the answers.
    """
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(adapters) + 1)]
    rows = []
    for _ in range(num):
        members: dict[str, Adapter] = {}
        while adapters and len(members) < 3:
            (adapter,) = rng.choices(adapters, weights)
            members[adapter.fingerprint] = adapter
        scales = (rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)) if varies else (1.0, 1.0)
        prompt = [rng.randrange(3, 300 if is_tiny else 100_000) for _ in range(round(num_in * scales[0]))]
        params = SamplingParams(max_tokens=round(num_out * scales[1]), ignore_eos=True, **sampling)
        rows.append(Row(prompt, params, [(adapter, 1 / 3) for adapter in members.values()]))
    return rows


# Measuring


async def stream(engine: EngineClient, row: Row, on_tokens: Callable[[int], None] = lambda _: None) -> Timed:
    """Run one request, token by token."""
    start = last = time.perf_counter()
    first = pause = 0.0
    generation = engine.submit(row.prompt, row.sampling, row.adapters)
    async for delta in generation:
        now = time.perf_counter()
        if first:
            pause = max(pause, now - last)
        else:
            first = now - start
        last = now
        on_tokens(len(delta.token_ids))
    done = generation.result(0)
    return Timed(done.token_ids, done.text, first, pause, done)


async def closed_loop(engine: EngineClient, rows: Sequence[Row], num_streams: int) -> tuple[list[Timed], float]:
    """Streams that ask one request after the other until all are answered; answers, and seconds in all."""
    answers: dict[int, Timed] = {}
    left = iter(enumerate(rows))

    async def ask() -> None:
        for index, row in left:
            answers[index] = await stream(engine, row)

    start = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(num_streams)))
    return [answers[i] for i in range(len(rows))], time.perf_counter() - start


def counts(stats: Sequence[Any]) -> dict[str, int]:
    """Sums over replicas."""
    names = ("num_finished", "num_preemptions", "num_adapter_hits", "num_adapter_loads")
    return {name: sum(getattr(each, name) for each in stats) for name in names}


@contextmanager
def ray_cluster() -> Iterator[None]:
    """A cluster of this machine alone, without a dashboard; as many replicas and callers as are wanted fit."""
    import ray
    from ray import serve

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # what replicas see
    ray.init(
        address="local", num_cpus=256, include_dashboard=False, object_store_memory=512 << 20,
        log_to_driver=bool(os.environ.get("BENCH_LOGS")),
    )  # fmt: skip
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def touch_memory(gib: int) -> None:
    """Write once to as much memory: a virtual machine may have most of its own given only when that is first used."""
    if gib:
        with ProcessPoolExecutor(min(gib, os.cpu_count() or 1, 16)) as pool:
            list(pool.map(_touch, [-(-gib // 16)] * 16))


def _touch(gib: int) -> int:
    return int(np.ones(gib << 27).nbytes)


def deploy(recipe: Callable[[], Any], num_replicas: int, max_ongoing_requests: int) -> Any:
    """A handle of so many replicas, each with a GPU if there are some."""
    from ray import serve

    from langchain_lora_retriever.remote import engine_app

    options = {"num_cpus": 1, "num_gpus": int(DEVICE.type == "cuda")}
    app = engine_app(
        recipe, num_replicas=num_replicas, max_ongoing_requests=max_ongoing_requests, ray_actor_options=options,
        graceful_shutdown_timeout_s=5.0,
    )  # fmt: skip
    return serve.run(app, name="bench", route_prefix=None)


def replicas(options: argparse.Namespace, put: Callable[[str, Any], None]) -> None:
    """The engine of `make_engine` on the most GPUs that are asked for; of them 1, 2, 4, ... get all requests."""
    import ray

    is_tiny = options.tiny
    num_in, num_out = (16, 12) if is_tiny else (128, options.tokens)
    folder = Path(tempfile.mkdtemp()) / "adapters" if options.folder is None else options.folder
    recipe = partial(make_engine, is_tiny=is_tiny, max_num_seqs=options.max_num_seqs,
                     lora_cache_bytes=options.lora_cache_gb << 30,
                     pinned_lora_bytes=None if options.pinned_gb is None else options.pinned_gb << 30)  # fmt: skip
    make = partial(make_rows, num_in=num_in, num_out=num_out, is_tiny=is_tiny, varies=True)
    num_streams = {n: options.streams_each * n if options.streams_each else options.streams for n in options.counts}
    num_callers = -(-max(num_streams.values()) // options.streams_per_caller)
    medians: dict[int, float] = {}
    with ray_cluster(), ThreadPoolExecutor(1) as thread:
        start = time.perf_counter()
        made = thread.submit(make_adapters, options.adapters, is_tiny=is_tiny, folder=folder)
        callers = [
            ray.remote(num_cpus=1)(Caller).remote("bench", make, 100 * i)  # type: ignore[attr-defined]
            for i in range(num_callers)
        ]
        # No request waits for a place with its caller: each replica has room for all of them to queue.
        deploy(recipe, max(options.counts), max_ongoing_requests=max(*num_streams.values(), 2 * options.max_num_seqs))
        put(f"{max(options.counts)} replicas: seconds to start", round(time.perf_counter() - start, 1))
        known = [(adapter.path, adapter.fingerprint) for adapter in made.result()]
        put("adapters", f"{len(known)} in {folder}")
        found = ray.get([caller.connect.remote(known) for caller in callers])
        names = sorted({name for each in found for name in each})
        start = time.perf_counter()
        ray.get([caller.fill.remote(names[i::num_callers], names) for i, caller in enumerate(callers)])
        put(f"seconds until each of {len(names)} replicas has read all adapters", round(time.perf_counter() - start, 1))
        for count in options.counts:
            share = -(-num_streams[count] // num_callers)
            shares = [min(share, num_streams[count] - share * i) for i in range(num_callers)]
            used = [(caller, num) for caller, num in zip(callers, shares, strict=True) if num > 0]
            start = time.perf_counter()
            ray.get([caller.warm.remote(num, names[count:]) for caller, num in used])
            put(f"{count} replicas: seconds to warm up, {len(used)} callers", round(time.perf_counter() - start, 1))
            title = f"{count} replicas, {num_streams[count]} streams"
            medians[count] = statistics.median(_rounds(title, used, options, put))
        checked = max(ray.get([caller.check_integrity.remote() for caller in callers]))
        put("integrity holds on", checked)
        fewest = min(medians)
        for count, rate in sorted(medians.items()):
            put(f"{count} replicas: tok/s, and times one", (round(rate), round(rate / medians[fewest] * fewest, 3)))


def _rounds(
    name: str, callers: Sequence[tuple[Any, int]], options: argparse.Namespace, put: Callable[[str, Any], None]
) -> list[float]:
    """Tokens a second of each round."""
    import ray

    rates = []
    for round_ in range(1, 1 + options.rounds):
        begin = time.time() + (0.5 if options.tiny else 3.0)  # streams begin at once, and are all under way by then
        each = ray.get([caller.run.remote(num, round_, begin, options.seconds) for caller, num in callers])
        firsts = [first for one in each for first in one["firsts"]]
        found = max((one["counts"] for one in each), key=lambda sums: sums["num_finished"])
        hits, loads = found["num_adapter_hits"], found["num_adapter_loads"]
        rates.append(sum(one["num_tokens"] for one in each) / options.seconds)
        put(f"{name}, round {round_}", {
            "tok/s": round(rates[-1]),
            "first token ms p50/p99": [round(1e3 * percentile(firsts, q)) for q in (0.5, 0.99)],
            "adapters found resident": round(hits / max(hits + loads, 1), 3), "loads": loads,
            "requests of each replica": sorted(found["finished"]),
            "CPU share of a caller": round(statistics.median(one["cpu"] for one in each), 2),
        })  # fmt: skip
    return rates


class Caller:
    """A process whose streams ask the replicas one request after the other.

    Args:
        app: Name of the replicas' application.
        make: Makes requests, see `make_rows`.
        seed: Its requests are no other's.
    """

    def __init__(self, app: str, make: Callable[..., list[Row]], seed: int) -> None:
        from langchain_lora_retriever import remote  # while the replicas start

        self._make_engine = partial(remote.RemoteEngine, app)
        self._make, self._seed = make, seed

    def connect(self, known: Sequence[tuple[Path, str]]) -> list[str]:
        """Find the replicas, and read the adapters of these folders and fingerprints; the replicas that it knows."""
        from langchain_lora_retriever.pool.checkpoint import read_adapter

        self._adapters = [read_adapter(path, fingerprint=fingerprint) for path, fingerprint in known]
        self._engine = avoiding(self._make_engine())
        rows = self._make([], 64, seed=0)
        rows = [row._replace(sampling=replace(row.sampling, max_tokens=1)) for row in rows]
        asyncio.run(closed_loop(self._engine, rows, len(rows)))  # some for each
        return [door.replica_id for door in self._engine.doors]

    def fill(self, mine: Sequence[str], names: Sequence[str]) -> None:
        """Ask each of some replicas once for every adapter."""
        for name in mine:
            self._engine.avoided = frozenset(names) - {name}
            rows = self._make([], -(-len(self._adapters) // 3), seed=0)
            rows = [
                row._replace(
                    sampling=replace(row.sampling, max_tokens=1),
                    adapters=[(adapter, 1 / 3) for adapter in self._adapters[3 * i : 3 * i + 3]],
                )
                for i, row in enumerate(rows)
            ]
            asyncio.run(closed_loop(self._engine, rows, 32))

    def warm(self, num_streams: int, avoided: Sequence[str]) -> None:
        """Ask for full batches; from now on not of some of the replicas."""
        self._engine.avoided = frozenset(avoided)
        rows = self._make(self._adapters, 2 * num_streams, seed=self._seed)
        asyncio.run(closed_loop(self._engine, rows, num_streams))

    def run(self, num_streams: int, round_: int, begin: float, seconds: float) -> dict[str, Any]:
        """Ask until the window ends, and count what comes within it."""
        rows = iter(self._make(self._adapters, 2048, seed=self._seed + 1 + round_))
        end = begin + seconds
        num_tokens, firsts = 0, []

        async def ask() -> None:
            nonlocal num_tokens
            while (asked := time.time()) < end:
                row = next(rows)
                generation = self._engine.submit(row.prompt, row.sampling, row.adapters)
                is_first = begin <= asked
                async for delta in generation:
                    now = time.time()
                    if begin <= now < end:
                        num_tokens += len(delta.token_ids)
                    if is_first:
                        firsts.append(now - asked)
                        is_first = False
                assert len(generation.result(0).token_ids) == row.sampling.max_tokens

        async def ask_all() -> tuple[dict[str, Any], float]:
            streams = [asyncio.create_task(ask()) for _ in range(num_streams)]
            await asyncio.sleep(begin - time.time())
            before, cpu = await asyncio.to_thread(self._engine.engine_stats), time.process_time()
            await asyncio.sleep(end - time.time())
            cpu = time.process_time() - cpu
            after = await asyncio.to_thread(self._engine.engine_stats)
            await asyncio.gather(*streams)
            first, last = counts(before), counts(after)
            each = [one.num_finished - other.num_finished for one, other in zip(after, before, strict=True)]
            return {name: last[name] - first[name] for name in last} | {"finished": each}, cpu

        sums, cpu = asyncio.run(ask_all())
        return {"num_tokens": num_tokens, "firsts": firsts, "counts": sums, "cpu": cpu / seconds}

    def check_integrity(self) -> int:
        """Check the replicas that it has asked; how many they are."""
        self._engine.check_integrity()
        return len(self._engine.doors)


def avoiding(engine: Any) -> Any:
    """Let an engine ask none of the replicas that are named in its `avoided`, as with those that it has lost."""
    attempt = engine._attempt
    engine.avoided = frozenset()

    def attempt_elsewhere(request: Any, replica: list[str], avoid: frozenset[str]) -> Any:
        return attempt(request, replica, avoid | engine.avoided)

    engine._attempt = attempt_elsewhere
    return engine


def kill(options: argparse.Namespace, put: Callable[[str, Any], None]) -> None:
    """All streams at once, greedy and seeded by turns; a replica is killed when half of the tokens have come."""
    from langchain_lora_retriever.remote import RemoteEngine

    is_tiny, num_streams = options.tiny, options.streams
    folder = Path(tempfile.mkdtemp()) / "adapters"
    adapters = make_adapters(options.adapters, is_tiny=is_tiny, folder=folder, is_exact=True)
    num_in, num_out = (16, 12) if is_tiny else (128, 2 * options.tokens)
    rows = make_rows(adapters, num_streams, num_in=num_in, num_out=num_out, is_tiny=is_tiny, seed=99, logprobs=5)
    rows = [row if i % 2 else row._replace(sampling=replace(row.sampling, temperature=0.7, seed=i)) for i, row in
            enumerate(rows)]  # fmt: skip
    recipe = partial(make_engine, is_tiny=is_tiny, max_num_seqs=options.max_num_seqs, is_exact=True)
    with ray_cluster():
        handle = deploy(recipe, max(options.counts), max_ongoing_requests=num_streams)
        with closing(RemoteEngine(handle)) as engine:
            _kill(engine, rows, put)
            engine.check_integrity()
            put("integrity holds on", len(engine.doors))


def _kill(engine: Any, rows: list[Row], put: Callable[[str, Any], None]) -> None:
    """Every stream twice undisturbed, and once with a replica killed."""
    runs = [asyncio.run(closed_loop(engine, rows, len(rows)))[0] for _ in range(2)]
    victim = max(engine.doors, key=lambda door: door.replica_id)
    num_left = len(rows) * rows[0].sampling.max_tokens // 2
    num_moved = engine.num_moved

    def count(num_tokens: int) -> None:
        nonlocal num_left
        was_left, num_left = num_left, num_left - num_tokens
        if was_left > 0 >= num_left:
            os.kill(victim.pid, signal.SIGKILL)

    async def disturbed() -> list[Timed]:
        return list(await asyncio.gather(*(stream(engine, row, count) for row in rows)))

    answers = asyncio.run(disturbed())
    others = [i for i, (a, b) in enumerate(zip(runs[0], answers, strict=True)) if a.text != b.text]
    put("a replica killed in mid-stream", {
        "streams": len(rows), "moved": engine.num_moved - num_moved,
        "complete": sum(len(a.token_ids) == rows[0].sampling.max_tokens for a in answers),
        "texts equal to the undisturbed run": len(rows) - len(others),
        "texts equal in two undisturbed runs": sum(a.text == b.text for a, b in zip(*runs, strict=True)),
        "first differences, nats between the two tokens": [_first_difference(runs[0][i], answers[i]) for i in others],
        "longest pauses ms": [round(1e3 * pause) for pause in sorted(a.pause for a in answers)[-5:]],
        "longest pause ms undisturbed": round(1e3 * max(a.pause for a in runs[1])),
    })  # fmt: skip
    for answer in answers:
        told = [item.token_id for item in answer.completion.logprobs]
        assert told == list(answer.token_ids), "a token came twice, or not at all"


def _first_difference(one: Timed, other: Timed) -> list[float]:
    """Place of the first token that differs, and how far apart the two are in the undisturbed run."""
    at = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b), -1)
    if at < 0:
        return [-1, 0.0]
    top = dict(one.completion.logprobs[at].top)
    gap = top.get(one.token_ids[at], float("nan")) - top.get(other.token_ids[at], float("nan"))
    return [at, round(gap, 4)]


# Without a model


def call_stub(app: str, seconds: float, num_streams: int, num_adapters: int, seed: int, num_out: int) -> dict[str, Any]:
    """One calling process: requests and tokens a second that it gets through."""
    from langchain_lora_retriever.remote import RemoteEngine

    engine = RemoteEngine(app)
    adapters = [Adapter(name=f"a{i}", fingerprint=f"{i:016d}", weights={}) for i in range(num_adapters)]
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, num_adapters + 1)]
    sampling = SamplingParams(max_tokens=num_out)
    done = [0, 0]
    firsts: list[float] = []

    async def ask(end: float) -> None:
        while time.perf_counter() < end:
            (adapter,) = rng.choices(adapters, weights)
            answer = await stream(engine, Row([5] * 64, sampling, [(adapter, 1.0)]))
            done[0] += 1
            done[1] += len(answer.token_ids)
            firsts.append(answer.first)

    async def all_of(seconds: float) -> float:
        start = time.perf_counter()
        await asyncio.gather(*(ask(start + seconds) for _ in range(num_streams)))
        return time.perf_counter() - start

    asyncio.run(all_of(2.0))
    before = counts(engine.engine_stats())
    done[:] = [0, 0]
    firsts.clear()
    cpu = time.process_time()
    took = asyncio.run(all_of(seconds))
    cpu = time.process_time() - cpu
    after = counts(engine.engine_stats())
    engine.close()
    return {
        "requests/s": done[0] / took,
        "tok/s": done[1] / took,
        "first ms": 1e3 * statistics.median(firsts),
        "cpu ms": 1e3 * cpu / max(done[0], 1),
        "counts": {name: after[name] - before[name] for name in after},
    }


def stub(options: argparse.Namespace, put: Callable[[str, Any], None]) -> None:
    """Requests a second, tokens a second, and where requests land, without a model."""
    import ray
    from ray import serve

    from langchain_lora_retriever.remote import engine_app

    with ray_cluster():
        caller = ray.remote(num_cpus=0.1)(call_stub)
        for count in options.counts:
            app = engine_app(
                partial(StubEngine, rate=options.rate), num_replicas=count, max_ongoing_requests=128,
                ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=1.0,
            )  # fmt: skip
            serve.run(app, name="stub", route_prefix=None)
            for num_callers in options.callers:
                for what, num_out in (("short answers", 8), ("long answers", 400)):
                    num_streams = max(1, options.streams_stub * count // num_callers)
                    results = ray.get([
                        caller.remote("stub", options.seconds, num_streams, options.adapters, seed, num_out)
                        for seed in range(num_callers)
                    ])  # fmt: skip
                    whole = max((r["counts"] for r in results), key=lambda each: each["num_finished"])
                    put(f"{count} stubs, {num_callers} callers of {num_streams} streams, {what}", {
                        "requests/s": round(sum(r["requests/s"] for r in results)),
                        "tok/s": round(sum(r["tok/s"] for r in results)),
                        "first token ms": round(statistics.median(r["first ms"] for r in results), 1),
                        "CPU ms of a caller for a request": round(statistics.median(r["cpu ms"] for r in results), 2),
                        "requests that found their adapter": round(
                            whole["num_preemptions"] / max(whole["num_finished"], 1), 3),
                    })  # fmt: skip


# One GPU


def one(options: argparse.Namespace, put: Callable[[str, Any], None]) -> None:
    """HTTP streams and a process of its own, over the engine alone."""
    from engine_gpu.serving import chat_model  # sentence-transformers; FastAPI and uvicorn later

    from langchain_lora_retriever.remote import ProcessEngine

    is_tiny = options.tiny
    num_in, num_out = (16, 12) if is_tiny else (128, options.tokens)
    adapters = make_adapters(min(options.adapters, NUM_DISTINCT), is_tiny=is_tiny, folder=None)
    make = partial(make_rows, adapters, num_in=num_in, num_out=num_out, is_tiny=is_tiny)
    sizes = (4, 8) if is_tiny else (64, 256)
    alone = make_engine(is_tiny=is_tiny, max_num_seqs=256)
    reference: dict[int, float] = {}

    def put_rate(name: str, size: int, rates: list[float]) -> None:
        rate = statistics.median(rates)
        share = rate / reference.setdefault(size, rate)
        span = f"{min(rates):.0f} to {max(rates):.0f}"
        put(f"{name}, {size}, tok/s", f"{rate:.0f} ({share:.3f} of the engine alone; {span})")

    for size in sizes:
        put_rate("engine alone", size, _rates_together(alone, make, size, num_out, options.rounds))

    with chat_model(alone, adapters, num_out) as llm:
        _serve_and_batch("in one process", llm, make, sizes, options.rounds, num_out, put_rate)
    alone.check_integrity()
    alone.close()
    del alone, llm
    free_memory()
    from bench_replicas_gpu import make_engine as make_there  # of a module: this script is another's `__main__`

    apart = ProcessEngine(partial(make_there, is_tiny=is_tiny, max_num_seqs=256))
    try:
        for size in sizes:
            put_rate("process of its own, awaited", size, _rates_together(apart, make, size, num_out, options.rounds))
            put_rate("process of its own, streams", size, _rates_streamed(apart, make, size, num_out, options.rounds))
        with chat_model(apart, adapters, num_out) as llm:
            _serve_and_batch("process of its own", llm, make, sizes, options.rounds, num_out, put_rate)
        apart.check_integrity()
    finally:
        apart.close()


def _serve_and_batch(
    name: str, llm: Any, make: Callable[..., list[Row]], sizes: Sequence[int], rounds: int, num_out: int,
    put_rate: Callable[[str, int, list[float]], None],
) -> None:  # fmt: skip
    from engine_gpu.serving import abatch_seconds, http_rates

    llm.runtime.ready()
    for size in sizes:
        rows = [make(size, seed=300 + round_) for round_ in range(rounds + 1)]
        put_rate(f"{name}, HTTP streams", size, http_rates(llm, rows, num_out))
        seconds = [asyncio.run(abatch_seconds(llm, make(size, seed=400 + round_)))[0] for round_ in range(rounds + 1)]
        put_rate(f"{name}, abatch, routed", size, [size * num_out / each for each in seconds[1:]])


def _rates_together(
    engine: EngineClient, make: Callable[..., list[Row]], size: int, num_out: int, rounds: int
) -> list[float]:
    """Tokens a second of requests submitted together, awaited whole."""
    rates = []
    for round_ in range(rounds + 1):
        rows = make(size, seed=100 + round_)
        start = time.perf_counter()
        running = [engine.submit(row.prompt, row.sampling, row.adapters) for row in rows]
        for generation in running:
            assert len(generation.result(300).token_ids) == num_out
        rates.append(size * num_out / (time.perf_counter() - start))
    return rates[1:]


def _rates_streamed(
    engine: EngineClient, make: Callable[..., list[Row]], size: int, num_out: int, rounds: int
) -> list[float]:
    """The same of streams, token by token."""
    rates = []
    for round_ in range(rounds + 1):
        rows = make(size, seed=200 + round_)
        _, seconds = asyncio.run(closed_loop(engine, rows, size))
        rates.append(size * num_out / seconds)
    return rates[1:]


MODES = {"replicas": replicas, "kill": kill, "stub": stub, "one": one}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2], help="of replicas, in this order")
    parser.add_argument("--streams", type=int, default=256, help="streams in all")
    parser.add_argument("--streams-each", type=int, default=0, help="or streams for each replica")
    parser.add_argument("--streams-per-caller", type=int, default=64, help="of each calling process")
    parser.add_argument("--adapters", type=int, help="32 by default, 500 for stubs")
    parser.add_argument("--folder", type=Path, help="empty folder for adapters that all replicas read")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--lora-cache-gb", type=int, default=6)
    parser.add_argument("--pinned-gb", type=int, help="twice as much by default")
    parser.add_argument("--callers", type=int, nargs="*", default=[1, 2], help="stub: calling processes")
    parser.add_argument("--streams-stub", type=int, default=64, help="stub: streams for each replica")
    parser.add_argument("--rate", type=float, default=10_000, help="stub: tokens a second of a replica")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--touch-gib", type=int, default=0, help="memory to write to before anything is started")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for bench_replicas.json")
    options = parser.parse_args()
    options.adapters = options.adapters or (500 if options.mode == "stub" else 32)
    if options.tiny:
        options.streams, options.max_num_seqs, options.rounds, options.adapters = 8, 8, 1, min(options.adapters, 80)
        options.streams_per_caller = 4
    results: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        results[name] = value
        print(f"{name}: {value}", flush=True)
        if options.out is not None:
            (options.out / f"bench_replicas_{options.mode}.json").write_text(json.dumps(results, indent=1, default=str))

    is_gpu = DEVICE.type == "cuda"
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if is_gpu else platform.machine()
    put("device", f"{device}, {os.cpu_count()} cores, torch {torch.__version__}")
    start = time.perf_counter()
    touch_memory(options.touch_gib)
    put("seconds to touch memory", round(time.perf_counter() - start, 1))
    MODES[options.mode](options, put)


if __name__ == "__main__":
    main()
