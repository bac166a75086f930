# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""Tokens that a step chooses and that stay on the device for the next one.

They lie in pairs `[max_num_seqs, 2]` int64, contiguous: a token id, and the bits of its row's largest logit as float64,
so that one copy brings both to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.launch import pdl_options, wait_for_earlier_launches

__all__ = ["choose_greedily", "fill_in_pending"]

_BLOCK = 4096  # columns of a program
_NUM_TOKENS = 256  # of a program
# Beyond every column. NaN counts as larger than all numbers, as in torch: a column that holds one is told as the
# column less this, which is negative, and the least of several is the first.
_BEYOND = tl.constexpr(1 << 30)


@triton.jit
def _part_kernel(peaks, places, logits, vocab_size, row_stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row and block of columns: the block's largest logit, and where it first occurs."""
    wait_for_earlier_launches(PDL)
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=column < vocab_size, other=float("-inf"))
    x = x.to(peaks.dtype.element_ty)
    is_nan = x != x  # noqa: PLR0124 - which a NaN alone is
    x = tl.where(is_nan, float("inf"), x)
    peak = tl.max(x, 0)
    place = tl.min(tl.where(is_nan, column - _BEYOND, tl.where(x == peak, column, _BEYOND)), 0)
    at = row * tl.num_programs(1) + part
    tl.store(peaks + at, peak)
    tl.store(places + at, place)


@triton.jit
def _choice_kernel(chosen, peaks, places, num_parts, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row: the largest of its blocks' logits, and where that first occurs."""
    wait_for_earlier_launches(PDL)
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    x = tl.load(peaks + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    place = tl.load(places + row * num_parts + part, mask=part < num_parts, other=_BEYOND)
    peak = tl.max(x, 0)
    place = tl.min(tl.where(x == peak, place, _BEYOND), 0)
    is_nan = place < 0
    peak = tl.where(is_nan, float("nan"), peak.to(tl.float64))
    tl.store(chosen + 2 * row, tl.where(is_nan, place + _BEYOND, place).to(tl.int64))
    tl.store(chosen + 2 * row + 1, peak.to(tl.int64, bitcast=True))


def choose_greedily(chosen: torch.Tensor, logits: torch.Tensor, vocab_size: int) -> None:
    """Write each row's largest logit and where it first occurs, as `torch.max` finds them: a NaN is larger than all.

    Args:
        chosen: `[>= num_rows, 2]` int64, contiguous: token ids, and the logits' bits as float64; mutated.
        logits: `[num_rows, width]`, any float dtype.
        vocab_size: Columns beyond it are not looked at.
    """
    num_rows, vocab_size = logits.shape[0], min(vocab_size, logits.shape[1])
    if num_rows == 0:
        return
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    num_parts = triton.cdiv(vocab_size, _BLOCK)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    peaks = torch.empty(num_rows, num_parts, dtype=dtype, device=logits.device)
    places = torch.empty(num_rows, num_parts, dtype=torch.int32, device=logits.device)
    options = pdl_options(logits.device)
    _part_kernel[(num_rows, num_parts)](
        peaks, places, logits, vocab_size, logits.stride(0), BLOCK=_BLOCK, num_warps=4, **options
    )
    block = triton.next_power_of_2(num_parts)
    _choice_kernel[(num_rows,)](chosen, peaks, places, num_parts, BLOCK=block, num_warps=1, **options)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["token_ids", "sources"])
def _pending_kernel(out, token_ids, sources, chosen, num_tokens, BLOCK: tl.constexpr):
    """One program per block of tokens. As a step's first launch it has none to overlap with."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = token < num_tokens
    source = tl.load(sources + token, mask=ok, other=-1)
    known = tl.load(token_ids + token, mask=ok, other=0)
    pending = tl.load(chosen + 2 * source, mask=source >= 0, other=0)
    tl.store(out + token, tl.where(source >= 0, pending, known), mask=ok)


def fill_in_pending(token_ids: torch.Tensor, sources: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The tokens of a step, those among them that the step before has chosen.

    Args:
        token_ids: `[num_tokens]` int64, contiguous; anything where a token is pending.
        sources: `[num_tokens]` int64, contiguous: the row of each pending token in `chosen`; negative for all others.
        chosen: `[num_rows, 2]` int64, contiguous: token ids, and what belongs to them.

    Returns:
        `[num_tokens]` int64, new.
    """
    out = torch.empty_like(token_ids)
    num_tokens = len(token_ids)
    if num_tokens > 0:
        grid = (triton.cdiv(num_tokens, _NUM_TOKENS),)
        _pending_kernel[grid](out, token_ids, sources, chosen, num_tokens, BLOCK=_NUM_TOKENS, num_warps=4)
    return out
