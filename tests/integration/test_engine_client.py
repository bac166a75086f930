"""What every `EngineClient` does alike: the engine in this process, and the one without a model.

A new implementation joins `CLIENTS` and must pass as it is.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever.engine import BaseModel, EngineClient, EngineConfig, EngineStats, EngineWorker, Grammar
from langchain_lora_retriever.errors import (
    AdapterError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    RequestAbortedError,
)
from langchain_lora_retriever.output.grammars import json_grammar, regex_grammar
from langchain_lora_retriever.retrieval.fusion import fuse
from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = SamplingParams(max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7]
NOTHING = Grammar('start: "a" & "b"\n')
"""A grammar that no text satisfies."""


def in_process() -> EngineClient:
    """The engine over a tiny Llama."""
    config = EngineConfig(max_num_seqs=4, kv_cache_bytes=1 << 20, lora_cache_bytes=4 << 20, max_model_len=128)
    return EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config)


def without_model() -> EngineClient:
    """Scripted answers over the same modules."""
    shapes = in_process_shapes()
    answer = "The answer that a script gives, which takes its time. " * 2
    return FakeEngine([answer], module_shapes=shapes, max_model_len=128, delay=0.002)


def in_process_shapes() -> dict[str, tuple[int, int]]:
    """The tiny Llama's modules."""
    adapter = make_adapter(make_tiny_model(), "any")
    return {name: (w.lora_A.shape[1], w.lora_B.shape[0]) for name, w in adapter.shapes.items()}


CLIENTS: dict[str, Callable[[], EngineClient]] = {"in process": in_process, "without model": without_model}


@pytest.fixture(params=CLIENTS)
def client(request: Any) -> Iterator[EngineClient]:
    """One of the implementations, which must be idle at the end unless it was closed."""
    client = CLIENTS[request.param]()
    yield client
    if client.is_alive:
        wait_until(lambda: client.stats().num_running == client.stats().num_waiting == 0)
    client.close()
    assert not client.is_alive


def test_it_is_a_client(client: EngineClient) -> None:
    """By the protocol, with what does not change at hand."""
    assert isinstance(client, EngineClient)
    assert client.is_alive
    assert client.info.max_model_len == 128
    assert client.info.max_num_seqs >= 1
    assert client.info.name
    assert client.tokenizer.decode([5])


def test_deltas_join_to_the_completion(client: EngineClient) -> None:
    """Streamed or awaited, an answer is the same text; only its last delta ends it."""
    streamed = client.submit(PROMPT, LONG)
    deltas = list(streamed)
    done = streamed.result(60)
    assert "".join(delta.text for delta in deltas) == done.text == client.submit(PROMPT, LONG).result(60).text
    assert tuple(token for delta in deltas for token in delta.token_ids) == done.token_ids
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].usage == done.usage
    assert done.usage.num_prompt_tokens == len(PROMPT)
    assert done.usage.num_output_tokens == len(done.token_ids)
    assert not done.is_shortened


def test_log_probabilities_are_one_for_each_token(client: EngineClient) -> None:
    """If they are asked for; none otherwise."""
    done = client.submit(PROMPT, SamplingParams(max_tokens=8, logprobs=1)).result(60)
    assert done.logprobs is not None
    assert [item.token_id for item in done.logprobs] == list(done.token_ids)
    assert client.submit(PROMPT, SHORT).result(60).logprobs is None


async def test_it_is_awaited_without_blocking(client: EngineClient) -> None:
    """Many at once, by iteration and by result."""

    async def stream() -> str:
        return "".join([delta.text async for delta in client.submit(PROMPT, SHORT)])

    whole = (await client.submit(PROMPT, SHORT).aresult()).text
    assert await asyncio.gather(*(stream() for _ in range(8))) == [whole] * 8


def test_an_abort_at_once_and_in_mid_stream(client: EngineClient) -> None:
    """Before it is accepted, while its grammar is compiled, and after its first delta; its memory is free then."""
    early = client.submit(PROMPT, LONG)
    early.abort()
    with pytest.raises(RequestAbortedError):
        early.result(60)
    waiting = client.submit(PROMPT, LONG, grammar=json_grammar({"type": "object"}))
    waiting.abort()
    with pytest.raises(RequestAbortedError):
        waiting.result(60)
    begun = client.submit(PROMPT, LONG)
    next(iter(begun.deltas()))
    begun.abort()
    begun.abort()
    with pytest.raises(RequestAbortedError):
        begun.result(60)


