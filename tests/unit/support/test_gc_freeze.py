"""The heap is frozen while an engine wants it so, and thawed with the last."""

from __future__ import annotations

import gc
import weakref

import pytest

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.support.gc_freeze import freeze_what_came, frozen_heap, without_full_collections
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


def test_what_came_to_stay_is_frozen_too() -> None:
    """Where the heap is frozen, and only there."""
    freeze_what_came()
    assert gc.get_freeze_count() == 0
    with frozen_heap():
        before = gc.get_freeze_count()
        came = [[] for _ in range(1000)]
        freeze_what_came()
        assert gc.get_freeze_count() >= before + len(came)


def test_no_full_collection_begins_by_itself() -> None:
    """Blocks may overlap in any order; new garbage is collected meanwhile, and all of it as ever behind the last."""
    before = gc.get_threshold()
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    one, other = without_full_collections(), without_full_collections()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    knot = weakref.ref(Knot())
    gc.callbacks.append(note)
    try:
        kept = [[] for _ in range(300_000)]
    finally:
        gc.callbacks.remove(note)
    assert generations
    assert 2 not in generations
    assert knot() is None
    assert gc.get_threshold()[:2] == before[:2]
    other.__exit__(None, None, None)
    assert gc.get_threshold() == before
    with without_full_collections(is_wanted=False):
        assert gc.get_threshold() == before
    assert len(kept) == 300_000


@pytest.mark.parametrize("freezes", [True, False])
def test_an_engine_freezes_as_it_is_told(*, freezes: bool) -> None:
    """From its first step to its last."""
    config = EngineConfig(max_num_seqs=2, kv_cache_bytes=1 << 20, lora_cache_bytes=1 << 20, freeze_heap=freezes)
    with EngineWorker(BaseModel(make_tiny_model("llama"), make_tokenizer(), "tiny"), config) as worker:
        worker.submit([5, 6], SamplingParams(max_tokens=2)).result(60)
        assert bool(gc.get_freeze_count()) == bool(freezes)
    assert gc.get_freeze_count() == 0
