"""Giving the engine many prompts at once: batches as wide as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list, patch_config

from langchain_lora_retriever.chat.tracing import TracedChatModel

__all__ = ["ConcurrentChatModel", "reached_engine"]

_GROUP_SIZE = 64
"""Prompts of an `abatch` that are embedded together, before the first of them begins."""
_NUM_BEGUN = 4
"""Calls of an `abatch` that begin at first."""
_ROOM_MADE = 2
"""Calls that may begin for each that has reached the engine, which then is busy for as long as they take."""

_prepared: ContextVar[Callable[[], None] | None] = ContextVar("prepared", default=None)


def reached_engine() -> None:
    """Say that the current call has been given to the engine, so that another may be prepared."""
    tell = _prepared.get()
    if tell is not None:
        tell()


class ConcurrentChatModel(TracedChatModel):
    """A chat model whose batches are as wide as its engine.

    LangChain's own run as many prompts as there are cores and four, and `generate` runs them one by one.
    """

    def _max_concurrency(self) -> int:
        """Return how many calls may be under way at once where the caller sets no `max_concurrency`."""
        raise NotImplementedError

    async def _aprepare(self, inputs: Sequence[LanguageModelInput], **kwargs: Any) -> None:
        """Do for calls that are about to begin what costs less together. Raises nothing: the calls would again."""

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer prompts together; `max_concurrency` in the config limits how many the engine is given at once."""
        return super().batch(inputs, self._concurrent(config, inputs), **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer prompts together without blocking the event loop; all are queued at once by default.

        Prompts are embedded in groups, a group when those before it are with the engine. Their calls begin a few at a
        time. Begun together, the last of many would take the interpreter from the first, whose prompt the engine could
        be computing by then; and on a GPU each of an encoder's hundred small kernels waits for a part of the engine's
        step, so one pass over many texts is better than many over a few.
        """
        configs = get_config_list(config, len(inputs))
        if len(inputs) <= 1 or configs[0].get("max_concurrency") is not None:
            return await super().abatch(inputs, configs, return_exceptions=return_exceptions, **kwargs)
        groups = [inputs[start : start + _GROUP_SIZE] for start in range(0, len(inputs), _GROUP_SIZE)]
        are_prepared = [asyncio.Event() for _ in groups]
        room, arrivals = asyncio.Semaphore(_NUM_BEGUN), asyncio.Semaphore(0)

        async def prepare() -> None:
            for group, is_prepared in zip(groups, are_prepared, strict=True):
                await self._aprepare(group, **kwargs)
                is_prepared.set()
                for _ in group:
                    await arrivals.acquire()

        def on_arrival() -> None:
            arrivals.release()
            for _ in range(_ROOM_MADE):
                room.release()

        async def answer(index: int) -> Any:
            await are_prepared[index // _GROUP_SIZE].wait()
            await room.acquire()
            arrive = _once(on_arrival)
            _prepared.set(arrive)  # in the context of this task and of those it starts
            try:
                return await self.ainvoke(inputs[index], configs[index], **kwargs)
            except Exception as error:
                if not return_exceptions:
                    raise
                return error
            finally:
                arrive()  # a cached answer, or one that failed before, never reaches the engine

        _, *answers = await asyncio.gather(prepare(), *map(answer, range(len(inputs))))
        return answers

    def batch_as_completed(
        self,
        inputs: Sequence[LanguageModelInput],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Answer prompts together and yield `(index, answer)` as they finish."""
        return super().batch_as_completed(inputs, self._concurrent(config, inputs), **kwargs)

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        """Answer conversations together. Each is a run of its own; a `run_id` belongs to the first."""
        if len(messages) <= 1:
            return super().generate(messages, stop, callbacks, **kwargs)
        run_id = kwargs.pop("run_id", None)

        def generate_one(index: int) -> LLMResult:
            own = {"run_id": run_id} if run_id is not None and index == 0 else {}
            return BaseChatModel.generate(self, [messages[index]], stop, callbacks, **own, **kwargs)

        with ContextThreadPoolExecutor(max_workers=self._max_concurrency()) as executor:
            results = list(executor.map(generate_one, range(len(messages))))
        return LLMResult(
            generations=[result.generations[0] for result in results],
            llm_output=results[0].llm_output,
            run=[run for result in results for run in result.run or []] or None,
        )

    def _concurrent(
        self, config: RunnableConfig | Sequence[RunnableConfig] | None, inputs: Sequence[Any]
    ) -> list[RunnableConfig]:
        configs = get_config_list(config, len(inputs))
        if configs and configs[0].get("max_concurrency") is None:
            configs[0] = patch_config(configs[0], max_concurrency=self._max_concurrency())
        return configs


def _once(action: Callable[[], None]) -> Callable[[], None]:
    """`action`, which only the first call performs."""
    actions = [action]

    def act() -> None:
        if actions:
            actions.pop()()

    return act
