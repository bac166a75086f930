"""Which rank rows belong to which adapter slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


class LoraRows:
    """The map from adapter slots to rank rows, shared by every `LoraStack` of a model.

    Device memory for adapters is a pool of rank rows. The adapter in slot `s` owns the contiguous rows
    `starts[s] : starts[s] + counts[s]` of every stack, so ranks are stored true. Who allocates the rows is the
    caller's business; this class records the result on the device.

    Args:
        max_loras: Number of adapter slots.
        max_rank: Largest number of rows one adapter may own, 1 to 256.
        device: Where the stacks and batches live.

    Attributes:
        starts: First row of each slot, `[max_loras]`, int32.
        counts: Rows of each slot, `[max_loras]`, int32; 0 = the slot is empty.
        gains: The row of `LoraStack.b` that holds each slot's gains less one, `[max_loras]`, int32; -1 = it has none.
        version: Grows with every change, so that what was derived from a slot's weights can be told stale.

    Raises:
        ValueError: If `max_loras` or `max_rank` is out of range.
    """

    def __init__(self, max_loras: int, max_rank: int, device: torch.device | str = "cpu") -> None:
        if max_loras < 1:
            raise ValueError(f"max_loras must be at least 1, got {max_loras}")
        if not 1 <= max_rank <= 256:
            raise ValueError(f"max_rank must lie in 1..256, got {max_rank}")
        self.max_loras = max_loras
        self.max_rank = max_rank
        self.device = torch.device(device)
        self.starts = torch.zeros(max_loras, dtype=torch.int32, device=device)
        self.counts = torch.zeros(max_loras, dtype=torch.int32, device=device)
        self.gains = torch.full((max_loras,), -1, dtype=torch.int32, device=device)
        self.version = 0
        self._host_counts: dict[int, int] = {}
        self._gained: set[int] = set()  # slots that have gains

    @property
    def num_used(self) -> int:
        """Slots that hold an adapter."""
        return len(self._host_counts)

    @property
    def rank_bound(self) -> int:
        """What launch shapes are made for by default: the power of two, at least 16, that no adapter's rows exceed."""
        return self.bound(max(self._host_counts.values(), default=1))

    def bound(self, rank: int) -> int:
        """The power of two, at least 16 and at most what fits, that is not below `rank`."""
        return min(self.max_rank, max(16, 1 << (rank - 1).bit_length()))

    def highest_rank(self, slots: Iterable[int]) -> int:
        """Most rows of any of these slots; 1 if there are none."""
        return max((self._host_counts.get(slot, 1) for slot in slots), default=1)

    def have_gains(self, slots: Iterable[int] | None = None) -> bool:
        """Whether any of these slots has gains; by default whether any has."""
        return bool(self._gained) if slots is None else not self._gained.isdisjoint(slots)

    def assign(self, slot: int, start: int, count: int, gain: int = -1) -> None:
        """Give `slot` the rows `start : start + count`. Call it whenever the slot's weights change.

        Args:
            slot: Adapter slot.
            start: First row.
            count: Number of rows, 0 to `max_rank`; 0 empties the slot.
            gain: The row of its gains, outside of these; -1 = none.

        Raises:
            ValueError: If an argument is out of range.
        """
        if not 0 <= slot < self.max_loras:
            raise ValueError(f"slot must lie in 0..{self.max_loras - 1}, got {slot}")
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        if not 0 <= count <= self.max_rank:
            raise ValueError(f"count must lie in 0..{self.max_rank} (max_rank), got {count}")
        self.starts[slot].fill_(start)  # an assignment would copy from the host, and wait for the device
        self.counts[slot].fill_(count)
        self.gains[slot].fill_(gain)
        self._host_counts.pop(slot, None)
        self._gained.discard(slot)
        if gain >= 0:
            self._gained.add(slot)
        if count:
            self._host_counts[slot] = count
        self.version += 1

    def release(self, slot: int) -> None:
        """Empty `slot`; its rows may be given to another.

        Raises:
            ValueError: If `slot` is out of range.
        """
        self.assign(slot, 0, 0)
