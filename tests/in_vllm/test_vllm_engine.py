"""`VllmEngine`: what every `EngineClient` does, our engine's answers, and what it refuses."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment that has it")

from in_vllm.tiny import tiny_model
from integration import test_engine_client as suite
from langchain_lora_retriever.engine.api import Registration
from langchain_lora_retriever.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    UnsupportedAdapterError,
)
from langchain_lora_retriever.output.grammars import json_grammar, regex_grammar
from langchain_lora_retriever.retrieval.fusion import fuse
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import make_adapter, make_tiny_model, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.timeout(300)

SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0)
PROMPTS = [[5 + (7 * i + j * j) % 300 for j in range(length)] for i, length in enumerate((3, 17, 40, 64))]

CHECKS: tuple[Callable[..., Any], ...] = (
    suite.test_it_is_a_client,
    suite.test_deltas_join_to_the_completion,
    suite.test_log_probabilities_are_one_for_each_token,
    suite.test_log_probabilities_of_a_prompt_come_with_the_first_delta,
    suite.test_it_is_awaited_without_blocking,
    suite.test_an_abort_at_once_and_in_mid_stream,
    suite.test_a_cancelled_task_aborts_its_request,
    suite.test_a_grammar_that_fails_ends_its_own_request,
    suite.test_any_thread_may_ask_anything,
)
"""Of the suite that holds every client; what is of the model's shape, or not vLLM's to do, is below."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("test_"))
def test_it_does_as_every_client(engine: Any, check: Callable[..., Any]) -> None:
    """Each leaves it idle."""
    outcome = check(engine)
    if inspect.iscoroutine(outcome):
        asyncio.run(outcome)
    wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)


@pytest.mark.parametrize("prompt", [[], [5] * 128, [5] * 4000], ids=["empty", "full", "long"])
def test_what_can_never_be_served_is_refused_at_once(engine: Any, prompt: list[int]) -> None:
    """By `submit` itself."""
    error = suite.PromptTooLongError if prompt else InvalidRequestError
    suite.test_what_can_never_be_served_is_refused_at_once(engine, prompt, error)


def test_a_greedy_answer_goes_on_after_its_beginning(engine: Any) -> None:
    """As it would have; usage counts all of it. One that was sampled or constrained is refused."""
    suite.test_an_answer_goes_on_after_its_beginning(engine, {"logprobs": 1})
    for sampling, grammar in ((SamplingParams(temperature=1.0, seed=7), None), (SamplingParams(), json_grammar({}))):
        with pytest.raises(InvalidRequestError, match="cannot go on after its beginning in vLLM"):
            engine.submit([5, 6], sampling, grammar=grammar, output_token_ids=[7])


def concatenated(members: Sequence[tuple[Adapter, float]]) -> Adapter:
    """One adapter whose rank is the sum of the members': what a mixture is, weights folded in."""
    weights = {
        module: LoraWeights(
            torch.cat([adapter.weights[module].lora_A for adapter, _ in members]),
            torch.cat(
                [w * adapter.weights[module].scaling * adapter.weights[module].lora_B for adapter, w in members], dim=1
            ),
            1.0,
        )
        for module in members[0][0].weights
    }
    return Adapter(name="all", fingerprint="concatenated" + "".join(a.name for a, _ in members), weights=weights)


def answers(engine: Any, requests: Sequence[tuple[list[int], Sequence[tuple[Adapter, float]]]]) -> list[Any]:
    """All at once."""
    running = [engine.submit(prompt, SAMPLING, adapters) for prompt, adapters in requests]
    return [generation.result(120) for generation in running]


def test_a_mixed_batch_answers_as_our_engine(engine: Any, ours: Any, adapters: dict[str, Any]) -> None:
    """Base, single adapters, weighted ones and mixtures of two and three in one batch, tokens and log-probabilities."""
    a, b, c = (adapters[name] for name in "abc")
    compositions = [(), [(a, 1.0)], [(b, 0.5)], [(a, 0.7), (c, 0.3)], [(c, 0.2), (b, 0.5), (a, 0.3)], [(a, -0.4)]]
    requests = [(prompt, adapters) for prompt in PROMPTS for adapters in compositions]
    theirs, expected = answers(engine, requests), answers(ours, requests)
    for got, want in zip(theirs, expected, strict=True):
        assert got.token_ids == want.token_ids
        assert got.text == want.text
        assert [x.logprob for x in got.logprobs] == pytest.approx([x.logprob for x in want.logprobs], abs=2e-3)
    assert len({answer.token_ids for answer in theirs[: len(compositions)]}) == len(compositions)


def test_a_mixture_is_its_members_concatenated(engine: Any, adapters: dict[str, Any]) -> None:
    """The same tokens as one adapter of their ranks together."""
    members = [(adapters["a"], 0.7), (adapters["b"], 0.2), (adapters["c"], 0.1)]
    requests = [(prompt, members) for prompt in PROMPTS] + [
        (prompt, [(concatenated(members), 1.0)]) for prompt in PROMPTS
    ]
    done = [answer.token_ids for answer in answers(engine, requests)]
    assert done[: len(PROMPTS)] == done[len(PROMPTS) :]


