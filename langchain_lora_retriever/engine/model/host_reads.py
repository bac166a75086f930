"""Notice where a model and the host ask each other for numbers within a step: what a CUDA graph cannot hold."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostReads"]

_READS = frozenset(
    {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive",
     "unique_dim", "grouped_mm_fallback"}
)  # fmt: skip
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


class HostReads(TorchDispatchMode):
    """While it is entered, notes the operations whose results the host waits for, and copies of tensors of the host's.

    On the meta device, where there are no numbers, such an operation gives zero, False, or nothing at all, so that a
    model can be followed without weights.

    Attributes:
        names: The operations met, by their names in ATen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation, and run it."""
        name = func._schema.name.split("::")[1]  # noqa: SLF001 - an operator says its name nowhere else
        output = _run(name, func, args, kwargs or {})
        if name in _READS or (name in _INDEXING and _has_mask(args)) or _is_upload(name, args, output):
            self.names.add(name)
        return output


def _run(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation, or say what it gives where there are no numbers."""
    tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
    if tensor is None or not tensor.is_meta:
        return func(*args, **kwargs)
    if name in {"_local_scalar_dense", "is_nonzero"}:
        return torch.zeros((), dtype=tensor.dtype, device="cpu").item()
    if name == "equal":
        return False
    if name == "nonzero":
        return tensor.new_empty((0, tensor.dim()), dtype=torch.int64)
    if name == "_grouped_mm":  # which knows bfloat16 alone there
        return tensor.new_empty((tensor.shape[0], args[1].shape[-1]))
    if name == "histc":
        return tensor.new_empty(kwargs["bins"] if "bins" in kwargs else args[1])
    return func(*args, **kwargs)


def _has_mask(args: Any) -> bool:
    """Whether an indexing operation is by a mask: how many elements that picks is not known on the host."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


def _is_upload(name: str, args: Any, output: Any) -> bool:
    """Whether a tensor of the host's was copied to another device; it is not page-locked."""
    if name not in {"to", "_to_copy", "copy_"}:
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, torch.Tensor) and source.device.type == "cpu" != output.device.type
