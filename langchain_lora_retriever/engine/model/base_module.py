"""A module as the base model has it, whatever takes the place of its forward meanwhile."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from langchain_lora_retriever.engine.model.packed_weight import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BaseModule", "columns_of_weight", "give_forward_back"]


class BaseModule:
    """A module that adapters may target; to be made while it is not wrapped.

    Args:
        module: The module.
        dtype: What it computes in.
        device: Where.

    Attributes:
        forward: Its own forward, without adapters: how a quantised weight is read.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.module = module
        self.forward: Callable[..., torch.Tensor] = module.forward
        self.dtype = dtype
        self.device = device

    def wrap(self, forward: Callable[..., Any]) -> None:
        """Take the place of the module's forward."""
        self.module.forward = forward

    def unwrap(self) -> None:
        """Give it back."""
        give_forward_back(self.module, self.forward)

    def tensor(self, name: str) -> torch.Tensor | None:
        """A parameter, also where it is packed or accelerate keeps it elsewhere; None if there is none."""
        hook: Any = getattr(self.module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            weights_map = getattr(part, "weights_map", None)
            if weights_map is not None and getattr(self.module, name, None) is not None:
                found = weights_map[name]
                assert isinstance(found, torch.Tensor)
                return found
        tensor = getattr(self.module, name, None)
        if isinstance(tensor, PackedWeight):
            return tensor.dense()
        return tensor if isinstance(tensor, torch.Tensor) else None

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """What the outputs hold beside the product, where and in what the module computes; None if there is none."""
        bias = None if isinstance(self.module, nn.Embedding) else self.tensor("bias")
        return None if bias is None else bias.to(self.device, self.dtype)


def columns_of_weight(module: nn.Module, part: slice, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Columns of a linear module's weight, in whatever form it keeps that: what it makes of unit vectors.

    Its bias is left out from the start: added first, it would swallow the digits of a weight much smaller than it.

    Args:
        module: Has `in_features`; it is left as it is, so that other threads may run it meanwhile.
        part: Which columns; both ends are given.
        dtype: What the module computes in.
        device: Where.

    Returns:
        `[out_features, num_columns]`, fp32.
    """
    in_features = module.in_features
    assert isinstance(in_features, int)
    bare: Any = copy.copy(module)
    vars(bare).pop("forward", None)
    for held in ("_parameters", "_buffers"):
        vars(bare)[held] = dict(vars(module)[held])
    bare.bias = None
    units = torch.zeros(part.stop - part.start, in_features, dtype=dtype, device=device)
    units[torch.arange(len(units)), torch.arange(part.start, part.stop)] = 1
    outputs: torch.Tensor = bare.forward(units)
    return outputs.float().t()


def give_forward_back(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a module compute by the `forward` that it had before another took its place."""
    vars(module).pop("forward", None)
    if getattr(forward, "__func__", None) is not type(module).forward:
        module.forward = forward  # accelerate's own wrapper, an attribute of the instance too
