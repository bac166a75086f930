"""The settings of the chat model, checked, and what LangChain reads off them: traces, cache keys, the profile."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypedDict, cast

from langchain_core.caches import BaseCache
from langchain_core.callbacks import Callbacks
from langchain_core.language_models import LangSmithParams, ModelProfile
from langchain_core.rate_limiters import BaseRateLimiter
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, field_validator, model_validator

from langchain_lora_retriever.chat.batching import ConcurrentChatModel
from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.chat.profile import loaded_profile, profile_before_loading
from langchain_lora_retriever.engine import EngineClient, EngineConfig
from langchain_lora_retriever.engine.config import config_of
from langchain_lora_retriever.errors import AdapterError, InvalidRequestError
from langchain_lora_retriever.output.format import written_out
from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.registry import (
    SharedEngine,
    identity,
    is_shared,
    shared_retriever,
    shared_runtime,
    source_of,
)
from langchain_lora_retriever.retrieval.composer import Weighting
from langchain_lora_retriever.retrieval.encoder import Encoder
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder
from langchain_lora_retriever.retrieval.retriever import DEFAULT_INSTRUCTION, LoraRetriever
from langchain_lora_retriever.runtime import Runtime
from langchain_lora_retriever.support.near_names import did_you_mean
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import CompositionMode

__all__ = ["ChatSettings", "GivenSettings"]

_MADE_HERE = frozenset({"callbacks", "profile"})  # of a process, or found out again
_USUAL_NAMES = {"max_new_tokens": "max_tokens", "model": "base_model", "model_id": "base_model"}  # other chat models'
_OBJECTS = frozenset({"cache", "encoder", "engine", "pool", "rate_limiter", "retriever"})  # that may be iterable too
_WORKED_OUT = frozenset({"pool", "encoder", "instruction", "retriever"})


class GivenSettings(TypedDict, total=False):
    """What the constructor takes, for type checkers: more than the fields hold afterwards. See `ChatSettings`."""

    base_model: str | Path | tuple[Any, Any] | None
    engine: EngineClient | None
    pool: AdapterPool | str | Path | None
    encoder: Encoder | str | Path | None
    instruction: str | None
    retriever: LoraRetriever | None
    model_name: str
    model_kwargs: dict[str, Any]
    engine_config: EngineConfig | dict[str, Any]
    streaming: bool
    adapters: list[str] | None
    exclude_adapters: list[str]
    composition: CompositionMode
    top_k: int
    weights: Weighting
    weight_temperature: float
    min_score: float | Literal["auto"] | None
    temperature: float
    max_tokens: int
    sampling_top_k: int
    top_p: float
    seed: int | None
    stop: list[str]
    stop_token_ids: list[int]
    repetition_penalty: float | None
    logprobs: bool | int | None
    timeout: float | None
    chat_template_kwargs: dict[str, Any] | None
    # LangChain's own
    name: str | None
    cache: BaseCache | bool | None
    callbacks: Callbacks
    custom_get_token_ids: Callable[[str], list[int]] | None
    disable_streaming: bool | Literal["tool_calling"]
    metadata: dict[str, Any] | None
    output_version: str | None
    profile: ModelProfile | None
    rate_limiter: BaseRateLimiter | None
    tags: list[str] | None
    verbose: bool


class ChatSettings(ConcurrentChatModel):
    """The settings of `ChatLoraRetriever`.

    Those from `adapters` on may also be given per call, and so may those that only `CallOptions` has.

    Attributes:
        base_model: A hub name, a folder, or `(model, tokenizer)` already loaded. None where there is an `engine`.
        engine: An engine that is ready, in place of `base_model`, `model_kwargs` and `engine_config`.
        pool: The adapters to choose from. The constructor takes the folder they lie in, too, and None for none yet.
        encoder: Embeds prompts and samples; by default MiniLM and words, a `HybridEncoder`. The constructor takes a
            sentence-transformers name or folder, too.
        instruction: Prefix under which texts are embedded.
        retriever: Finds adapters. One that is ready may be given in place of `pool`, `encoder` and `instruction`.
        model_name: The base model's name in traces and metadata; by default what it is loaded from.
        model_kwargs: For `from_pretrained`: `device_map`, `dtype`, `quantization_config`, ...
        engine_config: Limits of the engine. The constructor takes a dict of its fields, too.
        streaming: Generate by streaming even where the caller did not ask for a stream.
        adapters: Names that take the place of retrieval; `[]` runs the base model alone.
        exclude_adapters: Names retrieval must not return.
        composition: How several adapters act together: "selection", "fusion" or "mixture".
        top_k: Maximum number of adapters to compose.
        weights: "similarity" or "uniform" weights of retrieved adapters.
        weight_temperature: Temperature of similarity weights; lower favours the best more.
        min_score: Cosine similarity under which an adapter is not used; "auto" is each adapter's own, by its samples.
        temperature: 0 is greedy.
        max_tokens: Maximum number of tokens to generate.
        sampling_top_k: Keep the most probable tokens only; 0 keeps all.
        top_p: Keep the smallest set of tokens of this probability.
        seed: Makes sampled answers repeatable.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer, beside the model's own.
        repetition_penalty: Makes tokens that prompt or answer have already less likely if above 1; None takes what the
            model's `generation_config` says, 1.0 switches that off.
        logprobs: Report log-probabilities: True, or the number of alternatives per token.
        timeout: Seconds a call may take before it is aborted with `TimeoutError`.
        chat_template_kwargs: More variables for the chat template, such as `{"enable_thinking": False}`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    # What the constructor takes beside the type of a field is turned into it; the defaults of None are worked out.
    base_model: str | Path | tuple[Any, Any] | None = Field(default=None, repr=False)
    engine: Annotated[EngineClient | None, SkipValidation] = Field(default=None, repr=False)
    pool: AdapterPool = Field(default=cast("AdapterPool", None), repr=False)
    encoder: Annotated[Encoder, SkipValidation] = Field(default=cast("Encoder", None), repr=False)
    instruction: str = cast("str", None)
    retriever: LoraRetriever = Field(default=cast("LoraRetriever", None), repr=False)
    model_name: str = ""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    engine_config: EngineConfig = Field(default_factory=EngineConfig)
    streaming: bool = False
    adapters: list[str] | None = None
    exclude_adapters: list[str] = Field(default_factory=list)
    composition: CompositionMode = CallOptions.composition
    top_k: int = CallOptions.top_k
    weights: Weighting = CallOptions.weights
    weight_temperature: float = CallOptions.weight_temperature
    min_score: float | Literal["auto"] | None = None
    temperature: float = CallOptions.temperature
    max_tokens: int = CallOptions.max_tokens
    sampling_top_k: int = CallOptions.sampling_top_k
    top_p: float = CallOptions.top_p
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    repetition_penalty: float | None = None
    logprobs: bool | int | None = None
    timeout: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    _runtime: Runtime = PrivateAttr()
    _has_own_profile: bool = PrivateAttr(default=False)
    _is_profile_loaded: bool = PrivateAttr(default=False)

    @field_validator("engine_config", mode="before")
    @classmethod
    def _to_engine_config(cls, value: Any) -> Any:
        return config_of(value) if isinstance(value, dict) else value

    @field_validator("pool", mode="before")
    @classmethod
    def _to_pool(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return AdapterPool.unread(value) if _is_in_event_loop() else AdapterPool(value)
        return value

    @field_validator("engine", mode="before")
    @classmethod
    def _check_client(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, EngineClient):
            raise InvalidRequestError(
                f"engine={shown(value)} is not allowed: pass an EngineClient, such as an EngineWorker."
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _drop_none(cls, values: Any) -> Any:
        """Take None for not given, where a setting has another type; refuse what is none, or has no end, unread."""
        if not isinstance(values, dict):
            return values
        _check_names(values, cls)
        for name, value in values.items():
            is_plain = value is None or isinstance(value, str | bytes | list | tuple | set | frozenset | Mapping)
            if not is_plain and isinstance(value, Iterable) and name not in _OBJECTS:
                raise InvalidRequestError(f"{name}={shown(value)} is not allowed: pass a list.")
        return {name: value for name, value in values.items() if value is not None or name not in _WORKED_OUT}

    @model_validator(mode="after")
    def _connect(self) -> Self:
        """Check the settings, and find the engine and the retriever."""
        CallOptions.merge(self, {})
        given = self.__dict__  # not by assignment, which would come back here
        self._check_engine()
        given["model_name"] = self._name()
        given["retriever"] = retriever = self._own_retriever()
        given |= {"pool": retriever.pool, "encoder": retriever.encoder, "instruction": retriever.instruction}
        self._runtime = shared_runtime(self._engine_or_source(retriever.pool), retriever, self.model_name)
        return self

    def _check_engine(self) -> None:
        if self.engine is None:
            if self.base_model is None:
                raise InvalidRequestError(
                    "There is no model: pass base_model (a hub name, a folder, or what is loaded), or engine."
                )
            return
        defaults: dict[str, Any] = {"base_model": None, "model_kwargs": {}, "engine_config": EngineConfig()}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise InvalidRequestError(f"An engine has its own {name}: pass one of the two.")

    def _engine_or_source(self, pool: AdapterPool) -> SharedEngine | EngineClient:
        if self.engine is not None:
            return self.engine
        assert self.base_model is not None
        return SharedEngine(self.base_model, self.model_kwargs, self.engine_config, pool)

    def _own_retriever(self) -> LoraRetriever:
        """The retriever that was given, or the process's for what was given in its place.

        LangChain copies a chat model with all its fields, one of them changed: among them a retriever that was made for
        the others.
        """
        given, encoder = self.model_fields_set, self.encoder if "encoder" in self.model_fields_set else None
        if not (encoder is None or isinstance(encoder, str | Path) or callable(getattr(encoder, "encode", None))):
            raise InvalidRequestError(
                f"encoder={shown(encoder)} is not allowed: pass a sentence-transformers model's name or folder, "
                "or an object with `name`, `dimension` and `encode`."
            )
        if "retriever" not in given or is_shared(self.retriever):
            pool = self.pool if "pool" in given else AdapterPool()
            return shared_retriever(pool, encoder, self.instruction if "instruction" in given else DEFAULT_INSTRUCTION)
        retriever = self.retriever
        for name in sorted(given & {"encoder", "instruction"}):
            if getattr(self, name) != getattr(retriever, name):
                raise InvalidRequestError("A retriever has its own encoder and instruction: pass it without these.")
        if "pool" in given and self.pool is not retriever.pool:
            raise InvalidRequestError("The pool is not the retriever's: pass one of the two.")
        return retriever

    def _name(self) -> str:
        if self.model_name:
            return self.model_name
        return self.engine.info.name if self.engine is not None else _name_of(self.base_model)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """What tells it from others at a glance; `model_dump()` has all settings."""
        shown_settings = {"base_model": self.model_name, "pool": self.pool, "composition": self.composition}
        if self.adapters is not None:
            shown_settings["adapters"] = self.adapters
        return list(shown_settings.items())

    @property
    def runtime(self) -> Runtime:
        """The engine and the retriever that this chat model uses, and what it shares with others of the process."""
        return self._runtime

    @property
    def rejected(self) -> Mapping[str, AdapterError]:
        """Why adapters of the pool cannot be used here, by name; see `Runtime.rejected`."""
        return self._runtime.rejected

    @property
    def undescribed(self) -> Mapping[str, str]:
        """The adapters that can be pinned and that no prompt finds, with what to do; see `Runtime.undescribed`."""
        return self._runtime.undescribed

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting as if the model were made with it: it is checked, and what depends on it follows.

        Raises:
            ValidationError: If the value is not allowed; nothing changes then.
        """
        is_made = "_runtime" in (getattr(self, "__pydantic_private__", None) or {})
        if name in type(self).model_fields and is_made:
            self._change({name: value})
        else:
            super().__setattr__(name, value)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the chat model, checking what is updated. The engine, the pool and the retriever are shared.

        Args:
            update: Settings of the copy.
            deep: Of no effect: settings are values, and the rest is shared.

        Raises:
            ValidationError: If a value is not allowed.
        """
        del deep
        copied = super().model_copy()
        if update:
            copied._change(update)  # noqa: SLF001 - one of us
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the chat model and its lists and dictionaries; the engine, the pool and the retriever are shared."""
        copied = self.model_copy()
        copied.__dict__.update(
            {name: copy(value) for name, value in self.__dict__.items() if isinstance(value, list | dict)}
        )
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings, where another process can load from them what this one has.

        Raises:
            PicklingError: If the base model, the engine, the pool, the encoder or the retriever is in this process's
                memory only.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set if name not in _MADE_HERE}
        if "pool" in given and self.pool.path is not None:
            given["pool"] = self.pool.path
        if "encoder" in given:
            given["encoder"] = source_of(self.encoder) or self.encoder
        held = [
            name
            for name in ("base_model", "engine", "pool", "encoder", "retriever")
            if given.get(name) is not None and not _is_portable(given[name])
        ]
        if held:
            raise pickle.PicklingError(
                f"This {type(self).__name__} cannot be pickled: its {', '.join(held)} lives in this process's memory. "
                "Name a base model and an encoder, and pass the folder of an AdapterPool, or make the chat model in "
                "the other process."
            )
        return _make, (type(self), given)

    def _change(self, update: Mapping[str, Any]) -> None:
        _check_names(update, type(self))
        found_out = {"profile"} if self._has_own_profile else set()
        kept = {name: getattr(self, name) for name in self.model_fields_set - update.keys() - found_out}
        changed = type(self)(**{**kept, **update})
        self.__dict__ = changed.__dict__  # as a whole: what was worked out from other settings goes with them
        self.__pydantic_fields_set__ = changed.__pydantic_fields_set__
        self.__pydantic_private__ = changed.__pydantic_private__

    @property
    def _llm_type(self) -> str:
        return "lora-retriever"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """Everything that changes an answer; a pool that nobody has read yet stands for its contents by its folder."""
        pool = self.pool.fingerprint if self.pool.is_read else str(self.pool.path)
        return self._identity(CallOptions.merge(self, {}), pool)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return what LangChain's response cache keys on, beside the prompt.

        LangChain's own would let a call's `stop=None` hide the setting, and know a class by its name alone.
        """
        options = CallOptions.merge(self, {**kwargs, "stop": stop})
        # In the order given, not sorted: a schema's properties are generated in theirs.
        return json.dumps({**self._identity(options, self.pool.fingerprint), **written_out(options)}, default=repr)

    def _identity(self, options: CallOptions, pool: str) -> dict[str, Any]:
        retriever, source = self.retriever, self.base_model
        if self.engine is not None:
            named: Any = identity(self.engine)
        else:
            named = [identity(part) for part in source] if isinstance(source, tuple) else str(source)
        return {
            "base_model": self.model_name,
            "source": named,
            "model_kwargs": repr(sorted(self.model_kwargs.items())),
            "engine_config": repr(self.engine_config),
            "output_version": self.output_version,
            "pool": pool,
            "encoder": retriever.encoder.name,
            "instruction": retriever.instruction,
            "retriever_min_score": retriever.min_score,
            "retriever_answer_weight": retriever.answer_weight,
            **{field.name: getattr(options, field.name) for field in fields(options) if field.name != "timeout"},
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop if isinstance(stop, list) else self.stop or None, **kwargs)
        params["ls_provider"] = "lora-retriever"
        model = kwargs.get("model")
        params["ls_model_name"] = model if isinstance(model, str) and model else self.model_name
        return params

    def _resolve_model_profile(self) -> ModelProfile:
        self._has_own_profile = True
        profile = profile_before_loading(self._name(), self.base_model, self.model_kwargs, self.engine_config)
        return profile if self.engine is None else loaded_profile(profile, self.engine)


def _check_names(given: Mapping[str, Any], cls: type[ChatSettings]) -> None:
    """Refuse what is no setting, with the one that is most like it."""
    unknown = [name for name in given if name not in cls.model_fields]
    if not unknown or cls.model_config.get("extra") != "forbid":
        return
    hint = did_you_mean(_USUAL_NAMES.get(unknown[0], str(unknown[0])), cls.model_fields)
    raise InvalidRequestError(
        f"{shown(unknown[0])} is no setting of the chat model.{hint} It has: {', '.join(sorted(cls.model_fields))}."
    )


def _is_in_event_loop() -> bool:
    """Whether reading a pool here would hold up others: its first call reads it in a thread then."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_portable(value: object) -> bool:
    """Whether another process can make what is made of it here."""
    return isinstance(value, str | Path) or (isinstance(value, HybridEncoder) and value.recipe is not None)


def _make(cls: type[ChatSettings], given: dict[str, Any]) -> ChatSettings:
    return cls(**given)


def _name_of(base_model: str | Path | tuple[Any, Any] | None) -> str:
    if base_model is None:  # which is refused a moment later
        return ""
    if isinstance(base_model, tuple):
        return str(getattr(base_model[0], "name_or_path", "") or type(base_model[0]).__name__)
    return base_model.name if isinstance(base_model, Path) else base_model
