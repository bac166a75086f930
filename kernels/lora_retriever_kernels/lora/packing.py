"""An adapter as one tensor: one copy brings it to the device, one launch from there into the stacks."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from lora_retriever_kernels.lora.stack import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal, TypeAlias

    from lora_retriever_kernels.lora.stack import LoraStack

    Weights: TypeAlias = "tuple[torch.Tensor, torch.Tensor, float] | None"


class LoraPacking:
    """How an adapter of `rank` rows lies in a flat tensor of `rank * row_size` elements.

    Semantics:
        Slice by slice, in the order of the stacks and of the slices in each, there is room for `rank` rows of A
        `[rank, in_features]` and then of B `[out_features, rank]`. A slice of rank r <= `rank` fills the beginning of
        each with its A `[r, in_features]` and its B `[out_features, r]`, as PEFT keeps them; the rest is never read.
        So packing is copying, and scaling and transposing B is left to the device.

    Args:
        stacks: All stacks of a model, of one row map, dtype and device.
        backend: "triton" or "torch"; by default Triton on a GPU that has it, else PyTorch.

    Attributes:
        row_size: Elements per rank row.
        num_slices: Slices of all stacks.

    Raises:
        ValueError: If the stacks differ in row map or dtype, or the backend is unknown.
    """

    def __init__(self, stacks: Sequence[LoraStack], backend: Literal["torch", "triton"] | None = None) -> None:
        if len({(id(stack.rows), stack.a.dtype) for stack in stacks}) != 1:
            raise ValueError("stacks must be at least one, and share one LoraRows and one dtype")
        self._stacks = tuple(stacks)
        self._rows = stacks[0].rows
        self.dtype = stacks[0].a.dtype
        self.device = stacks[0].a.device
        self._limit = torch.finfo(self.dtype).max
        if backend is None:
            has_triton = importlib.util.find_spec("triton") is not None
            backend = "triton" if has_triton and self.device.type == "cuda" else "torch"
        if backend not in {"torch", "triton"}:
            raise ValueError(f'backend must be "torch" or "triton", got {backend!r}')
        self._widths = [(stack.in_features, width) for stack in stacks for width in stack.out_features]
        self.num_slices = len(self._widths)
        self.row_size = sum(map(sum, self._widths))
        self._table = self._make_table() if backend == "triton" else None

    def pack(self, rank: int, weights: Sequence[Weights], flat: torch.Tensor) -> None:
        """Write an adapter into `flat`.

        Args:
            rank: Rows it takes, at least its largest rank.
            weights: For each slice `(lora_A [r, in_features], lora_B [out_features, r], scaling)`, any float dtype, on
                the CPU; None where the adapter lacks the module.
            flat: `[rank * row_size]`, the stacks' dtype, on the CPU; mutated.

        Raises:
            ValueError: If a shape does not fit, or weights are not finite in the stacks' dtype.
        """
        self._check(rank, flat, len(weights))
        for (a, b), (num_in, num_out), entry in zip(self._pieces(rank, flat), self._widths, weights, strict=True):
            if entry is None:
                continue
            lora_a, lora_b, scaling = entry
            r = lora_a.shape[0]
            if r > rank or tuple(lora_a.shape) != (r, num_in) or tuple(lora_b.shape) != (num_out, r):
                raise ValueError(
                    f"expected lora_A [r, {num_in}] and lora_B [{num_out}, r] with r up to {rank}, got "
                    f"{list(lora_a.shape)} and {list(lora_b.shape)}"
                )
            a[: r * num_in].view(r, num_in).copy_(lora_a)
            # Whatever must be rounded is scaled before, so that it is rounded once, as `LoraStack.load` does.
            lora_b = lora_b if lora_b.dtype == self.dtype else lora_b.float() * scaling
            b[: r * num_out].view(num_out, r).copy_(lora_b)
        self._check_finite(weights, flat)

    def load(self, slot: int, start: int, rank: int, weights: Sequence[Weights], flat: torch.Tensor) -> None:
        """Copy an adapter from `flat` into rows `start : start + rank` of the stacks and point `slot` at them.

        Nothing waits for the device: what was launched before on the current stream still sees the old rows.

        Args:
            slot: Adapter slot.
            start: First row.
            rank: Rows, as for `pack`.
            weights: What was packed; only its shapes, dtypes and scalings are read.
            flat: `[rank * row_size]` as `pack` wrote it, on the stacks' device.

        Raises:
            ValueError: If `slot`, `start` or a size is out of range.
        """
        self._check(rank, flat, len(weights))
        num_rows = self._stacks[0].a.shape[1]
        if start + rank > num_rows:
            raise ValueError(f"rows {start}..{start + rank - 1} exceed the pool of {num_rows} rows")
        self._rows.assign(slot, start, rank)
        ranks = [0 if entry is None else entry[0].shape[0] for entry in weights]
        scales = [1.0 if entry is None or entry[1].dtype != self.dtype else entry[2] for entry in weights]
        if self._table is None:
            self._load_torch(slot, start, rank, ranks, scales, flat)
            return
        from lora_retriever_kernels.lora.unpack import unpack  # noqa: PLC0415 - needs Triton

        values = torch.tensor([ranks, scales], dtype=torch.float32)
        if self.device.type == "cuda":
            values = values.pin_memory().to(self.device, non_blocking=True)
        unpack(flat, self._table, values, slot, start, rank, *map(max, zip(*self._widths, strict=True)))

    def _check(self, rank: int, flat: torch.Tensor, num_slices: int) -> None:
        if num_slices != self.num_slices:
            raise ValueError(f"expected weights for {self.num_slices} slices, got {num_slices}")
        if flat.dtype != self.dtype or tuple(flat.shape) != (rank * self.row_size,) or not flat.is_contiguous():
            raise ValueError(
                f"flat must be contiguous {self.dtype} [{rank * self.row_size}], got {flat.dtype} {list(flat.shape)}"
            )

    def _check_finite(self, weights: Sequence[Weights], flat: torch.Tensor) -> None:
        """One look at all of it nearly always does. Where slices lack rows it meets leftovers as well."""
        entries = [(index, entry) for index, entry in enumerate(weights) if entry is not None]
        if not entries:
            return
        largest = max(abs(float(x)) for x in torch.aminmax(flat))
        if not largest * max(1.0, *(abs(scaling) for _, (_, _, scaling) in entries)) <= self._limit:
            for index, (lora_a, lora_b, scaling) in entries:
                check_finite(index, lora_a, lora_b, scaling, self.dtype)

    def _load_torch(
        self, slot: int, start: int, rank: int, ranks: Sequence[int], scales: Sequence[float], flat: torch.Tensor
    ) -> None:
        pieces = self._pieces(rank, flat)
        entries = iter(zip(ranks, scales, strict=True))
        for stack in self._stacks:
            parts = stack.b.split(stack.out_features, 1)
            for index, (width, part) in enumerate(zip(stack.out_features, parts, strict=True)):
                (a, b), (r, scale) = next(pieces), next(entries)
                rows = slice(start, start + r)
                stack.a[index, rows] = a[: r * stack.in_features].view(r, stack.in_features)
                part[rows] = (b[: r * width].view(width, r).float() * scale).t().to(self.dtype)
                stack.ranks[slot, index] = r

    def _pieces(self, rank: int, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Room for A and for B of each slice."""
        parts = flat.split([rank * width for widths in self._widths for width in widths])
        return zip(parts[::2], parts[1::2], strict=True)

    def _make_table(self) -> torch.Tensor:
        """Where the slices lie, `[num_slices, 8]`, int64, as `unpack` reads it."""
        table = []
        offset = 0
        for stack in self._stacks:
            column = 0
            for index, width in enumerate(stack.out_features):
                addresses = stack.a[index].data_ptr(), stack.b[:, column:].data_ptr(), stack.ranks[:, index:].data_ptr()
                table.append((*addresses, stack.in_features, width, stack.b.stride(0), stack.ranks.stride(0), offset))
                offset += stack.in_features + width
                column += width
        return torch.tensor(table, dtype=torch.int64, device=self.device)
