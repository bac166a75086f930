"""The heap is frozen while an engine wants it so, and thawed with the last."""

from __future__ import annotations

import gc
import weakref

import pytest

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.gc_freeze import frozen_heap
from langchain_lora_retriever.types import SamplingParams
from makers import make_tiny_model, make_tokenizer


class Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def thawed() -> None:
    """Nothing is frozen before a test, nor after it."""
    assert gc.get_freeze_count() == 0


def test_the_last_block_thaws() -> None:
    """Blocks may overlap in any order; what is made inside is collected all the same."""
    one, other = frozen_heap(), frozen_heap()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_freeze_count() > 0
    knot = weakref.ref(Knot())
    gc.collect()
    assert knot() is None
    other.__exit__(None, None, None)
    assert gc.get_freeze_count() == 0


def test_garbage_of_before_is_gone_first() -> None:
    """What is garbage already is not kept."""
    knot = weakref.ref(Knot())
    with frozen_heap():
        assert knot() is None


@pytest.mark.parametrize("freezes", [True, False])
def test_an_engine_freezes_as_it_is_told(*, freezes: bool) -> None:
    """From its first step to its last."""
    config = EngineConfig(max_num_seqs=2, kv_cache_bytes=1 << 20, lora_cache_bytes=1 << 20, freeze_heap=freezes)
    with EngineWorker(BaseModel(make_tiny_model("llama"), make_tokenizer(), "tiny"), config) as worker:
        worker.submit([5, 6], SamplingParams(max_tokens=2)).result(60)
        assert bool(gc.get_freeze_count()) == bool(freezes)
    assert gc.get_freeze_count() == 0
