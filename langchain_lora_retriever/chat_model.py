"""The chat model: wires messages, routing and the engine together."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, field_validator, model_validator

from langchain_lora_retriever.answers import AnswerStream, reasoning_state
from langchain_lora_retriever.call_options import CallOptions
from langchain_lora_retriever.composer import Weighting  # noqa: TC001 - pydantic reads the annotations
from langchain_lora_retriever.concurrency import ConcurrentChatModel, owned
from langchain_lora_retriever.constraints import make_constraint
from langchain_lora_retriever.encoder import Encoder  # noqa: TC001 - pydantic reads the annotations at run time
from langchain_lora_retriever.engine import Completion, Delta, EngineConfig, EngineWorker, Generation
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.messages import encode_chat, routing_text, to_chat
from langchain_lora_retriever.pool import AdapterPool
from langchain_lora_retriever.retriever import DEFAULT_ENCODER, DEFAULT_INSTRUCTION, LoraRetriever
from langchain_lora_retriever.routing import Router
from langchain_lora_retriever.shared import reject_unfit, shared_engine, shared_retriever
from langchain_lora_retriever.structured_output import AnswerFormat, answer_format, structured_output
from langchain_lora_retriever.tools import to_tool_choice, to_tools
from langchain_lora_retriever.types import CompositionMode  # noqa: TC001 - pydantic reads the annotations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.runnables import Runnable
    from langchain_core.tools import BaseTool

    from langchain_lora_retriever.types import Adapter, Composition

__all__ = ["ChatLoraRetriever"]


class _Call(NamedTuple):
    """A call, understood: what is asked, of which engine, with which prompt, routed on which text."""

    options: CallOptions
    format: AnswerFormat
    engine: EngineWorker
    prompt_token_ids: list[int]
    text: str


class ChatLoraRetriever(ConcurrentChatModel):
    """A chat model that retrieves, composes and runs LoRA adapters per prompt.

    Every call is routed on its last human message, and runs in one continuous batch with all others of the process
    that use the same base model. Weights are loaded at first use, once per process.

    The settings from `adapters` on may also be given per call (`llm.invoke(..., top_k=1)`,
    `llm.bind(adapters=["sql"])`), and so may those that only `CallOptions` has: `route_text`, `n`, `model`.

    Attributes:
        base_model: A hub name, a folder, or `(model, tokenizer)` already loaded.
        pool: The adapters to choose from, or the folder they lie in; None for none yet.
        encoder: Embeds prompts and samples: a sentence-transformers name or folder, or an `Encoder`.
        instruction: Prefix under which texts are embedded.
        retriever: A retriever that is ready, in place of `pool`, `encoder` and `instruction`.
        model_name: The base model's name in traces and metadata; by default what it is loaded from.
        model_kwargs: For `from_pretrained`: `device_map`, `dtype`, `quantization_config`, ...
        engine_config: Limits of the engine, as an `EngineConfig` or a dict of its fields.
        streaming: Generate by streaming even where the caller did not ask for a stream.
        adapters: Names that take the place of retrieval; `[]` runs the base model alone.
        exclude_adapters: Names retrieval must not return.
        composition: How several adapters act together: "selection", "fusion" or "mixture".
        top_k: Most adapters to compose.
        weights: "similarity" or "uniform" weights of retrieved adapters.
        weight_temperature: Temperature of similarity weights; lower favours the best more.
        min_score: Cosine similarity under which an adapter is not used.
        temperature: 0 is greedy.
        max_tokens: Most tokens to generate.
        sampling_top_k: Keep the most probable tokens only; 0 keeps all.
        top_p: Keep the smallest set of tokens of this probability.
        seed: Makes sampled answers repeatable.
        stop: Strings that end the answer.
        logprobs: Report log-probabilities: True, or the number of alternatives per token.
        timeout: Seconds a call may take before it is aborted with `TimeoutError`.
        chat_template_kwargs: More variables for the chat template, such as `{"enable_thinking": False}`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    base_model: str | Path | tuple[Any, Any] = Field(repr=False)
    pool: AdapterPool | str | Path | None = Field(default=None, repr=False)
    encoder: Annotated[str | Encoder | None, SkipValidation] = Field(default=None, repr=False)
    instruction: str | None = None
    retriever: LoraRetriever | None = Field(default=None, repr=False)
    model_name: str = ""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    engine_config: EngineConfig | dict[str, Any] = Field(default_factory=EngineConfig)
    streaming: bool = False
    adapters: list[str] | None = None
    exclude_adapters: list[str] = Field(default_factory=list)
    composition: CompositionMode = CallOptions.composition
    top_k: int = CallOptions.top_k
    weights: Weighting = CallOptions.weights
    weight_temperature: float = CallOptions.weight_temperature
    min_score: float | None = None
    temperature: float = CallOptions.temperature
    max_tokens: int = CallOptions.max_tokens
    sampling_top_k: int = CallOptions.sampling_top_k
    top_p: float = CallOptions.top_p
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    logprobs: bool | int | None = None
    timeout: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    _router: Router = PrivateAttr()

    @field_validator("engine_config", mode="before")
    @classmethod
    def _to_engine_config(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            return EngineConfig(**value)
        except TypeError as error:
            allowed = ", ".join(field.name for field in fields(EngineConfig))
            raise InvalidRequestError(f"engine_config={value!r} is not allowed: pass some of {allowed}.") from error

    @field_validator("pool", mode="before")
    @classmethod
    def _to_pool(cls, value: Any) -> Any:
        return AdapterPool(value) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _connect(self) -> Self:
        """Check the settings and find the retriever."""
        CallOptions.merge(self, {}).sampling()
        self.model_name = self.model_name or _name_of(self.base_model)
        retriever = self.retriever
        if retriever is None:
            pool = self.pool if isinstance(self.pool, AdapterPool) else AdapterPool()
            retriever = shared_retriever(pool, self.encoder or DEFAULT_ENCODER, self.instruction or DEFAULT_INSTRUCTION)
        elif self.encoder is not None or self.instruction is not None:
            raise InvalidRequestError("A retriever has its own encoder and instruction: pass it without these.")
        elif self.pool is not None and self.pool is not retriever.pool:
            raise InvalidRequestError("The pool is not the retriever's: pass one of the two.")
        self.pool = retriever.pool
        self._router = Router(retriever, self.model_name)
        return self

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
        return self._router.route(_text_to_route(self._convert_input(input).to_messages(), options), options)

    async def aroute(self, input: LanguageModelInput, **kwargs: Any) -> Composition:  # noqa: A002 - LangChain's name
        """Do what `route` does, embedding together with other calls that wait."""
        options = CallOptions.merge(self, kwargs)
        return await self._router.aroute(_text_to_route(self._convert_input(input).to_messages(), options), options)

    # Generation

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> ChatResult:
        call = self._understand(messages, stop, kwargs)
        composition, adapters = self._router.plan(call.text, call.options)
        generations = self._submit(call, adapters)
        with owned(generations, call.options.timeout):
            completions = [generation.result() for generation in generations]
        return self._result(call, composition, completions)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> ChatResult:
        await self._load()
        call = self._understand(messages, stop, kwargs)
        composition, adapters = await self._router.aplan(call.text, call.options)
        generations = self._submit(call, adapters)
        with owned(generations, call.options.timeout):
            completions = await asyncio.gather(*(generation.aresult() for generation in generations))
        return self._result(call, composition, completions)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._understand(messages, stop, kwargs)
        composition, adapters = self._router.plan(call.text, call.options)
        (generation,) = self._submit(call, adapters, is_stream=True)
        answer = self._answer(call, composition)
        with owned([generation], call.options.timeout):
            for delta in generation:
                yield from answer.push(delta)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - LangChain reports tokens itself
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        await self._load()
        call = self._understand(messages, stop, kwargs)
        composition, adapters = await self._router.aplan(call.text, call.options)
        (generation,) = self._submit(call, adapters, is_stream=True)
        answer = self._answer(call, composition)
        with owned([generation], call.options.timeout):
            async for delta in generation:
                for chunk in answer.push(delta):
                    yield chunk

    def _understand(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]
    ) -> _Call:
        options = CallOptions.merge(self, {**kwargs, "stop": stop})
        chat, answer = to_chat(messages), answer_format(options)
        engine = self._engine()
        reject_unfit(self._router.pool, engine)
        prompt_token_ids = encode_chat(
            engine.tokenizer, chat, tools=answer.tools, template_kwargs=options.chat_template_kwargs
        )
        return _Call(options, answer, engine, prompt_token_ids, _text_to_route(messages, options))

    def _submit(
        self, call: _Call, adapters: Sequence[tuple[Adapter, float]], *, is_stream: bool = False
    ) -> list[Generation]:
        options = call.options
        if is_stream and options.n > 1:
            raise InvalidRequestError(f"n={options.n} cannot be streamed: pass n=1, or use generate().")
        grammar = call.format.grammar
        constraints = [grammar and make_constraint(call.engine.tokenizer, grammar) for _ in range(options.n)]
        return [
            call.engine.submit(call.prompt_token_ids, options.sampling(index), adapters, constraint=constraint or None)
            for index, constraint in enumerate(constraints)
        ]

    def _answer(self, call: _Call, composition: Composition) -> AnswerStream:
        metadata = {
            "model_name": call.options.model or self.model_name,
            "model_provider": "lora-retriever",
            **composition.to_metadata(),
        }
        tokenizer = call.engine.tokenizer
        return AnswerStream(
            tokenizer,
            metadata,
            reads_calls=bool(call.format.tools),
            is_reasoning=reasoning_state(tokenizer, call.prompt_token_ids) if call.format.is_free_text else None,
        )

    def _result(self, call: _Call, composition: Composition, completions: Sequence[Completion]) -> ChatResult:
        results = [
            generate_from_stream(self._answer(call, composition).push(Delta(*completion))) for completion in completions
        ]
        return ChatResult(generations=[result.generations[0] for result in results])

    # The engine

    def _max_concurrency(self) -> int:
        # Twice what runs at once, so that the engine never waits for a prompt to be routed and tokenized.
        return 2 * self._engine().max_num_seqs

    def _engine(self) -> EngineWorker:
        """Return the engine, loading the base model at first use."""
        assert isinstance(self.engine_config, EngineConfig)
        return shared_engine(self.base_model, self.model_kwargs, self.engine_config)

    async def _load(self) -> None:
        """Load the base model without holding up the event loop."""
        await asyncio.to_thread(self._engine)

    # What LangChain asks of a chat model

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

    def _resolve_model_profile(self) -> ModelProfile:
        return ModelProfile(
            name=self.model_name or _name_of(self.base_model),
            open_weights=True,
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            text_outputs=True,
            tool_calling=True,
            tool_choice=True,
            tool_call_streaming=True,
            structured_output=True,
            temperature=True,
        )

    @property
    def _llm_type(self) -> str:
        return "lora-retriever"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes an answer: LangChain's response cache keys on it."""
        settings = CallOptions.merge(self, {})
        return {
            "base_model": self.model_name,
            "source": str(self.base_model) if isinstance(self.base_model, str | Path) else id(self.base_model[0]),
            "model_kwargs": repr(sorted(self.model_kwargs.items())),
            "pool": self._router.pool.fingerprint,
            "encoder": self._router.retriever.encoder.name,
            "instruction": self._router.retriever.instruction,
            **{field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "timeout"},
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop or None, **kwargs)
        params["ls_provider"] = "lora-retriever"
        params["ls_model_name"] = kwargs.get("model") or self.model_name
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Return the base model's token ids of a plain text."""
        return list(self._engine().tokenizer.encode(text, add_special_tokens=False))

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[Any] | None = None,
    ) -> int:
        """Count the tokens of the prompt that `messages` and `tools` make, template and all."""
        return len(self._understand(messages, None, {"tools": tools}).prompt_token_ids)


def _text_to_route(messages: Sequence[BaseMessage], options: CallOptions) -> str:
    return routing_text(messages) if options.route_text is None else options.route_text


def _name_of(base_model: str | Path | tuple[Any, Any]) -> str:
    if isinstance(base_model, tuple):
        return str(getattr(base_model[0], "name_or_path", "") or type(base_model[0]).__name__)
    return base_model.name if isinstance(base_model, Path) else base_model
