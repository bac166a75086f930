"""Embeddings that need not be made again: of texts, in memory; of adapters, on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from langchain_lora_retriever.support.forking import begin_in_every_process

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["AdapterVectors", "Mean", "TextVectors"]

_ENTRY_BYTES = 256
"""What a text's embedding takes beside its numbers: the key, the array's header, its place in the dictionary."""


class Mean(NamedTuple):
    """What an adapter is found by.

    Attributes:
        vector: The mean over its samples `[d]`, of length 1.
        floor: The score below which a prompt is none of its kind, by its samples; -inf if they do not say.
    """

    vector: NDArray[np.float32]
    floor: float


class TextVectors:
    """The embeddings of the texts used last, by the texts' hashes. Thread-safe.

    Args:
        max_texts: Maximum number of texts.
        max_bytes: Maximum number of bytes of embeddings and keys; long texts cost no more than short ones.
    """

    def __init__(self, max_texts: int, *, max_bytes: int = 64 << 20) -> None:
        self.max_texts = max_texts
        self.max_bytes = max_bytes
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._vectors: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._num_bytes = 0

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._vectors.clear()
            self._num_bytes = 0

    def get(self, texts: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """The embeddings `[d]` of those texts that are known."""
        keys = {text: _key(text) for text in texts}
        with self._lock:
            known = {text: self._vectors[key] for text, key in keys.items() if key in self._vectors}
            for text in known:
                self._vectors.move_to_end(keys[text])
            return known

    def put(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Remember embeddings `[d]`; the least recently used go."""
        keyed = {_key(text): vector.copy() for text, vector in vectors.items()}  # no views that keep their whole batch
        with self._lock:
            for key, vector in keyed.items():
                self._drop(key)
                self._vectors[key] = vector
                self._num_bytes += vector.nbytes + _ENTRY_BYTES
            while len(self._vectors) > self.max_texts or self._num_bytes > self.max_bytes:
                self._drop(next(iter(self._vectors)))

    def _drop(self, key: bytes) -> None:
        vector = self._vectors.pop(key, None)
        if vector is not None:
            self._num_bytes -= vector.nbytes + _ENTRY_BYTES


class AdapterVectors:
    """A file of adapters' embeddings, by the hash of what they were made from.

    Args:
        folder: Where the file lies; one that may not be written to is only read.
        encoder: Name of the encoder.
        instruction: What was put before every sample.
        max_bytes: Maximum number of bytes of embeddings to write; those that were known longest go.
    """

    def __init__(self, folder: Path, *, encoder: str, instruction: str, max_bytes: int = 1 << 30) -> None:
        digest = hashlib.sha256(f"{encoder}\0{instruction}".encode("utf-8", "surrogatepass")).hexdigest()
        self._file = folder / f"embeddings-{digest[:16]}.npz"
        self._max_bytes = max_bytes

    def load(self) -> dict[str, Mean]:
        """What the file holds; nothing if it is missing, cannot be read, or is of an earlier form."""
        try:
            with np.load(self._file, allow_pickle=False) as arrays:
                hashes, vectors = arrays["hashes"].tolist(), arrays["vectors"].astype(np.float32)
                floors = arrays["floors"].astype(np.float64)
                is_whole = np.isfinite(vectors).reshape(len(vectors), -1).all(axis=1) & ~np.isnan(floors)
                rows = zip(hashes, vectors, floors.tolist(), is_whole, strict=True)
                return {name: Mean(row, floor) for name, row, floor, whole in rows if whole}
        except Exception:  # noqa: BLE001 - whatever a damaged file makes zipfile and numpy raise: they are made again
            return {}

    def save(self, means: Mapping[str, Mean]) -> None:
        """Replace the file."""
        if not means:
            return
        most = self._max_bytes // max(1, next(iter(means.values())).vector.nbytes)
        kept = dict(list(means.items())[-most:])
        vectors, floors = np.stack([mean.vector for mean in kept.values()]), [mean.floor for mean in kept.values()]
        aside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with aside.open("wb") as stream:
                    np.savez(stream, hashes=np.array(list(kept)), vectors=vectors, floors=np.array(floors))
                aside.replace(self._file)
            finally:
                aside.unlink(missing_ok=True)  # of a full disk nothing is kept


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
