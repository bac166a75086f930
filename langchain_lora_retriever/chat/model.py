"""The chat model: wires messages, routing and the engine together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool

from langchain_lora_retriever.chat.batching import owned, reached_engine
from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.chat.messages import (
    check_length,
    check_messages,
    check_num_messages,
    encode_chat,
    encode_text,
    is_encoding,
    routing_text,
    to_chat,
)
from langchain_lora_retriever.chat.profile import loaded_profile
from langchain_lora_retriever.chat.settings import ChatSettings, GivenSettings
from langchain_lora_retriever.chat.structured_output import structured_output
from langchain_lora_retriever.engine import Completion, Delta, EngineClient, Generation
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.dialects import ChatTurn
from langchain_lora_retriever.output.format import AnswerFormat, answer_format
from langchain_lora_retriever.output.stream import AnswerStream, answer_readers, reads_special_tokens
from langchain_lora_retriever.output.tools import to_tool_choice, to_tools
from langchain_lora_retriever.retrieval.routing import Plan
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.support.threads import Deadline, run_in_thread, run_within
from langchain_lora_retriever.types import Composition

__all__ = ["ChatLoraRetriever"]

_LONG_PROMPT = 16_384
"""Characters from which a prompt is rendered and encoded off the event loop: that takes some ten milliseconds."""
_LONG_CHAT = 64
"""Messages from which the same is done."""
_UNKNOWN_CONCURRENCY = 64
"""Requests that are taken to run at once in an engine that is not loaded yet."""


class _Call(NamedTuple):
    """A call, understood: what is asked, of which engine, in which conversation, routed on which text."""

    options: CallOptions
    format: AnswerFormat
    engine: EngineClient
    chat: list[ChatTurn]
    text: str

    def encode(self) -> list[int]:
        """Return the prompt's token ids."""
        return encode_chat(
            self.engine.tokenizer,
            self.chat,
            tools=self.format.tools,
            dialect=self.format.dialect,
            template_kwargs=self.options.chat_template_kwargs,
        )


