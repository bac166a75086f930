"""Adapters on their way to the device, copied while the requests that want them are still waiting."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from langchain_lora_retriever.engine.upload import copy_to_device
from langchain_lora_retriever.types import LoraWeights

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.adapter_slots import SlotStore
    from langchain_lora_retriever.types import Adapter

__all__ = ["StagedStore"]

_MAX_STAGED = 8  # adapters that wait on the device beside the slots


class _Staged(NamedTuple):
    adapter: Adapter
    arrival: torch.cuda.Event | None


class StagedStore:
    """A slot store that may be told of an adapter before it is loaded.

    `prefetch` copies through page-locked memory, on a thread and a stream of its own, so that neither the model nor the
    caller waits; what remains for `load` is a copy within the device. What nobody loads is dropped, oldest first.

    Args:
        store: Takes the adapters.
        device: Where they go.
    """

    def __init__(self, store: SlotStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora-copier")
        self._lock = threading.Lock()
        self._staged: OrderedDict[str, Future[_Staged]] = OrderedDict()  # by fingerprint, oldest first

    def prefetch(self, adapter: Adapter) -> None:
        """Begin to copy an adapter. Any thread may call this."""
        with self._lock:
            if adapter.fingerprint in self._staged:
                self._staged.move_to_end(adapter.fingerprint)
                return
            if len(self._staged) >= _MAX_STAGED:
                self._staged.popitem(last=False)[1].cancel()
            self._staged[adapter.fingerprint] = self._copier.submit(self._copy, adapter)

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Load an adapter, from the device if it was prefetched. Only the engine's thread calls this."""
        with self._lock:
            future = self._staged.pop(adapter.fingerprint, None)
        # A copy that has not begun is no faster than the store's own, and one that failed is made up for by it.
        if future is not None and not future.cancel() and future.exception() is None:
            adapter, arrival = future.result()
            if arrival is not None:
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(arrival)
                for weights in adapter.weights.values():
                    weights.lora_A.record_stream(stream)
                    weights.lora_B.record_stream(stream)
        self._store.load(slot, start, adapter)

    def close(self) -> None:
        """Stop the thread and drop what waits."""
        self._copier.shutdown(cancel_futures=True)
        self._staged.clear()

    def _copy(self, adapter: Adapter) -> _Staged:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            weights = {
                path: LoraWeights(
                    copy_to_device(w.lora_A, self._device), copy_to_device(w.lora_B, self._device), w.scaling
                )
                for path, w in adapter.weights.items()
            }
            arrival = None
            if self._stream is not None:
                arrival = torch.cuda.Event()
                arrival.record(self._stream)
        return _Staged(replace(adapter, weights=weights), arrival)
