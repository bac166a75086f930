"""Adapters in one piece, as device memory wants them: one copy brings a whole adapter to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_retriever_kernels.lora import LoraPacking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from langchain_lora_retriever.types import Adapter, LoraWeights
    from lora_retriever_kernels.lora import LoraStack

__all__ = ["AdapterPacking"]


class AdapterPacking:
    """How adapters of a model lie in flat tensors: `LoraPacking`, by the modules' names.

    Args:
        stacks: Names of the modules of every stack, and the stack; all of one dtype and device.

    Attributes:
        row_size: Elements of one rank.
        dtype: Of the stacks.
        device: Of the stacks.
    """

    def __init__(self, stacks: Sequence[tuple[tuple[str, ...], LoraStack]]) -> None:
        self._names = [name for names, _ in stacks for name in names]
        self._packing = LoraPacking([stack for _, stack in stacks])
        self.row_size = self._packing.row_size
        self.dtype = self._packing.dtype
        self.device = self._packing.device

    @classmethod
    def of(cls, stacks: Sequence[tuple[tuple[str, ...], LoraStack]]) -> AdapterPacking | None:
        """The packing of `stacks`; None if they differ in dtype or device, so that one copy could not serve all."""
        if len({(stack.b.dtype, stack.b.device) for _, stack in stacks}) != 1:
            return None
        return cls(stacks)

    def pack(self, adapter: Adapter, flat: torch.Tensor) -> None:
        """Write an adapter that `AdapterFit` has let pass into `flat` `[rank * row_size]` on the host.

        Raises:
            AdapterError: If its file is not the one that was read any more.
        """
        self._packing.pack(adapter.rank, self._by_slice(adapter.weights), flat)

    def load(self, slot: int, start: int, adapter: Adapter, flat: torch.Tensor) -> None:
        """Give an adapter that was packed, and is on the device, its rows; in the order of the current stream.

        Args:
            slot: Adapter slot.
            start: First row.
            adapter: The adapter.
            flat: What `pack` wrote, on the stacks' device.
        """
        self._packing.load(slot, start, adapter.rank, self._by_slice(adapter.shapes), flat)

    def _by_slice(self, weights: Mapping[str, LoraWeights]) -> list[tuple[torch.Tensor, torch.Tensor, float] | None]:
        found = (weights.get(name) for name in self._names)
        return [None if w is None else (w.lora_A, w.lora_B, w.scaling) for w in found]
