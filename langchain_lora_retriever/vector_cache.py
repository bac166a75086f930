"""Embeddings that need not be made again: of texts, in memory; of adapters, on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["AdapterVectors", "TextVectors"]


class TextVectors:
    """The embeddings of the texts used last. Thread-safe."""

    def __init__(self, max_texts: int) -> None:
        self.max_texts = max_texts
        self._lock = threading.Lock()
        self._vectors: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def get(self, texts: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """The embeddings `[d]` of those texts that are known."""
        with self._lock:
            known = {text: self._vectors[text] for text in texts if text in self._vectors}
            for text in known:
                self._vectors.move_to_end(text)
            return known

    def put(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Remember embeddings `[d]`; the least recently used go."""
        with self._lock:
            for text, vector in vectors.items():
                self._vectors[text] = vector.copy()  # not a view that keeps its whole batch
                self._vectors.move_to_end(text)
            while len(self._vectors) > self.max_texts:
                self._vectors.popitem(last=False)


class AdapterVectors:
    """A file of adapters' embeddings, by the hash of what they were made from.

    Args:
        folder: Where the file lies; one that may not be written to is only read.
        encoder: Name of the encoder.
        instruction: What was put before every sample.
    """

    def __init__(self, folder: Path, *, encoder: str, instruction: str) -> None:
        digest = hashlib.sha256(f"{encoder}\0{instruction}".encode()).hexdigest()
        self._file = folder / f"embeddings-{digest[:16]}.npz"

    def load(self) -> dict[str, NDArray[np.float32]]:
        """What the file holds; nothing if it is missing or cannot be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(self._file) as arrays:
            return dict(zip(arrays["hashes"].tolist(), arrays["vectors"].astype(np.float32), strict=True))
        return {}

    def save(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace the file."""
        if not vectors:
            return
        aside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                np.savez(stream, hashes=np.array(list(vectors)), vectors=np.stack(list(vectors.values())))
            aside.replace(self._file)
