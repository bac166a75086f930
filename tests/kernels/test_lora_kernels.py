"""`lora_kernels` against its reference in float64: PyTorch path, Triton in the interpreter, Triton on a GPU."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lora_retriever_kernels.lora import (
    LoraBatch,
    LoraPacking,
    LoraRows,
    LoraStack,
    add_lora,
    add_lora_reference,
    can_expand_gated,
    lora_delta,
    lora_expand,
    lora_expand_gated,
    lora_mix,
    lora_shrink,
    plan,
)

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_LORAS = 8
MAX_K = 8
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed", "none")

interpreted = pytest.param(
    "triton", id="interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
)
backends = pytest.mark.parametrize("backend", ["torch", interpreted])


@dataclass
class Model:
    """One stack, its row map and a batch."""

    rows: LoraRows
    stack: LoraStack
    batch: LoraBatch


def build(
    ranks: list[list[int]],
    out_features: tuple[int, ...] = (48, 16, 16),
    in_features: int = 40,
    dtype: torch.dtype = torch.float32,
    backend: str = "torch",
    device: str = "cpu",
    max_tokens: int = 2100,
) -> Model:
    """Load one adapter per entry of `ranks` (a rank per slice) into a pool of NaN rows, with gaps between them."""
    max_rank = max(map(max, ranks)) or 1
    rows = LoraRows(MAX_LORAS, max_rank, device)
    stack = LoraStack(rows, sum(map(max, ranks)) + 2 * len(ranks) + 3, in_features, out_features, dtype)
    stack.a.fill_(float("nan"))
    stack.b.fill_(float("nan"))
    row = 3
    for slot, slice_ranks in enumerate(ranks):
        rows.assign(slot, row, max(slice_ranks))
        weights = [
            (torch.randn(r, in_features) / in_features**0.5, torch.randn(width, r), 0.5) if r else None
            for r, width in zip(slice_ranks, out_features, strict=True)
        ]
        stack.load(slot, row, weights)
        row += max(slice_ranks) + 2
    return Model(rows, stack, LoraBatch(rows, max_tokens, MAX_K, backend=backend))


def assign(popularity: str, num_tokens: int, k: int, num_adapters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw slots and weights; some slots are -1 and some tokens name a slot twice."""
    shape = (num_tokens, k)
    if popularity == "distinct":
        mapping = (torch.arange(num_tokens)[:, None] * k + torch.arange(k)) % num_adapters
    elif popularity == "uniform":
        mapping = torch.randint(-1, num_adapters, shape)
    elif popularity == "zipf":
        odds = 1.0 / torch.arange(1, num_adapters + 1)
        mapping = torch.multinomial(odds, num_tokens * k, replacement=True).view(shape)
    elif popularity == "identical":
        mapping = torch.full(shape, num_adapters - 1)
    elif popularity == "skewed":
        mapping = torch.where(torch.rand(shape) < 0.9, 0, torch.randint(-1, num_adapters, shape))
    else:
        mapping = torch.full(shape, -1)
    return mapping.to(torch.int32), torch.rand(shape)


def error_of(model: Model, mapping: torch.Tensor, weights: torch.Tensor, *, in_two: bool = False) -> float:
    """Return the largest error relative to the largest output; `y` is strided and its other columns must stay."""
    stack, device = model.stack, model.rows.device
    num_tokens = mapping.shape[0]
    x = torch.randn(num_tokens, stack.in_features, device=device).to(stack.a.dtype)
    width = stack.b.shape[1]
    wide = torch.full((num_tokens, width + 16), float("nan"), device=device, dtype=stack.a.dtype)
    y = wide[:, :width]
    y.copy_(torch.randn(num_tokens, width))
    want = y.double()
    add_lora_reference(want, x, stack, mapping, weights)
    untouched = y.clone()
    model.batch.update(mapping.to(device), weights.to(device))
    if in_two:
        v = lora_shrink(x, stack, model.batch)
        mixed = lora_mix(v, stack, model.batch)
        lora_expand(y, v, stack, model.batch, mixed)
        for takes_parts in (False, True):
            delta = lora_delta(v, stack, model.batch, mixed, takes_parts=takes_parts)
            assert (delta[..., (mapping < 0).all(1).to(device), :] == 0).all()
            if delta.dim() == 3:
                assert takes_parts
                assert model.batch.splits_rows
                delta = delta.double().sum(0)
            apart = untouched.double() + delta.double() - want
            assert num_tokens == 0 or apart.abs().max() / want.abs().max() < TOLERANCE[stack.a.dtype]
    else:
        add_lora(y, x, stack, model.batch)
    assert wide[:, width:].isnan().all()
    idle = (mapping < 0).all(1).to(device)
    assert torch.equal(y[idle], untouched[idle])
    if num_tokens == 0:
        return 0.0
    return ((y.double() - want).abs().max() / want.abs().max()).item()


