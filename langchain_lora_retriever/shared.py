"""Engines and retrievers that chat models of one process share.

LangChain copies chat models freely (`configurable_fields` does for every run). A copy must neither load the weights
again nor embed the pool again.
"""

from __future__ import annotations

import logging
import threading
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from langchain_lora_retriever.aside import run_aside
from langchain_lora_retriever.base_names import is_same_base_model
from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.errors import AdapterError, UnknownAdapterError
from langchain_lora_retriever.forking import after_fork
from langchain_lora_retriever.retriever import LoraRetriever

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from langchain_lora_retriever.encoder import Encoder
    from langchain_lora_retriever.engine import ModelSource
    from langchain_lora_retriever.pool import AdapterPool
    from langchain_lora_retriever.types import Adapter

__all__ = [
    "close_engine",
    "close_engines",
    "identity",
    "reject_unfit",
    "running_engine",
    "shared_engine",
    "shared_retriever",
]


@dataclass(slots=True)
class _Fitting:
    """What is known of a pool's fit to an engine."""

    pool_version: int | None = None
    fingerprints: set[str] = field(default_factory=set)


_logger = logging.getLogger(__name__)
_starting = threading.Lock()  # held while a model is loaded, which may take minutes
_lock = threading.Lock()  # held for a look into a dictionary
_engines: dict[Hashable, EngineWorker] = {}
_fitting: WeakKeyDictionary[AdapterPool, WeakKeyDictionary[EngineWorker, _Fitting]] = WeakKeyDictionary()
_retrievers: WeakValueDictionary[Hashable, LoraRetriever] = WeakValueDictionary()
_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def shared_engine(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> EngineWorker:
    """Return the engine of a configuration, loading the base model if no chat model has used it yet.

    Any thread may call; a second caller waits for the first one's load. A model that is already loaded is told apart
    by identity, one still to load by its name and how it is loaded. An engine that was closed or has died is replaced.
    """
    engine = running_engine(source, model_kwargs, config)
    if engine is not None:
        return engine
    key = _engine_key(source, model_kwargs, config)
    with _starting:
        engine = _engines.get(key)
        if engine is not None and engine.is_alive:
            return engine
        if engine is not None:
            engine.check_process()
            _logger.warning("The engine of %s has stopped; starting a new one.", engine.name)
            engine.close()  # returns once it has given back the model and its memory
        _engines[key] = engine = run_aside(_start_engine, source, model_kwargs, config)
        return engine


def running_engine(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> EngineWorker | None:
    """Return the engine of a configuration if it is loaded and alive. Never blocks."""
    engine = _engines.get(_engine_key(source, model_kwargs, config))
    return engine if engine is not None and engine.is_alive else None


def shared_retriever(pool: AdapterPool, encoder: str | Encoder, instruction: str) -> LoraRetriever:
    """Return the retriever of a pool and an encoder; it lives as long as a chat model uses it."""
    key = (id(pool), encoder if isinstance(encoder, str) else id(encoder), instruction)
    with _lock:
        retriever = _retrievers.get(key)
        if retriever is None:
            retriever = _retrievers[key] = LoraRetriever(pool, encoder, instruction=instruction)
        return retriever


def reject_unfit(pool: AdapterPool, engine: EngineWorker, model_name: str = "") -> None:
    """Move adapters that do not fit the base model to the pool's `rejected`, and warn of those that are doubtful.

    Contents are looked at once: again only after the pool has changed, and then only what is new in it.
    """
    with _lock:
        fitting = _fitting.setdefault(pool, WeakKeyDictionary()).setdefault(engine, _Fitting())
    if fitting.pool_version == pool.version:
        return
    version = pool.version
    for name in pool.names:
        try:
            adapter = pool[name]
            if adapter.fingerprint not in fitting.fingerprints:
                engine.check_adapter(adapter)
                fitting.fingerprints.add(adapter.fingerprint)
                _tell_doubts(adapter, engine, model_name)
        except UnknownAdapterError:
            continue  # removed meanwhile
        except AdapterError as error:
            pool.reject(name, error)
    fitting.pool_version = version


def _tell_doubts(adapter: Adapter, engine: EngineWorker, model_name: str) -> None:
    """Warn, once, of an adapter that runs but is incomplete, or names another base model whose shapes agree."""
    where = f"adapter {adapter.name!r} ({adapter.path})"
    missing = engine.missing_modules(adapter)
    if missing:
        _warn(
            f"{where} lacks {len(missing)} of the {len(missing) + len(adapter.weights)} modules that its configuration "
            f"targets: {', '.join(missing[:4])}{', ...' * (len(missing) > 4)}. They run as the base model's. If its "
            "file is one shard of several, or an interrupted save, save it again."
        )
    names = engine.base_names
    if names and adapter.base_model:
        known = sorted({*names, model_name} - {""})
        if not any(is_same_base_model(name, adapter.base_model) for name in known):
            _warn(
                f"{where} was trained for the base model {adapter.base_model!r}; the one here is "
                f"{' or '.join(map(repr, known))}. Its tensors fit, so it is served; unless the two are the same "
                "model, its answers mean nothing. Pass model_name to say what the base model is, or "
                "AdapterPool(base_model=...) to refuse adapters of others."
            )


def _warn(message: str) -> None:
    _logger.warning(message)
    warnings.warn(message, UserWarning, stacklevel=4)


def identity(thing: object) -> str:
    """Name an object so that no other one, of any process, has that name."""
    with _lock:
        return _identities.setdefault(thing, uuid.uuid4().hex)


def close_engine(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> None:
    """Stop the engine of a configuration, if it is loaded, and let go of its memory."""
    with _starting:
        engine = _engines.pop(_engine_key(source, model_kwargs, config), None)
        if engine is not None:  # nobody starts another on a model that is being given back
            engine.close()


def close_engines() -> None:
    """Stop every shared engine and let go of its memory; the next call of a chat model loads afresh."""
    with _starting:
        engines = list(_engines.values())
        _engines.clear()
        for engine in engines:
            engine.close()


def _start_engine(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> EngineWorker:
    return EngineWorker(load_base_model(source, **model_kwargs), config)


def _engine_key(source: ModelSource, model_kwargs: Mapping[str, Any], config: EngineConfig) -> Hashable:
    # repr, because quantization and device-map objects are seldom hashable but all print what they hold.
    return (_source_key(source), repr(sorted(model_kwargs.items())), config)


def _source_key(source: ModelSource) -> Hashable:
    if isinstance(source, tuple):
        return tuple(map(id, source))
    return str(source.resolve()) if isinstance(source, Path) else source


def _begin_in_child() -> None:
    """Make the locks anew in a forked process: a thread that held one is not there."""
    global _starting, _lock
    _starting, _lock = threading.Lock(), threading.Lock()


after_fork(_begin_in_child)
