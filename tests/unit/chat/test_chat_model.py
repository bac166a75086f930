"""The chat model around a fake engine: routing, metadata, concurrency, cancellation, errors."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import json
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, Composition, registry
from langchain_lora_retriever.engine import Delta, Registration, TokenLogprob, Usage
from langchain_lora_retriever.errors import (
    EncoderError,
    EngineError,
    InvalidAdapterError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownAdapterError,
)
from langchain_lora_retriever.output.reasoning import ThinkReader
from langchain_lora_retriever.output.stream import AnswerStream
from makers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def test_invoke_routes_and_reports(llm: ChatLoraRetriever, engine) -> None:
    """An answer says which model, which composition and which adapters gave it."""
    message = llm.invoke(SQL, top_k=2)
    assert message.content == "The answer."
    metadata = message.response_metadata
    assert metadata["model_name"] == "fake/base"
    assert metadata["model_provider"] == "lora-retriever"
    assert metadata["finish_reason"] == "stop"
    assert metadata["composition"] == "mixture"
    assert metadata["adapters"][0]["name"] == "sql"
    assert sum(a["weight"] for a in metadata["adapters"]) == pytest.approx(1)
    assert engine.requests[0].names[0] == "sql"
    assert message.usage_metadata == {
        "input_tokens": len(engine.requests[0].prompt_token_ids),
        "output_tokens": len("The answer."),
        "total_tokens": len(engine.requests[0].prompt_token_ids) + len("The answer."),
        "input_token_details": {"cache_read": 0},
    }
    assert message.usage_metadata["total_tokens"] == message.usage_metadata["input_tokens"] + 11


def test_route_is_what_invoke_runs(llm: ChatLoraRetriever, engine) -> None:
    """`route` decides as a call does and generates nothing."""
    composition = llm.route(FRENCH, composition="selection")
    assert isinstance(composition, Composition)
    assert composition.names == ("french",)
    assert not engine.requests
    assert llm.invoke(FRENCH, composition="selection").response_metadata["adapters"][0]["name"] == "french"


async def test_aroute_is_route(llm: ChatLoraRetriever) -> None:
    """The asynchronous decision is the same."""
    assert (await llm.aroute(FRENCH)).names == llm.route(FRENCH).names


def test_route_text_replaces_the_prompt(llm: ChatLoraRetriever) -> None:
    """A RAG prompt is routed on its question, not on its context."""
    bound = llm.bind(route_text=SQL, top_k=1)
    assert bound.invoke(FRENCH).response_metadata["adapters"][0]["name"] == "sql"


def test_pinned_adapters(llm: ChatLoraRetriever, engine) -> None:
    """Names take the place of retrieval, share their weight and have no score."""
    metadata = llm.bind(adapters=["dates", "french"]).invoke(SQL).response_metadata
    assert metadata["adapters"] == [
        {"name": "dates", "score": None, "weight": 0.5},
        {"name": "french", "score": None, "weight": 0.5},
    ]
    assert engine.requests[0].names == ["dates", "french"]


def test_no_adapters_is_the_base_model(llm: ChatLoraRetriever, engine) -> None:
    """`adapters=[]` runs the base model alone."""
    assert llm.invoke(SQL, adapters=[]).response_metadata["adapters"] == []
    assert engine.requests[0].names == []


def test_the_model_argument_names_an_adapter(llm: ChatLoraRetriever, engine) -> None:
    """As on OpenAI-style servers, `model` picks an adapter, or the base model by its own name."""
    assert llm.invoke(FRENCH, model="sql").response_metadata["model_name"] == "sql"
    llm.invoke(FRENCH, model="fake/base")
    assert [request.names for request in engine.requests] == [["sql"], []]


def test_excluded_adapters_are_not_retrieved(llm: ChatLoraRetriever) -> None:
    """The right adapter can be masked."""
    assert "sql" not in llm.route(SQL, exclude_adapters=["sql"]).names


@pytest.mark.parametrize("argument", ["adapters", "exclude_adapters"])
def test_an_unknown_adapter_raises(llm: ChatLoraRetriever, engine, argument: str) -> None:
    """A name that is not in the pool is never silently served by the base model."""
    with pytest.raises(UnknownAdapterError, match="sqll"):
        llm.invoke(SQL, **{argument: ["sqll"]})
    assert not engine.requests


def test_min_score_leaves_the_base_model_alone(llm: ChatLoraRetriever) -> None:
    """Under the minimum similarity nothing is composed."""
    assert llm.route(SQL, min_score=0.999).names == ()


def test_top_k_larger_than_the_pool(llm: ChatLoraRetriever) -> None:
    """All there are is the most there can be."""
    assert len(llm.route(SQL, top_k=8).names) == 3


def test_selection_of_two_pinned_adapters_is_refused(llm: ChatLoraRetriever) -> None:
    """Selection runs one adapter; which of two is not guessed."""
    with pytest.raises(InvalidRequestError, match="runs one adapter"):
        llm.invoke(SQL, adapters=["sql", "dates"], composition="selection")


def test_an_empty_pool_is_the_base_model(engine) -> None:
    """Before an adapter is added the base model answers alone."""
    llm = ChatLoraRetriever(engine=engine)
    assert llm.invoke("hi").response_metadata["adapters"] == []


def test_an_adapter_that_does_not_fit_is_rejected(llm: ChatLoraRetriever, pool: AdapterPool, write_adapter) -> None:
    """Adapters of another base model are left out by name when the engine is known; later ones when they come."""
    pool.add("wide", write_adapter("wide", size=16), samples=[SQL])
    assert "wide" not in [a["name"] for a in llm.invoke(SQL).response_metadata["adapters"]]
    assert "wide" in llm.rejected
    assert "wide" in pool
    with pytest.raises(InvalidAdapterError, match="wide"):
        llm.invoke(SQL, adapters=["wide"])
    pool.update("sql", write_adapter("sql", size=16))
    assert "sql" not in [a["name"] for a in llm.invoke(SQL).response_metadata["adapters"]]


def test_a_rejected_adapter_named_a_hundred_times_gathers_nothing(
    llm: ChatLoraRetriever, pool: AdapterPool, write_adapter
) -> None:
    """Every call that names a refused adapter gets an error of its own, without the frames of those before."""
    pool.add("wide", write_adapter("wide", size=16), samples=[SQL])
    llm.invoke(SQL)
    depths = set()
    for _ in range(100):
        with pytest.raises(InvalidAdapterError, match="wide") as info:
            llm.invoke("hi", adapters=["wide"])
        depths.add(len(info.traceback))
    assert len(depths) == 1


def test_unknown_arguments_are_refused(llm: ChatLoraRetriever) -> None:
    """A misspelt argument is an error, in a call and at construction."""
    with pytest.raises(InvalidRequestError, match="Unknown argument 'tempratur'"):
        llm.invoke(SQL, tempratur=1)
    with pytest.raises(ValidationError, match="tempratur"):
        ChatLoraRetriever(base_model="fake/base", tempratur=1)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 2), ("top_k", 0), ("max_tokens", 0)])
def test_bad_settings_are_refused(llm: ChatLoraRetriever, name: str, value: Any) -> None:
    """Out of range is out of range at construction and in a call."""
    with pytest.raises(ValueError, match=name):
        ChatLoraRetriever(base_model="fake/base", **{name: value})
    with pytest.raises(InvalidRequestError, match=name):
        llm.invoke(SQL, **{name: value})


def test_a_bad_engine_config_is_refused() -> None:
    """A misspelt engine limit names the limits there are."""
    with pytest.raises(ValueError, match="max_num_seqs"):
        ChatLoraRetriever(base_model="fake/base", engine_config={"max_seqs": 3})


def test_a_retriever_comes_with_its_own_pool(pool: AdapterPool, llm: ChatLoraRetriever) -> None:
    """Two pools, or an encoder beside a retriever, would be ambiguous."""
    with pytest.raises(ValueError, match="not the retriever's"):
        ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever, pool=AdapterPool())
    with pytest.raises(ValueError, match="its own encoder"):
        ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever, encoder="x")


def test_empty_messages_are_refused(llm: ChatLoraRetriever) -> None:
    """There is nothing to answer."""
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.invoke([])


def test_a_prompt_longer_than_the_context_is_refused(llm: ChatLoraRetriever) -> None:
    """The engine's refusal reaches the caller as it is."""
    with pytest.raises(PromptTooLongError):
        llm.invoke("x" * 3000)


