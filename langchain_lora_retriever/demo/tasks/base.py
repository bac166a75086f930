"""What a demo task is, and how its entities are divided between training and test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

Split = Literal["train", "test"]
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One prompt and its only right answer.

    Attributes:
        input: What the user writes; also the text a retriever routes on.
        output: The expected answer, matched exactly.
        task: The name of the task the example belongs to.
        entities: The names, values and words the prompt was filled with. No entity is in both splits.
        messages: The whole conversation up to the answer, where it is more than one user message.
        tools: The JSON schemas of the tools the conversation may call.
    """

    input: str
    output: str
    task: str
    entities: tuple[str, ...] = ()
    messages: tuple[dict[str, str], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    def prompt_messages(self) -> list[dict[str, str]]:
        """Return the conversation as chat-template messages, the answer not included."""
        return [dict(m) for m in self.messages] or [{"role": "user", "content": self.input}]


@dataclass(frozen=True)
class Task:
    """A task of the demo pool.

    Attributes:
        name: The adapter's name too.
        cluster: Tasks of one cluster are neighbours: they share part of what has to be learned.
        generate: Draws one example of a split.
        lora: The fields of `peft.LoraConfig` its adapter is trained with.
    """

    name: str
    cluster: str
    generate: Callable[[Random, Split], Example]
    lora: Mapping[str, Any] = field(default_factory=dict)


def words(text: str) -> list[str]:
    """Split a list written as one line of words."""
    return text.split()


def phrases(text: str) -> list[str]:
    """Split a list written as one line of phrases with bars between them."""
    return text.split("|")


def is_test(key: str, *, one_in: int = 4) -> bool:
    """Say whether an entity belongs to the test split, from its text alone."""
    return hashlib.sha256(key.encode()).digest()[0] % one_in == 0


def part(items: Sequence[T], split: Split) -> list[T]:
    """Return the items of one split: every fourth is for test."""
    return [item for i, item in enumerate(items) if (i % 4 == 3) == (split == "test")]


def draw_int(rng: Random, low: int, high: int, split: Split, kind: str) -> int:
    """Draw an integer from `low` to `high` inclusive that belongs to `split`; `kind` tells number spaces apart."""
    while True:
        value = rng.randint(low, high)
        if is_test(f"{kind}/{value}") == (split == "test"):
            return value
