# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""Grouping a step's tokens by adapter on the device, in two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lora_retriever_kernels.lora import plan

if TYPE_CHECKING:
    import torch


@triton.jit
def _first_slots(mapping, tokens, num_tokens, K: tl.constexpr, BLOCK: tl.constexpr):
    """The first slot that each of some tokens names, -1 for none."""
    first = tl.full([BLOCK], -1, tl.int32)
    for j in tl.static_range(K):
        slot = tl.load(mapping + tokens * K + K - 1 - j, mask=tokens < num_tokens, other=-1)
        first = tl.where(slot >= 0, slot, first)
    return first


@triton.jit(do_not_specialize=["num_tokens"])
def _sort_kernel(  # noqa: C901 - two scans over pairs, two over tokens
    mapping,
    weights,
    mapping_out,
    weights_out,
    pairs,
    segments,
    order,
    num_tokens,
    max_loras,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counting sort, one program per slot: pairs by slot, and tokens by their first slot.

    Each program counts for itself what comes before its slot, so none waits for another and ties keep their order. The
    program past the last slot copies the step's mapping and ends `order` with the tokens without adapters, `t` as
    `-2 - t`.
    """
    slot = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    num_pairs = num_tokens * K
    count = 0
    offset = 0
    for lo in range(0, num_pairs, BLOCK):
        ok = lo + i < num_pairs
        m = tl.load(mapping + lo + i, mask=ok, other=-1)
        count += tl.sum((m == slot).to(tl.int32))
        offset += tl.sum(((m >= 0) & (m < slot)).to(tl.int32))
        if slot == max_loras:
            tl.store(mapping_out + lo + i, m, mask=ok)
            tl.store(weights_out + lo + i, tl.load(weights + lo + i, mask=ok), mask=ok)
    if slot < max_loras:
        tl.store(segments + slot, count)
        tl.store(segments + max_loras + slot, offset)
        if count > 0:
            for lo in range(0, num_pairs, BLOCK):
                m = tl.load(mapping + lo + i, mask=lo + i < num_pairs, other=-1)
                hit = (m == slot).to(tl.int32)
                tl.store(pairs + offset + tl.cumsum(hit) - 1, lo + i, mask=hit > 0)
                offset += tl.sum(hit)
    offset = 0
    for lo in range(0, num_tokens, BLOCK):
        first = _first_slots(mapping, lo + i, num_tokens, K, BLOCK)
        offset += tl.sum(((first >= 0) & (first < slot)).to(tl.int32))
    if slot == max_loras:
        for lo in range(0, num_tokens, BLOCK):
            first = _first_slots(mapping, lo + i, num_tokens, K, BLOCK)
            hit = ((first < 0) & (lo + i < num_tokens)).to(tl.int32)
            tl.store(order + offset + tl.cumsum(hit) - 1, -2 - lo - i, mask=hit > 0)
            offset += tl.sum(hit)
    elif count > 0:
        for lo in range(0, num_tokens, BLOCK):
            first = _first_slots(mapping, lo + i, num_tokens, K, BLOCK)
            hit = (first == slot).to(tl.int32)
            tl.store(order + offset + tl.cumsum(hit) - 1, lo + i, mask=hit > 0)
            offset += tl.sum(hit)


@triton.jit(do_not_specialize=["num_tokens", "num_pair_tiles", "num_token_tiles", "max_items", "max_blocks"])
def _tile_kernel(
    mapping,
    counts,
    segments,
    order,
    tiles,
    items,
    num_items,
    num_tokens,
    max_loras,
    num_pair_tiles,
    num_token_tiles,
    max_items,
    max_blocks,
    K: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    ITEM_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Cut the sorted pairs into tiles of one slot; list the row blocks that each tile of tokens needs."""
    i = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    ok = slots < max_loras
    if i < num_pair_tiles:
        per_slot = tl.cdiv(tl.load(segments + slots, mask=ok, other=0), PAIR_BLOCK)
        slot = tl.sum((tl.cumsum(per_slot) <= i).to(tl.int32))
        if slot < max_loras:
            before = tl.sum(tl.where(slots < slot, per_slot, 0))
            offset = tl.load(segments + max_loras + slot)
            begin = offset + (i - before) * PAIR_BLOCK
            end = tl.minimum(begin + PAIR_BLOCK, offset + tl.load(segments + slot))
            tl.store(tiles + i * 3, slot)
            tl.store(tiles + i * 3 + 1, begin)
            tl.store(tiles + i * 3 + 2, end)
        else:
            tl.store(tiles + i * 3, -1)
    if TOKEN_BLOCK > 1:  # noqa: SIM102 - only this one is decided at compile time
        if i < num_token_tiles:
            t = i * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
            token = tl.load(order + t, mask=t < num_tokens, other=-1)
            hits = tl.zeros([SLOTS], tl.int32)
            for j in tl.static_range(K):
                m = tl.load(mapping + token * K + j, mask=token >= 0, other=-1)
                hits += tl.sum((m[:, None] == slots[None, :]).to(tl.int32), 0)
            blocks = tl.cdiv(tl.load(counts + slots, mask=ok & (hits > 0), other=0), ITEM_ROWS)
            base = items + i * max_items + tl.cumsum(blocks) - blocks
            for block in range(max_blocks):
                tl.store(base + block, slots * 16 + block, mask=block < blocks)
            tl.store(num_items + i, tl.sum(blocks))


def group_tokens(
    mapping: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    max_rank: int,
    block_m: int,
    buffers: tuple[torch.Tensor, ...],
) -> None:
    """Fill a batch's buffers from `mapping` and `weights` `[num_tokens, k]`.

    Args:
        mapping: Slot per token, int32, contiguous; -1 = none.
        weights: fp32, contiguous.
        counts: Rows per slot `[max_loras]`.
        max_rank: At least the largest entry of `counts`.
        block_m: Tokens of a tile, as `plan.token_block` gives it.
        buffers: `LoraBatch`'s copy of mapping and weights, pairs, tiles, order, items, num_items and segments;
            mutated.
    """
    num_tokens, k = mapping.shape
    if num_tokens == 0:
        return
    max_loras = counts.shape[0]
    mapping_out, weights_out, pairs, tiles, order, items, num_items, segments = buffers
    block = max(16, min(1024, plan.power_of_2(num_tokens * k)))
    _sort_kernel[(max_loras + 1,)](
        mapping,
        weights,
        mapping_out,
        weights_out,
        pairs,
        segments,
        order,
        num_tokens,
        max_loras,
        K=k,
        BLOCK=block,
    )
    num_pair_tiles = plan.max_pair_tiles(num_tokens, k, max_loras)
    num_token_tiles = plan.cdiv(num_tokens, block_m) if block_m > 1 else 0
    _tile_kernel[(max(num_pair_tiles, num_token_tiles),)](
        mapping,
        counts,
        segments,
        order,
        tiles,
        items,
        num_items,
        num_tokens,
        max_loras,
        num_pair_tiles,
        num_token_tiles,
        plan.max_items(block_m, k, max_loras, max_rank),
        plan.cdiv(max_rank, plan.ITEM_ROWS),
        K=k,
        PAIR_BLOCK=plan.pair_block(num_tokens, k),
        TOKEN_BLOCK=block_m,
        ITEM_ROWS=plan.ITEM_ROWS,
        SLOTS=max(16, plan.power_of_2(max_loras + 1)),
    )
