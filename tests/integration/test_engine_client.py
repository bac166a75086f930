"""What every `EngineClient` does alike: the engine in this process, in another, behind Ray; the one without a model.

A new implementation joins `CLIENTS` and must pass as it is.
"""

from __future__ import annotations

import asyncio
import math
import threading
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever.engine import EngineClient, EngineStats, Grammar
from langchain_lora_retriever.errors import (
    AdapterError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    RequestAbortedError,
)
from langchain_lora_retriever.output.grammars import json_grammar, regex_grammar
from langchain_lora_retriever.remote import ProcessEngine
from langchain_lora_retriever.retrieval.fusion import fuse
from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_engine, make_tiny_model, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = SamplingParams(max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7]
NOTHING = Grammar('start: "a" & "b"\n')
"""A grammar that no text satisfies."""


def without_model() -> EngineClient:
    """Scripted answers over the same modules."""
    shapes = in_process_shapes()
    answer = "The answer that a script gives, which takes its time. " * 2
    return FakeEngine([answer], module_shapes=shapes, max_model_len=128, delay=0.002)


def behind_ray() -> EngineClient:
    """Two replicas of the engine over a tiny Llama."""
    from langchain_lora_retriever.remote import RemoteEngine

    return RemoteEngine("tiny")


def in_process_shapes() -> dict[str, tuple[int, int]]:
    """The tiny Llama's modules."""
    adapter = make_adapter(make_tiny_model(), "any")
    return {name: (w.lora_A.shape[1], w.lora_B.shape[0]) for name, w in adapter.shapes.items()}


CLIENTS: dict[str, Callable[[], EngineClient]] = {
    "in process": make_tiny_engine,
    "without model": without_model,
    "in a process of its own": lambda: ProcessEngine(make_tiny_engine),
    "behind Ray": behind_ray,
}


STARTED: dict[str, EngineClient] = {}
"""What takes seconds to start is started once, and again after a test has closed it."""


@pytest.fixture(scope="module", autouse=True)
def _stopped() -> Iterator[None]:
    """Nothing stays behind."""
    yield
    while STARTED:
        STARTED.popitem()[1].close()


@pytest.fixture(params=CLIENTS)
def client(request: Any) -> Iterator[EngineClient]:
    """One of the implementations, which must be idle at the end unless it was closed."""
    name = request.param
    if name == "behind Ray":
        request.getfixturevalue("ray_cluster")
    client = STARTED.pop(name, None) or CLIENTS[name]()
    yield client
    if client.is_alive:
        wait_until(lambda: client.stats().num_running == client.stats().num_waiting == 0)
        STARTED[name] = client


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


@pytest.mark.parametrize("options", [{"logprobs": 1}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "seeded"])
def test_an_answer_goes_on_after_its_beginning(client: EngineClient, options: dict[str, Any]) -> None:
    """As it would have where it began, greedy or seeded; only what is new is given, usage counts all."""
    sampling = SamplingParams(max_tokens=120, ignore_eos=True, **options)
    deltas = list(client.submit(PROMPT, sampling))
    for place in (1, len(deltas) // 2, len(deltas) - 1):
        given = [token for delta in deltas[:place] for token in delta.token_ids]
        rest = client.submit(PROMPT, sampling, output_token_ids=given).result(60)
        assert rest.text == "".join(delta.text for delta in deltas[place:])
        assert list(rest.token_ids) == [token for delta in deltas[place:] for token in delta.token_ids]
        assert rest.usage.num_output_tokens == deltas[-1].usage.num_output_tokens
        assert rest.usage.num_prompt_tokens == len(PROMPT)
        if sampling.logprobs is not None:
            assert len(rest.logprobs) == len(rest.token_ids)
    with pytest.raises(InvalidRequestError, match="cannot go on"):
        client.submit(PROMPT, sampling, output_token_ids=[5] * 120)


@pytest.mark.parametrize("client", ["in process", "behind Ray"], indirect=True)
def test_a_constrained_answer_goes_on_after_its_beginning(client: EngineClient) -> None:
    """Its grammar is where it was, also on the way to an end that the token limit forces."""
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=3)
    grammar = json_grammar({"type": "array", "items": {"type": "string", "minLength": 12}, "minItems": 9})
    deltas = list(client.submit(PROMPT, sampling, grammar=grammar))
    assert deltas[-1].is_shortened
    for place in range(1, len(deltas), 7):
        given = [token for delta in deltas[:place] for token in delta.token_ids]
        rest = client.submit(PROMPT, sampling, grammar=grammar, output_token_ids=given).result(60)
        assert rest.text == "".join(delta.text for delta in deltas[place:])
        assert rest.is_shortened


def test_log_probabilities_of_a_prompt_come_with_the_first_delta(client: EngineClient) -> None:
    """One for each of its tokens from a place on, whatever runs beside it; none if they are not asked for."""
    prompt = [5 + i % 90 for i in range(70)]
    asked = [SamplingParams(max_tokens=4, prompt_logprobs_from=start) for start in (0, 1, 40, 69)]
    running = [client.submit(prompt, sampling) for sampling in asked] + [client.submit(prompt, LONG)]
    scores = [generation.result(60).prompt_logprobs for generation in running]
    assert scores[0] is not None
    for score, start in zip(scores[1:4], (0, 39, 68), strict=True):
        assert score == pytest.approx(scores[0][start:], abs=1e-4)
    assert scores[4] is None
    assert len(scores[0]) == 69
    assert all(math.isfinite(logprob) and logprob <= 0 for logprob in scores[0])
    deltas = list(client.submit(prompt, SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs_from=60)))
    assert [delta.prompt_logprobs is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    for start in (70, 1000):
        with pytest.raises(InvalidRequestError, match=f"prompt_logprobs_from={start} .*from 0 to 69"):
            client.submit(prompt, SamplingParams(prompt_logprobs_from=start))
    with pytest.raises(InvalidRequestError, match="prompt of two tokens"):
        client.submit([5], SamplingParams(prompt_logprobs_from=0))


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
    assert not client.is_alive


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