MIXED = [[4, 4, 4], [16, 16, 16], [1, 3, 2], [20, 0, 17], [8, 8, 8]]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@backends
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_tokens", [1, 3, 63, 133])
def test_popularity(backend, popularity, k, num_tokens):
    """Any assignment of adapters of mixed ranks gives the reference's result."""
    torch.manual_seed(num_tokens)
    model = build(MIXED, backend=backend)
    assert error_of(model, *assign(popularity, num_tokens, k, len(MIXED))) < TOLERANCE[torch.float32]


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [5, 70])
def test_dtype(backend, dtype, num_tokens):
    """Half precision accumulates in fp32 and rounds at the end."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 by its bit patterns; the GPU tests cover it")
    torch.manual_seed(0)
    model = build(MIXED, dtype=dtype, backend=backend)
    assert error_of(model, *assign("uniform", num_tokens, 3, len(MIXED))) < TOLERANCE[dtype]


@backends
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(576, (17,)), (33, (5, 130, 64)), (64, (16, 16, 16, 16)), (1, (1,))]
)
@pytest.mark.parametrize("num_tokens", [3, 65])
def test_widths(backend, in_features, out_features, num_tokens):
    """Slices of any number and width work, also widths that no block divides."""
    torch.manual_seed(0)
    ranks = [[r] * len(out_features) for r in (3, 33, 1)]
    model = build(ranks, out_features, in_features, backend=backend)
    assert error_of(model, *assign("uniform", num_tokens, 2, 3)) < TOLERANCE[torch.float32]


@backends
@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("num_tokens", [2, 66])
def test_highest_rank(backend, k, num_tokens):
    """Rank 256 beside rank 1, and up to eight adapters per token."""
    torch.manual_seed(0)
    model = build([[256, 200], [1, 1], [31, 0]], (20, 12), backend=backend)
    assert error_of(model, *assign("uniform", num_tokens, k, 3)) < 4 * TOLERANCE[torch.float32]


@backends
def test_long_ragged_prefill(backend):
    """2,049 tokens: one long request, a few short ones and single decode tokens in one batch."""
    torch.manual_seed(0)
    model = build(MIXED, (16, 16, 8), 16, backend=backend)
    lengths, mapping = [1800, 200, 40, 1, 1, 1, 6], []
    for i, length in enumerate(lengths):
        mapping += [[i % 5, (i + 1) % 5 if i % 2 else -1, (i + 3) % 5]] * length
    mapping = torch.tensor(mapping, dtype=torch.int32)
    weights = torch.rand(2049, 3)
    assert error_of(model, mapping, weights) < TOLERANCE[torch.float32]


@backends
@pytest.mark.parametrize("num_tokens", [9, 200])
def test_more_adapters_than_a_step_usually_has(backend, num_tokens, monkeypatch):
    """Shrink's programs go from one tile of pairs to another, also where an adapter lacks a slice."""
    monkeypatch.setattr(plan, "USUAL_ADAPTERS", 0)
    torch.manual_seed(0)
    model = build(MIXED, backend=backend)
    mapping, weights = assign("distinct", num_tokens, 3, len(MIXED))
    assert plan.pair_programs(num_tokens, 3, MAX_LORAS) < plan.max_pair_tiles(num_tokens, 3, MAX_LORAS)
    assert error_of(model, mapping, weights) < TOLERANCE[torch.float32]


@backends
@pytest.mark.parametrize("num_tokens", [7, 80])
def test_shrink_then_expand(backend, num_tokens):
    """The two operators in a row equal the one."""
    torch.manual_seed(0)
    model = build(MIXED, backend=backend)
    assert error_of(model, *assign("uniform", num_tokens, 3, 5), in_two=True) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", [interpreted])
