"""A decoder layer of a decode step, launch by launch as the engine launches it: what it takes, and what adapters add.

    PYTHONPATH=kernels:tests/benchmarks python tests/benchmarks/bench_layer.py [--tokens 1 64] [--profile]

Layers of Llama-3-8B's shape with random weights in bfloat16, one after the other in a CUDA graph, contexts of 160
tokens; adapters of rank 16 on all seven projections. Cases: no adapters, one of 32 for each token, mixtures of three
over 8 and over 32. Microseconds a layer, medians, and what the bytes of weights, adapters, keys and values take at the
rate at which memory is read here. Before it is timed, each case is compared with PyTorch in float32. `--profile` prints
when the launches of a layer begin, and how long they take. `--tiny` compares alone, of small layers: on a CPU with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import torch
from bench_lora_kernels import bandwidths, replay_us
from torch.nn import functional

from lora_retriever_kernels.attention import Pages, Projected, Rotary, attend_decode, choose_num_splits
from lora_retriever_kernels.decoder import RmsNorm, add_rms_norm, gated_activation, rms_norm
from lora_retriever_kernels.few_tokens import multiply_few, multiply_gated
from lora_retriever_kernels.lora import LoraBatch, LoraRows, LoraStack, lora_delta, lora_mix, lora_shrink
from lora_retriever_kernels.streams import run_beside

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter knows no bfloat16
CASES = ((0, 0), (1, 32), (3, 8), (3, 32))  # adapters of a token, and of all
NUM_ADAPTERS, RANK, PAGE = 32, 16, 16
MAX_LORAS = 190  # as many as the engine has places for in 16 GiB


class Shape(NamedTuple):
    """Sizes of the layers."""

    hidden: int = 4096
    inner: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    context: int = 160
    num_layers: int = 6

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Widths of queries, keys and values."""
        width = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, width, width

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Inputs and outputs of a layer's groups of projections."""
        return {
            "qkv": (self.hidden, self.qkv), "out": (self.qkv[0], (self.hidden,)),
            "gate_up": (self.hidden, (self.inner, self.inner)), "down": (self.inner, (self.hidden,)),
        }  # fmt: skip


class Group(NamedTuple):
    """Projections that share an input."""

    weight: torch.Tensor
    stack: LoraStack