def test_sampling_arguments_arrive(llm: ChatLoraRetriever, engine) -> None:
    """No sampling argument is dropped on the way to the engine."""
    call = {"temperature": 0.5, "sampling_top_k": 4, "top_p": 0.9, "seed": 3, "max_tokens": 7, "stop": ["x"]}
    call |= {"repetition_penalty": 1.2, "stop_token_ids": [4, 9]}
    llm.invoke(SQL, logprobs=1, **call)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 4, 0.9, 3)
    assert (sampling.max_tokens, sampling.stop, sampling.logprobs) == (7, ("x",), 1)
    assert (sampling.repetition_penalty, sampling.stop_token_ids) == (1.2, (4, 9))


def test_stop_of_the_model_and_of_the_call(llm: ChatLoraRetriever, engine) -> None:
    """A call's stop strings take the place of the model's."""
    stopping = llm.model_copy(update={"stop": ["a"]})
    stopping.invoke(SQL)
    stopping.invoke(SQL, stop=["b"])
    assert [request.sampling.stop for request in engine.requests] == [("a",), ("b",)]


def test_several_answers(llm: ChatLoraRetriever, engine) -> None:
    """`n` answers come from one call, each drawn with a seed of its own."""
    result = llm.generate([[HumanMessage(SQL)]], n=3, seed=1, temperature=1.0)
    assert len(result.generations[0]) == 3
    assert [request.sampling.seed for request in engine.requests] == [1, 2, 3]
    with pytest.raises(InvalidRequestError, match="n=2"):
        list(llm.stream(SQL, n=2))


