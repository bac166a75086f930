"""Adapters in one piece, as device memory wants them: one copy brings a whole adapter to the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.upload import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.types import Adapter
    from lora_kernels import LoraStack

__all__ = ["AdapterPacking"]


class AdapterPacking:
    """How an adapter of rank r lies in a flat tensor.

    Semantics:
        For each stack in order, each slice's A `[r, in_features]`, then all slices' B `[r, sum(out_features)]`, scaled,
        transposed and in the stacks' dtype: the bytes that the stacks keep, so that nothing is left to compute.

    Args:
        stacks: Names of the modules of every stack, and the stack; all of one dtype and device.

    Attributes:
        row_size: Elements of one rank.
        dtype: Of the stacks.
        device: Of the stacks.
    """

    def __init__(self, stacks: Sequence[tuple[tuple[str, ...], LoraStack]]) -> None:
        self._stacks = stacks
        self.row_size = sum(stack.num_slices * stack.in_features + sum(stack.out_features) for _, stack in stacks)
        self.dtype = stacks[0][1].b.dtype
        self.device = stacks[0][1].b.device

    @classmethod
    def of(cls, stacks: Sequence[tuple[tuple[str, ...], LoraStack]]) -> AdapterPacking | None:
        """The packing of `stacks`; None if they differ in dtype or device, so that one copy could not serve all."""
        if len({(stack.b.dtype, stack.b.device) for _, stack in stacks}) != 1:
            return None
        return cls(stacks)

    def pack(self, adapter: Adapter, flat: torch.Tensor) -> None:
        """Write an adapter into `flat` `[rank * row_size]` on the host; modules and ranks it lacks become zeros.

        Raises:
            KeyError: If it targets a module that no stack has.
            RuntimeError: If a shape does not fit.
        """
        unknown = set(adapter.weights).difference(*(names for names, _ in self._stacks))
        if unknown:
            raise KeyError(f"adapter {adapter.name!r} targets {min(unknown)!r}, which this model does not have")
        pieces = iter(self._pieces(flat, adapter.rank))
        for names, stack in self._stacks:
            weights = [adapter.weights.get(name) for name in names]
            for w in weights:
                a = next(pieces)
                if w is None or w.r < adapter.rank:
                    a.zero_()
                if w is not None:
                    a[: w.r].copy_(w.lora_A)
            b = next(pieces)
            if any(w is None or w.r < adapter.rank for w in weights):
                b.zero_()
            for w, part in zip(weights, b.split(stack.out_features, 1), strict=True):
                if w is not None:  # scaled in fp32, rounded once, as `LoraStack.load` does
                    part[: w.r].copy_((w.lora_B.float() * w.scaling).t())

    def load(self, slot: int, start: int, adapter: Adapter, flat: torch.Tensor) -> None:
        """Give an adapter that was packed, and is on the device, its rows; in the order of the current stream.

        Args:
            slot: Adapter slot.
            start: First row.
            adapter: The adapter.
            flat: What `pack` wrote, on the stacks' device.
        """
        for rows in {id(stack.rows): stack.rows for _, stack in self._stacks}.values():
            rows.assign(slot, start, adapter.rank)
        end = start + adapter.rank
        targets = [
            piece for _, stack in self._stacks for piece in (*(a[start:end] for a in stack.a), stack.b[start:end])
        ]
        torch._foreach_copy_(targets, self._pieces(flat, adapter.rank))
        found = [adapter.weights.get(name) for names, _ in self._stacks for name in names]
        ranks = upload([0 if w is None else w.r for w in found], torch.int32, self.device)
        sizes = [stack.num_slices for _, stack in self._stacks]
        torch._foreach_copy_([stack.ranks[slot] for _, stack in self._stacks], list(ranks.split(sizes)))

    def _pieces(self, flat: torch.Tensor, rank: int) -> list[torch.Tensor]:
        sizes = [
            rank * width
            for _, stack in self._stacks
            for width in (*[stack.in_features] * stack.num_slices, sum(stack.out_features))
        ]
        return [piece.view(rank, -1) for piece in flat.split(sizes)]
