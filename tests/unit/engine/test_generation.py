"""The caller's end: sync and async iteration, results, cancellation."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from langchain_lora_retriever.engine.api import Delta, Usage
from langchain_lora_retriever.engine.generation import Generation, deliver
from langchain_lora_retriever.errors import EngineDeadError, EngineError, RequestAbortedError
from makers import until

FIRST = Delta("ab", (1, 2), None, None, None)
LAST = Delta("c", (3,), None, "stop", Usage(4, 0, 3))


class Feeder:
    """A generation fed by another thread, and a count of its aborts."""

    def __init__(self, *deltas: Delta, error: Exception | None = None) -> None:
        self.num_aborts = 0
        self.generation = Generation(self._on_abort)
        self._thread = threading.Thread(target=self._feed, args=(deltas, error))
        self._thread.start()

    def _feed(self, deltas: tuple[Delta, ...], error: Exception | None) -> None:
        for delta in deltas:
            time.sleep(0.01)
            self.generation.put(delta)
        if error:
            self.generation.fail(error)

    def _on_abort(self) -> None:
        self.num_aborts += 1


def test_iteration_gives_every_delta() -> None:
    """A sync iterator yields the deltas in order and ends; nothing is aborted."""
    feeder = Feeder(FIRST, LAST)
    assert list(feeder.generation) == [FIRST, LAST]
    assert feeder.num_aborts == 0


async def test_async_iteration_gives_every_delta() -> None:
    """An async iterator does the same without blocking the loop."""
    feeder = Feeder(FIRST, LAST)
    assert [delta async for delta in feeder.generation] == [FIRST, LAST]
    assert feeder.num_aborts == 0


def test_an_iterator_may_go_on_in_another_loop() -> None:
    """Whoever asks for a delta is told in the loop that asks, not in the first one's, which runs no more."""
    deltas = aiter(Feeder(FIRST, LAST).generation)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    try:
        got = [loop.run_until_complete(asyncio.wait_for(anext(deltas), 5)) for loop in loops]
    finally:
        for loop in loops:
            loop.close()
    assert got == [FIRST, LAST]


async def test_results_join_the_deltas() -> None:
    """`result` and `aresult` give the whole text, tokens and usage, as often as asked."""
    generation = Feeder(FIRST, LAST).generation
    completion = await generation.aresult()
    assert (completion.text, completion.token_ids, completion.usage) == ("abc", (1, 2, 3), Usage(4, 0, 3))
    assert generation.result() == completion


async def test_a_result_that_is_there_is_not_waited_for() -> None:
    """`aresult` of a generation that has ended returns, or raises, at once."""
    done, failed = Generation(lambda: None), Generation(lambda: None)
    deliver([(done, LAST), (failed, EngineError("boom"))])
    assert (await asyncio.wait_for(done.aresult(), 1)).text == "c"
    with pytest.raises(EngineError, match="boom"):
        await asyncio.wait_for(failed.aresult(), 1)