def test_logprobs_are_reported(llm: ChatLoraRetriever) -> None:
    """Log-probabilities come as chat-completion APIs give them, streamed or not."""
    for message in (llm.invoke(SQL, logprobs=2), _added(llm.stream(SQL, logprobs=2))):
        entries = message.response_metadata["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == list("The answer.")
        assert entries[0]["logprob"] == 0.0
        assert [alternative["token"] for alternative in entries[0]["top_logprobs"]] == ["T"]


def _added(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


def test_stream_adds_up_to_invoke(llm: ChatLoraRetriever) -> None:
    """Chunks add up to the answer, its usage, and metadata that appears once."""
    chunks = list(llm.stream(SQL))
    assert len(chunks) > 2
    assert chunks[-1].chunk_position == "last"
    full, whole = _added(chunks), llm.invoke(SQL)
    assert full.content == whole.content
    assert full.response_metadata == whole.response_metadata
    assert full.usage_metadata == whole.usage_metadata


def test_the_last_text_and_what_is_known_of_it_are_one_chunk(tokenizer) -> None:
    """An answer that comes whole is one chunk, with its metadata; a text after other pieces keeps its place."""
    whole = Delta("all", (5,), (TokenLogprob(5, -0.5, ()),), "length", Usage(3, 0, 1))
    (chunk,) = AnswerStream(tokenizer, {"model_name": "m"}).push(whole)
    message = chunk.message
    assert (message.content, message.chunk_position, message.usage_metadata["total_tokens"]) == ("all", "last", 4)
    assert list(message.response_metadata) == ["logprobs", "model_name", "finish_reason"]
    thinking = AnswerStream(tokenizer, {}, readers=[ThinkReader(is_open=True)])
    first, last = thinking.push(whole._replace(text="hm</think>all", logprobs=None))
    assert first.message.additional_kwargs == {"reasoning_content": "hm"}
    assert (first.message.chunk_position, last.message.content, last.message.chunk_position) == (None, "all", "last")


async def test_astream_adds_up_to_ainvoke(llm: ChatLoraRetriever) -> None:
    """The asynchronous stream is the same answer."""
    full = _added([chunk async for chunk in llm.astream(SQL)])
    whole = await llm.ainvoke(SQL)
    assert (full.content, full.response_metadata) == (whole.content, whole.response_metadata)


def test_callbacks_see_every_chunk_once(llm: ChatLoraRetriever) -> None:
    """`on_llm_new_token` is called once per chunk."""
    from langchain_core.callbacks import BaseCallbackHandler

    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.tokens.append(token)

    handler = Tokens()
    chunks = list(llm.stream(SQL, config={"callbacks": [handler]}))
    assert handler.tokens == [chunk.content for chunk in chunks]


def test_an_empty_answer_streams(llm: ChatLoraRetriever, engine) -> None:
    """An answer without text is a message all the same."""
    engine.answers = lambda prompt, names: ""
    assert _added(llm.stream(SQL)).content == ""
    assert llm.invoke(SQL).content == ""


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

    engine.answers = lambda prompt, names: prefix_of(prompt)
    engine.delay = 0.2
    prompts = [f"prompt {i:03}" for i in range(200)]
    answers = await llm.abatch(prompts, config={"callbacks": [Beginnings()]}, adapters=["sql"])
    assert [message.content for message in answers] == prompts
    assert began[0] == 0
    assert began[-1] > 100
    assert engine.most_running > 100


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


def test_closing_a_stream_aborts(llm: ChatLoraRetriever, engine) -> None:
    """Whoever stops reading frees the request."""
    engine.delay = 0.01
    stream = llm.stream(SQL)
    next(stream)
    stream.close()
    assert engine.num_aborted == 1


async def test_closing_an_astream_aborts(llm: ChatLoraRetriever, engine) -> None:
    """So does leaving an asynchronous stream."""
    engine.delay = 0.01
    stream = llm.astream(SQL)
    await anext(stream)
    await stream.aclose()
    await asyncio.sleep(0.05)
    assert engine.num_aborted == 1


async def test_cancelling_ainvoke_aborts(llm: ChatLoraRetriever, engine) -> None:
    """A cancelled task frees its request and no other."""
    engine.delay = 0.05
    cancelled, other = (asyncio.create_task(llm.ainvoke(SQL)) for _ in range(2))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert (await other).content == "The answer."
    assert engine.num_aborted == 1


async def test_a_late_call_times_out(llm: ChatLoraRetriever, engine) -> None:
    """A call that takes longer than its timeout is aborted, in all four ways of calling."""
    engine.delay = 0.2
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        llm.invoke(SQL, timeout=0.05)
    with pytest.raises(TimeoutError):
        await llm.ainvoke(SQL, timeout=0.05)
    with pytest.raises(TimeoutError):
        list(llm.stream(SQL, timeout=0.05))
    with pytest.raises(TimeoutError):
        _ = [chunk async for chunk in llm.astream(SQL, timeout=0.05)]
    await asyncio.sleep(0.1)  # the engine hears of the last one just after its caller
    assert engine.num_aborted == 4


@pytest.fixture
def stuck(llm: ChatLoraRetriever, monkeypatch) -> Iterator[threading.Event]:
    """Has the encoder wait for an event, which is set in the end in any case."""
    release = threading.Event()
    encoder = llm.retriever.encoder
    encode = encoder.encode
    llm.retriever.retrieve("x")  # the adapters are embedded at first use

    def wait(texts: list[str]) -> Any:
        assert release.wait(60)
        return encode(texts)

    monkeypatch.setattr(encoder, "encode", wait)
    yield release
    release.set()


async def test_the_timeout_counts_from_the_start_of_the_call(llm: ChatLoraRetriever, engine, stuck) -> None:
    """An encoder that hangs holds up no caller beyond its timeout, in any way of calling."""
    for call in (llm.invoke, lambda text, **kwargs: list(llm.stream(text, **kwargs)), lambda text, **kwargs: llm.batch(
        [text], **kwargs)):  # fmt: skip
        with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
            await asyncio.to_thread(call, "hung", timeout=0.05)
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        await llm.ainvoke("hung", timeout=0.05)
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        _ = [chunk async for chunk in llm.astream("hung", timeout=0.05)]
    with pytest.raises(TimeoutError, match=r"timeout=0\.05"):
        await llm.abatch(["hung", "too"], timeout=0.05)
    assert not engine.requests


def test_what_a_caller_has_left_is_not_generated(llm: ChatLoraRetriever, engine, stuck) -> None:
    """A request that reaches the engine after its caller's timeout is aborted."""
    engine.delay = 60
    with pytest.raises(TimeoutError):
        llm.invoke(SQL, timeout=0.05)
    stuck.set()
    wait_until(lambda: engine.num_aborted == 1)


def test_loading_counts_for_the_timeout(loads_engine, monkeypatch) -> None:
    """A model that is still being loaded holds up its first callers no longer than they allow."""
    release = threading.Event()
    monkeypatch.setattr(registry, "load_base_model", lambda source: release.wait(60))
    llm = ChatLoraRetriever(base_model="fake/base")
    try:
        for call in (llm.invoke, lambda text, **kwargs: llm.batch([text] * 2, **kwargs)):
            with pytest.raises(TimeoutError):
                call(SQL, timeout=0.05)
    finally:
        release.set()


def test_timeouts_take_no_thread_each(llm: ChatLoraRetriever, engine) -> None:
    """Calls with a timeout, one after another, take threads that are there already."""
    llm.invoke(SQL, timeout=60)
    seen: set[str] = set()
    submit = engine.submit

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.add(threading.current_thread().name)
        return submit(*args, **kwargs)

    engine.submit = noted
    for _ in range(150):
        llm.invoke(SQL, timeout=60)
    assert len(seen) < 75, seen


async def test_a_failure_is_not_taken_for_a_timeout(llm: ChatLoraRetriever, engine, monkeypatch) -> None:
    """What goes wrong in time is told as it is, also a `TimeoutError` of somebody else's."""

    def fail(texts: list[str]) -> Any:
        raise TimeoutError("the encoder's own")

    monkeypatch.setattr(llm.retriever.encoder, "encode", fail)
    with pytest.raises(EncoderError, match="the encoder's own"):
        llm.invoke("anew", timeout=60)
    with pytest.raises(EncoderError, match="the encoder's own"):
        await llm.ainvoke("anew again", timeout=60)


@pytest.mark.parametrize("timeout", [float("inf"), 1e300])
def test_a_timeout_may_be_infinite(llm: ChatLoraRetriever, timeout: float) -> None:
    """More seconds than a clock counts are no limit."""
    assert llm.invoke(SQL, timeout=timeout).content == "The answer."
    assert list(llm.stream(SQL, timeout=timeout))


async def test_a_long_prompt_is_encoded_off_the_event_loop(llm: ChatLoraRetriever, engine) -> None:
    """A long text, and a chat of many messages, hold up nobody else in the loop; a short prompt takes no detour."""
    names: list[str] = []
    engine.info = dataclasses.replace(engine.info, max_model_len=1 << 20)
    submit = engine.submit

    def noted(*args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return submit(*args, **kwargs)

    engine.submit = noted
    await llm.ainvoke("short")
    await llm.ainvoke("x" * 20_000)
    assert names[0] == threading.current_thread().name
    assert names[1] != threading.current_thread().name


def test_every_annotation_can_be_resolved() -> None:
    """LangChain looks at return types at run time, of `bind_tools` behind `with_fallbacks` for one."""
    for kind in ChatLoraRetriever.__mro__:
        if kind.__module__.startswith("langchain_lora_retriever"):
            for member in vars(kind).values():
                if inspect.isfunction(member):
                    get_type_hints(member)


def test_fallbacks_bind_tools_and_schemas(llm: ChatLoraRetriever) -> None:
    """A chat model with fallbacks is bound as a plain one is."""
    safe = llm.with_fallbacks([llm])
    assert safe.bind_tools([{"title": "add", "type": "object", "properties": {}}]).invoke(SQL).content
    assert safe.with_structured_output({"title": "T", "type": "object", "properties": {}})


def test_engine_errors_reach_the_caller(llm: ChatLoraRetriever, engine) -> None:
    """An exception inside a step is the request's, also in a stream."""
    engine.answers = _fail_on_bad
    with pytest.raises(EngineError, match="step failed"):
        llm.invoke("bad")
    with pytest.raises(EngineError, match="step failed"):
        list(llm.stream("bad"))
    assert llm.invoke("fine").content == "good"


def test_fallbacks_see_the_packages_errors(llm: ChatLoraRetriever, engine) -> None:
    """`with_retry` and `with_fallbacks` work with the exceptions raised here."""
    attempts = iter(["bad", "bad", "good"])

    def answer(prompt: str, names: list[str]) -> str:
        return _fail_on_bad(next(attempts), names)

    engine.answers = answer
    assert llm.with_retry(retry_if_exception_type=(EngineError,), wait_exponential_jitter=False).invoke("x").content
    pinned = llm.bind(adapters=["gone"]).with_fallbacks([llm.bind(adapters=[])])
    engine.answers = lambda prompt, names: "fallback"
    assert pinned.invoke("x").content == "fallback"


def test_no_two_configurations_share_a_cached_answer(llm: ChatLoraRetriever, engine, pool, write_adapter) -> None:
    """LangChain's response cache tells every setting apart, and a pool from itself before a change."""
    cached = llm.model_copy(update={"cache": InMemoryCache()})
    copies = [cached.model_copy(update=change) for change in ({}, {"top_k": 1}, {"composition": "fusion"},
              {"temperature": 0.1}, {"weights": "uniform"}, {"min_score": 0.2}, {"adapters": ["sql"]})]  # fmt: skip
    for copied in copies:
        copied.invoke(SQL)
    assert len(engine.requests) == len(copies)
    cached.invoke(SQL)
    assert len(engine.requests) == len(copies)
    cached.invoke(SQL, top_k=2)
    cached.bind(adapters=["dates"]).invoke(SQL)
    assert len(engine.requests) == len(copies) + 2
    pool.update("sql", write_adapter("sql", seed=1))
    cached.invoke(SQL)
    assert len(engine.requests) == len(copies) + 3


def test_settings_can_be_configurable(llm: ChatLoraRetriever, engine) -> None:
    """Composition, top_k and adapters can be set per run through `configurable_fields`."""
    runnable = llm.configurable_fields(
        top_k=ConfigurableField(id="top_k"), adapters=ConfigurableField(id="adapters"),
        composition=ConfigurableField(id="composition"),
    )  # fmt: skip
    config = {"configurable": {"top_k": 1, "composition": "selection"}}
    metadata = runnable.invoke(SQL, config=config).response_metadata
    assert (metadata["composition"], len(metadata["adapters"])) == ("selection", 1)
    pinned = runnable.invoke(SQL, config={"configurable": {"adapters": ["dates"]}})
    assert pinned.response_metadata["adapters"][0]["name"] == "dates"


def test_a_configurable_folder_pool_is_not_embedded_again(
    llm: ChatLoraRetriever, loads_engine, pool, tmp_path, monkeypatch
):
    """LangChain makes a chat model anew for every configured run; they share the retriever of one folder's pool."""
    encoder = llm.retriever.encoder
    encoded: list[str] = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: (encoded.extend(texts), encode(texts))[1])
    pool.save(tmp_path / "pool")
    folder = ChatLoraRetriever(base_model="fake/base", pool=tmp_path / "pool", encoder=encoder)
    runnable = folder.configurable_fields(top_k=ConfigurableField(id="top_k"))
    for top_k in (1, 2, 3):
        message = runnable.invoke(SQL, config={"configurable": {"top_k": top_k}})
        assert len(message.response_metadata["adapters"]) == top_k
    samples = [sample.input for name in pool.names for sample in pool.state[name].samples]
    for sample in samples:
        assert sum(text.endswith(sample) for text in encoded) == 1, sample


def test_rate_limiter_is_asked(llm: ChatLoraRetriever) -> None:
    """A rate limiter is acquired for every call."""
    from langchain_core.rate_limiters import InMemoryRateLimiter

    class Counting(InMemoryRateLimiter):
        count = 0

        def acquire(self, *, blocking: bool = True) -> bool:
            Counting.count += 1
            return True

    limited = llm.model_copy(update={"rate_limiter": Counting()})
    limited.batch(["a", "b"])
    assert Counting.count == 2


def test_tracing_parameters(llm: ChatLoraRetriever) -> None:
    """Traces name the provider, the model and the sampling."""
    params = llm._get_ls_params(stop=["x"])
    assert params["ls_provider"] == "lora-retriever"
    assert params["ls_model_name"] == "fake/base"
    assert (params["ls_temperature"], params["ls_stop"]) == (0.0, ["x"])
    assert not llm.is_lc_serializable()


def test_tokens_are_counted_by_the_tokenizer(llm: ChatLoraRetriever, tokenizer) -> None:
    """Counts are the base model's own, template included."""
    assert llm.get_num_tokens("abc") == 3
    assert llm.get_num_tokens_from_messages([SystemMessage("a"), HumanMessage("b")]) == len(
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            add_generation_prompt=True, return_dict=False,
        )
    )  # fmt: skip


def test_v1_output(llm: ChatLoraRetriever) -> None:
    """With `output_version="v1"` content is standard blocks, streamed or not."""
    v1 = llm.model_copy(update={"output_version": "v1"})
    assert v1.invoke(SQL).content == [{"type": "text", "text": "The answer."}]
    assert _added(v1.stream(SQL)).content_blocks[0]["text"] == "The answer."


async def test_event_streams(llm: ChatLoraRetriever) -> None:
    """Both event protocols end with the routed answer."""
    events = [event async for event in llm.astream_events(SQL, version="v2")]
    assert events[-1]["data"]["output"].response_metadata["adapters"]
    stream = llm.stream_events(SQL, version="v3")
    assert list(stream)
    assert stream.output.text == "The answer."


def test_a_deep_copy_has_its_own_lists(llm: ChatLoraRetriever) -> None:
    """What is changed in a copy's settings stays there; engine, pool and retriever are shared."""
    copied = copy.deepcopy(llm)
    copied.stop.append("x")
    assert llm.stop == []
    assert copied.retriever is llm.retriever
    assert copied.base_model is llm.base_model


def test_another_base_model_brings_its_own_name_and_profile(engine) -> None:
    """What was found out from the old one goes with it."""
    llm = ChatLoraRetriever(base_model="org/one")
    llm.base_model = "org/two"
    assert (llm.model_name, llm.profile["name"]) == ("org/two", "org/two")
    assert llm.model_copy(update={"base_model": "org/three"}).profile["name"] == "org/three"
    named = ChatLoraRetriever(base_model="org/one", model_name="mine", profile={"max_input_tokens": 7})
    named.base_model = "org/two"
    assert (named.model_name, named.profile) == ("mine", {"max_input_tokens": 7})


def test_what_is_no_encoder_is_refused(engine) -> None:
    """At construction, and by assignment."""
    with pytest.raises(ValueError, match="encoder=3 is not allowed"):
        ChatLoraRetriever(base_model="fake/base", encoder=3)
    llm = ChatLoraRetriever(engine=engine)
    encoder = llm.encoder
    with pytest.raises(ValueError, match="encoder=3 is not allowed"):
        llm.encoder = 3
    assert llm.encoder is encoder


@pytest.mark.parametrize(
    "prompt", [None, 3, b"x", object(), [None], [3], [("user",)], [("nobody", "x")], [{"role": "user"}], {},
               [HumanMessage([{"type": []}])]], ids=repr,
)  # fmt: skip
async def test_what_is_no_prompt_is_refused_in_words(llm: ChatLoraRetriever, engine, prompt: Any) -> None:
    """In every way of calling, and before anything is asked of the engine."""
    for call in (llm.invoke, llm.route, llm.get_num_tokens_from_messages, lambda given: list(llm.stream(given))):
        with pytest.raises(InvalidRequestError):
            call(prompt)
    for acall in (llm.ainvoke, llm.aroute):
        with pytest.raises(InvalidRequestError):
            await acall(prompt)
    assert not engine.requests


def test_tokens_of_any_prompt_are_counted(llm: ChatLoraRetriever) -> None:
    """Whatever `invoke` takes."""
    num = llm.get_num_tokens_from_messages([HumanMessage("b")])
    assert llm.get_num_tokens_from_messages("b") == llm.get_num_tokens_from_messages([("user", "b")]) == num


def test_repr_is_short(llm: ChatLoraRetriever) -> None:
    """Printing a chat model prints neither weights nor pool."""
    assert len(repr(llm)) < 1500


def test_a_pool_may_be_a_folder(engine, pool: AdapterPool, tmp_path, llm: ChatLoraRetriever) -> None:
    """A path is read into a pool."""
    pool.save(tmp_path / "pool")
    loaded = ChatLoraRetriever(base_model="fake/base", pool=tmp_path / "pool", encoder=llm.retriever.encoder)
    assert isinstance(loaded.pool, AdapterPool)
    assert loaded.route(SQL, top_k=1).names == ("sql",)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("max_tokens", -5), ("composition", "bogus"), ("pool", 7), ("stop", "x")],
)
def test_assignment_is_checked(llm: ChatLoraRetriever, name: str, value: Any) -> None:
    """What a constructor would refuse is refused, by assignment and in a copy, and nothing changes."""
    before = getattr(llm, name)
    with pytest.raises(ValueError, match=name):
        setattr(llm, name, value)
    with pytest.raises(ValueError, match=name):
        llm.model_copy(update={name: value})
    assert getattr(llm, name) == before


