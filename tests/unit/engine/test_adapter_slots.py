"""Device memory for adapters: LRU, pins, true ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from langchain_lora_retriever.engine.adapter_slots import AdapterSlots
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    from collections.abc import Sequence


class RecordingStore:
    """Writes down what was loaded where."""

    def __init__(self) -> None:
        self.loads: list[tuple[int, int, str]] = []

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """Always."""
        return True

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Record a load."""
        self.loads.append((slot, start, adapter.name))


def make_adapter(name: str, r: int) -> Adapter:
    """An adapter of rank `r`."""
    weights = {"m": LoraWeights(torch.zeros(r, 1), torch.zeros(1, r), 1.0)}
    return Adapter(name, f"fp-{name}", weights)


def make_slots(max_loras: int = 4, num_rows: int = 16) -> tuple[AdapterSlots, RecordingStore]:
    """Slots over a recording store."""
    store = RecordingStore()
    return AdapterSlots(store, max_loras=max_loras, num_rows=num_rows), store


def test_a_resident_adapter_is_not_loaded_again() -> None:
    """The second use is a hit and gets the same slot."""
    slots, store = make_slots()
    a = make_adapter("a", 4)
    assert slots.acquire([a]) == slots.acquire([a])
    assert len(store.loads) == 1
    assert slots.num_hits == 1


def test_the_least_recently_used_goes_first() -> None:
    """When rows run out, the adapter that was used longest ago makes room."""
    slots, store = make_slots()
    a, b, c = (make_adapter(n, 8) for n in "abc")
    for adapter in (a, b, a):
        slots.release(slots.acquire([adapter]) or ())
    slots.release(slots.acquire([c]) or ())
    slots.release(slots.acquire([a]) or ())
    assert [name for _, _, name in store.loads] == ["a", "b", "c"]


def test_pinned_adapters_stay() -> None:
    """What a running request uses is not evicted: the newcomer has to wait, and nothing stays pinned for it."""
    slots, _ = make_slots()
    a, b = make_adapter("a", 12), make_adapter("b", 8)
    held = slots.acquire([a])
    assert slots.acquire([b]) is None
    slots.check_integrity([held or ()])
    slots.release(held or ())
    assert slots.acquire([b]) is not None


def test_ranks_are_stored_true() -> None:
    """Adapters of rank 8 and 2 take ten rows, one after the other."""
    slots, store = make_slots(num_rows=10)
    assert slots.acquire([make_adapter("a", 8), make_adapter("b", 2)]) is not None
    assert sorted(start for _, start, _ in store.loads) == [0, 8]


def test_a_composition_that_fits_by_its_sum_finds_adjacent_rows() -> None:
    """With nobody else's pins in the way its own resident member is moved, in place of waiting for ever."""
    slots, store = make_slots(num_rows=10)
    y, x, z = make_adapter("y", 3), make_adapter("x", 3), make_adapter("z", 4)
    for adapter in (y, x, z, y):
        slots.release(slots.acquire([adapter]) or ())
    held = slots.acquire([x, make_adapter("large", 7)])
    assert held is not None
    slots.check_integrity([held])
    assert [(start, name) for _, start, name in store.loads[3:]] == [(0, "large"), (7, "x")]
    assert slots.num_resident == 2


def test_what_a_running_request_uses_is_not_moved() -> None:
    """The composition waits until the rows between are free again, and nothing has changed meanwhile."""
    slots, store = make_slots(num_rows=10)
    for name, rank in (("y", 3), ("x", 3)):
        held = slots.acquire([make_adapter(name, rank)])
        if name == "y":
            slots.release(held or ())
    assert slots.acquire([make_adapter("x", 3), make_adapter("large", 7)]) is None
    slots.check_integrity([held or ()])
    assert [name for _, _, name in store.loads] == ["y", "x"]
    slots.release(held or ())
    assert slots.acquire([make_adapter("x", 3), make_adapter("large", 7)]) is not None


def test_an_adapter_may_stand_twice_in_a_composition() -> None:
    """Two names of equal contents take one slot, pinned twice."""
    slots, store = make_slots(num_rows=4)
    a = make_adapter("a", 4)
    held = slots.acquire([a, a])
    assert held is not None
    assert held[0] == held[1]
    slots.check_integrity([held])
    assert len(store.loads) == 1


def test_a_failed_load_gives_its_slot_back() -> None:
    """An adapter that cannot be copied leaves no trace."""
    slots, store = make_slots()

    def fail(*_: object) -> None:
        raise RuntimeError("no such module")

    slots.release(slots.acquire([make_adapter("resident", 4)]) or ())
    store.load = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no such module"):
        slots.acquire([make_adapter("resident", 4), make_adapter("a", 4)])
    slots.check_integrity([])
    assert slots.num_resident == 1


def test_a_failed_load_leaves_nothing_half_moved() -> None:
    """A member that was to be moved after the one that failed is gone, and loads again later."""
    slots, store = make_slots(num_rows=10)
    for adapter in (make_adapter("y", 3), make_adapter("x", 3), make_adapter("z", 4)):
        slots.release(slots.acquire([adapter]) or ())
    load = store.load

    def fail(slot: int, start: int, adapter: Adapter) -> None:
        if adapter.name == "large":
            raise RuntimeError("no such file")
        load(slot, start, adapter)

    store.load = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no such file"):
        slots.acquire([make_adapter("x", 3), make_adapter("large", 7)])
    slots.check_integrity([])
    held = slots.acquire([make_adapter("x", 3), make_adapter("y", 3), make_adapter("z", 4)])
    slots.check_integrity([held or ()])
