"""Which adapters are in device memory, where, and which may be evicted.

Device memory for adapters is a range of *rank rows*: one row is one rank index through every adapted module of the
model (a row of each `lora_A`, a column of each `lora_B`). An adapter of rank r takes r adjacent rows, so ranks are
stored true; DoRA takes one more, for what it multiplies outputs by. A slot is an index into the tables that say where
an adapter's rows start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from langchain_lora_retriever.engine.range_allocator import RangeCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.types import Adapter

__all__ = ["AdapterSlots", "SlotStore"]


class SlotStore(Protocol):
    """Where an adapter's tensors go; `StagedStore` in the engine."""

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether these adapters, which are not resident, could be loaded without waiting for a copy to the device."""

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Copy an adapter into rows `start : start + adapter.num_rows` and point `slot` at them."""


@dataclass(slots=True)
class _Resident:
    slot: int
    num_pins: int = 0


class AdapterSlots:
    """An LRU cache of adapters in device memory; those of running requests are pinned.

    Args:
        store: Receives the tensors of an adapter that becomes resident.
        max_loras: Number of slots.
        num_rows: Number of rank rows.
        num_warm_rows: Of these, how many adapters that nobody runs may keep: beyond, they make room for others. None
            lets them keep all.
    """

    def __init__(self, store: SlotStore, *, max_loras: int, num_rows: int, num_warm_rows: int | None = None) -> None:
        self.max_loras = max_loras
        self.num_rows = num_rows
        self.num_hits = 0
        self.num_loads = 0
        self._store = store
        # By fingerprint, as are residents.
        self._rows: RangeCache[str] = RangeCache(num_rows, max_keys=max_loras, warm=num_warm_rows)
        self._residents: dict[str, _Resident] = {}
        self._fingerprint_by_slot: dict[int, str] = {}
        self._free_slots = list(range(max_loras - 1, -1, -1))

    @property
    def num_resident(self) -> int:
        """Adapters in device memory."""
        return len(self._residents)

    @property
    def resident_fingerprints(self) -> list[str]:
        """The adapters in device memory now; any thread may ask."""
        return list(self._residents)

    def is_resident(self, adapter: Adapter) -> bool:
        """Whether an adapter is in device memory now; any thread may ask."""
        return adapter.fingerprint in self._residents

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether `acquire` would not have to wait for a copy from the host; what is missing begins to travel."""
        missing = [adapter for adapter in adapters if not self.is_resident(adapter)]
        return not missing or self._store.are_ready(missing)

    def acquire(self, adapters: Sequence[Adapter]) -> tuple[int, ...] | None:
        """Make adapters resident and pin them.

        Whatever `AdapterFit` allows finds room once nothing else is pinned.

        Returns:
            Their slots, in order, to be given back with `release`; None, with nothing changed, if pinned adapters of
            other requests leave no room.

        Raises:
            Exception: What loading an adapter raises; nothing is pinned then.
        """
        by_fingerprint = {adapter.fingerprint: adapter for adapter in adapters}
        placement = self._rows.put_all(
            {fingerprint: adapter.num_rows for fingerprint, adapter in by_fingerprint.items()}, self._may_move
        )
        if placement is None:
            return None
        for fingerprint in placement.dropped:
            self._forget(fingerprint)
        missing = list(placement.starts)
        try:
            while missing:
                self._load(by_fingerprint[missing[0]], placement.starts[missing[0]])
                del missing[0]
        finally:  # what could not be loaded, and what was to come after it, is not there
            for fingerprint in missing:
                self._rows.pop(fingerprint)
                if fingerprint in self._residents:
                    self._forget(fingerprint)
        self.num_hits += len(adapters) - len(placement.starts)
        residents = [self._residents[adapter.fingerprint] for adapter in adapters]
        for resident in residents:
            resident.num_pins += 1
        return tuple(resident.slot for resident in residents)

    def release(self, slots: Sequence[int]) -> None:
        """Unpin what `acquire` returned; the adapters stay resident until their memory is wanted."""
        for slot in slots:
            self._residents[self._fingerprint_by_slot[slot]].num_pins -= 1

    def check_integrity(self, held: Sequence[Sequence[int]]) -> None:
        """Assert that pins equal the slots that running requests hold, and that no rows overlap."""
        pins = dict.fromkeys(self._fingerprint_by_slot, 0)
        for slots in held:
            for slot in slots:
                pins[slot] += 1
        for slot, fingerprint in self._fingerprint_by_slot.items():
            assert self._residents[fingerprint].num_pins == pins[slot], f"slot {slot}: pins disagree with requests"
        assert len(self._residents) + len(self._free_slots) == self.max_loras, "slots were lost"
        assert len(self._rows) == len(self._residents), "rows and slots disagree"
        end = 0
        for start, stop in self._rows.ranges:
            assert start >= end, "the rows of two adapters overlap"
            end = stop
        assert end <= self.num_rows, "an adapter lies beyond the last row"

    def _may_move(self, fingerprint: str) -> bool:
        return self._residents[fingerprint].num_pins == 0

    def _load(self, adapter: Adapter, start: int) -> None:
        """Copy an adapter to its rows; one that was moved keeps its slot."""
        resident = self._residents.get(adapter.fingerprint)
        slot = self._free_slots.pop() if resident is None else resident.slot
        try:
            self._store.load(slot, start, adapter)
        except BaseException:
            if resident is None:
                self._free_slots.append(slot)
            raise
        self._residents[adapter.fingerprint] = resident or _Resident(slot)
        self._fingerprint_by_slot[slot] = adapter.fingerprint
        self.num_loads += 1

    def _forget(self, fingerprint: str) -> None:
        """Give up the slot of an adapter whose rows are gone."""
        slot = self._residents.pop(fingerprint).slot
        del self._fingerprint_by_slot[slot]
        self._free_slots.append(slot)
