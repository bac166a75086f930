"""Errors that are kept are raised as copies: no traceback grows, and nothing a caller held is kept."""

from __future__ import annotations

import gc
import json
import traceback
import weakref
from typing import Any

import pydantic
import pytest

from langchain_lora_retriever.engine.generation import Generation
from langchain_lora_retriever.errors import EngineDeadError, EngineError, LoraRetrieverError, UnknownAdapterError, fresh


class RenamingError(Exception):
    """Its constructor makes its message of something else."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no {name}")
        self.name = name


class DemandingError(Exception):
    """Its constructor takes what its `args` do not hold."""

    def __init__(self, *, code: int) -> None:
        super().__init__()
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


def caught(raiser: Any, *arguments: Any) -> BaseException:
    """What a call raises."""
    with pytest.raises(BaseException) as info:  # noqa: PT011 - any
        raiser(*arguments)
    return info.value


ERRORS = {
    "plain": EngineError("boom"),
    "key": UnknownAdapterError("no adapter 'x'"),
    "renaming": RenamingError("x"),
    "demanding": DemandingError(code=3),
    "exit": SystemExit(3),
    "unicode": caught("\ud800".encode),
    "json": caught(json.loads, "{"),
    "file": caught(open, "/nowhere/at/all"),
    "import": ImportError("no", name="a", path="b"),
    "stop": StopIteration(4),
}


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_a_copy_says_the_same(name: str) -> None:
    """Type, message, arguments and attributes are the error's own; the traceback is not."""
    error = ERRORS[name]
    copied = fresh(error)
    assert copied is not error
    assert type(copied) is type(error)
    assert (str(copied), copied.args, vars(copied)) == (str(error), error.args, vars(error))
    assert copied.__traceback__ is None


def test_a_copy_keeps_cause_context_and_notes() -> None:
    """What led to the error is told with the copy."""
    error, cause, context = EngineError("boom"), ValueError("why"), KeyError("when")
    error.__cause__, error.__context__ = cause, context
    error.add_note("more")
    copied = fresh(error)
    assert (copied.__cause__, copied.__context__, copied.__suppress_context__) == (cause, context, True)
    assert copied.__notes__ == ["more"]
    assert not fresh(EngineError("alone")).__suppress_context__


def test_an_error_that_cannot_be_copied_is_told_of() -> None:
    """A foreign exception that refuses to be made again is a package's error with its words."""
    error = caught(pydantic.TypeAdapter(int).validate_python, "x")
    copied = fresh(error)
    assert type(copied) is LoraRetrieverError
    assert str(copied) == f"ValidationError: {error}"


async def test_asking_a_failed_generation_a_thousand_times_gathers_nothing() -> None:
    """Every `result`, `aresult` and iterator raises an error of its own, and lets go of what its caller held."""

    class Prompt:
        pass

    generation = Generation(lambda: None)
    generation.fail(EngineDeadError("dead"))

    def ask(ways: Any, prompt: Prompt) -> weakref.ref[Prompt]:
        error = caught(ways)
        assert len(traceback.extract_tb(error.__traceback__)) < 8
        return weakref.ref(prompt)

    kept = [ask(way, Prompt()) for _ in range(500) for way in (generation.result, lambda: next(iter(generation)))]
    gc.collect()
    assert all(ref() is None for ref in kept)
    assert await failed(generation) is not await failed(generation)
    shared = generation._future.exception()
    assert shared is not None
    assert shared.__traceback__ is None


async def failed(generation: Generation) -> BaseException:
    """What awaiting a generation raises."""
    with pytest.raises(EngineDeadError) as info:
        await generation.aresult()
    return info.value
