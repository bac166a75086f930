"""Settings are refused by what their annotations say, in one form of words."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import Field

from langchain_lora_retriever.engine import EngineConfig
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.checks import is_allowed, settings

Share = Annotated[float | None, Field(gt=0, le=1, description="a number in (0, 1], or None")]


@settings(kw_only=True)
class Base:
    """A setting to inherit."""

    share: Share = None


@settings(kw_only=True)
class Options(Base):
    """One more of each kind."""

    mode: Literal["fast", "exact"] = "fast"
    is_loud: bool = False
    names: Annotated[tuple[str, ...] | list[str], Field(max_length=2, description="at most two names")] = ()

    def __post_init__(self) -> None:
        """Refuse a pair."""
        if self.is_loud and self.mode == "exact":
            raise InvalidRequestError("loud and exact")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("share", 0, "a number in (0, 1], or None"),
        ("share", float("nan"), "a number in (0, 1], or None"),
        ("share", True, "a number in (0, 1], or None"),
        ("share", "0.5", "a number in (0, 1], or None"),
        ("share", 10**400, "a number in (0, 1], or None"),
        ("mode", "slow", "one of 'fast', 'exact'"),
        ("mode", ["fast"], "one of 'fast', 'exact'"),
        ("is_loud", 1, "True or False"),
        ("names", ["a", "b", "c"], "at most two names"),
        ("names", [1], "at most two names"),
        ("names", "ab", "at most two names"),
        ("names", range(10**30), "at most two names"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(name: str, value: object, allowed: str) -> None:
    """The name, the value shortly, and what to pass."""
    with pytest.raises(InvalidRequestError) as caught:
        Options(**{name: value})
    assert str(caught.value).startswith(f"{name}=")
    assert str(caught.value).endswith(f"is not allowed: pass {allowed}.")
    assert len(str(caught.value)) < 200
    assert caught.value.__cause__ is None


def test_values_are_kept_as_they_were_given() -> None:
    """No list becomes a tuple; a class's own check comes after."""
    names = ["a"]
    made = Options(share=0.25, names=names)
    assert made.names is names
    with pytest.raises(InvalidRequestError, match="loud and exact"):
        Options(is_loud=True, mode="exact")
    with pytest.raises(AttributeError):
        made.share = 0.5  # type: ignore[misc]


def test_one_value_is_asked_about_alone() -> None:
    """As those do who read somebody else's file."""
    assert is_allowed(0.5, Share)
    assert is_allowed(None, Share)
    assert not is_allowed(2, Share)
    assert not is_allowed([0.5], Share)


def test_a_configuration_from_a_file_is_a_key() -> None:
    """Lists, as YAML and JSON have them, become tuples."""
    listed = EngineConfig(captured_ranks=[8, 16], captured_num_adapters=[0, 1])  # type: ignore[arg-type]
    assert listed == EngineConfig(captured_ranks=(8, 16), captured_num_adapters=(0, 1))
    assert len({listed, EngineConfig(captured_ranks=(8, 16), captured_num_adapters=(0, 1))}) == 1


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), 0.5, 1])
def test_a_number_is_kept_as_its_fields_type(value: float) -> None:
    """What waits for a time, or crosses to another process, takes no NumPy scalar."""
    share = Options(share=value).share
    assert type(share) is float
    assert share == value
