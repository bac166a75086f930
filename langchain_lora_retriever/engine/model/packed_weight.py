"""What stands in a module in place of a weight that has been packed for faster products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PackedWeight"]


class PackedWeight(nn.Parameter):
    """Stands where a module's weight was: it tells what that was, and has no numbers.

    Raises:
        RuntimeError: From every computation with it.
    """

    _read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, weight: torch.Tensor, read: Callable[[], torch.Tensor]) -> PackedWeight:
        """Stand for a weight whose numbers `read` gives."""
        nothing = weight.new_full((1,), math.nan).expand(weight.shape)
        made: PackedWeight = torch.Tensor._make_subclass(cls, nothing)  # noqa: SLF001 - as nn.Parameter makes itself
        made._read = read
        return made

    def dense(self) -> torch.Tensor:
        """A copy of the numbers, `[out_features, in_features]`."""
        return self._read()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what is asked of it, and refuse the rest."""
        if func not in _TOLD:
            raise RuntimeError(
                f"{getattr(func, '__name__', func)} of a weight that an engine has packed for as long as it serves the "
                "model. Close the engine first, or use a copy of the model made before."
            )
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as Tensor does
            return func(*args, **(kwargs or {}))


_GETTERS = (
    "shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad", "grad", "grad_fn", "is_leaf",
    "is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mkldnn",
)  # fmt: skip
_TOLD = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _GETTERS]
    + [getattr(torch.Tensor, name) for name in ("size", "numel", "nelement", "dim", "element_size", "__hash__",
                                                "is_floating_point", "is_complex", "requires_grad_")]
)  # fmt: skip
