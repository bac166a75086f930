"""The chat model on a real engine and a tiny random model: LangChain, retrieval, adapters and decoding together."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from pydantic import BaseModel
from tokenizers import decoders

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, LoraRetriever
from langchain_lora_retriever.errors import EngineDeadError, InvalidRequestError, LoraRetrieverError, PromptTooLongError
from langchain_lora_retriever.registry import close_engines
from makers import make_checkpoint, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WORDS = ("red", "green", "blue", "white")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ENGINE = {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "kv_cache_bytes": 8 << 20, "lora_cache_bytes": 4 << 20}


class WordEncoder:
    """Embeds a text by the colours in it."""

    name = "colours"
    dimension = 5

    def encode(self, texts: Sequence[str]) -> Any:
        """Return counts of the colours, and a little of everything, `[n, 5]`."""
        rows = np.array([[*(text.count(word) for word in WORDS), 0.1] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Reply(BaseModel):
    """A reply."""

    text: str
    number: int


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatLoraRetriever]:
    """Four adapters on a tiny llama; answers of at most 12 tokens."""
    model, tokenizer = make_tiny_model(max_position_embeddings=2048), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pool = AdapterPool()
    for seed, word in enumerate(WORDS):
        folder = make_checkpoint(tmp_path_factory.mktemp("adapters") / word, seed=seed, r=2 + seed)
        pool.add(word, folder, samples=[f"a {word} thing", f"{word} again"])
    yield ChatLoraRetriever(
        base_model=(model, tokenizer),
        retriever=LoraRetriever(pool, WordEncoder()),
        engine_config=ENGINE,
        max_tokens=12,
    )
    close_engines()


def prompts(num: int) -> list[str]:
    """Prompts of all adapters, in turn."""
    return [f"Prompt {i}: paint it {WORDS[i % 4]} and {WORDS[(i // 4) % 4]}." for i in range(num)]


def test_adapters_change_answers(llm: ChatLoraRetriever) -> None:
    """What is routed is what runs: another adapter, another answer."""
    answers = {llm.invoke("Paint it.", adapters=names).content for names in ([], ["red"], ["blue"])}
    assert len(answers) == 3
    routed = llm.invoke("red red", composition="selection")
    assert routed.content == llm.invoke("red red", adapters=["red"]).content
    assert routed.response_metadata["finish_reason"] in {"stop", "length"}


def test_batch_equals_one_by_one(llm: ChatLoraRetriever) -> None:
    """Who else is in the batch changes no greedy answer, by whichever way it is asked."""
    texts = prompts(24)
    solo = [llm.invoke(text).content for text in texts]
    assert [message.content for message in llm.batch(texts)] == solo
    assert [message.content for message in asyncio.run(llm.abatch(texts))] == solo
    chain = ChatPromptTemplate.from_template("{text}") | llm | StrOutputParser()
    assert chain.batch([{"text": text} for text in texts]) == solo
    assert ["".join(str(chunk.content) for chunk in llm.stream(text)) for text in texts[:4]] == solo[:4]


Call = tuple[str, dict[str, Any], set[Any] | None]
"""A text, the call's arguments, and the answers it may get: None where it must fail."""

BAD_CALLS: tuple[dict[str, Any], ...] = (
    {"temperature": float("nan")},
    {"adapters": ["nobody"]},
    {"guided": {"regex": "("}},
    {"stop": ["\ud800"]},
    {"route_text": "\ud800"},
    {"max_tokens": 0},
    {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"timeout": 1e-9},
)


