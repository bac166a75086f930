"""Which adapters are in device memory, where, and which may be evicted.

Device memory for adapters is a range of *rank rows*: one row is one rank index through every adapted module of the
model (a row of each `lora_A`, a column of each `lora_B`). An adapter of rank r takes r adjacent rows, so ranks are
stored true. A slot is an index into the tables that say where an adapter's rows start.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from langchain_lora_retriever.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.types import Adapter

__all__ = ["AdapterSlots", "SlotStore"]

_NUM_REMEMBERED = 10_000


class SlotStore(Protocol):
    """Where an adapter's tensors go; `StagedStore` in the engine."""

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether these adapters, which are not resident, could be loaded without waiting for a copy to the device."""

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Copy an adapter into rows `start : start + adapter.rank` and point `slot` at them."""


@dataclass(slots=True)
class _Resident:
    slot: int
    start: int
    num_rows: int
    num_pins: int = 0


class AdapterSlots:
    """An LRU cache of adapters in device memory; those of running requests are pinned.

    Args:
        store: Receives the tensors of an adapter that becomes resident.
        max_loras: Number of slots.
        num_rows: Number of rank rows.
        max_rank: Largest rank of one adapter.
        module_shapes: `(in_features, out_features)` of every module an adapter may target.
    """

    def __init__(
        self,
        store: SlotStore,
        *,
        max_loras: int,
        num_rows: int,
        max_rank: int,
        module_shapes: Mapping[str, tuple[int, int]],
    ) -> None:
        self.max_loras = max_loras
        self.num_rows = num_rows
        self.num_hits = 0
        self.num_loads = 0
        self._store = store
        self._max_rank = max_rank
        self._module_shapes = module_shapes
        self._fitting: set[str] = set()  # fingerprints that were checked
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # by fingerprint, least recently used first
        self._fingerprint_by_slot: dict[int, str] = {}
        self._free_slots = list(range(max_loras - 1, -1, -1))

    @property
    def num_resident(self) -> int:
        """Adapters in device memory."""
        return len(self._residents)

    def is_resident(self, adapter: Adapter) -> bool:
        """Whether an adapter is in device memory now; any thread may ask."""
        return adapter.fingerprint in self._residents

    def check_fits(self, adapters: Sequence[Adapter]) -> None:
        """Refuse a composition that could never be resident at once; any thread may ask.

        Raises:
            InvalidRequestError: If it has more adapters than slots or more ranks than rows, or one of them is not for
                this model or beyond the kernels' rank.
        """
        for adapter in adapters:
            if adapter.fingerprint not in self._fitting:
                self._check(adapter)
                if len(self._fitting) >= _NUM_REMEMBERED:
                    self._fitting.clear()
                self._fitting.add(adapter.fingerprint)
        num_rows = sum(adapter.rank for adapter in adapters)
        if len(adapters) > self.max_loras or num_rows > self.num_rows:
            names = ", ".join(repr(adapter.name) for adapter in adapters)
            raise InvalidRequestError(
                f"The adapters {names} need {len(adapters)} slots and {num_rows} rank rows of device memory, but the "
                f"engine has {self.max_loras} and {self.num_rows}: raise EngineConfig.max_loras or lora_cache_bytes."
            )

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether `acquire` would not have to wait for a copy from the host; what is missing begins to travel."""
        missing = [adapter for adapter in adapters if not self.is_resident(adapter)]
        return not missing or self._store.are_ready(missing)

    def acquire(self, adapters: Sequence[Adapter]) -> tuple[int, ...] | None:
        """Make adapters resident and pin them.

        Returns:
            Their slots, in order, to be given back with `release`; None, with nothing pinned, if pinned adapters of
            other requests leave no room.
        """
        pinned: list[_Resident] = []
        try:
            for adapter in adapters:
                resident = self._residents.get(adapter.fingerprint)
                if resident is not None:
                    self.num_hits += 1
                else:
                    resident = self._make_resident(adapter)
                    if resident is None:
                        break
                self._residents.move_to_end(adapter.fingerprint)
                resident.num_pins += 1
                pinned.append(resident)
        finally:
            if len(pinned) < len(adapters):  # no room, or a load that failed
                for resident in pinned:
                    resident.num_pins -= 1
        return tuple(resident.slot for resident in pinned) if len(pinned) == len(adapters) else None

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
        end = 0
        for start, stop in self._occupied():
            assert start >= end, "the rows of two adapters overlap"
            end = stop
        assert end <= self.num_rows, "an adapter lies beyond the last row"

    def _check(self, adapter: Adapter) -> None:
        if adapter.rank > self._max_rank:
            raise InvalidRequestError(
                f"Adapter {adapter.name!r} has rank {adapter.rank}; the kernels go up to {self._max_rank}."
            )
        for name, weights in adapter.weights.items():
            shape = weights.lora_A.shape[1], weights.lora_B.shape[0]
            allowed = self._module_shapes.get(name)
            if shape != allowed:
                raise InvalidRequestError(
                    f"Adapter {adapter.name!r} targets {name!r} with (in_features, out_features) = {shape}; in this "
                    + (f"model it has {allowed}" if allowed else "model there is no such linear module")
                    + ": the adapter was trained for another base model."
                )

    def _make_resident(self, adapter: Adapter) -> _Resident | None:
        start = self._find_rows(adapter.rank)
        while start is None or not self._free_slots:
            if not self._evict():
                return None
            start = self._find_rows(adapter.rank)
        slot = self._free_slots.pop()
        try:
            self._store.load(slot, start, adapter)
        except BaseException:
            self._free_slots.append(slot)
            raise
        resident = _Resident(slot, start, adapter.rank)
        self._residents[adapter.fingerprint] = resident
        self._fingerprint_by_slot[slot] = adapter.fingerprint
        self.num_loads += 1
        return resident

    def _evict(self) -> bool:
        """Drop the least recently used adapter that nobody has pinned; False if all are pinned."""
        victim = next((key for key, resident in self._residents.items() if resident.num_pins == 0), None)
        if victim is None:
            return False
        resident = self._residents.pop(victim)
        del self._fingerprint_by_slot[resident.slot]
        self._free_slots.append(resident.slot)
        return True

    def _find_rows(self, num_rows: int) -> int | None:
        """First gap of `num_rows` adjacent free rows."""
        end = 0
        for start, stop in self._occupied():
            if start - end >= num_rows:
                return end
            end = stop
        return end if self.num_rows - end >= num_rows else None

    def _occupied(self) -> list[tuple[int, int]]:
        return sorted((r.start, r.start + r.num_rows) for r in self._residents.values())
