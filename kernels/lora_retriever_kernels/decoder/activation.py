# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: ANN001, ANN202 - Triton types the kernels' arguments itself
"""The gated activation of an MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_retriever_kernels.launch import num_parts, pdl_options, wait_for_earlier_launches

# Names as in the configurations of transformers.
ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu": 2}


@triton.jit
def activate(gate, KIND: tl.constexpr) -> tl.tensor:
    """The activation of a kind that `ACTIVATIONS` lists."""
    if KIND == 0:
        gate = gate * tl.sigmoid(gate)
    elif KIND == 1:
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return gate


@triton.jit
def _activation_kernel(
    out, x, delta, width, x_stride, NUM_DELTAS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program per token and block of columns."""
    wait_for_earlier_launches(PDL)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = d < width
    gate = tl.load(x + token * x_stride + d, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x + token * x_stride + width + d, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(NUM_DELTAS):
        row = (part * tl.num_programs(0) + token) * 2 * width
        gate += tl.load(delta + row + d, mask=ok, other=0.0).to(tl.float32)
        up += tl.load(delta + row + width + d, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + token * width + d, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=ok)


def gated_activation(x: torch.Tensor, name: str, delta: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply the activation of the first half of each row with the second half.

    Args:
        x: `[num_tokens, 2 * width]`, unit stride in a row.
        name: One of `ACTIVATIONS`.
        delta: What belongs to `x` and was computed apart, of its shape, contiguous, or its parts
            `[num_parts, num_tokens, 2 * width]`, which are added up; None for nothing.

    Returns:
        `[num_tokens, width]`.
    """
    num_tokens, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    if num_tokens > 0:
        _activation_kernel[(num_tokens, triton.cdiv(width, block))](
            out,
            x,
            delta if delta is not None else x,
            width,
            x.stride(0),
            NUM_DELTAS=num_parts(delta),
            KIND=ACTIVATIONS[name],
            BLOCK=block,
            num_warps=max(1, block // 256),
            **pdl_options(x.device),
        )
    return out
