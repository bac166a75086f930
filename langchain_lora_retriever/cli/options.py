"""Options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.retrieval.encoder import Encoder

__all__ = [
    "BaseModelOption",
    "EncoderOption",
    "JsonOption",
    "PoolOption",
    "TopKOption",
    "WordsOption",
    "encoder_source",
    "make_chat_model",
    "make_encoder",
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
WordsOption = Annotated[bool, typer.Option("--words", help="Let the encoder see words beside meaning.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Most adapters to retrieve.", min=1)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def make_chat_model(
    base_model: str | None, pool: Path | None, encoder: str | Encoder | None, **settings: Any
) -> ChatLoraRetriever:
    """Make the chat model that options describe; what is not given is the demo's.

    A base model without a pool runs without adapters: the demo's would not fit it.
    """
    from langchain_lora_retriever.chat.model import ChatLoraRetriever  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.demo import demo_chat_model  # noqa: PLC0415

    given = {"base_model": base_model, "pool": pool, "encoder": encoder, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    return demo_chat_model(**given) if base_model is None else ChatLoraRetriever(**given)


def encoder_source(encoder: str | None) -> str:
    """Return the encoder that an option names, the demo's by default."""
    from langchain_lora_retriever.demo import model  # noqa: PLC0415 - seconds to import

    return encoder or model.encoder_source()


def make_encoder(encoder: str | None, *, words: bool = False) -> str | Encoder:
    """Return the encoder that options name; with `words` it sees words beside meaning."""
    from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder  # noqa: PLC0415 - seconds to import

    source = encoder_source(encoder)
    return HybridEncoder(source) if words else source


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
