"""Norms and activations in one launch against the same in plain PyTorch."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it so",
)


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """The definition of the norm."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def addend(num_deltas: int, *sizes: int) -> tuple[torch.Tensor | None, torch.Tensor | float]:
    """What comes apart, in so many parts, and the whole of it."""
    if not num_deltas:
        return None, 0.0
    parts = torch.randn(num_deltas, *sizes, device=DEVICE)
    return (parts if num_deltas > 1 else parts[0]), parts.sum(0)


@pytest.mark.parametrize("width", [64, 133])
@pytest.mark.parametrize("num_deltas", [0, 1, 3])
@pytest.mark.parametrize("has_inner", [False, True])
def test_norms_and_additions(width: int, has_inner: bool, num_deltas: int) -> None:
    """With and without a norm of the addend and a part of it that comes apart, over rows that lie apart."""
    from lora_retriever_kernels.decoder import RmsNorm, add_rms_norm, rms_norm

    x = torch.randn(5, 2 * width, device=DEVICE)[:, :width]
    residual, weight, inner_weight = (torch.randn(*s, device=DEVICE) for s in ((5, width), (width,), (width,)))
    norm, inner = RmsNorm(weight, 1e-5, 1.0), RmsNorm(inner_weight, 1e-6, 0.0)
    delta, added = addend(num_deltas, 5, width)
    whole = x + added
    torch.testing.assert_close(rms_norm(x, norm, delta), plain(whole, weight, 1e-5, 1.0))
    expected = residual + (plain(whole, inner_weight, 1e-6, 0.0) if has_inner else whole)
    total, out = add_rms_norm(x, residual, norm, inner if has_inner else None, delta)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(out, plain(expected, weight, 1e-5, 1.0))


@pytest.mark.parametrize("num_deltas", [0, 1, 2])
@pytest.mark.parametrize("has_inner", [False, True])
def test_norms_of_a_sum_in_parts(has_inner: bool, num_deltas: int) -> None:
    """Parts in float32 give what their sum gives, in the residual's dtype."""
    from lora_retriever_kernels.decoder import RmsNorm, add_rms_norm, rms_norm

    parts = torch.randn(3, 5, 133, device=DEVICE)
    residual, weight = torch.randn(5, 133, device=DEVICE).bfloat16(), torch.randn(133, device=DEVICE).bfloat16()
    norm, inner = RmsNorm(weight, 1e-5, 1.0), RmsNorm(weight, 1e-6, 0.0) if has_inner else None
    delta, _ = addend(num_deltas, 5, 133)
    whole = parts.sum(0)
    got = add_rms_norm(parts, residual, norm, inner, delta)
    for one, other in zip(got, add_rms_norm(whole, residual, norm, inner, delta), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other)
    alone = rms_norm(parts, norm, delta, torch.bfloat16)
    assert alone.dtype == torch.bfloat16
    torch.testing.assert_close(alone, rms_norm(whole, norm, delta).bfloat16())


@pytest.mark.parametrize("width", [16, 1033])
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_gated_activation(name: str, width: int) -> None:
    """Each activation by the name that configurations give it."""
    from lora_retriever_kernels.decoder import gated_activation

    x = torch.randn(3, 2 * width, device=DEVICE)
    activation = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    }[name]
    torch.testing.assert_close(gated_activation(x, name), activation(x[:, :width]) * x[:, width:])
    for num_deltas in (1, 4):
        delta, added = addend(num_deltas, 3, 2 * width)
        whole = x + added
        torch.testing.assert_close(gated_activation(x, name, delta), activation(whole[:, :width]) * whole[:, width:])
