"""The routing step of a call as a run of its own in a trace: a retriever's, whose documents are adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config
from langchain_core.utils.uuid import uuid7

from langchain_lora_retriever.retrieval.routing import Plan, RoutingOptions
from langchain_lora_retriever.runtime import Runtime
from langchain_lora_retriever.types import Composition

__all__ = ["TracedChatModel", "aplanner", "planner"]

_NAME = "LoraRetriever"
_streaming: ContextVar[Any] = ContextVar("streaming", default=None)
"""The callback manager of the stream that begins, for the children of its run."""

Manager = TypeVar("Manager", CallbackManager, AsyncCallbackManager)


class TracedChatModel(BaseChatModel):
    """A chat model whose streams know the run they are: LangChain tells `_generate` of it, and not `_stream`."""

    def stream(
        self,
        input: LanguageModelInput,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Stream an answer; see `BaseChatModel.stream`."""
        config, children = _with_children(CallbackManager, config)
        with closing(super().stream(input, config, stop=stop, **kwargs)) as chunks:  # type: ignore[type-var]
            with _begun_under(children):
                first = next(chunks, None)
            if first is not None:
                yield first
                yield from chunks

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Stream an answer without blocking the event loop; see `BaseChatModel.astream`."""
        config, children = _with_children(AsyncCallbackManager, config)
        # Not closed by us: its loop does that once nobody holds it, and, when the loop ends, with all others at once.
        chunks = super().astream(input, config, stop=stop, **kwargs)
        with _begun_under(children):
            first = await anext(chunks, None)
        if first is not None:
            yield first
            async for chunk in chunks:
                yield chunk


def planner(runtime: Runtime, run_manager: CallbackManagerForLLMRun | None) -> Callable[[str, RoutingOptions], Plan]:
    """Return the runtime's `plan`; where somebody listens, one that tells of itself as a child of the call's run."""
    manager = _streaming.get() if run_manager is None else _children(CallbackManager, run_manager)
    if not (isinstance(manager, CallbackManager) and manager.handlers):
        return runtime.plan
    manager.add_metadata(_metadata(runtime))

    def plan(text: str, options: RoutingOptions) -> Plan:
        run = manager.on_retriever_start(None, text, name=_NAME)
        try:
            made = runtime.plan(text, options)
        except BaseException as error:
            run.on_retriever_error(error)
            raise
        run.on_retriever_end(_documents(made.composition))
        return made

    return plan


def aplanner(
    runtime: Runtime, run_manager: AsyncCallbackManagerForLLMRun | None
) -> Callable[[str, RoutingOptions], Awaitable[Plan]]:
    """Do what `planner` does, for a call in an event loop."""
    manager = _streaming.get() if run_manager is None else _children(AsyncCallbackManager, run_manager)
    if not (isinstance(manager, AsyncCallbackManager) and manager.handlers):
        return runtime.aplan
    manager.add_metadata(_metadata(runtime))

    async def aplan(text: str, options: RoutingOptions) -> Plan:
        run = await manager.on_retriever_start(None, text, name=_NAME)
        try:
            made = await runtime.aplan(text, options)
        except BaseException as error:
            await run.on_retriever_error(error)
            raise
        await run.on_retriever_end(_documents(made.composition))
        return made

    return aplan


def _with_children(kind: type[Manager], config: RunnableConfig | None) -> tuple[RunnableConfig, Manager | None]:
    """Name the run that a stream will be, and make the callback manager of its children, if anybody listens.

    The stream and its children share the handlers, so that a tracer knows both.
    """
    config = ensure_config(config)
    manager = kind.configure(config.get("callbacks"))
    if not manager.inheritable_handlers:
        return config, None
    run_id = config.get("run_id") or uuid7()
    children = kind(handlers=[], parent_run_id=run_id)
    children.set_handlers(manager.inheritable_handlers)
    children.add_tags(config.get("tags") or [])
    children.add_metadata(config.get("metadata") or {})
    return {**config, "callbacks": manager, "run_id": run_id}, children


def _children(kind: type[Manager], run_manager: Any) -> Manager:
    """Make the callback manager of a run's children."""
    manager = kind(handlers=[], parent_run_id=run_manager.run_id)
    manager.set_handlers(run_manager.inheritable_handlers)
    manager.add_tags(run_manager.inheritable_tags)
    manager.add_metadata(run_manager.inheritable_metadata)
    return manager


@contextmanager
def _begun_under(children: CallbackManager | AsyncCallbackManager | None) -> Iterator[None]:
    """Let a stream that begins within find the manager of its children."""
    token = _streaming.set(children)
    try:
        yield
    finally:
        _streaming.reset(token)


def _documents(composition: Composition) -> list[Document]:
    """Return a composition's adapters as a retriever's documents, best first."""
    return [
        Document(
            id=adapter.name,
            page_content=adapter.name,
            metadata={"score": adapter.score, "weight": adapter.weight, "composition": composition.mode},
        )
        for adapter in composition.adapters
    ]


def _metadata(runtime: Runtime) -> dict[str, str]:
    return {"ls_retriever_name": "lora_retriever", "ls_embedding_model": runtime.retriever.encoder.name}