def test_load_with_cancellations(llm: ChatLoraRetriever, tmp_path) -> None:
    """200 calls and 50 streams, one in ten bad, a third cancelled, an adapter replaced all the while.

    Survivors answer as alone, bad calls fail by themselves, nothing is lost or leaks.
    """
    assert isinstance(llm.pool, AdapterPool)
    versions = [make_checkpoint(tmp_path / str(seed), seed=seed, r=3) for seed in (11, 12)]
    texts = prompts(50)
    routed: dict[str, Any] = {"exclude_adapters": ["moving"]}
    llm.pool.add("moving", versions[0], samples=["a moving thing"])
    alone = {text: {llm.invoke(text, **routed).content} for text in texts}
    moving: dict[str, set[Any]] = {text: set() for text in texts}
    for version in versions:
        llm.pool.update("moving", version)
        for text in texts:
            moving[text].add(llm.invoke(text, adapters=["moving"]).content)

    rng = random.Random(0)
    calls: list[Call] = []
    for index in range(250):
        text = texts[index % 50]
        bad = BAD_CALLS[(index // 10) % len(BAD_CALLS)]
        calls.append(
            (text, bad, None) if index % 10 == 0
            else (text, {"adapters": ["moving"]}, moving[text]) if index % 3 == 0
            else (text, routed, alone[text])
        )  # fmt: skip
    doomed = {index for index in range(250) if rng.random() < 1 / 3}

    async def read(text: str, arguments: dict[str, Any]) -> str:
        return "".join([str(chunk.content) async for chunk in llm.astream(text, **arguments)])

    async def ask(text: str, arguments: dict[str, Any]) -> str:
        return str((await llm.ainvoke(text, **arguments)).content)

    async def replace() -> None:
        for version in itertools.cycle(versions):
            await asyncio.to_thread(llm.pool.update, "moving", version)

    async def run() -> list[Any]:
        replacing = asyncio.create_task(replace())
        tasks = [
            asyncio.create_task((read if index % 5 == 4 else ask)(text, arguments))
            for index, (text, arguments, _) in enumerate(calls)
        ]
        for index in doomed:
            await asyncio.sleep(0.004)
            tasks[index].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        replacing.cancel()
        await asyncio.gather(replacing, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1
        return results

    engine = llm.runtime.ready()
    asyncio.run(run())
    num_threads = threading.active_count()
    results = asyncio.run(run())
    check_outcomes(calls, results, doomed)
    llm.pool.remove("moving")
    engine.check_integrity()
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    assert threading.active_count() <= num_threads + len(calls) // 8  # pools may have grown, by no thread for each call


def check_outcomes(calls: Sequence[Call], results: Sequence[Any], doomed: set[int]) -> None:
    """Assert that only doomed calls were cancelled, bad ones refused, and all others answered as alone."""
    num_answers = 0
    for index, (result, (_, arguments, allowed)) in enumerate(zip(results, calls, strict=True)):
        if isinstance(result, asyncio.CancelledError):
            assert index in doomed
        elif allowed is None:
            assert isinstance(result, LoraRetrieverError | TimeoutError), (arguments, result)
        else:
            assert result in allowed, (index, arguments, result)
            num_answers += 1
    assert num_answers > 100


def test_constrained_and_free_requests_share_a_batch(llm: ChatLoraRetriever) -> None:
    """A model without any ability gives valid JSON in the schema, beside free answers that it leaves alone."""
    texts = prompts(8)
    free = [llm.invoke(text).content for text in texts]
    structured = llm.with_structured_output(Reply, max_tokens=80)

    async def run() -> tuple[list[Any], list[Any]]:
        constrained = asyncio.gather(*(structured.ainvoke(text) for text in texts))
        plain = asyncio.gather(*(llm.ainvoke(text) for text in texts))
        return await constrained, await plain

    replies, messages = asyncio.run(run())
    assert all(isinstance(reply, Reply) for reply in replies)
    assert [message.content for message in messages] == free


def test_a_random_model_calls_a_tool_when_forced(llm: ChatLoraRetriever) -> None:
    """Forced calls parse whatever the model, streamed or not."""
    bound = llm.bind_tools([Reply], tool_choice="any", parallel_tool_calls=False, max_tokens=160)
    message = bound.invoke("red")
    assert message.tool_calls[0]["name"] == "Reply"
    assert isinstance(message.tool_calls[0]["args"]["number"], int)
    first, *rest = bound.stream("red")
    for chunk in rest:
        first += chunk
    assert first.tool_calls[0]["args"] == message.tool_calls[0]["args"]


def test_a_random_model_calls_a_tool_in_its_own_format() -> None:
    """Special tokens that stand around a call are forced, reach the text, and are read by the response template."""
    model, tokenizer = make_tiny_model(seed=2), make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[CALL]", "[ARGS]", "[/CALL]"]})
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}"
        "[CALL]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}[/CALL]{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    call = {"open_pattern": r"\[CALL\](?P<name>\w+)\[ARGS\]", "close": "[/CALL]", "content": "json", "repeats": True,
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}}}  # fmt: skip
    fields = {"tool_calls": call, "content": {"content": "text"}}
    tokenizer.response_template = {"start_anchor": "[assistant] ", "fields": fields}
    own = ChatLoraRetriever(base_model=(model, tokenizer), engine_config=ENGINE, max_tokens=160)
    bound = own.bind_tools([Reply], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke("red")
    assert message.text == ""
    assert message.tool_calls[0]["name"] == "Reply"
    assert isinstance(message.tool_calls[0]["args"]["number"], int)
    first, *rest = bound.stream("red")
    for chunk in rest:
        first += chunk
    assert first.tool_calls[0]["args"] == message.tool_calls[0]["args"]


def test_guided_answers(llm: ChatLoraRetriever) -> None:
    """Choices, patterns and JSON are followed."""
    assert llm.invoke("red", guided={"choice": ["yes", "no"]}).content in {"yes", "no"}
    assert llm.invoke("red", guided={"regex": "[0-9]{3}"}).content.isdigit()
    reply = json.loads(llm.invoke("red", guided={"json": Reply}, max_tokens=80).content)
    assert set(reply) == {"text", "number"}


def test_logprobs_and_sampling(llm: ChatLoraRetriever) -> None:
    """A seed repeats a sampled answer, and log-probabilities cover its tokens."""
    sampled = [llm.invoke("red", temperature=1.0, seed=5, logprobs=2) for _ in range(2)]
    assert sampled[0].content == sampled[1].content
    entries = sampled[0].response_metadata["logprobs"]["content"]
    assert len(entries) == sampled[0].usage_metadata["output_tokens"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries)
    answers = llm.generate([llm._convert_input("red").to_messages()], n=3, temperature=1.0, seed=1)
    assert len({generation.text for generation in answers.generations[0]}) > 1


def test_stop_strings(llm: ChatLoraRetriever) -> None:
    """A stop string ends the answer and is no part of it."""
    whole = str(llm.invoke("red").content)
    stop = whole[3:5]
    assert llm.invoke("red", stop=[stop]).content == whole[: whole.index(stop)]


def test_the_prefix_cache_is_reported(llm: ChatLoraRetriever) -> None:
    """A repeated prompt is read from the cache, unless its adapters differ."""
    prompt = "white " * 12
    llm.invoke(prompt)
    usage = [llm.invoke(prompt, **call).usage_metadata for call in ({}, {"adapters": ["red", "blue"]})]
    assert [u["input_token_details"]["cache_read"] > 0 for u in usage] == [True, False]


async def test_an_adapter_removed_while_it_runs(llm: ChatLoraRetriever, tmp_path) -> None:
    """The request finishes as it began; the next one finds the adapter gone."""
    pool: Any = llm.pool
    pool.add("grey", make_checkpoint(tmp_path / "grey", seed=9), samples=["grey grey"])
    expected = (await llm.ainvoke("x", adapters=["grey"], max_tokens=60)).content
    stream = llm.astream("x", adapters=["grey"], max_tokens=60)
    text = str((await anext(stream)).content)
    pool.remove("grey")
    text += "".join([str(chunk.content) async for chunk in stream])
    assert text == expected
    with pytest.raises(KeyError, match="grey"):
        await llm.ainvoke("x", adapters=["grey"])


def test_an_adapter_replaced_under_its_name(llm: ChatLoraRetriever, tmp_path) -> None:
    """The new content answers, not the old one's cache."""
    pool: Any = llm.pool
    pool.add("grey", make_checkpoint(tmp_path / "old", seed=9), samples=["grey grey"])
    old = llm.invoke("x", adapters=["grey"]).content
    pool.update("grey", make_checkpoint(tmp_path / "new", seed=10))
    assert llm.invoke("x", adapters=["grey"]).content != old
    pool.remove("grey")


def test_a_prompt_longer_than_the_context(llm: ChatLoraRetriever) -> None:
    """It is refused, and others go on."""
    with pytest.raises(PromptTooLongError):
        llm.invoke("red " * 600)
    assert llm.invoke("red").content


def test_equal_configurations_share_an_engine(llm: ChatLoraRetriever) -> None:
    """Weights are loaded once per process; another configuration is another engine."""
    copy = ChatLoraRetriever(base_model=llm.base_model, retriever=llm.retriever, engine_config=ENGINE, top_k=1)
    assert copy.runtime.ready() is llm.runtime.ready()


def make_other(seed: int) -> ChatLoraRetriever:
    """A chat model on an engine of its own, without adapters."""
    model, tokenizer = make_tiny_model(seed=seed), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return ChatLoraRetriever(base_model=(model, tokenizer), engine_config=ENGINE, max_tokens=300)


def test_a_closed_engine_is_started_again(caplog) -> None:
    """A call under way when an engine is closed gets the reason; the next one starts a fresh engine and says so."""
    other = make_other(1)
    expected = other.invoke("x", max_tokens=3).content
    engine = other.runtime.ready()
    stream = other.stream("x", temperature=1.0, seed=0)
    next(stream)
    engine.close()
    assert not engine.is_alive
    with pytest.raises(EngineDeadError):
        list(stream)
    assert other.invoke("x", max_tokens=3).content == expected
    assert other.runtime.ready() is not engine
    assert "has stopped; starting a new one" in caplog.text


async def test_an_engine_that_died_is_started_again(monkeypatch) -> None:
    """Broken bookkeeping kills an engine, with the cause; a retry runs on a new one and waits for it off the loop."""
    other = make_other(3)
    expected = (await other.ainvoke("x", max_tokens=3)).content
    engine = other.runtime.ready()

    def break_down(*args: Any) -> None:
        raise AssertionError("a block is lost")

    monkeypatch.setattr(engine.core, "step", break_down)
    monkeypatch.setattr(engine.core, "check_integrity", break_down)
    with pytest.raises(EngineDeadError, match="a block is lost"):
        await other.ainvoke("x")
    retrying = other.with_retry(retry_if_exception_type=(EngineDeadError,), stop_after_attempt=2)
    assert (await retrying.ainvoke("x", max_tokens=3)).content == expected
    assert other.runtime.ready() is not engine


def test_closing_all_engines_lets_go_of_them() -> None:
    """The registry keeps none, and the next call loads afresh."""
    other = make_other(4)
    expected = other.invoke("x", max_tokens=3).content
    engine = other.runtime.ready()
    close_engines()
    assert not engine.is_alive
    assert other.invoke("x", max_tokens=3).content == expected


def test_the_profile_knows_the_engines_window() -> None:
    """Once loaded, the profile holds what the engine can take."""
    other = make_other(5)
    assert other.profile["max_input_tokens"] == 512
    other.invoke("x", max_tokens=1)
    assert other.profile["max_input_tokens"] == other.runtime.ready().info.max_model_len == 512
    assert other.profile["max_output_tokens"] == 511
    assert other.profile["reasoning_output"] is False


def test_a_tokenizer_that_no_grammar_can_follow_serves_free_text() -> None:
    """Llguidance cannot read every tokenizer: the model loads, and a call that asks for a grammar is told."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    llm = ChatLoraRetriever(base_model=(make_tiny_model(), tokenizer), max_tokens=4, engine_config=ENGINE)
    try:
        assert llm.invoke("x").usage_metadata["output_tokens"] == 4
        with pytest.raises(InvalidRequestError, match="cannot be constrained"):
            llm.invoke("x", guided={"regex": "a"})
    finally:
        llm.close()
