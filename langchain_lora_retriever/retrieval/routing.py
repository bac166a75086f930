"""From a text and a call's options to the composition to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from langchain_lora_retriever.errors import AdapterError, UnknownAdapterError, fresh
from langchain_lora_retriever.retrieval.composer import Weighting, compose, materialize, pin
from langchain_lora_retriever.support.checks import settings
from langchain_lora_retriever.types import CompositionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from langchain_lora_retriever.retrieval.retriever import LoraRetriever
    from langchain_lora_retriever.types import Adapter, Composition, RetrievedAdapter

__all__ = ["Plan", "Router", "RoutingOptions"]


_MAX_NAMES = 16_384
"""Names in one list of adapters."""
_MAX_NAME_LENGTH = 255
"""Characters of one name; no file system allows more."""
_NAMES = f"a list of at most {_MAX_NAMES} adapter names of at most {_MAX_NAME_LENGTH} characters"
_Name = Annotated[str, Field(min_length=1, max_length=_MAX_NAME_LENGTH)]
_Names = Annotated[list[_Name] | tuple[_Name, ...], Field(max_length=_MAX_NAMES)]


@settings(kw_only=True)
class RoutingOptions:
    """What may be asked of routing. Values are as `compose`, `pin` and `LoraRetriever.retrieve` take them.

    Attributes:
        adapters: Names that take the place of retrieval; empty runs the base model alone, None retrieves.
        exclude_adapters: Names retrieval must not return.
        composition: "selection", "fusion" or "mixture".
        top_k: Maximum number of adapters to compose.
        weights: "similarity" or "uniform" weights of retrieved adapters.
        weight_temperature: Temperature of the similarity weights; lower favours the best more.
        min_score: Cosine similarity under which an adapter is not used, or "auto" for each adapter's own, by its
            samples (`LoraRetriever.floor`); None uses whatever is nearest.
        model: An adapter's name to pin, or the base model's for no adapter, as OpenAI-style servers take it.
    """

    adapters: Annotated[_Names | None, Field(description=f"{_NAMES}; [] for the base model alone")] = None
    exclude_adapters: Annotated[_Names, Field(description=_NAMES)] = ()
    composition: CompositionMode = "mixture"
    top_k: Annotated[int, Field(ge=1, description="an integer >= 1")] = 3
    weights: Weighting = "similarity"
    weight_temperature: Annotated[float, Field(gt=0, description="a finite number > 0")] = 0.05
    min_score: Annotated[
        Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] | None,
        Field(description="a cosine similarity, from -1 to 1, 'auto', or None"),
    ] = None
    model: Annotated[
        str | None,
        Field(
            max_length=_MAX_NAME_LENGTH,
            description=f"an adapter's name, or the base model's, of at most {_MAX_NAME_LENGTH} characters",
        ),
    ] = None


class Plan(NamedTuple):
    """What to run for a text.

    Attributes:
        composition: The names, their scores and shares.
        adapters: What the engine is to run for it, with weights; a fusion is one adapter.
    """

    composition: Composition
    adapters: tuple[tuple[Adapter, float], ...]


def _nobody() -> Mapping[str, AdapterError]:
    return {}


class Router:
    """Decides which adapters a call runs: those it names, or those retrieved for its text.

    Any thread or event loop may call.

    Args:
        retriever: Finds adapters for a text.
        base_name: The base model's name, which the `model` option may hold to ask for no adapter.
        refused: Says which adapters of the pool the engine cannot run, by name, and why. They are not retrieved.
    """

    def __init__(
        self,
        retriever: LoraRetriever,
        base_name: str = "",
        refused: Callable[[], Mapping[str, AdapterError]] = _nobody,
    ) -> None:
        self._retriever = retriever
        self._pool = retriever.pool
        self._base_name = base_name
        self._refused = refused

    def route(self, text: str, options: RoutingOptions) -> Composition:
        """Choose the composition for a text.

        Raises:
            UnknownAdapterError: If a name in the options is not in the pool.
            AdapterError: If a name in the options is of an adapter that was refused; it says why.
            InvalidRequestError: If the options pin adapters that cannot be composed.
        """
        pinned = self._pinned(options)
        if pinned is not None:
            return pinned
        return self._composed(self._retriever.retrieve(text, **self._query(options)), options)

    async def aroute(self, text: str, options: RoutingOptions) -> Composition:
        """Do what `route` does; texts of calls that wait at the same time are embedded together."""
        pinned = self._pinned(options)
        if pinned is not None:
            return pinned
        return self._composed(await self._retriever.aretrieve(text, **self._query(options)), options)

    def plan(self, text: str, options: RoutingOptions) -> Plan:
        """Choose the composition for a text, and the weighted adapters that make it."""
        while True:
            try:
                composition = self.route(text, options)
                return Plan(composition, materialize(composition, self._pool))
            except UnknownAdapterError:
                self._raise_if_named(options)  # else an adapter was removed meanwhile: retrieve again, without it

    async def aplan(self, text: str, options: RoutingOptions) -> Plan:
        """Do what `plan` does without blocking the event loop."""
        while True:
            try:
                composition = await self.aroute(text, options)
                return Plan(composition, materialize(composition, self._pool))
            except UnknownAdapterError:
                self._raise_if_named(options)

    async def aprepare(self, texts: Sequence[str], options: RoutingOptions) -> None:
        """Embed together the texts of calls that are about to be routed."""
        if self._pinned(options) is None:
            await self._retriever.aprepare(texts)

    def _pinned(self, options: RoutingOptions) -> Composition | None:
        names = options.adapters
        if options.model is not None:
            names = () if options.model == self._base_name else (options.model,)
        if names is None:
            if len(self._pool):
                return None
            names = ()
        self._check_usable(names)
        return pin(names, mode=options.composition)

    def _query(self, options: RoutingOptions) -> dict[str, Any]:
        self._check_known(options.exclude_adapters)
        state, excluded = self._pool.state, self._excluded(options)
        unserved = {name for name, members in state.members(excluded).items() if not members}
        known = state.entries.keys() | state.tasks.keys() if state.tasks else state.entries.keys()
        return {"top_k": options.top_k, "exclude": (excluded | unserved) & known}

    def _excluded(self, options: RoutingOptions) -> frozenset[str]:
        return frozenset(options.exclude_adapters).union(self._refused())

    def _raise_if_named(self, options: RoutingOptions) -> None:
        """Raise what is wrong with the names that the caller gave, if anything is."""
        self._pinned(options)
        self._check_known(options.exclude_adapters)

    def _composed(self, retrieved: Sequence[RetrievedAdapter], options: RoutingOptions) -> Composition:
        if options.min_score == "auto":
            retrieved = [adapter for adapter in retrieved if adapter.score >= self._retriever.floor(adapter.name)]
        elif options.min_score is not None:
            retrieved = [adapter for adapter in retrieved if adapter.score >= options.min_score]
        tasks = self._pool.state.members(self._excluded(options))
        return compose(
            [adapter for adapter in retrieved if tasks.get(adapter.name, True)],  # the members may have gone meanwhile
            mode=options.composition,
            weights=options.weights,
            temperature=options.weight_temperature,
            tasks=tasks,
        )

    def _check_usable(self, names: Sequence[str]) -> None:
        """Raise why a pinned name cannot run, if one cannot."""
        state, refused = self._pool.state, self._refused()
        for name in names:
            error = state.rejected.get(name) or refused.get(name)
            if error is not None:
                raise fresh(error)
            state[name]  # raises UnknownAdapterError, with the names that are near

    def _check_known(self, names: Sequence[str]) -> None:
        """Raise that there is no such adapter, if an excluded name is of none; one that was refused may be excluded."""
        state = self._pool.state
        for name in names:
            if name not in state.rejected and name not in state.tasks:
                state[name]
