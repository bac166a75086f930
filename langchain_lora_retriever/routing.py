"""From a text and a call's options to the composition to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_lora_retriever.composer import compose, materialize, pin
from langchain_lora_retriever.errors import UnknownAdapterError, fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.call_options import CallOptions
    from langchain_lora_retriever.retriever import LoraRetriever
    from langchain_lora_retriever.types import Adapter, Composition, RetrievedAdapter

__all__ = ["Router"]

Plan: TypeAlias = "tuple[Composition, tuple[tuple[Adapter, float], ...]]"


class Router:
    """Decides which adapters a call runs: those it names, or those retrieved for its text.

    Any thread or event loop may call.

    Args:
        retriever: Finds adapters for a text.
        base_name: The base model's name, which the `model` option may hold to ask for no adapter.
    """

    def __init__(self, retriever: LoraRetriever, base_name: str) -> None:
        self.retriever = retriever
        self.pool = retriever.pool
        self._base_name = base_name

    def route(self, text: str, options: CallOptions) -> Composition:
        """Choose the composition for a text.

        Raises:
            UnknownAdapterError: If a name in the options is not in the pool.
            AdapterError: If a name in the options is of an adapter that was refused; it says why.
            InvalidRequestError: If the options pin adapters that cannot be composed.
        """
        pinned = self._pinned(options)
        if pinned is not None:
            return pinned
        return self._composed(self.retriever.retrieve(text, **self._query(options)), options)

    async def aroute(self, text: str, options: CallOptions) -> Composition:
        """Do what `route` does; texts of calls that wait at the same time are embedded together."""
        pinned = self._pinned(options)
        if pinned is not None:
            return pinned
        return self._composed(await self.retriever.aretrieve(text, **self._query(options)), options)

    def plan(self, text: str, options: CallOptions) -> Plan:
        """Choose the composition for a text, and the weighted adapters that make it."""
        while True:
            composition = self.route(text, options)
            try:
                return composition, materialize(composition, self.pool)
            except UnknownAdapterError:
                if self._pinned(options) is not None:
                    raise
                # An adapter was removed between its retrieval and now: retrieve again, without it.

    async def aplan(self, text: str, options: CallOptions) -> Plan:
        """Do what `plan` does without blocking the event loop."""
        while True:
            composition = await self.aroute(text, options)
            try:
                return composition, materialize(composition, self.pool)
            except UnknownAdapterError:
                if self._pinned(options) is not None:
                    raise

    async def aprepare(self, texts: Sequence[str], options: CallOptions) -> None:
        """Embed together the texts of calls that are about to be routed."""
        if self._pinned(options) is None:
            await self.retriever.aprepare(texts)

    def _pinned(self, options: CallOptions) -> Composition | None:
        names = options.adapters
        if options.model is not None:
            names = () if options.model == self._base_name else (options.model,)
        if names is None:
            if len(self.pool):
                return None
            names = ()
        self._check_names(names)
        return pin(names, mode=options.composition)

    def _query(self, options: CallOptions) -> dict[str, Any]:
        self._check_names(options.exclude_adapters)
        return {"top_k": options.top_k, "exclude": frozenset(options.exclude_adapters)}

    def _composed(self, retrieved: Sequence[RetrievedAdapter], options: CallOptions) -> Composition:
        if options.min_score is not None:
            retrieved = [adapter for adapter in retrieved if adapter.score >= options.min_score]
        return compose(
            retrieved, mode=options.composition, weights=options.weights, temperature=options.weight_temperature
        )

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.pool:
                if name in self.pool.rejected:
                    raise fresh(self.pool.rejected[name])
                self.pool[name]  # raises UnknownAdapterError, with the names that are near
