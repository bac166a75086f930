"""Many calls at once: how they begin, and that each has its own outcome."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from langchain_lora_retriever.errors import (
    EncoderError,
    EngineError,
)

if TYPE_CHECKING:
    from langchain_lora_retriever import ChatLoraRetriever

SQL = "How many users are in the table?"
FRENCH = "Translate good morning into French."


@pytest.fixture
def embedded(llm: ChatLoraRetriever, monkeypatch) -> list[list[str]]:
    """The batches of prompts that the encoder is given, without the instruction."""
    retriever = llm.retriever
    retriever.retrieve("x")  # the adapters are embedded at first use
    batches: list[list[str]] = []
    encode = retriever.encoder.encode

    def noted(texts: list[str]) -> Any:
        batches.append([text.removeprefix(retriever.instruction) for text in texts])
        return encode(texts)

    monkeypatch.setattr(retriever.encoder, "encode", noted)
    return batches


def prefix_of(prompt: str) -> str:
    """What the human said, for answers that tell prompts apart."""
    return prompt.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>", maxsplit=1)[0]


def test_batch_runs_at_once(llm: ChatLoraRetriever, engine) -> None:
    """A batch fills the engine, whatever the number of cores; answers keep their order."""
    barrier = threading.Barrier(16, timeout=10)

    def answer(prompt: str, names: list[str]) -> str:
        barrier.wait()
        return prefix_of(prompt)

    engine.answers = answer
    prompts = [f"prompt {i}" for i in range(16)]
    assert [message.content for message in llm.batch(prompts)] == prompts


def test_max_concurrency_is_honoured(llm: ChatLoraRetriever, engine) -> None:
    """Whoever asks for two at a time gets two at a time, and never a third."""
    trio = threading.Barrier(3, timeout=0.5)

    def answer(prompt: str, names: list[str]) -> str:
        try:
            trio.wait()
        except threading.BrokenBarrierError:
            return "no third"
        return "three"

    engine.answers = answer
    assert {message.content for message in llm.batch(["x"] * 8, config={"max_concurrency": 2})} == {"no third"}
    assert engine.most_running == 2


async def test_the_first_of_many_reach_the_engine_before_the_last_begin(llm: ChatLoraRetriever, engine) -> None:
    """A large `abatch` is prepared a few at a time; its answers keep their order, and all run at once."""
    began: list[int] = []

    class Beginnings(AsyncCallbackHandler):
        async def on_chat_model_start(self, *arguments: Any, **kwargs: Any) -> None:
            began.append(len(engine.requests))

    all_are_there = threading.Barrier(200)

    def answer(prompt: str, names: list[str]) -> str:
        all_are_there.wait(60)
        return prefix_of(prompt)

    engine.answers = answer
    prompts = [f"prompt {i:03}" for i in range(200)]
    answers = await llm.abatch(prompts, config={"callbacks": [Beginnings()]}, adapters=["sql"])
    assert [message.content for message in answers] == prompts
    assert began[0] == 0
    assert began[-1] > 100
    assert engine.most_running == 200


@pytest.mark.parametrize("num", [0, 1, 8, 9, 16, 17, 40])
async def test_abatch_of_any_size_answers_in_order(llm: ChatLoraRetriever, engine, num: int) -> None:
    """With one config per prompt and a failing prompt in the midst, more than are prepared at first or not."""

    def answer(prompt: str, names: list[str]) -> str:
        if prefix_of(prompt) == "p8":
            raise EngineError("broken")
        return prefix_of(prompt)

    engine.answers = answer
    prompts = [f"p{i}" for i in range(num)]
    configs = [{"tags": [prompt]} for prompt in prompts]
    answers = await llm.abatch(prompts, config=configs, return_exceptions=True)
    assert [str(getattr(each, "content", each)) for each in answers] == [p if p != "p8" else "broken" for p in prompts]
    if num > 8:
        with pytest.raises(EngineError, match="broken"):
            await llm.abatch(prompts, config=configs)


async def test_abatch_embeds_its_prompts_in_groups(llm: ChatLoraRetriever, engine, embedded: list[list[str]]) -> None:
    """A group is embedded in one pass, when the calls of the one before are with the engine."""
    engine.answers = lambda prompt, names: prefix_of(prompt)
    engine.delay = 0.2
    prompts = [f"{SQL} {i}" for i in range(100)]
    answers = await llm.abatch(prompts)
    assert [message.content for message in answers] == prompts
    assert [len(texts) for texts in embedded] == [64, 36]
    assert all(request.names[0] == "sql" for request in engine.requests)
    assert engine.most_running == 100


@pytest.mark.parametrize("size", [0, 1, 100])
async def test_abatch_embeds_each_prompt_once_whatever_the_cache_holds(
    llm: ChatLoraRetriever, embedded: list[list[str]], size: int
) -> None:
    """A group that the cache has no room for is embedded by its calls."""
    llm.retriever._texts.max_texts = size
    prompts = [f"{SQL} {i}" for i in range(100)]
    answers = await llm.abatch(prompts)
    assert all(message.response_metadata["adapters"][0]["name"] == "sql" for message in answers)
    assert sorted(text for texts in embedded for text in texts) == sorted(prompts)


async def test_abatch_does_not_embed_what_is_not_routed(llm: ChatLoraRetriever, embedded: list[list[str]]) -> None:
    """Neither where the adapters are named, nor what was embedded before."""
    await llm.abatch([SQL, FRENCH], adapters=["sql"])
    assert not embedded
    await llm.abatch([SQL, FRENCH])
    await llm.abatch([SQL, FRENCH])
    assert embedded == [[SQL, FRENCH]]


async def test_a_prompt_that_cannot_be_understood_is_its_own_calls_error(llm: ChatLoraRetriever) -> None:
    """It keeps the group from being embedded together, and nothing else."""
    broken: Any = object()
    first, error, last = await llm.abatch([SQL, broken, FRENCH], return_exceptions=True)
    assert first.response_metadata["adapters"][0]["name"] == "sql"
    assert isinstance(error, ValueError)
    assert last.response_metadata["adapters"][0]["name"] == "french"
    with pytest.raises(ValueError, match="Invalid input type"):
        await llm.abatch([SQL, broken, FRENCH])


async def test_an_encoder_that_fails_is_the_calls_error(llm: ChatLoraRetriever, monkeypatch) -> None:
    """All hear of it, and the next batch is answered."""

    def fail(texts: list[str]) -> Any:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(llm.retriever.encoder, "encode", fail)
        errors = await llm.abatch([SQL, FRENCH], return_exceptions=True)
        assert all(isinstance(error, EncoderError) and "no memory" in str(error) for error in errors)
        assert errors[0] is not errors[1]
    assert [message.content for message in await llm.abatch([SQL, FRENCH])] == ["The answer."] * 2


async def test_abatch_goes_on_where_calls_never_reach_the_engine(llm: ChatLoraRetriever, engine) -> None:
    """Each of more calls than are prepared at a time is refused."""
    answers = await llm.abatch(["x"] * 40, adapters=["nobody"], return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == ["UnknownAdapterError"] * 40
    assert not engine.requests


async def test_cancelling_abatch_cancels_what_has_not_begun(llm: ChatLoraRetriever, engine) -> None:
    """Neither what runs nor what waits for its turn goes on."""
    engine.delay = 0.05
    task = asyncio.create_task(llm.abatch(["x"] * 100, adapters=["sql"]))
    for _ in range(1000):
        await asyncio.sleep(0)
        if engine.requests:
            break
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    num_begun = len(engine.requests)
    await asyncio.sleep(0.1)
    assert len(engine.requests) == num_begun < 100
    assert engine.num_aborted == num_begun


async def test_abatch_runs_at_once(llm: ChatLoraRetriever, engine) -> None:
    """So does an asynchronous batch."""
    barrier = threading.Barrier(40, timeout=10)
    engine.answers = lambda prompt, names: str(barrier.wait() >= 0) and prefix_of(prompt)
    prompts = [f"prompt {i}" for i in range(40)]
    assert [message.content for message in await llm.abatch(prompts)] == prompts


def test_generate_runs_at_once(llm: ChatLoraRetriever, engine) -> None:
    """`generate` of many conversations does not loop over them one by one."""
    barrier = threading.Barrier(5, timeout=10)
    engine.answers = lambda prompt, names: str(barrier.wait() >= 0) and prefix_of(prompt)
    result = llm.generate([[HumanMessage(f"p{i}")] for i in range(5)])
    assert [generations[0].text for generations in result.generations] == [f"p{i}" for i in range(5)]
    assert len(result.run) == len({run.run_id for run in result.run}) == 5


def test_batch_as_completed(llm: ChatLoraRetriever, engine) -> None:
    """Answers come as they finish, with the index of their prompt."""
    engine.answers = lambda prompt, names: time.sleep(0.2 if "slow" in prompt else 0) or prefix_of(prompt)
    done = list(llm.batch_as_completed(["slow", "quick"]))
    assert [index for index, _ in done] == [1, 0]


def _fail_on_bad(prompt: str, names: list[str]) -> str:
    if "bad" in prompt:
        raise EngineError("step failed")
    return "good"


async def test_return_exceptions(llm: ChatLoraRetriever, engine) -> None:
    """A failing prompt is its own affair where exceptions are returned, and raised where they are not."""
    engine.answers = _fail_on_bad
    for results in (
        llm.batch(["a", "bad", "b"], return_exceptions=True),
        await llm.abatch(["a", "bad", "b"], return_exceptions=True),
        (StrOutputParser() | llm).batch([AIMessage("a"), AIMessage("bad"), AIMessage("b")], return_exceptions=True),
    ):
        assert [isinstance(result, EngineError) for result in results] == [False, True, False]
    with pytest.raises(EngineError):
        llm.batch(["a", "bad"])


def test_a_chain_batches(llm: ChatLoraRetriever, engine) -> None:
    """A chain hands its prompts to the model all at once."""
    barrier = threading.Barrier(10, timeout=10)
    engine.answers = lambda prompt, names: str(barrier.wait() >= 0) and prefix_of(prompt)
    chain = ChatPromptTemplate.from_template("say {word}") | llm | StrOutputParser()
    assert chain.batch([{"word": str(i)} for i in range(10)]) == [f"say {i}" for i in range(10)]
