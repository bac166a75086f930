"""`lora_kernels` natively on a GPU: every dtype, replayed graphs, repeatability."""

from __future__ import annotations

import pytest
import torch

from lora_retriever_kernels.lora import LoraBatch, LoraPacking, LoraRows, LoraStack, add_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.2e-3, torch.bfloat16: 9e-3}
OUT = (384, 128, 136)


def build(ranks, dtype, max_tokens=2100, in_features=520):
    """Load adapters of these ranks into a pool of NaN rows."""
    rows = LoraRows(40, max(ranks), "cuda")
    stack = LoraStack(rows, sum(ranks) + len(ranks), in_features, OUT, dtype)
    stack.a.fill_(float("nan"))
    stack.b.fill_(float("nan"))
    row = 0
    for slot, rank in enumerate(ranks):
        rows.assign(slot, row, rank)
        entry = [(torch.randn(rank, in_features) / in_features**0.5, torch.randn(w, rank), 0.5) for w in OUT]
        if slot % 4 == 3:
            entry[1] = None
        stack.load(slot, row, entry)
        row += rank + 1
    return rows, stack, LoraBatch(rows, max_tokens, 8)


def assign(popularity, num_tokens, k, n):
    """Draw slots and weights."""
    shape = (num_tokens, k)
    mapping = {
        "distinct": lambda: (torch.arange(num_tokens)[:, None] * k + torch.arange(k)) % n,
        "uniform": lambda: torch.randint(-1, n, shape),
        "zipf": lambda: torch.multinomial(1.0 / torch.arange(1, n + 1), num_tokens * k, replacement=True).view(shape),
        "identical": lambda: torch.full(shape, n - 1),
        "skewed": lambda: torch.where(torch.rand(shape) < 0.9, 0, torch.randint(-1, n, shape)),
        "none": lambda: torch.full(shape, -1),
    }[popularity]()
    return mapping.to("cuda", torch.int32), torch.rand(shape, device="cuda")


def added(x, stack, mapping, weights):
    """Return what the adapters add, in float64."""
    total = torch.zeros(x.shape[0], sum(OUT), dtype=torch.float64, device="cuda")
    for slot in mapping.unique().tolist():
        if slot < 0:
            continue
        weight = (weights * (mapping == slot)).double().sum(1, keepdim=True)
        lo, offset = int(stack.rows.starts[slot]), 0
        for i, width in enumerate(OUT):
            hi = lo + int(stack.ranks[slot, i])
            v = x.double() @ stack.a[i, lo:hi].double().t() * weight
            total[:, offset : offset + width] += v @ stack.b[lo:hi, offset : offset + width].double()
            offset += width
    return total


