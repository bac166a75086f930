"""A few hundred prompts of all kinds, each with adapters of its own, in one running batch.

    python examples/mixed_batch.py --prompts 200

Prints progress, and the throughput next to that of the same prompts asked one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter

from tqdm import tqdm

from langchain_lora_retriever.demo import demo_chat_model, demo_test_set


async def main() -> None:
    """Answer all prompts together, then some of them one by one, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--one-by-one", type=int, default=20, help="how many to ask one by one for comparison")
    args = parser.parse_args()

    rows = [row for row in demo_test_set(25) if len(row["messages"]) == 1]
    step = max(1, len(rows) // args.prompts)
    rows = rows[::step][: args.prompts]
    prompts = [row["input"] for row in rows]
    llm = demo_chat_model(max_tokens=48)
    llm.invoke("Hello", max_tokens=1)  # load the weights before the clock starts

    start, num_tokens, num_right, adapters = time.perf_counter(), 0, 0, Counter[str]()
    with tqdm(total=len(prompts), unit="prompt") as bar:
        async for index, message in llm.abatch_as_completed(prompts):
            num_tokens += message.usage_metadata["output_tokens"]
            num_right += message.text.strip() == rows[index]["output"].strip()
            adapters.update(adapter["name"] for adapter in message.response_metadata["adapters"][:1])
            bar.update()
    together = num_tokens / (time.perf_counter() - start)

    start = time.perf_counter()
    solo = [await llm.ainvoke(prompt) for prompt in prompts[:: max(1, len(prompts) // args.one_by_one)]]
    one_by_one = sum(message.usage_metadata["output_tokens"] for message in solo) / (time.perf_counter() - start)

    print(f"{len(prompts)} prompts, {len(adapters)} different best adapters, {num_right / len(prompts):.0%} exact")
    print(f"together    {together:6.0f} tokens/s")
    print(f"one by one  {one_by_one:6.0f} tokens/s ({together / one_by_one:.1f} times slower)")


if __name__ == "__main__":
    asyncio.run(main())
