"""How often compositions repeat, and what the prefix and fusion caches gain by it: rounded shares beside exact ones.

    python tests/benchmarks/bench_repetition.py [--prompts 96] [--system-prompts 4] [--json results.jsonl]

The demo's model and pool. Every prompt is one of the demo's test rows under one of a few long system prompts, in random
order, in waves of eight, routed as the chat model does by default. Exact shares are softmax(score / temperature) as it
is. Counted are prompt tokens found in the prefix cache, and, with `composition="fusion"`, fusions found in the fusion
cache. "mixed tenants" draws the task of each prompt anew; "one task" asks for the same kind of thing every time.
Seeded. Nothing is counted before answers with the prefix cache equal those without it, and before both ways of sharing
prefer the same adapters.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.messages import HumanMessage, SystemMessage

from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.demo import demo_chat_model, demo_test_set
from langchain_lora_retriever.registry import close_engines
from langchain_lora_retriever.retrieval import composer
from langchain_lora_retriever.retrieval.fusion import fuse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_core.messages import BaseMessage

    from langchain_lora_retriever import ChatLoraRetriever
    from langchain_lora_retriever.types import Composition

WAVE = 8
RULES = [
    f"Rule {number}: {rule}"
    for number, rule in enumerate(
        [
            "answer in as few words as the question allows, without an introduction and without a closing remark.",
            "if the question names a unit, a date or a table, keep to its spelling and do not translate it.",
            "never invent names, numbers or sources; if something is not given, leave it out.",
            "do not repeat the question, and do not say that you are a language model.",
            "write plain text without headings, lists or emphasis unless the question asks for a format.",
        ],
        start=1,
    )
]  # fmt: skip
Prompts = list[list["BaseMessage"]]
rounded = composer._rounded


def workload(generator: random.Random, num_prompts: int, num_systems: int, *, is_one_task: bool) -> Prompts:
    """Return conversations of a system prompt and a test row each, in random order."""
    rows = [row for row in demo_test_set(num_prompts, seed=1) if len(row["messages"]) == 1]
    if is_one_task:
        task = generator.choice(sorted({row["task"] for row in rows}))
        rows = [row for row in rows if row["task"] == task]
    systems = [f"You are the assistant of department {i}. {' '.join(RULES)}" for i in range(num_systems)]
    chosen = generator.sample(rows, min(num_prompts, len(rows)))
    return [[SystemMessage(generator.choice(systems)), HumanMessage(row["input"])] for row in chosen]


def waves(prompts: Prompts) -> Iterator[Prompts]:
    """Yield the prompts a few at a time."""
    for start in range(0, len(prompts), WAVE):
        yield prompts[start : start + WAVE]


def ask(prompts: Prompts, *, is_cached: bool) -> tuple[list[str], float]:
    """Return the first tokens of all answers, and the share of the prompt tokens that were cached."""
    config = {"enable_prefix_caching": is_cached, "kv_cache_bytes": 2 << 30}
    llm = demo_chat_model(max_tokens=2, engine_config=config)

    async def run() -> list[str]:
        return [str(message.text) for wave in waves(prompts) for message in await llm.abatch(wave)]

    answers = asyncio.run(run())
    stats = llm.runtime.ready().stats()
    close_engines()
    return answers, stats.num_cached_tokens / stats.num_prompt_tokens


def compositions(llm: ChatLoraRetriever, prompts: Prompts) -> list[Composition]:
    """Return what each prompt runs."""
    return [llm.route(prompt) for prompt in prompts]


def fusion_hits(llm: ChatLoraRetriever, found: Sequence[Composition]) -> float:
    """Return the share of the compositions of two adapters or more whose fusion was there already."""
    seen, hits, total = set(), 0, 0
    for composition in found:
        if len(composition.adapters) < 2:
            continue
        fused = fuse([(llm.pool[member.name], member.weight) for member in composition.adapters])
        hits, total = hits + (fused in seen), total + 1
        seen.add(fused)
    return hits / total if total else 1.0


def main() -> None:
    """Check, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--system-prompts", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    print(f"{'workload':16}{'shares':>10}{'compositions':>14}{'members':>9}{'prefix hits':>13}{'fusion hits':>13}")
    for name, is_one_task in (("mixed tenants", False), ("one task", True)):
        prompts = workload(
            random.Random(0), arguments.prompts, arguments.system_prompts, is_one_task=is_one_task
        )  # fmt: skip
        llm, preferred = demo_chat_model(), []
        for shares in ("exact", "rounded"):
            composer._rounded = (lambda exact: exact) if shares == "exact" else rounded
            found = compositions(llm, prompts)
            preferred.append([composition.names[0] for composition in found])
            if preferred[-1] != preferred[0]:
                raise SystemExit("Rounded shares prefer other adapters than exact ones: nothing is counted.")
            answers, prefix_hits = ask(prompts, is_cached=True)
            num_checked = min(len(prompts), 4 * WAVE)
            if answers[:num_checked] != ask(prompts[:num_checked], is_cached=False)[0]:
                raise SystemExit("Answers with the prefix cache are not those without it: nothing is counted.")
            row: dict[str, Any] = {
                "workload": name, "shares": shares, "prompts": len(prompts), "system_prompts": arguments.system_prompts,
                "num_compositions": len({tuple((a.name, a.weight) for a in c.adapters) for c in found}),
                "mean_members": sum(len(c.adapters) for c in found) / len(found),
                "prefix_hits": prefix_hits, "fusion_hits": fusion_hits(llm, found),
                "weight_temperature": CallOptions.weight_temperature,
            }  # fmt: skip
            print(
                f"{name:16}{shares:>10}{row['num_compositions']:14}{row['mean_members']:9.2f}"
                f"{row['prefix_hits']:13.1%}{row['fusion_hits']:13.1%}", flush=True,
            )  # fmt: skip
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
