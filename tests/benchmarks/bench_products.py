"""Products of few tokens with a layer's weights: ours beside the library's.

    PYTHONPATH=kernels:tests/benchmarks python tests/benchmarks/bench_products.py [--models qwen3-14b] [--tokens 1 16]

For each of a layer's products, over the weights of as many layers as do not fit the L2 cache, in a CUDA graph: the
library's product and the launch that reads it, ours and the same launch, which adds up the parts where there are some.
Microseconds a layer, medians; the floor is the weight's bytes at the rate at which memory is read here. Before
that, each result is compared with float64. Gate and up are timed together with their activation, in one launch, too.
`--sweep` tries other launch shapes than the rule's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_lora_kernels import bandwidths, replay_us
from torch.nn.functional import linear

from lora_retriever_kernels.decoder import RmsNorm, add_rms_norm, gated_activation
from lora_retriever_kernels.few_tokens import (
    MAX_TOKENS,
    ProductShape,
    choose_gated_product,
    choose_product,
    launch_product,
)

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPE = torch.bfloat16
# hidden size, outputs of q, k and v, inputs of the output projection, inner size of the MLP
MODELS = {
    "llama-3-8b": (4096, 6144, 4096, 14336),
    "llama-3.2-1b": (2048, 3072, 2048, 8192),
    "llama-3.2-3b": (3072, 5120, 3072, 8192),
    "qwen3-0.6b": (1024, 4096, 2048, 3072),
    "qwen2.5-7b": (3584, 4608, 3584, 18944),
    "qwen3-14b": (5120, 7168, 5120, 17408),
    "qwen2.5-32b": (5120, 7168, 5120, 27648),
    "gemma-3-4b": (2560, 4096, 2048, 10240),
    "llama-3-70b": (8192, 10240, 8192, 28672),
}
CANDIDATES = [
    *(ProductShape(64, 128, parts, 4, 4) for parts in (1, 2, 4, 8)),
    *(ProductShape(128, 64, parts, 4, 8) for parts in (1, 2)),
    *(ProductShape(128, 128, parts, 3, 8) for parts in (1, 2, 4)),
]
GATED = [
    ProductShape(64, 64, 1, 3, 4),
    ProductShape(64, 64, 1, 4, 4),
    ProductShape(64, 64, 1, 3, 8),
    ProductShape(64, 128, 1, 2, 8),
]


def products_of(model: str) -> dict[str, tuple[int, int]]:
    """`(out_features, in_features)` of a layer's products."""
    hidden, qkv, heads, inner = MODELS[model]
    return {"qkv": (qkv, hidden), "out": (hidden, heads), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}


