"""The adapters' tensors for one group of projections that share an input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_retriever_kernels.lora.dense import gather

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_retriever_kernels.lora.rows import LoraRows


def check_finite(index: int, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype) -> None:
    """Refuse weights that would not be finite as rows: the tokens of a tile multiply each other's rows by 0.

    Args:
        index: Slice, for the error's text.
        lora_a: `[r, in_features]`.
        lora_b: `[out_features, r]`.
        scaling: What `lora_b` is multiplied with, in fp32.
        dtype: Of the rows.

    Raises:
        ValueError: If one of them, or `lora_b` times `scaling`, is NaN or beyond the largest number of `dtype`.
    """
    limit, widest = torch.finfo(dtype).max, torch.finfo(torch.float32).max
    largest_a, largest_b = (max(map(abs, (float(x) for x in torch.aminmax(t)))) for t in (lora_a, lora_b))
    # Written so that NaN fails.
    if not (
        largest_a <= limit and largest_b <= widest and abs(scaling) <= widest and largest_b * abs(scaling) <= limit
    ):
        raise ValueError(
            f"slice {index}: the largest of lora_A is {largest_a:.3g}, of lora_B {largest_b:.3g}, which times the "
            f"scaling {scaling:.3g} is {largest_b * abs(scaling):.3g}; {dtype} goes up to {limit:.3g}"
        )


class LoraStack:
    """All adapters' A and B for projections that share an input (q/k/v, gate/up, or one linear layer).

    Semantics:
        Slice `i` of the adapter in slot `s`, with `lo = rows.starts[s]` and `r = ranks[s, i]`, has
        `A = a[i, lo : lo + r]` (`[r, in_features]`) and `B.T = b[lo : lo + r, slice i]` (`[r, out_features[i]]`,
        the scaling already folded in). The slices' outputs lie side by side in `b` and in `y`.

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
        self.a = torch.zeros(len(self.out_features), num_rows, in_features, dtype=dtype, device=rows.device)
        self.b = torch.zeros(num_rows, sum(self.out_features), dtype=dtype, device=rows.device)
        self.ranks = torch.zeros(rows.max_loras, len(self.out_features), dtype=torch.int32, device=rows.device)
        self._gathered: tuple[tuple[object, ...], torch.Tensor, torch.Tensor] | None = None

    @property
    def num_slices(self) -> int:
        """Number of projections in the group."""
        return len(self.out_features)

    @property
    def in_features(self) -> int:
        """Width of the shared input."""
        return self.a.shape[2]

    def load(
        self,
        slot: int,
        start: int,
        weights: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None],
    ) -> None:
        """Copy one adapter's tensors into rows `start : start + rank`.

        `rows.assign(slot, start, ...)` must be called as well, before or after, once for all stacks. What is written is
        finite; so are all rows of a pool that begins with zeros, whoever had them.

        Args:
            slot: Adapter slot.
            start: First row, the same as in `rows.assign`.
            weights: For each slice `(lora_A [r, in_features], lora_B [out_features, r], scaling)`, any float
                dtype and device; None where the adapter lacks the module.

        Raises:
            ValueError: If the number of slices or a shape does not fit, or weights are not finite in the stack's dtype.
        """
        if len(weights) != self.num_slices:
            raise ValueError(f"expected weights for {self.num_slices} slices, got {len(weights)}")
        ranks = [0] * self.num_slices
        offset = 0
        for i, (width, entry) in enumerate(zip(self.out_features, weights, strict=True)):
            if entry is not None:
                lora_a, lora_b, scaling = entry
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
                check_finite(i, lora_a, lora_b, scaling, self.a.dtype)
                # Scaled in fp32, rounded once.
                scaled = lora_b.to(device=self.b.device, dtype=torch.float32) * scaling
                self.a[i, start : start + rank].copy_(lora_a)
                self.b[start : start + rank, offset : offset + width].copy_(scaled.t())
                ranks[i] = rank
            offset += width
        self.ranks[slot] = torch.tensor(ranks, dtype=torch.int32)

    def unload(self, slot: int) -> None:
        """Forget the adapter in `slot`; its rows' content stays until overwritten and is never read."""
        self.ranks[slot] = 0

    def gather(self, key: tuple[object, ...], slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the rows of `slots` side by side, once per `key` (see `dense.gather`)."""
        if self._gathered is None or self._gathered[0] != key:
            rows = self.rows
            self._gathered = (
                key,
                *gather(self.a, self.b, self.ranks, rows.starts, rows.counts, self.out_features, slots),
            )
        return self._gathered[1], self._gathered[2]
