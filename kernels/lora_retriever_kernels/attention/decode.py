# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202, PLR0915 - Triton types the kernels' arguments itself
"""Attention of sequences with one query each: query heads of a key head share its reads, long contexts are split.

In a step that has no others the launch prepares queries and keys itself, and writes the tokens' own keys and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.attention.heads import load_heads, load_values, rotated_width, store_heads
from lora_retriever_kernels.launch import num_parts, pdl_options, wait_for_earlier_launches

if TYPE_CHECKING:
    from lora_retriever_kernels.attention.heads import QueryKeyNorm, Rotary
    from lora_retriever_kernels.attention.pages import Pages

_TARGET_PROGRAMS = 512
_MAX_SPLITS = 32
_MANY_PROGRAMS = 1024  # without splits: several on every SM


def choose_num_splits(num_sequences: int, num_kv_heads: int) -> int:
    """Programs that share one sequence's keys, so that few sequences fill a GPU as well."""
    return max(1, min(_MAX_SPLITS, _TARGET_PROGRAMS // (num_sequences * num_kv_heads)))


class Projected(NamedTuple):
    """Keys and values of a step's tokens as the projections gave them, and what is to be done to them and to queries.

    Attributes:
        key: `[num_tokens, num_kv_heads, head_dim]`, unit stride in a head.
        value: `[num_tokens, num_kv_heads, value_dim]`, unit stride in a head.
        rotary: As in `write_kv`, as what follows.
        norm: Norm of each head before the rotation.
        delta: What was computed apart, or parts of it.
    """

    key: torch.Tensor
    value: torch.Tensor
    rotary: Rotary | None
    norm: QueryKeyNorm | None
    delta: torch.Tensor | None


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


@triton.jit
def _scaled(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores to the base of two."""
    scores = scores * scale
    if HAS_SOFTCAP:
        scores = (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0) * softcap
    return scores * 1.4426950408889634


@triton.jit
def _write_own(
    first, second, tail, key, value, delta, keys, values, weight, cos, sin, eps, offset, kv_head, num_kv_heads,
    key_stride, value_stride, delta_stride,
    NUM_DELTAS: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Write a token's own key and value of one head to the cache; the queries' products with the key, and the value."""
    head = kv_head + tl.arange(0, 1)
    key_1, key_2, key_3 = load_heads(
        key, delta, weight, cos, sin, eps, offset, head, num_kv_heads, key_stride, delta_stride, NUM_DELTAS, HAS_ROTARY,
        HAS_NORM, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL,
    )  # fmt: skip
    store_heads(keys, key_1, key_2, key_3, head, num_kv_heads, DIM, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL)
    v = load_values(
        value, delta + num_kv_heads * DIM, head, num_kv_heads, value_stride, delta_stride, NUM_DELTAS, VALUE_DIM,
        BLOCK_VALUE,
    ).to(values.dtype.element_ty)  # fmt: skip
    e = tl.arange(0, BLOCK_VALUE)
    tl.store(values + kv_head * VALUE_DIM + e[None, :], v, mask=(e < VALUE_DIM)[None, :])
    dtype = keys.dtype.element_ty
    scores = tl.sum(first.to(tl.float32) * key_1.to(dtype).to(tl.float32), 1)
    scores += tl.sum(second.to(tl.float32) * key_2.to(dtype).to(tl.float32), 1)
    if ROTARY_DIM < DIM:
        scores += tl.sum(tail.to(tl.float32) * key_3.to(dtype).to(tl.float32), 1)
    return scores, v


# What differs from step to step must not be compiled in: a step waits for every new variant.
@triton.jit(
    do_not_specialize=["num_splits", "num_tokens"], do_not_specialize_on_alignment=["rows", "positions", "tokens"]
)
def _decode_kernel(
    out, partial, stats, query, key, value, delta, keys, values, tables, rows, positions, tokens, query_weight,
    key_weight, cos, sin, sinks, scale, softcap, window, eps, offset, query_stride, query_head_stride, key_stride,
    key_head_stride, value_stride, value_head_stride, out_stride, table_stride, rotary_stride, num_tokens,
    num_kv_heads, num_splits,
    IS_NEW: tl.constexpr, NUM_DELTAS: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr,
    GROUP: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_CHUNKED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, IS_SPLIT: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr, BLOCK_VALUE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per sequence, key head and split. A split without keys says so with a maximum of -inf.

    Heads come in three parts, see `load_heads`: keys are read so, too.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(tokens + sequence)  # where a step's tokens are is written at its beginning, before any wait
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

    HALF: tl.constexpr = ROTARY_DIM // 2
    g = tl.arange(0, BLOCK_GROUP)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_HALF)
    t = ROTARY_DIM + tl.arange(0, BLOCK_TAIL)
    e = tl.arange(0, BLOCK_VALUE)
    head = kv_head * GROUP + g
    num_heads = num_kv_heads * GROUP
    width = num_heads * DIM + num_kv_heads * (DIM + VALUE_DIM)
    delta += token * width
    delta_stride = num_tokens.to(tl.int64) * width
    cos += token * rotary_stride
    sin += token * rotary_stride
    num_real = tl.where(row >= 0, GROUP, 0)
    real = tl.where(g < num_real, head, num_heads)
    tables += tl.maximum(row, 0) * table_stride
    wait_for_earlier_launches(PDL)
    first, second, tail = load_heads(
        query + token * query_stride, delta, query_weight, cos, sin, eps, offset, real, num_heads, query_head_stride,
        delta_stride, NUM_DELTAS, HAS_ROTARY, HAS_NORM, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL,
    )  # fmt: skip
    first = first.to(query.dtype.element_ty)
    second = second.to(query.dtype.element_ty)
    tail = tail.to(query.dtype.element_ty)
    maximum = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    if HAS_SINKS:  # a key without a value, which only one of the splits may count
        sink = tl.load(sinks + head, mask=g < tl.where(split == 0, num_real, 0), other=-float("inf")).to(tl.float32)
        maximum = sink * 1.4426950408889634
        total = tl.where(sink > -float("inf"), 1.0, 0.0)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_VALUE], tl.float32)
    if IS_NEW:
        last = length - 1
        if (hi == length) & (lo < hi):  # the split that the token's own key falls to
            page = tl.load(tables + last // PAGE).to(tl.int64)
            slot = (page * PAGE + last % PAGE) * num_kv_heads
            scores, v = _write_own(
                first, second, tail, key + token * key_stride, value + token * value_stride, delta + num_heads * DIM,
                keys + slot * DIM, values + slot * VALUE_DIM, key_weight, cos, sin, eps, offset, kv_head,
                num_kv_heads, key_head_stride, value_head_stride, delta_stride, NUM_DELTAS, HAS_ROTARY, HAS_NORM, DIM,
                ROTARY_DIM, VALUE_DIM, BLOCK_HALF, BLOCK_TAIL, BLOCK_VALUE,
            )  # fmt: skip
            scores = _scaled(scores, scale, softcap, HAS_SOFTCAP)
            new_maximum = tl.maximum(maximum, scores)
            p = tl.exp2(scores - new_maximum)
            total = total * tl.exp2(maximum - new_maximum) + p
            acc += p[:, None] * v.to(tl.float32)
            maximum = new_maximum
            hi = last
    for start in range(lo, hi, BLOCK_N):
        position = start + n
        seen = position < hi
        page = tl.load(tables + position // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * num_kv_heads + kv_head
        k_ptr = keys + slot[:, None] * DIM
        half_ok = seen[:, None] & (d < HALF)[None, :]
        k = tl.load(k_ptr + d[None, :], mask=half_ok, other=0.0)
        scores = tl.dot(first, tl.trans(k), input_precision="ieee")
        k = tl.load(k_ptr + HALF + d[None, :], mask=half_ok, other=0.0)
        scores = tl.dot(second, tl.trans(k), scores, input_precision="ieee")
        if ROTARY_DIM < DIM:
            k = tl.load(k_ptr + t[None, :], mask=seen[:, None] & (t < DIM)[None, :], other=0.0)
            scores = tl.dot(tail, tl.trans(k), scores, input_precision="ieee")
        v = tl.load(
            values + slot[:, None] * VALUE_DIM + e[None, :], mask=seen[:, None] & (e < VALUE_DIM)[None, :], other=0.0
        )
        if HAS_WINDOW or IS_CHUNKED:
            seen = seen & (position >= first_seen)
        scores = tl.where(seen[None, :], _scaled(scores, scale, softcap, HAS_SOFTCAP), -float("inf"))
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
    projected: Projected | None = None,
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
        keys: Cache `[num_blocks, block_size, num_kv_heads, head_dim]`, contiguous; mutated if there is `projected`.
        values: Cache `[num_blocks, block_size, num_kv_heads, value_dim]`, contiguous; likewise.
        pages: Where the tokens live; read before the launch waits, so not to be written by the one right before it.
        tokens: Which tokens `[num_sequences]`, int64; -1 is skipped. Likewise.
        projected: What is to be done first of all that `write_kv` does, for these tokens; `query` is left as it is.
            None: it is done already.
        scaling: Factor of the scores.
        sliding_window: Latest tokens visible to a query, itself included; None sees all.
        chunk_size: Tokens of a chunk: only those of a query's own are visible to it. Not together with a window.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: A score for each head `[num_heads]`, contiguous, that takes part in the softmax and has no value; None:
            no such.
        num_splits: Programs that share a sequence's keys, see `choose_num_splits`.

    Raises:
        ValueError: If the rotation of `projected` does not fit, as in `write_kv`: nothing is written.

    Source: FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    num_sequences = tokens.shape[0]
    if num_sequences == 0:
        return
    num_tokens, num_heads, dim = query.shape
    num_kv_heads, value_dim = values.shape[2:]
    group = num_heads // num_kv_heads
    key, value, rotary, norm, delta = projected or Projected(query, query, None, None, None)
    rotary_dim = rotated_width(rotary, num_tokens, dim)
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
        key,
        value,
        delta if delta is not None else query,
        keys,
        values,
        pages.tables,
        pages.rows,
        pages.positions,
        tokens,
        norm.query_weight if norm is not None else query,
        norm.key_weight if norm is not None else query,
        rotary.cos if rotary is not None else query,
        rotary.sin if rotary is not None else query,
        sinks if sinks is not None else query,
        scaling,
        softcap or 0.0,
        sliding_window or chunk_size or 0,
        norm.eps if norm is not None else 0.0,
        norm.offset if norm is not None else 0.0,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        out.stride(0),
        pages.tables.stride(0),
        rotary.cos.stride(0) if rotary is not None else 0,
        num_tokens,
        num_kv_heads,
        num_splits,
        IS_NEW=projected is not None,
        NUM_DELTAS=num_parts(delta),
        HAS_ROTARY=rotary is not None,
        HAS_NORM=norm is not None,
        GROUP=group,
        HAS_WINDOW=sliding_window is not None,
        IS_CHUNKED=chunk_size is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        IS_SPLIT=num_splits > 1,
        PAGE=keys.shape[1],
        DIM=dim,
        ROTARY_DIM=rotary_dim,
        VALUE_DIM=value_dim,
        BLOCK_GROUP=block_group,
        BLOCK_N=shape.block_n,
        BLOCK_HALF=max(16, triton.next_power_of_2(rotary_dim // 2)),
        BLOCK_TAIL=max(16, triton.next_power_of_2(dim - rotary_dim)),
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
