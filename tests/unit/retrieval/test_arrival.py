"""What the callers of an event loop have done once for all of them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from langchain_lora_retriever.errors import EncoderError
from langchain_lora_retriever.retrieval.arrival import SharedWork


class Work:
    """Counts how often it is begun; ends when it is let."""

    def __init__(self, error=None):
        self.num_begun = 0
        self.may_end = threading.Event()
        self._error = error
        self._threads = ThreadPoolExecutor(4)

    def begin(self):
        """Begin it in another thread."""
        self.num_begun += 1
        return self._threads.submit(self._run)

    def _run(self):
        assert self.may_end.wait(60)
        if self._error is not None:
            raise self._error


async def start(coroutines):
    """Tasks that have all come as far as they can."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0)
    return tasks


async def test_work_under_way_serves_all_who_come():
    """It is begun once."""
    work = Work()
    shared = SharedWork(work.begin)
    tasks = await start(shared.join() for _ in range(50))
    work.may_end.set()
    await asyncio.gather(*tasks)
    assert work.num_begun == 1


async def test_who_comes_after_it_ended_begins_it_anew():
    """Nobody is served what was done before they came."""
    work = Work()
    work.may_end.set()
    shared = SharedWork(work.begin)
    await shared.join()
    await shared.join()
    assert work.num_begun == 2


async def test_callers_go_on_in_turns_as_they_came():
    """Twelve in three turns of the loop."""
    work = Work()
    shared = SharedWork(work.begin)
    turns = []
    turn = 0

    async def ask(index):
        await shared.join()
        turns.append((turn, index))

    tasks = await start(ask(i) for i in range(12))
    work.may_end.set()
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    assert [index for _, index in turns] == list(range(12))
    assert len({turn for turn, _ in turns}) == 3


async def test_a_failure_is_raised_anew_for_each():
    """One shared error would gather the frames of all."""
    work = Work(EncoderError("no"))
    shared = SharedWork(work.begin)
    tasks = await start(shared.join() for _ in range(3))
    work.may_end.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, EncoderError) for error in errors)
    assert len({id(error) for error in errors}) == 3
    with pytest.raises(EncoderError, match="no"):
        await shared.join()


async def test_cancelling_one_leaves_the_others():
    """The work goes on for them."""
    work = Work()
    shared = SharedWork(work.begin)
    tasks = await start(shared.join() for _ in range(3))
    tasks[0].cancel()
    work.may_end.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [None, None]


def test_event_loops_have_their_own():
    """A loop that has ended is not waited for."""
    work = Work()
    work.may_end.set()
    shared = SharedWork(work.begin)
    for _ in range(3):
        asyncio.run(shared.join())
    assert work.num_begun == 3
