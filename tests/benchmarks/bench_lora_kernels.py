"""Time the LoRA kernels on the seven projections of one Llama-3-8B layer against their memory floor.

Every case is first checked against float64, then captured in a CUDA graph over four layers of weights (so that small
cases do not sit in the cache more than a model's would) and replayed. The floor is the bytes of the distinct adapters'
A and B, of `x` read and of `y` read and written, over the rate at which a kernel that only reads does so in the same
run, the fastest there is.

    PYTHONPATH=kernels python tests/benchmarks/bench_lora_kernels.py --rank 16 --json result.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.lora import LoraBatch, LoraRows, LoraStack, add_lora

if TYPE_CHECKING:
    from collections.abc import Callable

GROUPS = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
SHAPES = ((1, 1), (8, 8), (32, 1), (32, 32), (64, 64), (128, 1), (128, 32), (512, 8), (2048, 8), (4096, 32))
NUM_LAYERS = 4
MAX_LORAS = 64


@dataclass
class Case:
    """One row of the table: `k` adapters for each of `T` tokens out of `N`."""

    k: int
    T: int
    N: int
    ranks: str = "16"
    contiguous: bool = False

    def rank(self, slot: int) -> int:
        """Return the rank of the adapter in `slot`."""
        return (8, 16, 32, 64)[slot % 4] if self.ranks == "8-64" else int(self.ranks)


class Layers:
    """Four layers of stacks with random weights in every row and rows laid out in random order."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.bfloat16, layers: int = NUM_LAYERS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = LoraRows(MAX_LORAS, max(case.rank(s) for s in range(4)), "cuda")
        row = 0
        for slot in torch.randperm(case.N, generator=generator).tolist():
            self.rows.assign(slot, row, case.rank(slot))
            row += case.rank(slot)
        self.stacks = []
        for _ in range(layers):
            for in_features, out_features in GROUPS:
                stack = LoraStack(self.rows, row, in_features, out_features, dtype)
                stack.a.normal_(0, in_features**-0.5)
                stack.b.normal_(0, 0.1)
                stack.ranks[: case.N] = torch.tensor([[case.rank(s)] for s in range(case.N)], dtype=torch.int32)
                self.stacks.append(stack)
        T = case.T
        self.inputs = [torch.randn(T, in_features, device="cuda", dtype=dtype) for in_features, _ in GROUPS]
        self.outputs = [torch.randn(T, sum(out), device="cuda", dtype=dtype) for _, out in GROUPS]
        self.mapping, self.weights = assign(case, generator)
        self.batch = LoraBatch(self.rows, T, case.k)
        self.batch.update(self.mapping, self.weights)

    def run(self, add: Callable[..., None]) -> None:
        """Call `add(y, x, stack)` for every group of every layer."""
        for i, stack in enumerate(self.stacks):
            add(self.outputs[i % 4], self.inputs[i % 4], stack)


def assign(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw each token's (or, if contiguous, each run of 128 tokens') adapters and weights."""
    units = math.ceil(case.T / 128) if case.contiguous else case.T
    if case.k == 1:
        mapping = (torch.arange(units) % case.N)[torch.randperm(units, generator=generator)][:, None]
    else:
        mapping = torch.stack([torch.randperm(case.N, generator=generator)[: case.k] for _ in range(units)])
    if case.contiguous:
        mapping = mapping.repeat_interleave(128, 0)[: case.T]
    weights = torch.rand(case.T, case.k, generator=generator).softmax(1)
    return mapping.to("cuda", torch.int32).contiguous(), weights.to("cuda")


def expected(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, layers: Layers) -> torch.Tensor:
    """Return `y` plus the adapters' outputs, in float64."""
    out = y.double()
    for slot in layers.mapping.unique().tolist():
        if slot < 0:
            continue
        hits = layers.mapping == slot
        tokens = hits.any(1).nonzero().squeeze(1)
        weight = (layers.weights * hits).double().sum(1, keepdim=True)[tokens]
        lo, offset = int(stack.rows.starts[slot]), 0
        for i, width in enumerate(stack.out_features):
            hi = lo + int(stack.ranks[slot, i])
            v = x[tokens].double() @ stack.a[i, lo:hi].double().t() * weight
            part = v @ stack.b[lo:hi, offset : offset + width].double()
            out[:, offset : offset + width].index_add_(0, tokens, part)
            offset += width
    return out


def check(layers: Layers, tolerance: float = 4e-3) -> float:
    """Return the worst relative error over the four groups; raise past `tolerance`."""
    worst = 0.0
    for i, stack in enumerate(layers.stacks[:4]):
        y, x = layers.outputs[i].clone(), layers.inputs[i]
        want = expected(y, x, stack, layers)
        add_lora(y, x, stack, layers.batch)
        error = ((y.double() - want).norm() / want.norm()).item()
        if not error <= tolerance:
            raise AssertionError(f"group {i}: relative error {error:.2e} exceeds {tolerance:.0e}")
        worst = max(worst, error)
    return worst