def test_more_adapters_than_slots_take_turns(engine: Any, ours: Any, adapters: dict[str, Any]) -> None:
    """Five adapters in mixtures of three over four slots, each weight another: nobody waits for ever."""
    names = "abcde"
    requests = [
        (PROMPTS[i % 3], [(adapters[names[(i + j) % 5]], 0.1 + 0.07 * ((i + 2 * j) % 9)) for j in range(3)])
        for i in range(20)
    ]
    got, want = answers(engine, requests), answers(ours, requests)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]


def test_many_weights_of_few_adapters_run_at_once(engine: Any, adapters: dict[str, Any]) -> None:
    """A composition counts as its members: more of them than slots are in the batch together."""
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    mixtures = [[(adapters["a"], 0.05 * i), (adapters["b"], 1 - 0.05 * i)] for i in range(1, 11)]
    running = [engine.submit([5, 6, 7], long, mixture) for mixture in mixtures]
    try:
        wait_until(lambda: engine.stats().num_running == len(mixtures), 60)
    finally:
        for generation in running:
            generation.abort()


def test_a_prefix_is_shared_only_by_the_same_composition(engine: Any, adapters: dict[str, Any]) -> None:
    """By contents and weights: another weight, or another adapter of the same name, computes its own."""
    prompt = [9 + i % 200 for i in range(100)]
    mixture = [(adapters["a"], 0.6), (adapters["b"], 0.4)]

    def num_cached(adapters: Sequence[tuple[Adapter, float]]) -> int:
        return int(engine.submit(prompt, SamplingParams(max_tokens=2, ignore_eos=True), adapters).result(60).usage[1])

    assert num_cached(mixture) == 0
    assert num_cached(mixture[::-1]) >= 64
    assert num_cached([(adapters["a"], 0.61), (adapters["b"], 0.39)]) == 0
    assert num_cached([(make_adapter(tiny_model(), "a", seed=99), 0.6), (adapters["b"], 0.4)]) == 0
    assert num_cached(mixture) >= 64


def test_adapters_go_while_they_run(engine: Any, adapters: dict[str, Any]) -> None:
    """What a pool has removed is answered to its end, beside more adapters than there are slots."""
    gone = make_adapter(tiny_model(), "gone", r=5)
    whole = engine.submit([5, 6, 7], SAMPLING, [(gone, 1.0)]).result(60)
    stream = engine.submit([5, 6, 7], SamplingParams(max_tokens=80, ignore_eos=True), [(gone, 1.0)]).deltas(60)
    token_ids = list(next(stream).token_ids)
    del gone
    others = [engine.submit([5, 6, 7], SAMPLING, [(adapter, 1.0)]) for adapter in adapters.values()]
    token_ids += [token_id for delta in stream for token_id in delta.token_ids]
    assert all(other.result(60).text for other in others)
    assert len(token_ids) == 80
    assert tuple(token_ids[:24]) == whole.token_ids
    fresh = make_adapter(tiny_model(), "gone", r=5)
    assert engine.submit([5, 6, 7], SAMPLING, [(fresh, 1.0)]).result(60).token_ids == whole.token_ids


def test_a_fusion_is_averaged_and_run(engine: Any, ours: Any, adapters: dict[str, Any]) -> None:
    """As our engine runs it; it counts as one adapter."""
    fused = fuse([(adapters["a"], 0.5), (adapters["c"], 0.5)])
    assert engine.register([fused]) == [Registration()]
    requests = [(prompt, [(fused, 1.0)]) for prompt in PROMPTS]
    assert [x.token_ids for x in answers(engine, requests)] == [x.token_ids for x in answers(ours, requests)]