class Case:
    """One product of a layer, and the launch that reads it."""

    def __init__(self, name: str, shape: tuple[int, int], num_tokens: int) -> None:
        width, features = shape
        self.takes_parts = name in ("out", "down")
        num_layers = max(4, (256 << 20) // (2 * width * features))
        self.weights = [torch.randn(shape, device="cuda", dtype=DTYPE) * features**-0.5 for _ in range(num_layers)]
        self.x = torch.randn(num_tokens, features, device="cuda", dtype=DTYPE)
        self._residual = torch.randn(num_tokens, width, device="cuda", dtype=DTYPE)
        self._norm = RmsNorm(torch.ones(width, device="cuda", dtype=DTYPE), 1e-5, 0.0)
        self._is_gated = name == "gate_up"

    def read(self, y: torch.Tensor) -> torch.Tensor:
        """The launch behind the product."""
        return gated_activation(y, "silu") if self._is_gated else add_rms_norm(y, self._residual, self._norm)[1]

    def us(self, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """Microseconds of one layer's."""

        def run() -> None:
            for weight in self.weights:
                self.read(multiply(self.x, weight))

        return replay_us(run, seconds=0.05) / len(self.weights)

    def gated_us(self, shape: ProductShape) -> float:
        """Microseconds of one layer's gate and up with their activation."""
        y = launch_product(self.x, self.weights[0], None, shape, "silu").double()
        gate, up = (self.x.double() @ self.weights[0].double().T).chunk(2, 1)
        expected = torch.nn.functional.silu(gate) * up
        theirs = gated_activation(linear(self.x, self.weights[0]), "silu").double()
        assert (y - expected).norm() <= 1.1 * (theirs - expected).norm(), shape

        def run() -> None:
            for weight in self.weights:
                launch_product(self.x, weight, None, shape, "silu")

        return replay_us(run, seconds=0.05) / len(self.weights)

    def check(self, shape: ProductShape) -> None:
        """Whether a launch shape gives the product, as exactly as the library does."""
        weight = self.weights[0]
        y = launch_product(self.x, weight, None, shape).double()
        expected = self.x.double() @ weight.double().T
        error = ((y if y.dim() == 2 else y.sum(0)) - expected).norm()
        assert error <= 1.1 * (linear(self.x, weight).double() - expected).norm(), (shape, float(error))


def fitting(shape: tuple[int, int], *, takes_parts: bool) -> list[ProductShape]:
    """Launch shapes to try."""
    width, features = shape
    return [
        c for c in CANDIDATES
        if width % c.block_n == 0 and features % (c.block_k * c.num_parts) == 0 and (takes_parts or c.num_parts == 1)
        and width // c.block_n * c.num_parts <= 600
    ]  # fmt: skip


def compile_all(cases: list[tuple[tuple[int, int], int, ProductShape]]) -> None:
    """Compile kernels, for a process of many."""
    for (width, features), num_tokens, shape in cases:
        x, weight = (torch.zeros(n, features, device="cuda", dtype=DTYPE) for n in (num_tokens, width))
        launch_product(x, weight, None, shape)
    torch.cuda.synchronize()


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = {(model, name): shape for model in options.models for name, shape in products_of(model).items()}
    if options.sweep:
        work = [
            (shape, num_tokens, candidate)
            for (_, name), shape in shapes.items() for num_tokens in options.tokens
            for candidate in fitting(shape, takes_parts=name in ("out", "down"))
        ]  # fmt: skip
        with multiprocessing.get_context("spawn").Pool(14) as pool:
            pool.map(compile_all, [work[i::42] for i in range(42)], chunksize=1)
    rate = 1e12 * bandwidths()["read"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, reading {rate / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    for (model, name), shape in shapes.items():
        for num_tokens in options.tokens:
            case = Case(name, shape, num_tokens)
            chosen = None
            if num_tokens <= MAX_TOKENS:
                chosen = choose_product(num_tokens, case.weights[0], takes_parts=case.takes_parts)
            row = {
                "model": model, "product": name, "shape": shape, "tokens": num_tokens,
                "floor": round(1e6 * case.weights[0].nbytes / rate, 1), "library": round(case.us(linear), 1),
            }  # fmt: skip
            few = options.sweep and num_tokens <= MAX_TOKENS
            candidates = fitting(shape, takes_parts=case.takes_parts) if few else []
            times = {}
            for candidate in {*candidates, *([chosen] if chosen else [])}:
                case.check(candidate)
                times[candidate] = round(case.us(lambda x, w, c=candidate: launch_product(x, w, None, c)), 1)
            row |= {"ours": times.get(chosen), "how": chosen and tuple(chosen)}
            if options.sweep:
                row["best"] = [(us, tuple(c)) for c, us in sorted(times.items(), key=lambda item: item[1])[:3]]
            if name == "gate_up":
                gated = choose_gated_product(num_tokens, case.weights[0])
                shapes_to_try = {*(GATED if options.sweep else []), *([gated] if gated else [])}
                at_once = {c: round(case.gated_us(c), 1) for c in shapes_to_try if shape[0] // 2 % c.block_n == 0}
                row |= {"at once": at_once.get(gated), "how at once": gated and tuple(gated)}
                if options.sweep:
                    row["best at once"] = [(us, tuple(c)) for c, us in sorted(at_once.items(), key=lambda i: i[1])]
            rows.append(row)
            print(json.dumps(row), flush=True)
            del case
    if options.json is not None:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
