"""Triton attention over the paged cache against plain attention over each sequence's own keys."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it so",
)
PAGE = 4
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]  # the interpreter has no bf16


class Step(NamedTuple):
    """A packed step over a cache full of NaN, except where keys were written."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pages: Any
    spans: list[tuple[int, int]]  # queries and context of each sequence
    history: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of its whole context


def make_step(spans: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Step:
    """Random queries; sequences' pages lie shuffled, one padding token ends the step."""
    from lora_retriever_kernels.attention import Pages

    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    num_pages = [-(-context // PAGE) for _, context in spans]
    blocks = torch.randperm(sum(num_pages) + 2, generator=generator).tolist()
    tables = torch.full((len(spans) + 1, max(num_pages) + 1), -7, dtype=torch.int32)
    shape = (len(blocks), PAGE, kv_heads, dim)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    history, rows, positions, new_keys, new_values = [], [], [], [], []
    for row, (num_queries, context) in enumerate(spans):
        mine = [blocks.pop() for _ in range(num_pages[row])]
        tables[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        k, v = rand(context, kv_heads, dim).to(dtype), rand(context, kv_heads, dim).to(dtype)
        history.append((k.float(), v.float()))
        for position in range(context - num_queries):
            keys[mine[position // PAGE], position % PAGE] = k[position].float()
            values[mine[position // PAGE], position % PAGE] = v[position].float()
        rows += [row] * num_queries
        positions += range(context - num_queries, context)
        new_keys.append(k[context - num_queries :])
        new_values.append(v[context - num_queries :])
    padding = rand(1, kv_heads, dim).to(dtype)
    pages = Pages(
        tables.to(DEVICE), torch.tensor([*rows, -1], device=DEVICE), torch.tensor([*positions, 0], device=DEVICE)
    )
    return Step(
        rand(len(rows) + 1, heads, dim).to(DEVICE, dtype),
        torch.cat([*new_keys, padding]).to(DEVICE),
        torch.cat([*new_values, padding]).to(DEVICE),
        keys.to(DEVICE, dtype),
        values.to(DEVICE, dtype),
        pages,
        spans,
        history,
    )


def reference(
    step: Step, window: int | None, chunk: int | None, softcap: float | None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain attention, sequence by sequence, in float64."""
    outputs, start = [], 0
    for (num_queries, context), (k, v) in zip(step.spans, step.history, strict=True):
        q = step.query[start : start + num_queries].cpu().double()
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.double().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at, seen = torch.arange(context - num_queries, context)[:, None], torch.arange(context)[None]
        mask = seen <= at
        if window is not None:
            mask &= seen > at - window
        if chunk is not None:
            mask &= seen // chunk == at // chunk
        scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.cpu().double()[:, None, None].expand(-1, num_queries, 1)], -1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :context], values))
        start += num_queries
    return torch.cat(outputs)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """By relative norm; NaN never passes."""
    error = (got.cpu().double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2), error


CASES = [
    (4, 2, 16, None, None, None),
    (6, 2, 24, 5, None, None),
    (5, 5, 16, None, None, 2.0),
    (8, 1, 32, 7, None, 3.0),
    (4, 2, 16, None, 5, None),
    (4, 4, 16, None, 64, 2.0),
    (8, 1, 32, None, 100, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window", "chunk", "softcap"), CASES)
def test_decode(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    is_written: bool,
    num_splits: int,
    dtype: torch.dtype,
) -> None:
    """Contexts of one token up to several blocks, split or not, beside a padding token; own keys written or not."""
    from lora_retriever_kernels.attention import Projected, attend_decode, write_kv

    step = make_step([(1, 1), (1, 63), (1, 130), (1, 5), (1, 65)], heads, kv_heads, dim, dtype)
    projected = None if is_written else Projected(step.key, step.value, None, None, None)
    if is_written:
        write_kv(step.query, step.key, step.value, step.keys, step.values, step.pages)
    out = torch.full_like(step.query, torch.nan)
    tokens = torch.tensor([2, 0, 1, 3, 4, 5, -1], device=DEVICE)
    options = {"sliding_window": window, "chunk_size": chunk, "softcap": softcap, "num_splits": num_splits}
    attend_decode(out, step.query, step.keys, step.values, step.pages, tokens, projected, scaling=0.3, **options)
    close(out[:5], reference(step, window, chunk, softcap), dtype)
    assert (out[5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window", "chunk", "softcap"), CASES)
def test_prefill(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Whole prompts, one of them longer than a tile, and prompts behind a cached prefix, beside a padding token."""
    from lora_retriever_kernels.attention import attend_prefill, queries_per_tile, write_kv

    step = make_step([(3, 3), (133, 133), (2, 70), (30, 45)], heads, kv_heads, dim, dtype)
    write_kv(step.query, step.key, step.value, step.keys, step.values, step.pages)
    size = queries_per_tile(heads, kv_heads)
    tiles, start = [(0, 0)], 0
    for num_queries, _ in step.spans:
        tiles += [(start + i, min(size, num_queries - i)) for i in range(0, num_queries, size)]
        start += num_queries
    tiles.append((start, 1))
    out = torch.full_like(step.query, torch.nan)
    options = {"sliding_window": window, "chunk_size": chunk, "softcap": softcap}
    attend_prefill(
        out, step.query, step.keys, step.values, step.pages, torch.tensor(tiles, device=DEVICE), scaling=0.3, **options
    )
    close(out[:-1], reference(step, window, chunk, softcap), dtype)
    assert (out[-1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(4, 2, None), (6, 2, 5)])
def test_sinks(
    heads: int, kv_heads: int, window: int | None, is_written: bool, num_splits: int, dtype: torch.dtype
) -> None:
    """A score of each head takes part in the softmax: small, larger than all others, and none at all."""
    from lora_retriever_kernels.attention import Projected, attend_decode, attend_prefill, queries_per_tile, write_kv

    step = make_step([(1, 1), (30, 45), (1, 130)], heads, kv_heads, 16, dtype)
    projected = None if is_written else Projected(step.key, step.value, None, None, None)
    write_kv(step.query, step.key, step.value, step.keys, step.values, step.pages)
    decodes = torch.tensor([0, 31], device=DEVICE)
    if not is_written:  # the launch writes these itself
        positions = step.pages.positions[decodes]
        blocks = step.pages.tables[step.pages.rows[decodes], positions // PAGE].long()
        step.keys[blocks, positions % PAGE] = torch.nan
        step.values[blocks, positions % PAGE] = torch.nan
    sinks = torch.tensor([0.5, 30.0, -torch.inf, -2.0, 1.0, 0.0][:heads], device=DEVICE).to(dtype)
    out = torch.full_like(step.query, torch.nan)
    args = (out, step.query, step.keys, step.values, step.pages)
    size = queries_per_tile(heads, kv_heads)
    tiles = torch.tensor([(i, min(size, 31 - i)) for i in range(1, 31, size)], device=DEVICE)
    options = {"scaling": 0.3, "sliding_window": window, "sinks": sinks}
    attend_decode(*args, torch.tensor([0, 31, -1, 32], device=DEVICE), projected, num_splits=num_splits, **options)
    attend_prefill(*args, tiles, **options)
    close(out[:-1], reference(step, window, None, None, sinks), dtype)
    assert (out[-1] == 0).all()


@pytest.mark.parametrize("shape", [(3, 15), (3, 18), (3, 32), (2, 16), (1, 3, 16)], ids=str)
def test_a_rotation_that_does_not_fit_heads_and_tokens_is_refused(shape: tuple[int, ...]) -> None:
    """Nothing is written: not into the next head, nor behind the last one's memory."""
    from lora_retriever_kernels.attention import Projected, Rotary, attend_decode, write_kv

    step = make_step([(2, 2)], 4, 2, 16, torch.float32)
    query, keys = step.query.clone(), step.keys.clone()
    turns = torch.ones(shape, device=DEVICE)
    with pytest.raises(ValueError, match=r"cos and sin must be \[3, rotary_dim\].* at most head_dim 16, got"):
        write_kv(step.query, step.key, step.value, step.keys, step.values, step.pages, Rotary(turns, turns))
    args = (torch.zeros_like(query), step.query, step.keys, step.values, step.pages, torch.tensor([0], device=DEVICE))
    with pytest.raises(ValueError, match=r"cos and sin must be \[3, rotary_dim\].* at most head_dim 16, got"):
        attend_decode(*args, Projected(step.key, step.value, Rotary(turns, turns), None, None), scaling=0.3)
    torch.testing.assert_close((step.query, step.keys), (query, keys), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num_deltas", [0, 1, 3])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (24, 24), (20, 12)])
def test_write_normalises_and_rotates(dim: int, rotary_dim: int, has_norm: bool, num_deltas: int) -> None:
    """Queries change in place inside a wider buffer, keys on their way to the cache, values by what comes apart."""
    from lora_retriever_kernels.attention import QueryKeyNorm, Rotary, write_kv

    step = make_step([(2, 2), (1, 9)], 10, 3, dim, torch.float32)
    packed = torch.cat([step.query, step.key, step.value], 1)
    query, key, value = packed.split([10, 3, 3], 1)
    cos, sin = (torch.randn(4, rotary_dim // 2).repeat(1, 2).to(DEVICE) for _ in range(2))
    weights = torch.randn(2, dim, device=DEVICE)
    norm = QueryKeyNorm(weights[0], weights[1], 1e-5, 1.0) if has_norm else None

    def expect(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if has_norm:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (weight + 1)
        first, second = x[..., :rotary_dim].chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return torch.cat([x[..., :rotary_dim] * cos[:, None] + turned * sin[:, None], x[..., rotary_dim:]], -1)

    deltas = torch.randn(num_deltas, *packed.shape, device=DEVICE)
    parts = (packed + deltas.sum(0)).split([10, 3, 3], 1)
    expected_query, expected_key = expect(parts[0], weights[0]), expect(parts[1], weights[1])
    write_kv(
        query, key, value, step.keys, step.values, step.pages, Rotary(cos, sin), norm,
        None if not num_deltas else deltas[0].flatten(1) if num_deltas == 1 else deltas.flatten(2),
    )  # fmt: skip
    torch.testing.assert_close(query[:3], expected_query[:3])
    for token, (row, position) in enumerate([(0, 0), (0, 1), (1, 8)]):
        block = int(step.pages.tables[row, position // PAGE])
        torch.testing.assert_close(step.keys[block, position % PAGE], expected_key[token])
        torch.testing.assert_close(step.values[block, position % PAGE], parts[2][token])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_deltas", [0, 1, 3])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (64, 64), (24, 24), (20, 12), (17, 16)])
def test_attention_prepares_its_heads_as_a_launch_before_it_does(
    dim: int, rotary_dim: int, has_norm: bool, num_deltas: int, num_splits: int, dtype: torch.dtype
) -> None:
    """The same keys and values come into the cache, and the same outputs; queries stay as they are."""
    from lora_retriever_kernels.attention import Projected, QueryKeyNorm, Rotary, attend_decode, write_kv

    heads, kv_heads = 6, 3
    step = make_step([(1, 1), (1, 63), (1, 130)], heads, kv_heads, dim, dtype)
    packed = torch.cat([step.query, step.key, step.value], 1)
    query, key, value = packed.split([heads, kv_heads, kv_heads], 1)
    num_tokens = len(packed)
    rotary = Rotary(*(torch.randn(num_tokens, rotary_dim // 2).repeat(1, 2).to(DEVICE, dtype) for _ in range(2)))
    weights = torch.randn(2, dim).to(DEVICE, dtype)
    norm = QueryKeyNorm(weights[0], weights[1], 1e-5, 1.0) if has_norm else None
    deltas = torch.randn(num_deltas, num_tokens, packed[0].numel()).to(DEVICE, dtype)
    delta = None if not num_deltas else deltas[0] if num_deltas == 1 else deltas
    tokens = torch.tensor([3, 1, 0, 2], device=DEVICE)
    caches, outs = [], []
    for is_apart in (True, False):
        keys, values, own = step.keys.clone(), step.values.clone(), query.clone()
        projected = Projected(key, value, rotary, norm, delta)
        if is_apart:
            write_kv(own, key, value, keys, values, step.pages, rotary, norm, delta)
            projected = None
        out = torch.full_like(step.query, torch.nan)
        attend_decode(out, own, keys, values, step.pages, tokens, projected, scaling=0.3, num_splits=num_splits)
        assert is_apart or torch.equal(own, query)
        caches.append((keys, values))
        outs.append(out)
    torch.testing.assert_close(caches[1], caches[0], equal_nan=True)  # one of the two may contract a product and a sum
    close(outs[1], outs[0].double().cpu(), dtype)