def test_stop_strings_and_ends_are_as_in_our_engine(engine: Any, ours: Any) -> None:
    """Text is made by the same code: where a string cuts, what of it is held back, which end there was."""
    whole = ours.submit([5, 6, 7], SamplingParams(max_tokens=60)).result(60)
    middle = whole.text[len(whole.text) // 2 :][:2]
    stops = [{"stop": (middle,)}, {"stop_token_ids": (whole.token_ids[10],)}, {"repetition_penalty": 1.3}, {}]
    for options in stops:
        sampling = SamplingParams(max_tokens=60, **options)
        got, want = (client.submit([5, 6, 7], sampling).result(60) for client in (engine, ours))
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        assert got.usage.num_output_tokens == want.usage.num_output_tokens


def test_a_grammar_is_followed(engine: Any, adapters: dict[str, Any]) -> None:
    """JSON of a schema and a pattern, also for a mixture."""
    mixture = [(adapters["a"], 0.5), (adapters["b"], 0.5)]
    done = engine.submit([5, 6], SamplingParams(max_tokens=60), mixture, grammar=regex_grammar("[a-f]{12}")).result(60)
    assert len(done.text) == 12
    assert set(done.text) <= set("abcdef")
    assert done.finish_reason == "stop"
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    done = engine.submit([5, 6], SamplingParams(max_tokens=60), grammar=json_grammar(schema)).result(60)
    assert done.text.replace(" ", "") in {'{"x":true}', '{"x":false}'}


def test_what_vllm_cannot_do_is_refused_in_words(engine: Any) -> None:
    """Kinds of adapters, ranks, too many at once."""
    model = tiny_model()
    dora = make_adapter(model, "dora", is_dora=True)
    activated = make_adapter(model, "activated", invocation_tokens=(5, 6))
    head = make_adapter(model, "head", targets=("lm_head",))
    wide = make_adapter(model, "wide", r=17)
    errors = [registration.error for registration in engine.register([dora, activated, head, wide])]
    assert isinstance(errors[0], UnsupportedAdapterError)
    assert "DoRA" in str(errors[0])
    assert "activated" in str(errors[1])
    assert "'lm_head'" in str(errors[2])
    assert "rank 17" in str(errors[3])
    for adapter in (dora, activated, head, wide):
        with pytest.raises(InvalidRequestError, match=adapter.name):
            engine.submit([5], SAMPLING, [(adapter, 1.0)])
    four = [(make_adapter(model, f"n{i}"), 0.25) for i in range(4)]
    with pytest.raises(InvalidRequestError, match="composes 4 adapters; the engine takes at most 3"):
        engine.submit([5], SAMPLING, four)
    other = make_adapter(make_tiny_model(hidden_size=32), "other")
    with pytest.raises(InvalidRequestError, match="'other'"):
        engine.submit([5], SAMPLING, [(other, 1.0)])
    with pytest.raises(InvalidRequestError, match="temperature"):
        engine.submit([5], SamplingParams(temperature=3.0)).result(60)


def test_a_chat_model_routes_and_composes_over_it(engine: Any, tmp_path: Any) -> None:
    """`ChatLoraRetriever(engine=VllmEngine(...))`: retrieval, a mixture, tokens streamed; structured output, a tool."""
    from langchain_lora_retriever import AdapterPool, ChatLoraRetriever
    from makers import make_checkpoint

    pool = AdapterPool(tmp_path / "pool", create=True)
    for name, samples in {"sql": ["How many users are there?"], "dates": ["Write the date as ISO."]}.items():
        pool.add(name, make_checkpoint(tmp_path / name, model=tiny_model(), seed=len(name)), samples=samples)
    engine.tokenizer.chat_template = "{% for m in messages %}{{ m['content'][-40:] }}{% endfor %}"  # few tokens
    mixed = {"composition": "mixture", "top_k": 2, "weights": "uniform"}
    llm = ChatLoraRetriever(engine=engine, pool=pool, encoder=_Words(), max_tokens=16, **mixed)
    chunks = list(llm.stream("How many dates are there?"))
    assert len(chunks) > 1
    metadata = {key: value for chunk in chunks for key, value in chunk.response_metadata.items()}
    assert metadata["composition"] == "mixture"
    assert len(metadata["adapters"]) == 2
    schema = {"title": "Flag", "type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    assert llm.with_structured_output(schema).invoke("Is it?")["x"] in {True, False}
    tool = {"type": "function", "function": {"name": "flip", "parameters": {**schema, "additionalProperties": False}}}
    answer = llm.bind_tools([tool], tool_choice="flip").bind(max_tokens=60).invoke("Is it?")
    assert [call["name"] for call in answer.tool_calls] == ["flip"]
    assert answer.tool_calls[0]["args"]["x"] in {True, False}
    assert len(answer.response_metadata["adapters"]) == 2


class _Words:
    """Embeds a text by the words in it."""

    name = "words"
    dimension = 64

    def encode(self, texts: Sequence[str]) -> Any:
        import numpy as np

        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[sum(word.encode()) % self.dimension] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def test_a_set_up_that_runs_no_compositions_is_refused(model_folder: Any, monkeypatch: Any) -> None:
    """Before anything is started where that shows: the plug-in is left out."""
    from langchain_lora_retriever.vllm import VllmEngine

    monkeypatch.setenv("VLLM_PLUGINS", "others")
    with pytest.raises(EngineError, match="VLLM_PLUGINS='others' leaves out"):
        VllmEngine(model_folder)


def test_close_in_mid_stream(engines: Any) -> None:
    """Whoever waits hears of it; later requests are refused; closing again does nothing. The last test: it closes."""
    engine = engines.get()
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    running = [engine.submit([5, 6, 7], long) for _ in range(6)]
    next(iter(running[0].deltas()))
    waiting = threading.Thread(target=engine.close)
    waiting.start()
    engine.close()
    waiting.join(60)
    assert not waiting.is_alive()
    assert not engine.is_alive
    for generation in running[1:]:
        with pytest.raises(EngineDeadError):
            generation.result(60)
    with pytest.raises(EngineDeadError):
        engine.submit([5], long)
