# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""RMS norm, together with the residual addition before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.launch import num_parts, pdl_options, wait_for_earlier_launches


class RmsNorm(NamedTuple):
    """`x * rsqrt(mean(x^2) + eps) * (weight + offset)`."""

    weight: torch.Tensor
    eps: float
    offset: float


@triton.jit
def _norm_kernel(
    out, total, x, delta, residual, weight, inner_weight, eps, offset, inner_eps, inner_offset, width, x_stride,
    NUM_DELTAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_INNER: tl.constexpr, NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    ok = d < width
    w = tl.load(weight + d, mask=ok, other=0.0).to(tl.float32) + offset
    wait_for_earlier_launches(PDL)
    y = tl.load(x + token * x_stride + d, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        row = part * tl.num_programs(0) + token
        y += tl.load(x + row * x_stride + d, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(NUM_DELTAS):
        y += tl.load(delta + (part * tl.num_programs(0) + token) * width + d, mask=ok, other=0.0).to(tl.float32)
    if HAS_INNER:
        inner = tl.load(inner_weight + d, mask=ok, other=0.0).to(tl.float32) + inner_offset
        y = y * tl.rsqrt(tl.sum(y * y, 0) / width + inner_eps) * inner
        y = y.to(out.dtype.element_ty).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + token * width + d, mask=ok, other=0.0).to(tl.float32)
        rounded = y.to(total.dtype.element_ty)
        tl.store(total + token * width + d, rounded, mask=ok)
        y = rounded.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / width + eps) * w
    tl.store(out + token * width + d, y.to(out.dtype.element_ty), mask=ok)


def rms_norm(
    x: torch.Tensor, norm: RmsNorm, delta: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Normalise each row of a sum.

    Args:
        x: `[num_tokens, width]`, unit stride in a row; or its parts `[num_parts, num_tokens, width]`, contiguous, which
            are added up.
        norm: The norm.
        delta: What belongs to `x` and was computed apart, `[num_tokens, width]`, contiguous, or its parts like those of
            `x`; None for nothing.
        dtype: Of the result; None for that of `x`.

    Returns:
        `[num_tokens, width]`.
    """
    out = torch.empty(x.shape[-2:], dtype=dtype or x.dtype, device=x.device)
    _launch(out, out, x, None, norm, None, delta)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: RmsNorm,
    inner: RmsNorm | None = None,
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a layer's output to the residual stream and normalise the sum.

    Semantics:
        total = residual + inner(x + delta); out = norm(total)

    Args:
        x: `[num_tokens, width]`, unit stride in a row; or its parts `[num_parts, num_tokens, width]`, contiguous, which
            are added up.
        residual: `[num_tokens, width]`, contiguous, of the results' dtype.
        norm: Norm of the sum.
        inner: Norm of `x` before the addition; None adds `x` as it is.
        delta: What belongs to `x` and was computed apart, `[num_tokens, width]`, contiguous, or its parts like those of
            `x`; None for nothing.

    Returns:
        `total` and `out`, both new.
    """
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    _launch(out, total, x, residual, norm, inner, delta)
    return total, out


def _launch(
    out: torch.Tensor,
    total: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm: RmsNorm,
    inner: RmsNorm | None,
    delta: torch.Tensor | None,
) -> None:
    num_tokens, width = out.shape
    block = triton.next_power_of_2(width)
    if num_tokens == 0:
        return
    _norm_kernel[(num_tokens,)](
        out,
        total,
        x,
        delta if delta is not None else x,
        residual if residual is not None else x,
        norm.weight,
        inner.weight if inner is not None else norm.weight,
        norm.eps,
        norm.offset,
        inner.eps if inner is not None else 0.0,
        inner.offset if inner is not None else 0.0,
        width,
        x.stride(-2),
        NUM_DELTAS=num_parts(delta),
        HAS_RESIDUAL=residual is not None,
        HAS_INNER=inner is not None,
        NUM_PARTS=num_parts(x),
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        **pdl_options(x.device),
    )
