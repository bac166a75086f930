"""The chat model: wires messages, routing and the engine together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.utils import LC_ID_PREFIX
from langchain_core.utils.uuid import uuid7
from langchain_protocol.protocol import MessagesData

from langchain_lora_retriever.chat.batching import reached_engine
from langchain_lora_retriever.chat.begin import Begun, abegin, begin, num_prompt_tokens, owned, text_to_route
from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.chat.messages import (
    check_messages,
    check_num_messages,
    encode_text,
)
from langchain_lora_retriever.chat.profile import loaded_profile
from langchain_lora_retriever.chat.settings import ChatSettings, GivenSettings
from langchain_lora_retriever.chat.structured_output import structured_output
from langchain_lora_retriever.chat.tracing import aplanner, planner
from langchain_lora_retriever.engine import Completion, Delta, EngineClient
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.events import AnswerEvents
from langchain_lora_retriever.output.stream import AnswerStream
from langchain_lora_retriever.output.tools import to_tool_choice, to_tools
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.support.threads import Deadline, run_within
from langchain_lora_retriever.types import Composition

Streamed = TypeVar("Streamed")

__all__ = ["ChatLoraRetriever"]

_UNKNOWN_CONCURRENCY = 64
"""Requests that are taken to run at once in an engine that is not loaded yet."""


class ChatLoraRetriever(ChatSettings):
    """A chat model that retrieves, composes and runs LoRA adapters per prompt.

    Every call is routed on its last human message, and runs in one continuous batch with all others of the process
    that use the same base model. Weights are loaded at first use, once per process.

    The constructor takes the settings that `ChatSettings` describes. Most of them may also be given per call
    (`llm.invoke(..., top_k=1)`, `llm.bind(adapters=["sql"])`).

    Example:
        >>> llm = ChatLoraRetriever(base_model="HuggingFaceTB/SmolLM2-135M-Instruct", pool="path/to/pool")
        ... # doctest: +SKIP
        >>> llm.invoke("How many users signed up in May?").response_metadata["adapters"]  # doctest: +SKIP
        [{'name': 'sql', 'score': 0.83, 'weight': 0.9375}, ...]
    """

    if TYPE_CHECKING:

        def __init__(self, **settings: Unpack[GivenSettings]) -> None: ...

    # Routing

    def route(self, input: LanguageModelInput, **kwargs: Any) -> Composition:  # noqa: A002 - LangChain's name
        """Say which adapters a prompt would run, without generating anything.

        Args:
            input: A prompt, as for `invoke`.
            **kwargs: Settings of this call.

        Raises:
            UnknownAdapterError: If a pinned or excluded name is not in the pool.
            InvalidRequestError: If a setting is unknown or not allowed.
        """
        options = CallOptions.merge(self, kwargs)
        return self._runtime.route(text_to_route(self._convert_input(input).to_messages(), options), options)

    async def aroute(self, input: LanguageModelInput, **kwargs: Any) -> Composition:  # noqa: A002 - LangChain's name
        """Do what `route` does, embedding together with other calls that wait."""
        options = CallOptions.merge(self, kwargs)
        return await self._runtime.aroute(text_to_route(self._convert_input(input).to_messages(), options), options)

    # Generation

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(stop, kwargs)
        deadline = Deadline(options.timeout)
        begun = run_within(deadline, lambda: self._begin(messages, options, run_manager), discard=Begun.abort)
        with owned(begun, deadline) as generations:
            completions = [generation.result(deadline.remaining()) for generation in generations]
            return self._to_result(begun, options, completions)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(stop, kwargs)
        deadline = Deadline(options.timeout)
        async with deadline.limit():
            begun = await self._abegin(messages, options, run_manager)
        with owned(begun, deadline, asyncio.get_running_loop()) as generations:
            completions = await asyncio.gather(*(generation.aresult() for generation in generations))
            return self._to_result(begun, options, completions)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        return self._streamed(self._chunks, messages, stop, run_manager, kwargs)

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        return self._astreamed(self._chunks, messages, stop, run_manager, kwargs)

    def _stream_chat_model_events(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[MessagesData]:
        """Stream events of content blocks, which LangChain looks for by this name."""
        make = partial(self._events, run_manager)
        return self._streamed(make, messages, stop, run_manager, kwargs)

    def _astream_chat_model_events(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[MessagesData]:
        """Do what `_stream_chat_model_events` does without blocking the event loop."""
        make = partial(self._events, run_manager)
        return self._astreamed(make, messages, stop, run_manager, kwargs)

    def _streamed(
        self,
        make: Callable[[Begun, CallOptions], Callable[[Delta], Iterator[Streamed]]],
        messages: Sequence[BaseMessage],
        stop: Sequence[str] | None,
        run_manager: CallbackManagerForLLMRun | None,
        kwargs: Mapping[str, Any],
    ) -> Iterator[Streamed]:
        """Yield what the function that `make` returns makes of each delta."""
        options = self._options(stop, kwargs, is_stream=True)
        deadline = Deadline(options.timeout)
        begun = run_within(deadline, lambda: self._begin(messages, options, run_manager), discard=Begun.abort)
        push = make(begun, options)
        with owned(begun, deadline) as (generation,):
            for delta in generation.deltas(deadline.remaining()):
                yield from push(delta)

    async def _astreamed(
        self,
        make: Callable[[Begun, CallOptions], Callable[[Delta], Iterator[Streamed]]],
        messages: Sequence[BaseMessage],
        stop: Sequence[str] | None,
        run_manager: AsyncCallbackManagerForLLMRun | None,
        kwargs: Mapping[str, Any],
    ) -> AsyncIterator[Streamed]:
        """Do what `_streamed` does without blocking the event loop."""
        options = self._options(stop, kwargs, is_stream=True)
        deadline = Deadline(options.timeout)
        async with deadline.limit():
            begun = await self._abegin(messages, options, run_manager)
        push = make(begun, options)
        with owned(begun, deadline, asyncio.get_running_loop()) as (generation,):
            async for delta in generation:
                for streamed in push(delta):
                    yield streamed

    def _chunks(self, begun: Begun, options: CallOptions) -> Callable[[Delta], Iterator[ChatGenerationChunk]]:
        (answer,) = self._answers(begun, options, tells_usage=options.stream_usage)
        return answer.push

    def _events(
        self,
        run_manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None,
        begun: Begun,
        options: CallOptions,
    ) -> Callable[[Delta], Iterator[MessagesData]]:
        (run,) = begun.runs
        message_id = f"{LC_ID_PREFIX}-{uuid7() if run_manager is None else run_manager.run_id}"
        metadata, tokenizer = self._metadata(begun, options), begun.engine.tokenizer
        return AnswerEvents(
            run.answer, tokenizer, metadata, message_id=message_id, tells_usage=options.stream_usage
        ).push

    def _options(
        self, stop: Sequence[str] | None, kwargs: Mapping[str, Any], *, is_stream: bool = False
    ) -> CallOptions:
        options = CallOptions.merge(self, {**kwargs, "stop": stop})
        if is_stream and options.n > 1:
            raise InvalidRequestError(f"n={options.n} cannot be streamed: pass n=1, or use generate().")
        return options

    def _begin(
        self, messages: Sequence[BaseMessage], options: CallOptions, run_manager: CallbackManagerForLLMRun | None
    ) -> Begun:
        return begin(self._runtime, self._ready(), messages, options, plan=planner(self._runtime, run_manager))

    async def _abegin(
        self, messages: Sequence[BaseMessage], options: CallOptions, run_manager: AsyncCallbackManagerForLLMRun | None
    ) -> Begun:
        engine, plan = await self._aready(), aplanner(self._runtime, run_manager)
        begun = await abegin(self._runtime, engine, messages, options, plan=plan)
        reached_engine()
        return begun

    def _answers(self, begun: Begun, options: CallOptions, *, tells_usage: bool = True) -> list[AnswerStream]:
        metadata, tokenizer = self._metadata(begun, options), begun.engine.tokenizer
        return [AnswerStream(run.answer, tokenizer, metadata, tells_usage=tells_usage) for run in begun.runs]

    def _metadata(self, begun: Begun, options: CallOptions) -> dict[str, Any]:
        """What `response_metadata` holds whatever the answer."""
        return {
            "model_name": options.model or self.model_name,
            "model_provider": "lora-retriever",
            **begun.composition.to_metadata(),
        }

    def _to_result(self, begun: Begun, options: CallOptions, completions: Sequence[Completion]) -> ChatResult:
        answers = self._answers(begun, options)
        results = [
            generate_from_stream(answer.push(Delta(*completion)))
            for answer, completion in zip(answers, completions, strict=True)
        ]
        return ChatResult(generations=[result.generations[0] for result in results])

    # The engine

    def warm_up(self) -> None:
        """Do now what the first calls would wait for, which may take minutes.

        The pool is read and its samples are embedded, the encoder and the base model are loaded. A bar on a terminal,
        and lines in the log at INFO, say how far it is. Done already, it returns at once.

        Raises:
            LoraRetrieverError: Whatever the first calls would meet.
        """
        self._known(self._runtime.warm_up())

    async def awarm_up(self) -> None:
        """Do what `warm_up` does without blocking the event loop: for a server's lifespan."""
        self._known(await self._runtime.awarm_up())

    def _max_concurrency(self) -> int:
        # Twice what runs at once, so that the engine never waits for a prompt to be routed and tokenized.
        # It is not loaded to know that: the time it takes is the calls' own, and counts for their timeouts.
        engine = self._runtime.running_engine
        return 2 * (engine.info.max_num_seqs if engine else self.engine_config.max_num_seqs or _UNKNOWN_CONCURRENCY)

    async def _aprepare(self, inputs: Sequence[LanguageModelInput], **kwargs: Any) -> None:
        with suppress(Exception):  # each call meets the same fault, and reports it as its own
            options = CallOptions.merge(self, kwargs)
            texts = [text_to_route(self._convert_input(each).to_messages(), options) for each in inputs]
            async with Deadline(options.timeout).limit():
                await self._runtime.aprepare(texts, options)

    def _ready(self) -> EngineClient:
        """Return the engine, loading the base model at first use."""
        return self._known(self._runtime.ready())

    async def _aready(self) -> EngineClient:
        return self._known(await self._runtime.aready())

    def _known(self, engine: EngineClient) -> EngineClient:
        if self._has_own_profile and not self._is_profile_loaded and self.profile is not None:
            self.__dict__["profile"] = loaded_profile(self.profile, engine)  # found out, and not assigned
            self._is_profile_loaded = True
        return engine

    def close(self) -> None:
        """Stop the engine, give the base model back as it was, and let go of its memory.

        Other chat models of the process that share the engine lose it too: their running calls end with
        `EngineDeadError`. The next call of any of them loads the model anew; an engine that was passed ready-made stays
        closed.
        """
        self._runtime.close()

    async def aclose(self) -> None:
        """Do what `close` does without blocking the event loop."""
        await self._runtime.aclose()

    # Tools and structured output

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Args:
            tools: Functions, `BaseTool`s, pydantic classes, TypedDicts or JSON schemas.
            tool_choice: "auto" (or None) leaves it to the model, "any" (or "required", True) forces a call, a tool's
                name forces that one, "none" hides the tools. Forced calls always parse.
            strict: Close the tools' schemas: every property is required, and there are no others.
            parallel_tool_calls: False allows one call per answer.
            **kwargs: Settings to bind along.

        Raises:
            InvalidRequestError: If a tool is not a function, or the choice names none of them.
        """
        converted = to_tools(tools, strict=strict)
        to_tool_choice(tool_choice, converted)
        return self.bind(tools=converted, tool_choice=tool_choice, parallel_tool_calls=parallel_tool_calls, **kwargs)

    def with_structured_output(
        self, schema: dict[str, Any] | type, *, include_raw: bool = False, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """Have every answer satisfy a schema, and read it.

        Args:
            schema: A pydantic class, TypedDict or JSON schema.
            include_raw: Return `{"raw", "parsed", "parsing_error"}` in place of the parsed answer.
            **kwargs: `method` ("json_schema", "function_calling" or "json_mode"), `strict`, and settings to bind along.

        Raises:
            InvalidRequestError: If the schema cannot be understood.
        """
        return structured_output(self, schema, include_raw=include_raw, **kwargs)

    # Counting

    def get_token_ids(self, text: str) -> list[int]:
        """Return the base model's token ids of a plain text. No weights are loaded for it."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return encode_text(self._runtime.tokenizer, text)

    def _convert_input(self, model_input: LanguageModelInput) -> PromptValue:
        """Do what LangChain does, refusing in words what is no prompt, and more messages than one may have."""
        if isinstance(model_input, list | tuple):
            check_num_messages(model_input)
        try:
            prompt = super()._convert_input(model_input)
            messages = prompt.to_messages()
        except Exception as error:
            raise InvalidRequestError(
                f"{shown(model_input)} is no prompt: {shown(error)}. Pass a string, or a list of messages."
            ) from error
        check_messages(messages)
        return prompt

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Any] | None = None,
    ) -> int:
        """Count the tokens of the prompt that `messages` and `tools` make, template and all, of any length.

        No weights are loaded for it, so `trim_messages(..., token_counter=llm)` is cheap before the first call, too.
        """
        messages = self._convert_input(messages).to_messages()
        return num_prompt_tokens(self._runtime.tokenizer, messages, self._options(None, {"tools": tools}))
