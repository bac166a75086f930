"""Whatever goes wrong for some requests, beside whomever and in whatever order: the others answer as they do alone."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_lora_retriever.engine import BaseModel, Engine, EngineConfig
from langchain_lora_retriever.errors import InvalidRequestError, LoraRetrieverError
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import VOCAB_SIZE, make_adapter, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever.engine.request import Request

NUM_PROMPTS, NUM_PLAIN, NUM_ADAPTERS = 5, 3, 7
SAMPLINGS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"logprobs": 2})


@cache
def engine(*, is_async: bool = False) -> Engine:
    """An engine so small that requests wait, are preempted, and get the pages and rows of whoever was there."""
    config = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=24, block_size=4, kv_cache_bytes=24 * 4 * 512, max_loras=4,
        lora_cache_bytes=4 << 20, enable_async_scheduling=is_async, adapter_kinds=("vocabulary", "dora"),
    )  # fmt: skip
    return Engine(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config)


@cache
def adapter(index: int) -> Adapter:
    """Adapters of different ranks and kinds."""
    if index < NUM_PLAIN:
        return make_adapter(make_tiny_model(), f"a{index}", r=2 * index + 1)
    kinds: list[dict[str, Any]] = [
        {"is_dora": True},
        {"targets": ("embed_tokens", "lm_head", "q_proj")},
        {"targets": ("embed_tokens", "lm_head", "down_proj"), "is_dora": True},
        {"invocation_tokens": tuple(prompt_of(2)[9:11])},
    ]
    return make_adapter(make_tiny_model(), f"a{index}", r=3, **kinds[index - NUM_PLAIN])


class Grammar:
    """Allows even tokens alone, until it does what it was made for."""

    is_shortened = False

    def __init__(self, after: int = 99, *, fails_in: str = "", forces: tuple[int, ...] = (), masks: int = 0) -> None:
        self.after = after
        self.fails_in = fails_in
        self.forces = forces
        self.masks = masks
        self.num_accepted = 0

    def _fail(self, where: str) -> None:
        if self.num_accepted >= self.after and where == self.fails_in:
            raise [ValueError("broken"), RecursionError("deep"), SystemExit("gone")][self.after % 3]

    @property
    def is_finished(self) -> bool:
        """Not as long as it can tell."""
        self._fail("is_finished")
        return False

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Every second token, or what it masks in the end."""
        row.fill_(0x55555555 if self.num_accepted < self.after else self.masks)
        self._fail("fill_bitmask")

    def accept(self, _token_id: int) -> None:
        """Count."""
        self._fail("accept")
        self.num_accepted += 1

    def forced_tokens(self) -> tuple[int, ...]:
        """At the end, what it forces."""
        self._fail("forced_tokens")
        return self.forces if self.num_accepted == self.after else ()


class BrokenDetokenizer:
    """Fails at the first token."""

    is_stopped = False

    def push(self, _token_id: int) -> str:
        """Fail."""
        raise KeyError("no such token")


def scaled(index: int, a: float, b: float) -> Adapter:
    """An adapter of finite, huge numbers; DoRA's magnitudes are as they were."""
    weights = {n: LoraWeights(w.lora_A.clamp(-1, 1) * a, w.lora_B.clamp(-1, 1) * b, w.scaling, w.magnitude)
               for n, w in adapter(index).weights.items()}  # fmt: skip
    return Adapter(f"wild {index}", f"{index} {a!r} {b!r}", weights)


def magnified(index: int, factor: float) -> Adapter:
    """A DoRA adapter of other magnitudes."""
    weights = {n: LoraWeights(w.lora_A, w.lora_B, w.scaling, w.magnitude * factor)
               for n, w in adapter(index).weights.items() if w.magnitude is not None}  # fmt: skip
    return Adapter(f"magnified {index}", f"{index} {factor!r}", weights)


def prompt_of(prompt: int) -> list[int]:
    """Some tokens."""
    return torch.randint(3, 259, (5 + 7 * prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()


def make(prompt: int, pairs: list[tuple[Adapter, float]], grammar: Grammar | None = None, **sampling: Any) -> Request:
    """A request for at most eight tokens; any of the engines may take it."""
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})
    request = engine().make_request(prompt_of(prompt), params, pairs)
    request.constraint = grammar
    return request


def make_good(prompt: int, members: list[int], sampling: int, is_constrained: bool) -> Request:
    """A request that nothing is wrong with."""
    pairs = [(adapter(i), 1 / len(members)) for i in members]
    return make(prompt, pairs, Grammar() if is_constrained else None, **SAMPLINGS[sampling])