@pytest.mark.parametrize("name", ["silu", "gelu"])
@pytest.mark.parametrize("out_features", [(48, 48), (34,)], ids=["gate and up", "one module"])
@pytest.mark.parametrize(("popularity", "k"), [("uniform", 3), ("none", 1), ("skewed", 2)])
def test_gate_and_up_are_expanded_with_their_activation(backend, popularity, k, out_features, name, monkeypatch):
    """As in float64; a token gets the same bits whatever its neighbours name."""
    monkeypatch.setattr(plan, "GATED_EXPAND_TOKENS", 65)
    torch.manual_seed(0)
    model = build([[r] * len(out_features) for r in (4, 33, 1, 20, 8)], out_features, backend=backend)
    stack, batch, num_tokens = model.stack, model.batch, 133
    mapping, weights = assign(popularity, num_tokens, k, 5)
    x, wide = torch.randn(num_tokens, 40), torch.randn(num_tokens, sum(out_features) + 16)
    y = wide[:, : sum(out_features)]
    want, results = y.double(), []
    add_lora_reference(want, x, stack, mapping, weights)
    for _ in range(2):
        batch.update(mapping, weights)
        assert can_expand_gated(stack, batch)
        results.append(lora_expand_gated(y, stack, batch, lora_mix(lora_shrink(x, stack, batch), stack, batch), name))
        mapping = torch.cat([mapping[:1], assign("uniform", num_tokens - 1, k, 5)[0]])
    gate, up = want.chunk(2, 1)
    activated = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[name](gate) * up
    torch.testing.assert_close(results[0].double(), activated, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1][0], results[0][0])


def test_what_is_not_expanded_with_an_activation():
    """Few tokens, PyTorch's path, adapters with gains, slices of two widths or of more than two modules."""
    for out_features, sizes in (((16, 16), (1600, 64)), ((16, 8), (1600,)), ((8, 8, 8), (1600,)), ((17,), (1600,))):
        model = build([[4] * len(out_features)], out_features)
        for num_tokens in sizes:
            for backend, has_gains in (("torch", False), ("triton", True), ("triton", False)):
                batch = model.batch
                batch.backend, batch.has_gains, batch.num_tokens = backend, has_gains, num_tokens
                batch.block_m = 64 if num_tokens > 64 else 1
                expected = out_features == (16, 16) and num_tokens == 1600 and backend == "triton" and not has_gains
                assert can_expand_gated(model.stack, batch) == expected
    batch.num_tokens = 3
    with pytest.raises(ValueError, match="lora_mix"):
        lora_expand_gated(torch.zeros(3, 17), model.stack, batch, [], "silu")


@backends
@pytest.mark.parametrize("num_active", [1, 3, 60])
@pytest.mark.parametrize("num_tokens", [16, 40])
def test_both_ways_to_expand(backend, num_tokens, num_active):
    """Told how many adapters a decode step has, expand takes tiles or single tokens; the result is the same."""
    torch.manual_seed(0)
    model = build(MIXED, backend=backend)
    mapping, weights = assign("uniform", num_tokens, 3, 5)
    model.batch.update(mapping, weights, num_active)
    assert (model.batch.block_m > 1) == (num_active < 60)
    x, y = torch.randn(num_tokens, 40), torch.zeros(num_tokens, 80)
    want = y.double()
    add_lora_reference(want, x, model.stack, mapping, weights)
    add_lora(y, x, model.stack, model.batch)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [interpreted])
def test_expand_of_many_rows_in_parts(backend):
    """Programs share the rows of a tile where these are many, and whoever reads the result adds up the parts."""
    torch.manual_seed(0)
    model = build([[64, 64, 64]] * 8, backend=backend)
    mapping, weights = assign("uniform", 64, 3, 8)
    x = torch.randn(64, 40)
    for num_active, num_parts in ((4, 1), (8, 4)):
        model.batch.update(mapping % num_active, weights, num_active)
        assert model.batch.splits_rows == (num_parts > 1)
        v = lora_shrink(x, model.stack, model.batch)
        mixed = lora_mix(v, model.stack, model.batch)
        whole = lora_delta(v, model.stack, model.batch, mixed)
        parts = lora_delta(v, model.stack, model.batch, mixed, takes_parts=True)
        assert parts.shape == ((4, 64, 80) if num_parts > 1 else (64, 80))
        torch.testing.assert_close(parts.sum(0) if num_parts > 1 else parts, whole, rtol=1e-5, atol=1e-5)


