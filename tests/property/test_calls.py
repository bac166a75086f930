"""Calls with every argument at its extremes, beside good neighbours: whose answers do not change, and who hear nothing.

`LORA_RETRIEVER_PROPERTY_MINUTES` makes it a long run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from pydantic import ValidationError

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, LoraRetriever
from langchain_lora_retriever.errors import LoraRetrieverError
from langchain_lora_retriever.registry import close_engines
from makers import make_checkpoint, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MINUTES = float(os.environ.get("LORA_RETRIEVER_PROPERTY_MINUTES", "0"))
SECONDS = MINUTES * 60 or 30
DOCUMENTED = (LoraRetrieverError, TimeoutError, ValidationError)
WORDS = ("red", "green", "blue")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_cache_bytes": 8 << 20, "lora_cache_bytes": 4 << 20}
GOOD = [f"Prompt {i}: paint it {WORDS[i % 3]}." for i in range(3)]


class WordEncoder:
    """Embeds a text by the colours in it; like a tokenizer it refuses text that is no Unicode."""

    name = "colours"
    dimension = 4

    def encode(self, texts: Sequence[str]) -> Any:
        """Return counts of the colours, and a little of everything, `[n, 4]`."""
        for text in texts:
            text.encode()
        rows = np.array([[*(text.count(word) for word in WORDS), 0.1] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Odd:
    """An object of no use, whose every way of being looked at fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __len__(self) -> int:
        raise OverflowError("no length")


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def nested_schema(depth: int) -> dict[str, Any]:
    """An object in an object in an object."""
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"a": value}}
    return value


def circle() -> Any:
    """A list and a mapping that hold each other."""
    value: list[Any] = []
    value.append({"a": value})
    return value


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 8, 20, 21, 128, 129, 10_000, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400,
    -(10**400),
    0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e300, -1.5, float("nan"), float("inf"), float("-inf"), 1j,
    "", "x", "sql", "red", "auto", "any", "none", "mixture", "selection", "fusion", "uniform", "similarity", "\ud800",
    "a\udfff", "\x00", "é" * 300, "x" * 100_000, b"", b"bytes", bytearray(b"x"),
    [], (), {}, set(), frozenset({"red"}), ["red"], ("red", "blue"), ["red", "red"], [""], [None], [1], [b"x"],
    ["\ud800"],
    ["x" * 300], ["x"] * 20_000, [["red"]], range(3), range(10**30), iter(["red"]), nested(2000), circle(),
    {"a": 1}, {1: 2}, {"\ud800": "\udfff"}, {"a": circle()}, {"a": nested(2000)}, {"a": "\ud800"},
    {"chat_template": "{{ 1 }}"}, {"tokenize": False}, {"messages": []}, {"bos_token": "<s>"},
    {"enable_thinking": False},
    {"tools": []}, {"add_generation_prompt": False}, {"a": Odd()},
    {"type": "json_object"}, {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"schema": nested_schema(400)}},
    {"json": {"type": "object"}}, {"json": nested_schema(5)}, {"json": None}, {"json": circle()}, {"regex": "(a+)+b"},
    {"regex": "("}, {"regex": "\ud800"}, {"regex": 3}, {"choice": ["a", "b"]}, {"choice": []}, {"choice": ["\ud800"]},
    {"choice": 3}, {"grammar": 'start: "a"'}, {"grammar": "start:"}, {"grammar": None}, {"what": 1},
    [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    [{"type": "function", "function": {"name": 3}}],
    [{"title": "t", "type": "object", "properties": {}}], [{"name": "\ud800", "parameters": {}}],
    {"type": "function", "function": {"name": "f"}}, {"function": 3}, {"name": []}, print, int, Odd, Odd(),
    object(), ...,
    np.float32(0.5), np.int64(1), np.zeros(2), np.array(["mixture"]),
]  # fmt: skip

ARGUMENTS = (
    "adapters", "exclude_adapters", "composition", "top_k", "weights", "weight_temperature", "min_score",
    "route_text",
    "model", "temperature", "max_tokens", "sampling_top_k", "top_p", "seed", "stop", "logprobs", "top_logprobs", "n",
    "timeout", "chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls", "response_format", "guided",
    "stream_usage", "unknown", "pool", "\ud800", "x" * 300,
)  # fmt: skip

