"""What one call asks for: the model's own settings, with the call's keyword arguments laid over them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_args

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.format import OutputRequest
from langchain_lora_retriever.retrieval.composer import Weighting
from langchain_lora_retriever.retrieval.routing import RoutingOptions
from langchain_lora_retriever.support.nesting import check_json, check_texts
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    CompositionMode,
    SamplingParams,
    is_repetition_penalty,
    is_stop_token_ids,
)

__all__ = ["CallOptions"]

# Arguments that LangChain has acted upon before a call arrives here: it streams or not, and writes the trace.
_LANGCHAIN_ARGUMENTS = frozenset({"stream", "ls_structured_output_format"})

_MAX_ANSWERS = 128
"""Answers of one call, each a request of its own."""
_MAX_NAMES = 16_384
"""Names in one list of adapters."""
_MAX_TEMPLATE_CHARACTERS = 262_144
"""Characters of all variables for the chat template."""
_MAX_NAME_LENGTH = 255
"""Characters of one name; no file system allows more."""


@dataclass(frozen=True, kw_only=True)
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

    route_text: str | None = None
    temperature: float = 0.0
    max_tokens: int = 256
    sampling_top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    repetition_penalty: float | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    n: int = 1
    timeout: float | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
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
        for name, (is_allowed, allowed) in _CHECKS.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise InvalidRequestError(f"{name}={shown(value)} is not allowed: pass {allowed}.")
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
    near = difflib.get_close_matches(unknown[0][:_MAX_NAME_LENGTH], _names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown argument{'s'[: len(unknown) > 1]} {names}.{hint} A call takes: {', '.join(sorted(_names()))}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_positive_number(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_time(value: Any) -> bool:
    return value == float("inf") if isinstance(value, float) and not _is_number(value) else _is_positive_number(value)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


def _is_cosine(value: Any) -> bool:
    return _is_number(value) and -1 <= value <= 1


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_NAME_LENGTH


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= _MAX_NAMES and all(map(_is_name, value)) and all(value)


def _is_one_of(allowed: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in allowed, f"one of {', '.join(map(repr, allowed))}"


_NAMES = f"a list of at most {_MAX_NAMES} adapter names of at most {_MAX_NAME_LENGTH} characters"

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapters": (_is_list_of_names, f"{_NAMES}; [] for the base model alone"),
    "exclude_adapters": (_is_list_of_names, _NAMES),
    "stop": (
        lambda value: (
            _is_list_of_text(value) and len(value) <= MAX_STOP_STRINGS and sum(map(len, value)) <= MAX_STOP_CHARACTERS
        ),
        f"a list of at most {MAX_STOP_STRINGS} non-empty strings, of {MAX_STOP_CHARACTERS:,} characters together",
    ),
    "stop_token_ids": (
        lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes) and is_stop_token_ids(value),
        f"a list of at most {MAX_STOP_TOKEN_IDS:,} token ids, integers >= 0",
    ),
    "repetition_penalty": (is_repetition_penalty, "a number from 0.01 to 100; 1 does nothing"),
    "composition": _is_one_of(get_args(CompositionMode)),
    "weights": _is_one_of(get_args(Weighting)),
    "top_k": (_is_positive_int, "an integer >= 1"),
    "n": (lambda value: _is_positive_int(value) and value <= _MAX_ANSWERS, f"an integer from 1 to {_MAX_ANSWERS}"),
    "weight_temperature": (_is_positive_number, "a finite number > 0"),
    "timeout": (_is_time, "a number of seconds > 0; infinity for no limit"),
    "min_score": (_is_cosine, "a cosine similarity, from -1 to 1"),
    "route_text": (lambda value: isinstance(value, str), "a string"),
    "model": (_is_name, f"an adapter's name, or the base model's, of at most {_MAX_NAME_LENGTH} characters"),
    "guided": (lambda value: isinstance(value, Mapping), "a mapping of one of json, regex, choice and grammar"),
    "chat_template_kwargs": (lambda value: isinstance(value, Mapping), "a mapping of template variables"),
    "stream_usage": (lambda value: isinstance(value, bool), "True or False"),
    "parallel_tool_calls": (lambda value: isinstance(value, bool), "True or False"),
    "tools": (lambda value: isinstance(value, list | tuple), "a list of tools"),
    "tool_choice": (
        lambda value: isinstance(value, str | bool | Mapping),
        '"auto", "any", "none", a tool\'s name, or a mapping',
    ),
    "logprobs": (_is_int, "True, False, or a number of alternatives"),
    "top_logprobs": (_is_int, "a number of alternatives"),
    "seed": (lambda value: _is_int(value) and not isinstance(value, bool), "an integer"),
}
