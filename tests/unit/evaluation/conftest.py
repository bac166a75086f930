"""A benchmark of four tasks, an encoder that sees words, and an engine that answers by rule."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TEMPLATES = {
    "sql": ("Write a query that counts the {}.", "code"),
    "regex": ("Write a pattern that matches the {}.", "code"),
    "french": ("Translate {} into French.", "translation"),
    "german": ("Translate {} into German.", "translation"),
}
WORDS = ["users", "orders", "dogs", "houses", "letters", "trains"]


class WordEncoder:
    """Embeds a text by the words in it."""

    name = "words"
    dimension = 256

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return hashed word counts `[n, 256]`, L2-normalised."""
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word, count in Counter(re.findall(r"\w+", text.lower())).items():
                row[int.from_bytes(word.encode()[-6:], "big") % self.dimension] += count
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def benchmark_files(tmp_path: Path) -> tuple[Path, Path]:
    """Write cards and test rows; one row is also a sample."""
    cards = [
        {
            "adapter_name": task,
            "samples": [{"inputs": template.format(word), "targets": task} for word in WORDS[:4]],
        }
        for task, (template, _) in TEMPLATES.items()
    ]
    rows = [
        {"inputs": template.format(word), "targets": task, "task": task, "domain": domain, "metric": "em"}
        for task, (template, domain) in TEMPLATES.items()
        for word in WORDS[4:]
    ]
    rows.append({"inputs": "write a query that counts the  USERS.", "targets": "x", "task": "sql"})
    (tmp_path / "cards.json").write_text(json.dumps(cards))
    (tmp_path / "test.json").write_text(json.dumps(rows))
    return tmp_path / "cards.json", tmp_path / "test.json"


@pytest.fixture
def benchmark_(benchmark_files: tuple[Path, Path]) -> Any:
    """The benchmark of these files."""
    from langchain_lora_retriever.evaluation import load_benchmark

    return load_benchmark(*benchmark_files)


@pytest.fixture
def encoder() -> WordEncoder:
    """The encoder that sees words."""
    return WordEncoder()


@pytest.fixture
def engine() -> FakeEngine:
    """The engine that names the adapter of the largest weight, which comes first."""
    return FakeEngine(lambda _, names: names[0] if names else "base", max_num_seqs=2)


@pytest.fixture
def pool(benchmark_: Any) -> Any:
    """A pool of the cards' adapters, each with weights of its own."""
    import torch

    from langchain_lora_retriever.evaluation import CardPool
    from langchain_lora_retriever.pool.pool import PoolEntry

    pool = CardPool(benchmark_.cards)
    entries = {}
    for number, (name, entry) in enumerate(pool.state.entries.items(), start=1):
        weights = {"q_proj": LoraWeights(torch.full((2, 4), float(number)), torch.ones(4, 2), 1.0)}
        entries[name] = PoolEntry(Adapter(name=name, fingerprint=f"fp-{name}", weights=weights), entry.samples)
    pool._replace_state(entries, {})
    return pool
