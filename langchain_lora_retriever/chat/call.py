"""What one call asks for: the model's own settings, with the call's keyword arguments laid over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Annotated, Any

from pydantic import Field, InstanceOf

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.format import OutputRequest
from langchain_lora_retriever.retrieval.routing import RoutingOptions
from langchain_lora_retriever.support.checks import settings
from langchain_lora_retriever.support.near_names import did_you_mean
from langchain_lora_retriever.support.nesting import check_json, check_texts
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import (
    STOP_STRINGS,
    STOP_TOKEN_IDS,
    MaxTokens,
    NonEmpty,
    RepetitionPenalty,
    SamplingParams,
    Seed,
    Temperature,
    TokenId,
    TopK,
    TopP,
    are_short,
)

__all__ = ["CallOptions"]

# Arguments that LangChain has acted upon before a call arrives here: it streams or not, and writes the trace.
_LANGCHAIN_ARGUMENTS = frozenset({"stream", "ls_structured_output_format"})

_MAX_ANSWERS = 128
"""Answers of one call, each a request of its own."""
_MAX_TEMPLATE_CHARACTERS = 262_144
"""Characters of all variables for the chat template."""


@settings(kw_only=True)
class CallOptions(RoutingOptions, OutputRequest):
    """The settings of one call, checked: those of routing, of the answer's form, of sampling, and of the call itself.

    Attributes:
        route_text: Text to retrieve for, in place of the last human message.
        temperature: As in `SamplingParams`.
        max_tokens: As in `SamplingParams`.
        sampling_top_k: `top_k` of `SamplingParams`.
        top_p: As in `SamplingParams`.
        seed: As in `SamplingParams`.
        stop: As in `SamplingParams`.
        stop_token_ids: As in `SamplingParams`.
        repetition_penalty: As in `SamplingParams`; 1.0 switches the model's own off.
        logprobs: True, or the number of alternatives to report per token; None or False reports none.
        top_logprobs: Number of alternatives, where `logprobs` is True.
        n: Answers to generate.
        timeout: Seconds the call may take; None does not limit it.
        chat_template_kwargs: More variables for the chat template.
        stream_usage: Whether a stream's last chunk says how many tokens were used.
    """

    route_text: Annotated[str | None, Field(description="a string")] = None
    temperature: Temperature = 0.0
    max_tokens: MaxTokens = 256
    sampling_top_k: TopK = 0
    top_p: TopP = 1.0
    seed: Seed = None
    stop: Annotated[tuple[NonEmpty, ...] | list[NonEmpty], STOP_STRINGS, are_short] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...] | list[TokenId], STOP_TOKEN_IDS] = ()
    repetition_penalty: RepetitionPenalty = None
    logprobs: Annotated[bool | int | None, Field(description="True, False, or a number of alternatives")] = None
    top_logprobs: Annotated[int | None, Field(description="a number of alternatives")] = None
    n: Annotated[int, Field(ge=1, le=_MAX_ANSWERS, description=f"an integer from 1 to {_MAX_ANSWERS}")] = 1
    timeout: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=True, description="a number of seconds > 0; infinity for no limit"),
    ] = None
    chat_template_kwargs: Annotated[
        InstanceOf[Mapping[str, Any]] | None, Field(description="a mapping of template variables")
    ] = None
    stream_usage: bool = True

    @classmethod
    def merge(cls, settings: object, call: Mapping[str, Any]) -> CallOptions:
        """Lay a call's arguments over the settings of the same names.

        None resets what may be None (`adapters=None` unpins, `timeout=None` sets no limit), whatever the settings say;
        for all others it is no argument.

        Raises:
            InvalidRequestError: If an argument is unknown or its value is not allowed.
        """
        names, own = _names(), vars(settings)
        unknown = sorted(call.keys() - names - _LANGCHAIN_ARGUMENTS)
        if unknown:
            raise InvalidRequestError(_why_unknown(unknown, own))
        given = {**own, **{name: value for name, value in call.items() if value is not None or name in _resettable()}}
        values = {name: value for name, value in given.items() if name in names and value is not None}
        return cls(**values)

    def __post_init__(self) -> None:
        """Refuse what is not supported; sampling values are checked by `SamplingParams`."""
        if self.adapters is not None and self.model is not None:
            raise InvalidRequestError("Both adapters and model are given: each names the adapters to run; pass one.")
        if self.top_logprobs is not None and self.logprobs is not True:
            raise InvalidRequestError(
                f"top_logprobs={shown(self.top_logprobs)} needs logprobs=True, but logprobs={shown(self.logprobs)}: "
                "pass both, or the number as logprobs alone."
            )

        self.sampling()
        for name in ("stop", "route_text", "adapters", "exclude_adapters", "model"):
            check_texts(getattr(self, name), name)
        if self.chat_template_kwargs is not None:
            num_characters = check_json(dict(self.chat_template_kwargs), "chat_template_kwargs")
            if num_characters > _MAX_TEMPLATE_CHARACTERS:
                raise InvalidRequestError(
                    f"chat_template_kwargs holds {num_characters:,} characters, but at most "
                    f"{_MAX_TEMPLATE_CHARACTERS:,} are allowed: put long texts into messages."
                )

    def sampling(self, index: int = 0, *, skip_special_tokens: bool = True) -> SamplingParams:
        """Build the sampling parameters of answer `index` of `n`: answers differ in their seeds."""
        logprobs = self.logprobs
        if isinstance(logprobs, bool):
            logprobs = (self.top_logprobs or 0) if logprobs else None
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.sampling_top_k,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed + index,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            repetition_penalty=self.repetition_penalty,
            logprobs=logprobs,
            skip_special_tokens=skip_special_tokens,
        )


@cache
def _names() -> frozenset[str]:
    return frozenset(field.name for field in fields(CallOptions))


@cache
def _resettable() -> frozenset[str]:
    return frozenset(field.name for field in fields(CallOptions) if field.default is None)


def _why_unknown(unknown: Sequence[str], settings: Mapping[str, Any]) -> str:
    names = ", ".join(shown(name) for name in unknown[:8])
    if unknown[0] in settings:
        return (
            f"{unknown[0]!r} is a setting of the chat model, not of a call. Give the model another one: "
            f"llm.model_copy(update={{{unknown[0]!r}: ...}}), or llm.{unknown[0]} = ... for every call from then on."
        )
    hint = did_you_mean(unknown[0], _names())
    return f"Unknown argument{'s'[: len(unknown) > 1]} {names}.{hint} A call takes: {', '.join(sorted(_names()))}."
