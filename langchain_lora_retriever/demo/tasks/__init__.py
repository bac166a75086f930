"""Seeded generators of the tasks the demo pool is trained and tested on.

Pure Python and deterministic: the same task, split, number and seed give the same examples on every machine. Train and
test share no entity (no name, date, number, table or tool).
"""

from __future__ import annotations

import hashlib
from random import Random

from langchain_lora_retriever.demo.tasks import dates, extraction, intents, numbers, sql, tools, units
from langchain_lora_retriever.demo.tasks.base import Example, Split, Task

__all__ = ["TASKS", "Example", "Split", "Task", "make_examples"]

TASKS: dict[str, Task] = {
    task.name: task for module in (dates, numbers, extraction, sql, units, intents, tools) for task in module.TASKS
}


def make_examples(task: str, split: Split = "train", num: int = 20, seed: int = 0) -> list[Example]:
    """Generate examples of one task, no two with the same conversation.

    Args:
        task: A name in `TASKS`.
        split: "train" or "test"; they share no entity.
        num: How many examples.
        seed: Another seed gives other examples of the same split.

    Raises:
        ValueError: If the task is unknown or cannot give that many different examples.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}; the tasks are: {', '.join(sorted(TASKS))}.")
    digest = hashlib.sha256(f"{task}/{split}/{seed}".encode()).digest()
    rng = Random(int.from_bytes(digest[:8], "big"))  # noqa: S311 - reproducible data, no secret
    seen: set[str] = set()
    examples: list[Example] = []
    for _ in range(200 * num):
        if len(examples) == num:
            break
        example = TASKS[task].generate(rng, split)
        key = repr((example.input, example.messages))
        if key not in seen:
            seen.add(key)
            examples.append(example)
    if len(examples) < num:
        raise ValueError(f"Task {task!r} has only {len(examples)} different {split} examples; {num} were asked for.")
    return examples
