"""Giving the engine many prompts at once, and taking them back when their caller goes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.outputs import LLMResult
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list, patch_config

from langchain_lora_retriever.errors import RequestAbortedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_core.language_models import LanguageModelInput
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.runnables import RunnableConfig

    from langchain_lora_retriever.engine import Generation

__all__ = ["ConcurrentChatModel", "owned"]

_BEGUN_TOGETHER = 8
"""Calls of an `abatch` that begin in one turn of the event loop."""


class ConcurrentChatModel(BaseChatModel):
    """A chat model whose batches are as wide as its engine.

    LangChain's own run as many prompts as there are cores and four, and `generate` runs them one by one.
    """

    def _max_concurrency(self) -> int:
        """Return how many calls may be under way at once where the caller sets no `max_concurrency`."""
        raise NotImplementedError

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
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer prompts together without blocking the event loop; all are queued at once by default.

        Calls begin a few at a time, one portion per turn of the event loop: it takes turns in the order they were asked
        for, so the last of many calls begun together would be prepared before the first could go on to the engine.
        """
        configs = get_config_list(config, len(inputs))
        if len(inputs) <= _BEGUN_TOGETHER or configs[0].get("max_concurrency") is not None:
            return await super().abatch(inputs, configs, **kwargs)
        starts = range(0, len(inputs), _BEGUN_TOGETHER)
        turns = [asyncio.Event() for _ in range(len(starts) + 1)]
        turns[0].set()

        async def answer(index: int, start: int) -> list[AIMessage]:
            await turns[index].wait()
            asyncio.get_running_loop().call_soon(turns[index + 1].set)
            end = start + _BEGUN_TOGETHER
            return await BaseChatModel.abatch(self, inputs[start:end], configs[start:end], **kwargs)

        portions = await asyncio.gather(*(answer(index, start) for index, start in enumerate(starts)))
        return [message for portion in portions for message in portion]

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


@contextmanager
def owned(generations: Sequence[Generation], timeout: float | None) -> Iterator[None]:
    """Abort generations that their caller leaves before they end: by an error, a cancellation, a close, a timeout.

    Args:
        generations: Generations just submitted.
        timeout: Seconds until they are aborted; None for no limit.

    Raises:
        TimeoutError: In place of `RequestAbortedError`, if the timeout was the reason.
    """
    is_late = threading.Event()

    def abort() -> None:
        for generation in generations:
            generation.abort()

    def expire() -> None:
        is_late.set()
        abort()

    timer = threading.Timer(timeout, expire) if timeout is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    except RequestAbortedError as error:
        if is_late.is_set():
            raise TimeoutError(f"The call took longer than timeout={timeout} s and was aborted.") from error
        raise
    finally:
        if timer is not None:
            timer.cancel()
        abort()