def test_launches_are_sized_by_the_ranks_that_are_loaded():
    """Room for rank 256 costs nothing until such an adapter comes, and nothing after it has gone."""
    rows = LoraRows(4, 256)
    batch = LoraBatch(rows, 64, 3)
    bounds = []
    for slot, rank in ((0, 8), (1, 17), (2, 200), (2, 0), (1, 0)):
        rows.assign(slot, 300 * slot, rank)
        bounds.append(batch.launch_shape(64, 3, 3)[0])
    assert bounds == [16, 32, 256, 32, 16]
    assert rows.num_used == 1


@backends
@pytest.mark.parametrize("num_tokens", [4, 70])
def test_launches_may_be_made_for_the_ranks_of_a_step_or_for_higher_ones(backend, num_tokens):
    """With room for rank 64 or for no more than a step names, the result is the same to fp32 rounding."""
    torch.manual_seed(0)
    model = build([[8, 4, 8], [3, 3, 0], [60, 12, 33]], backend=backend)
    mapping, weights = assign("uniform", num_tokens, 2, 2)
    x = torch.randn(num_tokens, 40)
    results = []
    for bound in (None, model.rows.bound(8), model.rows.bound(33)):
        y = torch.zeros(num_tokens, 80)
        model.batch.update(mapping, weights, 2, bound)
        add_lora(y, x, model.stack, model.batch)
        results.append(y)
    assert model.rows.highest_rank((0, 1)) == 8
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("num_tokens", [4, 70])
def test_result_is_independent_of_neighbours(backend, num_tokens):
    """A token's result does not move, to fp32 rounding, when its neighbours change adapters."""
    torch.manual_seed(0)
    model = build(MIXED, backend=backend)
    mapping, weights = assign("uniform", num_tokens, 3, 5)
    mapping[0] = torch.tensor([1, 4, -1])
    x = torch.randn(num_tokens, 40)
    results = []
    for _ in range(3):
        y = torch.zeros(num_tokens, 80)
        model.batch.update(mapping, weights)
        add_lora(y, x, model.stack, model.batch)
        results.append(y[0])
        mapping[1:] = assign("uniform", num_tokens - 1, 3, 5)[0]
    for other in results[1:]:
        if backend == "triton":
            assert torch.equal(other, results[0])
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("num_tokens", [5, 20, 60, 133, 600])
def test_numbers_that_overflow_stay_with_their_tokens(backend, num_tokens, k, monkeypatch):
    """An adapter of the largest numbers there are, and inputs that are not finite, reach no other token's output."""
    torch.manual_seed(0)
    model = build(MIXED, backend=backend)
    mapping, weights = assign("uniform", num_tokens, k, 5)
    ill = (mapping == 1).any(1)
    x = torch.randn(num_tokens, 40)
    x[ill.nonzero()[::2]] = torch.inf
    results = []
    for cost in (512, 1):  # the PyTorch path by one product, then adapter by adapter
        monkeypatch.setattr("lora_retriever_kernels.lora.dense._SEGMENT_COST", cost)
        for size in (1.0, 3e38):
            start = int(model.rows.starts[1])
            model.rows.assign(1, start, 16)
            model.stack.load(
                1, start, [(torch.randn(16, 40).sign() * size, torch.full((w, 16), size), 1.0) for w in (48, 16, 16)]
            )
            model.batch.update(mapping, weights)
            y = torch.zeros(num_tokens, 80)
            add_lora(y, x, model.stack, model.batch)
            results.append(y[~ill])
    assert results[0].isfinite().all()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("a", "b", "scaling"),
    [
        (math.nan, 1.0, 1.0), (1.0, -math.inf, 1.0), (1e39, 1.0, 1.0), (1.0, -1e39, 1e-30), (1.0, 1e20, -1e20),
        (1.0, 0.0, 1e39), (1.0, 1.0, math.nan), (-math.inf, 0.0, 0.0),
    ],
)  # fmt: skip
def test_weights_that_are_not_finite_as_rows_are_refused(dtype, a, b, scaling):
    """Before any row is written, by the stack and by its packing, and in words."""
    rows = LoraRows(2, 4)
    stack = LoraStack(rows, 8, 5, (6,), dtype)
    lora_a, lora_b = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
    lora_a[1, 2], lora_b[3, 0] = a, b
    packing = LoraPacking([stack])
    flat = torch.zeros(4 * packing.row_size, dtype=dtype)
    for call in (
        lambda: stack.load(0, 0, [(lora_a, lora_b, scaling)]),
        lambda: packing.pack(4, [(lora_a, lora_b, scaling)], flat),
    ):
        with pytest.raises(ValueError, match=f"slice 0: the largest of lora_A .* {dtype} goes up to"):
            call()
    assert not any(tensor.any() for tensor in (stack.a, stack.b))


