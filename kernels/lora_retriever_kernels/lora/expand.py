# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""Expand: the shrunk inputs times B, added to the outputs. One program owns a piece of `y` for all its adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.decoder.activation import ACTIVATIONS, activate
from lora_retriever_kernels.launch import pdl_options, wait_for_earlier_launches
from lora_retriever_kernels.lora import plan

if TYPE_CHECKING:
    from collections.abc import Sequence


@triton.jit
def _locate(block, OUT: tl.constexpr, NUM_SLICES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the slice, first column and end column of a column block; blocks never straddle slices."""
    index = 0
    column = block * BLOCK_N
    end = OUT[0]
    first = 0
    offset = 0
    for i in tl.static_range(NUM_SLICES):
        inside = block >= first
        index = tl.where(inside, i, index)
        column = tl.where(inside, offset + (block - first) * BLOCK_N, column)
        end = tl.where(inside, offset + OUT[i], end)
        first += (OUT[i] + BLOCK_N - 1) // BLOCK_N
        offset += OUT[i]
    return index, column, end


@triton.jit
def _expand_token_kernel(
    y,
    v,
    b,
    ranks,
    starts,
    mapping,
    weights,
    gains,
    bias,
    stride_y,
    stride_b,
    stride_split,
    max_rank,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    OUT: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    GAINS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token, one column block: the k adapters' rows form one list, and y is touched once."""
    token = tl.program_id(0)
    index, column, end = _locate(tl.program_id(1), OUT, NUM_SLICES, BLOCK_N)
    i = tl.arange(0, K_PADDED * BLOCK_R)
    j = i // BLOCK_R
    slot = tl.load(mapping + token * K + j, mask=j < K, other=-1)
    rank = tl.load(ranks + slot * NUM_SLICES + index, mask=slot >= 0, other=0)
    start = tl.load(starts + slot, mask=slot >= 0, other=0)
    weight = tl.load(weights + token * K + j, mask=j < K, other=0.0)
    highest = tl.max(rank)
    n = tl.multiple_of(column, ALIGN) + tl.arange(0, BLOCK_N)
    y_ptr = y + token.to(tl.int64) * stride_y + n
    acc = tl.zeros([BLOCK_N], tl.float32)
    if highest == 0:
        wait_for_earlier_launches(PDL)
        if not ADD:
            tl.store(y_ptr, acc.to(y.dtype.element_ty), mask=n < end)
        return
    for r0 in range(0, highest, BLOCK_R):
        r = r0 + i % BLOCK_R
        has_row = r < rank
        b_ptr = b + (start + r).to(tl.int64)[:, None] * stride_b + n[None, :]
        b_part = tl.load(b_ptr, mask=has_row[:, None] & (n < end)[None, :], other=0.0)
        wait_for_earlier_launches(PDL)  # B does not depend on the shrink: its loads are in flight before the wait
        v_ptr = v + ((token.to(tl.int64) * K + j) * NUM_SLICES + index) * max_rank + r
        v_part = tl.zeros([K_PADDED * BLOCK_R], tl.float32)
        for s in tl.static_range(NUM_SPLITS):
            v_part += tl.load(v_ptr + s * stride_split, mask=has_row, other=0.0)
        acc += tl.sum((v_part * weight)[:, None] * b_part.to(tl.float32), 0)
    if ADD:
        old = tl.load(y_ptr, mask=n < end, other=0.0).to(tl.float32)
        if GAINS:
            base = old
            if BIAS:
                base -= tl.load(bias + n, mask=n < end, other=0.0).to(tl.float32)
            for c in tl.static_range(K):
                named = tl.load(mapping + token * K + c)
                row = tl.load(gains + named, mask=named >= 0, other=-1) + tl.zeros([BLOCK_N], tl.int32)
                gain = tl.load(b + row.to(tl.int64) * stride_b + n, mask=(n < end) & (row >= 0), other=0.0)
                added = tl.load(weights + token * K + c) * gain.to(tl.float32) * base
                acc += tl.where(row >= 0, added, 0.0)  # not by a gain of 0: another adapter's outputs may be infinite
        acc += old
    tl.store(y_ptr, acc.to(y.dtype.element_ty), mask=n < end)


@triton.jit(do_not_specialize=["num_tokens", "max_items", "parts"])
def _mix_kernel(
    mixed,
    rows,
    v,
    ranks,
    starts,
    mapping,
    weights,
    order,
    items,
    num_items,
    num_tokens,
    max_items,
    max_rows,
    stride_split,
    max_rank,
    parts,
    K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MIX_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """mixed[tile, slice, m, row] = the weighted sum of `v` for the row's adapter, 0 where the token does not use it.

    `rows[tile, slice, row]` is the row of B that goes with it, -1 past the slice's rank.
    """
    tile = tl.program_id(0) // (BLOCK_M // MIX_M)
    index = tl.program_id(1)
    m = tl.program_id(0) % (BLOCK_M // MIX_M) * MIX_M + tl.arange(0, MIX_M)
    count = tl.load(num_items + tile)
    wait_for_earlier_launches(PDL)
    t = tile * BLOCK_M + m
    token = tl.load(order + t, mask=t < num_tokens, other=-1)
    i = tl.arange(0, BLOCK_ROWS)
    out = (tile * NUM_SLICES + index).to(tl.int64)
    step: tl.constexpr = BLOCK_ROWS // ITEM_ROWS
    for first in range(tl.program_id(2) * step, count, parts * step):
        position = first + i // ITEM_ROWS
        item = tl.load(items + tile * max_items + position, mask=position < count, other=-1)
        slot = item >> 4
        r = (item & 15) * ITEM_ROWS + i % ITEM_ROWS
        has_row = r < tl.load(ranks + slot * NUM_SLICES + index, mask=item >= 0, other=0)
        row = tl.load(starts + slot, mask=has_row, other=0) + r
        tl.store(rows + out * max_rows + first * ITEM_ROWS + i, tl.where(has_row, row, -1))
        chosen = tl.full([MIX_M, BLOCK_ROWS], -1, tl.int32)
        weight = tl.zeros([MIX_M, BLOCK_ROWS], tl.float32)
        for j in tl.static_range(K):
            named = tl.load(mapping + token * K + j, mask=token >= 0, other=-1)
            w = tl.load(weights + token * K + j, mask=token >= 0, other=0.0)
            hit = named[:, None] == slot[None, :]
            chosen = tl.where(hit, j, chosen)
            weight += tl.where(hit, w[:, None], 0.0)
        pair = token.to(tl.int64)[:, None] * K + chosen
        v_ptr = v + (pair * NUM_SLICES + index) * max_rank + r[None, :]
        v_mask = (chosen >= 0) & has_row[None, :]
        total = tl.load(v_ptr, mask=v_mask, other=0.0)
        for s in tl.static_range(1, NUM_SPLITS):
            total += tl.load(v_ptr + s * stride_split, mask=v_mask, other=0.0)
        target = mixed + (out * BLOCK_M + m[:, None]) * max_rows + first * ITEM_ROWS + i[None, :]
        tl.store(target, (total * weight).to(mixed.dtype.element_ty))


@triton.jit
def _add_rows(acc, mixed, rows, b, stride_b, n, ok):
    """Add the product of a block of mixed columns with the rows of B that go with them, of which -1 is none."""
    row = tl.load(rows)
    b_part = tl.load(
        b + row.to(tl.int64)[:, None] * stride_b + n[None, :], mask=(row >= 0)[:, None] & ok[None, :], other=0.0
    )
    return tl.dot(tl.load(mixed), b_part, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_tile_kernel(
    y,
    mixed,
    rows,
    b,
    order,
    num_items,
    mapping,
    weights,
    gains,
    bias,
    num_tokens,
    max_rows,
    stride_y,
    stride_b,
    OUT: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    GAINS: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of tokens, one column block: a product over the rows of all adapters in the tile, y touched once.

    With several parts each takes some of the rows, and has a `y` of its own, one after the other.
    """
    tile = tl.program_id(1)
    part = tl.program_id(2)
    count = tl.load(num_items + tile)
    wait_for_earlier_launches(PDL)
    if ADD:  # noqa: SIM102 - only this one is decided at compile time
        if count == 0:
            return
    index, column, end = _locate(tl.program_id(0), OUT, NUM_SLICES, BLOCK_N)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(order + t, mask=t < num_tokens, other=-1)
    if not ADD:  # tokens without adapters get zeros
        token = tl.where(token < -1, -2 - token, token)
    n = tl.multiple_of(column, ALIGN) + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_ROWS)
    y_ptr = y + (part * num_tokens + token).to(tl.int64)[:, None] * stride_y + n[None, :]
    y_mask = (token >= 0)[:, None] & (n < end)[None, :]
    if ADD:
        old = tl.load(y_ptr, mask=y_mask, other=0.0)
    out = (tile * NUM_SLICES + index).to(tl.int64)
    row_ptr = rows + out * max_rows + i
    mixed_ptr = mixed + (out * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]) * max_rows + i[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(part * BLOCK_ROWS, count * ITEM_ROWS, NUM_PARTS * BLOCK_ROWS):
        acc = _add_rows(acc, mixed_ptr + first, row_ptr + first, b, stride_b, n, n < end)
    if GAINS:
        base = old.to(tl.float32)
        if BIAS:
            base -= tl.load(bias + n, mask=n < end, other=0.0).to(tl.float32)[None, :]
        for c in tl.static_range(K):
            named = tl.load(mapping + token * K + c, mask=token >= 0, other=-1)
            gain_row = tl.load(gains + named, mask=named >= 0, other=-1)
            has_gain = (gain_row >= 0)[:, None]
            gain_ptr = b + gain_row.to(tl.int64)[:, None] * stride_b + n[None, :]
            gain = tl.load(gain_ptr, mask=has_gain & (n < end)[None, :], other=0.0)
            weight = tl.load(weights + token * K + c, mask=token >= 0, other=0.0)
            acc += tl.where(has_gain, weight[:, None] * gain.to(tl.float32) * base, 0.0)
    if ADD:
        acc += old.to(tl.float32)
    tl.store(y_ptr, acc.to(y.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_gated_kernel(
    out,
    y,
    mixed,
    rows,
    b,
    order,
    num_items,
    num_tokens,
    max_rows,
    stride_y,
    stride_b,
    width,
    NUM_SLICES: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KIND: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of tokens, one column block of gate and up: what adapters add to both, then the activation."""
    tile = tl.program_id(1)
    count = tl.load(num_items + tile)
    wait_for_earlier_launches(PDL)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(order + t, mask=t < num_tokens, other=-1)
    token = tl.where(token < -1, -2 - token, token)  # tokens without adapters
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_ROWS)
    mask = (token >= 0)[:, None] & (n < width)[None, :]
    y_ptr = y + token.to(tl.int64)[:, None] * stride_y + n[None, :]
    gate_y = tl.load(y_ptr, mask=mask, other=0.0)
    up_y = tl.load(y_ptr + width, mask=mask, other=0.0)
    gate_out = (tile * NUM_SLICES).to(tl.int64)
    gate_rows = rows + gate_out * max_rows + i
    gate_mixed = mixed + (gate_out * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]) * max_rows + i[None, :]
    to_up = (NUM_SLICES - 1) * max_rows
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, count * ITEM_ROWS, BLOCK_ROWS):
        gate = _add_rows(gate, gate_mixed + first, gate_rows + first, b, stride_b, n, n < width)
        up_mixed, up_rows = gate_mixed + to_up * BLOCK_M + first, gate_rows + to_up + first
        up = _add_rows(up, up_mixed, up_rows, b, stride_b, width + n, n < width)
    gate += gate_y.to(tl.float32)
    up += up_y.to(tl.float32)
    out_ptr = out + token.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out_ptr, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=mask)


def expand(
    y: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    out_features: Sequence[int],
    block_m: int,
    mixed: list[torch.Tensor],
    batch: list[torch.Tensor],
    gains: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    add: bool = True,
    in_parts: bool = False,
) -> None:
    """Add `v`'s products with B to `y` in place, or write them there; see `ops.lora_expand` and `ops.lora_delta`.

    `in_parts` writes them to a `y` with as many parts as `plan_expand` says.
    """
    _, num_tokens, k, _, max_rank = v.shape
    p = plan.plan_expand(block_m, num_tokens, k, max_rank, out_features, in_parts=in_parts)
    if block_m == 1:
        _expand_tokens(y, v, b, ranks, starts, out_features, batch, p, gains, bias, add=add)
    else:
        mixed = mixed or mix(v, b, ranks, starts, out_features, block_m, batch)
        _expand_tiles(y, mixed, b, out_features, batch, p, gains, bias, k, add=add)


def _column_options(
    y: torch.Tensor,
    b: torch.Tensor,
    out_features: Sequence[int],
    p: plan.ExpandPlan,
    gains: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[int, dict[str, object]]:
    """Number of column blocks, and what the kernels over columns have in common; what is not read is any tensor."""
    blocks = sum(plan.cdiv(width, p.block_n) for width in out_features)
    has_gains = gains is not None
    return blocks, {
        "gains": b if gains is None else gains,
        "bias": b if bias is None else bias,
        "GAINS": has_gains,
        "BIAS": has_gains and bias is not None,
        "OUT": tuple(out_features),
        "BLOCK_N": p.block_n,
        "ALIGN": math.gcd(16, *out_features),
        "num_warps": p.num_warps,
        "num_stages": p.num_stages,
        **pdl_options(y.device),
    }


def _expand_tokens(
    y: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    out_features: Sequence[int],
    batch: list[torch.Tensor],
    p: plan.ExpandPlan,
    gains: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    add: bool,
) -> None:
    """Each token on its own."""
    num_splits, num_tokens, k, num_slices, max_rank = v.shape
    blocks, options = _column_options(y, b, out_features, p, gains, bias)
    _expand_token_kernel[(num_tokens, blocks)](
        y,
        v,
        b,
        ranks,
        starts,
        batch[0],
        batch[1],
        stride_y=y.stride(0),
        stride_b=b.stride(0),
        stride_split=v.stride(0),
        max_rank=max_rank,
        K=k,
        K_PADDED=plan.power_of_2(k),
        NUM_SPLITS=num_splits,
        NUM_SLICES=num_slices,
        BLOCK_R=p.block_rows,
        ADD=add,
        **options,
    )


def mixed_shapes(
    v: torch.Tensor, num_rows: int, max_loras: int, out_features: Sequence[int], block_m: int
) -> tuple[list[int], list[int]]:
    """Shapes of what `mix` returns."""
    _, num_tokens, k, num_slices, max_rank = v.shape
    block_rows = plan.plan_expand(block_m, num_tokens, k, max_rank, out_features).block_rows
    tiles = plan.cdiv(num_tokens, block_m)
    # The pool's own size bounds the rows too: an adapter of r rows fills cdiv(r, ITEM_ROWS) items.
    pool_items = plan.cdiv(num_rows, plan.ITEM_ROWS) + min(max_loras, block_m * k)
    items = min(plan.max_items(block_m, k, max_loras, max_rank), pool_items)
    max_rows = plan.cdiv(items * plan.ITEM_ROWS, block_rows) * block_rows
    return [tiles, num_slices, block_m, max_rows], [tiles, num_slices, max_rows]


def mix(
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    out_features: Sequence[int],
    block_m: int,
    batch: list[torch.Tensor],
) -> list[torch.Tensor]:
    """The weighted sums of each tile of tokens over the rows of all its adapters, and which rows these are.

    Returns:
        `mixed [tiles, num_slices, block_m, max_rows]`, `b`'s dtype, and `rows [tiles, num_slices, max_rows]`, int32.
    """
    num_splits, num_tokens, k, num_slices, max_rank = v.shape
    mapping, weights, _, _, order, items, num_items = batch
    p = plan.plan_expand(block_m, num_tokens, k, max_rank, out_features)
    shape, rows_shape = mixed_shapes(v, b.shape[0], ranks.shape[0], out_features, block_m)
    mixed = torch.empty(shape, dtype=b.dtype, device=b.device)
    rows = torch.empty(rows_shape, dtype=torch.int32, device=b.device)
    max_items = plan.max_items(block_m, k, ranks.shape[0], max_rank)
    tiles, max_rows = shape[0], shape[3]
    parts = min(plan.mix_parts(num_tokens), plan.cdiv(max_rows, p.block_rows))
    mix_m = plan.MIX_TOKENS
    _mix_kernel[(tiles * block_m // mix_m, num_slices, parts)](
        mixed,
        rows,
        v,
        ranks,
        starts,
        mapping,
        weights,
        order,
        items,
        num_items,
        num_tokens,
        max_items,
        max_rows,
        v.stride(0),
        max_rank,
        parts,
        K=k,
        NUM_SPLITS=num_splits,
        NUM_SLICES=num_slices,
        ITEM_ROWS=plan.ITEM_ROWS,
        BLOCK_M=block_m,
        MIX_M=mix_m,
        BLOCK_ROWS=p.block_rows,
        num_stages=1,
        **pdl_options(b.device),
    )
    return [mixed, rows]


def _expand_tiles(
    y: torch.Tensor,
    mixed: list[torch.Tensor],
    b: torch.Tensor,
    out_features: Sequence[int],
    batch: list[torch.Tensor],
    p: plan.ExpandPlan,
    gains: torch.Tensor | None,
    bias: torch.Tensor | None,
    k: int,
    *,
    add: bool,
) -> None:
    """A tile of tokens by a tile of columns."""
    blocks, options = _column_options(y, b, out_features, p, gains, bias)
    tiles, num_slices, block_m, max_rows = mixed[0].shape
    _expand_tile_kernel[(blocks, tiles, p.num_parts)](
        y,
        *mixed,
        b,
        batch[4],
        batch[6],
        batch[0],
        batch[1],
        num_tokens=y.shape[-2],
        max_rows=max_rows,
        stride_y=y.stride(-2),
        stride_b=b.stride(0),
        K=1 if gains is None else k,
        NUM_SLICES=num_slices,
        ITEM_ROWS=plan.ITEM_ROWS,
        BLOCK_M=block_m,
        BLOCK_ROWS=p.block_rows,
        ADD=add,
        NUM_PARTS=p.num_parts,
        **options,
    )


def expand_gated(
    out: torch.Tensor,
    y: torch.Tensor,
    mixed: list[torch.Tensor],
    b: torch.Tensor,
    out_features: Sequence[int],
    max_rank: int,
    activation: str,
    batch: list[torch.Tensor],
) -> None:
    """Fill `out [num_tokens, width]` from `y [num_tokens, 2 * width]`; see `ops.lora_expand_gated`."""
    num_tokens, width = out.shape
    tiles, num_slices, block_m, max_rows = mixed[0].shape
    p = plan.plan_gated_expand(block_m, num_tokens, batch[0].shape[1], max_rank, out_features)
    _expand_gated_kernel[(plan.cdiv(width, p.block_n), tiles)](
        out,
        y,
        *mixed,
        b,
        batch[4],
        batch[6],
        num_tokens,
        max_rows,
        y.stride(0),
        b.stride(0),
        width,
        NUM_SLICES=num_slices,
        ITEM_ROWS=plan.ITEM_ROWS,
        BLOCK_M=block_m,
        BLOCK_N=p.block_n,
        BLOCK_ROWS=p.block_rows,
        KIND=ACTIVATIONS[activation],
        num_warps=p.num_warps,
        num_stages=p.num_stages,
        **pdl_options(y.device),
    )
