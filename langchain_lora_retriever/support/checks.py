"""Settings whose limits stand where they are declared; pydantic checks them, and our error tells."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.shown import shown

__all__ = ["is_allowed", "settings"]

T = TypeVar("T")

# No True for 1, no "1" for 1, no list for a tuple unless it says so; infinity where a field allows it.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T] | None = None, /, **options: bool) -> Any:
    """Make a frozen dataclass that refuses values which its annotations do not allow.

    A field's annotation is `Annotated[type, Field(limits, description="an integer >= 1")]`: the description says what
    is allowed, and ends the error's text. A `__post_init__` of the class's own runs after the checks. A number is
    kept as its field's type (NumPy's 0.5 as 0.5: what waits for a time takes no other), all else as it was given.

    Args:
        cls: The class.
        options: For `dataclass`.

    Raises:
        InvalidRequestError: By the constructor, if a value is not allowed.
    """

    def make(cls: type[T]) -> type[T]:
        own = cls.__dict__.get("__post_init__")

        def check(self: Any) -> None:
            _check(self)
            if own is not None:
                own(self)

        cls.__post_init__ = check  # type: ignore[attr-defined]
        return dataclass(frozen=True, **options)(cls)

    return make if cls is None else make(cls)


def is_allowed(value: object, annotation: Any) -> bool:
    """Whether a value is what an annotation allows."""
    try:
        _adapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


class _Check(NamedTuple):
    name: str
    adapter: TypeAdapter[Any]
    allowed: str


def _check(values: Any) -> None:
    for name, adapter, allowed in _checks(type(values)):  # type: ignore[arg-type]
        value = getattr(values, name)
        try:
            checked = adapter.validate_python(value)
        except ValidationError:
            raise InvalidRequestError(f"{name}={shown(value)} is not allowed: pass {allowed}.") from None
        if isinstance(checked, (int, float)):
            object.__setattr__(values, name, checked)


@cache
def _checks(cls: Any) -> tuple[_Check, ...]:
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in fields(cls)]
    return tuple(_Check(name, _adapter(hints[name]), _allowed(hints[name])) for name in names)


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def _allowed(annotation: Any) -> str:
    """What the annotation's description says; the choices of a `Literal`."""
    if get_origin(annotation) is Annotated:
        for extra in annotation.__metadata__:
            if isinstance(extra, FieldInfo) and extra.description:
                return extra.description
        return _allowed(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, get_args(annotation)))}"
    return "True or False" if annotation is bool else f"what {annotation} allows"