def test_the_largest_finite_weights_are_loaded():
    """What rounds to the dtype's largest number is no overflow."""
    stack = LoraStack(LoraRows(2, 4), 8, 5, (6,), torch.float16)
    stack.load(0, 0, [(torch.full((4, 5), 65504.0), torch.full((6, 4), 655.04), -100.0)])
    assert stack.a[0, 0, 0] == 65504
    assert stack.b[0, 0] == -65504


@backends
def test_reassigned_slot(backend):
    """A slot given to another adapter serves the new one, also where rows were gathered before."""
    torch.manual_seed(0)
    model = build(MIXED, backend=backend)
    mapping, weights = torch.tensor([[1], [0]], dtype=torch.int32), torch.ones(2, 1)
    assert error_of(model, mapping, weights) < TOLERANCE[torch.float32]
    start = int(model.rows.starts[1])
    model.rows.assign(1, start, 2)
    model.stack.load(1, start, [(torch.randn(2, 40), torch.randn(w, 2), 1.0) for w in (48, 16, 16)])
    assert error_of(model, mapping, weights) < TOLERANCE[torch.float32]
    model.stack.unload(1)
    model.rows.release(1)
    mapping[0] = -1
    assert error_of(model, mapping, weights) < TOLERANCE[torch.float32]


@backends
def test_no_tokens(backend):
    """A step without tokens does nothing."""
    model = build(MIXED, backend=backend)
    assert error_of(model, *assign("none", 0, 1, 5)) == 0


def test_mixture_of_copies_equals_selection():
    """An adapter named k times with weights 1/k counts as once with weight 1."""
    torch.manual_seed(0)
    model = build(MIXED)
    x, once, thrice = torch.randn(6, 40), torch.zeros(6, 80), torch.zeros(6, 80)
    mapping = torch.randint(0, 5, (6, 1), dtype=torch.int32)
    model.batch.update(mapping, torch.ones(6, 1))
    add_lora(once, x, model.stack, model.batch)
    model.batch.update(mapping.repeat(1, 3), torch.full((6, 3), 1 / 3))
    add_lora(thrice, x, model.stack, model.batch)
    torch.testing.assert_close(thrice, once)


def test_long_prefill_visits_adapters_one_by_one(monkeypatch):
    """Segments, contiguous or scattered, give the same as the dense products."""
    monkeypatch.setattr("lora_retriever_kernels.lora.dense._SEGMENT_COST", 1)
    monkeypatch.setattr("lora_retriever_kernels.lora.dense._TOKEN_COST", 0)
    torch.manual_seed(0)
    model = build(MIXED)
    scattered = assign("uniform", 90, 2, 5)
    assert error_of(model, *scattered) < TOLERANCE[torch.float32]
    assert model.batch.dense.row_weights is None
    contiguous = torch.arange(5, dtype=torch.int32).repeat_interleave(18)[:, None]
    assert error_of(model, contiguous, torch.rand(90, 1)) < TOLERANCE[torch.float32]
    assert all(segment.tokens is None for segment in model.batch.dense.segments)


def test_gathered_rows_survive_a_request_that_ends():
    """The rows are gathered once while the step's adapters stay within those of the step before."""
    model = build(MIXED)
    y, x = torch.zeros(4, 80), torch.randn(4, 40)
    gathered = []
    for slots in ([0, 1, 2, 3], [0, 1, 2, -1], [4, 1, 2, 3]):
        model.batch.update(torch.tensor(slots, dtype=torch.int32)[:, None], torch.ones(4, 1))
        add_lora(y, x, model.stack, model.batch)
        gathered.append(model.stack.gather((model.batch.dense.slots, model.rows.version), model.batch.dense.slots).a)
    assert gathered[0] is gathered[1]
    assert gathered[1] is not gathered[2]


