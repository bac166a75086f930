# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""From a packed adapter on the device into the rows of all stacks, in one launch, and one more for gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from lora_retriever_kernels.lora import plan

if TYPE_CHECKING:
    import torch

_A_BLOCK = 8192  # elements of A that one program copies
_B_ELEMENTS = 4096  # elements of B that one program scales and transposes


@triton.jit(do_not_specialize=["slot", "start", "rank"])
def _unpack_kernel(
    flat,
    table,
    values,
    slot,
    start,
    rank,
    num_a_blocks,
    A_BLOCK: tl.constexpr,
    B_BLOCK: tl.constexpr,
    RANK: tl.constexpr,
):
    """One program copies a piece of one slice's A, which stays contiguous, or of its B, which is transposed."""
    piece = tl.program_id(0)
    entry = tl.program_id(1)
    row = table + entry * 8
    num_in = tl.load(row + 3)
    num_out = tl.load(row + 4)
    source = flat + tl.load(row + 7) * rank
    r = tl.load(values + entry).to(tl.int32)
    if piece < num_a_blocks:
        a = tl.load(row).to(tl.pointer_type(flat.dtype.element_ty)) + start * num_in
        i = piece * A_BLOCK + tl.arange(0, A_BLOCK)
        tl.store(a + i, tl.load(source + i, mask=i < r * num_in), mask=i < r * num_in)
    else:
        b = tl.load(row + 1).to(tl.pointer_type(flat.dtype.element_ty)) + start * tl.load(row + 5)
        source += rank * num_in
        scale = tl.load(values + tl.num_programs(1) + entry)
        column = (piece - num_a_blocks) * B_BLOCK + tl.arange(0, B_BLOCK)
        j = tl.arange(0, RANK)
        tile = tl.load(source + column[:, None] * r + j, mask=(column < num_out)[:, None] & (j < r), other=0.0)
        tile = tl.trans((tile.to(tl.float32) * scale).to(flat.dtype.element_ty))
        tl.store(b + j[:, None] * tl.load(row + 5) + column, tile, mask=(j < r)[:, None] & (column < num_out))
    if piece == 0:
        ranks = tl.load(row + 2).to(tl.pointer_type(tl.int32))
        tl.store(ranks + slot * tl.load(row + 6), r)


@triton.jit(do_not_specialize=["start", "rank"])
def _unpack_gains_kernel(flat, table, values, start, rank, BLOCK: tl.constexpr):
    """One program copies a piece of one slice's gains less one; zeros where there are none."""
    entry = tl.program_id(1)
    row = table + entry * 8
    num_out = tl.load(row + 4)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(row + 1).to(tl.pointer_type(flat.dtype.element_ty)) + start * tl.load(row + 5)
    source = flat + tl.load(row + 7) * rank + rank * tl.load(row + 3) + (rank - 1) * num_out
    num_gains = num_out * tl.load(values + 2 * tl.num_programs(1) + entry).to(tl.int64)
    gain = tl.load(source + column, mask=column < num_gains, other=0.0)
    tl.store(b + column, gain, mask=column < num_out)


def unpack(
    flat: torch.Tensor,
    table: torch.Tensor,
    values: torch.Tensor,
    slot: int,
    start: int,
    rank: int,
    max_in_features: int,
    max_out_features: int,
    *,
    gain: int,
) -> None:
    """Write the rows and the ranks of one adapter.

    Args:
        flat: The packed adapter, see `LoraPacking`.
        table: For each slice, int64: the addresses of its A, of its B and of its first rank, its in_features,
            out_features, the row strides of B and of the ranks, and its place in `flat` per rank row.
        values: For each slice its rank, for each its scale, and for each whether it has gains, `[3, num_slices]`, fp32.
        slot: Adapter slot.
        start: First row of A and B.
        rank: Rows there is room for in `flat`.
        max_in_features: Of any slice.
        max_out_features: Of any slice.
        gain: The row of the gains; -1 = there are none.
    """
    if gain >= 0:
        _unpack_gains_kernel[(plan.cdiv(max_out_features, _B_ELEMENTS), table.shape[0])](
            flat, table, values, gain, rank, BLOCK=_B_ELEMENTS, num_warps=8
        )
    padded = plan.power_of_2(rank)
    b_block = max(16, _B_ELEMENTS // padded)
    num_a_blocks = plan.cdiv(rank * max_in_features, _A_BLOCK)
    _unpack_kernel[(num_a_blocks + plan.cdiv(max_out_features, b_block), table.shape[0])](
        flat,
        table,
        values,
        slot,
        start,
        rank,
        num_a_blocks,
        A_BLOCK=_A_BLOCK,
        B_BLOCK=b_block,
        RANK=padded,
        num_warps=8,
    )
