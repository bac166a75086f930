"""What one call asks for: the model's own settings, with the call's keyword arguments laid over them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_args

from langchain_lora_retriever.composer import Weighting
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.shown import shown
from langchain_lora_retriever.types import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, CompositionMode, SamplingParams

__all__ = ["CallOptions"]

# Arguments that LangChain passes along for its own purposes; they change nothing here.
_LANGCHAIN_ARGUMENTS = frozenset({"stream", "stream_usage", "ls_structured_output_format"})


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """The settings of one call, checked.

    Attributes:
        adapters: Names that take the place of retrieval; empty runs the base model alone, None retrieves.
        exclude_adapters: Names retrieval must not return.
        composition: "selection", "fusion" or "mixture".
        top_k: Most adapters to compose.
        weights: "similarity" or "uniform" weights of retrieved adapters.
        weight_temperature: Temperature of the similarity weights; lower favours the best more.
        min_score: Cosine similarity under which an adapter is not used; None uses whatever is nearest.
        route_text: Text to retrieve for, in place of the last human message.
        model: An adapter's name to pin, or the base model's for no adapter, as OpenAI-style servers take it.
        temperature: As in `SamplingParams`.
        max_tokens: As in `SamplingParams`.
        sampling_top_k: `top_k` of `SamplingParams`.
        top_p: As in `SamplingParams`.
        seed: As in `SamplingParams`.
        stop: As in `SamplingParams`.
        logprobs: True, or the number of alternatives to report per token; None or False reports none.
        top_logprobs: Number of alternatives, where `logprobs` is True.
        n: Answers to generate.
        timeout: Seconds the call may take; None does not limit it.
        chat_template_kwargs: More variables for the chat template.
        tools: Tools the model may call.
        tool_choice: "auto", "any", "none" or the name of a tool.
        parallel_tool_calls: Whether one answer may hold several calls.
        response_format: OpenAI's `{"type": "json_schema", ...}`, or a schema.
        guided: One of `{"json": schema}`, `{"regex": ...}`, `{"choice": [...]}` and `{"grammar": ...}`.
    """

    adapters: Sequence[str] | None = None
    exclude_adapters: Sequence[str] = ()
    composition: CompositionMode = "mixture"
    top_k: int = 3
    weights: Weighting = "similarity"
    weight_temperature: float = 0.05
    min_score: float | None = None
    route_text: str | None = None
    model: str | None = None
    temperature: float = 0.0
    max_tokens: int = 256
    sampling_top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    n: int = 1
    timeout: float | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    guided: Mapping[str, Any] | None = None

    @classmethod
    def merge(cls, settings: object, call: Mapping[str, Any]) -> CallOptions:
        """Lay a call's arguments over the settings of the same names; an argument of None changes nothing.

        Raises:
            InvalidRequestError: If an argument is unknown or its value is not allowed.
        """
        names = _names()
        unknown = sorted(call.keys() - names - _LANGCHAIN_ARGUMENTS)
        if unknown:
            near = difflib.get_close_matches(unknown[0], names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InvalidRequestError(
                f"Unknown argument{'s'[: len(unknown) > 1]} {', '.join(map(repr, unknown))}.{hint} "
                f"A call takes: {', '.join(sorted(names))}."
            )
        given = {**vars(settings), **{name: value for name, value in call.items() if value is not None}}
        values = {name: value for name, value in given.items() if name in names and value is not None}
        return cls(**values)

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured. Sampling values are checked by `SamplingParams`."""
        for name, (is_allowed, allowed) in _CHECKS.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise InvalidRequestError(f"{name}={shown(value)} is not allowed: pass {allowed}.")
        if self.adapters is not None and self.model is not None:
            raise InvalidRequestError("Both adapters and model are given: each names the adapters to run; pass one.")

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
            logprobs=logprobs,
            skip_special_tokens=skip_special_tokens,
        )


@cache
def _names() -> frozenset[str]:
    return frozenset(field.name for field in fields(CallOptions))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive_number(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and _is_positive_number(value)


def _is_cosine(value: Any) -> bool:
    return _is_number(value) and -1 <= value <= 1


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(i, str) and i for i in value)


def _is_one_of(allowed: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in allowed, f"one of {', '.join(map(repr, allowed))}"


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapters": (_is_list_of_text, "a list of adapter names; [] for the base model alone"),
    "exclude_adapters": (_is_list_of_text, "a list of adapter names"),
    "stop": (
        lambda value: (
            _is_list_of_text(value) and len(value) <= MAX_STOP_STRINGS and sum(map(len, value)) <= MAX_STOP_CHARACTERS
        ),
        f"a list of at most {MAX_STOP_STRINGS} non-empty strings, of {MAX_STOP_CHARACTERS:,} characters together",
    ),
    "composition": _is_one_of(get_args(CompositionMode)),
    "weights": _is_one_of(get_args(Weighting)),
    "top_k": (_is_positive_int, "an integer >= 1"),
    "n": (_is_positive_int, "an integer >= 1"),
    "weight_temperature": (_is_positive_number, "a number > 0"),
    "timeout": (_is_positive_number, "a number of seconds > 0"),
    "min_score": (_is_cosine, "a cosine similarity, from -1 to 1"),
    "route_text": (lambda value: isinstance(value, str), "a string"),
    "model": (lambda value: isinstance(value, str), "an adapter's name, or the base model's"),
    "guided": (lambda value: isinstance(value, Mapping), "a mapping of one of json, regex, choice and grammar"),
    "chat_template_kwargs": (lambda value: isinstance(value, Mapping), "a mapping of template variables"),
}
