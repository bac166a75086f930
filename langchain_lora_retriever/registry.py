"""Engines, retrievers and runtimes that chat models of one process share.

LangChain copies chat models freely (`configurable_fields` does for every run). A copy must neither load the weights
again nor embed the pool again.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from langchain_lora_retriever.engine import load_tokenizer
from langchain_lora_retriever.engine.start import start_engine
from langchain_lora_retriever.retrieval.encoder import SentenceTransformerEncoder
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder, default_encoder
from langchain_lora_retriever.retrieval.retriever import LoraRetriever
from langchain_lora_retriever.runtime import ReadyEngine, Runtime
from langchain_lora_retriever.support.forking import after_fork

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine import EngineClient, EngineConfig, EngineWorker, ModelSource
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.retrieval.encoder import Encoder
    from langchain_lora_retriever.runtime import EngineSource

__all__ = [
    "SharedEngine",
    "close_engines",
    "identity",
    "is_shared",
    "shared_retriever",
    "shared_runtime",
    "source_of",
    "vector_folder",
]

_logger = logging.getLogger(__name__)
_starting = threading.Lock()  # held while a model is loaded or given back, which may take minutes
_lock = threading.Lock()  # held for a look into a dictionary
_engines: dict[Hashable, EngineWorker] = {}
_encoders: WeakValueDictionary[Hashable, Encoder] = WeakValueDictionary()
_retrievers: WeakValueDictionary[Hashable, LoraRetriever] = WeakValueDictionary()
_runtimes: WeakValueDictionary[Hashable, Runtime] = WeakValueDictionary()
_identities: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


class SharedEngine:
    """The one engine that a process has of a configuration. Any thread may call.

    A model that is already loaded is told apart by identity, one still to load by its name and how it is loaded.

    Args:
        source: A hub name, a folder, or `(model, tokenizer)`.
        model_kwargs: For `from_pretrained`.
        config: The engine's limits.
        pool: Whose adapters it is started for, if it is started here: for their kinds it takes memory and captures
            graphs, where `config` does not say for which.
    """

    def __init__(
        self,
        source: ModelSource,
        model_kwargs: Mapping[str, Any],
        config: EngineConfig,
        pool: AdapterPool | None = None,
    ) -> None:
        self._pool = pool
        self._source = source
        self._model_kwargs = dict(model_kwargs)
        self._config = config
        # repr, because quantization and device-map objects are seldom hashable but all print what they hold.
        self.key: Hashable = (_source_key(source), repr(sorted(model_kwargs.items())), config)

    def running(self) -> EngineWorker | None:
        """The engine, if it is loaded and alive. Never blocks."""
        engine = _engines.get(self.key)
        return engine if engine is not None and engine.is_alive else None

    def get(self) -> EngineWorker:
        """The engine; loads the base model if nobody has used it yet, or its engine was closed or has died.

        A second caller waits for the first one's load.
        """
        engine = self.running()
        if engine is not None:
            return engine
        with _starting:
            engine = _engines.get(self.key)
            if engine is not None and engine.is_alive:
                return engine
            if engine is not None:
                engine.check_process()
                _logger.warning("The engine of %s has stopped; starting a new one.", engine.info.name)
                engine.close()  # returns once it has given back the model and its memory
            entries = self._pool.state.entries.values() if self._pool is not None else ()
            adapters = [entry.adapter for entry in entries]
            engine = start_engine(self._source, self._model_kwargs, self._config, adapters)
            _engines[self.key] = engine
            return engine

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The engine's tokenizer; where there is no engine it is loaded by itself, which takes no weights."""
        engine = self.running()
        return self._own_tokenizer if engine is None else engine.tokenizer

    @cached_property
    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._source, **self._model_kwargs)

    def close(self) -> None:
        """Stop the engine, if it is loaded, give the base model back as it was, and let go of its memory."""
        with _starting:
            engine = _engines.pop(self.key, None)
            if engine is not None:  # nobody starts another on a model that is being given back
                engine.close()


def shared_runtime(engine: SharedEngine | EngineClient, retriever: LoraRetriever, model_name: str) -> Runtime:
    """Return the runtime of an engine and a retriever; it lives as long as a chat model uses it."""
    source: EngineSource = engine if isinstance(engine, SharedEngine) else ReadyEngine(engine)
    key = (engine.key if isinstance(engine, SharedEngine) else id(engine), id(retriever), model_name)
    with _lock:
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = Runtime(source, retriever, model_name=model_name)
        return runtime


def shared_retriever(pool: AdapterPool, encoder: str | Path | Encoder | None, instruction: str) -> LoraRetriever:
    """Return the retriever of a pool and an encoder, by default `default_encoder()`.

    It lives as long as a chat model uses it. Encoders of one recipe are one, and adapters' embeddings by them are kept
    for the next start, in `vector_folder()`.
    """
    encoder = default_encoder() if encoder is None else encoder
    recipe: Hashable = str(encoder) if isinstance(encoder, str | Path) else None
    if isinstance(encoder, HybridEncoder):
        recipe = encoder.recipe
    cache_dir = None if recipe is None else vector_folder()
    with _lock:
        if recipe is not None:
            made = SentenceTransformerEncoder(encoder) if isinstance(encoder, str | Path) else encoder
            encoder = _encoders.setdefault(recipe, made)
        assert not isinstance(encoder, str | Path), "it was made into one"
        key = (id(pool), id(encoder), instruction)
        retriever = _retrievers.get(key)
        if retriever is None:
            retriever = LoraRetriever(pool, encoder, instruction=instruction, cache_dir=cache_dir)
            _retrievers[key] = retriever
        return retriever


def vector_folder() -> Path | None:
    """Return where adapters' embeddings are kept: `LORA_RETRIEVER_CACHE` (nowhere if empty), or the user's cache."""
    named = os.environ.get("LORA_RETRIEVER_CACHE")
    if named is not None:
        return Path(named) if named else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "langchain-lora-retriever"


def is_shared(retriever: LoraRetriever) -> bool:
    """Whether a retriever was made here."""
    with _lock:
        return any(retriever is shared for shared in _retrievers.values())


def source_of(encoder: Encoder) -> str | None:
    """Return the name or folder that a shared encoder was made of; None for one that its caller made."""
    with _lock:
        found = (source for source, shared in _encoders.items() if shared is encoder and isinstance(source, str))
        return next(found, None)


def identity(thing: object) -> str:
    """Name an object so that no other one, of any process, has that name."""
    with _lock:
        return _identities.setdefault(thing, uuid.uuid4().hex)


def close_engines() -> None:
    """Stop every shared engine and let go of its memory; the next call of a chat model loads afresh."""
    with _starting:
        engines = list(_engines.values())
        _engines.clear()
        for engine in engines:
            engine.close()


def _source_key(source: ModelSource) -> Hashable:
    if isinstance(source, tuple):
        return tuple(map(id, source))
    return str(source.resolve()) if isinstance(source, Path) else source


def _begin_in_child() -> None:
    """Make the locks anew in a forked process: a thread that held one is not there."""
    global _starting, _lock
    _starting, _lock = threading.Lock(), threading.Lock()


after_fork(_begin_in_child)
