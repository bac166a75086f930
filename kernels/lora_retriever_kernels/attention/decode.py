# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202, PLR0915 - Triton types the kernels' arguments itself
"""Attention of sequences with one query each: query heads of a key head share its reads, long contexts are split."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.launch import pdl_options, wait_for_earlier_launches

if TYPE_CHECKING:
    from lora_retriever_kernels.attention.pages import Pages

_TARGET_PROGRAMS = 512
_MAX_SPLITS = 32
_MANY_PROGRAMS = 1024  # without splits: several on every SM


def choose_num_splits(num_sequences: int, num_kv_heads: int) -> int:
    """Programs that share one sequence's keys, so that few sequences fill a GPU as well."""
    return max(1, min(_MAX_SPLITS, _TARGET_PROGRAMS // (num_sequences * num_kv_heads)))


class _Shape(NamedTuple):
    """Keys of a step, warps, and steps whose loads are under way at once."""

    block_n: int
    num_warps: int
    num_stages: int


def _choose_shape(block_group: int, row_bytes: int, num_programs: int, num_splits: int) -> _Shape:
    """Choose the launch shape.

    Args:
        block_group: Query heads of a program, padded.
        row_bytes: Of a key.
        num_programs: Programs.
        num_splits: Of these, those that share a sequence's keys.
    """
    if row_bytes > 256 or block_group > 16:
        return _Shape(64 if row_bytes <= 256 else 32, 4, 2)
    if num_programs >= (_TARGET_PROGRAMS if num_splits > 1 else _MANY_PROGRAMS):
        return _Shape(32, 1, 3)  # enough of them to have loads under way; with splits where these come out even
    return _Shape(64, 2, 3)


# What differs from step to step must not be compiled in: a step waits for every new variant.
@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["rows", "positions", "tokens"])
def _decode_kernel(
    out, partial, stats, query, keys, values, tables, rows, positions, tokens, sinks, scale, softcap, window,
    query_stride, query_head_stride, out_stride, table_stride, num_kv_heads, num_splits,
    GROUP: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CHUNKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, key head and split. A split without keys says so with a maximum of -inf."""
    wait_for_earlier_launches(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(tokens + sequence)
    row = tl.load(rows + token, mask=token >= 0, other=-1)
    length = tl.where(row >= 0, tl.load(positions + token, mask=token >= 0, other=-1) + 1, 0).to(tl.int32)
    first_seen = 0
    if HAS_WINDOW:
        first_seen = tl.maximum(length - window, 0)
    if IS_CHUNKED:
        first_seen = tl.maximum(length - 1, 0) // window * window
    begin = first_seen // BLOCK_N * BLOCK_N
    chunk = tl.cdiv(tl.cdiv(length - begin, num_splits), BLOCK_N) * BLOCK_N
    lo = begin + split * chunk
    hi = tl.minimum(lo + chunk, length)

    g = tl.arange(0, BLOCK_GROUP)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_DIM)
    e = tl.arange(0, BLOCK_VALUE)
    head = kv_head * GROUP + g
    real = g < tl.where(row >= 0, GROUP, 0)
    q = tl.load(
        query + token * query_stride + head[:, None] * query_head_stride + d[None, :],
        mask=real[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    maximum = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    if HAS_SINKS:  # a key without a value, which only one of the splits may count
        counted = g < tl.where(split == 0, tl.where(row >= 0, GROUP, 0), 0)
        sink = tl.load(sinks + head, mask=counted, other=-float("inf")).to(tl.float32)
        maximum = sink * 1.4426950408889634
        total = tl.where(sink > -float("inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    tables += tl.maximum(row, 0) * table_stride
    for start in range(lo, hi, BLOCK_N):
        position = start + n
        seen = position < hi
        page = tl.load(tables + position // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * num_kv_heads + kv_head
        k = tl.load(keys + slot[:, None] * DIM + d[None, :], mask=seen[:, None] & (d < DIM)[None, :], other=0.0)
        v = tl.load(
            values + slot[:, None] * VALUE_DIM + e[None, :], mask=seen[:, None] & (e < VALUE_DIM)[None, :], other=0.0
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap
        if HAS_WINDOW or IS_CHUNKED:
            seen = seen & (position >= first_seen)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, -float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        safe = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        p = tl.exp2(scores - safe[:, None])
        rescale = tl.exp2(maximum - safe)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum
    normal = acc / tl.where(total > 0, total, 1.0)[:, None]
    written = g < tl.where(token >= 0, GROUP, 0)
    ok = written[:, None] & (e < VALUE_DIM)[None, :]
    num_heads = num_kv_heads * GROUP
    if IS_SPLIT:
        part = (sequence * num_splits + split) * num_heads + head
        tl.store(partial + part[:, None] * VALUE_DIM + e[None, :], normal, mask=ok)
        tl.store(stats + part, maximum + tl.log2(total), mask=written)
    else:
        target = out + token * out_stride + head[:, None] * VALUE_DIM + e[None, :]
        tl.store(target, normal.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["tokens"])
def _combine_kernel(
    out, partial, stats, tokens, out_stride, num_heads, num_splits,
    VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_VALUE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence and head: the splits' outputs, weighted by their share of the softmax."""
    wait_for_earlier_launches(PDL)
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    token = tl.load(tokens + sequence)
    s = tl.arange(0, BLOCK_SPLITS)
    e = tl.arange(0, BLOCK_VALUE)
    part = (sequence * num_splits + s) * num_heads + head
    share = tl.load(stats + part, mask=s < num_splits, other=-float("inf"))
    maximum = tl.max(share, 0)
    share = tl.exp2(share - tl.where(maximum == -float("inf"), 0.0, maximum))
    ok = (s < num_splits)[:, None] & (e < VALUE_DIM)[None, :]
    x = tl.load(partial + part[:, None] * VALUE_DIM + e[None, :], mask=ok, other=0.0)
    total = tl.sum(share, 0)
    y = tl.sum(x * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    target = out + token * out_stride + head * VALUE_DIM + e
    tl.store(target, y.to(out.dtype.element_ty), mask=e < tl.where(token >= 0, VALUE_DIM, 0))


def attend_decode(
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    tokens: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_splits: int = 1,
) -> None:
    """Attend for some tokens, each the last of its sequence and its only one in the step.

    Semantics:
        out[t, h] = softmax(cap(scaling * query[t, h] @ K.T)) @ V, over the sequence's cached tokens up to
        `positions[t]`, of these the last `sliding_window` or those of the chunk.

    Args:
        out: `[num_tokens, num_heads, value_dim]`, heads contiguous; the rows `tokens` are written, those of padding
            with zeros.
        query: `[num_tokens, num_heads, head_dim]`, unit stride in a head.
        keys: Cache `[num_blocks, block_size, num_kv_heads, head_dim]`, contiguous.
        values: Cache `[num_blocks, block_size, num_kv_heads, value_dim]`, contiguous.
        pages: Where the tokens live; their own keys must be written already.
        tokens: Which tokens `[num_sequences]`, int64; -1 is skipped.
        scaling: Factor of the scores.
        sliding_window: Latest tokens visible to a query, itself included; None sees all.
        chunk_size: Tokens of a chunk: only those of a query's own are visible to it. Not together with a window.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: A score for each head `[num_heads]`, contiguous, that takes part in the softmax and has no value; None:
            no such.
        num_splits: Programs that share a sequence's keys, see `choose_num_splits`.

    Source: FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    num_sequences = tokens.shape[0]
    if num_sequences == 0:
        return
    _, num_heads, dim = query.shape
    num_kv_heads, value_dim = values.shape[2:]
    group = num_heads // num_kv_heads
    partial, stats = out, out
    if num_splits > 1:
        partial = torch.empty(num_sequences, num_splits, num_heads, value_dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(num_sequences, num_splits, num_heads, dtype=torch.float32, device=out.device)
    block_dim, block_group = max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(group))
    num_programs = num_sequences * num_kv_heads * num_splits
    shape = _choose_shape(block_group, block_dim * query.element_size(), num_programs, num_splits)
    _decode_kernel[(num_sequences, num_kv_heads, num_splits)](
        out,
        partial,
        stats,
        query,
        keys,
        values,
        pages.tables,
        pages.rows,
        pages.positions,
        tokens,
        sinks if sinks is not None else query,
        scaling,
        softcap or 0.0,
        sliding_window or chunk_size or 0,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        pages.tables.stride(0),
        num_kv_heads,
        num_splits,
        GROUP=group,
        HAS_WINDOW=sliding_window is not None,
        IS_CHUNKED=chunk_size is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        IS_SPLIT=num_splits > 1,
        PAGE=keys.shape[1],
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_GROUP=block_group,
        BLOCK_N=shape.block_n,
        BLOCK_DIM=block_dim,
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **pdl_options(out.device),
    )
    if num_splits > 1:
        _combine_kernel[(num_sequences, num_heads)](
            out,
            partial,
            stats,
            tokens,
            out.stride(0),
            num_heads,
            num_splits,
            VALUE_DIM=value_dim,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits),
            BLOCK_VALUE=triton.next_power_of_2(value_dim),
            num_warps=2,
            **pdl_options(out.device),
        )
