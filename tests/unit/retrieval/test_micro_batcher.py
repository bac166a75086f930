"""Calls that are embedded together, each with the outcome of its own texts."""

from __future__ import annotations

import asyncio
import signal
import threading
from itertools import pairwise

import numpy as np
import pytest

from langchain_lora_retriever.errors import EncoderError
from langchain_lora_retriever.retrieval import micro_batcher
from langchain_lora_retriever.retrieval.micro_batcher import MicroBatcher


class Encoder:
    """One number per text; fails over texts that begin with "bad". Notes its batches, and may be held up."""

    def __init__(self, failure=ValueError):
        self.batches = []
        self.failure = failure
        self.is_busy, self.is_free = threading.Event(), threading.Event()
        self.is_free.set()

    def __call__(self, texts):
        """Embed."""
        self.batches.append(list(texts))
        self.is_busy.set()
        self.is_free.wait(30)
        if any(text.startswith("bad") for text in texts):
            raise self.failure("refused")
        return np.array([[float(text)] for text in texts], dtype=np.float32)


def values(outcomes):
    """The numbers embedded, or the names of the errors."""
    return [type(o).__name__ if isinstance(o, BaseException) else float(o[0]) for o in outcomes]


async def test_the_first_of_many_do_not_wait_for_the_last():
    """A full batch is embedded while later texts gather in the next; everybody gets the rows of their own texts."""
    encoder = Encoder()
    batcher = MicroBatcher(encoder, max_texts=4)
    outcomes = await asyncio.gather(*(batcher.arun([str(i), str(i + 100)]) for i in range(9)))
    assert [values(each) for each in outcomes] == [[i, i + 100] for i in range(9)]
    assert max(map(len, encoder.batches)) == 4


async def test_a_loop_goes_on_between_those_who_waited_together():
    """They go on a few at a time, as they came, each with work of its own: whatever else is ready has its turn."""
    batcher = MicroBatcher(Encoder())
    done = []
    turns = []

    async def call(number):
        await batcher.arun([str(number)])
        done.append(number)

    async def others():
        while len(done) < 40:
            turns.append(len(done))
            await asyncio.sleep(0)

    await asyncio.gather(others(), *map(call, range(40)))
    assert done == [*range(40)]
    assert max(after - before for before, after in pairwise(turns)) < 8


async def test_more_texts_than_a_batch_takes():
    """They are embedded in several batches, in order, from a thread and from an event loop."""
    encoder = Encoder()
    batcher = MicroBatcher(encoder, max_texts=4)
    texts = [str(i) for i in range(10)]
    assert values(batcher.run(texts)) == values(await batcher.arun(texts)) == [*range(10)]
    assert list(map(len, encoder.batches)) == [4, 4, 2] * 2


