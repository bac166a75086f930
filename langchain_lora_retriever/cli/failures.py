"""What a command that failed says, and the status it exits with."""

from __future__ import annotations

from typing import Any

from langchain_lora_retriever.demo.model import INSTALL_DEMO
from langchain_lora_retriever.errors import InvalidRequestError, LoraRetrieverError, PoolError, UnknownAdapterError

__all__ = ["FAILED", "FAULT", "WRONG_ARGUMENTS", "explain"]

FAILED = 1
"""What was asked for cannot be done: a pool, a model or a file that cannot be had."""
WRONG_ARGUMENTS = 2
"""It was asked for wrongly; typer's own."""
FAULT = 70
"""Something that nobody foresaw; `EX_SOFTWARE` of sysexits.h."""

_MAX_CHARACTERS = 2000


def explain(error: Exception) -> tuple[str, int]:
    """Put an error into a paragraph.

    Returns:
        The paragraph, and the exit status.
    """
    if isinstance(error, LoraRetrieverError | OSError):
        code = WRONG_ARGUMENTS if isinstance(error, InvalidRequestError | UnknownAdapterError) else FAILED
        return _about_hub(_paragraph(str(error) or type(error).__name__)), code
    errors = getattr(error, "errors", None)
    if type(error).__name__ == "ValidationError" and callable(errors):  # pydantic's, of the chat model's settings
        causes = [told.get("ctx", {}).get("error") for told in errors()]
        if isinstance(causes[0], PoolError):  # met where a setting was read
            return explain(causes[0])
        return _paragraph(" ".join(map(_of_setting, errors()))), WRONG_ARGUMENTS
    if isinstance(error, ImportError):
        return f"{_paragraph(str(error))} A package that this command needs is missing or too old.", FAILED
    told = _paragraph(f"{type(error).__name__}: {error}")
    return f"{told}\nThis should not have happened. Run the command again with --verbose for the traceback.", FAULT


def _of_setting(error: dict[str, Any]) -> str:
    told = str(error["msg"]).removeprefix("Value error, ")
    names = ".".join(map(str, error["loc"]))
    return f"{names}: {told}." if names else told


def _about_hub(text: str) -> str:
    return f"{text}\n{INSTALL_DEMO}" if "huggingface.co" in text and "[demo]" not in text else text


def _paragraph(text: str) -> str:
    """The first paragraph of a text, of bounded length."""
    first = text.strip().split("\n\n")[0]
    return first if len(first) <= _MAX_CHARACTERS else f"{first[:_MAX_CHARACTERS]} ..."
