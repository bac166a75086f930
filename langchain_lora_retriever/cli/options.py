"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from langchain_lora_retriever.chat_model import ChatLoraRetriever

__all__ = [
    "BaseModelOption",
    "EncoderOption",
    "JsonOption",
    "PoolOption",
    "TopKOption",
    "make_chat_model",
    "print_json",
]

BaseModelOption = Annotated[
    str | None, typer.Option("--base-model", help="Hub name or folder; the demo's by default.", show_default=False)
]
PoolOption = Annotated[
    Path | None, typer.Option("--pool", help="Folder of adapters; the demo's by default.", show_default=False)
]
EncoderOption = Annotated[
    str | None, typer.Option("--encoder", help="sentence-transformers name or folder.", show_default=False)
]
TopKOption = Annotated[int, typer.Option("--top-k", help="Most adapters to retrieve.", min=1)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def make_chat_model(
    base_model: str | None, pool: Path | None, encoder: str | None, **settings: Any
) -> ChatLoraRetriever:
    """Make the chat model that options describe; what is not given is the demo's.

    A base model without a pool runs without adapters: the demo's would not fit it.
    """
    from langchain_lora_retriever.chat_model import ChatLoraRetriever  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.demo import demo_chat_model  # noqa: PLC0415

    given = {"base_model": base_model, "pool": pool, "encoder": encoder, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    return demo_chat_model(**given) if base_model is None else ChatLoraRetriever(**given)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