def make_bad(kind: int, prompt: int, after: int, members: list[int]) -> Request | None:
    """A request that something is wrong with; None if it is refused before it is queued."""
    pairs = [(adapter(i), 1 / len(members)) for i in members]
    extremes: list[dict[str, Any]] = [
        {"temperature": 1e300, "top_k": 2**63}, {"temperature": 5e-324, "seed": -(10**50)},
        {"temperature": 1.0, "top_p": 5e-324, "logprobs": 20}, {"max_tokens": 10**400},
        {"temperature": 2**900, "seed": 2**64, "logprobs": 0},
    ]  # fmt: skip
    kinds: list[Callable[[], Request]] = [
        *(lambda where=where: make(prompt, pairs, Grammar(after, fails_in=where))
          for where in ("fill_bitmask", "accept", "forced_tokens", "is_finished")),
        *(lambda forces=forces: make(prompt, pairs, Grammar(after, forces=forces), logprobs=1)
          for forces in ((VOCAB_SIZE,), (-1,), (5,) * 300)),
        *(lambda t=t: make(prompt, pairs, Grammar(after), temperature=t) for t in (0.0, 1.0)),  # allows nothing then
        *(lambda a=a, b=b: make(prompt, [*pairs[:2], (scaled(after % NUM_ADAPTERS, a, b), 0.5)])
          for a, b in ((1e20, 1e20), (3e38, 1e-30), (3e38, 1e38), (1e-20, 1e38), (1.0, 3e38))),
        *(lambda factor=factor: make(prompt, [*pairs[:1], (magnified(3 + after % 2 * 2, factor), 0.5)])
          for factor in (0.0, -1.0, 1e30, 1e38, math.inf, math.nan)),
        *(lambda extreme=extreme: make(prompt, pairs, **extreme) for extreme in extremes),
        lambda: make(prompt, [(adapter(0), math.nan)]),
        lambda: engine().make_request([5, VOCAB_SIZE + after], SamplingParams()),
    ]  # fmt: skip
    try:
        request = kinds[kind % (len(kinds) + 1) - 1]() if kind % (len(kinds) + 1) else make(prompt, pairs)
    except InvalidRequestError:
        return None
    if kind % (len(kinds) + 1) == 0:
        request.detokenizer = BrokenDetokenizer()  # type: ignore[assignment]
    return request


members = st.lists(st.integers(0, NUM_ADAPTERS - 1), max_size=2, unique=True)
prompts = st.integers(0, NUM_PROMPTS - 1)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("good"), prompts, members, st.integers(0, len(SAMPLINGS) - 1), st.booleans()),
        st.tuples(st.just("bad"), st.integers(0, 50), prompts, st.integers(0, 5), members),
        st.just(("step",)),
    ),
    min_size=6,
    max_size=24,
)


def step(home: Engine) -> dict[Request, LoraRetrieverError]:
    """One step; who was ended by which error."""
    errors = {output.request: output.error for output in home.step() if output.error is not None}
    home.check_integrity()
    assert all(isinstance(error, LoraRetrieverError) for error in errors.values())
    return errors  # type: ignore[return-value]


@cache
def alone(prompt: int, adapters: tuple[int, ...], sampling: int, is_constrained: bool) -> list[int]:
    """What a good request answers when nothing else runs."""
    request = make_good(prompt, list(adapters), sampling, is_constrained)
    engine().add(request)
    while engine().has_unfinished_requests:
        assert not step(engine())
    return request.output_token_ids


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(script=actions)
def test_bad_neighbours_change_nobody_s_answer(is_async: bool, script: list[Any]) -> None:
    """Each good request's tokens are those of its solo run, none of them fails, and nothing leaks."""
    home = engine(is_async=is_async)
    good: dict[Request, tuple[int, tuple[int, ...], int, bool]] = {}
    failed: dict[Request, LoraRetrieverError] = {}
    for kind, *arguments in script:
        if kind == "good":
            request = make_good(*arguments)
            good[request] = (arguments[0], tuple(arguments[1]), *arguments[2:])
            home.add(request)
        elif kind == "bad":
            bad = make_bad(*arguments)
            if bad is not None:
                home.add(bad)
        elif home.has_unfinished_requests:
            failed |= step(home)
    for _ in range(3000):
        if not home.has_unfinished_requests:
            break
        failed |= step(home)
    assert not home.has_unfinished_requests
    assert home.kv_cache.num_free_blocks == home.kv_cache.num_blocks
    assert not failed.keys() & good.keys()
    for request, key in good.items():
        assert request.output_token_ids == alone(*key)
