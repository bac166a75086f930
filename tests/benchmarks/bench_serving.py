"""What HTTP costs: streams over it and in process, time to first token, and what one process can carry.

    python tests/benchmarks/bench_serving.py [--only stub demo first_token] [--streams 16] [--json f.jsonl]

`stub` serves an engine without a model that gives 64 streams a token each, 10,000 a second in all: the rate that
arrives is what one HTTP process carries. `demo` streams the same prompts through the server and from the engine, in
turns, on the demo's model. `first_token` is one short request at a time, with nothing else to do. The server is a
process of its own in `stub`, as is its client. Warmed up; texts are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch
import transformers
import uvicorn

from langchain_lora_retriever import ChatLoraRetriever
from langchain_lora_retriever.demo import demo_chat_model, demo_test_set
from langchain_lora_retriever.engine.api import Delta, Usage
from langchain_lora_retriever.engine.generation import Generation, deliver
from langchain_lora_retriever.serving.app import create_app
from langchain_lora_retriever.testing import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STREAMS, RATE, TOKENS = 64, 10_000, 400


class SteadyEngine(FakeEngine):
    """Gives every running request one token per step, `RATE` tokens a second in all while `STREAMS` run."""

    def __init__(self) -> None:
        super().__init__(max_model_len=1 << 20)
        self._left: dict[Generation, int] = {}
        threading.Thread(target=self._tick, daemon=True).start()

    def submit(self, prompt_token_ids: Any, sampling: Any, adapters: Any = (), *, grammar: Any = None) -> Generation:
        """Join the steps."""
        generation = Generation(on_abort=lambda: None)
        self._left[generation] = TOKENS
        return generation

    def _tick(self) -> None:
        due = time.perf_counter()
        while True:
            due = max(due + STREAMS / RATE, time.perf_counter() - 0.1)
            time.sleep(max(0.0, due - time.perf_counter()))
            news = []
            for generation in list(self._left):
                self._left[generation] -= 1
                is_last = not self._left[generation]
                news.append(
                    (
                        generation,
                        Delta("word ", (5,), None, *(("stop", Usage(9, 0, TOKENS)) if is_last else (None, None))),
                    )
                )
                if is_last or generation.is_done:
                    del self._left[generation]
            deliver(news)


@contextmanager
def running(llm: ChatLoraRetriever) -> Iterator[str]:
    """A server in a thread of this process; its address."""
    server = uvicorn.Server(uvicorn.Config(create_app(llm), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


async def stream_all(address: str, bodies: list[dict[str, Any]]) -> tuple[list[str], float]:
    """Stream all at once; their texts, and seconds from the first request to the last event."""

    async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        parts = []
        async with client.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    parts.append(choices[0]["delta"].get("content") or "" if choices else "")
        return "".join(parts)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:
        start = time.perf_counter()
        texts = await asyncio.gather(*(stream(client, body) for body in bodies))
        return texts, time.perf_counter() - start


def stub(_: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second that arrive of 10,000 that are made."""
    code = "import bench_serving; bench_serving.serve_stub()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        address = process.stdout.readline().strip()
        bodies = [{"messages": [{"role": "user", "content": "go"}], "model": "auto"}] * STREAMS
        asyncio.run(stream_all(address, bodies))
        rates = []
        for _ in range(3):
            texts, seconds = asyncio.run(stream_all(address, bodies))
            assert texts == ["word " * TOKENS] * STREAMS
            rates.append(STREAMS * TOKENS / seconds)
    finally:
        process.kill()
    return {"made tok/s": RATE, "arrived tok/s": round(statistics.median(rates)), "least": round(min(rates))}


def serve_stub() -> None:
    """Serve the steady engine, and say where."""
    with running(ChatLoraRetriever(engine=SteadyEngine())) as address:
        print(address, flush=True)
        time.sleep(600)


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second through HTTP streams over those of the engine alone."""
    llm = demo_chat_model(max_tokens=48, engine_config={"enable_prefix_caching": False})
    rows = [row["input"] for row in demo_test_set(25) if len(row["messages"]) == 1]
    prompts = rows[:: len(rows) // options.streams][: options.streams]

    async def in_process() -> tuple[list[str], float, int]:
        async def stream(prompt: str) -> tuple[str, int]:
            chunks = [chunk async for chunk in llm.astream(prompt)]
            return "".join(str(chunk.content) for chunk in chunks), chunks[-1].usage_metadata["output_tokens"]

        start = time.perf_counter()
        answers = await asyncio.gather(*map(stream, prompts))
        return [text for text, _ in answers], time.perf_counter() - start, sum(num for _, num in answers)

    bodies = [{"messages": [{"role": "user", "content": prompt}], "model": "auto"} for prompt in prompts]
    ratios, rates = [], []
    with running(llm) as address:
        for round_ in range(options.rounds + 1):
            direct, seconds, num_tokens = asyncio.run(in_process())
            texts, over_http = asyncio.run(stream_all(address, bodies))
            assert texts == direct
            if round_:
                ratios.append(seconds / over_http)
                rates.append(num_tokens / over_http)
    return {
        "streams": len(prompts), "tok/s over HTTP": round(statistics.median(rates), 1),
        "over in-process streams": round(statistics.median(ratios), 3), "least": round(min(ratios), 3),
    }  # fmt: skip


def first_token(_: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds that HTTP adds to a request of one token, an engine without a model, idle."""
    llm = ChatLoraRetriever(engine=FakeEngine(["x"]))
    body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 1}

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)

    with running(llm) as address, httpx.Client(base_url=address) as client:
        pairs = [
            (timed(lambda: next(iter(llm.stream("go")))), timed(lambda: client.post("/v1/chat/completions", json=body)))
            for _ in range(200)
        ][50:]
    direct, over_http = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "in process ms": round(direct, 2),
        "over HTTP ms": round(over_http, 2),
        "added ms": round(over_http - direct, 2),
    }


SECTIONS = {"stub": stub, "demo": demo, "first_token": first_token}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    for name in options.only:
        row = {"section": name, **SECTIONS[name](options)}
        print(row, flush=True)
        if options.json:
            with options.json.open("a") as stream:
                stream.write(json.dumps({**row, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
