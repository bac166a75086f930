"""Engines and retrievers that chat models of one process share.

LangChain copies chat models freely (`configurable_fields` does for every run). A copy must neither load the weights
again nor embed the pool again.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.adapters import check_fits
from langchain_lora_retriever.aside import run_aside
from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.errors import AdapterError, UnknownAdapterError
from langchain_lora_retriever.retriever import LoraRetriever

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from langchain_lora_retriever.encoder import Encoder
    from langchain_lora_retriever.engine import ModelSource
    from langchain_lora_retriever.pool import AdapterPool

__all__ = ["close_engines", "reject_unfit", "shared_engine", "shared_retriever"]


@dataclass(slots=True)
class _Fitting:
    """What is known of a pool's fit to an engine."""

    pool_version: int | None = None
    fingerprints: set[str] = field(default_factory=set)


_lock = threading.Lock()
_engines: dict[Hashable, EngineWorker] = {}
_fitting: weakref.WeakKeyDictionary[AdapterPool, dict[int, _Fitting]] = weakref.WeakKeyDictionary()
_retrievers: weakref.WeakValueDictionary[Hashable, LoraRetriever] = weakref.WeakValueDictionary()


def shared_engine(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> EngineWorker:
    """Return the engine of a configuration, loading the base model if no chat model has used it yet.

    Any thread may call; a second caller waits for the first one's load. A model that is already loaded is told apart
    by identity, one still to load by its name and how it is loaded.
    """
    # repr, because quantization and device-map objects are seldom hashable but all print what they hold.
    key = (_source_key(source), repr(sorted(model_kwargs.items())), config)
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = run_aside(_start_engine, source, model_kwargs, config)
        return engine


def shared_retriever(pool: AdapterPool, encoder: str | Encoder, instruction: str) -> LoraRetriever:
    """Return the retriever of a pool and an encoder; it lives as long as a chat model uses it."""
    key = (id(pool), encoder if isinstance(encoder, str) else id(encoder), instruction)
    with _lock:
        retriever = _retrievers.get(key)
        if retriever is None:
            retriever = _retrievers[key] = LoraRetriever(pool, encoder, instruction=instruction)
        return retriever


def reject_unfit(pool: AdapterPool, engine: EngineWorker) -> None:
    """Move adapters that do not fit the base model to the pool's `rejected`.

    Contents are looked at once: again only after the pool has changed, and then only what is new in it.
    """
    with _lock:
        fitting = _fitting.setdefault(pool, {}).setdefault(id(engine), _Fitting())
    if fitting.pool_version == pool.version:
        return
    version = pool.version
    for name in pool.names:
        try:
            adapter = pool[name]
            if adapter.fingerprint not in fitting.fingerprints:
                check_fits(adapter, engine.module_shapes)
                fitting.fingerprints.add(adapter.fingerprint)
        except UnknownAdapterError:
            continue  # removed meanwhile
        except AdapterError as error:
            pool.reject(name, error)
    fitting.pool_version = version


def close_engines() -> None:
    """Stop every shared engine and let go of its memory; the next call of a chat model loads afresh."""
    with _lock:
        engines = list(_engines.values())
        _engines.clear()
    for engine in engines:
        engine.close()


def _start_engine(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> EngineWorker:
    return EngineWorker(load_base_model(source, **model_kwargs), config)


def _source_key(source: ModelSource) -> Hashable:
    if isinstance(source, tuple):
        return tuple(map(id, source))
    return str(source.resolve()) if isinstance(source, Path) else source
