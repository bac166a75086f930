"""A chat model without a model: a real pool, retriever and LangChain around an engine that answers from a function."""

from __future__ import annotations

import json
import re
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from langchain_lora_retriever import registry
from langchain_lora_retriever.engine import start
from langchain_lora_retriever.testing import FakeEngine, byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from langchain_lora_retriever import AdapterPool, ChatLoraRetriever

SAMPLES = {
    "sql": ["How many users signed up in May?", "Select the names of all users from the table."],
    "dates": ["Write the date 3 March 2021 in ISO format.", "Convert the date 7/8/19 to ISO."],
    "french": ["Translate the sentence into French.", "How do you say good morning in French?"],
}


class WordEncoder:
    """Embeds a text by the words in it."""

    name = "words"
    dimension = 512

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return hashed word counts `[n, 512]`, L2-normalised."""
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word, count in Counter(re.findall(r"\w+", text.lower())).items():
                row[int.from_bytes(word.encode()[-6:], "big") % self.dimension] += count
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with control tokens and a ChatML template."""
    return byte_tokenizer()


@pytest.fixture
def word_encoder() -> WordEncoder:
    """An encoder that needs no model."""
    return WordEncoder()


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> FakeEngine:
    """The engine of the chat model `llm`."""
    return FakeEngine(tokenizer=tokenizer, name="fake/base", module_shapes={"q_proj": (8, 8)})


@pytest.fixture
def loads_engine(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have `engine` loaded for whatever base model is named."""
    monkeypatch.setattr(start, "load_base_model", lambda source, **_: SimpleNamespace(tokenizer=engine.tokenizer))
    monkeypatch.setattr(start, "EngineWorker", lambda base, config, **_: engine)
    yield
    registry.close_engines()


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write a PEFT checkpoint of one module."""

    def write(name: str, *, size: int = 8, seed: int = 0) -> Path:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.manual_seed(seed + sum(map(ord, name)))
        prefix = "base_model.model.q_proj"
        tensors = {f"{prefix}.lora_A.weight": torch.randn(2, size), f"{prefix}.lora_B.weight": torch.randn(size, 2)}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


@pytest.fixture
def pool(write_adapter: Callable[..., Path]) -> AdapterPool:
    """A pool in memory of three adapters."""
    from langchain_lora_retriever import AdapterPool

    pool = AdapterPool()
    for name, samples in SAMPLES.items():
        pool.add(name, write_adapter(name), samples=samples)
    return pool


@pytest.fixture
def llm(engine: FakeEngine, pool: AdapterPool) -> ChatLoraRetriever:
    """A chat model on the fake engine."""
    from langchain_lora_retriever import ChatLoraRetriever, LoraRetriever

    return ChatLoraRetriever(engine=engine, retriever=LoraRetriever(pool, WordEncoder()))
