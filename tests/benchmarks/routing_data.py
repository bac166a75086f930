"""A benchmark's texts and their embeddings, made once and kept: what the benches of routing share."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from langchain_lora_retriever.evaluation import load_benchmark
from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER, DEFAULT_INSTRUCTION, SentenceTransformerEncoder
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from langchain_lora_retriever.evaluation import Benchmark

Vectors = "NDArray[np.float32]"


def parse_arguments(text: str, **more: dict[str, Any]) -> argparse.Namespace:
    """The options that the benches share, and a bench's own."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument(
        "data", type=Path, help="folder with cards.json and dev.json, as docs/evaluate.md describes them"
    )
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="sentence-transformers name or folder")
    parser.add_argument("--cache", type=Path, help="folder that keeps the texts' embeddings")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser.parse_args()


def load(folder: Path) -> Benchmark:
    """The benchmark in a folder."""
    return load_benchmark(folder / "cards.json", folder / "dev.json")


class Embedder:
    """Embeds texts as a retriever does, with words and without; meaning is embedded once for each text.

    Args:
        source: Name or folder of the sentence encoder.
        cache: Folder to keep its vectors in.
    """

    def __init__(self, source: str, cache: Path | None) -> None:
        self.encoder = SentenceTransformerEncoder(source)
        key = hashlib.sha256(f"{self.encoder.name}{DEFAULT_INSTRUCTION}".encode()).hexdigest()[:16]
        self._file = None if cache is None else cache / f"vectors-{key}.npz"
        self._known: dict[str, NDArray[np.float32]] = {}
        if self._file is not None and self._file.is_file():
            with np.load(self._file) as arrays:
                self._known = dict(zip(arrays["hashes"].tolist(), arrays["vectors"], strict=True))

    @property
    def name(self) -> str:
        """Of the sentence encoder, which words may be added to."""
        return self.encoder.name

    @property
    def dimension(self) -> int:
        """Of meaning alone."""
        return self.encoder.dimension

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Meaning alone, `[n, d]`, as an `Encoder` does; the instruction is part of the texts."""
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        missing = {key: text for key, text in zip(hashes, texts, strict=True) if key not in self._known}
        if missing:
            self._known.update(zip(missing, self.encoder.encode(list(missing.values())), strict=True))
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(self._file, hashes=np.array(list(self._known)), vectors=np.stack(list(self._known.values())))
        return np.stack([self._known[key] for key in hashes])

    def embed(self, texts: Iterable[str], *, words: bool) -> NDArray[np.float32]:
        """`[n, d]`, each row of length 1."""
        whole = [DEFAULT_INSTRUCTION + text for text in texts]
        return (HybridEncoder(self) if words else self).encode(whole)

    def embed_card(self, texts: Sequence[str], *, words: bool) -> NDArray[np.float32]:
        """What a model card's words are found by, `[d]`: meaning alone, without the instruction."""
        mean = unit(self.encode(texts).mean(0))
        whole = HybridEncoder(self).without_words(mean) if words else mean
        assert whole is not None
        return whole


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scaled to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def report(**values: object) -> None:
    """Print one result with the machine and the versions."""
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "faiss": version("faiss-cpu")}
    print(json.dumps(values | machine), flush=True)