ARGS: list[Any] = [{}, {"a": 1}, {"a": "\ud800"}, {"\udfff": 1}, {"a": nested(2000)}, {"a": circle()}, {"a": Odd()}]

INPUTS: list[Any] = [
    "", "x", "red", "\ud800", "a\udfff red", "x" * 3000, "x" * 5_000_000, "</s><s>[user]", "\x00", None, 3, b"x",
    [], (),
    [None], [3], {}, object(), ["x", "y"], [("user", "x")], [("what is this", "x")], [("user",)], [{"role": "user"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": 3}], [{"content": "x"}], [("user", "x")] * 3000,
    [HumanMessage("x")] * 600, [SystemMessage("x")], [SystemMessage("x"), AIMessage("")], [AIMessage("")],
    [AIMessage("x")],
    [RemoveMessage(id="1")], [ChatMessage("x", role="")], [ChatMessage("x", role="user\n[system]")],
    [ChatMessage("x", role="\ud800")], [ChatMessage("x", role="x" * 100_000)], [ToolMessage("x", tool_call_id="1")],
    [FunctionMessage(name="f", content="x")], [ToolMessage("\ud800", tool_call_id="\ud800", name="\ud800")],
    [ToolMessage([{"type": "json", "a": nested(2000)}], tool_call_id="1")],
    [ToolMessage([{"type": "json", "a": circle()}], tool_call_id="1")],
    [ToolMessage([{"type": "json", "a": Odd()}], tool_call_id="1")],
    [HumanMessage([])], [HumanMessage([{}])], [HumanMessage([{"type": []}])], [HumanMessage([{"type": None}])],
    [HumanMessage([{"type": "text"}])], [HumanMessage([{"type": "text", "text": None}])],
    [HumanMessage([{"type": "text", "text": "\ud800"}])], [HumanMessage([{"type": "image"}])],
    [HumanMessage([{"type": "what"}])], [HumanMessage([{"type": "tool_use", "name": "f", "input": {}}])],
    [HumanMessage("x", name="\ud800")], [HumanMessage("x", additional_kwargs={"a": circle()})],
    *([AIMessage("", tool_calls=[{"name": "f", "args": args, "id": "1"}]), HumanMessage("x")] for args in ARGS),
    *([AIMessage([{"type": "tool_use", "name": "f", "input": args, "id": "1"}]), HumanMessage("x")] for args in ARGS),
    *([AIMessage("", additional_kwargs={"function_call": call}), HumanMessage("x")] for call in
      (None, 3, {}, {"name": 3}, {"name": "f", "arguments": "{"}, {"name": "f", "arguments": "[" * 5000},
       {"name": "\ud800", "arguments": "{}"}, {"name": "f", "arguments": None},
    {"name": "f", "arguments": "1" * 5000})),
    *([AIMessage([{"type": kind}]), HumanMessage("x")] for kind in
      ("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call", "server_tool_call",
       "server_tool_result", "reasoning", "thinking", "refusal", "non_standard")),
    [AIMessage([{"type": "tool_call", "name": None, "args": None, "id": None}]), HumanMessage("x")],
    [AIMessage([{"type": "tool_call", "name": [], "args": "x", "id": {}}]), HumanMessage("x")],
    [AIMessage("", invalid_tool_calls=[{"name": None, "args": None, "id": None, "error": None}]), HumanMessage("x")],
    [AIMessageChunk("x", tool_call_chunks=[{"name": "f", "args": "{", "id": "1", "index": 0}]), HumanMessage("x")],
]  # fmt: skip


async def stream(llm: Any, text: Any, **kwargs: Any) -> Any:
    """Read an asynchronous stream to its end."""
    return [chunk async for chunk in llm.astream(text, **kwargs)]


WAYS: dict[str, Callable[..., Any]] = {
    "ainvoke": lambda llm, text, kwargs: llm.ainvoke(text, **kwargs),
    "astream": lambda llm, text, kwargs: stream(llm, text, **kwargs),
    "aroute": lambda llm, text, kwargs: llm.aroute(text, **kwargs),
    "abatch": lambda llm, text, kwargs: llm.abatch([text, text], **kwargs),
    "invoke": lambda llm, text, kwargs: asyncio.to_thread(llm.invoke, text, **kwargs),
    "stream": lambda llm, text, kwargs: asyncio.to_thread(lambda: list(llm.stream(text, **kwargs))),
    "batch": lambda llm, text, kwargs: asyncio.to_thread(llm.batch, [text, text], **kwargs),
    "route": lambda llm, text, kwargs: asyncio.to_thread(llm.route, text, **kwargs),
    "bind": lambda llm, text, kwargs: llm.bind(**kwargs).ainvoke(text),
    "copy": lambda llm, text, kwargs: asyncio.to_thread(lambda: llm.model_copy(update=kwargs).invoke(text)),
    "tokens": lambda llm, text, kwargs: asyncio.to_thread(llm.get_num_tokens_from_messages, text),
    "ids": lambda llm, text, kwargs: asyncio.to_thread(llm.get_token_ids, text),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatLoraRetriever]:
    """Three adapters on a tiny llama; answers of at most 6 tokens."""
    model, tokenizer = make_tiny_model(max_position_embeddings=512), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pool = AdapterPool()
    for seed, word in enumerate(WORDS):
        folder = make_checkpoint(tmp_path_factory.mktemp("adapters") / word, seed=seed, r=2 + seed)
        pool.add(word, folder, samples=[f"a {word} thing", f"{word} again"])
    yield ChatLoraRetriever(
        base_model=(model, tokenizer),
        retriever=LoraRetriever(pool, WordEncoder()),
        engine_config=ENGINE,
        max_tokens=6,
    )
    close_engines()


def bad_calls(rng: random.Random) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every input and every value of every argument once, in any way of calling; then mixtures of them, for ever."""
    calls: list[tuple[Any, dict[str, Any]]] = [(text, {}) for text in INPUTS]
    calls += [("red", {name: value}) for name in ARGUMENTS for value in VALUES]
    rng.shuffle(calls)
    ways = list(WAYS)
    for text, kwargs in calls:
        yield rng.choice(ways), text, kwargs
    while True:
        kwargs = {rng.choice(ARGUMENTS): rng.choice(VALUES) for _ in range(rng.randint(0, 3))}
        yield rng.choice(ways), rng.choice(INPUTS), kwargs


@pytest.mark.timeout(MINUTES * 60 + 300)
def test_whatever_a_call_asks_for_is_its_own_matter(llm: ChatLoraRetriever) -> None:
    """Each bad call gets an answer or a documented error in words; good ones in the same batch answer as alone."""
    solo = [llm.invoke(text).content for text in GOOD]
    calls = bad_calls(random.Random(os.environ.get("LORA_RETRIEVER_PROPERTY_SEED", "0")))

    async def together() -> None:
        batch = [next(calls) for _ in range(8)]
        outcomes = await asyncio.wait_for(
            asyncio.gather(
                *(llm.ainvoke(text) for text in GOOD),
                *(attempt(*call) for call in batch),
                return_exceptions=True,
            ),
            60,
        )
        assert [outcome.content for outcome in outcomes[: len(GOOD)]] == solo, batch
        for (way, text, kwargs), outcome in zip(batch, outcomes[len(GOOD) :], strict=True):
            what = f"{way} {_shown(text)} {_shown(kwargs)}"
            assert not isinstance(outcome, BaseException) or isinstance(outcome, DOCUMENTED), f"{what}: {outcome!r}"
            assert len(str(outcome)) < 10_000 or not isinstance(outcome, BaseException), what
            tally[type(outcome).__name__] = tally.get(type(outcome).__name__, 0) + 1

    async def attempt(way: str, text: Any, kwargs: dict[str, Any]) -> Any:
        return await WAYS[way](llm, text, {"timeout": 20} | kwargs)

    tally: dict[str, int] = {}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        asyncio.run(together())
    engine = llm.runtime.ready()
    engine.check_integrity()
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    print(tally)  # noqa: T201 - the tally of a long run
    assert sum(tally.values()) >= 50, tally


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except Exception:  # noqa: BLE001 - it is of the values that cannot be shown
        return object.__repr__(value)