async def test_a_step_wakes_an_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step gives to many readers and awaiting tasks of a loop comes by one wake-up; threads are woken too."""
    loop, wakings = asyncio.get_running_loop(), []
    call_in_loop = loop.call_soon_threadsafe

    def count(*arguments: object) -> object:
        wakings.append(arguments)
        return call_in_loop(*arguments)  # type: ignore[arg-type]

    generations = [Generation(lambda: None) for _ in range(9)]
    tasks = [asyncio.ensure_future(generation.aresult()) for generation in generations[:4]]
    streams = [aiter(generation) for generation in generations[4:8]]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    thread_texts: list[str] = []
    reader = threading.Thread(target=lambda: thread_texts.extend(delta.text for delta in generations[8]))
    reader.start()
    await until(lambda: all(each._on_news or each._on_end for each in generations))
    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    deliver([(generation, FIRST) for generation in generations])
    assert [await first for first in firsts] == [FIRST] * 4
    assert len(wakings) == 1
    assert not any(task.done() for task in tasks), "nobody waits for a part"
    deliver([(generations[0], EngineError("boom")), *((generation, LAST) for generation in generations[1:])])
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert len(wakings) == 2, "who awaits the end is not woken before"
    assert [getattr(result, "text", str(result)) for result in results] == ["boom", "abc", "abc", "abc"]
    reader.join(5)
    assert thread_texts == ["ab", "c"]
    for stream in streams:
        await stream.aclose()


def test_a_closed_loop_disturbs_nobody() -> None:
    """A loop that was closed while a task waited in it is passed over, and the others hear of the news."""
    lost, kept = Generation(lambda: None), Generation(lambda: None)
    loop = asyncio.new_event_loop()
    task = loop.create_task(lost.aresult())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    deliver([(lost, LAST), (kept, LAST)])
    assert lost.result(1) == kept.result(1)
    assert not task.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_leaving_an_iterator_aborts() -> None:
    """Closing a stream early tells the engine, once."""
    feeder = Feeder(FIRST)
    iterator = iter(feeder.generation)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert feeder.num_aborts == 1


async def test_cancelling_an_awaiting_task_aborts() -> None:
    """Cancellation of `aresult` and of an async iterator reaches the engine."""
    for use in (lambda g: g.aresult(), lambda g: anext(aiter(g))):
        feeder = Feeder()
        task = asyncio.ensure_future(use(feeder.generation))
        await until(lambda feeder=feeder: feeder.generation._on_news or feeder.generation._on_end)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert feeder.num_aborts == 1


def test_a_generation_that_is_handed_over() -> None:
    """A function gets what has come and what comes, in order, the error or the abort that ends it among them."""
    got: list[Delta | Exception] = []
    generation = Generation(lambda: None)
    generation.put(FIRST)
    generation.hand_over(got.append)
    generation.put(LAST)
    assert got == [FIRST, LAST]
    assert generation.result().text == "abc"
    for end in (lambda one: one.fail(EngineError("broken")), lambda one: one.abort()):
        got, generation = [], Generation(lambda: None)
        generation.hand_over(got.append)
        generation.put(FIRST)
        end(generation)
        assert got[0] == FIRST
        assert isinstance(got[1], EngineError | RequestAbortedError)
        late: list[Delta | Exception] = []
        generation.hand_over(late.append)
        assert [type(item) for item in late] == [type(got[1])]


def test_errors_reach_the_caller() -> None:
    """A failed step raises from an iterator, after what had arrived, and from `result`."""
    feeder = Feeder(FIRST, error=EngineError("boom"))
    iterator = iter(feeder.generation)
    assert next(iterator) == FIRST
    with pytest.raises(EngineError, match="boom"):
        next(iterator)
    with pytest.raises(EngineError, match="boom"):
        feeder.generation.result()


def test_a_result_may_time_out_and_still_come() -> None:
    """A timeout leaves the request running; an abort ends it."""
    feeder = Feeder()
    with pytest.raises(TimeoutError):
        feeder.generation.result(timeout=0.01)
    assert not feeder.generation.is_done
    feeder.generation.abort()
    with pytest.raises(RequestAbortedError):
        feeder.generation.result()


def test_an_orphan_keeps_what_has_ended_and_looks_at_no_lock() -> None:
    """In a forked process a lock may be held by a thread that is not there."""
    ended, running = Generation(lambda: None), Generation(lambda: None)
    usage = Usage(1, 0, 1)
    ended.put(Delta("yes", (5,), None, "stop", usage))
    running.put(Delta("hal", (5,), None, None, None))
    for generation in (ended, running):
        generation._lock.acquire()
        generation.orphan(EngineDeadError("forked"))
    assert (ended.result(1).text, ended.result(1).usage) == ("yes", usage)
    with pytest.raises(EngineDeadError, match="forked"):
        running.result(1)