class Layers:
    """The layers, their adapters and their cache."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.rows = LoraRows(MAX_LORAS, RANK, DEVICE)
        for slot in range(NUM_ADAPTERS):
            self.rows.assign(slot, slot * RANK, RANK)
        self.layers = [
            {name: self._group(*sizes) for name, sizes in shape.groups.items()} for _ in range(shape.num_layers)
        ]
        self.norm = RmsNorm(torch.ones(shape.hidden, device=DEVICE, dtype=DTYPE), 1e-5, 0.0)
        pages = -(-shape.context // PAGE)
        sizes = (2, 64 * pages, PAGE, shape.num_kv_heads, shape.head_dim)
        self.caches = [torch.randn(sizes, device=DEVICE, dtype=DTYPE) for _ in self.layers]
        self._tables = torch.arange(64 * pages, device=DEVICE, dtype=torch.int32).view(64, pages)
        self._side = torch.cuda.Stream() if DEVICE == "cuda" else None
        self.batch = LoraBatch(self.rows, 64, 3, backend="triton")

    def _group(self, in_features: int, out_features: tuple[int, ...]) -> Group:
        weight = torch.randn(sum(out_features), in_features, device=DEVICE, dtype=DTYPE) * in_features**-0.5
        stack = LoraStack(self.rows, NUM_ADAPTERS * RANK, in_features, out_features, DTYPE)
        stack.a.normal_(0, in_features**-0.5)
        stack.b.normal_(0, 0.1)
        stack.ranks[:NUM_ADAPTERS] = RANK
        return Group(weight, stack)

    def set(self, num_tokens: int, k: int, num_adapters: int) -> None:
        """Choose a step: each token the last of a context, with `k` of so many adapters."""
        self.k, self.num_adapters = k, num_adapters
        self.x = torch.randn(num_tokens, self.shape.hidden, device=DEVICE, dtype=DTYPE)
        self.tokens = torch.arange(num_tokens, device=DEVICE)
        self.pages = Pages(self._tables, self.tokens, torch.full_like(self.tokens, self.shape.context - 1))
        turns = torch.rand(num_tokens, self.shape.head_dim // 2, device=DEVICE).repeat(1, 2)
        self.rotary = Rotary(turns.cos().to(DTYPE), turns.sin().to(DTYPE))
        if k:
            self.mapping = ((self.tokens[:, None] + torch.arange(k, device=DEVICE)) % num_adapters).int()
            self.weights = torch.rand(num_tokens, k, device=DEVICE).softmax(1)
            self.batch.update(self.mapping, self.weights, num_adapters, RANK, has_gains=False)

    def _product(
        self, x: torch.Tensor, group: Group, *, takes_parts: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `LoraLayers.product_and_delta` in a captured step."""
        weight, stack = group

        def multiply() -> torch.Tensor:
            y = multiply_few(x, weight, None, takes_parts=takes_parts) if DEVICE == "cuda" else None
            return functional.linear(x, weight) if y is None else y

        def apart() -> torch.Tensor:
            v = lora_shrink(x, stack, self.batch)
            return lora_delta(v, stack, self.batch, lora_mix(v, stack, self.batch), takes_parts=True)

        if not self.k:
            return multiply(), None
        return run_beside(self._side, apart, multiply)

    def _gated(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """As `_Mlp`."""
        gated = multiply_gated(x, group.weight, None, "silu") if not self.k and DEVICE == "cuda" else None
        if gated is None:
            y, delta = self._product(x, group)
            gated = gated_activation(y, "silu", delta)
        return gated

    def run(self) -> torch.Tensor:
        """All layers, as `FusedForward` computes them."""
        dim, scaling = self.shape.head_dim, self.shape.head_dim**-0.5
        residual, x = self.x, rms_norm(self.x, self.norm)
        num_splits = choose_num_splits(len(self.tokens), self.shape.num_kv_heads)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            y, delta = self._product(x, layer["qkv"])
            query, key, value = (part.unflatten(1, (-1, dim)) for part in y.split(self.shape.qkv, 1))
            x = torch.empty(query.shape, device=DEVICE, dtype=DTYPE)
            attend_decode(
                x, query, cache[0], cache[1], self.pages, self.tokens, Projected(key, value, self.rotary, None, delta),
                scaling=scaling, num_splits=num_splits,
            )  # fmt: skip
            y, delta = self._product(x.flatten(1), layer["out"], takes_parts=True)
            residual, x = add_rms_norm(y, residual, self.norm, None, delta)
            y, delta = self._product(self._gated(x, layer["gate_up"]), layer["down"], takes_parts=True)
            residual, x = add_rms_norm(y, residual, self.norm, None, delta)
        return residual

    def check(self) -> None:
        """Whether that is what PyTorch computes in float32.

        Raises:
            AssertionError: If it is not.
        """
        dim, residual = self.shape.head_dim, self.x.float()
        cos, sin = (x.float()[:, None] for x in self.rotary)

        def normed(x: torch.Tensor) -> torch.Tensor:
            return functional.rms_norm(x, x.shape[1:], eps=self.norm.eps)

        def product(x: torch.Tensor, group: Group) -> torch.Tensor:
            y = x @ group.weight.float().T
            offset = 0
            for i, width in enumerate(group.stack.out_features if self.k else ()):
                a = group.stack.a[i].view(NUM_ADAPTERS, RANK, -1)
                b = group.stack.b[:, offset : offset + width].view(NUM_ADAPTERS, RANK, width)
                for j in range(self.k):
                    slots = self.mapping[:, j].long()
                    v = torch.einsum("ti,tri->tr", x, a[slots].float()) * self.weights[:, j, None]
                    y[:, offset : offset + width] += torch.einsum("tr,tro->to", v, b[slots].float())
                offset += width
            return y

        def turned(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat([-second, first], -1) * sin

        found = self.run().float()
        for layer, cache in zip(self.layers, self.caches, strict=True):
            query, key, value = (
                part.unflatten(1, (-1, dim))
                for part in product(normed(residual), layer["qkv"]).split(self.shape.qkv, 1)
            )
            keys, values = (part[self._tables[self.tokens].long()].float().flatten(1, 2) for part in cache)
            keys, values = (part[:, : self.shape.context].clone() for part in (keys, values))
            keys[:, -1], values[:, -1] = turned(key), value
            x = functional.scaled_dot_product_attention(
                turned(query)[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), enable_gqa=True
            )
            residual = residual + product(x.flatten(1), layer["out"])
            gate, up = product(normed(residual), layer["gate_up"]).chunk(2, 1)
            residual = residual + product(functional.silu(gate) * up, layer["down"])
        error = float((found - residual).norm() / residual.norm())
        assert error < (0.03 if DEVICE == "cuda" else 1e-4), error

    def num_bytes(self) -> int:
        """What a layer must read."""
        shape, itemsize = self.shape, DTYPE.itemsize
        elements = 2 * len(self.tokens) * shape.context * shape.num_kv_heads * shape.head_dim
        for in_features, out_features in shape.groups.values():
            elements += in_features * sum(out_features)
            elements += self.num_adapters * RANK * (in_features * len(out_features) + sum(out_features))
        return elements * itemsize


def print_launches(layers: Layers) -> None:
    """When the launches of a layer in the middle begin, and how long they take, microseconds."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers.run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    num = len(spans) // 3
    each = num // layers.shape.num_layers
    middle = spans[num + num // 2 : num + num // 2 + each + 1]
    for begin, end, name in middle:
        print(f"    {begin - middle[0][0]:8.2f} {end - begin:7.2f} {name[:60]}")


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 32, 64])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    layers = Layers(Shape(64, 96, 4, 2, 16, 21, 2) if options.tiny else Shape())
    rate = 1.0 if options.tiny else bandwidths()["read"]
    for num_tokens in options.tokens:
        for k, num_adapters in CASES:
            layers.set(num_tokens, k, min(num_adapters, num_tokens * k))
            layers.check()
            row: dict[str, Any] = {"tokens": num_tokens, "k": k, "adapters": layers.num_adapters}
            if not options.tiny:
                row["us"] = round(replay_us(layers.run) / layers.shape.num_layers, 1)
                row["floor"] = round(layers.num_bytes() / rate / 1e6, 1)
            print(json.dumps(row), flush=True)
            if options.profile and not options.tiny:
                print_launches(layers)


if __name__ == "__main__":
    main()
