# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""Shrink: inputs times A, one program per tile of pairs that share an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lora_retriever_kernels.launch import pdl_options, stages_that_fit, wait_for_earlier_launches
from lora_retriever_kernels.lora import plan

if TYPE_CHECKING:
    import torch


# What changes with ranks and widths alone is no constant: each variant would be compiled when it is first met.
@triton.jit(do_not_specialize=["chunk", "rank_blocks", "num_tiles"])
def _shrink_kernel(
    v,
    x,
    a,
    ranks,
    starts,
    pairs,
    tiles,
    stride_x,
    stride_slice,
    stride_split,
    in_features,
    max_rank,
    rank_blocks,
    chunk,
    num_tiles,
    K: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """v[split, pair, slice, r] = x[token(pair), chunk(split)] . a[slice, start(slot) + r, chunk(split)]."""
    wait_for_earlier_launches(PDL)
    part = tl.program_id(1)
    split = tl.program_id(2)
    column = tl.arange(0, SLICES * BLOCK_R)
    index = part // rank_blocks * SLICES + column // BLOCK_R
    r = part % rank_blocks * BLOCK_R + column % BLOCK_R
    first_k = tl.multiple_of(split * chunk, BLOCK_K)
    k = first_k + tl.arange(0, BLOCK_K)
    remaining = in_features - first_k
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 3)
    while slot >= 0:  # behind the last tile there are none
        rank = tl.load(ranks + slot * NUM_SLICES + index, mask=index < NUM_SLICES, other=0)
        has_row = r < rank
        if tl.max(has_row.to(tl.int32)) > 0:
            row = tl.load(starts + slot) + r
            position = tl.load(tiles + tile * 3 + 1) + tl.arange(0, BLOCK_M)
            has_pair = position < tl.load(tiles + tile * 3 + 2)
            pair = tl.load(pairs + position, mask=has_pair, other=0)
            x_ptr = x + (pair // K).to(tl.int64)[:, None] * stride_x + k[None, :]
            a_ptr = a + (index.to(tl.int64) * stride_slice + row.to(tl.int64) * in_features)[None, :] + k[:, None]
            acc = tl.zeros([BLOCK_M, SLICES * BLOCK_R], tl.float32)
            for k0 in range(0, tl.minimum(chunk, remaining), BLOCK_K):
                x_mask = has_pair[:, None]
                a_mask = has_row[None, :]
                if not EVEN_K:
                    has_k = tl.arange(0, BLOCK_K) < remaining - k0
                    x_mask = x_mask & has_k[None, :]
                    a_mask = a_mask & has_k[:, None]
                x_part = tl.load(x_ptr + k0, mask=x_mask, other=0.0)
                a_part = tl.load(a_ptr + k0, mask=a_mask, other=0.0)
                acc = tl.dot(x_part, a_part, acc, input_precision="ieee")
            v_ptr = v + split.to(tl.int64) * stride_split + pair.to(tl.int64)[:, None] * (NUM_SLICES * max_rank)
            tl.store(v_ptr + (index * max_rank + r)[None, :], acc, mask=has_pair[:, None] & has_row[None, :])
        tile += tl.num_programs(0)
        slot = tl.load(tiles + tile * 3, mask=tile < num_tiles, other=-1)


def shrink(
    v: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    token_block: int,
    batch: list[torch.Tensor],
) -> None:
    """Fill the partial sums `v [num_splits, num_tokens, k, num_slices, max_rank]`; see `ops.lora_shrink`."""
    _, num_tokens, k, num_slices, max_rank = v.shape
    in_features, max_loras = x.shape[1], ranks.shape[0]
    p = plan.plan_shrink(num_tokens, k, max_rank, in_features, num_slices, x.element_size(), token_block)
    rank_blocks = plan.cdiv(max_rank, p.block_r)
    block_m = plan.pair_block(num_tokens, k)
    stage_bytes = (block_m + p.slices * p.block_r) * p.block_k * x.element_size()
    num_programs = plan.pair_programs(num_tokens, k, max_loras)
    grid = (num_programs, plan.cdiv(num_slices, p.slices) * rank_blocks, p.num_splits)
    _shrink_kernel[grid](
        v,
        x,
        a,
        ranks,
        starts,
        batch[2],
        batch[3],
        x.stride(0),
        a.stride(0),
        v.stride(0),
        in_features,
        max_rank,
        rank_blocks,
        p.chunk,
        plan.max_pair_tiles(num_tokens, k, max_loras),
        K=k,
        NUM_SLICES=num_slices,
        SLICES=p.slices,
        BLOCK_M=block_m,
        BLOCK_R=p.block_r,
        BLOCK_K=p.block_k,
        EVEN_K=in_features % p.block_k == 0,
        num_warps=p.num_warps,
        num_stages=stages_that_fit(x.device, p.num_stages, stage_bytes),
        **pdl_options(x.device),
    )


@triton.jit
def _look_up_kernel(
    v,
    x,
    a,
    ranks,
    starts,
    mapping,
    stride_slice,
    in_features,
    K: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """v[pair, slice, r] = a[slice, start(slot) + r, x[token(pair)]], one program per pair and slice."""
    wait_for_earlier_launches(PDL)
    pair = tl.program_id(0)
    index = tl.program_id(1)
    slot = tl.load(mapping + pair)
    if slot < 0:
        return
    r = tl.arange(0, BLOCK_R)
    has_row = r < tl.load(ranks + slot * NUM_SLICES + index)
    feature = tl.load(x + pair // K)
    row = (tl.load(starts + slot) + r).to(tl.int64)
    found = tl.load(a + index.to(tl.int64) * stride_slice + row * in_features + feature, mask=has_row, other=0.0)
    tl.store(v + (pair.to(tl.int64) * NUM_SLICES + index) * MAX_RANK + r, found.to(tl.float32), mask=has_row)


def look_up(
    v: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    batch: list[torch.Tensor],
) -> None:
    """Fill `v [1, num_tokens, k, num_slices, max_rank]` for one-hot inputs `x [num_tokens]`: with columns of A."""
    _, num_tokens, k, num_slices, max_rank = v.shape
    _look_up_kernel[(num_tokens * k, num_slices)](
        v,
        x,
        a,
        ranks,
        starts,
        batch[0],
        a.stride(0),
        a.shape[2],
        K=k,
        NUM_SLICES=num_slices,
        MAX_RANK=max_rank,
        BLOCK_R=plan.power_of_2(max_rank),
        num_warps=1,
        **pdl_options(x.device),
    )