def test_assigning_a_pool_routes_in_it(llm: ChatLoraRetriever, pool: AdapterPool, write_adapter) -> None:
    """Of the chat model, and of a copy alone."""
    other = AdapterPool()
    other.add("other", write_adapter("other"), samples=[SQL])
    llm = ChatLoraRetriever(base_model="fake/base", pool=pool, encoder=llm.retriever.encoder, top_k=1)
    copied = llm.model_copy(update={"pool": other, "top_k": 2})
    assert copied.route(SQL).names == ("other",)
    assert llm.route(SQL).names == ("sql",)
    llm.pool = other
    llm.temperature = 0.5
    assert llm.route(SQL).names == ("other",)
    assert (llm.top_k, llm.temperature, copied.temperature) == (1, 0.5, 0.0)


def test_assigning_a_pool_beside_a_retriever_is_refused(llm: ChatLoraRetriever) -> None:
    """The retriever has its own."""
    with pytest.raises(ValueError, match="The pool is not the retriever's"):
        llm.pool = AdapterPool()


def test_assigning_a_base_model_renames_the_model() -> None:
    """Unless the caller gave the name."""
    llm = ChatLoraRetriever(base_model="fake/base")
    llm.base_model = "fake/other"
    assert llm.model_name == "fake/other"


def test_a_deep_copy_shares_what_is_loaded(llm: ChatLoraRetriever) -> None:
    """Settings are its own; the pool and the retriever are not copied."""
    copied = copy.deepcopy({"chain": [llm]})["chain"][0]
    copied.temperature = 0.9
    assert llm.temperature == 0.0
    assert copied.retriever is llm.retriever
    assert copied.invoke(SQL).text == llm.invoke(SQL).text