@pytest.mark.parametrize("failure", [ValueError, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("num_bad", [1, 2, 39, 40])
async def test_bad_texts_fail_alone(failure, num_bad):
    """Whatever the encoder raises over some of forty callers' texts, the others get their vectors."""
    encoder = Encoder(failure)
    batcher = MicroBatcher(encoder)
    texts = [f"bad {i}" if i * num_bad // 40 != (i + 1) * num_bad // 40 else str(i) for i in range(40)]
    outcomes = await asyncio.wait_for(asyncio.gather(*(batcher.arun([text]) for text in texts)), 60)
    assert [values(each)[0] for each in outcomes] == [
        failure.__name__ if text.startswith("bad") else float(text) for text in texts
    ]
    assert values(await batcher.arun(["1"])) == [1]


@pytest.mark.parametrize("rows", [[[1.0]] * 3, [], None, 7])
def test_another_number_of_rows_is_an_error(rows):
    """A batch function that breaks its word fails the texts, and nobody waits for ever."""
    batcher = MicroBatcher(lambda texts: rows if len(texts) > 1 else [np.ones(1)])
    assert values(batcher.run(["1", "2"])) == [1, 1]
    batcher = MicroBatcher(lambda _: rows)
    assert all(isinstance(outcome, Exception) for outcome in batcher.run(["1", "2", "3", "4"]))


def test_equal_texts_of_several_callers_are_embedded_once():
    """While the encoder is busy five threads ask for the same text: it is one of the next batch."""
    encoder = Encoder()
    batcher = MicroBatcher(encoder)
    encoder.is_free.clear()
    found = []
    first = threading.Thread(target=batcher.run, args=(["0"],))
    first.start()
    assert encoder.is_busy.wait(30)
    others = [threading.Thread(target=lambda: found.append(values(batcher.run(["1", "1", "2"])))) for _ in range(5)]
    for thread in others:
        thread.start()
    encoder.is_free.set()
    for thread in [first, *others]:
        thread.join()
    assert found == [[1, 1, 2]] * 5
    assert all(len(set(batch)) == len(batch) for batch in encoder.batches)


def test_an_interrupt_ends_the_main_threads_call_alone():
    """Ctrl-C while the main thread embeds for others too: it gets the interrupt, they get their vectors."""
    encoder = Encoder()

    def encode(texts):
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        return encoder(texts)

    batcher = MicroBatcher(encode)
    batch = batcher._join(["2"])  # of a caller that has yet to come to the encoder
    with pytest.raises(KeyboardInterrupt):
        batcher.run(["1"])
    other = threading.Thread(target=batcher._embed, args=(batch,))
    other.start()
    other.join(30)
    assert values(batch.outcomes.result(0).values()) == [2, 1]


def test_a_panic_of_a_rust_tokenizer_is_the_texts_error():
    """It is no `Exception`, but no interrupt either: in the main thread too it fails its own text alone."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    batcher = MicroBatcher(Encoder(panic))
    assert values(batcher.run(["1", "bad", "2"])) == [1, "PanicException", 2]


def test_an_encoder_that_says_it_cannot_work_is_asked_once():
    """An `EncoderError` of the encoder's own is no text's fault: all get it, and it is not tried again in halves."""
    encoder = Encoder(EncoderError)
    batcher = MicroBatcher(encoder)
    outcomes = batcher.run(["bad", *map(str, range(30))])
    assert values(outcomes) == ["EncoderError"] * 31
    assert len(encoder.batches) == 1
    assert outcomes[0].__traceback__ is None  # its frames hold the texts of all


def test_an_encoder_that_fails_over_everything_is_given_up(monkeypatch):
    """One that is away, and takes its time to say so, is not asked for each of 64 texts."""
    monkeypatch.setattr(micro_batcher, "_PATIENCE_SECONDS", 0.0)
    encoder = Encoder(ConnectionError)
    batcher = MicroBatcher(encoder)
    assert values(batcher.run([f"bad {i}" for i in range(64)])) == ["ConnectionError"] * 64
    assert len(encoder.batches) <= 8


async def test_a_cancelled_caller_disturbs_nobody():
    """The rest of its batch is embedded."""
    encoder = Encoder()
    encoder.is_free.clear()
    batcher = MicroBatcher(encoder)
    tasks = [asyncio.ensure_future(batcher.arun([str(i)])) for i in range(5)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    encoder.is_free.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[2], asyncio.CancelledError)
    assert [values(outcomes[i]) for i in (0, 1, 3, 4)] == [[0], [1], [3], [4]]


def test_event_loops_in_threads_share_a_batch():
    """Each loop is woken for its own."""
    batcher = MicroBatcher(Encoder())

    async def ask(start):
        return await asyncio.gather(*(batcher.arun([str(start + i)]) for i in range(20)))

    found = {}
    threads = [
        threading.Thread(target=lambda start=start: found.update({start: asyncio.run(ask(start))}))
        for start in (0, 100, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all([values(o)[0] for o in found[start]] == [start + i for i in range(20)] for start in (0, 100, 200))
