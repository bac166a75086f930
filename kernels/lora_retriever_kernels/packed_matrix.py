"""Products of few rows with a matrix that stays, on a CPU: oneDNN packs it once, as `torch.compile` has it do.

On two cores of an AMD EPYC with AVX-512 (torch 2.13), 8 rows over SmolLM2's weights take 0.3 to 0.45 of what they take
over a plain tensor, over its output layer 0.2; 512 rows take 0.8.
"""

from __future__ import annotations

import platform

import torch

__all__ = ["can_pack", "multiply", "pack"]

_USUAL_NUM_ROWS = 8  # what oneDNN chooses the layout for: it is within 10 % of the best for any number from 2 to 1,024


_IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}  # elsewhere nobody has measured it


def can_pack(matrix: torch.Tensor) -> bool:
    """Whether this build of torch packs such a matrix: on an x86 CPU, in float32."""
    is_known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return _IS_X86 and is_known and matrix.device.type == "cpu" and matrix.dtype == torch.float32


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Pack a matrix `[out_features, in_features]`; `to_dense()` of what this returns gives it back bit for bit."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, _USUAL_NUM_ROWS)  # noqa: SLF001 - torch has no public name for it
    return packed


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` with a packed matrix: `[..., in_features]` -> `[..., out_features]`."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: SLF001
    return y
