"""How long an event loop is held up: the longest gap of a 5 ms ticker while the chat model works.

    python tests/benchmarks/bench_event_loop.py [--only SCENARIO ...] [--adapters 2000] [--json results.jsonl]

Each scenario runs in a process of its own, so that what happens once per process happens in it: a model load, the first
constrained call, the first call over a large pool, a pool that changes under load, fifty fusions. Every answer is
checked to be there before its gap counts. `idle` is what the machine itself does to a ticker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.demo import demo_chat_model, demo_pool, demo_test_set

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from langchain_lora_retriever import ChatLoraRetriever

TICK = 0.005  # seconds
NUM_LAYERS, WIDTH = 30, 576  # of the demo's base model
ADAPTER_CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"],
    "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
}  # fmt: skip


def prompts(num: int) -> list[str]:
    """Held-out prompts of the demo's tasks."""
    rows = [row["input"] for row in demo_test_set(25) if len(row["messages"]) == 1]
    return rows[:: len(rows) // num][:num]


def write_adapters(root: Path, num: int) -> None:
    """Write a pool of small adapters, each with one sample of its own."""
    generator = torch.Generator().manual_seed(0)
    for index in range(num):
        folder = root / f"adapter-{index:05}"
        folder.mkdir(parents=True)
        tensors = {
            f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(
                (1, WIDTH) if side == "A" else (WIDTH, 1), generator=generator
            ).mul_(0.01)
            for layer in range(NUM_LAYERS)
            for side in "AB"
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
        (folder / "samples.jsonl").write_text(json.dumps({"input": f"question {index} of topic {index % 97}"}) + "\n")


async def idle(_: int) -> Callable[[], Awaitable[Any]]:
    """Nothing at all."""

    async def run() -> None:
        await asyncio.sleep(2)

    return run


async def load(_: int) -> Callable[[], Awaitable[Any]]:
    """The first call of a process: imports done, the model and the encoder still to be loaded."""
    llm, (prompt,) = demo_chat_model(max_tokens=4), prompts(1)
    return lambda: llm.ainvoke(prompt)


async def fusion(_: int) -> Callable[[], Awaitable[Any]]:
    """Fifty fusions, none of them averaged before."""
    llm = await warm(demo_chat_model(max_tokens=8, composition="fusion"))
    texts = prompts(50)
    return lambda: asyncio.gather(*map(llm.ainvoke, texts))


async def constrained(_: int) -> Callable[[], Awaitable[Any]]:
    """The first constrained call, which reads the tokenizer's vocabulary."""
    llm = await warm(demo_chat_model(max_tokens=32))
    schema = {"type": "object", "properties": {f"field_{i}": {"type": "integer"} for i in range(40)}}
    return lambda: llm.ainvoke("Fill in the form.", response_format=schema)


async def large_pool(num_adapters: int) -> Callable[[], Awaitable[Any]]:
    """The first call over a large pool, whose samples were embedded before."""
    root = Path(tempfile.mkdtemp())
    write_adapters(root / "pool", num_adapters)
    await warm(demo_chat_model(max_tokens=4))

    async def run() -> Any:
        llm = await asyncio.to_thread(lambda: demo_chat_model(max_tokens=4, pool=AdapterPool(root / "pool")))
        return await llm.ainvoke("question 7 of topic 7")

    return run


async def change(_: int) -> Callable[[], Awaitable[Any]]:
    """Adapters replaced while fifty calls run."""
    pool = demo_pool()
    llm = await warm(demo_chat_model(max_tokens=8, pool=pool))
    texts = prompts(50)
    source = next(pool[name].path for name in pool.names if pool[name].path is not None)

    async def replace() -> None:
        for index in range(10):
            await asyncio.to_thread(lambda index=index: pool.add(f"new-{index}", source, samples=[f"sample {index}"]))

    async def run() -> Any:
        answers, _ = await asyncio.gather(asyncio.gather(*map(llm.ainvoke, texts)), replace())
        return answers

    return run


SCENARIOS = (idle, load, fusion, constrained, large_pool, change)


async def warm(llm: ChatLoraRetriever) -> ChatLoraRetriever:
    """Load what a call needs."""
    await llm.ainvoke("Hello!")
    return llm


async def longest_gap(run: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Longest gap of the ticker while `run` runs, and how long that took; seconds."""
    gaps: list[float] = []

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(20 * TICK)
    gaps.clear()
    start = time.perf_counter()
    answers = await run()
    seconds = time.perf_counter() - start
    await asyncio.sleep(2 * TICK)
    ticker.cancel()
    assert all(
        answer.text is not None for answer in (answers if isinstance(answers, list) else [answers] if answers else [])
    )
    return max(gaps), seconds


async def measure(name: str, num_adapters: int) -> dict[str, Any]:
    """One scenario, in this process."""
    scenario = next(scenario for scenario in SCENARIOS if scenario.__name__ == name)
    gap, seconds = await longest_gap(await scenario(num_adapters))
    return {"scenario": name, "longest_gap_ms": round(1000 * gap, 1), "seconds": round(seconds, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the scenarios, print the table."""
    names = [scenario.__name__ for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", choices=names, help="run one scenario in this process and print its row as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        warnings.simplefilter("ignore")
        print(json.dumps(asyncio.run(measure(options.here, options.adapters))))
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    print("| scenario | longest gap, ms | took, s |\n| --- | --- | --- |")
    for name in options.only:
        command = [sys.executable, __file__, "--here", name, "--adapters", str(options.adapters)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed | |\n{done.stderr[-2000:]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"| {row['scenario']} | {row['longest_gap_ms']} | {row['seconds']} |", flush=True)
        if options.json:
            with options.json.open("a") as stream:
                stream.write(json.dumps({**row, "torch": torch.__version__}) + "\n")


if __name__ == "__main__":
    main()
