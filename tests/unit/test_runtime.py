"""What of a pool suits an engine and an encoder is derived, and the pool is only read."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, LoraRetriever
from langchain_lora_retriever.engine import EngineWorker
from langchain_lora_retriever.errors import (
    EngineDeadError,
    InvalidAdapterError,
    InvalidRequestError,
    PoolError,
    UnknownAdapterError,
)
from langchain_lora_retriever.pool import folder as folder_module
from langchain_lora_retriever.pool import pool as pool_module
from langchain_lora_retriever.testing import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TEXTS = ["How many users signed up in May?", "Write the date in ISO format.", "Good morning in French?"]


class Constant:
    """An encoder of any dimension, which tells texts apart by their lengths."""

    def __init__(self, dimension: int) -> None:
        self.name, self.dimension = f"constant-{dimension}", dimension

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """`[n, dimension]`."""
        return np.array([np.cos(np.arange(self.dimension) * len(text)) for text in texts], np.float32)


@pytest.fixture
def mixed(write_adapter: Callable[..., Path]) -> AdapterPool:
    """Two adapters of 8 features, two of 16."""
    pool = AdapterPool()
    for name, size in (("narrow-a", 8), ("narrow-b", 8), ("wide-a", 16), ("wide-b", 16)):
        pool.add(name, write_adapter(name, size=size), samples=[f"{name} {i}" for i in range(3)])
    return pool


def model(pool: AdapterPool, size: int, *, encoder: Any = None, **settings: Any) -> ChatLoraRetriever:
    """A chat model on a base model of `size` features."""
    engine = FakeEngine(name=f"base-{size}", module_shapes={"q_proj": (size, size)})
    retriever = LoraRetriever(pool, encoder or Constant(16))
    return ChatLoraRetriever(engine=engine, retriever=retriever, weights="uniform", **settings)


def names_of(llm: ChatLoraRetriever, text: str = TEXTS[0]) -> set[str]:
    """The adapters that a prompt runs, of as many as there are."""
    return {adapter["name"] for adapter in llm.invoke(text, top_k=8).response_metadata["adapters"]}


@pytest.mark.filterwarnings("ignore:refused")
def test_two_base_models_share_a_pool(mixed: AdapterPool) -> None:
    """Each is served its own adapters, one after the other and at once; the pool has them all, and does not change."""
    version = mixed.version
    narrow, wide = model(mixed, 8), model(mixed, 16)
    for _ in range(2):
        assert names_of(narrow) == {"narrow-a", "narrow-b"}
        assert names_of(wide) == {"wide-a", "wide-b"}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(names_of, [narrow, wide] * 20))
    assert found == [{"narrow-a", "narrow-b"}, {"wide-a", "wide-b"}] * 20
    assert set(narrow.rejected) == {"wide-a", "wide-b"}
    assert set(wide.rejected) == {"narrow-a", "narrow-b"}
    assert (mixed.version, len(mixed), dict(mixed.rejected)) == (version, 4, {})


@pytest.mark.filterwarnings("ignore:refused")
def test_an_adapter_without_samples_is_pinned_and_not_found(write_adapter: Callable[..., Path]) -> None:
    """It runs where it is named, routing passes it by, and the model says what to do."""
    pool = AdapterPool()
    pool.add("found", write_adapter("found"), samples=["a question"])
    pool.add("plain", write_adapter("plain"))
    pool.add("wide", write_adapter("wide", size=16))
    llm = model(pool, 8)
    assert names_of(llm) == {"found"}
    assert llm.invoke(TEXTS[0], adapters=["plain"]).response_metadata["adapters"][0]["name"] == "plain"
    assert set(llm.undescribed) == {"plain"}
    assert "samples.jsonl" in llm.undescribed["plain"]
    assert set(llm.rejected) == {"wide"}
    pool.update("plain", samples=["another question"])
    assert names_of(llm) == {"found", "plain"}
    assert not llm.undescribed


@pytest.mark.filterwarnings("ignore:refused", "ignore:not found")
def test_two_encoders_share_a_pool(write_adapter: Callable[..., Path]) -> None:
    """An adapter that came with an embedding is found by the encoder it fits, and may be pinned with the other."""
    pool = AdapterPool()
    pool.add("four", write_adapter("four"), embedding=np.ones(4))
    pool.add("five", write_adapter("five"), embedding=np.ones(5))
    pool.add("any", write_adapter("any"), samples=["any"])
    version = pool.version
    four, five = model(pool, 8, encoder=Constant(4)), model(pool, 8, encoder=Constant(5))

    async def both() -> list[set[str]]:
        answers = await asyncio.gather(*(llm.ainvoke("x" * i, top_k=8) for i in range(1, 20) for llm in (four, five)))
        return [{adapter["name"] for adapter in answer.response_metadata["adapters"]} for answer in answers]

    assert asyncio.run(both()) == [{"four", "any"}, {"five", "any"}] * 19
    assert (set(four.rejected), set(five.rejected)) == ({"five"}, {"four"})
    assert four.invoke("x", adapters=["five"]).response_metadata["adapters"][0]["name"] == "five"
    assert pool.version == version


@pytest.mark.filterwarnings("ignore:refused")
def test_reading_changes_no_pool(mixed: AdapterPool) -> None:
    """Neither routing, nor counting, nor answering."""
    llm, state = model(mixed, 8), mixed.state
    llm.get_num_tokens("hello")
    llm.get_num_tokens_from_messages([("user", "hello")])
    llm.route("hello")
    llm.invoke("hello")
    assert mixed.state is state


@pytest.mark.filterwarnings("ignore:refused")
def test_what_is_refused_follows_the_pool(mixed: AdapterPool, write_adapter: Callable[..., Path]) -> None:
    """A refused adapter that is replaced by one that fits is served; one that is removed is nowhere."""
    llm = model(mixed, 8)
    llm.invoke("hello")
    with pytest.raises(InvalidAdapterError, match="'wide-a'"):
        llm.invoke("hello", adapters=["wide-a"])
    mixed.update("wide-a", write_adapter("wide-a", size=8))
    mixed.remove("wide-b")
    assert "wide-a" in names_of(llm)
    assert not llm.rejected
    with pytest.raises(UnknownAdapterError, match="'wide-b'"):
        llm.invoke("hello", adapters=["wide-b"])


@pytest.mark.filterwarnings("ignore:refused")
def test_excluding_what_is_refused_does_nothing(mixed: AdapterPool) -> None:
    """It would not run anyway."""
    llm = model(mixed, 8, exclude_adapters=["wide-a", "narrow-a"])
    assert names_of(llm) == {"narrow-b"}


def test_what_is_refused_is_told_once(mixed: AdapterPool, caplog: pytest.LogCaptureFixture) -> None:
    """By a warning and in the log, however many calls and copies there are."""
    llm = model(mixed, 8)
    copies = (llm, llm.model_copy(update={"top_k": 1}), llm.model_copy())
    with pytest.warns(UserWarning, match="does not fit") as told:
        _ = [copied.invoke("hello") for copied in copies]
    assert len(told) == 2
    assert sum("does not fit" in record.message for record in caplog.records) == 2


async def test_a_ready_runtime_takes_no_thread(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is looked at when it has changed, and not for every call."""
    llm = model(pool, 8)
    await llm.ainvoke("hello")
    looks: list[int] = []
    register = llm.runtime.engine.register
    monkeypatch.setattr(llm.runtime.engine, "register", lambda new: (looks.append(len(new)), register(new))[1])
    for _ in range(3):
        await llm.ainvoke("hello")
    assert not looks
    pool.remove("sql")
    await llm.ainvoke("hello")
    assert looks == [0]


