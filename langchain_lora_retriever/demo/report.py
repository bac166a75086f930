"""What `lora-retriever demo` shows: held-out prompts answered in every way there is, together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.demo import DemoRow
    from langchain_lora_retriever.types import Composition

__all__ = ["CONDITIONS", "DemoAnswer", "DemoReport", "run_demo"]

Progress: TypeAlias = Callable[[int, int], None]

METHODS = ("base", "selection", "fusion", "mixture", "oracle")
CONDITIONS = (*METHODS, "masked selection", "masked fusion", "masked mixture")
"""What is compared. Masked: the prompt's own adapter is kept out of retrieval."""


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One prompt and its answers.

    Attributes:
        input: The prompt.
        task: Its task, which is the name of the adapter trained for it.
        cluster: Its task's neighbours.
        truth: The right answer.
        adapters: `{"name", "score", "weight"}` of the adapters that were retrieved, best first.
        answers: Answer by condition.
    """

    input: str
    task: str
    cluster: str
    truth: str
    adapters: list[dict[str, Any]]
    answers: dict[str, str]

    def is_right(self, condition: str) -> bool:
        """Say whether a condition's answer matches exactly."""
        return self.answers[condition].strip() == self.truth.strip()


@dataclass(frozen=True, slots=True)
class DemoReport:
    """The demo's outcome.

    Attributes:
        answers: Every prompt.
        exact_match: Share of exact answers by condition.
        per_task: The same by task.
        top_1: Share of prompts whose own adapter was retrieved first.
        top_3: Share of prompts whose own adapter was among the three retrieved.
        num_generated: Answers generated; equal compositions of a prompt are generated once.
        output_tokens: Tokens generated.
        seconds: Wall-clock time of generating them, retrieval included.
        tokens_per_second: Their quotient.
    """

    answers: list[DemoAnswer]
    exact_match: dict[str, float]
    per_task: dict[str, dict[str, float]]
    top_1: float
    top_3: float
    num_generated: int
    output_tokens: int
    seconds: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


def run_demo(llm: ChatLoraRetriever, rows: Sequence[DemoRow], progress: Progress | None = None) -> DemoReport:
    """Answer rows in every way at once, greedily, and compare.

    Args:
        llm: The demo's chat model; its pool has an adapter of every row's task.
        rows: Held-out rows.
        progress: Called with the answers done and all to do.
    """
    return asyncio.run(_run(llm, rows, progress))


async def _run(llm: ChatLoraRetriever, rows: Sequence[DemoRow], progress: Progress | None) -> DemoReport:
    await llm.ainvoke("Hello", max_tokens=1)  # load the weights before the clock starts
    start = time.perf_counter()
    prompts = [[_to_message(turn) for turn in row["messages"]] for row in rows]
    jobs = [(index, condition) for index in range(len(rows)) for condition in CONDITIONS]
    routes = await asyncio.gather(
        *(llm.aroute(prompts[index], **_settings(condition, rows[index]["task"])) for index, condition in jobs)
    )
    # Many conditions come to the same adapters with the same weights: the oracle and a right selection, say.
    distinct: dict[tuple[int, str], list[int]] = {}
    for number, ((index, _), composition) in enumerate(zip(jobs, routes, strict=True)):
        distinct.setdefault((index, _key(composition)), []).append(number)
    done = 0
    texts, output_tokens = [""] * len(jobs), 0

    async def answer(index: int, numbers: list[int]) -> None:
        nonlocal done, output_tokens
        row = rows[index]
        # An answer longer than the right one is wrong already, so nothing is lost by cutting it off.
        limit = len(llm.get_token_ids(row["output"])) + 8
        settings = _settings(jobs[numbers[0]][1], row["task"])
        message = await llm.ainvoke(prompts[index], max_tokens=limit, temperature=0.0, **settings)
        for number in numbers:
            texts[number] = str(message.text)
        assert message.usage_metadata is not None
        output_tokens += message.usage_metadata["output_tokens"]
        done += 1
        if progress is not None:
            progress(done, len(distinct))

    await asyncio.gather(*(answer(index, numbers) for (index, _), numbers in distinct.items()))
    seconds = time.perf_counter() - start
    answers = []
    for index, row in enumerate(rows):
        first = index * len(CONDITIONS)
        retrieved = routes[first + CONDITIONS.index("mixture")].to_metadata()["adapters"]
        by_condition = dict(zip(CONDITIONS, texts[first : first + len(CONDITIONS)], strict=True))
        answers.append(DemoAnswer(row["input"], row["task"], row["cluster"], row["output"], retrieved, by_condition))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return DemoReport(
        answers=answers,
        exact_match=_exact_match(answers),
        per_task={task: _exact_match([answer for answer in answers if answer.task == task]) for task in tasks},
        top_1=_share([answer.adapters[0]["name"] == answer.task for answer in answers]),
        top_3=_share([answer.task in {adapter["name"] for adapter in answer.adapters} for answer in answers]),
        num_generated=len(distinct),
        output_tokens=output_tokens,
        seconds=seconds,
        tokens_per_second=output_tokens / seconds,
    )


def _settings(condition: str, task: str) -> dict[str, Any]:
    if condition == "base":
        return {"adapters": []}
    if condition == "oracle":
        return {"adapters": [task]}
    mask, _, method = condition.rpartition(" ")
    return {"composition": method, "top_k": 3, "exclude_adapters": [task] if mask else []}


def _key(composition: Composition) -> str:
    members = sorted((adapter.name, round(adapter.weight, 6)) for adapter in composition.adapters)
    return repr((composition.mode == "fusion" and len(members) > 1, members))


def _to_message(turn: dict[str, str]) -> BaseMessage:
    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    kind = kinds.get(turn["role"])
    return kind(turn["content"]) if kind else ChatMessage(content=turn["content"], role=turn["role"])


def _exact_match(answers: Sequence[DemoAnswer]) -> dict[str, float]:
    return {condition: _share([answer.is_right(condition) for answer in answers]) for condition in CONDITIONS}


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
