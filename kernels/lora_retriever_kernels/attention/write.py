# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""What happens between the projections and attention: head norms, rotation, the write to the cache; in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lora_retriever_kernels.attention.heads import load_heads, load_values, rotated_width, store_heads
from lora_retriever_kernels.launch import num_parts, pdl_options, wait_for_earlier_launches

if TYPE_CHECKING:
    import torch

    from lora_retriever_kernels.attention.heads import QueryKeyNorm, Rotary
    from lora_retriever_kernels.attention.pages import Pages

_MAX_TILE = 1024  # elements of one program's half heads


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _write_kernel(
    query, key, value, delta, keys, values, tables, rows, positions, query_weight, key_weight, cos, sin, eps, offset,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride, table_stride,
    rotary_stride, num_heads, num_kv_heads,
    NUM_DELTAS: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr, BLOCK_VALUE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and group of heads: first the groups of key heads, then those of query heads."""
    wait_for_earlier_launches(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    row = tl.load(rows + token)
    position = tl.load(positions + token)
    num_key_groups = tl.cdiv(num_kv_heads, BLOCK_HEADS)
    width = num_heads * DIM + num_kv_heads * (DIM + VALUE_DIM)
    delta += token * width
    delta_stride = tl.num_programs(0).to(tl.int64) * width
    cos += token * rotary_stride
    sin += token * rotary_stride
    if group < num_key_groups:
        heads = group * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        num_stored = tl.where(row >= 0, num_kv_heads, 0)
        page = tl.load(tables + row * table_stride + position // PAGE, mask=row >= 0, other=0).to(tl.int64)
        slot = (page * PAGE + position % PAGE) * num_kv_heads
        first, second, tail = load_heads(
            key + token * key_stride, delta + num_heads * DIM, key_weight, cos, sin, eps, offset, heads, num_stored,
            key_head_stride, delta_stride, NUM_DELTAS, HAS_ROTARY, HAS_NORM, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL,
        )  # fmt: skip
        store_heads(
            keys + slot * DIM, first, second, tail, heads, num_stored, DIM, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL
        )
        found = load_values(
            value + token * value_stride, delta + (num_heads + num_kv_heads) * DIM, heads, num_stored,
            value_head_stride, delta_stride, NUM_DELTAS, VALUE_DIM, BLOCK_VALUE,
        )  # fmt: skip
        e = tl.arange(0, BLOCK_VALUE)
        ok = (heads < num_stored)[:, None] & (e < VALUE_DIM)[None, :]
        target = values + slot * VALUE_DIM + heads[:, None] * VALUE_DIM + e[None, :]
        tl.store(target, found.to(values.dtype.element_ty), mask=ok)
    elif HAS_ROTARY or HAS_NORM or NUM_DELTAS > 0:
        heads = (group - num_key_groups) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        query += token * query_stride
        first, second, tail = load_heads(
            query, delta, query_weight, cos, sin, eps, offset, heads, num_heads, query_head_stride, delta_stride,
            NUM_DELTAS, HAS_ROTARY, HAS_NORM, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL,
        )  # fmt: skip
        store_heads(
            query, first, second, tail, heads, num_heads, query_head_stride, DIM, ROTARY_DIM, BLOCK_HALF, BLOCK_TAIL
        )


def write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: Pages,
    rotary: Rotary | None = None,
    norm: QueryKeyNorm | None = None,
    delta: torch.Tensor | None = None,
) -> None:
    """Normalise and rotate queries in place, and keys on their way to the cache; store keys and values.

    In a step without prompts `attend_decode` does that itself, see `Projected`.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, unit stride in a head; mutated where there is a norm, a rotation or
            a `delta`.
        key: `[num_tokens, num_kv_heads, head_dim]`, unit stride in a head.
        value: `[num_tokens, num_kv_heads, value_dim]`, unit stride in a head.
        keys: Cache `[num_blocks, block_size, num_kv_heads, head_dim]`, contiguous; mutated.
        values: Cache `[num_blocks, block_size, num_kv_heads, value_dim]`, contiguous; mutated.
        pages: Where the tokens live.
        rotary: Rotation of the pairs `(i, i + rotary_dim / 2)`; dimensions past `rotary_dim` stay.
        norm: Norm of each head before the rotation.
        delta: What belongs to queries, keys and values and was computed apart, side by side `[num_tokens, ...]`,
            contiguous, or parts of that `[num_parts, num_tokens, ...]`; added before all else. None for nothing.

    Raises:
        ValueError: If `rotary` is not of as many tokens, or of an odd number of dimensions, or of more than a head has:
            nothing is written.
    """
    num_tokens, num_heads, dim = query.shape
    num_kv_heads, value_dim = value.shape[1:]
    rotary_dim = rotated_width(rotary, num_tokens, dim)
    block_half = triton.next_power_of_2(rotary_dim // 2)
    block_heads = max(1, min(8, _MAX_TILE // block_half, triton.next_power_of_2(num_kv_heads)))
    num_groups = triton.cdiv(num_kv_heads, block_heads)
    if rotary is not None or norm is not None or delta is not None:
        num_groups += triton.cdiv(num_heads, block_heads)
    _write_kernel[(num_tokens, num_groups)](
        query,
        key,
        value,
        delta if delta is not None else query,
        keys,
        values,
        pages.tables,
        pages.rows,
        pages.positions,
        norm.query_weight if norm is not None else query,
        norm.key_weight if norm is not None else query,
        rotary.cos if rotary is not None else query,
        rotary.sin if rotary is not None else query,
        norm.eps if norm is not None else 0.0,
        norm.offset if norm is not None else 0.0,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        pages.tables.stride(0),
        rotary.cos.stride(0) if rotary is not None else 0,
        num_heads,
        num_kv_heads,
        NUM_DELTAS=num_parts(delta),
        HAS_ROTARY=rotary is not None,
        HAS_NORM=norm is not None,
        PAGE=keys.shape[1],
        DIM=dim,
        VALUE_DIM=value_dim,
        ROTARY_DIM=rotary_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        BLOCK_TAIL=triton.next_power_of_2(max(dim - rotary_dim, 1)),
        BLOCK_VALUE=triton.next_power_of_2(value_dim),
        num_warps=2,
        **pdl_options(query.device),
    )