@backends
def test_torch_compile_and_opcheck(backend):
    """The operators pass PyTorch's own checks and compile into one graph."""
    torch.manual_seed(0)
    model = build(MIXED, backend=backend, max_tokens=64)
    stack, batch, rows = model.stack, model.batch, model.rows
    num_tokens = 32 if backend == "triton" else 9
    mapping, weights = assign("uniform", num_tokens, 2, 5)
    batch.update(mapping, weights)
    x, y = torch.randn(num_tokens, 40), torch.randn(num_tokens, 80)
    checks = ("test_schema", "test_faketensor")
    out = list(stack.out_features)
    common = (stack.ranks, rows.starts)
    torch.library.opcheck(
        torch.ops.lora_retriever_kernels.add_lora.default,
        (y.clone(), x, stack.a, stack.b, *common, rows.counts, out, rows.rank_bound, batch.block_m, batch.tensors()),
        test_utils=checks,
    )
    v = lora_shrink(x, stack, batch)
    torch.library.opcheck(
        torch.ops.lora_retriever_kernels.lora_expand.default,
        (y.clone(), v, stack.b, *common, out, batch.block_m, [], batch.tensors()),
        test_utils=checks,
    )
    for in_parts in (False, True):
        torch.library.opcheck(
            torch.ops.lora_retriever_kernels.lora_delta.default,
            (v, stack.b, *common, out, batch.block_m, [], batch.tensors(), in_parts),
            test_utils=checks,
        )
    if batch.block_m > 1:
        mixed_arguments = (v, stack.b, *common, out, batch.block_m, batch.tensors())
        torch.library.opcheck(torch.ops.lora_retriever_kernels.lora_mix.default, mixed_arguments, test_utils=checks)
        torch.library.opcheck(
            torch.ops.lora_retriever_kernels.lora_expand_gated.default,
            (y.clone(), lora_mix(v, stack, batch), stack.b, out, rows.rank_bound, "silu", batch.tensors()),
            test_utils=checks,
        )
    if backend == "triton":
        return  # Dynamo cannot trace into the interpreter's launches.

    def layer(y, x):
        add_lora(y, x, stack, batch)
        return y.relu()

    want = layer(y.clone(), x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(y.clone(), x), want)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=["from-fp32", "from-fp16"])
