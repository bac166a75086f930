"""A LangChain chat model that retrieves, composes and batches LoRA adapters per prompt.

Names are imported on first use, so that `import langchain_lora_retriever` loads neither torch nor LangChain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from langchain_lora_retriever.support.lazy import lazy_names

if TYPE_CHECKING:
    from langchain_lora_retriever.chat.adapter_retriever import AdapterRetriever
    from langchain_lora_retriever.chat.decisions import AdapterDecisionModel
    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.engine.api import EngineClient
    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.errors import (
        AdapterError,
        EncoderError,
        EngineDeadError,
        EngineError,
        EngineOverloadedError,
        InvalidRequestError,
        LoraRetrieverError,
        PoolError,
        PromptTooLongError,
        StructuredOutputError,
        UnknownAdapterError,
    )
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.registry import close_engines
    from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever
    from langchain_lora_retriever.retrieval.training import train_encoder
    from langchain_lora_retriever.runtime import Runtime
    from langchain_lora_retriever.types import Adapter, Composition, RetrievedAdapter, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterDecisionModel",
    "AdapterError",
    "AdapterPool",
    "AdapterRetriever",
    "ChatLoraRetriever",
    "Composition",
    "EncoderError",
    "EngineClient",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineOverloadedError",
    "HybridEncoder",
    "InvalidRequestError",
    "LoraRetriever",
    "LoraRetrieverError",
    "PoolError",
    "PromptTooLongError",
    "RetrievedAdapter",
    "Runtime",
    "SamplingParams",
    "StructuredOutputError",
    "UnknownAdapterError",
    "close_engines",
    "train_encoder",
]

_HOMES = {
    "Adapter": "types",
    "AdapterDecisionModel": "chat.decisions",
    "AdapterError": "errors",
    "AdapterPool": "pool",
    "AdapterRetriever": "chat.adapter_retriever",
    "ChatLoraRetriever": "chat.model",
    "Composition": "types",
    "EncoderError": "errors",
    "EngineClient": "engine.api",
    "EngineConfig": "engine.config",
    "EngineDeadError": "errors",
    "EngineError": "errors",
    "EngineOverloadedError": "errors",
    "HybridEncoder": "retrieval.hybrid_encoder",
    "InvalidRequestError": "errors",
    "LoraRetriever": "retrieval.retriever",
    "LoraRetrieverError": "errors",
    "PoolError": "errors",
    "PromptTooLongError": "errors",
    "RetrievedAdapter": "types",
    "Runtime": "runtime",
    "SamplingParams": "types",
    "StructuredOutputError": "errors",
    "UnknownAdapterError": "errors",
    "close_engines": "registry",
    "train_encoder": "retrieval.training",
}


__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return [*globals(), *(name for name in __all__ if name not in globals())]
