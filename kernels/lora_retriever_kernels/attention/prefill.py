# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202, PLR0915 - Triton types the kernels' arguments itself
"""Causal attention of sequences with several queries over what the cache holds of them: prompts and their prefixes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lora_retriever_kernels.launch import pdl_options, wait_for_earlier_launches

if TYPE_CHECKING:
    import torch

    from lora_retriever_kernels.attention.pages import Pages

_BLOCK_M = 64


def queries_per_tile(num_heads: int, num_kv_heads: int) -> int:
    """Most queries of one sequence in a tile: the heads of a key head times these fill a matrix operand."""
    group: int = triton.next_power_of_2(num_heads // num_kv_heads)
    return max(1, _BLOCK_M // group)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "tiles"])
def _prefill_kernel(
    out, query, keys, values, tables, rows, positions, tiles, sinks, scale, softcap, window, query_stride,
    query_head_stride, out_stride, table_stride, num_kv_heads,
    GROUP: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CHUNKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile and key head; row m is query `m // BLOCK_GROUP`, head `m % BLOCK_GROUP` of the group."""
    wait_for_earlier_launches(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(tiles + tile * 2)
    count = tl.load(tiles + tile * 2 + 1)
    if count > 0:
        row = tl.load(rows + first)  # -1: padding, for which nothing is read
        begin = tl.load(positions + first).to(tl.int32)
        m = tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_DIM)
        e = tl.arange(0, BLOCK_VALUE)
        index = m // BLOCK_GROUP
        head = kv_head * GROUP + m % BLOCK_GROUP
        real = (index < count) & (m % BLOCK_GROUP < GROUP)
        token = first + index
        at = begin + index
        q = tl.load(
            query + token[:, None] * query_stride + head[:, None] * query_head_stride + d[None, :],
            mask=real[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if HAS_SINKS:  # a key without a value; padding has none either
            counted = (index < tl.where(row >= 0, count, 0)) & (m % BLOCK_GROUP < GROUP)
            sink = tl.load(sinks + head, mask=counted, other=-float("inf")).to(tl.float32)
            maximum = sink * 1.4426950408889634
            total = tl.where(sink > -float("inf"), 1.0, 0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_VALUE], tl.float32)
        tables += tl.maximum(row, 0) * table_stride
        lo = 0
        if HAS_WINDOW:
            lo = tl.maximum(begin - window + 1, 0) // BLOCK_N * BLOCK_N
        if IS_CHUNKED:
            lo = begin // window * window // BLOCK_N * BLOCK_N
        hi = tl.where(row >= 0, begin + count.to(tl.int32), 0)
        for start in range(lo, hi, BLOCK_N):
            position = start + n
            exists = position < hi
            page = tl.load(tables + position // PAGE, mask=exists, other=0).to(tl.int64)
            slot = (page * PAGE + position % PAGE) * num_kv_heads + kv_head
            k = tl.load(keys + slot[:, None] * DIM + d[None, :], mask=exists[:, None] & (d < DIM)[None, :], other=0.0)
            v = tl.load(
                values + slot[:, None] * VALUE_DIM + e[None, :],
                mask=exists[:, None] & (e < VALUE_DIM)[None, :],
                other=0.0,
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap
            seen = position[None, :] <= at[:, None]
            if HAS_WINDOW:
                seen = seen & (position[None, :] > at[:, None] - window)
            if IS_CHUNKED:
                seen = seen & (position[None, :] >= (at // window * window)[:, None])
            scores = tl.where(seen, scores * 1.4426950408889634, -float("inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            safe = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
            p = tl.exp2(scores - safe[:, None])
            rescale = tl.exp2(maximum - safe)
            total = total * rescale + tl.sum(p, 1)
            acc = acc * rescale[:, None]
            acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
            maximum = new_maximum
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out + token[:, None] * out_stride + head[:, None] * VALUE_DIM + e[None, :],
            acc.to(out.dtype.element_ty),
            mask=real[:, None] & (e < VALUE_DIM)[None, :],
        )


def attend_prefill(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    tiles: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend for runs of adjacent tokens of a sequence, each over the cached tokens up to itself.

    Args:
        out: `[num_tokens, num_heads, value_dim]`, heads contiguous; the tiles' rows are written, those of padding with
            zeros.
        query: `[num_tokens, num_heads, head_dim]`, unit stride in a head.
        keys: Cache `[num_blocks, block_size, num_kv_heads, head_dim]`, contiguous.
        values: Cache `[num_blocks, block_size, num_kv_heads, value_dim]`, contiguous.
        pages: Where the tokens live; their own keys must be written already.
        tiles: First token and number of tokens `[num_tiles, 2]`, int64, at most `queries_per_tile`; 0 is skipped.
        scaling: Factor of the scores.
        sliding_window: Latest tokens visible to a query, itself included; None sees all.
        chunk_size: Tokens of a chunk: only those of a query's own are visible to it. Not together with a window.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: A score for each head `[num_heads]`, contiguous, that takes part in the softmax and has no value; None:
            no such.

    Source: FlashAttention-2, arXiv:2307.08691.
    """
    num_tiles = tiles.shape[0]
    if num_tiles == 0:
        return
    _, num_heads, dim = query.shape
    num_kv_heads, value_dim = values.shape[2:]
    group = num_heads // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(dim))
    is_small = block_dim * query.element_size() <= 256
    _prefill_kernel[(num_tiles, num_kv_heads)](
        out,
        query,
        keys,
        values,
        pages.tables,
        pages.rows,
        pages.positions,
        tiles,
        sinks if sinks is not None else query,
        scaling,
        softcap or 0.0,
        sliding_window or chunk_size or 0,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        pages.tables.stride(0),
        num_kv_heads,
        GROUP=group,
        HAS_WINDOW=sliding_window is not None,
        IS_CHUNKED=chunk_size is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        PAGE=keys.shape[1],
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_GROUP=triton.next_power_of_2(group),
        BLOCK_M=max(_BLOCK_M, triton.next_power_of_2(group)),
        BLOCK_N=64 if is_small else 32,
        BLOCK_DIM=block_dim,
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)),
        num_warps=4,
        num_stages=2,
        **pdl_options(out.device),
    )