class _Run(NamedTuple):
    """A request in the engine, and what reads its answer."""

    generation: Generation
    answer: AnswerStream


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
        return self._runtime.route(_text_to_route(self._convert_input(input).to_messages(), options), options)

    async def aroute(self, input: LanguageModelInput, **kwargs: Any) -> Composition:  # noqa: A002 - LangChain's name
        """Do what `route` does, embedding together with other calls that wait."""
        options = CallOptions.merge(self, kwargs)
        return await self._runtime.aroute(_text_to_route(self._convert_input(input).to_messages(), options), options)

    # Generation

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(stop, kwargs)
        deadline = Deadline(options.timeout)
        runs = run_within(deadline, lambda: self._begin(messages, options), discard=_abort)
        with owned([run.generation for run in runs], deadline):
            return _to_result(runs, [run.generation.result(deadline.remaining()) for run in runs])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(stop, kwargs)
        deadline = Deadline(options.timeout)
        async with deadline.limit():
            runs = await self._abegin(messages, options)
        with owned([run.generation for run in runs], deadline, asyncio.get_running_loop()):
            return _to_result(runs, await asyncio.gather(*(run.generation.aresult() for run in runs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs, is_stream=True)
        deadline = Deadline(options.timeout)
        (run,) = run_within(deadline, lambda: self._begin(messages, options, is_stream=True), discard=_abort)
        with owned([run.generation], deadline):
            for delta in run.generation.deltas(deadline.remaining()):
                yield from run.answer.push(delta)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs, is_stream=True)
        deadline = Deadline(options.timeout)
        async with deadline.limit():
            (run,) = await self._abegin(messages, options, is_stream=True)
        with owned([run.generation], deadline, asyncio.get_running_loop()):
            async for delta in run.generation:
                for chunk in run.answer.push(delta):
                    yield chunk

    def _options(
        self, stop: Sequence[str] | None, kwargs: Mapping[str, Any], *, is_stream: bool = False
    ) -> CallOptions:
        options = CallOptions.merge(self, {**kwargs, "stop": stop})
        if is_stream and options.n > 1:
            raise InvalidRequestError(f"n={options.n} cannot be streamed: pass n=1, or use generate().")
        return options

    def _begin(self, messages: Sequence[BaseMessage], options: CallOptions, *, is_stream: bool = False) -> list[_Run]:
        """Understand a call, route it, and give it to the engine."""
        call = self._understand(messages, options, self._ready())
        return self._start(call, self._runtime.plan(call.text, call.options), is_stream=is_stream)

    async def _abegin(
        self, messages: Sequence[BaseMessage], options: CallOptions, *, is_stream: bool = False
    ) -> list[_Run]:
        """Do what `_begin` does without holding up the event loop: what may take longer is done in a thread."""
        understand = partial(self._understand, messages, options, await self._aready())
        is_long = options.has_format or _is_long(messages)
        call = await run_in_thread(understand) if is_long else understand()
        plan = await self._runtime.aplan(call.text, call.options)
        start = partial(self._start, call, plan, is_stream=is_stream)
        # Nor wait for another's long prompt: a tokenizer encodes one at a time.
        is_long = _is_long(messages) or is_encoding(call.engine.tokenizer)
        runs = await run_in_thread(start, discard=_abort) if is_long else start()
        reached_engine()
        return runs

    def _understand(self, messages: Sequence[BaseMessage], options: CallOptions, engine: EngineClient) -> _Call:
        chat = to_chat(messages)
        check_length(engine.tokenizer, chat, max_num_tokens=engine.info.max_model_len)
        return _Call(options, answer_format(options, engine.tokenizer), engine, chat, _text_to_route(messages, options))

    def _start(self, call: _Call, plan: Plan, *, is_stream: bool = False) -> list[_Run]:
        metadata = {
            "model_name": call.options.model or self.model_name,
            "model_provider": "lora-retriever",
            **plan.composition.to_metadata(),
        }
        # Encoded only now: while the first texts of many are embedded no other call holds them up by its tokens.
        prompt_token_ids = call.encode()
        tokenizer = call.engine.tokenizer
        tells_usage = call.options.stream_usage or not is_stream
        runs: list[_Run] = []
        try:
            for index in range(call.options.n):
                readers = answer_readers(tokenizer, prompt_token_ids, call.format)
                skips_special = not reads_special_tokens(tokenizer, readers)
                sampling = call.options.sampling(index, skip_special_tokens=skips_special)
                generation = call.engine.submit(prompt_token_ids, sampling, plan.adapters, grammar=call.format.grammar)
                answer = AnswerStream(tokenizer, metadata, readers=readers, tells_usage=tells_usage)
                runs.append(_Run(generation, answer))
        except BaseException:
            _abort(runs)
            raise
        return runs

    # The engine

    def _max_concurrency(self) -> int:
        # Twice what runs at once, so that the engine never waits for a prompt to be routed and tokenized.
        # It is not loaded to know that: the time it takes is the calls' own, and counts for their timeouts.
        engine = self._runtime.running_engine
        return 2 * (engine.info.max_num_seqs if engine else self.engine_config.max_num_seqs or _UNKNOWN_CONCURRENCY)

    async def _aprepare(self, inputs: Sequence[LanguageModelInput], **kwargs: Any) -> None:
        with suppress(Exception):  # each call meets the same fault, and reports it as its own
            options = CallOptions.merge(self, kwargs)
            texts = [_text_to_route(self._convert_input(each).to_messages(), options) for each in inputs]
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
        """Return the base model's token ids of a plain text."""
        return encode_text(self._ready().tokenizer, text)

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
        """Count the tokens of the prompt that `messages` and `tools` make, template and all."""
        messages = self._convert_input(messages).to_messages()
        return len(self._understand(messages, self._options(None, {"tools": tools}), self._ready()).encode())


def _abort(runs: Sequence[_Run]) -> None:
    for run in runs:
        run.generation.abort()


def _is_long(messages: Sequence[BaseMessage]) -> bool:
    return len(messages) > _LONG_CHAT or sum(map(_num_characters, messages)) > _LONG_PROMPT


def _num_characters(message: BaseMessage) -> int:
    """Estimate, in no time, how much text a message holds."""
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(block if isinstance(block, str) else str(block.get("text", ""))) for block in message.content)


def _to_result(runs: Sequence[_Run], completions: Sequence[Completion]) -> ChatResult:
    results = [
        generate_from_stream(run.answer.push(Delta(*completion)))
        for run, completion in zip(runs, completions, strict=True)
    ]
    return ChatResult(generations=[result.generations[0] for result in results])


def _text_to_route(messages: Sequence[BaseMessage], options: CallOptions) -> str:
    return routing_text(messages) if options.route_text is None else options.route_text