def test_a_model_comes_from_one_place(llm: ChatLoraRetriever) -> None:
    """A base model, or an engine that has one."""
    with pytest.raises(ValueError, match="There is no model"):
        ChatLoraRetriever()
    with pytest.raises(ValueError, match="its own base_model"):
        ChatLoraRetriever(engine=llm.engine, base_model="x")
    with pytest.raises(ValueError, match="its own engine_config"):
        ChatLoraRetriever(engine=llm.engine, engine_config={"max_model_len": 64})
    for wrong in (3, EngineWorker, object()):
        with pytest.raises(ValueError, match="pass an EngineClient"):
            ChatLoraRetriever(engine=wrong)


def test_settings_have_one_type_whatever_was_given(pool: AdapterPool, llm: ChatLoraRetriever, tmp_path: Path) -> None:
    """A folder, a name, a dictionary and nothing at all become what they stand for."""
    pool.save(tmp_path / "pool")
    for given in ({"pool": tmp_path / "pool"}, {"pool": str(tmp_path / "pool")}, {"pool": pool}, {"pool": None}, {}):
        own: dict[str, Any] = {"engine_config": {"max_model_len": 64}, "encoder": "some/name", **given}
        made = ChatLoraRetriever(base_model="fake/base", **own)
        assert isinstance(made.pool, AdapterPool)
        assert isinstance(made.retriever, LoraRetriever)
        assert made.retriever.pool is made.pool
        assert made.encoder.name == "some/name"
        assert isinstance(made.instruction, str)
        assert made.engine_config.max_model_len == 64
    assert made.model_copy(update={"encoder": llm.encoder}).retriever.encoder is llm.encoder


def test_a_scripted_engine_answers_in_order() -> None:
    """Whole and streamed, alone, without a pool; then from the first again."""
    llm = ChatLoraRetriever(engine=FakeEngine(["first", "second"]))
    assert [llm.invoke("x").content for _ in range(3)] == ["first", "second", "first"]
    assert ["".join(chunk.content for chunk in llm.stream("x")) for _ in range(2)] == ["second", "first"]
    with pytest.raises(InvalidRequestError, match="at least one"):
        FakeEngine([])
    with pytest.raises(InvalidRequestError, match="pass a list"):
        FakeEngine("text")


