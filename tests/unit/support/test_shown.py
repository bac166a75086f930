"""How errors show the values they were met with."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_lora_retriever.support.shown import shown


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _circle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000_000, b"x" * 10_000_000, 10**5000, -(10**5000), _nested(100_000), _circle(), ["x" * 999] * 999,
     {"x" * 999: "y" * 999}, _Unprintable(), None, float("nan")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_any_value_is_shown_in_short(value: Any) -> None:
    """No value makes an error long, slow, or another error."""
    assert 0 < len(shown(value)) < 1000


def test_short_values_are_shown_as_they_are() -> None:
    """What fits is the plain `repr`."""
    assert [shown(value) for value in ("hot", -5, None, ["a"])] == ["'hot'", "-5", "None", "['a']"]
