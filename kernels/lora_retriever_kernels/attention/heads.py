# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN201 - Triton types the kernels' arguments itself
"""What happens to queries and keys between the projections and attention: what adapters add, head norms, rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


class Rotary(NamedTuple):
    """Rotary embedding of the step's tokens: `cos` and `sin`, each `[num_tokens, rotary_dim]`, the halves alike."""

    cos: torch.Tensor
    sin: torch.Tensor


class QueryKeyNorm(NamedTuple):
    """RMS norm over each head of the queries and keys; `x * rsqrt(mean(x^2) + eps) * (weight + offset)`."""

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    eps: float
    offset: float


def rotated_width(rotary: Rotary | None, num_tokens: int, head_dim: int) -> int:
    """How many dimensions of a head the kernels read in two halves: those that are rotated, without a rotation all.

    Of a rotation wider than a head a kernel would write the rest into the next head, and behind the last one.

    Raises:
        ValueError: Unless the rotation is of as many tokens, and of an even number of dimensions that a head has.
    """
    if rotary is None:
        return head_dim // 2 * 2
    width: int = rotary.cos.shape[-1]
    if width > head_dim or width % 2 or any(x.shape != (num_tokens, width) for x in rotary):
        raise ValueError(
            f"cos and sin must be [{num_tokens}, rotary_dim], rotary_dim even and at most head_dim {head_dim}, got "
            f"{[list(x.shape) for x in rotary]}"
        )
    return width


@triton.jit
def load_heads(
    source, delta, weight, cos, sin, eps, offset, heads, num_heads, source_stride, delta_stride,
    NUM_DELTAS: tl.constexpr, HAS_ROTARY: tl.constexpr, HAS_NORM: tl.constexpr, DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Read some heads of a token, normalised and rotated: the halves that are rotated, and the rest, in float32.

    A thread holds both members of a pair, so what comes of them may be written where they were.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    d = tl.arange(0, BLOCK_HALF)
    t = ROTARY_DIM + tl.arange(0, BLOCK_TAIL)
    ok = (heads < num_heads)[:, None] & (d < HALF)[None, :]
    tail_ok = (heads < num_heads)[:, None] & (t < DIM)[None, :]
    source += heads[:, None] * source_stride
    first = tl.load(source + d[None, :], mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + d[None, :], mask=ok, other=0.0).to(tl.float32)
    tail = tl.zeros([heads.shape[0], BLOCK_TAIL], tl.float32)
    if ROTARY_DIM < DIM:
        tail = tl.load(source + t[None, :], mask=tail_ok, other=0.0).to(tl.float32)
    for part in tl.static_range(NUM_DELTAS):
        apart = delta + part * delta_stride + heads[:, None] * DIM
        first += tl.load(apart + d[None, :], mask=ok, other=0.0).to(tl.float32)
        second += tl.load(apart + HALF + d[None, :], mask=ok, other=0.0).to(tl.float32)
        if ROTARY_DIM < DIM:
            tail += tl.load(apart + t[None, :], mask=tail_ok, other=0.0).to(tl.float32)
    in_half = d < HALF
    if HAS_NORM:
        total = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if ROTARY_DIM < DIM:
            total += tl.sum(tail * tail, 1)
        scale = tl.rsqrt(total / DIM + eps)[:, None]
        first *= scale * (tl.load(weight + d, mask=in_half, other=0.0).to(tl.float32) + offset)[None, :]
        second *= scale * (tl.load(weight + HALF + d, mask=in_half, other=0.0).to(tl.float32) + offset)[None, :]
        if ROTARY_DIM < DIM:
            tail *= scale * (tl.load(weight + t, mask=t < DIM, other=0.0).to(tl.float32) + offset)[None, :]
    if HAS_ROTARY:
        cos_1 = tl.load(cos + d, mask=in_half, other=0.0).to(tl.float32)[None, :]
        cos_2 = tl.load(cos + HALF + d, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin_1 = tl.load(sin + d, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sin_2 = tl.load(sin + HALF + d, mask=in_half, other=0.0).to(tl.float32)[None, :]
        rotated = first * cos_1 - second * sin_1
        second = second * cos_2 + first * sin_2
        first = rotated
    return first, second, tail


@triton.jit
def store_heads(
    target, first, second, tail, heads, num_heads, stride,
    DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Write what `load_heads` gives."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    d = tl.arange(0, BLOCK_HALF)
    ok = (heads < num_heads)[:, None] & (d < HALF)[None, :]
    target += heads[:, None] * stride
    tl.store(target + d[None, :], first.to(target.dtype.element_ty), mask=ok)
    tl.store(target + HALF + d[None, :], second.to(target.dtype.element_ty), mask=ok)
    if ROTARY_DIM < DIM:
        t = ROTARY_DIM + tl.arange(0, BLOCK_TAIL)
        tail_ok = (heads < num_heads)[:, None] & (t < DIM)[None, :]
        tl.store(target + t[None, :], tail.to(target.dtype.element_ty), mask=tail_ok)


@triton.jit
def load_values(
    source, delta, heads, num_heads, source_stride, delta_stride,
    NUM_DELTAS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Read the values of some heads of a token, and what adapters add to them, in float32."""
    e = tl.arange(0, BLOCK_VALUE)
    ok = (heads < num_heads)[:, None] & (e < VALUE_DIM)[None, :]
    found = tl.load(source + heads[:, None] * source_stride + e[None, :], mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(NUM_DELTAS):
        apart = delta + part * delta_stride + heads[:, None] * VALUE_DIM + e[None, :]
        found += tl.load(apart, mask=ok, other=0.0).to(tl.float32)
    return found
