"""Adapters in one piece, as device memory wants them: one copy brings a whole adapter to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lora_retriever_kernels.lora import LoraPacking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from langchain_lora_retriever.types import Adapter
    from lora_retriever_kernels.lora import LoraSlice, LoraStack

__all__ = ["AdapterPacking", "AdapterSlices"]


class AdapterSlices(Protocol):
    """How adapters' weights are held in rows; `LoraLayers` in the engine."""

    def slices(self, adapter: Adapter) -> dict[str, LoraSlice]:
        """An adapter's weights by module; its file is read."""

    def slice_shapes(self, adapter: Adapter) -> dict[str, LoraSlice]:
        """The same for shapes, dtypes and scalings alone; nothing is read."""


class AdapterPacking:
    """How adapters of a model lie in flat tensors: `LoraPacking`, by the modules' names.

    Args:
        stacks: Names of the modules of every stack, and the stack; all of one dtype and device.
        layers: Whose stacks they are.

    Attributes:
        row_size: Elements of one rank.
        dtype: Of the stacks.
        device: Of the stacks.
    """

    def __init__(self, stacks: Sequence[tuple[tuple[str, ...], LoraStack]], layers: AdapterSlices) -> None:
        self._names = [name for names, _ in stacks for name in names]
        self._layers = layers
        self._packing = LoraPacking([stack for _, stack in stacks])
        self.row_size = self._packing.row_size
        self.dtype = self._packing.dtype
        self.device = self._packing.device

    @classmethod
    def of(cls, stacks: Sequence[tuple[tuple[str, ...], LoraStack]], layers: AdapterSlices) -> AdapterPacking | None:
        """The packing of `stacks`; None if they differ in dtype or device, so that one copy could not serve all."""
        if len({(stack.b.dtype, stack.b.device) for _, stack in stacks}) != 1:
            return None
        return cls(stacks, layers)

    def size(self, adapter: Adapter) -> int:
        """Elements of an adapter, packed: at most `adapter.num_rows * row_size`."""
        return self._packing.size(adapter.num_rows, self._by_name(self._layers.slice_shapes(adapter)))

    def pack(self, adapter: Adapter, flat: torch.Tensor) -> None:
        """Write an adapter that `AdapterFit` has let pass into `flat` `[size(adapter)]` on the host.

        Raises:
            AdapterError: If its file is not the one that was read any more.
        """
        self._packing.pack(adapter.num_rows, self._by_name(self._layers.slices(adapter)), flat)

    def load(self, slot: int, start: int, adapter: Adapter, flat: torch.Tensor) -> None:
        """Give an adapter that was packed, and is on the device, its rows; in the order of the current stream.

        Args:
            slot: Adapter slot.
            start: First row.
            adapter: The adapter.
            flat: What `pack` wrote, on the stacks' device.
        """
        shapes = self._by_name(self._layers.slice_shapes(adapter))
        self._packing.load(slot, start, adapter.num_rows, shapes, flat)

    def _by_name(self, slices: Mapping[str, LoraSlice]) -> list[LoraSlice | None]:
        return [slices.get(name) for name in self._names]
