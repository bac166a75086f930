"""The engine: continuous batching in which every request runs its own weighted LoRA adapters.

A request's way: `EngineWorker.submit` -> `Scheduler` (blocks of the KV cache, slots for its adapters) -> `ModelRunner`
(one packed forward pass, attention over the paged cache, LoRA per token) -> `choose` -> `Detokenizer` -> `Generation`.

Those above it know `api` alone, which loads no torch; names are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.support.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.api import (
        Completion,
        Delta,
        EngineClient,
        EngineInfo,
        Grammar,
        Registration,
        TokenLogprob,
        Usage,
    )
    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.core import Engine
    from langchain_lora_retriever.engine.generation import Generation
    from langchain_lora_retriever.engine.model.load import BaseModel, ModelSource, load_base_model, load_tokenizer
    from langchain_lora_retriever.engine.stats import EngineStats
    from langchain_lora_retriever.engine.worker import EngineWorker

__all__ = [
    "BaseModel",
    "Completion",
    "Delta",
    "Engine",
    "EngineClient",
    "EngineConfig",
    "EngineInfo",
    "EngineStats",
    "EngineWorker",
    "Generation",
    "Grammar",
    "ModelSource",
    "Registration",
    "TokenLogprob",
    "Usage",
    "load_base_model",
    "load_tokenizer",
]

_HOMES = {
    "BaseModel": "model.load",
    "Completion": "api",
    "Delta": "api",
    "Engine": "core",
    "EngineClient": "api",
    "EngineConfig": "config",
    "EngineInfo": "api",
    "EngineStats": "stats",
    "EngineWorker": "worker",
    "Generation": "generation",
    "Grammar": "api",
    "ModelSource": "model.load",
    "Registration": "api",
    "TokenLogprob": "api",
    "Usage": "api",
    "load_base_model": "model.load",
    "load_tokenizer": "model.load",
}

__getattr__ = lazy_names(__name__, _HOMES)
