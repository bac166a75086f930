"""`lora-retriever serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from langchain_lora_retriever.cli.options import BaseModelOption, EncoderOption, PoolOption, make_chat_model
from langchain_lora_retriever.errors import MissingDependencyError

if TYPE_CHECKING:
    from langchain_lora_retriever.serving.config import ServeConfig

__all__ = ["serve"]


def serve(
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 by default.", show_default=False)
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port, 8000 by default; 0 takes a free one.", show_default=False)
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File of keys that may ask, one per line.", show_default=False)
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option("--replicas", min=1, help="Run so many engines behind Ray Serve.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of these settings and more.", show_default=False)
    ] = None,
) -> None:
    """Serve the model and its pool to OpenAI clients."""
    try:
        from langchain_lora_retriever.serving.config import MAX_WAITING, read_config  # noqa: PLC0415 - seconds to import
        from langchain_lora_retriever.serving.run import serve as run  # noqa: PLC0415 - the same
    except ImportError as error:
        raise MissingDependencyError(
            f"The server needs packages that are not installed ({error.name}): "
            'pip install "langchain-lora-retriever[serve]"'
        ) from error
    settings = read_config(
        config,
        base_model=base_model,
        pool=pool,
        encoder=encoder,
        host=host,
        port=port,
        api_key_file=api_key_file,
        replicas=replicas,
    )
    console = Console(stderr=True)
    if settings.replicas is not None:
        _serve_cluster(settings, console)
        return
    limits = settings.chat.setdefault("engine_config", {})
    if isinstance(limits, dict):
        limits.setdefault("max_waiting", MAX_WAITING)
    with console.status("Reading the pool"):
        llm = make_chat_model(settings.base_model, settings.pool, settings.encoder, **settings.chat)
    status = console.status(f"Loading {llm.model_name}")

    def on_ready(address: str) -> None:
        status.stop()
        console.print(f"{llm.model_name} with {len(llm.pool)} adapters is served at {address}/v1", soft_wrap=True)

    status.start()
    try:
        run(llm, settings, on_ready=on_ready)
    finally:
        status.stop()


def _serve_cluster(settings: ServeConfig, console: Console) -> None:
    try:
        from langchain_lora_retriever.serving.cluster import serve_cluster  # noqa: PLC0415 - seconds to import
    except ImportError as error:
        raise MissingDependencyError(
            f"Replicas need packages that are not installed ({error.name}): "
            'pip install "langchain-lora-retriever[serve,ray]"'
        ) from error
    status = console.status(f"Starting {settings.replicas} engines")

    def on_ready(address: str) -> None:
        status.stop()
        console.print(f"{settings.replicas} engines are served at {address}/v1", soft_wrap=True)

    status.start()
    try:
        serve_cluster(settings, on_ready=on_ready)
    finally:
        status.stop()
