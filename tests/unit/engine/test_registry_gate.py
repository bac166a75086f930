"""The bench's gate over copied adapters catches what it is there for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from engine_gpu.bench import Bench
from engine_gpu.correctness import GateError
from engine_gpu.registry import check_rows, compare_answers

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.api import Completion, TokenLogprob, Usage
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


def make_answer(*positions: Sequence[tuple[int, float]]) -> Completion:
    """An answer from each position's likeliest tokens, of which it takes the first."""
    logprobs = tuple(TokenLogprob(*top[0], tuple(top)) for top in positions)
    return Completion("", tuple(p.token_id for p in logprobs), logprobs, "length", Usage(1, 0, len(positions)))


def test_a_row_that_is_not_its_source_s_fails_the_gate() -> None:
    """One wrong number in one row of one tensor is found, and named; so is a wrong rank."""
    model = make_tiny_model("llama")
    adapters = [
        make_adapter(model, "a", r=3),
        make_adapter(model, "b", r=5, targets=("k_proj", "down_proj")),
        make_adapter(model, "c", r=2),
    ]
    by_fingerprint = {adapter.fingerprint: adapter for adapter in adapters}
    bench = Bench(None, is_tiny=True)
    config = EngineConfig(max_num_seqs=4, kv_cache_bytes=1 << 20, lora_cache_bytes=1 << 20)
    with EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), config) as worker:
        pairs = [(adapter, 0.3) for adapter in adapters]
        worker.submit([5, 6], SamplingParams(max_tokens=2, ignore_eos=True), pairs).result(60)
        check_rows(bench, worker, by_fingerprint)
        assert bench.rows["registry: rows on the device"].startswith("3 adapters, 64 tensors equal")
        stacks = dict(worker.core.runner.lora_layers.stacks)
        slots = worker.core.slots
        resident = slots._residents[adapters[0].fingerprint]
        start = slots._rows.get(adapters[0].fingerprint)
        assert start is not None
        names = next(names for names in stacks if names[0].endswith("layers.1.self_attn.q_proj"))
        stack = stacks[names]
        for tensor, kind, name in (
            (stack.a[2, start + 1], "lora_A", "v_proj"),
            (stack.b[start + 2, :64], "lora_B", "q_proj"),
        ):
            kept = float(tensor[7])
            tensor[7] += 1e-3
            with pytest.raises(
                GateError, match=rf"a, slot {resident.slot}, model.layers.1.self_attn.{name}.{kind}: rows"
            ):
                check_rows(bench, worker, by_fingerprint)
            tensor[7] = kept
        check_rows(bench, worker, by_fingerprint)
        stack.ranks[resident.slot, 1] = 2
        with pytest.raises(GateError, match=r"k_proj: rank 2 on the device, 3 in its source"):
            check_rows(bench, worker, by_fingerprint)


def test_only_a_near_tie_excuses_another_token() -> None:
    """Answers part where two tokens are as likely; not where one is likelier, nor where logprobs changed before."""
    expected = make_answer([(1, -1.0), (2, -3.0)], [(3, -2.0), (4, -2.01)], [(5, -1.0), (6, -1.5)])
    assert compare_answers(expected, expected, 0.0).startswith("the same 3 tokens")
    tie = make_answer([(1, -1.01), (2, -3.0)], [(4, -2.0), (3, -2.01)], [(9, -1.0)])
    assert compare_answers(tie, expected, 0.02).startswith("token 1 of 3 is 4 instead of 3")
    with pytest.raises(GateError, match=r"differ by 0\.01000"):
        compare_answers(tie, expected, 0.005)
    other = make_answer([(1, -1.0), (2, -3.0)], [(7, -2.0), (3, -2.0)], [(9, -1.0)])
    with pytest.raises(GateError, match="is 7 instead of 3"):
        compare_answers(other, expected, 0.02)
