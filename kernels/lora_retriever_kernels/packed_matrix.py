"""Products of few rows with a matrix that stays, on a CPU: oneDNN packs it once, as `torch.compile` has it do.

On two cores of an AMD EPYC with AVX-512 (torch 2.13), 8 rows over SmolLM2's weights take 0.3 to 0.45 of what they take
over a plain tensor, over its output layer 0.2; 512 rows take 0.8.
"""

from __future__ import annotations

import platform
from bisect import bisect_left, bisect_right

import torch

__all__ = ["can_pack", "multiply", "pack"]

_USUAL_NUM_ROWS = 8  # what oneDNN chooses the layout for: it is within 10 % of the best for any number from 2 to 1,024
_MAX_EXACT = 16  # rows; every number up to this has a kernel of its own
_SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_MAX_PADDING = 1.15
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
    """`torch.nn.functional.linear` with a packed matrix: `[..., in_features]` -> `[..., out_features]`.

    For each number of rows that it meets oneDNN compiles a kernel and keeps it, 0.5 to 1.5 MB: so above some there are
    few numbers, and rows of zeros are put behind.
    """
    if x.numel() <= _MAX_EXACT * x.shape[-1]:
        return _linear(x, packed, bias)
    rows = x.reshape(-1, x.shape[-1])
    parts = []
    for part in rows.split(_split_rows(len(rows))):
        num_more = _padded(len(part)) - len(part)
        padded = torch.nn.functional.pad(part, (0, 0, 0, num_more)) if num_more else part
        parts.append(_linear(padded, packed, bias)[: len(part)])
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], y.shape[-1])


def _linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: SLF001
    return y


def _split_rows(num_rows: int) -> list[int]:
    """Into how many rows each a product is split: one part where few rows of zeros are to be added, else mostly two."""
    parts = []
    while num_rows > _SIZES[-1]:
        parts.append(_SIZES[-1])
        num_rows -= _SIZES[-1]
    below = _SIZES[bisect_right(_SIZES, num_rows) - 1]
    if num_rows > _MAX_EXACT and _padded(num_rows) > _MAX_PADDING * num_rows and below > _MAX_EXACT:
        return [*parts, below, num_rows - below]
    return [*parts, num_rows]


def _padded(num_rows: int) -> int:
    """The number of rows that a product of so many has."""
    return num_rows if num_rows <= _MAX_EXACT else _SIZES[bisect_left(_SIZES, num_rows)]
