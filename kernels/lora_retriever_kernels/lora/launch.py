"""What the Triton launches have in common."""

from __future__ import annotations

import functools

import torch


@functools.cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Return the launch options for programmatic dependent launch, which Hopper and newer have.

    With it a kernel starts while the one before it drains, and waits inside for that one's results.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def stages_that_fit(device: torch.device, wanted: int, stage_bytes: int) -> int:
    """Return how many pipeline stages of `stage_bytes` shared memory holds, at most `wanted`."""
    if device.type != "cuda":
        return wanted
    available: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 49152)
    return max(1, min(wanted, available // stage_bytes))
