"""What answers prompts: an engine and a retriever, and what of the retriever's pool the engine can run.

Chat models, servers, evaluation and the command line hold one; nobody above needs to know which engine it is.
"""

from __future__ import annotations

import logging
import threading
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from langchain_lora_retriever.retrieval.routing import Router
from langchain_lora_retriever.support.base_names import is_same_base_model
from langchain_lora_retriever.support.forking import begin_in_every_process
from langchain_lora_retriever.support.threads import SingleFlight, run_in_thread
from langchain_lora_retriever.support.warn import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import EngineClient
    from langchain_lora_retriever.errors import AdapterError
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever
    from langchain_lora_retriever.retrieval.routing import Plan, RoutingOptions
    from langchain_lora_retriever.types import Adapter, Composition

__all__ = ["EngineSource", "ReadyEngine", "Runtime"]

_logger = logging.getLogger(__name__)
_MOST_NAMED = 8
"""Adapters that one warning names."""


class EngineSource(Protocol):
    """Where an engine comes from. Any thread may call."""

    def running(self) -> EngineClient | None:
        """The engine, if it is loaded and alive. Never blocks."""

    def get(self) -> EngineClient:
        """The engine; loads it if it is not there, which may take minutes."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The engine's tokenizer, for which no engine is loaded."""

    def close(self) -> None:
        """Stop the engine, if it is loaded, and let go of its memory."""


class ReadyEngine:
    """An engine that was made already.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def running(self) -> EngineClient | None:
        """The engine, whether it is alive or not: there is no other."""
        return self._engine

    def get(self) -> EngineClient:
        """The engine."""
        return self._engine

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._engine.tokenizer

    def close(self) -> None:
        """Close it."""
        self._engine.close()


class Runtime:
    """An engine, a retriever, and what of the retriever's pool the engine can run. Any thread or event loop may call.

    The pool is only read: an adapter that this engine or this encoder cannot use is left out here, and stands in
    `rejected`; others may use it.

    Args:
        source: Where the engine comes from; it is loaded when it is first needed.
        retriever: Finds adapters for texts.
        model_name: What the base model is called. Asked for as `model`, it means no adapter.
    """

    def __init__(self, source: EngineSource, retriever: LoraRetriever, *, model_name: str = "") -> None:
        self.retriever = retriever
        self._source = source
        self._fit = _PoolFit(retriever.pool, model_name)
        self._router = Router(retriever, model_name, self._fit.refused)
        self._looks: SingleFlight[EngineClient] = SingleFlight()
        self._reads: SingleFlight[object] = SingleFlight()

    @property
    def pool(self) -> AdapterPool:
        """The retriever's pool."""
        return self.retriever.pool

    @property
    def engine(self) -> EngineClient:
        """The engine; loads it if it is not there, which may take minutes."""
        return self._source.get()

    @property
    def running_engine(self) -> EngineClient | None:
        """The engine, if it is loaded. Never blocks."""
        return self._source.running()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The engine's tokenizer; to count tokens, no weights are loaded."""
        return self._source.tokenizer()

    @property
    def rejected(self) -> Mapping[str, AdapterError]:
        """Why adapters of the pool cannot be used here, by name.

        Those whose files cannot be read; those that the engine cannot run, once it is loaded; those that prompts do not
        find with this encoder, once the pool was embedded. The last may still be pinned.
        """
        known = {**self.retriever.rejected, **self._fit.refused(), **self.pool.rejected}
        return MappingProxyType(known)

    @property
    def undescribed(self) -> Mapping[str, str]:
        """The pool's adapters that can be pinned and that no prompt finds, by name, with what to do about it.

        Nothing is wrong with them; see `AdapterPool.undescribed`. Those that stand in `rejected` are left out.
        """
        rejected = self.rejected
        return MappingProxyType({name: told for name, told in self.pool.undescribed.items() if name not in rejected})

    def ready(self) -> EngineClient:
        """Load the engine if it is not there, and have it look at what is new in the pool."""
        engine = self.engine
        self._fit.follow(engine)
        return engine

    async def aready(self) -> EngineClient:
        """Do what `ready` does without blocking the event loop; one thread does it for all who wait."""
        engine = self._ready_engine()
        if engine is None:
            engine = await self._looks.run(self.ready)
            if self._ready_engine() is None:  # that look began before this call, and may have missed the last change
                engine = await self._looks.run(self.ready)
        return engine

    def _ready_engine(self) -> EngineClient | None:
        """The engine, if it is loaded and there is nothing new for it to look at. Never blocks."""
        engine = self.running_engine
        is_ready = engine is not None and self.pool.is_read and self._fit.is_current(engine)
        return engine if is_ready else None

    def warm_up(self) -> EngineClient:
        """Do now what the first calls would wait for: read the pool and embed it, load the encoder and the base model.

        Raises:
            LoraRetrieverError: Whatever the first calls would meet: a pool, an encoder or a model that cannot be had.
        """
        if len(self.pool):
            self.retriever.refresh()
            self.retriever.embed(["warm up"])  # loads the encoder, which is not there if all embeddings were kept
        return self.ready()

    async def awarm_up(self) -> EngineClient:
        """Do what `warm_up` does without blocking the event loop."""
        return await run_in_thread(self.warm_up)

    def route(self, text: str, options: RoutingOptions) -> Composition:
        """Choose the composition for a text; see `Router.route`."""
        return self._router.route(text, options)

    async def aroute(self, text: str, options: RoutingOptions) -> Composition:
        """Do what `route` does; texts of calls that wait at the same time are embedded together."""
        await self._aread()
        return await self._router.aroute(text, options)

    def plan(self, text: str, options: RoutingOptions) -> Plan:
        """Choose the composition for a text, and the weighted adapters that make it."""
        return self._router.plan(text, options)

    async def aplan(self, text: str, options: RoutingOptions) -> Plan:
        """Do what `plan` does without blocking the event loop."""
        await self._aread()
        return await self._router.aplan(text, options)

    async def aprepare(self, texts: Sequence[str], options: RoutingOptions) -> None:
        """Embed together the texts of calls that are about to be routed."""
        await self._aread()
        await self._router.aprepare(texts, options)

    async def _aread(self) -> None:
        """Read the pool's folder, if nobody has, without blocking the event loop."""
        if not self.pool.is_read:
            await self._reads.run(lambda: self.pool.state)

    def close(self) -> None:
        """Stop the engine, give the base model back as it was, and let go of its memory.

        Others of the process that share the engine lose it too. One that was loaded here is loaded anew when it is
        needed again.
        """
        self._source.close()

    async def aclose(self) -> None:
        """Do what `close` does without blocking the event loop."""
        await run_in_thread(self.close)