@pytest.mark.parametrize(
    "ranks", [[3, 3, 3, 3, 3], [1, 0, 5, 2, 7], [0, 0, 0, 0, 33], [0] * 5], ids=["even", "mixed", "one", "none"]
)
def test_a_packed_adapter_is_loaded_as_by_the_stacks(backend, dtype, adapter_dtype, ranks):
    """Bit for bit, with nothing else touched, whatever modules and ranks it has."""
    torch.manual_seed(0)
    shapes = [(40, (48, 16, 17)), (64, (40,)), (9000, (300,))]

    def stacks():
        rows = LoraRows(MAX_LORAS, 40)
        return rows, [LoraStack(rows, 50, num_in, outs, dtype) for num_in, outs in shapes]

    widths = [(num_in, width) for num_in, outs in shapes for width in outs]
    weights = [
        (torch.randn(r, num_in).to(adapter_dtype), torch.randn(width, r).to(adapter_dtype), 0.7) if r else None
        for r, (num_in, width) in zip(ranks, widths, strict=True)
    ]
    rank, entries = max(ranks), iter(weights)
    rows, loaded = stacks()
    rows.assign(2, 7, rank)
    for stack in loaded:
        stack.load(2, 7, [next(entries) for _ in stack.out_features])
    packed_rows, packed = stacks()
    packing = LoraPacking(packed, backend)
    flat = torch.full((rank * packing.row_size,), torch.nan, dtype=dtype)
    packing.pack(rank, weights, flat)
    packing.load(2, 7, rank, weights, flat)
    assert torch.equal(packed_rows.starts, rows.starts)
    assert torch.equal(packed_rows.counts, rows.counts)
    for one, other in zip(packed, loaded, strict=True):
        for name in ("a", "b", "ranks"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_packing_names_what_was_met():
    """Wrong sizes raise ValueError with expected and actual, before anything is written."""
    stack = build(MIXED).stack
    packing = LoraPacking([stack])
    flat = torch.zeros(2 * packing.row_size)
    weights = [(torch.zeros(2, 40), torch.zeros(width, 2), 1.0) for width in stack.out_features]
    wide = [(torch.zeros(3, 40), torch.zeros(48, 3), 1.0), None, None]
    bad = [
        (lambda: LoraPacking([]), "share one LoraRows"),
        (lambda: LoraPacking([stack, build(MIXED).stack]), "share one LoraRows"),
        (lambda: LoraPacking([stack], "cuda"), "backend"),
        (lambda: packing.pack(2, weights[:2], flat), "3 slices, got 2"),
        (lambda: packing.pack(1, weights, flat), rf"\[{packing.row_size}\], got"),
        (lambda: packing.pack(2, wide, flat), r"r up to 2, got \[3, 40\]"),
        (lambda: packing.load(0, 0, 2, weights, flat.half()), "got torch.float16"),
        (lambda: packing.load(0, stack.a.shape[1] - 1, 2, weights, flat), "exceed the pool"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_released_stack_has_no_rows():
    """Its memory is free though it is still held, and its sizes are known; what is loaded into it is refused."""
    stack = build(MIXED).stack
    stack.release()
    assert [tensor.untyped_storage().nbytes() for tensor in (stack.a, stack.b)] == [0, 0]
    assert (stack.num_slices, stack.in_features, stack.b.shape) == (3, 40, (0, 80))
    with pytest.raises(ValueError, match="the pool of 0 rows"):
        stack.load(0, 0, [(torch.zeros(2, 40), torch.zeros(48, 2), 1.0), None, None])


def test_errors_name_what_was_met():
    """Wrong shapes, dtypes, strides and sizes raise ValueError with expected and actual."""
    model = build(MIXED)
    stack, batch, rows = model.stack, model.batch, model.rows
    batch.update(*assign("uniform", 4, 2, 5))
    x, y = torch.zeros(4, 40), torch.zeros(4, 80)
    bad = [
        (lambda: add_lora(y, x[:3], stack, batch), r"x must be \[4, 40\], got \[3, 40\]"),
        (lambda: add_lora(y[:, :79], x, stack, batch), r"y must be \[4, 80\], got \[4, 79\]"),
        (lambda: add_lora(y, x.half(), stack, batch), "x must be torch.float32 .* got torch.float16"),
        (lambda: add_lora(torch.zeros(80, 4).t(), x, stack, batch), "contiguous rows"),
        (lambda: add_lora(y, x, stack, build(MIXED).batch), "share one LoraRows"),
        (lambda: lora_expand(y, torch.zeros(1, 4, 2, 3, 7), stack, batch), "v must be"),
        (lambda: batch.update(torch.zeros(4, 9, dtype=torch.int32), torch.zeros(4, 9)), "k <= 8"),
        (lambda: batch.update(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2)), "must be int32"),
        (lambda: batch.update(torch.zeros(4, 2, dtype=torch.int32), torch.zeros(4, 1)), r"\[4, 2\] like"),
        (lambda: batch.update(torch.full((4, 2), 8, dtype=torch.int32), torch.zeros(4, 2)), "below max_loras 8, got 8"),
        (lambda: rows.assign(8, 0, 1), r"slot must lie in 0\.\.7, got 8"),
        (lambda: rows.assign(0, 0, 300), "max_rank"),
        (lambda: rows.assign(0, -1, 1), "start must not be negative"),
        (lambda: LoraRows(0, 1), "max_loras"),
        (lambda: LoraRows(1, 257), r"1\.\.256, got 257"),
        (lambda: LoraStack(rows, 4, 4, (4,), torch.float64), "dtype"),
        (lambda: LoraStack(rows, 4, 0, (4,)), "at least 1"),
        (lambda: stack.load(0, 0, [None]), "expected weights for 3 slices, got 1"),
        (lambda: stack.load(0, 0, [(torch.zeros(2, 9), torch.zeros(48, 2), 1.0), None, None]), r"lora_A \[r, 40\]"),
        (lambda: stack.load(0, 0, [(torch.zeros(30, 40), torch.zeros(48, 30), 1.0), None, None]), "exceeds max_rank"),
        (lambda: LoraBatch(rows, 4, 9), "max_k"),
        (lambda: LoraBatch(rows, 4, 1, backend="cuda"), "backend"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_kernels_is_not_a_package():
    """`kernels` stays a source root: as a package it would shadow the PyPI project of that name."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "langchain" not in spec.origin


def test_imports_without_triton():
    """The PyTorch path needs no Triton."""
    code = "import sys; sys.modules['triton'] = None; import lora_retriever_kernels.lora as lora; lora.LoraRows(1, 1)"
    source = importlib.util.find_spec("lora_retriever_kernels").submodule_search_locations[0]
    env = {**os.environ, "PYTHONPATH": str(Path(source).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="already inside the interpreter, or native tests run")
def test_triton_in_the_interpreter():
    """Run this file's Triton cases in a process of their own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreter", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
