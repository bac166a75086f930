"""What the LangChain layer costs: tokens per second through `abatch` over those of the engine alone.

    python tests/benchmarks/bench_chat_overhead.py [--prompts 32] [--rounds 5] [--json results.jsonl]

The demo's model and pool, on a CPU or a GPU, whichever there is. The engine gets the same prompts, as token ids, with
the same adapters and sampling, all at once, as `abatch` gives them. One row routes every prompt anew (their embeddings
are forgotten before each round), one finds the embeddings kept. Warmed up; contenders take turns, so that a machine
that slows down slows all of them. Nothing is timed before all give the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import langchain_core
import torch
import transformers

from langchain_lora_retriever.demo import demo_chat_model, demo_test_set

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever import ChatLoraRetriever
    from langchain_lora_retriever.engine import EngineClient, Generation

NUM_OUT = 48
Answers = list[tuple[str, int]]  # text and number of tokens


class Recorder:
    """An engine that notes what it is asked."""

    def __init__(self, engine: EngineClient) -> None:
        self.tokenizer, self.info, self.is_alive = engine.tokenizer, engine.info, True
        self.register, self.stats, self.close = engine.register, engine.stats, engine.close
        self._engine = engine
        self.requests: list[tuple[Any, ...]] = []

    def submit(self, *request: Any, grammar: None = None) -> Generation:
        """Note a request, and hand it on."""
        self.requests.append(request)
        return self._engine.submit(*request, grammar=grammar)


def engine_contender(llm: ChatLoraRetriever, prompts: list[str]) -> Callable[[], Answers]:
    """Note the requests that the chat model makes of the prompts; return what sends them to the engine and waits."""
    recorder = Recorder(llm.runtime.ready())
    recorded = demo_chat_model(
        engine=recorder, model_name=llm.model_name, temperature=llm.temperature, max_tokens=llm.max_tokens
    )
    for prompt in prompts:
        recorded.invoke(prompt, max_tokens=1)

    def run() -> Answers:
        engine = llm.runtime.engine
        generations = [
            engine.submit(ids, replace(sampling, max_tokens=llm.max_tokens), adapters)
            for ids, sampling, adapters in recorder.requests
        ]
        completions = [generation.result() for generation in generations]
        return [(completion.text, completion.usage.num_output_tokens) for completion in completions]

    return run


def chat_contender(llm: ChatLoraRetriever, prompts: list[str], *, is_routed_anew: bool) -> Callable[[], Answers]:
    """Return what asks the chat model, forgetting the prompts' embeddings first where they are to be made anew."""
    retriever = llm.retriever

    def run() -> Answers:
        if is_routed_anew:
            retriever.forget_texts()
        messages = asyncio.run(llm.abatch(prompts))
        return [(str(message.text), message.usage_metadata["output_tokens"]) for message in messages]

    return run


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    rows = [row["input"] for row in demo_test_set(25) if len(row["messages"]) == 1]
    prompts = rows[:: max(1, len(rows) // arguments.prompts)][: arguments.prompts]
    llm = demo_chat_model(max_tokens=NUM_OUT, engine_config={"enable_prefix_caching": False})
    contenders = {
        "engine": engine_contender(llm, prompts),
        "abatch, routed anew": chat_contender(llm, prompts, is_routed_anew=True),
        "abatch, embeddings kept": chat_contender(llm, prompts, is_routed_anew=False),
    }
    answers = [run() for run in contenders.values()]
    if any(other != answers[0] for other in answers):
        raise SystemExit("The chat model's answers are not the engine's: nothing is timed.")
    num_tokens = sum(num for _, num in answers[0])
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            rates[name].append(num_tokens / (time.perf_counter() - start))

    where: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available()
        else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "prompts": len(prompts), "tokens": num_tokens, "torch": torch.__version__,
        "transformers": transformers.__version__, "langchain-core": langchain_core.__version__,
    }  # fmt: skip
    print(f"{where}\n{'':26}{'tok/s':>8}{'min':>8}{'max':>8}{'/ engine':>10}{'min':>7}{'max':>7}")
    for name, values in rates.items():
        # Round by round: what slows one contender of a round slows its neighbours too.
        shares = [value / engine for value, engine in zip(values, rates["engine"], strict=True)]
        row = {
            "name": name, "tokens_per_second": statistics.median(values), "min": min(values), "max": max(values),
            "over_engine": statistics.median(shares), "over_engine_min": min(shares), "over_engine_max": max(shares),
            **where,
        }  # fmt: skip
        print(
            f"{name:26}{row['tokens_per_second']:8.1f}{row['min']:8.1f}{row['max']:8.1f}"
            f"{row['over_engine']:10.3f}{row['over_engine_min']:7.3f}{row['over_engine_max']:7.3f}"
        )
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
