"""What goes wrong for one request of a step is told to its caller and changes no other's answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, Completion, EngineConfig, EngineWorker, Generation
from langchain_lora_retriever.errors import (
    EngineError,
    InvalidAdapterError,
    InvalidRequestError,
    LoraRetrieverError,
    PromptTooLongError,
)
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import VOCAB_SIZE, ScriptedCompiler, make_adapter, make_tiny_model, make_tokenizer

SCRIPTS = ScriptedCompiler()

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPTS = [[5, 6, 7, 8 + i] for i in range(3)]


def sampling(**settings: Any) -> SamplingParams:
    """Ten tokens, whatever they are."""
    return SamplingParams(**{"max_tokens": 10, "ignore_eos": True, **settings})


def scaled(adapter: Adapter, a: float, b: float) -> Adapter:
    """The adapter with larger numbers, under a fingerprint of its own."""
    weights = {n: LoraWeights(w.lora_A * a, w.lora_B * b, w.scaling) for n, w in adapter.weights.items()}
    return Adapter(f"{adapter.name} {a:g} {b:g}", f"{adapter.fingerprint} {a!r} {b!r}", weights)


class Scripted:
    """A grammar that allows everything, forces some tokens after the first, and fails where it is told to."""

    is_shortened = False

    def __init__(self, *, forces: tuple[int, ...] = (), fails_in: str = "", after: int = 2) -> None:
        self.forces = forces
        self.fails_in = fails_in
        self.after = after
        self.num_accepted = 0

    def _maybe_fail(self, where: str) -> None:
        if where == self.fails_in and self.num_accepted >= self.after:
            raise RecursionError(f"broken in {where}")

    @property
    def is_finished(self) -> bool:
        """Never, unless it fails."""
        self._maybe_fail("is_finished")
        return False

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """All bits stay."""
        row[0] = 0
        self._maybe_fail("fill_bitmask")
        row[0] = -1

    def accept(self, _token_id: int) -> None:
        """Count."""
        self._maybe_fail("accept")
        self.num_accepted += 1

    def forced_tokens(self) -> tuple[int, ...]:
        """What it was made with, once."""
        self._maybe_fail("forced_tokens")
        return self.forces if self.num_accepted == 1 else ()


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    """An engine over a small Llama with few pages, checked for leaks at the end."""
    config = EngineConfig(max_num_seqs=4, kv_cache_bytes=1 << 17, lora_cache_bytes=4 << 20, max_model_len=120)
    with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config, compiler=SCRIPTS) as worker:
        yield worker
        worker.check_integrity()
        stats = worker.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


def outcome(generation: Generation) -> Completion | LoraRetrieverError:
    """What a request comes to."""
    try:
        return generation.result(60)
    except LoraRetrieverError as error:
        return error


def answers_beside(worker: EngineWorker, prompt: list[int], **bad: Any) -> tuple[list[Completion], Any]:
    """Three good answers, and what the request among them has come to: a completion or an error."""
    running = [worker.submit(p, sampling()) for p in PROMPTS[:2]]
    odd = worker.submit(prompt, **{"sampling": sampling(), **bad})
    running.append(worker.submit(PROMPTS[2], sampling()))
    good = [generation.result(60) for generation in running]
    return good, outcome(odd)


@pytest.mark.parametrize("fails_in", ["fill_bitmask", "accept", "forced_tokens", "is_finished"])
def test_a_grammar_that_fails_anywhere_ends_its_request(worker: EngineWorker, fails_in: str) -> None:
    """With a documented error that names what was raised."""
    expected = [worker.submit(p, sampling()).result(60).token_ids for p in PROMPTS]
    good, error = answers_beside(worker, [9, 9], grammar=SCRIPTS.add(lambda: Scripted(fails_in=fails_in)))
    assert [completion.token_ids for completion in good] == expected
    assert isinstance(error, EngineError)
    assert f"broken in {fails_in}" in str(error)


@pytest.mark.parametrize(("a", "b"), [(1e20, 1e20), (1e37, 1.0), (5e37, 1e-37), (1.0, 1e37)])
@pytest.mark.parametrize("targets", [("k_proj", "v_proj"), ("down_proj",), ("q_proj", "k_proj", "v_proj", "up_proj")])
def test_an_adapter_whose_numbers_overflow_harms_nobody(
    worker: EngineWorker, a: float, b: float, targets: tuple[str, ...]
) -> None:
    """Neither those beside it, with an adapter or without, nor whoever gets its pages and rows; it is told of it."""
    mild = make_adapter(make_tiny_model(), "mild")
    wild = scaled(make_adapter(make_tiny_model(), "wild", targets=targets), a, b)

    def run_all() -> list[Any]:
        running = [worker.submit(p, sampling(), c) for p, c in zip(PROMPTS, ([], [(mild, 1.0)], []), strict=True)]
        return [generation.result(60).token_ids for generation in running]

    expected = run_all()
    for turn in range(3):
        ill = [worker.submit([turn + i] * 40, sampling(), [(wild, 0.5), (mild, 0.5)][: i + 1]) for i in range(2)]
        assert run_all() == expected
        for generation in ill:
            got = outcome(generation)  # for some of these the numbers are only huge
            assert isinstance(got, Completion) or ("'wild" in str(got) and "not finite" in str(got))
        assert run_all() == expected


@pytest.mark.parametrize(("r", "scaling"), [(4, 1e308), (4, 1e39), (2, -1e200)])
def test_an_adapter_that_overflows_once_scaled_is_refused_by_name(worker: EngineWorker, r: int, scaling: float) -> None:
    """Its rows never reach the device; those who wait behind it are served."""
    expected = [worker.submit(p, sampling()).result(60).token_ids for p in PROMPTS]
    mild = make_adapter(make_tiny_model(), "mild", r=r, scaling=scaling)
    good, error = answers_beside(worker, [9, 9], adapters=[(mild, 1.0)])
    assert [completion.token_ids for completion in good] == expected
    assert "'mild'" in str(error)
    assert "float32" in str(error)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([5, VOCAB_SIZE, 6], f"token {VOCAB_SIZE} at place 1"),
        ([5, 6, -1], "token -1 at place 2"),
        ([5, 2**63], "too big"),
        ([5, 6.0], "'float'"),
        ([5, None], "'NoneType'"),
        ([[5]], "'list'"),
        ("text", "'str'"),
        (7, "'int'"),
        (np.zeros((2, 2), np.int64), "integer"),
        ([], "no tokens"),
    ],
    ids=str,
)
def test_a_prompt_of_other_than_the_model_s_tokens_is_refused(worker: EngineWorker, prompt: Any, named: str) -> None:
    """At once and in words; nothing of it reaches a step."""
    with pytest.raises(InvalidRequestError, match=named):
        worker.submit(prompt, sampling())
    assert worker.stats().num_steps == 0


def test_a_prompt_may_be_any_sequence_of_integers(worker: EngineWorker) -> None:
    """Lists, tuples, ranges, arrays and tensors; one that is far too long is not even looked at."""
    expected = worker.submit([5, 6, 7, 8], sampling()).result(60).token_ids
    for prompt in ((5, 6, 7, 8), range(5, 9), np.arange(5, 9), torch.arange(5, 9)):
        assert worker.submit(prompt, sampling()).result(60).token_ids == expected  # type: ignore[arg-type]
    with pytest.raises(PromptTooLongError):
        worker.submit(range(10**12), sampling())


@pytest.mark.parametrize("weight", [math.nan, math.inf, 1e300, 10**400, True, "1", None])
def test_a_weight_that_is_no_finite_number_is_refused(worker: EngineWorker, weight: Any) -> None:
    """By the adapter's name."""
    with pytest.raises(InvalidRequestError, match="'mild'"):
        worker.submit([5], sampling(), [(make_adapter(make_tiny_model(), "mild"), weight)])


