"""The engine: continuous batching in which every request runs its own weighted LoRA adapters.

A request's way: `EngineWorker.submit` -> `Scheduler` (blocks of the KV cache, slots for its adapters) -> `ModelRunner`
(one packed forward pass, attention over the paged cache, LoRA per token) -> `sample` -> `Detokenizer` -> `Generation`.
"""

from langchain_lora_retriever.engine.base_model import BaseModel, ModelSource, load_base_model
from langchain_lora_retriever.engine.config import EngineConfig
from langchain_lora_retriever.engine.engine import Engine
from langchain_lora_retriever.engine.generation import Generation
from langchain_lora_retriever.engine.request import Completion, Constraint, Delta, TokenLogprob, Usage
from langchain_lora_retriever.engine.stats import EngineStats
from langchain_lora_retriever.engine.worker import EngineWorker

__all__ = [
    "BaseModel",
    "Completion",
    "Constraint",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "EngineWorker",
    "Generation",
    "ModelSource",
    "TokenLogprob",
    "Usage",
    "load_base_model",
]