def assert_matches(y, x, stack, mapping, weights):
    """Compare what was added to `y`, which held zeros, with float64."""
    want = added(x, stack, mapping, weights)
    scale = want.norm() if want.any() else 1.0
    assert (y.double() - want).norm() / scale < TOLERANCE[y.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical", "skewed", "none"])
@pytest.mark.parametrize("ranks", [[16] * 33, [8, 16, 33, 64, 1, 7], [256, 3]], ids=["16", "mixed", "256"])
def test_against_float64(popularity, ranks, dtype):
    """Every popularity, k and ragged size on poisoned memory gives the reference's result."""
    torch.manual_seed(0)
    _, stack, batch = build(ranks, dtype)
    for num_tokens, k in ((1, 1), (1, 3), (3, 8), (63, 3), (133, 1), (133, 3), (300, 2), (2049, 3)):
        mapping, weights = assign(popularity, num_tokens, k, len(ranks))
        torch.empty(1 << 24, device="cuda").fill_(float("nan"))  # what the allocator hands out next
        x = torch.randn(num_tokens, stack.in_features, device="cuda", dtype=dtype)
        wide = torch.zeros(num_tokens, sum(OUT) + 8, device="cuda", dtype=dtype)
        batch.update(mapping, weights)
        add_lora(wide[:, : sum(OUT)], x, stack, batch)
        assert_matches(wide[:, : sum(OUT)], x, stack, mapping, weights)
        assert not wide[:, sum(OUT) :].any()


@pytest.mark.parametrize("num_tokens", [8, 100])
def test_replayed_graph_follows_the_slots(num_tokens):
    """One captured graph serves any number of adapters: none, one, many, and one again."""
    torch.manual_seed(0)
    ranks = [8, 16, 64, 16] * 4
    _, stack, batch = build(ranks, torch.bfloat16, max_tokens=num_tokens)
    x = torch.randn(num_tokens, stack.in_features, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(num_tokens, sum(OUT), device="cuda", dtype=torch.bfloat16)
    mapping = torch.full((num_tokens, 3), -1, dtype=torch.int32, device="cuda")
    weights = torch.zeros(num_tokens, 3, device="cuda")

    def step():
        y.zero_()
        batch.update(mapping, weights)
        add_lora(y, x, stack, batch)
        add_lora(y, x, stack, batch)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for popularity in ("none", "identical", "uniform", "distinct", "identical", "none"):
        new_mapping, new_weights = assign(popularity, num_tokens, 3, len(ranks))
        mapping.copy_(new_mapping)
        weights.copy_(new_weights)
        graph.replay()
        assert_matches(y, x, stack, mapping, 2 * weights)


@pytest.mark.parametrize("num_tokens", [32, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bitwise_repeatable_and_independent(num_tokens, dtype):
    """The same step gives the same bits, and a token's bits do not depend on its neighbours' adapters."""
    torch.manual_seed(0)
    _, stack, batch = build([8, 16, 64, 16, 8, 8], dtype)
    x = torch.randn(num_tokens, stack.in_features, device="cuda", dtype=dtype)
    mapping, weights = assign("uniform", num_tokens, 3, 6)
    results = []
    for i in range(4):
        if i >= 2:
            mapping[1:] = assign("zipf", num_tokens - 1, 3, 6)[0]
        y = torch.zeros(num_tokens, sum(OUT), device="cuda", dtype=dtype)
        batch.update(mapping, weights)
        add_lora(y, x, stack, batch)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][0], results[3][0])


def test_compiles_into_one_graph():
    """torch.compile keeps the operator as one node and replays it correctly."""
    torch.manual_seed(0)
    _, stack, batch = build([16] * 4, torch.bfloat16)
    mapping, weights = assign("uniform", 20, 2, 4)
    batch.update(mapping, weights)
    x = torch.randn(20, stack.in_features, device="cuda", dtype=torch.bfloat16)

    def layer(x):
        y = torch.zeros(20, sum(OUT), device="cuda", dtype=torch.bfloat16)
        add_lora(y, x, stack, batch)
        return y

    assert_matches(torch.compile(layer, fullgraph=True)(x), x, stack, mapping, weights)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["from-fp32", "from-bf16"])
@pytest.mark.parametrize("ranks", [[16] * 6, [8, 0, 64, 1, 7, 256], [0, 0, 0, 0, 0, 3]], ids=["16", "mixed", "one"])
def test_a_packed_adapter_is_loaded_as_by_the_stacks(ranks, adapter_dtype, dtype):
    """Bit for bit, with nothing else touched."""
    torch.manual_seed(0)
    shapes = [(4096, (4096, 1024, 1000)), (520, (28672, 136)), (28672, (520,))]

    def stacks():
        rows = LoraRows(8, 256, "cuda")
        return [LoraStack(rows, 300, num_in, outs, dtype) for num_in, outs in shapes]

    widths = [(num_in, width) for num_in, outs in shapes for width in outs]
    weights = [
        (torch.randn(r, num_in).to(adapter_dtype), torch.randn(width, r).to(adapter_dtype), 0.7) if r else None
        for r, (num_in, width) in zip(ranks, widths, strict=True)
    ]
    rank, entries, loaded, packed = max(ranks), iter(weights), stacks(), stacks()
    loaded[0].rows.assign(2, 7, rank)
    for stack in loaded:
        stack.load(2, 7, [next(entries) for _ in stack.out_features])
    packing = LoraPacking(packed)
    flat = torch.full((rank * packing.row_size,), torch.nan, dtype=dtype)
    packing.pack(rank, weights, flat)
    packing.load(2, 7, rank, weights, flat.cuda())
    for one, other in zip(packed, loaded, strict=True):
        for name in ("a", "b", "ranks"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(packed[0].rows.counts, loaded[0].rows.counts)
