"""Where the milliseconds of a step go, by the profiler."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch

from engine_gpu.bench import DEVICE, Bench, Pairs, synchronize

if TYPE_CHECKING:
    from collections.abc import Iterable

# How the names of our kernels begin: all that `kernels/` launches.
OURS = {
    "_sort_kernel": "LoRA grouping",
    "_tile_kernel": "LoRA grouping",
    "_shrink_kernel": "LoRA shrink",
    "_mix_kernel": "LoRA expand",
    "_expand_token_kernel": "LoRA expand",
    "_expand_tile_kernel": "LoRA expand",
    "_expand_gated_kernel": "LoRA expand",
    "_few_kernel": "products",
    "_write_kernel": "keys and values",
    "_decode_kernel": "attention",
    "_combine_kernel": "attention",
    "_prefill_kernel": "attention",
    "_norm_kernel": "norms and activations",
    "_activation_kernel": "norms and activations",
}
# Others' kernels: the first kind whose word is in the name; the order decides.
OTHERS = (
    ("attention", ("flash", "fmha")),
    ("products", ("nvjet", "gemm", "cublas", "cutlass", "splitk", "gemv")),
    ("copies", ("memcpy", "memset", "multi_tensor_apply")),
)
SAMPLING_AND_REST = "sampling, embedding, rotary table"
ONCE_PER_LAYER = "_decode_kernel"


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
        for generation in running:
            generation.abort()
        _report(bench, f"decode step, {name}", profiler, None)
        while worker.stats().num_running:
            time.sleep(1e-3)
        synchronize()
        with torch.profiler.profile(activities=_activities()) as profiler:
            bench.run_all(worker, pairs, num_out=1)
        _report(bench, f"prefill of the batch, {name}", profiler, 1)


def _report(bench: Bench, name: str, profiler: Any, num_steps: float | None) -> None:
    """Print what a step takes.

    Args:
        bench: Takes the result.
        name: What ran.
        profiler: What was recorded.
        num_steps: In how many steps; None counts them by a kernel that runs once for each layer, since the device went
            on until the profiler had stopped.
    """
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
    if num_steps is None:
        num_steps = sum(k.startswith(ONCE_PER_LAYER) for _, _, k in spans) / bench.model.config.num_hidden_layers
    length = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    busy = _union((start, end) for start, end, _ in spans)
    parts = {kind: round(us / 1e3 / num_steps, 3) for kind, us in sorted(totals.items(), key=lambda kv: -kv[1])}
    parts["overlapped"] = round((sum(totals.values()) - busy) / 1e3 / num_steps, 3)
    parts["idle"] = round((length - busy) / 1e3 / num_steps, 3)
    parts["step"] = round(length / 1e3 / num_steps, 3)
    parts["steps"] = round(num_steps, 2)
    bench.put(f"timeline ms, {name}", parts)
    if bench.out is not None:
        rows = sorted(((sum(us), len(us), kernel) for kernel, us in kernels.items()), reverse=True)
        listing = [{"us": round(us / num_steps, 1), "launches": n / num_steps, "kernel": k} for us, n, k in rows[:60]]
        with (bench.out / "kernels.jsonl").open("a") as file:
            file.write(json.dumps({"timeline": name, "kernels": listing}) + "\n")


def _kind(kernel: str) -> str:
    ours = [kind for start, kind in OURS.items() if kernel.startswith(start)]
    others = [kind for kind, words in OTHERS if any(word in kernel.lower() for word in words)]
    return (*ours, *others, SAMPLING_AND_REST)[0]


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
