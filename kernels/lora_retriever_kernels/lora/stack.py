"""The adapters' tensors for one group of projections that share an input."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_retriever_kernels.host_memory import lazy_zeros
from lora_retriever_kernels.lora.dense import Adapters, Gathered, gather

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypeAlias

    from lora_retriever_kernels.lora.rows import LoraRows

    Slice: TypeAlias = "LoraSlice | tuple[torch.Tensor, torch.Tensor, float]"


class LoraSlice(NamedTuple):
    """One adapter's weights of one projection; a plain tuple of the first three will do.

    Attributes:
        lora_a: `[r, in_features]`, any float dtype and device.
        lora_b: `[out_features, r]`, likewise.
        scaling: What `lora_b` is multiplied with.
        gain: What the outputs themselves are multiplied with, `[out_features]`: of DoRA, whose scaled `lora_b` it
            multiplies too. None leaves them as they are.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    gain: torch.Tensor | None = None

    def scaled_b(self, device: torch.device | None = None) -> torch.Tensor:
        """`lora_b` times scaling and gain, `[out_features, r]`, fp32, where it is or on another device."""
        scaled = self.lora_b.to(device=device, dtype=torch.float32) * self.scaling
        return scaled if self.gain is None else scaled * self.gain.to(scaled)[:, None]


def as_slices(weights: Sequence[Slice | None]) -> list[LoraSlice | None]:
    """The same with plain tuples made `LoraSlice`."""
    return [None if entry is None else LoraSlice(*entry) for entry in weights]


def check_finite(index: int, entry: LoraSlice, dtype: torch.dtype) -> None:
    """Refuse weights that would not be finite as rows: the tokens of a tile multiply each other's rows by 0.

    Args:
        index: Slice, for the error's text.
        entry: The weights.
        dtype: Of the rows.

    Raises:
        ValueError: If one of them, or `lora_b` times scaling and gain, is NaN or beyond the largest number of `dtype`.
    """
    limit, widest = torch.finfo(dtype).max, torch.finfo(torch.float32).max
    scaling = entry.scaling
    largest_a, largest_b = (_largest(t) for t in (entry.lora_a, entry.lora_b))
    # Written so that NaN fails.
    if not (
        largest_a <= limit and largest_b <= widest and abs(scaling) <= widest and largest_b * abs(scaling) <= limit
    ):
        raise ValueError(
            f"slice {index}: the largest of lora_A is {largest_a:.3g}, of lora_B {largest_b:.3g}, which times the "
            f"scaling {scaling:.3g} is {largest_b * abs(scaling):.3g}; {dtype} goes up to {limit:.3g}"
        )
    if entry.gain is not None:
        gain, gained = _largest(entry.gain), _largest(entry.scaled_b())
        if not (gain + 1 <= limit and gained <= limit):
            raise ValueError(
                f"slice {index}: the largest gain is {gain:.3g}, and times lora_B and scaling {gained:.3g}; {dtype} "
                f"goes up to {limit:.3g}"
            )


def _largest(tensor: torch.Tensor) -> float:
    """The largest absolute value; infinite if one is NaN."""
    low, high = (float(x) for x in torch.aminmax(tensor))
    return max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf


