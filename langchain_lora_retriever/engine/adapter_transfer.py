"""Adapters on their way to the device, copied while the requests that want them are still waiting."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from langchain_lora_retriever.engine.range_allocator import RangeCache
from langchain_lora_retriever.support.openmp import compute_alone

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from langchain_lora_retriever.engine.model.packed_adapter import AdapterPacking
    from langchain_lora_retriever.types import Adapter, LoraWeights

__all__ = ["AdapterSink", "StagedStore"]

_PINNED_CHUNK_BYTES = 1 << 30  # page-locked memory is taken in pieces of this size, when it is first needed


class AdapterSink(Protocol):
    """Where an adapter's tensors go in the end; `LoraLayers` in the engine."""

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Copy an adapter into rows `start : start + adapter.num_rows` and point `slot` at them."""


class _Copy(NamedTuple):
    flat: torch.Tensor  # the packed adapter in the staging memory
    event: torch.cuda.Event | None  # says when it has arrived


class StagedStore:
    """A slot store that brings adapters to the device before they are loaded.

    An adapter is packed into page-locked host memory, where it stays while there is room, and travels as one piece, on
    a stream of its own, into staging memory on the device; what remains for `load` is a copy within the device.
    Neither the model's steps nor any caller waits for any of this. Only the engine's thread may call, but for
    `prefetch` without `may_drop`.

    Args:
        sink: Takes adapters that are not packed.
        packing: How adapters are packed; None copies each at `load`.
        num_rows: Rank rows of staging memory on the device.
        pinned_bytes: Most page-locked host memory.
    """

    def __init__(
        self, sink: AdapterSink, packing: AdapterPacking | None = None, *, num_rows: int = 0, pinned_bytes: int = 0
    ) -> None:
        self._sink = sink
        self._packing = packing if num_rows else None
        self._num_rows = num_rows
        self._lock = threading.Lock()  # guards the staged, their ranges and whether it is closed
        self._ranges: RangeCache[str] = RangeCache(num_rows)
        self._staged: dict[str, Future[_Copy]] = {}  # each is done once its copy is launched
        self._last_load: torch.cuda.Event | None = None  # recorded before it is put here: the copying thread reads it
        self._is_closed = False
        self._copier: ThreadPoolExecutor | None = None
        if packing is None or not num_rows:
            return
        self._memory = torch.empty(num_rows * packing.row_size, dtype=packing.dtype, device=packing.device)
        self._stream: torch.cuda.Stream | None = None
        if packing.device.type == "cuda":
            self._stream = torch.cuda.Stream(packing.device)
            # Who had this memory before may still be using it.
            self._stream.wait_stream(torch.cuda.current_stream(packing.device))
        self._pinned = _PinnedAdapters(packing, pinned_bytes)
        self._copier = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="lora-copier", initializer=_begin_copying, initargs=(packing.device,)
        )
        self._copier.submit(int).result()  # a thread that cannot be started is told now, and not between two bookings

    def prefetch(self, adapters: Sequence[Adapter], *, may_drop: bool = False) -> None:
        """Begin to copy adapters, as far as there is staging memory.

        Args:
            adapters: The adapters, the most urgent first.
            may_drop: Whether adapters that are staged and not among these may be dropped.
        """
        if self._packing is None:
            return
        wanted = {adapter.fingerprint for adapter in adapters}
        with self._lock:
            for adapter in adapters:
                if adapter.fingerprint not in self._staged and self._stage(adapter, wanted, may_drop) is None:
                    return

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """Whether `load` would find all these adapters on the device, or could not be helped; begins what is missing.

        Args:
            adapters: Adapters of one request that are not resident.
        """
        if self._packing is None:
            return True
        wanted = {adapter.fingerprint for adapter in adapters}
        is_ready = True
        with self._lock:
            for adapter in adapters:
                staged = self._staged.get(adapter.fingerprint) or self._stage(adapter, wanted, may_drop=True)
                if staged is None:  # no room: ready if nothing that is still travelling could make some
                    is_ready &= all(copy.done() for copy in self._staged.values())
                else:
                    is_ready &= _has_arrived(staged)
        return is_ready

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Load an adapter from where it is staged; one that is not goes the same way, or else straight to the sink."""
        staged = self._stage_now(adapter)
        try:
            if staged is None or self._packing is None or staged.exception() is not None:
                # A copy that failed is made up for by the sink, which also says what is wrong with the adapter.
                self._sink.load(slot, start, adapter)
                return
            flat, event = staged.result()
            if event is not None:
                torch.cuda.current_stream(self._packing.device).wait_event(event)
            self._packing.load(slot, start, adapter, flat)
            if event is not None:
                read = torch.cuda.Event()
                read.record(torch.cuda.current_stream(self._packing.device))
                self._last_load = read
        finally:
            if staged is not None:
                with self._lock:
                    del self._staged[adapter.fingerprint]
                    self._ranges.pop(adapter.fingerprint)

    def close(self) -> None:
        """Stop the thread, drop what waits, and let go of the memory once nothing is being copied any more.

        Afterwards nothing is staged; whoever still asks is told that there is no room.
        """
        with self._lock:
            self._is_closed = True
        if self._copier is not None:
            self._copier.shutdown(cancel_futures=True)
            if self._stream is not None:
                self._stream.synchronize()
            self._memory = self._memory[:0].clone()
            self._pinned.release()
        self._staged.clear()

    def _stage_now(self, adapter: Adapter) -> Future[_Copy] | None:
        """Find an adapter staged, or stage it where others are; None if staging memory could never hold it."""
        if self._packing is None or adapter.num_rows > self._num_rows:
            return None
        while True:
            with self._lock:
                if self._is_closed:
                    return None
                staged = self._staged.get(adapter.fingerprint) or self._stage(adapter, (), may_drop=True)
                travelling = list(self._staged.values())
            if staged is not None:
                return staged
            wait(travelling)  # whoever has arrived may be dropped

    def _stage(self, adapter: Adapter, wanted: Collection[str], may_drop: bool) -> Future[_Copy] | None:
        """Begin to copy; None if there is no room. Call under the lock."""
        assert self._copier is not None
        if self._is_closed:
            return None

        def is_droppable(fingerprint: str) -> bool:
            return may_drop and fingerprint not in wanted and self._staged[fingerprint].done()

        found = self._ranges.put(adapter.fingerprint, adapter.num_rows, is_droppable)
        if found is None:
            return None
        start, dropped = found
        for fingerprint in dropped:
            del self._staged[fingerprint]
        staged = self._copier.submit(self._copy, adapter, start)
        self._staged[adapter.fingerprint] = staged
        return staged

    def _copy(self, adapter: Adapter, start: int) -> _Copy:
        """On the copying thread: pack, launch the copy to a rank row of the staging memory, and mark its end."""
        assert self._packing is not None
        with torch.inference_mode():
            flat = self._pinned.get(adapter)
            first = start * self._packing.row_size
            target = self._memory[first : first + flat.numel()]
            if self._stream is None:
                target.copy_(flat)
                return _Copy(target, None)
            with torch.cuda.stream(self._stream):
                if self._last_load is not None:  # it may be reading what is written now
                    self._stream.wait_event(self._last_load)
                target.copy_(flat, non_blocking=True)
                event = torch.cuda.Event()
                event.record(self._stream)
            self._pinned.last_copy = event
            return _Copy(target, event)


