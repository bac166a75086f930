"""A tiny model as vLLM loads it, engines over it, and what our own engine answers with the same weights in float32.

vLLM lies in an environment of its own, which `.ci/vllm` makes. Elsewhere these tests are skipped.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from in_vllm.tiny import NAMES, RANKS, tiny_model, vllm_arguments
from makers import make_adapter, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"  # these tests have threads
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """They share the minutes that starting vLLM takes."""
    for item in items:
        if "in_vllm" in item.path.parts:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: Any) -> Path:
    """The model and its tokenizer on the disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters() -> dict[str, Any]:
    """Adapters of different ranks."""
    model = tiny_model()
    return {name: make_adapter(model, name, r=r, scaling=0.8) for name, r in zip(NAMES, RANKS, strict=True)}


@pytest.fixture(scope="session")
def ours() -> Iterator[Any]:
    """Our own engine over the same weights."""
    from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker

    config = EngineConfig(max_num_seqs=24, kv_cache_bytes=4 << 20, lora_cache_bytes=4 << 20, max_model_len=128)
    engine = EngineWorker(BaseModel(tiny_model(), make_tokenizer(), "tiny"), config)
    yield engine
    engine.close()


class Engines:
    """A `VllmEngine` that is started when it is first asked for, and again after it was closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engine: Any = None

    def get(self) -> Any:
        """A running one."""
        from langchain_lora_retriever.vllm import VllmEngine

        if self._engine is None or not self._engine.is_alive:
            arguments = vllm_arguments(max_loras=4, max_lora_rank=16, max_adapters_per_request=3)
            self._engine = VllmEngine(self._folder, **arguments)
        return self._engine

    def close(self) -> None:
        """Stop it."""
        if self._engine is not None:
            self._engine.close()


@pytest.fixture(scope="session")
def engines(model_folder: Path) -> Iterator[Engines]:
    """One for all tests."""
    engines = Engines(model_folder)
    yield engines
    engines.close()


@pytest.fixture
def engine(engines: Engines) -> Any:
    """The running one."""
    return engines.get()