class LoraStack:
    """All adapters' A and B for projections that share an input (q/k/v, gate/up, or one linear layer).

    Semantics:
        Slice `i` of the adapter in slot `s`, with `lo = rows.starts[s]` and `r = ranks[s, i]`, has
        `A = a[i, lo : lo + r]` (`[r, in_features]`) and `B.T = b[lo : lo + r, slice i]` (`[r, out_features[i]]`,
        the scaling already folded in). The slices' outputs lie side by side in `b` and in `y`. Where
        `rows.gains[s] >= 0`, that row of `b` holds `g - 1`, the gains less one, and zeros where the adapter lacks the
        module; the gains are folded into B.

    Args:
        rows: The row map that all stacks of a model share.
        num_rows: Size of the pool of rank rows.
        in_features: Width of the shared input.
        out_features: Output width of each slice.
        dtype: bf16, fp16 or fp32.

    Attributes:
        a: `[num_slices, num_rows, in_features]`.
        b: `[num_rows, sum(out_features)]`.
        ranks: `[max_loras, num_slices]`, int32; 0 = the adapter lacks this module. At most `rows.counts[s]`.

    Raises:
        ValueError: If a size or the dtype is not supported.
    """

    def __init__(
        self,
        rows: LoraRows,
        num_rows: int,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in {torch.bfloat16, torch.float16, torch.float32}:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
        if num_rows < 1 or in_features < 1 or not out_features or min(out_features) < 1:
            raise ValueError(
                "num_rows, in_features and every out_features must be at least 1, got "
                f"{num_rows}, {in_features} and {tuple(out_features)}"
            )
        self.rows = rows
        self.out_features = tuple(out_features)
        self.a = lazy_zeros((len(self.out_features), num_rows, in_features), dtype=dtype, device=rows.device)
        self.b = lazy_zeros((num_rows, sum(self.out_features)), dtype=dtype, device=rows.device)
        self.ranks = torch.zeros(rows.max_loras, len(self.out_features), dtype=torch.int32, device=rows.device)
        self._users: set[int] = set()
        self._gathered: tuple[tuple[object, ...], Gathered] | None = None

    @property
    def num_slices(self) -> int:
        """Number of projections in the group."""
        return len(self.out_features)

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.a.shape[2]

    def load(self, slot: int, start: int, weights: Sequence[Slice | None], gain: int = -1) -> None:
        """Copy one adapter's tensors into rows `start : start + rank`.

        `rows.assign(slot, start, ..., gain)` must be called as well, before or after, once for all stacks. What is
        written is finite; so are all rows of a pool that begins with zeros, whoever had them.

        Args:
            slot: Adapter slot.
            start: First row, the same as in `rows.assign`.
            weights: For each slice `LoraSlice` or a tuple of its first fields; None where the adapter lacks the module.
            gain: The row of the gains, the same as in `rows.assign`; -1 where no slice of any stack has them.

        Raises:
            ValueError: If the number of slices or a shape does not fit, or weights are not finite in the stack's dtype.
        """
        if len(weights) != self.num_slices:
            raise ValueError(f"expected weights for {self.num_slices} slices, got {len(weights)}")
        entries = as_slices(weights)
        ranks = [0] * self.num_slices
        if gain >= 0:
            self.b[gain] = 0
        offset = 0
        for i, (width, entry) in enumerate(zip(self.out_features, entries, strict=True)):
            if entry is not None:
                rank = self._check(i, start, width, entry, gain)
                self.a[i, start : start + rank].copy_(entry.lora_a)
                # Scaled in fp32, rounded once.
                self.b[start : start + rank, offset : offset + width].copy_(entry.scaled_b(self.b.device).t())
                if entry.gain is not None:
                    self.b[gain, offset : offset + width].copy_(entry.gain.float() - 1)
                ranks[i] = rank
            offset += width
        self.ranks[slot] = torch.tensor(ranks, dtype=torch.int32)
        self.note_user(slot, is_one=any(ranks))

    def _check(self, i: int, start: int, width: int, entry: LoraSlice, gain: int) -> int:
        """The rank of a slice whose shapes and numbers fit."""
        lora_a, lora_b = entry.lora_a, entry.lora_b
        rank = lora_a.shape[0]
        if tuple(lora_a.shape) != (rank, self.in_features) or tuple(lora_b.shape) != (width, rank):
            raise ValueError(
                f"slice {i}: expected lora_A [r, {self.in_features}] and lora_B [{width}, r], got "
                f"{list(lora_a.shape)} and {list(lora_b.shape)}"
            )
        if rank > self.rows.max_rank or start + rank > self.a.shape[1]:
            raise ValueError(
                f"slice {i}: rank {rank} at row {start} exceeds max_rank {self.rows.max_rank} or the pool of "
                f"{self.a.shape[1]} rows"
            )
        if entry.gain is not None and (gain < 0 or tuple(entry.gain.shape) != (width,)):
            raise ValueError(
                f"slice {i}: expected a gain [{width}] and a row for it, got {list(entry.gain.shape)} and row {gain}"
            )
        check_finite(i, entry, self.a.dtype)
        return rank

    def is_used_by(self, slots: Iterable[int]) -> bool:
        """Whether the adapter in any of these slots has a module of this group, as far as the host knows."""
        return not self._users.isdisjoint(slots)

    def note_user(self, slot: int, *, is_one: bool) -> None:
        """Say whether the adapter in `slot` has a module of this group; for those who write `ranks` themselves."""
        (self._users.add if is_one else self._users.discard)(slot)

    def unload(self, slot: int) -> None:
        """Forget the adapter in `slot`; its rows' content stays until overwritten and is never read."""
        self.ranks[slot] = 0
        self.note_user(slot, is_one=False)

    def release(self) -> None:
        """Give the memory back, whoever still holds the stack: it has no rows any more, and nothing can be loaded."""
        self.a, self.b = self.a[:, :0].clone(), self.b[:0].clone()
        self._gathered = None

    @property
    def adapters(self) -> Adapters:
        """Its tensors, as the PyTorch path takes them."""
        rows = self.rows
        return Adapters(self.a, self.b, self.ranks, rows.starts, rows.counts, self.out_features)

    def gather(self, key: tuple[object, ...], slots: Sequence[int]) -> Gathered:
        """Copy the rows of `slots` side by side, once per `key` (see `dense.gather`)."""
        if self._gathered is None or self._gathered[0] != key:
            self._gathered = None  # not beside the next
            self._gathered = (key, gather(self.adapters, slots))
        return self._gathered[1]
