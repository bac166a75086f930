"""What the LoRA kernels do beside low-rank products: gains (DoRA) and one-hot inputs (embeddings), against float64."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from lora_retriever_kernels.lora import (
    LoraBatch,
    LoraPacking,
    LoraRows,
    LoraSlice,
    LoraStack,
    add_lora,
    add_lora_reference,
    lora_expand,
    lora_mix,
    lora_shrink,
)

OUT = (48, 16, 24)
IN = 40
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
backends = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("torch", "cpu", id="torch"),
        pytest.param(
            "triton",
            "cpu",
            id="interpreter",
            marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
        ),
        pytest.param(
            "triton",
            "cuda",
            id="gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


class Home(NamedTuple):
    """Stacks with six adapters: slots 1, 2 and 4 have gains, slot 2 not in every slice."""

    rows: LoraRows
    stack: LoraStack
    batch: LoraBatch
    bias: torch.Tensor


def entries(slot: int, rank: int, in_features: int) -> list[LoraSlice | None]:
    """An adapter's weights; slots 2 and 5 lack the second slice."""
    generator = torch.Generator().manual_seed(slot)
    found: list[LoraSlice | None] = []
    for index, width in enumerate(OUT):
        a, b = torch.randn(rank, in_features, generator=generator), torch.randn(width, rank, generator=generator)
        gain = 1 + 0.5 * torch.randn(width, generator=generator) if slot in {1, 2, 4} else None
        found.append(None if slot in {2, 5} and index == 1 else LoraSlice(a / in_features**0.5, b, 0.5, gain))
    return found


def build(backend: str, device: str, dtype: torch.dtype = torch.float32, in_features: int = IN) -> Home:
    """Load them into a pool of NaN rows."""
    ranks = (4, 17, 3, 33, 8, 1)
    rows = LoraRows(8, 40, device)
    stack = LoraStack(rows, sum(ranks) + 2 * len(ranks), in_features, OUT, dtype)
    stack.a.fill_(torch.nan)
    stack.b.fill_(torch.nan)
    start = 0
    for slot, rank in enumerate(ranks):
        weights = entries(slot, rank, in_features)
        gain, first = (start, start + 1) if slot in {1, 2, 4} else (-1, start)
        rows.assign(slot, first, rank, gain)
        stack.load(slot, first, weights, gain)
        start = first + rank + 1
    batch = LoraBatch(rows, 700, 3, backend=backend)  # type: ignore[arg-type]
    bias = torch.randn(sum(OUT), generator=torch.Generator().manual_seed(9)).to(device, dtype)
    return Home(rows, stack, batch, bias)