def replay_us(call: Callable[[], None], seconds: float = 0.15) -> float:
    """Capture `call` in a CUDA graph and return the median microseconds of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    while sum(times) < seconds * 1e6 and len(times) < 200:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 200)
    return statistics.median(times)


@triton.jit
def _read_kernel(target, source, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * BLOCK * NUM_BLOCKS + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(NUM_BLOCKS):
        total += tl.load(source + first + i * BLOCK)
    tl.store(target + tl.program_id(0), tl.sum(total))


@triton.jit
def _copy_kernel(target, source, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.program_id(0).to(tl.int64) * BLOCK * NUM_BLOCKS + tl.arange(0, BLOCK)
    for i in tl.static_range(NUM_BLOCKS):
        tl.store(target + first + i * BLOCK, tl.load(source + first + i * BLOCK))


def bandwidths() -> dict[str, float]:
    """Return terabytes per second of a kernel that reads 1 GiB, of one that copies it, and of the driver's own copy."""
    source = torch.randint(0, 255, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    grid, sizes = (source.numel() // (4096 * 8),), {"BLOCK": 4096, "NUM_BLOCKS": 8, "num_warps": 8}
    num_bytes = source.numel() * source.element_size()
    return {
        "read": num_bytes / replay_us(lambda: _read_kernel[grid](target, source, **sizes)) / 1e6,
        "copy": 2 * num_bytes / replay_us(lambda: _copy_kernel[grid](target, source, **sizes)) / 1e6,
        "driver_copy": 2 * num_bytes / replay_us(lambda: target.copy_(source)) / 1e6,
    }


def floor_bytes(case: Case, layers: Layers) -> int:
    """Return the bytes one layer must move."""
    used = [s for s in layers.mapping.unique().tolist() if s >= 0]
    rows = sum(case.rank(s) for s in used)
    adapters = rows * sum(i * len(out) + sum(out) for i, out in GROUPS)
    return 2 * (adapters + case.T * sum(i + 2 * sum(out) for i, out in GROUPS))


def torch_baseline(layers: Layers) -> Callable[..., None]:
    """Return the paper's batch inference: gather each token's adapters, two batched products; equal ranks only.

    Long prefills would gather gigabytes; there it is two products over all adapters with a mask between them.
    """
    mapping, weights, rows = layers.mapping.long(), layers.weights, layers.rows
    T, k = mapping.shape
    rank = rows.max_rank
    index = (rows.starts.long()[mapping][..., None] + torch.arange(rank, device="cuda")).view(T, k * rank)
    scale = weights.repeat_interleave(rank, 1).bfloat16()
    dense = torch.zeros(T, int(rows.counts.sum()), device="cuda").scatter_add_(
        1, index, weights.repeat_interleave(rank, 1)
    )
    dense = dense.bfloat16()

    def add(y: torch.Tensor, x: torch.Tensor, stack: LoraStack) -> None:
        offset = 0
        for i, width in enumerate(stack.out_features):
            out = y[:, offset : offset + width]
            b = stack.b[:, offset : offset + width]
            if T <= 128:
                v = torch.bmm(stack.a[i][index], x[:, :, None]).squeeze(2) * scale
                out += torch.bmm(v[:, None], b[index]).squeeze(1)
            else:
                out.addmm_((x @ stack.a[i].t()) * dense, b)
            offset += width

    return add


def measure(case: Case, bandwidth: float, *, baseline: bool = True) -> dict[str, object]:
    """Check and time one case; microseconds per layer."""
    layers = Layers(case)
    error = check(layers)
    time = replay_us(lambda: layers.run(lambda y, x, s: add_lora(y, x, s, layers.batch))) / NUM_LAYERS
    row = asdict(case) | {"floor_us": floor_bytes(case, layers) / bandwidth, "us": time, "error": error}
    row["update_us"] = replay_us(lambda: layers.batch.update(layers.mapping, layers.weights), 0.02)
    if baseline and case.ranks != "8-64":
        add = torch_baseline(layers)
        row["torch_us"] = replay_us(lambda: layers.run(add), 0.05) / NUM_LAYERS
    return row


def cases(ranks: str) -> list[Case]:
    """Return the table's rows; long prefills also with runs of 128 tokens that share their adapters."""
    out = []
    for k in (1, 3):
        for T, n in SHAPES:
            if n >= k:
                out.append(Case(k, T, n, ranks))
                out += [Case(k, T, n, ranks, contiguous=True)] if T >= 512 else []
            elif T == 1:
                out.append(Case(k, T, k, ranks))
    return out


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", nargs="+", default=["16", "64", "8-64"], help="ranks to time: 16, 64, 8-64, ...")
    parser.add_argument("--json", type=Path, help="write one JSON line per row here")
    args = parser.parse_args()
    torch.manual_seed(0)
    rates = bandwidths()
    head = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tb_per_s": {name: round(rate, 3) for name, rate in rates.items()},
    }
    print(json.dumps(head))
    lines = [head]
    print("rank   k     T   N  run  floor_us      us  ratio  torch_us  update_us    error")
    for ranks in args.rank:
        for case in cases(ranks):
            row = measure(case, 1e6 * rates["read"])
            lines.append(row)
            torch_us = f"{row['torch_us']:9.1f}" if "torch_us" in row else "        -"
            print(
                f"{ranks:>4} {case.k:3} {case.T:5} {case.N:3}  {'128' if case.contiguous else '  1'} "
                f"{row['floor_us']:9.1f} {row['us']:7.1f} {row['us'] / row['floor_us']:6.2f} {torch_us} "
                f"{row['update_us']:10.1f} {row['error']:8.1e}",
                flush=True,
            )
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
