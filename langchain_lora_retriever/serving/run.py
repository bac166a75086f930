"""Run a server: load what it serves, say when it is ready, let open requests end when it is told to stop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.serving.app import create_app
from langchain_lora_retriever.serving.config import address_of, read_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.serving.config import ServeConfig

__all__ = ["check", "serve"]


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[str], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(address_of(host, port))


def check(config: ServeConfig) -> None:
    """Look at what this machine must have for a server before anything is loaded: the key files, and a free address.

    Raises:
        InvalidRequestError: If a key file cannot be read, or the address cannot be listened on.
    """
    for path in (config.api_key_file, config.admin_key_file):
        read_keys(path)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        raise InvalidRequestError(
            f"{address_of(config.host, config.port)} cannot be listened on: {error.strerror or error}. Pass another "
            "port (0 takes a free one) or host, or end what listens there."
        ) from error


def serve(llm: ChatLoraRetriever, config: ServeConfig, *, on_ready: Callable[[str], object]) -> None:
    """Serve a chat model until the process is interrupted or terminated.

    Open requests have `config.drain_seconds` to end then; new ones are not taken.

    Args:
        llm: The chat model.
        config: Where to listen, and limits.
        on_ready: Called with the server's address once it listens and the model is loaded.

    Raises:
        InvalidRequestError: If a key file cannot be read.
        LoraRetrieverError: If the model or the pool cannot be served.
        SystemExit: If the address cannot be listened on.
    """
    llm.runtime.ready()  # what goes wrong over that is told before anything listens
    settings = uvicorn.Config(
        create_app(llm, config),
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=config.drain_seconds,
        server_header=False,
    )
    with suppress(KeyboardInterrupt):  # raised again once open requests have ended: that was the wish
        asyncio.run(_Server(settings, on_ready).serve())
