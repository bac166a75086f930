"""An adapter as one tensor: one copy brings it to the device, one launch from there into the stacks."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from lora_retriever_kernels.lora.stack import as_slices, check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Literal, TypeAlias

    from lora_retriever_kernels.lora.stack import LoraSlice, LoraStack, Slice

    Weights: TypeAlias = "Slice | None"


class LoraPacking:
    """How an adapter of `rank` rows lies in a flat tensor of at most `rank * row_size` elements.

    Semantics:
        Slice by slice, in the order of the stacks and of the slices in each, there is room for `rank` rows of A
        `[rank, in_features]` and then of B `[out_features, rank]`. A slice of rank r <= `rank` fills the beginning of
        each with its A `[r, in_features]` and its B `[out_features, r]`, as PEFT keeps them; the rest is never read.
        So packing is copying, and scaling and transposing B is left to the device. An adapter with gains has a row more
        than its rank: the last row of a slice's B holds the slice's gains less one, which its B is multiplied with
        already; on the device they take the first row. What lies behind the last slice that an adapter has is left out.

    Args:
        stacks: All stacks of a model, of one row map, dtype and device.
        backend: "triton" or "torch"; by default Triton on a GPU that has it, else PyTorch.

    Attributes:
        row_size: Elements per rank row of an adapter that has all slices.
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

    def size(self, rank: int, weights: Sequence[Weights]) -> int:
        """Elements of a packed adapter: up to the last slice that it has."""
        return self._size(rank, self._num_used(weights))

    def _size(self, rank: int, num_used: int) -> int:
        return rank * sum(map(sum, self._widths[:num_used]))

    def pack(self, rank: int, weights: Sequence[Weights], flat: torch.Tensor) -> None:
        """Write an adapter into `flat`.

        Args:
            rank: Rows it takes, at least its largest rank, and one more if it has gains.
            weights: For each slice `LoraSlice` or a tuple of its first fields, on the CPU; None where the adapter lacks
                the module.
            flat: `[size(rank, weights)]`, the stacks' dtype, on the CPU; mutated.

        Raises:
            ValueError: If a shape does not fit, or weights are not finite in the stacks' dtype.
        """
        num_used = self._check(rank, weights, flat)
        entries = as_slices(weights)
        num_ranks = rank - _have_gains(entries)
        pieces = self._pieces(rank, flat, num_used)
        for (a, b), (num_in, num_out), entry in zip(pieces, self._widths, entries, strict=False):
            if entry is None:
                continue
            lora_a, lora_b = entry.lora_a, entry.lora_b
            r = lora_a.shape[0]
            if r > num_ranks or tuple(lora_a.shape) != (r, num_in) or tuple(lora_b.shape) != (num_out, r):
                raise ValueError(
                    f"expected lora_A [r, {num_in}] and lora_B [{num_out}, r] with r up to {num_ranks}, got "
                    f"{list(lora_a.shape)} and {list(lora_b.shape)}"
                )
            a[: r * num_in].view(r, num_in).copy_(lora_a)
            # Whatever must be rounded is scaled before, so that it is rounded once, as `LoraStack.load` does.
            b[: r * num_out].view(num_out, r).copy_(entry.scaled_b() if self._is_scaled_here(entry) else lora_b)
            if entry.gain is not None:
                b[num_ranks * num_out :].copy_(entry.gain.float() - 1)
        self._check_finite(entries, flat)

    def load(self, slot: int, start: int, rank: int, weights: Sequence[Weights], flat: torch.Tensor) -> None:
        """Copy an adapter from `flat` into rows `start : start + rank` of the stacks and point `slot` at them.

        Nothing waits for the device: what was launched before on the current stream still sees the old rows.

        Args:
            slot: Adapter slot.
            start: First row.
            rank: Rows, as for `pack`.
            weights: What was packed; only its shapes, dtypes and scalings are read, and whether there are gains.
            flat: `[size(rank, weights)]` as `pack` wrote it, on the stacks' device.

        Raises:
            ValueError: If `slot`, `start` or a size is out of range.
        """
        num_used = self._check(rank, weights, flat)
        num_rows = self._stacks[0].a.shape[1]
        if start + rank > num_rows:
            raise ValueError(f"rows {start}..{start + rank - 1} exceed the pool of {num_rows} rows")
        entries = as_slices(weights)
        gain = start if _have_gains(entries) else -1
        first = start + (gain >= 0)
        self._rows.assign(slot, first, rank - (gain >= 0), gain)
        ranks = [0 if entry is None else entry.lora_a.shape[0] for entry in entries]
        self._note_users(slot, ranks, num_used, gain)
        scales = [1.0 if entry is None or self._is_scaled_here(entry) else entry.scaling for entry in entries]
        if self._table is None:
            self._load_torch(slot, first, rank, entries[:num_used], scales, flat, gain)
            return
        from lora_retriever_kernels.lora.unpack import unpack  # noqa: PLC0415 - needs Triton

        has_gains = [float(entry is not None and entry.gain is not None) for entry in entries]
        values = torch.tensor([row[:num_used] for row in (ranks, scales, has_gains)], dtype=torch.float32)
        if self.device.type == "cuda":
            values = values.pin_memory().to(self.device, non_blocking=True)
        widest = map(max, zip(*self._widths[:num_used], strict=True))
        unpack(flat, self._table[:num_used], values, slot, first, rank, *widest, gain=gain)

    def _note_users(self, slot: int, ranks: Sequence[int], num_used: int, gain: int) -> None:
        """Tell each stack whether the slot's adapter uses it; what lies behind its last slice is not written.

        But for its gains: outputs are multiplied by what lies in their row, whoever wrote it.
        """
        index = 0
        for stack in self._stacks:
            end = index + stack.num_slices
            if index >= num_used and stack.is_used_by((slot,)):
                stack.unload(slot)
            if index >= num_used and gain >= 0:
                stack.b[gain].zero_()
            stack.note_user(slot, is_one=any(ranks[index:end]))
            index = end

    def _is_scaled_here(self, entry: LoraSlice) -> bool:
        """Whether B is scaled where it is packed, and not on the device."""
        return entry.lora_b.dtype != self.dtype or entry.gain is not None

    def _check(self, rank: int, weights: Sequence[Weights], flat: torch.Tensor) -> int:
        """How many slices `flat` has room for."""
        if len(weights) != self.num_slices:
            raise ValueError(f"expected weights for {self.num_slices} slices, got {len(weights)}")
        num_used = self._num_used(weights)
        size = self._size(rank, num_used)
        if flat.dtype != self.dtype or tuple(flat.shape) != (size,) or not flat.is_contiguous():
            raise ValueError(f"flat must be contiguous {self.dtype} [{size}], got {flat.dtype} {list(flat.shape)}")
        return num_used

    def _check_finite(self, entries: Sequence[LoraSlice | None], flat: torch.Tensor) -> None:
        """One look at all of it nearly always does. Where slices lack rows it meets leftovers as well."""
        used = [(index, entry) for index, entry in enumerate(entries) if entry is not None]
        if not used:
            return
        largest = max(abs(float(x)) for x in torch.aminmax(flat))
        if not largest * max(1.0, *(abs(entry.scaling) for _, entry in used)) <= self._limit:
            for index, entry in used:
                check_finite(index, entry, self.dtype)

    def _load_torch(
        self,
        slot: int,
        start: int,
        rank: int,
        entries: Sequence[LoraSlice | None],
        scales: Sequence[float],
        flat: torch.Tensor,
        gain: int,
    ) -> None:
        pieces = zip(self._pieces(rank, flat, len(entries)), entries, scales, strict=False)
        for stack in self._stacks:
            parts = stack.b.split(stack.out_features, 1)
            for (index, (width, part)), ((a, b), entry, scale) in zip(
                enumerate(zip(stack.out_features, parts, strict=True)), pieces, strict=False
            ):
                r = 0 if entry is None else entry.lora_a.shape[0]
                rows = slice(start, start + r)
                stack.a[index, rows] = a[: r * stack.in_features].view(r, stack.in_features)
                part[rows] = (b[: r * width].view(width, r).float() * scale).t().to(self.dtype)
                stack.ranks[slot, index] = r
                if gain >= 0:
                    has_gain = entry is not None and entry.gain is not None
                    part[gain] = b[(rank - 1) * width :] if has_gain else 0

    def _num_used(self, weights: Sequence[Weights]) -> int:
        """Slices of the stacks up to the last that an adapter has a slice of."""
        num_used = end = index = 0
        for stack in self._stacks:
            end += stack.num_slices
            if any(entry is not None for entry in weights[index:end]):
                num_used = end
            index = end
        return num_used or self._stacks[0].num_slices

    def _pieces(self, rank: int, flat: torch.Tensor, num_used: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Room for A and for B of each of the first slices."""
        parts = flat.split([rank * width for widths in self._widths[:num_used] for width in widths])
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


def _have_gains(entries: Sequence[LoraSlice | None]) -> bool:
    return any(entry is not None and entry.gain is not None for entry in entries)
