"""What holds for the engine under any order of arrivals, steps and aborts."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_lora_retriever.engine import BaseModel, Engine, EngineConfig
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from langchain_lora_retriever.engine.request import Request

NUM_PROMPTS, NUM_ADAPTERS = 6, 7
NUM_RANK_ROWS = 18  # as many as the three largest adapters take
INVOCATION = 261  # a token that prompts may have

# An arrival is a prompt and a composition; a step or an abort of the n-th live request may come between any two.
arrivals = st.tuples(
    st.just("add"), st.integers(0, NUM_PROMPTS - 1), st.lists(st.integers(0, NUM_ADAPTERS - 1), max_size=3, unique=True)
)
actions = st.lists(
    st.one_of(arrivals, st.just(("step",)), st.tuples(st.just("abort"), st.integers(0, 9))), min_size=4, max_size=25
)


@cache
def engine() -> Engine:
    """An engine so small that requests wait, are preempted, and evict each other's adapters."""
    model = make_tiny_model()
    adapted = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head", "embed_tokens"))]
    row_bytes = sum(sum(module.weight.shape) * module.weight.itemsize for module in adapted)
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=24, block_size=4, kv_cache_bytes=24 * 4 * 512, max_loras=4,
        lora_cache_bytes=NUM_RANK_ROWS * row_bytes, adapter_kinds=("vocabulary", "dora"),
    )  # fmt: skip
    return Engine(BaseModel(model, make_tokenizer(), "tiny"), config)


@cache
def adapters() -> tuple[Adapter, ...]:
    """Adapters of different ranks and kinds."""
    model = make_tiny_model()
    return (
        *(make_adapter(model, f"a{i}", r=2 * i + 1) for i in range(3)),
        make_adapter(model, "dora", r=6, is_dora=True),
        make_adapter(model, "vocabulary", r=3, targets=("embed_tokens", "lm_head", "q_proj")),
        make_adapter(model, "all", r=4, targets=("embed_tokens", "lm_head", "down_proj"), is_dora=True),
        make_adapter(model, "activated", r=2, invocation_tokens=(INVOCATION,)),
    )


def make_request(prompt: int, members: list[int]) -> Request:
    """One of a few prompts with a uniform mixture of some adapters."""
    tokens = torch.randint(3, 259, (5 + 7 * prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    if prompt % 3:  # as a last page, and within one
        tokens[-2 - 3 * (prompt % 2)] = INVOCATION
    pairs = [(adapters()[i], 1 / len(members)) for i in members]
    return engine().make_request(tokens, SamplingParams(max_tokens=8, ignore_eos=True), pairs)


def run(live: list[Request]) -> dict[int, list[int]]:
    """Step until all is done; tokens by request id."""
    for _ in range(500):
        if not engine().has_unfinished_requests:
            return {request.request_id: request.output_token_ids for request in live}
        engine().step()
        engine().check_integrity()
    raise AssertionError("the engine makes no progress")


@cache
def alone(prompt: int, members: tuple[int, ...]) -> list[int]:
    """What a request answers when nothing else runs."""
    request = make_request(prompt, list(members))
    engine().add(request)
    return run([request])[request.request_id]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions)
def test_nothing_leaks_and_company_changes_nothing(script: list[Any]) -> None:
    """Blocks, slots and pins add up after every action, and each survivor answers as it does alone."""
    live: list[tuple[Request, int, tuple[int, ...]]] = []
    for action in script:
        match action:
            case ("add", prompt, members):
                request = make_request(prompt, members)
                engine().add(request)
                live.append((request, prompt, tuple(sorted(members))))
            case ("step",):
                if engine().has_unfinished_requests:
                    engine().step()
            case ("abort", index):
                running = [row for row in live if row[0] in (*engine().scheduler.running, *engine().scheduler.waiting)]
                if running:
                    victim = running[index % len(running)]
                    engine().abort(victim[0])
                    live.remove(victim)
        engine().check_integrity()
    tokens = run([request for request, _, _ in live])
    assert engine().kv_cache.num_free_blocks == engine().kv_cache.num_blocks
    for request, prompt, members in live:
        assert tokens[request.request_id] == alone(prompt, members)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(NUM_PROMPTS)))
def test_permuting_requests_permutes_answers(order: list[int]) -> None:
    """The order in which requests arrive decides nothing but when they are answered."""
    requests = [make_request(prompt, [prompt % NUM_ADAPTERS]) for prompt in order]
    for request in requests:
        engine().add(request)
    tokens = run(requests)
    for request, prompt in zip(requests, order, strict=True):
        assert tokens[request.request_id] == alone(prompt, (prompt % NUM_ADAPTERS,))