async def test_closing_a_ready_engine_is_final() -> None:
    """It is closed with the chat model, which cannot make another."""
    llm = ChatLoraRetriever(engine=FakeEngine())
    await llm.aclose()
    with pytest.raises(EngineDeadError):
        await llm.ainvoke("hello")


async def test_a_pool_named_in_a_coroutine_is_read_in_a_thread(
    pool: AdapterPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first call, once; a folder that is not there is told at once, one that cannot be read by the call."""
    pool.save(tmp_path / "pool")
    readers: list[str] = []
    list_folders = folder_module.list_folders
    monkeypatch.setattr(
        pool_module,
        "list_folders",
        lambda root: (readers.append(threading.current_thread().name), list_folders(root))[1],
    )
    settings: dict[str, Any] = {"engine": FakeEngine(), "encoder": Constant(16)}
    llm = ChatLoraRetriever(pool=tmp_path / "pool", **settings)
    assert not llm.pool.is_read
    assert "not read yet" in repr(llm.pool)
    await asyncio.gather(*(llm.ainvoke("hello") for _ in range(8)), llm.aroute("hello"))
    assert len(readers) == 1
    assert readers[0] != threading.current_thread().name
    assert llm.pool.names == pool.names
    with pytest.raises(ValueError, match="nowhere"):
        ChatLoraRetriever(pool=tmp_path / "nowhere", **settings)
    (tmp_path / "empty").mkdir()
    empty = ChatLoraRetriever(pool=tmp_path / "empty", **settings)
    with pytest.raises(PoolError, match="is empty"):
        await empty.ainvoke("hello")


async def test_one_thread_looks_at_a_change_for_all_who_wait(
    pool: AdapterPool, write_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that come while it looks wait for it; one that comes after another change for the look that sees it."""
    engine = FakeEngine()
    llm = ChatLoraRetriever(engine=engine, retriever=LoraRetriever(pool, Constant(16)), weights="uniform")
    await llm.ainvoke("hello")
    looking, may_look, lookers = threading.Event(), threading.Event(), []
    register = FakeEngine.register

    def slow(self: FakeEngine, adapters: Any) -> Any:
        lookers.append(threading.current_thread().name)
        looking.set()
        assert may_look.wait(30)
        return register(self, adapters)

    monkeypatch.setattr(FakeEngine, "register", slow)
    pool.add("late", write_adapter("late"), samples=["late"])
    calls = [asyncio.create_task(llm.ainvoke("hello", adapters=["late"])) for _ in range(20)]
    await asyncio.to_thread(looking.wait, 30)
    calls[0].cancel()
    pool.add("later", write_adapter("later", seed=1), samples=["later"])
    last = asyncio.create_task(llm.ainvoke("hello", adapters=["later"]))
    await asyncio.sleep(0)
    assert len(lookers) == 1
    may_look.set()
    answers = await asyncio.gather(*calls, last, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert {answer.response_metadata["adapters"][0]["name"] for answer in answers[1:-1]} == {"late"}
    assert answers[-1].response_metadata["adapters"][0]["name"] == "later"
    assert len(lookers) == 2


async def test_a_look_that_fails_fails_each_call_anew(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two callers get one exception object, whose traceback would gather the frames of all."""

    def broken(self: FakeEngine, adapters: Any) -> Any:
        raise PoolError("no look")

    monkeypatch.setattr(FakeEngine, "register", broken)
    llm = ChatLoraRetriever(engine=FakeEngine(), retriever=LoraRetriever(pool, Constant(16)))
    errors = await asyncio.gather(*(llm.ainvoke("hello") for _ in range(8)), return_exceptions=True)
    assert {str(error) for error in errors} == {"no look"}
    assert len(set(map(id, errors))) == 8


async def test_warming_up_is_what_the_first_call_would_wait_for(mixed: AdapterPool) -> None:
    """The pool is embedded and the engine has looked at it; the first call embeds its own text and nothing else."""
    for warm_up in (lambda llm: asyncio.to_thread(llm.warm_up), ChatLoraRetriever.awarm_up):
        encoder = Constant(16)
        encoded: list[int] = []
        encode = encoder.encode
        encoder.encode = lambda texts, encode=encode, encoded=encoded: (encoded.append(len(texts)), encode(texts))[1]  # type: ignore[method-assign]
        llm = model(mixed, 8, encoder=encoder)
        with pytest.warns(UserWarning, match="refused"):
            await warm_up(llm)
        assert set(llm.rejected) == {"wide-a", "wide-b"}
        assert sum(encoded) == 12 + 1
        await warm_up(llm)
        await llm.ainvoke(TEXTS[0])
        assert sum(encoded) == 12 + 2


def test_a_model_without_adapters_warms_up_without_an_encoder() -> None:
    """None is loaded that nobody will ask."""
    encoder = Constant(16)
    encoder.encode = lambda texts: pytest.fail("embedded")  # type: ignore[method-assign]
    model(AdapterPool(), 8, encoder=encoder).warm_up()