class _PinnedAdapters:
    """Packed adapters in page-locked host memory, the least recently used dropped. Only the copying thread calls.

    Args:
        packing: How they are packed.
        num_bytes: Most memory.

    Attributes:
        last_copy: When the last copy from here to the device will be done.
    """

    def __init__(self, packing: AdapterPacking, num_bytes: int) -> None:
        self._packing = packing
        self._chunk = min(_PINNED_CHUNK_BYTES, num_bytes) // packing.dtype.itemsize
        num_chunks = num_bytes // packing.dtype.itemsize // self._chunk if self._chunk else 0
        self._chunks: dict[int, torch.Tensor] = {}
        self._ranges: RangeCache[int] = RangeCache(num_chunks * self._chunk, self._chunk or None)
        self._weights: dict[int, Mapping[str, LoraWeights]] = {}  # by identity, which lasts while they are kept here
        self.last_copy: torch.cuda.Event | None = None

    def get(self, adapter: Adapter) -> torch.Tensor:
        """The packed adapter, `[packing.size(adapter)]`; in ordinary memory if it is too large to be kept."""
        key, size = id(adapter.weights), self._packing.size(adapter)
        start = self._ranges.get(key)
        if start is not None:
            return self._view(start, size)
        found = self._ranges.put(key, size, lambda _: True)
        if found is None:
            flat = torch.empty(size, dtype=self._packing.dtype)
            self._packing.pack(adapter, flat)
            return flat
        start, dropped = found
        for other in dropped:
            del self._weights[other]
        if dropped and self.last_copy is not None:
            self.last_copy.synchronize()  # it may be reading what is written now
        try:
            self._packing.pack(adapter, self._view(start, size))
        except BaseException:
            self._ranges.pop(key)
            raise
        self._weights[key] = adapter.weights
        return self._view(start, size)

    def release(self) -> None:
        """Give the memory back; nothing may be asked for any more."""
        self._chunks.clear()
        self._weights.clear()

    def _view(self, start: int, size: int) -> torch.Tensor:
        index, offset = divmod(start, self._chunk)
        if index not in self._chunks:
            is_pinned = self._packing.device.type == "cuda"
            self._chunks[index] = torch.empty(self._chunk, dtype=self._packing.dtype, pin_memory=is_pinned)
        return self._chunks[index][offset : offset + size]


def _begin_copying(device: torch.device) -> None:
    compute_alone()
    if device.type == "cuda":  # page-locked memory is taken, and events are made, where the current device is
        torch.cuda.set_device(device)


def _has_arrived(copy: Future[_Copy]) -> bool:
    if not copy.done():
        return False
    if copy.exception() is not None:
        return True
    event = copy.result().event
    return event is None or event.query()
