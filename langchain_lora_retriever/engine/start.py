"""An engine over a base model that is named: how it is loaded, in whatever process."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.engine.grammar import compiler_of
from langchain_lora_retriever.engine.model.load import load_base_model
from langchain_lora_retriever.engine.worker import EngineWorker
from langchain_lora_retriever.support.gc_freeze import frozen_heap, without_full_collections
from langchain_lora_retriever.support.native_memory import give_back_freed
from langchain_lora_retriever.support.openmp import run_aside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.model.load import ModelSource
    from langchain_lora_retriever.types import Adapter

__all__ = ["start_engine"]

_logger = logging.getLogger(__name__)


def start_engine(
    source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig, expected: Sequence[Adapter]
) -> EngineWorker:
    """Load a base model and make an engine over it, so that the load leaves nothing behind that its steps would feel.

    Args:
        source: A hub name, a folder, or `(model, tokenizer)`.
        model_kwargs: For `from_pretrained`.
        config: The engine's limits.
        expected: See `EngineWorker`.

    Raises:
        EngineError: If the architecture or the memory does not allow serving.
    """
    return run_aside(_start, source, model_kwargs, config, expected)


def _start(
    source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig, expected: Sequence[Adapter]
) -> EngineWorker:
    _logger.info("loading the base model %s", "given by its caller" if isinstance(source, tuple) else source)
    start = time.perf_counter()
    # A model is a million objects: the collector would visit all of the process again and again while they are made.
    is_wanted = config.freeze_heap
    with frozen_heap(is_wanted=is_wanted, collects=False), without_full_collections(is_wanted=is_wanted):
        base = load_base_model(source, **model_kwargs)
        # llguidance holds the interpreter while it reads a vocabulary: here, and not in somebody's first call.
        compiler_of(base.tokenizer).prepare()
        engine = EngineWorker(base, config, expected=expected)
    give_back_freed()
    seconds, info = time.perf_counter() - start, engine.info
    _logger.info("engine of %s started on %s in %.1f s", info.name, info.device, seconds)
    return engine