def test_pickling_takes_names_and_folders(llm: ChatLoraRetriever, write_adapter, tmp_path) -> None:
    """What another process can load travels as its name; what it cannot is said in words."""
    write_adapter("sql")
    pool = AdapterPool(tmp_path / "pool", create=True)
    pool.add("sql", tmp_path / "checkpoints" / "sql", samples=[SQL])
    named = ChatLoraRetriever(base_model="fake/base", pool=pool, temperature=0.3)
    restored = pickle.loads(pickle.dumps(named))
    assert (restored.pool.names, restored.temperature, restored.base_model) == (pool.names, 0.3, "fake/base")
    with pytest.raises(pickle.PicklingError, match="its pool, encoder lives in this process's memory"):
        pickle.dumps(ChatLoraRetriever(base_model="fake/base", pool=AdapterPool(), encoder=llm.retriever.encoder))


def test_a_stream_may_leave_usage_out(llm: ChatLoraRetriever) -> None:
    """`stream_usage=False` is heeded by streams; an answer as a whole always says what it used."""
    assert any(chunk.usage_metadata for chunk in llm.stream(SQL))
    assert not any(chunk.usage_metadata for chunk in llm.stream(SQL, stream_usage=False))
    assert llm.invoke(SQL, stream_usage=False).usage_metadata