def draw(num_tokens: int, k: int, num_loras: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots, of which some are -1, and weights."""
    generator = torch.Generator().manual_seed(num_tokens + k)
    mapping = torch.randint(-1, num_loras, (num_tokens, k), generator=generator).to(torch.int32)
    return mapping, torch.rand(num_tokens, k, generator=generator)


def assert_adds(
    home: Home, x: torch.Tensor, num_tokens: int, k: int, bias: torch.Tensor | None, *, parts: bool
) -> None:
    """Compare with the reference, over outputs that are there already."""
    device, dtype = home.stack.b.device, home.stack.b.dtype
    mapping, weights = draw(num_tokens, k)
    y = torch.randn(num_tokens, sum(OUT), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    want = y.double()
    add_lora_reference(want, x, home.stack, mapping, weights, None if bias is None else bias.double())
    home.batch.update(mapping.to(device), weights.to(device))
    got = y.clone()
    if parts:
        v = lora_shrink(x, home.stack, home.batch)
        lora_expand(got, v, home.stack, home.batch, lora_mix(v, home.stack, home.batch), bias)
    else:
        add_lora(got, x, home.stack, home.batch, bias)
    assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[dtype]
    untouched = (mapping < 0).all(1).to(device)
    assert torch.equal(got[untouched], y[untouched])


@backends
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (20, 2), (133, 3)])
def test_gains_multiply_the_base_product(backend: str, device: str, has_bias: bool, num_tokens: int, k: int) -> None:
    """In mixtures of adapters with gains and without, for tokens alone and in tiles, in one step and in three."""
    home = build(backend, device)
    x = torch.randn(num_tokens, IN, generator=torch.Generator().manual_seed(2)).to(device)
    for parts in (False, True):
        assert_adds(home, x, num_tokens, k, home.bias if has_bias else None, parts=parts)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_gains_in_half_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    """What is rounded is the gain less one, which is small."""
    if dtype == torch.bfloat16 and (backend, device) == ("triton", "cpu"):
        pytest.skip("Triton's interpreter multiplies bf16 by its bit patterns; the GPU tests cover it")
    home = build(backend, device, dtype)
    for num_tokens in (5, 66):
        x = torch.randn(num_tokens, IN, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        assert_adds(home, x, num_tokens, 3, home.bias, parts=False)


@backends
@pytest.mark.parametrize(("num_tokens", "k"), [(20, 2), (70, 3)])
def test_one_hot_inputs_look_a_up(backend: str, device: str, num_tokens: int, k: int) -> None:
    """Token ids in place of inputs: the same as the product with one-hot rows, gains included."""
    home = build(backend, device, in_features=300)
    ids = torch.randint(300, (num_tokens,), generator=torch.Generator().manual_seed(3)).to(device)
    for parts in (False, True):
        assert_adds(home, ids, num_tokens, k, None, parts=parts)


@backends
def test_a_step_without_gains_is_what_it_was(backend: str, device: str) -> None:
    """Bit for bit, whether the caller says that there are none, and whatever adapters with gains are loaded."""
    home = build(backend, device)
    for num_tokens in (6, 66):
        mapping, weights = (t.to(device) for t in draw(num_tokens, 2))
        mapping[(mapping == 1) | (mapping == 2) | (mapping == 4)] = 0
        x = torch.randn(num_tokens, IN, generator=torch.Generator().manual_seed(2)).to(device)
        results = []
        for has_gains in (True, False, None):
            y = torch.ones(num_tokens, sum(OUT), device=device)
            home.batch.update(mapping, weights, has_gains=has_gains)
            add_lora(y, x, home.stack, home.batch)
            results.append(y)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@backends
def test_slots_without_rows_add_nothing(backend: str, device: str) -> None:
    """Alone in a step or beside others; they may be emptied while a step still names them."""
    home = build(backend, device)
    home.stack.unload(3)
    home.rows.assign(3, 0, 0)
    x, y = torch.randn(4, IN).to(device), torch.randn(4, sum(OUT)).to(device)
    for others in (3, 0):
        mapping = torch.tensor([[3], [3], [others], [-1]], dtype=torch.int32, device=device)
        home.batch.update(mapping, torch.ones(4, 1, device=device))
        out = y.clone()
        add_lora(out, x, home.stack, home.batch)
        changed = (out != y).any(dim=1).tolist()
        assert changed == [False, False, others == 0, False]


@backends
def test_outputs_that_are_infinite_stay_with_their_tokens(backend: str, device: str) -> None:
    """A token beside one with gains is not multiplied by a zero."""
    home = build(backend, device)
    for num_tokens in (4, 70):
        mapping = torch.tensor([[1], [0]], dtype=torch.int32).repeat(num_tokens // 2, 1).to(device)
        x = torch.zeros(num_tokens, IN, device=device)
        y = torch.ones(num_tokens, sum(OUT), device=device)
        y[1::2] = torch.inf
        home.batch.update(mapping, torch.ones(num_tokens, 1, device=device))
        add_lora(y, x, home.stack, home.batch)
        assert bool((y[1::2] == torch.inf).all())
        assert bool(y[0::2].isfinite().all())


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("slot", [1, 2, 3, 5])
def test_a_packed_adapter_with_gains_is_loaded_as_by_the_stacks(
    backend: str, device: str, dtype: torch.dtype, slot: int
) -> None:
    """Bit for bit; and one that lacks the last stack takes no more room than it needs, and leaves no old rank there."""
    rank = 6
    weights = [*entries(slot, rank, IN), None]

    def stacks() -> list[LoraStack]:
        rows = LoraRows(4, 40, device)
        return [LoraStack(rows, 30, IN, OUT, dtype), LoraStack(rows, 30, 512, (8,), dtype)]

    wide = (torch.randn(2, 512), torch.randn(8, 2), 1.0)
    loaded, packed = stacks(), stacks()
    for home in (loaded, packed):
        home[0].load(2, 20, [None] * len(OUT))
        home[1].load(2, 20, [wide])
        home[1].b[7] = torch.nan  # another adapter's row once, and the row of the gains now
    has_gains = slot in {1, 2}
    gain, first = (7, 8) if has_gains else (-1, 7)
    loaded[0].rows.assign(2, first, rank, gain)
    loaded[0].load(2, first, weights[:-1], gain)
    loaded[1].load(2, first, weights[-1:], gain)
    packing = LoraPacking(packed, backend)  # type: ignore[arg-type]
    num_rows = rank + has_gains
    size = packing.size(num_rows, weights)
    assert size == num_rows * sum(IN + width for width in OUT) < num_rows * packing.row_size
    flat = torch.full((size,), torch.nan, dtype=dtype)
    packing.pack(num_rows, weights, flat)
    packing.load(2, 7, num_rows, weights, flat.to(device))
    used = slice(7, 7 + num_rows)
    assert torch.equal(packed[0].a, loaded[0].a)
    assert torch.equal(packed[0].b[used], loaded[0].b[used])
    assert not has_gains or (packed[1].b[gain] == loaded[1].b[gain]).all()
    for one, other in zip(packed, loaded, strict=True):
        assert torch.equal(one.ranks, other.ranks)
        assert one.is_used_by([2]) == other.is_used_by([2])
    for name in ("starts", "counts", "gains"):
        assert torch.equal(getattr(packed[0].rows, name), getattr(loaded[0].rows, name)), name


def test_gains_that_do_not_fit_are_named() -> None:
    """Wrong sizes, no row for them, and numbers that the rows do not hold."""
    home = build("torch", "cpu", torch.float16)
    good = entries(1, 2, IN)
    assert good[0] is not None
    home.batch.update(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1), has_gains=True)
    bad = [
        (lambda: home.stack.load(0, 1, good), r"expected a gain \[48\] and a row for it, got \[48\] and row -1"),
        (lambda: home.stack.load(0, 1, [good[0]._replace(gain=torch.ones(3)), None, None], 0), r"got \[3\] and row 0"),
        (lambda: home.stack.load(0, 1, [good[0]._replace(gain=torch.full((48,), 1e9)), None, None], 0), "largest gain"),
        (lambda: home.stack.load(0, 1, [good[0]._replace(gain=torch.full((48,), torch.nan)), None, None], 0), "gain"),
        (lambda: add_lora(torch.zeros(2, 88), torch.zeros(2), home.stack, home.batch), "int64"),
        (
            lambda: add_lora(
                torch.zeros(0, 88).half(), torch.zeros(0, IN).half(), home.stack, home.batch, torch.zeros(3)
            ),
            r"bias must be torch.float16 \[88\]",
        ),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
