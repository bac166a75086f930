"""Options that several commands share, and the chat model that they describe."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_lora_retriever.cli.terminal import status
from langchain_lora_retriever.demo import POOL_FOLDER, demo_chat_model
from langchain_lora_retriever.support.model_names import is_missing_folder

if TYPE_CHECKING:
    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.retrieval.encoder import Encoder

__all__ = [
    "AdapterOption",
    "BaseModelOption",
    "CompositionOption",
    "EncoderOption",
    "FolderArgument",
    "JsonOption",
    "Mode",
    "PoolOption",
    "TopKOption",
    "WordsOption",
    "check_model_name",
    "encoder_source",
    "make_chat_model",
    "make_encoder",
    "new_commands",
    "sees_words",
    "warm_up",
]


class Mode(StrEnum):
    """`CompositionMode`, as typer reads it."""

    selection = "selection"
    fusion = "fusion"
    mixture = "mixture"


def new_commands(text: str, *, completes: bool = False) -> typer.Typer:
    """A group of commands: its help and its errors are plain text, as everything that may go through a pipe.

    Args:
        text: Its help.
        completes: Offer completion for the shell.
    """
    return typer.Typer(
        help=text, no_args_is_help=True, add_completion=completes, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def complete_adapter(context: typer.Context, incomplete: str) -> list[str]:
    """Names of adapters in the pool that the options so far name, for the shell; no file is read."""
    pool = context.params.get("pool") or context.params.get("folder")
    folder = Path(pool) if pool else POOL_FOLDER
    try:
        return sorted(path.parent.name for path in folder.glob(f"{incomplete}*/adapter_config.json"))
    except (OSError, ValueError):  # a folder that is not there completes to nothing
        return []


def check_model_name(name: str | None) -> str | None:
    """Refuse a folder that is not there, as other folders are."""
    if name is not None and is_missing_folder(name):
        raise typer.BadParameter(f"Directory {name!r} does not exist.")
    return name


BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model", metavar="MODEL", help="Hub name or folder; the demo's by default.", show_default=False,
        callback=check_model_name,
    ),
]  # fmt: skip
PoolOption = Annotated[
    Path | None,
    typer.Option(
        "--pool", metavar="FOLDER", help="Folder of adapters; the demo's by default.", show_default=False,
        exists=True, file_okay=False,
    ),
]  # fmt: skip
FolderArgument = Annotated[Path, typer.Argument(help="Folder of the pool.", exists=True, file_okay=False)]
EncoderOption = Annotated[
    str | None,
    typer.Option("--encoder", metavar="MODEL", help="sentence-transformers name or folder.", show_default=False),
]
CompositionOption = Annotated[Mode, typer.Option("--composition", help="How the adapters that are found act together.")]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME", help="Pin an adapter; may be repeated.", show_default=False,
        autocompletion=complete_adapter,
    ),
]  # fmt: skip
# Flags name no type: `metavar=""`.
WordsOption = Annotated[
    bool | None,
    typer.Option(
        "--words/--no-words", metavar="", show_default=False,
        help="Let the encoder see words beside meaning; by default where no --encoder is given.",
    ),
]  # fmt: skip
TopKOption = Annotated[int, typer.Option("--top-k", metavar="K", help="Maximum number of adapters to retrieve.", min=1)]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON for a program to read.")]


def make_chat_model(
    base_model: str | None, pool: Path | None, encoder: str | Encoder | None, **settings: Any
) -> ChatLoraRetriever:
    """Make the chat model that options describe; what is not given is the demo's.

    A base model without a pool runs without adapters: the demo's would not fit it.

    Raises:
        UnknownAdapterError: If `adapters` names one that is not in the pool.
    """
    from langchain_lora_retriever.chat.model import ChatLoraRetriever  # noqa: PLC0415 - seconds to import

    given = {"base_model": base_model, "pool": pool, "encoder": encoder, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    llm = demo_chat_model(**given) if base_model is None else ChatLoraRetriever(**given)
    for name in settings.get("adapters") or ():
        _ = llm.pool[name]  # now, and not after the base model was loaded
    return llm


def warm_up(llm: ChatLoraRetriever) -> None:
    """Embed the pool, which has a bar of its own where it takes long, then load the base model."""
    llm.retriever.refresh()
    with status(f"Loading {llm.model_name}"):
        llm.warm_up()


def encoder_source(encoder: str | None) -> str:
    """Return the encoder that an option names, or the default one's name."""
    from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER  # noqa: PLC0415 - loads numpy

    return encoder or DEFAULT_ENCODER


def sees_words(encoder: str | None, words: bool | None) -> bool:
    """Whether the encoder that options name sees words beside meaning: the default one does, others if they say so."""
    return encoder is None if words is None else words


def make_encoder(encoder: str | None, *, words: bool | None = None) -> str | Encoder:
    """Return the encoder that options name, or the default one; `words` as in `sees_words`."""
    from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder  # noqa: PLC0415 - seconds to import

    source = encoder_source(encoder)
    return HybridEncoder(source) if sees_words(encoder, words) else source