def test_answers_begun_before_one_fails_are_aborted(llm: ChatLoraRetriever, engine, monkeypatch) -> None:
    """Of `n` answers none goes on in the engine when one of them is refused."""
    submit, engine.delay = engine.submit, 5.0

    def refuse_the_third(*args: Any, **kwargs: Any) -> Any:
        if len(engine.requests) == 2:
            raise InvalidRequestError("no more")
        return submit(*args, **kwargs)

    monkeypatch.setattr(engine, "submit", refuse_the_third)
    with pytest.raises(InvalidRequestError, match="no more"):
        llm.invoke(SQL, n=3)
    assert engine.num_aborted == 2


def test_an_adapter_that_may_not_be_meant_for_the_model_is_told_once(
    llm: ChatLoraRetriever, engine, pool: AdapterPool, write_adapter, caplog, recwarn
) -> None:
    """It is served, as its tensors fit; a warning and the log name it, and what it was trained for."""
    folder = write_adapter("foreign")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/another"}))
    missing = {"foreign": ("v_proj",)}
    engine.register = lambda adapters: [Registration(None, missing.get(adapter.name, ())) for adapter in adapters]
    pool.add("foreign", folder, samples=[SQL])
    assert llm.invoke(SQL, adapters=["foreign"]).response_metadata["adapters"][0]["name"] == "foreign"
    said = [record.message for record in caplog.records]
    assert any("'foreign'" in text and "lacks 1 of the 2 modules" in text for text in said)
    assert any("trained for the base model 'org/another'; the one here is 'fake/base'" in text for text in said)
    assert sum("'foreign'" in str(warning.message) for warning in recwarn.list) == 2
    llm.invoke(SQL, adapters=["foreign"])
    assert [record.message for record in caplog.records] == said