class _PoolFit:
    """Which adapters of a pool an engine can run. Looked at anew when the pool has changed, or the engine is another.

    Args:
        pool: The pool; it is only read.
        model_name: What the base model is called, beside what the engine knows.
    """

    def __init__(self, pool: AdapterPool, model_name: str) -> None:
        self._pool = pool
        self._model_name = model_name
        self._outcomes: dict[tuple[str, str], AdapterError | None] = {}  # by name and fingerprint
        self._refused: Mapping[str, AdapterError] = {}
        self._engine: weakref.ref[EngineClient] | None = None
        self._version = -1
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # one thread looks

    def refused(self) -> Mapping[str, AdapterError]:
        """Why the engine cannot run adapters, by name."""
        return self._refused

    def is_current(self, engine: EngineClient) -> bool:
        """Whether there is nothing new to look at."""
        return self._version == self._pool.version and self._engine is not None and self._engine() is engine

    def follow(self, engine: EngineClient) -> None:
        """Have the engine look at what is new in the pool; warn of adapters that it refuses, and of doubtful ones."""
        if self.is_current(engine):
            return
        with self._lock:
            if self.is_current(engine):
                return
            known = self._outcomes if self._engine is not None and self._engine() is engine else {}
            state = self._pool.state
            adapters = {(name, entry.adapter.fingerprint): entry.adapter for name, entry in state.entries.items()}
            outcomes = {key: known[key] for key in adapters if key in known}
            new = [key for key in sorted(adapters) if key not in known]
            strangers: dict[str, list[Adapter]] = {}  # that name another base model, by what they name
            for key, (error, missing) in zip(new, engine.register([adapters[key] for key in new]), strict=True):
                outcomes[key] = error
                if error is not None:
                    _warn(f"refused: {error}")
                    continue
                _tell_missing(adapters[key], missing)
                made_for = adapters[key].base_model
                if made_for and not self._is_known(made_for, engine):
                    strangers.setdefault(made_for, []).append(adapters[key])
            for made_for, those in strangers.items():
                self._tell_strangers(made_for, those, engine)
            self._outcomes = outcomes
            self._refused = {name: error for (name, _), error in outcomes.items() if error is not None}
            self._engine, self._version = weakref.ref(engine), state.version

    def _known_names(self, engine: EngineClient) -> list[str]:
        """What the base model is called; nothing where the engine does not know."""
        return sorted({*engine.info.base_names, self._model_name} - {""}) if engine.info.base_names else []

    def _is_known(self, made_for: str, engine: EngineClient) -> bool:
        """Whether a name that adapters give their base model is this one's."""
        known = self._known_names(engine)
        return not known or any(is_same_base_model(name, made_for) for name in known)

    def _tell_strangers(self, made_for: str, adapters: Sequence[Adapter], engine: EngineClient) -> None:
        """Warn, once, of adapters that name one other base model whose shapes agree."""
        names = [repr(adapter.name) for adapter in adapters]
        if len(names) == 1:
            who, fit = f"adapter {names[0]} ({adapters[0].path}) was", "Its tensors fit, so it is served"
        else:
            listed = f"{', '.join(names[:_MOST_NAMED])}{', ...' * (len(names) > _MOST_NAMED)}"
            who, fit = f"{len(names)} adapters ({listed}) were", "Their tensors fit, so they are served"
        _warn(
            f"{who} trained for the base model {made_for!r}; the one here is "
            f"{' or '.join(map(repr, self._known_names(engine)))}. {fit}; unless the two are the same model, answers "
            "mean nothing. Pass model_name to say what the base model is, or AdapterPool(base_model=...) to refuse "
            "adapters of others."
        )


def _tell_missing(adapter: Adapter, missing: Sequence[str]) -> None:
    """Warn of an adapter that runs but is incomplete."""
    if missing:
        _warn(
            f"adapter {adapter.name!r} ({adapter.path}) lacks {len(missing)} of the "
            f"{len(missing) + len(adapter.shapes)} modules that its configuration targets: {', '.join(missing[:4])}"
            f"{', ...' * (len(missing) > 4)}. They run as the base model's. If its file is one shard of several, or an "
            "interrupted save, save it again."
        )


def _warn(message: str) -> None:
    warn(_logger, message, stacklevel=5)
