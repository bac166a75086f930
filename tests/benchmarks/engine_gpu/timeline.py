"""Where the milliseconds of a step go, by the profiler."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch

from engine_gpu.bench import DEVICE, Bench, Pairs

if TYPE_CHECKING:
    from collections.abc import Iterable

# The first kind whose word is in a kernel's name; the order decides.
KINDS = (
    ("LoRA shrink", ("_shrink", "_sort_kernel", "_tile_kernel", "_count_kernel", "_bucket")),
    ("LoRA expand", ("_expand", "_mix_kernel")),
    ("attention", ("_decode_kernel", "_combine_kernel", "_prefill_kernel", "_write_kernel", "flash", "fmha")),
    ("norms and activations", ("_norm_kernel", "_activation_kernel")),
    ("products", ("nvjet", "gemm", "cublas", "cutlass", "splitk", "gemv")),
    ("copies", ("memcpy", "memset")),
)
SAMPLING_AND_REST = "sampling, embedding, rotary table"


def timeline(bench: Bench) -> None:
    """Decode steps of a full batch, and the prefill of one, split into kinds of kernels and gaps."""
    num_steps, num_out = (3, 40) if bench.is_tiny else (30, 200)
    worker = bench.engine()
    many = len(bench.adapters)
    kinds: dict[str, list[Pairs]] = {
        "base": [[] for _ in range(bench.batch)],
        "mixture k=3, 8 adapters": [bench.mixture(i, 8) for i in range(bench.batch)],
        f"mixture k=3, {many} adapters": [bench.mixture(i, many) for i in range(bench.batch)],
    }
    for name, pairs in kinds.items():
        bench.run_all(worker, pairs)
        running = [worker.submit(bench.prompt(i), bench.greedy(num_out), p) for i, p in enumerate(pairs)]
        streams = [iter(generation) for generation in running]
        for stream in streams:
            next(stream)  # kept until the end: a stream that is let go ends its request
        with torch.profiler.profile(activities=_activities()) as profiler:
            before = worker.stats().num_steps
            while worker.stats().num_steps < before + num_steps and worker.stats().num_running:
                time.sleep(1e-3)
            profiled = worker.stats().num_steps - before
        for generation in running:
            generation.abort()
        _report(bench, f"decode step, {name}", profiler, profiled)
        with torch.profiler.profile(activities=_activities()) as profiler:
            bench.run_all(worker, pairs, num_out=1)
        _report(bench, f"prefill of the batch, {name}", profiler, 1)


def _report(bench: Bench, name: str, profiler: Any, num_steps: int) -> None:
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not spans:
        bench.put(f"timeline ms, {name}", f"nothing ran on a GPU (device: {DEVICE.type})")
        return
    totals: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for start, end, kernel in spans:
        kind = _kind(kernel)
        totals[kind] = totals.get(kind, 0.0) + (end - start)
        kernels.setdefault(kernel, []).append(end - start)
    length = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    busy = _union((start, end) for start, end, _ in spans)
    parts = {kind: round(us / 1e3 / num_steps, 3) for kind, us in sorted(totals.items(), key=lambda kv: -kv[1])}
    parts["overlapped"] = round((sum(totals.values()) - busy) / 1e3 / num_steps, 3)
    parts["idle"] = round((length - busy) / 1e3 / num_steps, 3)
    parts["step"] = round(length / 1e3 / num_steps, 3)
    bench.put(f"timeline ms, {name}", parts)
    if bench.out is not None:
        rows = sorted(((sum(us), len(us), kernel) for kernel, us in kernels.items()), reverse=True)
        listing = [{"us": round(us / num_steps, 1), "launches": n / num_steps, "kernel": k} for us, n, k in rows[:60]]
        with (bench.out / "kernels.jsonl").open("a") as file:
            file.write(json.dumps({"timeline": name, "kernels": listing}) + "\n")


def _kind(kernel: str) -> str:
    lowered = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in lowered for word in words)), SAMPLING_AND_REST)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Microseconds during which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _activities() -> list[Any]:
    kinds = torch.profiler.ProfilerActivity
    return [kinds.CUDA] if DEVICE.type == "cuda" else [kinds.CPU]
