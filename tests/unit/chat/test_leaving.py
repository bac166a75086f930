"""Callers that leave, and calls that take too long: what they asked for is not generated."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.output_parsers import StrOutputParser

from langchain_lora_retriever import ChatLoraRetriever
from langchain_lora_retriever.engine import start
from langchain_lora_retriever.errors import (
    EncoderError,
    InvalidRequestError,
)
from makers import until, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SQL = "How many users are in the table?"


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
    await until(lambda: engine.num_aborted == 1)


def test_leaving_a_chains_astream_is_silent_when_the_loop_ends(llm: ChatLoraRetriever, engine) -> None:
    """A loop that ends closes all generators at once, those of a chain and those within."""
    engine.delay = 0.01
    told: list[dict[str, Any]] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async for _ in (llm | StrOutputParser()).astream(SQL):
            break
        kept.append(llm.astream(SQL))
        await anext(kept[0])

    kept: list[Any] = []
    asyncio.run(leave())
    assert told == []
    wait_until(lambda: engine.num_aborted == 2)


async def test_cancelling_ainvoke_aborts(llm: ChatLoraRetriever, engine) -> None:
    """A cancelled task frees its request and no other."""
    engine.delay = 0.05
    cancelled, other = (asyncio.create_task(llm.ainvoke(SQL)) for _ in range(2))
    await until(lambda: len(engine.requests) == 2)
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
    await until(lambda: engine.num_aborted == 4)  # it hears of the last one just after its caller


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
    monkeypatch.setattr(start, "load_base_model", lambda source: release.wait(60))
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
    engine.admission = dataclasses.replace(engine.admission, max_model_len=1 << 20)
    submit = engine.submit

    def noted(*args: Any, **kwargs: Any) -> Any:
        names.append(threading.current_thread().name)
        return submit(*args, **kwargs)

    engine.submit = noted
    await llm.ainvoke("short")
    await llm.ainvoke("x" * 20_000)
    assert names[0] == threading.current_thread().name
    assert names[1] != threading.current_thread().name


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
