"""Adapters beside an engine in another process: by content hash, each read or received once."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from langchain_lora_retriever.errors import AdapterError, EngineError, fresh
from langchain_lora_retriever.remote.wire import leaves
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from langchain_lora_retriever.remote.wire import AdapterRef

__all__ = ["AdapterContents", "AdapterStore"]

_Kind: TypeAlias = tuple[tuple[int, ...], str]
"""A tensor's shape, and its dtype's name."""
_logger = logging.getLogger(__name__)
_MAX_ADAPTERS = 4096
"""Adapters that are known at once. One that lies in a folder costs little."""
_MAX_READS = 8
"""Adapters that are read at once: more would only take cores and interpreter from the engine."""


class _Module(NamedTuple):
    """Shapes and dtypes of one module's tensors, of which the last two may be missing, and its scaling.

    Attributes:
        lora_A: `[r, in_features]`.
        lora_B: `[out_features, r]`.
        scaling: As in `LoraWeights`.
        magnitude: Of DoRA.
        base_weight: The base model's own, see `Adapter.base_weights`.
    """

    lora_A: _Kind
    lora_B: _Kind
    scaling: float
    magnitude: _Kind | None
    base_weight: _Kind | None


class _Received(dict[str, LoraWeights]):
    """An adapter's weights by module, and those of the base model's own that came with them."""

    base_weights: dict[str, torch.Tensor]


class AdapterContents(NamedTuple):
    """An adapter that has no folder which both sides see, as one piece.

    Attributes:
        name: Its name.
        fingerprint: What it is.
        base_model: What its configuration names.
        invocation_tokens: What invokes it, see `Adapter`.
        modules: What there is of each module, by path.
        data: Their numbers, one tensor after the other, uint8.
    """

    name: str
    fingerprint: str
    base_model: str | None
    invocation_tokens: tuple[int, ...]
    modules: dict[str, _Module]
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @classmethod
    def of(cls, adapter: Adapter) -> AdapterContents:
        """Read an adapter.

        Raises:
            AdapterError: If its file is not the one that was read any more.
        """
        base_weights = adapter.base_weights
        modules, parts = {}, []
        for path, w in dict(adapter.weights).items():
            tensors = (w.lora_A, w.lora_B, w.magnitude, base_weights.get(path))
            lora_A, lora_B, magnitude, base_weight = map(_kind_of, tensors)
            assert lora_A is not None
            assert lora_B is not None
            modules[path] = _Module(lora_A, lora_B, w.scaling, magnitude, base_weight)
            parts += [_bytes_of(tensor) for tensor in tensors if tensor is not None]
        data = np.concatenate(parts) if parts else np.empty(0, np.uint8)
        return cls(adapter.name, adapter.fingerprint, adapter.base_model, adapter.invocation_tokens, modules, data)

    def to_adapter(self) -> Adapter:
        """The adapter; its tensors share `data`."""
        weights = _Received()
        weights.base_weights = {}
        offset = 0
        for path, module in self.modules.items():
            tensors = []
            for kind in (module.lora_A, module.lora_B, module.magnitude, module.base_weight):
                tensor, offset = (None, offset) if kind is None else self._tensor(offset, *kind)
                tensors.append(tensor)
            lora_A, lora_B, magnitude, base_weight = tensors
            assert lora_A is not None
            assert lora_B is not None
            weights[path] = LoraWeights(lora_A, lora_B, module.scaling, magnitude)
            if base_weight is not None:
                weights.base_weights[path] = base_weight
        return Adapter(
            name=self.name,
            fingerprint=self.fingerprint,
            weights=weights,
            base_model=self.base_model,
            invocation_tokens=self.invocation_tokens,
        )

    def _tensor(self, offset: int, shape: tuple[int, ...], dtype: str) -> tuple[torch.Tensor, int]:
        import torch  # noqa: PLC0415 - whoever only passes requests on needs none of it, which is 0.4 GB

        kind: torch.dtype = getattr(torch, dtype)
        end = offset + int(np.prod(shape)) * kind.itemsize
        raw = torch.from_numpy(self.data[offset:end])
        if raw.storage_offset() % kind.itemsize:  # a module of another dtype came before
            raw = raw.clone()
        return raw.view(kind).view(shape), end


class AdapterStore:
    """The adapters that an engine's process knows, by content. Any thread may ask.

    The least recently used are forgotten beyond `max_bytes` of received ones; requests that run keep theirs. An adapter
    that is forgotten, or removed from its pool, is another's matter only when it is asked for again.

    Args:
        max_bytes: Maximum number of bytes of adapters that were sent here. Those in a folder stay there.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Future[Adapter]] = OrderedDict()
        self._num_bytes: dict[str, int] = {}  # of those that were received
        self._reading = threading.BoundedSemaphore(_MAX_READS)
        self.num_read = self.num_received = 0

    @property
    def fingerprints(self) -> list[str]:
        """What is known."""
        with self._lock:
            return list(self._known)

    def holds(self, refs: Sequence[AdapterRef]) -> bool:
        """Whether nobody would have to wait for any of them."""
        with self._lock:
            return all(_is_there(self._known.get(leaf.fingerprint)) for ref in refs for leaf in leaves(ref))

    def get(self, ref: AdapterRef, fetch: Callable[[AdapterRef], AdapterContents]) -> Adapter:
        """An adapter; whoever asks for the same meanwhile waits for it.

        Args:
            ref: Which.
            fetch: Has it sent, if its folder is not to be seen here or holds another by now.

        Raises:
            AdapterError: If it cannot be read.
            EngineError: If it cannot be had.
        """
        if ref.members:
            from langchain_lora_retriever.retrieval.fusion import fuse  # noqa: PLC0415 - PyTorch

            fused = fuse([(self.get(member, fetch), weight) for member, weight in ref.members])
            if fused.fingerprint != ref.fingerprint:
                raise EngineError(
                    f"The fusion {ref.name!r} is another here: caller and engine have different versions of "
                    "langchain-lora-retriever. Install the same on both."
                )
            return fused
        while True:
            with self._lock:
                future = self._known.get(ref.fingerprint)
                is_mine = future is None
                if future is None:
                    future = self._known[ref.fingerprint] = Future()
                self._known.move_to_end(ref.fingerprint)
            if is_mine:
                self._make(ref, fetch, future)
            error = future.exception()
            if error is None:
                return future.result()
            if is_mine:  # others try for themselves: it may be their callers that have it
                raise fresh(error)

    def _make(self, ref: AdapterRef, fetch: Callable[[AdapterRef], AdapterContents], future: Future[Adapter]) -> None:
        try:
            with self._reading:
                adapter = _read(ref)
            num_bytes = 0
            if adapter is None:
                contents = fetch(ref)
                adapter, num_bytes = contents.to_adapter(), contents.data.nbytes
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it; nothing is kept
            with self._lock:
                self._known.pop(ref.fingerprint, None)
            future.set_exception(error)
            return
        future.set_result(adapter)
        with self._lock:
            self.num_read += not num_bytes
            self.num_received += num_bytes > 0
            self._num_bytes[ref.fingerprint] = num_bytes
            self._forget()

    def _forget(self) -> None:
        """Drop the least recently used beyond the limits. Call under the lock."""
        total = sum(self._num_bytes.values())
        for fingerprint in list(self._known):
            is_last = len(self._known) == 1
            if is_last or (total <= self._max_bytes and len(self._known) <= _MAX_ADAPTERS):
                return
            if fingerprint in self._num_bytes:  # others are still on their way
                total -= self._num_bytes.pop(fingerprint)
                del self._known[fingerprint]


def _is_there(future: Future[Adapter] | None) -> bool:
    return future is not None and future.done() and future.exception() is None


def _read(ref: AdapterRef) -> Adapter | None:
    """Read an adapter from its folder, if that is to be seen here and holds just this one."""
    if ref.path is None:
        return None
    from langchain_lora_retriever.pool.checkpoint import read_adapter  # noqa: PLC0415 - PEFT

    try:
        adapter = read_adapter(ref.path, name=ref.name)
    except AdapterError as error:
        _logger.info("Adapter %r is not read from its folder here, and sent instead: %s", ref.name, error)
        return None
    return adapter if adapter.fingerprint == ref.fingerprint else None


def _kind_of(tensor: torch.Tensor | None) -> _Kind | None:
    return None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    import torch  # noqa: PLC0415

    flat: np.ndarray[Any, np.dtype[np.uint8]] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return flat
