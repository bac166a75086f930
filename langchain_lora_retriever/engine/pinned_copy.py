"""Small copies between host and device that neither side waits for, and which device is the current one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

__all__ = ["copy_into", "copy_to_device", "copy_to_host", "on_device", "upload"]


_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device this thread's current one: where Triton launches, and streams and events are made."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of `values` on `device`; nested sequences become dimensions, arrays are read as a whole."""
    host = np.array(values, dtype=_NUMPY[dtype])  # which torch would do several times as slowly
    return copy_to_device(torch.from_numpy(host), device)


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy through page-locked memory, in the order of the current stream."""
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.device.type == "cuda":
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


def copy_into(target: torch.Tensor, host: torch.Tensor) -> None:
    """Copy to a place on a device through page-locked memory, in the order of the current stream."""
    if target.device.type == "cuda":
        host = host.pin_memory()  # the allocator of which gives it to nobody else before the copy has run
    target.copy_(host, non_blocking=True)


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Begin to copy into page-locked memory; to be read once the current stream has come this far."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
