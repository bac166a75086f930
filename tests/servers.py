"""A server in this process, for tests that talk to it over HTTP."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from langchain_lora_retriever.serving.app import create_app
from makers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_lora_retriever import ChatLoraRetriever
    from langchain_lora_retriever.serving.config import ServeConfig


@contextmanager
def running(
    llm: ChatLoraRetriever, config: ServeConfig | None = None, *, start_seconds: float = 30, end_seconds: float = 30
) -> Iterator[str]:
    """A server on a free port of this machine; its address. It must start and end within so many seconds."""
    server = uvicorn.Server(uvicorn.Config(create_app(llm, config), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, start_seconds)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(end_seconds)
        assert not thread.is_alive()
