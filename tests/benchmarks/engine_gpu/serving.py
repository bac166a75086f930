"""Streams through the HTTP server, and `abatch`, over any engine; the client is a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_gpu.bench import Bench
from engine_gpu.chat import random_encoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_lora_retriever import ChatLoraRetriever
    from langchain_lora_retriever.engine.api import EngineClient
    from langchain_lora_retriever.types import Adapter

_CLIENT = "from engine_gpu.http_client import main; main()"


@contextmanager
def chat_model(engine: EngineClient, adapters: Sequence[Adapter], max_tokens: int) -> Iterator[ChatLoraRetriever]:
    """A chat model over an engine, mixtures of three, an encoder of MiniLM's shape with random weights."""
    from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, LoraRetriever
    from langchain_lora_retriever.pool.pool import PoolEntry

    with tempfile.TemporaryDirectory() as folder:
        encoder = random_encoder(Bench(None, is_tiny=engine.info.max_model_len < 1024), Path(folder))
    vectors = encoder.encode([f"adapter {i}" for i in range(len(adapters))])
    pool = AdapterPool()
    pool._replace_state({a.name: PoolEntry(a, embedding=v) for a, v in zip(adapters, vectors, strict=True)}, {})
    yield ChatLoraRetriever(
        engine=engine, retriever=LoraRetriever(pool, encoder), composition="mixture", top_k=3, weights="uniform",
        max_tokens=max_tokens,
    )  # fmt: skip


def http_rates(llm: ChatLoraRetriever, rounds: Sequence[Sequence[Any]], num_out: int) -> list[float]:
    """Tokens a second of streams through a server around a chat model, all of a round at once; of each round.

    Args:
        llm: Served by a thread of this process.
        rounds: Rows of each round; the first warms up.
        num_out: Tokens of each answer.
    """
    import uvicorn

    from langchain_lora_retriever.serving.app import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(llm), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    client = subprocess.Popen([sys.executable, "-c", _CLIENT, str(port)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert client.stdin is not None
    assert client.stdout is not None
    rates = []
    try:
        for rows in rounds:
            bodies = [
                {
                    "messages": [{"role": "user", "content": " ".join(f"t{token}" for token in row.prompt)}],
                    "stream": True, "stream_options": {"include_usage": True}, "max_tokens": num_out,
                    "lora_retriever": {"adapters": [a.name for a, _ in row.adapters], "composition": "mixture"},
                }
                for row in rows
            ]  # fmt: skip
            client.stdin.write(json.dumps(bodies) + "\n")
            client.stdin.flush()
            told = json.loads(client.stdout.readline())
            assert told["tokens"] == [num_out] * len(rows), told
            rates.append(len(rows) * num_out / told["seconds"])
    finally:
        client.kill()
        client.wait()
        server.should_exit = True
        thread.join()
    return rates[1:]


async def abatch_seconds(llm: ChatLoraRetriever, rows: Sequence[Any]) -> tuple[float, list[str]]:
    """Seconds of `abatch` within an event loop, routing included, and the texts."""
    texts = [" ".join(f"t{token}" for token in row.prompt) for row in rows]
    start = time.perf_counter()
    messages = await llm.abatch(texts)
    return time.perf_counter() - start, [str(message.content) for message in messages]