async def test_a_cancelled_task_aborts_its_request(client: EngineClient) -> None:
    """And no other."""
    running = client.submit(PROMPT, LONG)
    task = asyncio.ensure_future(running.aresult())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running.is_done
    assert (await client.submit(PROMPT, SHORT).aresult()).text


@pytest.mark.parametrize(
    ("prompt", "error"), [([], InvalidRequestError), ([5] * 128, PromptTooLongError), ([5] * 4000, PromptTooLongError)]
)
def test_what_can_never_be_served_is_refused_at_once(
    client: EngineClient, prompt: list[int], error: type[Exception]
) -> None:
    """By `submit` itself."""
    with pytest.raises(error):
        client.submit(prompt, SHORT)


def test_a_grammar_that_fails_ends_its_own_request(client: EngineClient) -> None:
    """It is told by its generation, in words; those beside it give what they give alone."""
    alone = client.submit(PROMPT, SHORT).result(60).text
    good = [client.submit(PROMPT, SHORT) for _ in range(3)]
    bad = [client.submit(PROMPT, SHORT, grammar=NOTHING) for _ in range(2)]
    good += [client.submit(PROMPT, SHORT) for _ in range(3)]
    assert [generation.result(60).text for generation in good] == [alone] * 6
    errors = []
    for generation in bad:
        with pytest.raises(InvalidRequestError, match="cannot be constrained") as info:
            generation.result(60)
        errors.append(info.value)
    assert errors[0] is not errors[1]


def test_adapters_are_judged_by_name(client: EngineClient) -> None:
    """One that fits, one that is for another model; a request with the other is refused."""
    fits = make_adapter(make_tiny_model(), "fits")
    other = make_adapter(make_tiny_model(hidden_size=32), "other")
    first, second = client.register([fits, other])
    assert first == (None, ())
    assert isinstance(second.error, AdapterError)
    assert "'other'" in str(second.error)
    assert client.submit(PROMPT, SHORT, [(fits, 0.5)]).result(60).text
    with pytest.raises(InvalidRequestError, match="'other'"):
        client.submit(PROMPT, SHORT, [(other, 1.0)])


def test_a_fusion_crosses_as_a_recipe(client: EngineClient) -> None:
    """It is judged by its members, and served."""
    model = make_tiny_model()
    fused = fuse([(make_adapter(model, "a"), 0.5), (make_adapter(model, "b", r=2), 0.5)])
    assert client.register([fused]) == [(None, ())]
    assert client.submit(PROMPT, SHORT, [(fused, 1.0)]).result(60).text
    other = make_adapter(make_tiny_model(hidden_size=32), "other")
    with pytest.raises(InvalidRequestError, match="'other'"):
        client.submit(PROMPT, SHORT, [(fuse([(make_adapter(model, "a"), 0.5), (other, 0.5)]), 1.0)])


def test_close_in_mid_stream(client: EngineClient) -> None:
    """Whoever waits hears of it, also for a grammar; later requests are refused; closing again does nothing."""
    running = [client.submit(PROMPT, LONG) for _ in range(6)]
    running.append(client.submit(PROMPT, LONG, grammar=regex_grammar("[a-z]{90}")))
    next(iter(running[0].deltas()))
    streamed = running[1]
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in streamed:
                pass
        except EngineDeadError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    client.close()
    client.close()
    reader.join(60)
    assert not reader.is_alive()
    assert len(errors) == 1
    assert not client.is_alive
    for generation in running[2:]:
        with pytest.raises(EngineDeadError):
            generation.result(60)
    with pytest.raises(EngineDeadError):
        client.submit(PROMPT, SHORT)


def test_any_thread_may_ask_anything(client: EngineClient) -> None:
    """Requests, statistics and aborts from many threads at once."""
    done: list[str] = []

    def call() -> None:
        assert isinstance(client.stats(), EngineStats)
        text = client.submit(PROMPT, SHORT).result(60).text
        client.submit(PROMPT, LONG).abort()
        assert client.stats().num_finished >= 1
        done.append(text)

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 12
    assert len(set(done)) == 1