def test_a_forced_token_that_the_model_lacks_ends_its_request(worker: EngineWorker) -> None:
    """Before it is embedded."""
    expected = [worker.submit(p, sampling()).result(60).token_ids for p in PROMPTS]
    good, error = answers_beside(worker, [9, 9], grammar=SCRIPTS.add(lambda: Scripted(forces=(5, VOCAB_SIZE))))
    assert [completion.token_ids for completion in good] == expected
    assert isinstance(error, InvalidRequestError)
    assert f"token {VOCAB_SIZE}" in str(error)


def test_forced_tokens_have_log_probabilities_too(worker: EngineWorker) -> None:
    """A token that the grammar leaves no choice about has 0.0 and no alternatives."""
    completion = worker.submit(
        [9, 9], sampling(logprobs=2), grammar=SCRIPTS.add(lambda: Scripted(forces=(5, 6)))
    ).result(60)
    assert completion.logprobs is not None
    assert [item.token_id for item in completion.logprobs] == list(completion.token_ids)
    assert [(item.token_id, item.logprob, item.top) for item in completion.logprobs[1:3]] == [
        (5, 0.0, ()),
        (6, 0.0, ()),
    ]
    assert all(len(item.top) == 2 for item in (completion.logprobs[0], *completion.logprobs[3:]))


def test_a_step_takes_so_many_forced_tokens_and_no_more() -> None:
    """A grammar that forces a long text shares the engine's thread with the others' tokens."""
    forced = tuple(5 + i % 200 for i in range(400))
    config = EngineConfig(max_num_seqs=2, kv_cache_bytes=1 << 20, lora_cache_bytes=4 << 20)
    with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config, compiler=SCRIPTS) as worker:
        stream = iter(
            worker.submit([9, 9], sampling(max_tokens=410), grammar=SCRIPTS.add(lambda: Scripted(forces=forced)))
        )
        deltas = list(stream)
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert max(len(delta.token_ids) for delta in deltas) <= 257
    assert tuple(tokens[1:257]) == forced[:256]


@pytest.mark.parametrize("change", ["truncated", "overwritten", "removed"])
def test_an_adapter_whose_file_was_changed_ends_its_request(
    worker: EngineWorker, make_checkpoint: Any, tmp_path: Path, change: str
) -> None:
    """With the adapter's name and what to do; those beside it, and a later one with the file as it was, are served."""
    folder = make_checkpoint(tmp_path / "changed")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    adapter = read_adapter(folder)
    expected = [worker.submit(p, sampling()).result(60).token_ids for p in PROMPTS]
    if change == "removed":
        file.replace(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_bytes(b"other")
    else:
        file.write_bytes(whole[:100] if change == "truncated" else whole[:-4] + b"\1\2\3\4")
    good, error = answers_beside(worker, [9, 9], adapters=[(adapter, 1.0)])
    assert [completion.token_ids for completion in good] == expected
    assert isinstance(error, InvalidAdapterError)
    assert "pool.update('changed')" in str(error)
    file.write_bytes(whole)
    again = read_adapter(folder)
    assert again.fingerprint == adapter.fingerprint
    assert worker.submit([9, 9], sampling(), [(again, 1.0)]).result(60).token_ids
