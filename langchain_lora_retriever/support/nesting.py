"""Values that callers nest: walked without recursion, and refused where they are too deep, too many, or no Unicode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_DEPTH", "MAX_VALUES", "check_json", "check_texts", "check_unicode", "walk"]

MAX_DEPTH = 100
"""Levels of nesting."""
MAX_VALUES = 262_144
"""Values of one structure."""
_MAX_INTEGER_BITS = 4_096
"""Bits of an integer; Python refuses to print much larger ones."""


def walk(value: Any, what: str) -> Iterator[Any]:
    """Yield a value and those nested in it, keys of mappings among them, in no particular order.

    Args:
        value: Strings, numbers, lists and mappings.
        what: What to call it in an error, such as "The schema".

    Raises:
        InvalidRequestError: If it nests too deep (or in a circle), or holds too many values.
    """
    stack = [(0, value)]
    num_values = 0
    while stack:
        depth, current = stack.pop()
        num_values += 1
        if depth > MAX_DEPTH:
            raise InvalidRequestError(f"{what} nests more than {MAX_DEPTH} levels deep, or in a circle: flatten it.")
        is_mapping = isinstance(current, Mapping)
        is_container = is_mapping or isinstance(current, list | tuple | set | frozenset)
        if num_values + (len(current) if is_container else 0) > MAX_VALUES:
            raise InvalidRequestError(f"{what} holds more than {MAX_VALUES:,} values: pass fewer.")
        yield current
        if is_mapping:
            stack += [(depth + 1, item) for pair in current.items() for item in pair]
        elif is_container:
            stack += [(depth + 1, item) for item in current]


def check_texts(value: Any, what: str) -> int:
    """Refuse nested values whose texts are no Unicode; return how many characters there are in all.

    Raises:
        InvalidRequestError: As `walk` and `check_unicode` do.
    """
    num_characters = 0
    for item in walk(value, what):
        if isinstance(item, str):
            check_unicode(item, what)
            num_characters += len(item)
    return num_characters


def check_json(value: Any, what: str) -> int:
    """Refuse nested values that are not what JSON can hold; return how many characters its texts have in all.

    Raises:
        InvalidRequestError: As `check_texts` does, or if there is an object of another type, or an enormous integer.
    """
    return sum(_check_json_value(item, what) for item in walk(value, what))


def _check_json_value(item: Any, what: str) -> int:
    if isinstance(item, str):
        check_unicode(item, what)
        return len(item)
    if isinstance(item, int):
        if item.bit_length() > _MAX_INTEGER_BITS:
            raise InvalidRequestError(f"{what} holds {shown(item)}: pass at most {_MAX_INTEGER_BITS:,} bits, or text.")
    elif isinstance(item, dict):
        for key in item:
            if not isinstance(key, str):
                raise InvalidRequestError(f"{what} holds the key {shown(key)}, which is no text: name it by a string.")
    elif not isinstance(item, float | list | tuple | None):
        raise InvalidRequestError(
            f"{what} holds {shown(item)}, which JSON cannot: pass text, numbers, True, False, None, lists and "
            "dictionaries."
        )
    return 0


def check_unicode(text: str, what: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer can read.

    Raises:
        InvalidRequestError: If the text cannot be encoded; the place is named.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise InvalidRequestError(
            f"{what} holds half a surrogate pair, {text[error.start]!a}, at character {error.start}: {around}. It "
            "is no Unicode text, and remains where JSON or UTF-16 is cut within a character. Cut it elsewhere, or "
            "replace it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
