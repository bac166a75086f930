"""Streams through the HTTP server, and `abatch`, over any engine; the client is a process of its own."""

from __future__ import annotations

import asyncio
import json
import statistics
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

_CLIENT = "import engine_gpu.serving as s; s.client()"


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


def http_rate(llm: ChatLoraRetriever, rounds: Sequence[Sequence[Any]], num_out: int) -> float:
    """Tokens a second of streams through a server around a chat model, all of a round at once; the median.

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
                    "stream": True, "max_tokens": num_out,
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
    return statistics.median(rates[1:])


def client() -> None:
    """Stream what is asked for on a line of the input, all at once, and say how long it took. Little but sockets."""
    port = int(sys.argv[1])

    async def stream(body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        parts = []
        while part := await reader.read(1 << 16):
            parts.append(part)
        writer.close()
        return b"".join(parts)

    async def all_of(bodies: list[bytes]) -> tuple[list[bytes], float]:
        start = time.perf_counter()
        answers = await asyncio.gather(*map(stream, bodies))
        return list(answers), time.perf_counter() - start

    for line in sys.stdin:
        answers, seconds = asyncio.run(all_of([json.dumps(body).encode() for body in json.loads(line)]))
        # Every token of the bench's tokenizer is a word.
        texts = [
            "".join(
                choice["delta"].get("content") or ""
                for event in answer.decode().splitlines()
                if event.startswith("data: {")
                for choice in json.loads(event[6:]).get("choices", ())
            )
            for answer in answers
        ]
        print(json.dumps({"seconds": seconds, "tokens": [len(text.split()) for text in texts]}), flush=True)


async def abatch_seconds(llm: ChatLoraRetriever, rows: Sequence[Any]) -> tuple[float, list[str]]:
    """Seconds of `abatch` within an event loop, routing included, and the texts."""
    texts = [" ".join(f"t{token}" for token in row.prompt) for row in rows]
    start = time.perf_counter()
    messages = await llm.abatch(texts)
    return time.perf_counter() - start, [str(message.content) for message in messages]
