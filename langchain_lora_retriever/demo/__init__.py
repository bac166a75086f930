"""The embedded default: a small base model, an encoder, a pool of trained adapters and prompts to try them on.

>>> from langchain_lora_retriever.demo import demo_chat_model
>>> demo_chat_model().invoke("A cable measures 730.1 km. How long is it in m?").content  # doctest: +SKIP
'730100 m'
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever

__all__ = ["POOL_FOLDER", "DemoRow", "demo_arguments", "demo_chat_model", "demo_pool", "demo_test_set"]

POOL_FOLDER = Path(__file__).parent / "pool"
"""Where the demo's adapters lie."""


class DemoRow(TypedDict):
    """A held-out prompt: its right answer, and the task (which is its adapter's name) and cluster it belongs to."""

    input: str
    output: str
    task: str
    cluster: str
    messages: list[dict[str, str]]


def demo_chat_model(**kwargs: Any) -> ChatLoraRetriever:
    """Make a chat model on the demo's base model, encoder and pool.

    Args:
        **kwargs: Passed on to `ChatLoraRetriever`, in place of the demo's own: `pool=`, `encoder=`, `top_k=`, ...

    Raises:
        MissingDependencyError: If the demo's packages are half installed; the message says what to install.
    """
    from langchain_lora_retriever.chat.model import ChatLoraRetriever  # noqa: PLC0415 - loads torch

    return ChatLoraRetriever(**demo_arguments(**kwargs))


def demo_arguments(**kwargs: Any) -> dict[str, Any]:
    """Return the arguments `demo_chat_model` makes its chat model with.

    Without a pool of the caller's, all models of the process share one: adapters added to it are everybody's.
    """
    from langchain_lora_retriever.demo.model import base_model_arguments  # noqa: PLC0415 - as little as is needed

    arguments = {} if kwargs.keys() & {"base_model", "engine"} else base_model_arguments()
    if not kwargs.keys() & {"pool", "encoder", "instruction", "retriever"}:
        arguments["retriever"] = _shared_retriever()
    elif "retriever" not in kwargs and kwargs.get("pool") is None:
        arguments["pool"] = demo_pool()
    return arguments | kwargs


def demo_pool() -> AdapterPool:
    """Read the demo's adapters into a new pool in memory, which the caller may change: their files stay as they are."""
    from langchain_lora_retriever.pool.folder import list_folders  # noqa: PLC0415 - the same
    from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415 - loads torch

    pool = AdapterPool()
    for folder in list_folders(POOL_FOLDER):
        pool.add(folder.name, folder)
    return pool


def demo_test_set(num: int = 25, *, seed: int = 0) -> list[DemoRow]:
    """Make held-out rows of every task: no name, number, table or tool of theirs was trained on.

    Args:
        num: Rows per task.
        seed: Another seed gives other rows.
    """
    from langchain_lora_retriever.demo.tasks import TASKS, make_examples  # noqa: PLC0415 - only tests need the generators

    return [
        DemoRow(
            input=example.input,
            output=example.output,
            task=task.name,
            cluster=task.cluster,
            messages=example.prompt_messages(),
        )
        for task in TASKS.values()
        for example in make_examples(task.name, "test", num, seed)
    ]


@cache
def _shared_retriever() -> LoraRetriever:
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever  # noqa: PLC0415 - loads torch

    return LoraRetriever(demo_pool())
