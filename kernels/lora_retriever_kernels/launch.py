# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False
"""What the Triton launches have in common."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


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


def num_parts(x: torch.Tensor | None) -> int:
    """How many parts of something come, which whoever reads it adds up: `[num_parts, num_tokens, width]` has some."""
    return 0 if x is None else x.shape[0] if x.dim() == 3 else 1


@triton.jit
def wait_for_earlier_launches(PDL: tl.constexpr) -> None:
    """Wait for the results of all kernels launched before, and let the next one be launched meanwhile.

    Every program calls it, also one without work: a later kernel trusts this one to end after its predecessors.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
