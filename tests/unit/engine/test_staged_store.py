"""Prefetched adapters arrive whole, whoever asks for them and in whatever order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from langchain_lora_retriever.engine import staged_store
from langchain_lora_retriever.engine.staged_store import StagedStore
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    import pytest


class Shelf:
    """Keeps what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, int, Adapter]] = []

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Keep the adapter."""
        self.loaded.append((slot, start, adapter))


def make_adapter(name: str) -> Adapter:
    """One module, with a content of its own."""
    value = float(sum(name.encode()))
    weights = LoraWeights(torch.full((2, 3), value), torch.full((4, 2), -value), 2.0)
    return Adapter(name=name, fingerprint=name, weights={"layer": weights})


def test_loading_with_and_without_prefetch_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """More prefetches than are kept, then loads of all of them and of one more."""
    monkeypatch.setattr(staged_store, "_MAX_STAGED", 2)
    shelf = Shelf()
    store = StagedStore(shelf, torch.device("cpu"))
    adapters = [make_adapter(name) for name in "abcd"]
    for adapter in (*adapters[:3], adapters[1]):
        store.prefetch(adapter)
    for slot, adapter in enumerate(adapters):
        store.load(slot, 10 * slot, adapter)
    store.close()
    assert [(slot, start, adapter.name) for slot, start, adapter in shelf.loaded] == [
        (0, 0, "a"), (1, 10, "b"), (2, 20, "c"), (3, 30, "d"),
    ]  # fmt: skip
    for (_, _, got), expected in zip(shelf.loaded, adapters, strict=True):
        assert got.fingerprint == expected.fingerprint
        assert torch.equal(got.weights["layer"].lora_A, expected.weights["layer"].lora_A)
        assert torch.equal(got.weights["layer"].lora_B, expected.weights["layer"].lora_B)
        assert got.weights["layer"].scaling == 2.0


def test_a_copy_that_fails_costs_only_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops the copying thread, the adapter is loaded from where it was."""
    begun = threading.Event()

    def broken(*_: Any) -> Any:
        begun.set()
        raise RuntimeError("no memory")

    monkeypatch.setattr(staged_store, "copy_to_device", broken)
    shelf = Shelf()
    store = StagedStore(shelf, torch.device("cpu"))
    store.prefetch(make_adapter("a"))
    begun.wait(10)
    store.load(0, 0, make_adapter("a"))
    store.close()
    assert len(shelf.loaded) == 1
