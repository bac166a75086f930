"""Every exception the package raises on purpose.

::

    LoraRetrieverError
    ├── AdapterError (ValueError)          one adapter cannot be used; names it
    │   ├── UnsupportedAdapterError        valid PEFT that asks for what is not supported here (bias, IA3)
    │   ├── HubError                       a repository of the hub that cannot be had, or holds no adapter
    │   ├── InvalidAdapterError            corrupt, truncated, NaN, or shapes that do not fit the base model
    │   └── InvalidSamplesError            samples.jsonl is not JSON lines with an "input"
    ├── PoolError (ValueError)             the pool as a whole cannot be used (empty, unreadable)
    │   └── DuplicateAdapterError          two adapters of one name
    ├── UnknownAdapterError (KeyError)     a name that is not in the pool
    ├── InvalidRequestError (ValueError)   a call that cannot be served (empty messages, NaN temperature, ...)
    │   └── PromptTooLongError             the prompt leaves no room in the context window
    ├── EncoderError (RuntimeError)        the encoder cannot be loaded, or failed over a text; the cause is chained
    ├── StructuredOutputError (ValueError) generated text does not satisfy the schema asked for
    ├── RequestAbortedError                the caller (or shutdown) cancelled the request
    ├── EngineError (RuntimeError)         the engine failed while serving; the cause is chained
    │   ├── EngineDeadError                the engine has stopped and serves nothing more
    │   └── EngineOverloadedError          as many requests as `EngineConfig.max_waiting` allows are there already
    └── MissingDependencyError (ImportError)  an extra is not installed; prints the exact pip install
"""

from __future__ import annotations

import copy
from typing import TypeVar

__all__ = [
    "AdapterError",
    "DuplicateAdapterError",
    "EncoderError",
    "EngineDeadError",
    "EngineError",
    "EngineOverloadedError",
    "HubError",
    "InvalidAdapterError",
    "InvalidRequestError",
    "InvalidSamplesError",
    "LoraRetrieverError",
    "MissingDependencyError",
    "PoolError",
    "PromptTooLongError",
    "RequestAbortedError",
    "StructuredOutputError",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "fresh",
    "without_frames",
]


ErrorT = TypeVar("ErrorT", bound=BaseException)


class LoraRetrieverError(Exception):
    """Base class: `except LoraRetrieverError` catches all of them."""


class AdapterError(LoraRetrieverError, ValueError):
    """One adapter cannot be used. The message names the adapter and where it lies."""


class UnsupportedAdapterError(AdapterError):
    """A valid PEFT adapter that asks for something that is not supported here."""


class HubError(AdapterError):
    """A repository of the Hugging Face hub that cannot be had, or holds no adapter."""


class InvalidAdapterError(AdapterError):
    """An adapter whose files are corrupt, or whose tensors do not fit the base model."""


class InvalidSamplesError(AdapterError):
    """A samples file that is not JSON lines of objects with an `input`."""


class PoolError(LoraRetrieverError, ValueError):
    """The pool as a whole cannot be used."""


class DuplicateAdapterError(PoolError):
    """Two adapters of one name."""


class UnknownAdapterError(LoraRetrieverError, KeyError):
    """A name that no adapter in the pool has."""

    def __str__(self) -> str:
        """The message as written; `KeyError` alone would print its `repr`."""
        return str(self.args[0]) if self.args else ""


class InvalidRequestError(LoraRetrieverError, ValueError):
    """A call that cannot be served as it was made."""


class PromptTooLongError(InvalidRequestError):
    """A prompt that leaves no room for an answer in the model's context window."""


class EncoderError(LoraRetrieverError, RuntimeError):
    """The encoder cannot be loaded, or failed over a text; the cause is chained."""


class StructuredOutputError(LoraRetrieverError, ValueError):
    """Generated text that does not satisfy the schema asked for."""


class RequestAbortedError(LoraRetrieverError):
    """The request was cancelled before it finished."""


class EngineError(LoraRetrieverError, RuntimeError):
    """The engine failed while it served a request; the cause is chained."""


class EngineDeadError(EngineError):
    """The engine has stopped and serves nothing more."""


class EngineOverloadedError(EngineError):
    """As many requests wait as `EngineConfig.max_waiting` allows; try again when some of them have ended."""


class MissingDependencyError(LoraRetrieverError, ImportError):
    """An optional dependency is missing; the message holds the `pip install` that brings it."""


def fresh(error: BaseException) -> BaseException:
    """Return a copy of an error that is kept somewhere, to be raised in its place.

    An error that is raised again and again, or to many callers, gathers the frames of all of them in its one traceback,
    and with these their prompts. The copy begins without a traceback; type, message, attributes, notes, cause and
    context are the error's own.

    Args:
        error: Any exception. One that cannot be copied is told of by a `LoraRetrieverError` with its type and message.
    """
    try:
        copied = copy.copy(error)
        if type(copied) is not type(error) or copied.args != error.args:  # its constructor makes others of them
            copied = _made_without_constructor(error)
    except Exception:  # noqa: BLE001 - the constructor and `__reduce__` of anybody's class
        copied = _made_without_constructor(error)
    copied.__cause__, copied.__context__ = error.__cause__, error.__context__
    copied.__suppress_context__ = error.__suppress_context__
    return copied


def without_frames(error: ErrorT) -> ErrorT:
    """Take the tracebacks from an error that is kept, and from what it came of: their frames hold files and memory."""
    chain: list[BaseException] = [error]
    for one in chain:  # which grows meanwhile
        one.__traceback__ = None
        chain += [other for other in (one.__cause__, one.__context__) if other is not None and other not in chain]
    return error


def _made_without_constructor(error: BaseException) -> BaseException:
    kind = type(error)
    try:
        copied = kind.__new__(kind, *error.args)
        vars(copied).update(vars(error))
    except Exception:  # noqa: BLE001 - `__new__` is anybody's too
        return LoraRetrieverError(f"{kind.__name__}: {error}")
    return copied
