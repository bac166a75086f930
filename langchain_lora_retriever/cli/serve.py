"""`lora-retriever serve`: an OpenAI-compatible server."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_lora_retriever.cli import interrupts
from langchain_lora_retriever.cli.options import BaseModelOption, EncoderOption, PoolOption, make_chat_model, warm_up
from langchain_lora_retriever.cli.terminal import hint, status
from langchain_lora_retriever.errors import MissingDependencyError

if TYPE_CHECKING:
    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.serving.config import ServeConfig

__all__ = ["serve"]


def serve(
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", metavar="ADDRESS", help="Address to listen on; 127.0.0.1 by default.", show_default=False
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="PORT", help="8000 by default; 0 takes a free one.", show_default=False),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="File of keys that may ask, one per line.", show_default=False
        ),
    ] = None,
    engine_process: Annotated[
        bool | None,
        typer.Option(
            "--engine-process", help="Run the engine in a process of its own: for many streams.", show_default=False
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option("--replicas", min=1, help="Run so many engines behind Ray Serve.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML file of these settings and more.", show_default=False),
    ] = None,
) -> None:
    """Serve the model and its pool to OpenAI clients."""
    try:
        from langchain_lora_retriever.serving.config import MAX_WAITING, read_config  # noqa: PLC0415 - seconds to import
        from langchain_lora_retriever.serving.run import check  # noqa: PLC0415 - the same
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
        engine_process=engine_process,
        replicas=replicas,
    )
    if settings.replicas is not None:
        _serve_cluster(settings)
        return
    check(settings)
    with ExitStack() as until_the_end:
        if settings.engine_process:
            llm = _make_apart(settings, until_the_end)
        else:
            limits = settings.chat.setdefault("engine_config", {})
            if isinstance(limits, dict):
                limits.setdefault("max_waiting", MAX_WAITING)
            with status("Reading the pool"):
                llm = make_chat_model(settings.base_model, settings.pool, settings.encoder, **settings.chat)
        warm_up(llm)

        def on_ready(address: str) -> None:
            hint(f"{llm.model_name} with {len(llm.pool)} adapters is served at {address}/v1")

        with interrupts.raising():  # the server has an orderly end of its own
            run(llm, settings, on_ready=on_ready)


def _make_apart(settings: ServeConfig, until_the_end: ExitStack) -> ChatLoraRetriever:
    """A chat model over an engine in a process of its own, which ends with the server."""
    from langchain_lora_retriever.serving.engines import EngineElsewhere  # noqa: PLC0415 - seconds to import

    elsewhere = EngineElsewhere.of(settings)
    with status("Reading the pool"):
        llm = make_chat_model(settings.base_model, settings.pool, settings.encoder, **settings.chat)
    llm.retriever.refresh()  # what is wrong with the settings, the pool or the encoder is told before the engine starts
    with status("Starting the engine's process"):
        engine = until_the_end.enter_context(closing(elsewhere.start_process()))
    loaded_there: dict[str, Any] = {"base_model": None, "model_kwargs": {}, "engine_config": {}}
    return llm.model_copy(update={**loaded_there, "engine": engine, "model_name": llm.model_name})


def _serve_cluster(settings: ServeConfig) -> None:
    try:
        from langchain_lora_retriever.serving.cluster import serve_cluster  # noqa: PLC0415 - seconds to import
    except ImportError as error:
        raise MissingDependencyError(
            f"Replicas need packages that are not installed ({error.name}): "
            'pip install "langchain-lora-retriever[serve,ray]"'
        ) from error
    with ExitStack() as waiting, interrupts.raising():
        waiting.enter_context(status(f"Starting {settings.replicas} engines"))

        def on_ready(address: str) -> None:
            waiting.close()
            hint(f"{settings.replicas} engines are served at {address}/v1")

        serve_cluster(settings, on_ready=on_ready)
