"""JSON schemas of TypedDicts: pydantic's, with what LangChain writes into `Annotated` and into docstrings."""

from __future__ import annotations

import inspect
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Required, Union, get_args, get_origin, get_type_hints

import pydantic.v1
from annotated_types import BaseMetadata, GroupedMetadata
from pydantic import Field, TypeAdapter, WithJsonSchema
from pydantic.fields import FieldInfo
from typing_extensions import ReadOnly, TypedDict, is_typeddict

from langchain_lora_retriever.output.schemas import checked_schema, inlined
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["typed_dict_schema"]

_QUALIFIERS = (Required, NotRequired, ReadOnly)


def typed_dict_schema(kind: Any) -> dict[str, Any]:
    """Ask pydantic for the JSON schema of a TypedDict, whichever module its class is of.

    A key is required where the TypedDict has it so, unless LangChain's `Annotated[type, default, "description"]` gives
    it a default; `...` is none. What a docstring in Google's style says of a key goes before that description.

    Raises:
        Exception: Whatever its annotations raise, in resolving or within pydantic.
    """
    schema: dict[str, Any] = TypeAdapter(_rewritten(kind, ())).json_schema()
    return schema


def _rewritten(kind: Any, inside: tuple[Any, ...]) -> Any:
    """Put TypedDicts that pydantic understands in the place of those in a type.

    Args:
        kind: What a key is annotated with.
        inside: The TypedDicts that it stands in.
    """
    if is_typeddict(kind):
        return _rewritten_class(kind, inside)
    if isinstance(kind, type) and issubclass(kind, pydantic.v1.BaseModel):
        return Annotated[Any, WithJsonSchema(inlined(checked_schema(kind.schema())))]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return Annotated[(_rewritten(arguments[0], inside), *arguments[1:])]
    rewritten = tuple(_rewritten(argument, inside) for argument in arguments)
    if rewritten == arguments:
        return kind
    return Union[rewritten] if origin in (Union, UnionType) else origin[rewritten]  # noqa: UP007 - of any number


def _rewritten_class(kind: Any, inside: tuple[Any, ...]) -> Any:
    if kind in inside:
        raise ValueError(f"the TypedDict {kind.__name__} contains itself. Write a pydantic class in its place")
    description, described = _docstring(kind)
    keys: dict[str, Any] = {}
    for key, hint in get_type_hints(kind, include_extras=True).items():
        bare, metadata, is_required = _unwrapped(hint, is_required=key in kind.__required_keys__)
        fields = [each for each in metadata if _is_pydantics(each)]
        default, text = _of_langchain([each for each in metadata if not _is_pydantics(each)], key)
        if text := described.get(key, text):
            fields.append(Field(description=text))
        if default is not ... and default is not None:
            fields.append(Field(default=default))
        whole = _rewritten(bare, (*inside, kind))
        whole = Annotated[(whole, *fields)] if fields else whole
        keys[key] = Required[whole] if is_required and default is ... else NotRequired[whole]
    make: Any = TypedDict  # mypy knows it with literal names alone
    made = make(kind.__name__, keys)
    made.__doc__ = description or None
    return made


def _unwrapped(hint: Any, *, is_required: bool) -> tuple[Any, tuple[Any, ...], bool]:
    """A key's type, what stands beside it in `Annotated`, and whether the key is required."""
    metadata: tuple[Any, ...] = ()
    while (origin := get_origin(hint)) is Annotated or origin in _QUALIFIERS:
        metadata = (*getattr(hint, "__metadata__", ()), *metadata)
        if origin in (Required, NotRequired):  # which `__required_keys__` misses where annotations are strings
            is_required = origin is Required
        hint = get_args(hint)[0]
    return hint, metadata, is_required


def _is_pydantics(metadata: Any) -> bool:
    """Whether what stands in `Annotated` is for pydantic, and no default or description."""
    return isinstance(metadata, FieldInfo | BaseMetadata | GroupedMetadata) or any(
        hasattr(metadata, name) for name in ("__get_pydantic_core_schema__", "__get_pydantic_json_schema__")
    )


def _of_langchain(metadata: list[Any], key: str) -> tuple[Any, str]:
    """The default of a key, `...` where it has none, and its description."""
    default: Any = metadata[0] if metadata else ...
    text = metadata[1] if len(metadata) > 1 else ""
    if not isinstance(text, str):
        raise ValueError(  # noqa: TRY004 - LangChain's
            f"the key {key!r} has the description {shown(text)}, which is no text. "
            'Write Annotated[type, default, "description"], and ... where there is no default'
        )
    return default, text


def _docstring(kind: Any) -> tuple[str, Mapping[str, str]]:
    """What a docstring in Google's style says of a class, and of each of its keys; a class without one has none."""
    description: list[str] = []
    described: dict[str, str] = {}
    is_over = False
    for block in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        if block.startswith("Args:"):
            described = _arguments(block.split("\n")[1:])
            break
        is_over = is_over or block.startswith(("Returns:", "Example:"))
        description += [] if is_over else [block]
    return " ".join(description).strip(), described


def _arguments(lines: list[str]) -> dict[str, str]:
    described: dict[str, str] = {}
    key = ""
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    for line in lines:
        name, colon, text = line.partition(":")
        if key and len(line) - len(line.lstrip()) > indent:
            described[key] += f" {line.strip()}"
        elif colon:
            key = name.partition("(")[0].strip()
            described[key] = text.strip()
    return described
