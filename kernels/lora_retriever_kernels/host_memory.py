"""Zeros that cost no memory before they are written to."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["lazy_zeros"]

_LEAST_BYTES = 1 << 20  # below, a page more or less makes no difference


def lazy_zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """`torch.zeros`, of which a CPU's system provides each page when it is first touched.

    Memory that is set aside for the busiest hour (a KV cache, rows for adapters) is not taken in the quietest.

    Args:
        shape: Sizes.
        dtype: Any.
        device: On another than the CPU it is `torch.zeros`.

    Raises:
        RuntimeError: If there is not that much address space.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < _LEAST_BYTES:
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):  # private: a forked process has its own
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(-1, num_bytes)
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeError(f"there is no room for {num_bytes:,} bytes: {error}") from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(*shape)  # which keeps the mapping
